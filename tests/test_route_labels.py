"""Labelling items with paths: what the file holds, a run that is killed, and the way from items to routers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from layerprune.model.decoder import Decoder, forward_logits, view_decoder
from layerprune.model.errors import Refused
from layerprune.model.layerwise import Layerwise
from layerprune.model.load import load_model
from layerprune.route.execute import check_routable
from layerprune.route.features import collect_features
from layerprune.route.items import Item
from layerprune.route.labels import label_items, labelled, summary
from layerprune.route.reward import PathReward
from layerprune.route.routed import RoutedModel
from layerprune.route.search import SearchSettings, search_path
from layerprune.route.train import TrainSettings, train_routers

torch.set_num_threads(1)


def never(answer: tuple[int, ...], token: int) -> bool:
    return False


@pytest.fixture(scope="module")
def decoder(build_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """8 layers of which 3, 4 and 6 add nothing to the stream."""
    folder = build_llama(tmp_path_factory.mktemp("labels") / "model", layers=8)
    made = view_decoder(load_model(folder, device="cpu", dtype="float32"))
    with torch.no_grad():
        for layer in (3, 4, 6):
            made.layers[layer].self_attn.o_proj.weight.zero_()
            made.layers[layer].mlp.down_proj.weight.zero_()
    return made


def some_items(decoder: Decoder, count: int) -> list[Item]:
    """Every third has a wrong answer, the others the model's own."""
    rng, items = random.Random(0), []
    for number in range(count):
        prompt = tuple(rng.choices(range(2, 300), k=rng.randint(4, 12)))
        own = int(forward_logits(decoder, torch.tensor([prompt]))[0, -1].argmax())
        items.append(Item(number + 1, prompt, ((own if number % 3 else (own + 1) % 300,),), None))
    return items


class Killed(BaseException):
    pass


def test_a_killed_search_goes_on(decoder: Decoder, tmp_path: Path) -> None:
    items = some_items(decoder, 6)
    settings = SearchSettings(simulations=12)
    whole = label_items(decoder, "base", items, never, tmp_path / "whole.jsonl", settings)
    for number, (item, record) in enumerate(zip(items, whole, strict=True)):
        reward = PathReward(Layerwise(decoder), item, never)
        found = search_path(reward, 8, settings, number)
        assert record["best"] == (None if found.best is None else list(found.best))
        assert (record["visited"], record["kept"], record["base"]) == (found.visited, found.kept, found.base)
        assert record["useful"] == found.useful
        assert (record["line"], record["prompt"]) == (item.line, list(item.prompt))
        assert 0 < record["applications"] < record["alone"]

    def progress(done: int, left: list[int] = [3]) -> None:  # noqa: B006
        left[0] -= done
        if left[0] == 0:
            raise Killed

    path = tmp_path / "killed.jsonl"
    with pytest.raises(Killed):
        label_items(decoder, "base", items, never, path, settings, progress=progress)
    path.write_bytes(path.read_bytes() + b'{"line": 4, "pro')  # and in the middle of a line
    told: list[int] = []
    assert label_items(decoder, "base", items, never, path, settings, progress=told.append) == whole
    assert told == [3, 1, 1, 1]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    path.write_bytes(path.read_bytes()[:20])  # killed in the first line
    assert label_items(decoder, "base", items, never, path, settings) == whole


def test_a_file_of_another_search_is_left_as_it_is(decoder: Decoder, tmp_path: Path) -> None:
    items, path = some_items(decoder, 2), tmp_path / "paths.jsonl"
    settings = SearchSettings(simulations=2)
    label_items(decoder, "base", items, never, path, settings)
    held = path.read_bytes()
    for base, others, other, seed in (
        ("other", items, settings, 0), ("base", items[:1], settings, 0), ("base", items, SearchSettings(), 0),
        ("base", items, settings, 1),
    ):  # fmt: skip
        with pytest.raises(Refused, match="is not of this search"):
            label_items(decoder, base, others, never, path, other, seed)
    for foreign in (b"notes", b"a line\n", b'{"kind": 3}\nmore'):
        (tmp_path / "foreign").write_bytes(foreign)
        with pytest.raises(Refused, match="is not of this search"):
            label_items(decoder, "base", items, never, tmp_path / "foreign", settings)
        assert (tmp_path / "foreign").read_bytes() == foreign
    assert path.read_bytes() == held
    label_items(decoder, "base", items, never, tmp_path / "new" / "paths.jsonl", settings)
    assert (tmp_path / "new" / "paths.jsonl").read_bytes() == held


def record(best: list[int] | None, base: float, reward: float) -> dict[str, Any]:
    work = {"visited": 4, "simulations": 5, "applications": 10, "alone": 30}
    useful = best is not None and (reward > base or sum(best) < len(best))
    return {"prompt": [3, 4], "best": best, "base": base, "reward": reward, "useful": useful, **work}


def test_what_there_is_to_learn_from() -> None:
    records = [
        record(None, 0.0, 0.0), record([1, 1, 1], 1.0, 1.0), record([1, 0, 1], 1.0, 1.0), record([2, 1, 1], 0.0, 1.0),
        record([0, 0, 1], 1.0, 1.0),
    ]  # fmt: skip
    assert [item.counts for item in labelled(records)] == [(1, 0, 1), (2, 1, 1), (0, 0, 1)]
    assert summary(records) == {
        "items": 5, "answered": 3, "useful": 3, "improved": 1, "shorter": 2, "mean_saved": 2 / 3, "visited": 20,
        "simulations": 25, "applications": 50, "alone": 150,
    }  # fmt: skip
    assert summary(records[:2])["mean_saved"] is None and labelled([]) == []


def test_from_items_to_routed_generation(decoder: Decoder, tmp_path: Path) -> None:
    """The layers that add nothing are found, the routers learn to skip layers, and the answers stay."""
    items = [item for item in some_items(decoder, 45) if item.line % 3 != 1]
    settings = SearchSettings(simulations=120, stop_shorter=3)
    records = label_items(decoder, "base", items, never, tmp_path / "paths.jsonl", settings)
    found = summary(records)
    assert found["answered"] == 30 and found["shorter"] >= 25 and found["mean_saved"] > 2.5
    assert found["applications"] < 0.6 * found["alone"]
    skipped = [sum(item.counts[layer] == 0 for item in labelled(records)) for layer in range(8)]
    assert min(skipped[layer] for layer in (3, 4, 6)) > max(skipped[layer] for layer in (0, 1, 2, 5, 7))
    features = collect_features(decoder, "base", labelled(records), tmp_path / "features")
    routers, _ = train_routers(features, TrainSettings(), tmp_path / "training")
    made = RoutedModel(decoder, routers).generate([item.prompt for item in items], 1)
    assert sum(len(one.counts) - sum(one.counts) for one in made) > len(made)
    kept = sum(one.tokens == item.endings[0] for one, item in zip(made, items, strict=True))
    assert kept > 0.8 * len(items)
    assert json.loads((tmp_path / "paths.jsonl").read_text().splitlines()[0])["layers"] == 8


def test_a_model_that_does_more_between_its_layers_is_refused(tmp_path: Path) -> None:
    decoder = view_decoder(load_model(families.build("RWKV", tmp_path / "model"), device="cpu", dtype="float32"))
    with pytest.raises(Refused, match="does more between its layers than hand states on"):
        check_routable(decoder)
    with pytest.raises(Refused, match="its layers cannot be routed"):
        label_items(decoder, "base", [], never, tmp_path / "paths.jsonl")
    assert not (tmp_path / "paths.jsonl").exists()
