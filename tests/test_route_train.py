"""Training routers: what they see against a plain loop over the layers, resuming to the bit, and rules that can be learnt."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerprune.model.decoder import Decoder, view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model
from layerprune.route import features as features_module
from layerprune.route import train
from layerprune.route.features import Features, Labelled, collect_features
from layerprune.route.router import Routers
from layerprune.route.train import TrainSettings, scores, train_routers

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path) -> Decoder:
    return view_decoder(load_model(tiny_llama, device="cpu", dtype="float32"))


def some_items(count: int, seed: int = 0) -> list[Labelled]:
    rng = random.Random(seed)
    return [
        Labelled(
            tuple(rng.choices(range(2, 300), k=rng.randint(2, 20))), (1, *rng.choices((0, 1, 2), (2, 6, 1), k=4))
        )
        for _ in range(count)
    ]  # fmt: skip


@torch.no_grad()
def seen_by_hand(decoder: Decoder, item: Labelled) -> list[list[torch.Tensor]]:
    """For each layer the windows' means, from a plain loop over the modules of a Llama."""
    inner = decoder.model.model
    x = inner.embed_tokens(torch.tensor([item.prompt]))
    tokens = len(item.prompt)
    positions = torch.arange(tokens)[None]
    rotary, mask = inner.rotary_emb(x, positions), torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
    found = []
    for layer, count in zip(inner.layers, item.counts, strict=True):
        windows = min(8, tokens)
        size = tokens // windows
        found.append([x[0, w * size : (w + 1) * size].mean(0) for w in range(windows)])
        for _ in range(count):
            x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return found


def test_routers_see_the_states_along_the_labelled_path(decoder: Decoder, tmp_path: Path) -> None:
    items = some_items(12)
    told: list[int] = []
    found = collect_features(decoder, "base", items, tmp_path / "features", told.append)
    assert found.pooled_NLWD.shape == (12, 5, 8, 64) and found.pooled_NLWD.dtype == torch.float32
    assert told == [0, *[1] * 12]
    assert found.labels_NL.tolist() == [list(item.counts) for item in items]
    for number, item in enumerate(items):
        expected = seen_by_hand(decoder, item)
        windows = len(expected[0])
        assert found.real_NW[number].tolist() == [w < windows for w in range(8)]
        for layer in range(5):
            torch.testing.assert_close(found.pooled_NLWD[number, layer, :windows], torch.stack(expected[layer]))
    # the path matters: without teacher forcing a later layer would see another state
    whole = seen_by_hand(decoder, Labelled(items[0].prompt, (1,) * 5))
    assert not torch.allclose(whole[4][0], seen_by_hand(decoder, items[0])[4][0], atol=1e-2)


def test_half_precision_states_are_kept_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    half = view_decoder(load_model(tiny_llama, device="cpu", dtype="bfloat16"))
    found = collect_features(half, "base", some_items(3), tmp_path)
    assert found.pooled_NLWD.dtype == torch.bfloat16
    assert (tmp_path / "features.bin").stat().st_size == 3 * 5 * 8 * 64 * 2


class Killed(BaseException):
    pass


def killed_after(count: int) -> Callable[[int], None]:
    left = [count]

    def progress(done: int) -> None:
        left[0] -= done
        if left[0] < 0:
            raise Killed

    return progress


