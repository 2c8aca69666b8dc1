"""`route eval` and `route bake` from end to end: planted routers, brute force, what is left out, resumed and refused."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from layerprune import route_figures, route_plots, route_use
from layerprune.cli import main
from layerprune.eval.evaluate import evaluate_live
from layerprune.model.cuts import Block, last_block
from layerprune.model.decoder import forward_logits, view_decoder, virtual_cut
from layerprune.model.errors import Refused, UsageError
from layerprune.model.layerwise import Layerwise
from layerprune.model.load import load_model, load_tokenizer
from layerprune.prune.cut import prune_checkpoint
from layerprune.prune.rank import rank_blocks
from layerprune.route.items import prompt_key
from layerprune.route.paths import Counts
from layerprune.route.routed import RoutedModel
from layerprune.route.router import Routers
from layerprune.route.router_file import load_routers, save_routers
from layerprune.route_bake import bake_routing, cut_of, prune_orders
from layerprune.route_compare import compare, depths_around, sentence, static_items
from layerprune.route_text import format_baked, format_routing
from layerprune.route_use import evaluate_routing

torch.set_num_threads(1)

LAYERS = 8
PLANTED = (1, 1, 1, 0, 1, 2, 1, 1)


@pytest.fixture(scope="module", autouse=True)
def own_dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def ranking(run_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rank") / "rank.json"
    rank_blocks(run_inputs / "model", data=str(run_inputs / "calibration.jsonl"), length=32, device="cpu", out=out)
    return out


Make = Callable[..., Path]


@pytest.fixture
def make(run_inputs: Path, tmp_path: Path) -> Make:
    """Routers in a folder: on one path, or (None) leaning to ways that differ by prompt."""

    def made(counts: Counts | None = None, about: dict[str, Any] | None = None, name: str = "routers") -> Path:
        routers = Routers(LAYERS, 64, seed=1)
        with torch.no_grad():
            if counts is None:
                routers.down_LCH.mul_(3.0)
                routers.down_bias_LC[:, 1] += 0.5
            for layer, count in enumerate(counts or ()):
                routers.down_bias_LC[layer, count] = 1e4
        save_routers(routers, run_inputs / "model", tmp_path / name, about)
        return tmp_path / name

    return made


@pytest.fixture
def items_file(tmp_path: Path) -> Path:
    words = "the a salt mill river goes to by over and stone town lamp bird low".split()
    items: list[dict[str, Any]] = [
        {"prompt": f"{words[i]} {words[i + 1]} {words[-i]}", "options": [words[i + 2], words[i + 3], words[i + 4]], "gold": i % 3}
        for i in range(10)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({**item, "task": "even" if i % 2 == 0 else "odd"}) + "\n" for i, item in enumerate(items)))
    return path


def options(inputs: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "tasks": ["tiny"], "task_folder": inputs / "tasks", "device": "cpu", "out": out, "say": lambda line: None, **more,
    }  # fmt: skip


def docs_of(inputs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (inputs / "tasks" / "items.jsonl").read_text().splitlines()]


def live(inputs: Path) -> tuple[Any, Any]:
    return load_model(inputs / "model", device="cpu"), load_tokenizer(inputs / "model")


@torch.no_grad()
def most_probable(model: Any, counts: Counts, context: Sequence[int], endings: Sequence[Sequence[int]]) -> int:
    """Which ending is the most probable in sum along a path; the first of equals."""
    values = []
    for ending in endings:
        ids = [*context, *ending]
        batch = Layerwise(view_decoder(model)).begin(torch.tensor([ids]))
        state = batch.start()
        for layer, count in enumerate(counts):
            for _ in range(count):
                state = batch.step(layer, state)
        logp_TV = batch.logits(state, torch.zeros(len(ids), dtype=torch.long), torch.arange(len(ids))).log_softmax(-1)
        values.append(sum(float(logp_TV[len(context) - 1 + i, token]) for i, token in enumerate(ending)))
    return max(range(len(values)), key=values.__getitem__)


def by_hand(inputs: Path, routers: Path, dial: str | float) -> tuple[list[int], list[Counts]]:
    """Of each item of the task: whether it is right, and its path."""
    model, tokenizer = live(inputs)
    routed = RoutedModel(view_decoder(model), load_routers(routers, inputs / "model"), dial)
    right, paths = [], []
    for doc in docs_of(inputs):
        context = tokenizer(doc["question"])["input_ids"]
        endings = [tokenizer(f"{doc['question']} {choice}")["input_ids"][len(context) :] for choice in doc["choices"]]
        (counts,) = routed.decide([context])
        paths.append(counts)
        right.append(int(most_probable(model, counts, context, endings) == doc["gold"]))
    return right, paths


def test_an_evaluation_says_what_brute_force_says(run_inputs: Path, tmp_path: Path, make: Make, ranking: Path) -> None:
    routers, out = make(about={"prompts": []}), tmp_path / "out"
    found = evaluate_routing(run_inputs / "model", routers, rank=ranking, **options(run_inputs, out, dials=["router", -0.4]))
    assert [one["name"] for one in (found["base"], *found["routed"])] == ["execute", "router", "-0.4"]
    assert found["base"]["layers"] == LAYERS and found["items"] == {
        "tiny": {"items": 12, "left_out": 0, "chance": pytest.approx(1 / 3)}
    }
    for one in (found["base"], *found["routed"]):
        right, paths = by_hand(run_inputs, routers, one["name"])
        assert one["accuracy"] == one["tasks"]["tiny"]["accuracy"] == pytest.approx(np.mean(right))
        assert one["layers"] == pytest.approx(np.mean([sum(path) for path in paths]))
        assert one["usage"]["tiny"] == pytest.approx(np.mean(paths, axis=0).tolist())
        assert one["seconds"] > 0
    main_one = found["routed"][0]
    assert main_one["layers"] < LAYERS and not float(main_one["layers"]).is_integer()
    model, tokenizer = live(run_inputs)
    best = json.loads(ranking.read_text())["best"]
    for strategy, cuts in found["static"].items():
        assert {cut["layers"] for cut in cuts} >= depths_around(main_one["layers"], LAYERS, 1)
        for cut in cuts:
            n = LAYERS - cut["layers"]
            block = None if n == 0 else last_block(n, LAYERS) if strategy == "last" else Block(best[str(n)], n)
            kept = tuple(range(LAYERS)) if block is None else block.kept(LAYERS)
            assert tuple(cut["kept"]) == kept
            with virtual_cut(view_decoder(model), kept):
                alone = evaluate_live(model, tokenizer, tasks={"tiny": None}, task_folder=run_inputs / "tasks")
            assert cut["accuracy"] == pytest.approx(alone["tasks"]["table"][0]["value"])
        low, high = math.floor(main_one["layers"]), math.ceil(main_one["layers"])
        value = {cut["layers"]: cut["accuracy"] for cut in cuts}
        share = main_one["layers"] - low
        expected = main_one["accuracy"] - (value[low] * (1 - share) + value[high] * share)
        against = main_one["against"][strategy]
        assert against["difference"] == pytest.approx(expected) and against["between"] in ((low, high), [low, high])
        assert against["low"] <= against["difference"] <= against["high"]
    assert json.loads((out / "eval.json").read_text())["base"]["accuracy"] == found["base"]["accuracy"]
    assert {path.name for path in (out / "figures").iterdir()} == {"routing.png", "routing.svg", "usage.png", "usage.svg"}
    text = format_routing(found)
    assert "12 items" in text and f"{main_one['accuracy']:.4f}" in text and main_one["against"]["last"]["sentence"] in text


def test_planted_routers_are_followed_and_their_length_is_compared_fairly(run_inputs: Path, tmp_path: Path, make: Make) -> None:
    """One layer skipped, one repeated: as long as the model, so it is compared with the model itself."""
    found = evaluate_routing(
        run_inputs / "model", make(PLANTED), **options(run_inputs, tmp_path / "out", dials=["router"], static="last")
    )
    (one,) = found["routed"]
    assert one["layers"] == LAYERS and one["usage"]["tiny"] == list(PLANTED)
    against = one["against"]["last"]
    assert list(against["between"]) == [LAYERS, LAYERS] and not against["deeper"]
    assert against["difference"] == pytest.approx(one["accuracy"] - found["base"]["accuracy"])
    assert not found["searched_known"] and "the routers do not say" in format_routing(found)


def test_a_file_of_items_counts_by_the_reward_of_the_search(run_inputs: Path, tmp_path: Path, make: Make, items_file: Path) -> None:
    routers = make()
    found = evaluate_routing(
        run_inputs / "model", routers, items=items_file, static="last", dials=["router"], device="cpu", out=tmp_path / "out",
        say=lambda line: None,
    )  # fmt: skip
    model, tokenizer = live(run_inputs)
    routed = RoutedModel(view_decoder(model), load_routers(routers, run_inputs / "model"))
    right: dict[str, list[int]] = {"even": [], "odd": []}
    lengths: dict[str, list[int]] = {"even": [], "odd": []}
    for line in items_file.read_text().splitlines():
        item = json.loads(line)
        context = tokenizer(item["prompt"])["input_ids"]
        endings = [tokenizer(f"{item['prompt']} {option}")["input_ids"][len(context) :] for option in item["options"]]
        (counts,) = routed.decide([context])
        right[item["task"]].append(int(most_probable(model, counts, context, endings) == item["gold"]))
        lengths[item["task"]].append(sum(counts))
    (one,) = found["routed"]
    for task, values in right.items():
        assert one["tasks"][task]["accuracy"] == pytest.approx(np.mean(values))
        assert one["tasks"][task]["layers"] == pytest.approx(np.mean(lengths[task]))
        assert found["items"][task]["chance"] == pytest.approx(1 / 3)
    assert one["accuracy"] == pytest.approx(np.mean([np.mean(values) for values in right.values()]))
    assert one["layers"] == pytest.approx(np.mean([np.mean(values) for values in lengths.values()]))
    assert "even" in format_routing(found) and "odd" in format_routing(found)


def test_items_of_the_search_are_left_out(run_inputs: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(run_inputs / "model")
    keys = [prompt_key(tokenizer(doc["question"])["input_ids"]) for doc in docs_of(run_inputs)]
    routers = make(about={"prompts": [keys[0], keys[3], keys[7], "0" * 16]})
    found = evaluate_routing(
        run_inputs / "model", routers, **options(run_inputs, tmp_path / "out", dials=["router"], static="last")
    )
    assert found["items"]["tiny"]["items"] == 9 and found["items"]["tiny"]["left_out"] == 3
    right, _ = by_hand(run_inputs, routers, "router")
    stayed = [value for i, value in enumerate(right) if i not in (0, 3, 7)]
    assert found["routed"][0]["accuracy"] == pytest.approx(np.mean(stayed))
    assert "3 more were in the search" in format_routing(found)
    routers = make(about={"prompts": keys}, name="all")
    assert_refused_before_a_model_is_loaded(
        monkeypatch, "all 12 items of tiny were", run_inputs / "model", routers,
        **options(run_inputs, tmp_path / "none", dials=["router"], static="none"),
    )  # fmt: skip


def assert_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, why: str, *given: Any, **settings: Any) -> None:
    loaded: list[int] = []
    monkeypatch.setattr("layerprune.model.load.load_model", lambda *args, **kwargs: loaded.append(1))
    with pytest.raises(Refused, match=f"{why} in the search of these routers"):
        evaluate_routing(*given, **settings)
    assert not loaded and not settings["out"].exists()


def test_a_file_of_which_one_task_was_searched_is_refused_at_once(
    run_inputs: Path, tmp_path: Path, make: Make, items_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(run_inputs / "model")
    items = [json.loads(line) for line in items_file.read_text().splitlines()]
    keys = [prompt_key(tokenizer(item["prompt"])["input_ids"]) for item in items if item["task"] == "odd"]
    routers = make(about={"prompts": keys})
    assert_refused_before_a_model_is_loaded(
        monkeypatch, "all 5 items of odd were", run_inputs / "model", routers, items=items_file, device="cpu",
        out=tmp_path / "none", say=lambda line: None, dials=["router"], static="none",
    )  # fmt: skip


def test_dials_at_which_every_layer_runs_once_have_no_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(route_plots, "save", lambda figure, folder, name: drawn.append(figure) or [])
    moves = {"name": "router", "layers": 7.5, "usage": {"t": [1.0, 0.5, *[1.0] * 6], "u": [1.0] * 8}}
    still = {"name": "0", "layers": 8.0, "usage": {"t": [1.0] * 8, "u": [1.0] * 8}}
    route_plots.plot_usage({"layers": 8, "routed": [still, moves]}, tmp_path)
    route_plots.plot_usage({"layers": 8, "routed": [still]}, tmp_path)
    route_plots.plot_usage({"layers": 8, "routed": [moves]}, tmp_path)
    titles = [[axes.get_title() for axes in figure.axes if axes.lines] for figure in drawn]
    assert titles == [["dial router: 7.50 layers on average"], [], ["dial router: 7.50 layers on average"]]
    once = "not drawn, since every layer runs once on every prompt: dial 0"
    assert once in drawn[0].get_suptitle() and [text.get_text() for text in drawn[1].axes[0].texts] == [once]
    assert "once" not in drawn[2].get_suptitle()


@pytest.mark.parametrize("empty", ["skip", "repeat"])
def test_an_action_that_no_layer_has_is_said_and_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(route_figures, "save", lambda figure, folder, name: drawn.append(figure) or [])
    shares = {action: [0.0] * 8 if action == empty else [0.25] * 8 for action in ("skip", "repeat")}
    route_figures.plot_layers({"items": 5, "by_layer": dict.fromkeys(("labels", "held_out", "routers"), shares)}, tmp_path)
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    said = {"skip": "no layer is skipped", "repeat": "no layer is repeated"}[empty]
    assert [text.get_text().partition(",")[0] for text in panels.pop(empty).texts] == [said]
    (other,) = panels.values()
    assert not other.texts and len(other.lines) == 2 and len(drawn[0].legends[0].get_texts()) == 3


def test_a_killed_evaluation_goes_on_and_takes_more_dials(
    run_inputs: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    routers, out = make(), tmp_path / "out"
    settings = options(run_inputs, out, static="last")
    asked: list[float] = []
    measured = route_use.Evaluation._routed

    def counted(self: Any, dial: float) -> dict[str, Any]:
        if len(asked) == 2:
            asked.clear()
            raise KeyboardInterrupt
        asked.append(dial)
        return measured(self, dial)

    monkeypatch.setattr(route_use.Evaluation, "_routed", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_routing(run_inputs / "model", routers, dials=["router", 0.0], **settings)
    assert not (out / "eval.json").exists()
    first = evaluate_routing(run_inputs / "model", routers, dials=["router", 0.0], **settings)
    assert asked == [0.0]
    again = evaluate_routing(run_inputs / "model", routers, dials=["router", 0.0], **settings)
    assert again == first and asked == [0.0]
    more = evaluate_routing(run_inputs / "model", routers, dials=["router", 0.0, -0.55], **settings)
    assert asked == [0.0, -0.55] and more["routed"][:2] == first["routed"]
    with pytest.raises(UsageError, match="holds a run of other inputs"):
        evaluate_routing(run_inputs / "model", routers, **options(run_inputs, out, limit=3, static="none"))


def test_what_cannot_be_measured_is_refused(
    run_inputs: Path, tmp_path: Path, make: Make, ranking: Path, build_llama: Callable[..., Path]
) -> None:
    def refused(error: type[Exception], match: str, routers: Path | None = None, model: Path | None = None, **more: Any) -> None:
        with pytest.raises(error, match=match):
            evaluate_routing(model or run_inputs / "model", routers or good, **options(run_inputs, tmp_path / "out", **more))
        assert not (tmp_path / "out").exists()

    good = make()
    refused(Refused, "holds no routers", routers=tmp_path / "nothing")
    refused(Refused, "trained for another checkpoint", model=build_llama(tmp_path / "other", layers=LAYERS))
    refused(UsageError, "--static none has none", static="none", rank=ranking)
    refused(UsageError, "--static all is none of", static="all")
    refused(UsageError, "the dial 3 is none", dials=[3])
    refused(Refused, "rank.json", rank=tmp_path / "no-rank.json")
    refused(UsageError, "has no training documents", split="train", static="none")
    with pytest.raises(UsageError, match="neither is given"):
        evaluate_routing(run_inputs / "model", good, static="none", device="cpu", out=tmp_path / "out")


def test_a_task_without_single_answers_is_refused(run_inputs: Path, tmp_path: Path, make: Make) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(run_inputs / "tasks", tasks)
    config = (tasks / "tiny.yaml").read_text().replace("task: tiny", "task: length").replace("metric: acc", "metric: brier_score")
    (tasks / "length.yaml").write_text(config)
    settings = options(run_inputs, tmp_path / "out", static="none", tasks=["length"], task_folder=tasks)
    with pytest.raises(Refused, match="task length has no accuracy item by item"):
        evaluate_routing(run_inputs / "model", make(), **settings)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_training_is_taken_for_its_routers(run_inputs: Path, tmp_path: Path, make: Make) -> None:
    shutil.move(make(PLANTED), tmp_path / "moved")
    (tmp_path / "training").mkdir()
    shutil.move(tmp_path / "moved", tmp_path / "training" / "routers")
    settings = options(run_inputs, tmp_path / "out", dials=["router"], static="none")
    found = evaluate_routing(run_inputs / "model", tmp_path / "training", **settings)
    assert found["routed"][0]["usage"]["tiny"] == list(PLANTED) and found["static"] == {}
    assert "static cut" not in format_routing(found)


def test_depths_and_interpolation() -> None:
    assert depths_around(6.25, 8) == {6, 7} and depths_around(6.25, 8, 1) == {5, 6, 7, 8}
    assert depths_around(7.0000000001, 8) == {7} and depths_around(9.4, 8, 1) == {7, 8} and depths_around(1.0, 8, 1) == {1, 2}
    by_depth = {6: [0, 0, 1, 1], 7: [0, 1, 0, 1]}
    assert static_items(by_depth, 6.25, 8).tolist() == [0, 0.25, 0.75, 1]
    assert static_items(by_depth, 7.0, 8).tolist() == [0, 1, 0, 1]


def test_a_comparison_is_paired() -> None:
    """Routing is right on the same items and some more: the interval knows that they are the same."""
    rng = np.random.default_rng(0)
    base_N = rng.integers(2, size=400)
    routed_N = base_N.copy()
    routed_N[np.flatnonzero(base_N == 0)[:20]] = 1
    won = compare({"t": routed_N.tolist()}, {"t": {6: base_N.tolist()}}, 6.0, 8)
    assert won.winner == "routing" and won.difference == pytest.approx(0.05) and 0.02 < won.low < 0.05 < won.high < 0.08
    lost = compare({"t": base_N.tolist()}, {"t": {6: routed_N.tolist()}}, 6.0, 8)
    assert lost.winner == "static" and lost.difference == pytest.approx(-0.05)
    open_ = compare({"t": rng.permutation(base_N).tolist()}, {"t": {6: base_N.tolist()}}, 6.0, 8)
    assert open_.winner == "not decided" and open_.low < 0 < open_.high
    same = compare({"t": base_N.tolist()}, {"t": {6: base_N.tolist()}}, 6.0, 8)
    assert (same.difference, same.low, same.high, same.winner) == (0, 0, 0, "not decided")
    # about the standard error of the mean of the paired differences
    gap_N = routed_N - base_N
    assert won.high - won.low == pytest.approx(2 * 1.96 * gap_N.std() / math.sqrt(400), rel=0.1)
    tasks = compare({"a": [1] * 10, "b": [0] * 90}, {"a": {6: [0] * 10}, "b": {6: [0] * 90}}, 6.0, 8)
    assert tasks.difference == pytest.approx(0.5)  # tasks count alike, whatever their size


def test_who_wins_in_one_sentence() -> None:
    by_depth = {"t": {6: [0] * 30, 7: [0] * 30}, "u": {8: [1, 0] * 15}}
    won = compare({"t": [1] * 30}, {"t": by_depth["t"]}, 6.5, 8)
    assert sentence(won, "router", "angular") == (
        "At 6.50 layers (the cut interpolated between 6 and 7) routing (router) gives 100.0 points more right answers than the "
        "model cut by angular distance (95 % interval +100.0 to +100.0)."
    )
    lost = compare({"t": [0] * 30}, {"t": {6: [1] * 30}}, 6.0, 8)
    assert sentence(lost, "0", "last") == (
        "At 6.00 layers routing (0) gives 100.0 points fewer right answers than the model cut by last n (95 % interval -100.0 to "
        "-100.0)."
    )
    deeper = compare({"u": [1, 0] * 15}, {"u": by_depth["u"]}, 8.25, 8)
    assert deeper.deeper and sentence(deeper, "router", "last") == (
        "Not decided: with 8.25 layers on average, more than the model has, routing (router) gives as many right answers as the "
        "whole model (95 % interval 0.0 to 0.0)."
    )
    near = replace(deeper, difference=-0.0004, low=-0.011, high=0.0002)
    assert "as many right answers as the whole model (95 % interval -1.1 to +0.02)" in sentence(near, "router", "last")


def bake(inputs: Path, out: Path, **more: Any) -> dict[str, Any]:
    return bake_routing(
        inputs / "model", device="cpu", out=out, eval_data=str(inputs / "loss.jsonl"), say=lambda line: None, **more
    )


def test_layers_always_skipped_are_cut_and_the_cut_is_the_routed_model(run_inputs: Path, tmp_path: Path, make: Make) -> None:
    counts = (1, 0, 0, 1, 1, 0, 1, 1)
    routers, out = make(counts), tmp_path / "out"
    found = bake(run_inputs, out, routers=routers)
    assert found["dropped"] == [1, 2, 5] and found["kept"] == [0, 3, 4, 6, 7] and found["blocks"] == [[5, 6], [1, 3]]
    assert found["same"] == 1 and found["prompts"] == 10 and found["paths"]["different"] == 1 and found["refused"] is None
    text = format_baked(found)
    assert "layers 1:3, 5:6" in text and "on 100 % of the prompts" in text and "They are 2 blocks" in text
    for order in found["commands"]:
        words = shlex.split(order)
        assert words[:2] == ["layerprune", "prune"] and order in text
        given = dict(zip(words[2::2], words[3::2], strict=True))
        prune_checkpoint(given["--model"], given["--out"], layers=given["--layers"], say=lambda line: None)
    model, tokenizer = live(run_inputs)
    cut = load_model(Path(given["--out"]), device="cpu")
    routed = RoutedModel(view_decoder(model), load_routers(routers, run_inputs / "model"))
    texts = [json.loads(line)["text"] for line in (run_inputs / "loss.jsonl").read_text().splitlines()]
    for text in texts:
        ids_BT = torch.tensor([tokenizer(text)["input_ids"]])
        assert routed.decide(ids_BT.tolist()) == [counts]
        with torch.no_grad(), routed.stack(counts).entered() as path:
            along_BTV = forward_logits(path, ids_BT)
        with torch.no_grad():
            assert torch.equal(forward_logits(view_decoder(cut), ids_BT), along_BTV)
    assert bake(run_inputs, out, routers=routers) == found  # finished: read again


def test_one_block_is_one_command(run_inputs: Path, tmp_path: Path, make: Make) -> None:
    found = bake(run_inputs, tmp_path / "out", routers=make(PLANTED))
    assert found["blocks"] == [[3, 4]] and len(found["commands"]) == 1 and "They are" not in format_baked(found)
    assert found["same"] == 0 and "on 0 % of the prompts" in format_baked(found)  # a layer is repeated too


def test_where_nothing_is_always_skipped_that_is_said(run_inputs: Path, tmp_path: Path, make: Make) -> None:
    routers = make()
    found = bake(run_inputs, tmp_path / "out", routers=routers)
    model, tokenizer = live(run_inputs)
    texts = [json.loads(line)["text"] for line in (run_inputs / "loss.jsonl").read_text().splitlines()]
    routed = RoutedModel(view_decoder(model), load_routers(routers, run_inputs / "model"))
    paths_NL = np.array([routed.decide([tokenizer(text)["input_ids"]])[0] for text in texts])
    for count, name in enumerate(("skip", "execute", "repeat")):
        assert found[name] == pytest.approx((paths_NL == count).mean(axis=0).tolist())
    assert found["dropped"] == [] and found["commands"] == []
    near, share = found["nearest"][0]
    assert share == max(found["skip"]) == found["skip"][near]
    assert f"No layer is skipped on every prompt (nearest: layer {near}" in format_baked(found)
    often = bake(run_inputs, tmp_path / "often", routers=routers, always=share)
    assert near in often["dropped"] and "or more: layers" in format_baked(often)


def test_shares_and_blocks_by_hand() -> None:
    found = cut_of([(0, 1, 0, 2), (0, 0, 0, 1), (0, 1, 1, 1), (0, 1, 0, 1)], always=0.75)
    assert found["skip"] == [1, 0.25, 0.75, 0] and found["repeat"] == [0, 0, 0, 0.25]
    assert found["dropped"] == [0, 2] and found["blocks"] == [[2, 3], [0, 1]] and found["same"] == 0.25
    assert found["nearest"] == [[0, 1], [2, 0.75], [1, 0.25]]
    assert prune_orders("m y", [(4, 6), (1, 2)], Path("o")) == [
        "layerprune prune --model 'm y' --layers 4:6 --out o/pruned-1",
        "layerprune prune --model o/pruned-1 --layers 1:2 --out o/pruned",
    ]  # fmt: skip
    assert prune_orders("m", [(1, 2)], Path("o"), trust=True) == [
        "layerprune prune --model m --layers 1:2 --out o/pruned --trust-remote-code"
    ]
    with pytest.raises(UsageError, match="drops all 4 layers"):
        cut_of([(0, 0, 1, 1), (1, 1, 0, 0)], always=0.5)


def test_what_cannot_be_baked_is_refused(run_inputs: Path, tmp_path: Path, make: Make) -> None:
    routers = make()
    with pytest.raises(UsageError, match="--always 0 is no share"):
        bake(run_inputs, tmp_path / "out", routers=routers, always=0)
    with pytest.raises(UsageError, match="leave --tasks and --items out"):
        bake(run_inputs, tmp_path / "out", routers=routers, tasks=["tiny"])
    with pytest.raises(UsageError, match="the prompts are missing"):
        bake_routing(run_inputs / "model", routers, device="cpu", out=tmp_path / "out")
    with pytest.raises(Refused, match="holds no routers"):
        bake(run_inputs, tmp_path / "out", routers=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


def test_the_commands(run_inputs: Path, tmp_path: Path, make: Make, items_file: Path) -> None:
    routers, runner = make(PLANTED), CliRunner()
    model = ["--model", str(run_inputs / "model"), "--routers", str(routers), "--device", "cpu", "--items", str(items_file)]
    out = tmp_path / "eval"
    done = runner.invoke(main, ["route", "eval", *model, "--static", "first", "--out", str(out)])
    assert done.exit_code == 2 and "--static first is none of both, angular, last, none" in done.output and not out.exists()
    shown = runner.invoke(main, ["route", "eval", "--help"]).output
    assert "angular, last, both or none" in " ".join(shown.split()) and "last-n" not in shown  # which is understood all the same
    done = runner.invoke(main, ["route", "eval", *model, "--dial", "router", "--static", "last-n", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "dial router" in done.stdout and "eval.json" in done.stdout and (out / "eval.json").exists()
    done = runner.invoke(main, ["route", "bake", *model, "--out", str(tmp_path / "bake"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["blocks"] == [[3, 4]]