def test_a_killed_collection_goes_on(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = some_items(10)
    whole = collect_features(decoder, "base", items, tmp_path / "whole")
    monkeypatch.setattr(features_module, "_SAVED_EVERY", 3)
    with pytest.raises(Killed):
        collect_features(decoder, "base", items, tmp_path / "killed", killed_after(7))
    ran: list[Labelled] = []
    plain = features_module.pooled_states
    monkeypatch.setattr(features_module, "pooled_states", lambda l, item: [ran.append(item), plain(l, item)][1])  # noqa: E741
    found = collect_features(decoder, "base", items, tmp_path / "killed")
    assert ran == items[6:]
    assert torch.equal(found.pooled_NLWD, whole.pooled_NLWD) and found.key == whole.key
    ran.clear()
    again = collect_features(decoder, "base", items, tmp_path / "killed")
    assert not ran and torch.equal(again.pooled_NLWD, whole.pooled_NLWD)
    for base, others in (("another", items), ("base", items[:9]), ("base", some_items(10, seed=1))):
        with pytest.raises(Refused, match="features of another model or of other prompts"):
            collect_features(decoder, base, others, tmp_path / "killed")
    (tmp_path / "killed" / "features.bin").unlink()
    again = collect_features(decoder, "base", items, tmp_path / "killed")
    assert ran == items and torch.equal(again.pooled_NLWD, whole.pooled_NLWD)


def test_what_cannot_be_collected_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no labelled prompt"):
        collect_features(decoder, "base", [], tmp_path)
    with pytest.raises(UsageError, match="a path of 4 counts does not fit a model of 5 layers"):
        collect_features(decoder, "base", [Labelled((3, 4), (1,) * 4)], tmp_path)
    weight = decoder.layers[2].mlp.down_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = math.nan
        with pytest.raises(Refused, match="states are not numbers"):
            collect_features(decoder, "base", [Labelled((3, 4), (1,) * 5)], tmp_path)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def made_features(pooled_NLWD: torch.Tensor, labels_NL: torch.Tensor, key: str = "made") -> Features:
    return Features(pooled_NLWD, torch.ones(len(pooled_NLWD), 8, dtype=torch.bool), labels_NL, key)


def ruled(items: int = 120, layers: int = 3, width: int = 12) -> Features:
    """Layer l's label hangs on the largest of the state's features 3 l .. 3 l + 2; the rest is noise."""
    generator = torch.Generator().manual_seed(0)
    pooled_NLWD = torch.randn(items, layers, 8, width, generator=generator)
    labels_NL = torch.randint(0, 3, (items, layers), generator=generator)
    for layer in range(layers):
        pooled_NLWD[torch.arange(items), layer, :, 3 * layer + labels_NL[:, layer]] += 2.0
    return made_features(pooled_NLWD, labels_NL)


def test_a_rule_is_learnt_and_carries_over(tmp_path: Path) -> None:
    features = ruled()
    told: list[int] = []
    routers, report = train_routers(features, TrainSettings(), tmp_path, progress=told.append)
    assert told == [0, *[1] * 25] and not routers.training
    assert (report["items"], report["trained_on"], report["held_out"]["layers"]) == (120, 108, 36)
    assert sum(report["classes"].values()) == 108 * 3 and sum(report["alpha"]) == pytest.approx(3)
    assert report["losses"][-1] < 0.2 * report["losses"][0]
    assert report["held_out"]["accuracy"] > 0.9 > report["held_out"]["always_execute"]
    assert report["held_out"]["macro_f1"] > 0.9


def test_noise_is_not_learnt(tmp_path: Path) -> None:
    """Labels that hang on nothing: better on what was trained on, chance on what was held out."""
    features = ruled()
    shuffled = features.labels_NL[torch.randperm(120, generator=torch.Generator().manual_seed(1))]
    settings = TrainSettings(held_out=40)
    _, report = train_routers(made_features(features.pooled_NLWD, shuffled), settings, tmp_path)
    assert report["losses"][-1] < 0.9 * report["losses"][0]
    assert 0.15 < report["held_out"]["accuracy"] < 0.5


def test_the_scores_are_of_the_held_out_items(tmp_path: Path) -> None:
    """Recounted from the routers that come back; another set of items held out gives another count."""
    features, settings = ruled(60), TrainSettings(epochs=3, held_out=15, seed=4)
    routers, report = train_routers(features, settings, tmp_path)
    train_N, held_N = settings.split(60)
    assert sorted([*train_N.tolist(), *held_N.tolist()]) == list(range(60)) and len(held_N) == 15
    count = [[0] * 3 for _ in range(3)]
    with torch.no_grad():
        for number in held_N.tolist():
            chosen = routers(features.pooled_NLWD[number, None], features.real_NW[number, None])[0].argmax(-1)
            for true, said in zip(features.labels_NL[number].tolist(), chosen.tolist(), strict=True):
                count[true][said] += 1
    assert report["held_out"]["confusion"] == count


def weights_of(routers: Routers) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in routers.state_dict().items()}


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    features, settings = ruled(40), TrainSettings(epochs=8)
    whole, report = train_routers(features, settings, tmp_path / "whole")
    with pytest.raises(Killed):
        train_routers(features, settings, tmp_path / "killed", progress=killed_after(3))
    told: list[int] = []
    found, again = train_routers(features, settings, tmp_path / "killed", progress=told.append)
    assert told == [4, *[1] * 4]
    assert weights_of(found) == weights_of(whole) and again == report
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["training.pt"]
    other, _ = train_routers(features, TrainSettings(epochs=8, seed=1), tmp_path / "other")
    assert weights_of(other) != weights_of(whole)


def test_another_training_is_left_as_it_is(tmp_path: Path) -> None:
    features = ruled(20)
    train_routers(features, TrainSettings(epochs=1), tmp_path)
    for other, settings in (
        (features, TrainSettings(epochs=2)),
        (made_features(features.pooled_NLWD, features.labels_NL, "other"), TrainSettings(epochs=1)),
    ):
        with pytest.raises(Refused, match="belongs to a training with other prompts or settings"):
            train_routers(other, settings, tmp_path)
    (tmp_path / "training.pt").write_bytes(b"broken")
    with pytest.raises(Refused, match="cannot be read"):
        train_routers(features, TrainSettings(epochs=1), tmp_path)


def test_the_rate_by_hand() -> None:
    settings = TrainSettings(warmup=4)
    assert [settings.rate(step, 100) for step in range(4)] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert settings.rate(4, 100) == 1e-3 and settings.rate(52, 100) == pytest.approx(0.5e-3)
    assert settings.rate(99, 100) == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 95 / 96)))
    # never more than a tenth of all steps is warm-up
    assert TrainSettings().rate(9, 100) == 1e-3 and TrainSettings().rate(0, 100) == pytest.approx(1e-4)
    assert TrainSettings().rate(0, 5) == 1e-3


def test_scores_by_hand() -> None:
    found = scores(torch.tensor([[2, 1, 1], [0, 9, 1], [0, 0, 0]]))
    assert found["precision"] == {"skip": 1.0, "execute": 0.9, "repeat": 0.0}
    assert found["recall"] == {"skip": 0.5, "execute": 0.9, "repeat": None}
    assert found["f1"] == pytest.approx({"skip": 2 / 3, "execute": 0.9, "repeat": 0.0})
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.9) / 2)
    assert (found["layers"], found["accuracy"], found["always_execute"]) == (14, 11 / 14, 10 / 14)
    absent = scores(torch.tensor([[0, 0, 0], [0, 5, 0], [0, 0, 0]]))
    assert absent["precision"]["skip"] is absent["recall"]["skip"] is absent["f1"]["skip"] is None


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch": 0}, {"warmup": -1}, {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"weight_decay": -1.0},
     {"held_out": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TrainSettings(**wrong)


def test_too_few_items_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 labelled prompts with 1 held out leave none"):
        train_routers(ruled(1), TrainSettings(), tmp_path)


def test_a_loss_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    features = ruled(20)
    features.pooled_NLWD[:] = math.nan
    with pytest.raises(Refused, match="in epoch 1 is not a number"):
        train_routers(features, TrainSettings(), tmp_path)
    assert not (tmp_path / "training.pt").exists()


def test_prompts_that_call_for_different_paths(decoder: Decoder, tmp_path: Path) -> None:
    """From end to end: the path hangs on which words a prompt is made of."""
    rng = random.Random(2)
    items = []
    for number in range(60):
        low = number % 2 == 0
        words = tuple(rng.choices(range(20, 40) if low else range(200, 220), k=rng.randint(8, 24)))
        items.append(Labelled(words, (1, 0, 1, 1, 1) if low else (1, 1, 1, 2, 1)))
    features = collect_features(decoder, "base", items, tmp_path / "features")
    _, report = train_routers(features, TrainSettings(), tmp_path / "training")
    held = report["held_out"]
    assert held["always_execute"] == pytest.approx(0.8)
    assert held["accuracy"] > 0.95 and held["macro_f1"] > 0.9


def test_the_size_of_the_states_does_not_matter(decoder: Decoder, tmp_path: Path) -> None:
    found = collect_features(decoder, "base", some_items(24), tmp_path / "features")
    factor_L = torch.tensor([2.0**power for power in (-4, 0, 3, 7, 10)])
    larger = Features(found.pooled_NLWD * factor_L[:, None, None], found.real_NW, found.labels_NL, "larger")
    settings = TrainSettings(epochs=3, held_out=6)
    routers, report = train_routers(found, settings, tmp_path / "found")
    others, same = train_routers(larger, settings, tmp_path / "larger")
    assert report == same
    plain, _ = train_routers(larger, TrainSettings(epochs=3, held_out=6, scaled=False), tmp_path / "plain")
    with torch.no_grad():
        logits = routers(found.pooled_NLWD, found.real_NW)
        assert torch.equal(logits, others(larger.pooled_NLWD, larger.real_NW))
        assert not torch.allclose(logits, plain(larger.pooled_NLWD, larger.real_NW))
    sizes = [found.pooled_NLWD[TrainSettings(held_out=6).split(24)[0], layer] for layer in range(5)]
    real = found.real_NW[TrainSettings(held_out=6).split(24)[0]]
    by_hand = torch.stack([states[real].square().mean().sqrt() for states in sizes])
    assert torch.allclose(train.state_sizes(found, TrainSettings(held_out=6).split(24)[0], 16), by_hand)
