"""What the evaluation of a streamed model cannot do is refused before the ranking, and nothing else is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprune
from layerprune.eval import streamed as evaluation
from layerprune.eval.answers import Answers
from layerprune.eval.streamed import check_sweep, sweep_streamed
from layerprune.eval.tasks import load_tasks
from layerprune.model.branches import Branches
from layerprune.model.budget import Budget
from layerprune.model.cuts import Block, Kept, last_block
from layerprune.model.errors import Refused
from layerprune.model.load import load_tokenizer
from layerprune.model.passplan import PROCESS_BYTES
from layerprune.model.plan import least_left
from layerprune.model.stream import StreamedModel
from layerprune.model.tensors import read_checkpoint
from layerprune.prune import rank_streamed as ranking

LAYERS = 7
WHOLE = tuple(range(LAYERS))
LAST = [last_block(n, LAYERS).kept(LAYERS) for n in range(1, LAYERS)]


@pytest.fixture(scope="module")
def streamed(build_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return StreamedModel(build_llama(tmp_path_factory.mktemp("ahead") / "model", layers=LAYERS), device="cpu", dtype="float32")


def sequences(lengths: tuple[int, ...] = (40, 40, 33, 12)) -> list[list[int]]:
    some = torch.Generator().manual_seed(0)
    return [torch.randint(2, 90, (n,), generator=some).tolist() for n in lengths]


def least(work: Callable[[Budget], object]) -> int:
    """The smallest `ram` that is not refused."""
    low, high = 0, 4 << 30
    while high - low > 1:
        middle = (low + high) // 2
        try:
            work(Budget(None, middle))
            high = middle
        except Refused:
            low = middle
    return high


def angular(some: random.Random, depths: list[int]) -> list[Kept]:
    """Cuts of these sizes anywhere."""
    return [Block(some.randrange(LAYERS - n + 1), n).kept(LAYERS) for n in depths]


def test_known_cuts_need_what_the_sweep_needs(streamed: StreamedModel) -> None:
    asked, kept = sequences(), [WHOLE, *LAST]
    enough = least(lambda budget: check_sweep(streamed, None, kept, budget, sequences=asked))
    sweep_streamed(streamed, None, kept, Budget(None, enough), sequences=asked)
    with pytest.raises(Refused, match=r"--ram .* is too little .* use at least"):
        sweep_streamed(streamed, None, kept, Budget(None, enough - 1), sequences=asked)


@pytest.mark.parametrize("tokens", [1 << 20, 1200, 1])
@pytest.mark.parametrize("known", [[WHOLE], [WHOLE, *LAST]], ids=["whole", "last"])
def test_unknown_cuts_never_make_it_ask_for_too_much(
    streamed: StreamedModel, known: list[Kept], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokens: of a batch of the whole model; where its states' memory is short, batches are smaller the more branches there are."""
    room = tokens * Branches(streamed.decoder, [WHOLE], 1, absent=True).state_bytes([WHOLE])
    monkeypatch.setattr(evaluation, "state_budget", lambda kind: room)
    asked, some = sequences((400, 400, 330, 120)), random.Random(0)
    needs = set()

    def need(kept: list[Kept], unknown: int = 0) -> int:
        return least(lambda budget: check_sweep(streamed, None, kept, budget, unknown=unknown, sequences=asked))

    for _ in range(12):
        depths = some.sample(range(1, LAYERS), some.randint(1, LAYERS - 1))
        exact = [*known, *angular(some, depths)]
        before, after = need(known, len(depths)), need(exact)
        assert before <= after, (depths, exact)
        needs.add(after - before)
    assert min(needs) < 2 << 20  # all but the states of the branches is counted


def test_what_is_answered_already_is_not_planned(streamed: StreamedModel, tmp_path: Path) -> None:
    asked = sequences()
    check_sweep(streamed, None, [WHOLE], Budget(None, 2 << 30), sequences=asked)
    sweep_streamed(streamed, None, [WHOLE], Budget(None, 2 << 30), sequences=asked, answers=Answers(tmp_path / "answers"))
    nothing = Budget(None, 1)
    check_sweep(streamed, None, [WHOLE], nothing, sequences=asked, answers=Answers(tmp_path / "answers"))
    check_sweep(streamed, None, [WHOLE, LAST[0]], nothing, unknown=2, sequences=asked, answers=Answers(tmp_path / "answers"))
    with pytest.raises(Refused):
        check_sweep(streamed, None, [WHOLE, LAST[0]], nothing, sequences=asked, answers=Answers(tmp_path / "answers"))


def test_the_plan_of_tasks_is_made_too(run_inputs: Path) -> None:
    folder = run_inputs / "model"
    own, tokenizer = StreamedModel(folder, device="cpu", dtype="float32"), load_tokenizer(folder)
    whole = tuple(range(len(own)))
    tasks = load_tasks({"tiny": 3}, run_inputs / "tasks", 0)
    given: dict[str, Any] = {"tasks": tasks, "limit": 12}
    enough = least(lambda budget: check_sweep(own, tokenizer, [whole], budget, **given))
    before = own.read
    assert enough > least(lambda budget: check_sweep(own, tokenizer, [whole], budget, sequences=[[3, 4, 5]]))
    assert least(lambda budget: check_sweep(own, tokenizer, [whole], budget, unknown=3, **given)) == enough
    assert own.read == before
    with pytest.raises(Refused, match="too little"):
        sweep_streamed(own, tokenizer, [whole], Budget(None, enough - 1), **given)
    fresh = {**given, "tasks": load_tasks({"tiny": 3}, run_inputs / "tasks", 0)}  # of which nothing was planned
    expected = sweep_streamed(own, tokenizer, [whole], Budget(None, 4 << 30), **fresh)
    assert sweep_streamed(own, tokenizer, [whole], Budget(None, enough), **given) == expected


@pytest.mark.parametrize("strategy", ["last", "angular"])
@pytest.mark.parametrize("command", ["run", "sweep", "find"])
def test_nothing_is_ranked_that_cannot_be_evaluated(
    command: str, strategy: str, run_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """800 MiB rank this model, and do not hold the logits of its loss."""
    ranked: list[int] = []
    real = ranking.rank_streamed

    def counted(*given: Any, **more: Any) -> Any:
        ranked.append(1)
        return real(*given, **more)

    monkeypatch.setattr(ranking, "rank_streamed", counted)
    given: dict[str, Any] = {
        "calibration": str(run_inputs / "calibration.jsonl"), "eval_data": str(run_inputs / "loss.jsonl"), "tasks": ["tiny"],
        "task_folder": str(run_inputs / "tasks"), "device": "cpu", "length": 32, "ram": "800MiB", "out": tmp_path / "out",
        "heal_data": str(run_inputs / "loss.jsonl"), "say": lambda line: None,
    }  # fmt: skip

    def work() -> None:
        if command == "find":
            layerprune.find(run_inputs / "model", strategy=strategy, **given)
        elif command == "sweep":
            layerprune.sweep(run_inputs / "model", strategies=[strategy], **given)
        else:
            layerprune.run(run_inputs / "model", 0.4, strategy=strategy, heal=False, **given)

    early = strategy == "angular" or command == "run"
    with pytest.raises(Refused, match="^nothing was ranked, .*--ram 0.78GiB is too" if early else "^--ram 0.78GiB is too"):
        work()
    assert not ranked
    layerprune.rank_blocks(run_inputs / "model", data=given["calibration"], length=32, device="cpu", ram="800MiB")
    assert ranked


@pytest.mark.parametrize("command", ["run", "sweep", "find"])
def test_memory_that_healing_does_not_fit_in_is_refused_before_the_ranking(
    command: str, run_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least that the cut can be, in NF4 beside the process: a byte less is refused, and this much is not."""

    class Begun(Exception):
        pass

    def begun(*given: Any, **more: Any) -> None:
        raise Begun

    model, dropped = run_inputs / "model", {"run": 3, "sweep": 2, "find": 7}[command]
    monkeypatch.setattr("layerprune.stages.Stages.rank", begun)
    stored = read_checkpoint(model)
    each = [sum(t.numel for n, t in stored.items() if n.startswith(f"model.layers.{i}.")) for i in range(8)]
    least = PROCESS_BYTES + (sum(t.numel for t in stored.values()) - dropped * each[0]) // 2
    assert len(set(each)) == 1 and each[0] > 1000

    def work(ram: int) -> None:
        given: dict[str, Any] = {
            "calibration": str(run_inputs / "calibration.jsonl"), "eval_data": str(run_inputs / "loss.jsonl"), "tasks": ["tiny"],
            "task_folder": str(run_inputs / "tasks"), "device": "cpu", "length": 32, "out": tmp_path / f"out-{ram}",
            "heal_data": str(run_inputs / "loss.jsonl"), "say": lambda line: None, "heal_with": {"ram": ram},
        }  # fmt: skip
        if command == "find":
            layerprune.find(model, **given)
        elif command == "sweep":
            layerprune.sweep(model, drops=[0.25, 0.5], heal=[0.25, 0.5], **given)
        else:
            layerprune.run(model, 0.4, **given)

    with pytest.raises(Refused, match="healing does not fit in --ram 0.68GiB"):
        work(least - 1)
    with pytest.raises(Begun):
        work(least)


def test_the_least_that_a_cut_leaves(build_llama: Callable[..., Path], tmp_path: Path) -> None:
    stored = read_checkpoint(build_llama(tmp_path / "model", layers=4))
    large = {n: replace(t, shape=(*t.shape, 5)) if n.startswith("model.layers.2.") else t for n, t in stored.items()}

    def numbers(layers: set[int]) -> int:
        return sum(t.numel for n, t in large.items() if not n.startswith("model.layers.") or int(n.split(".")[2]) in layers)

    assert least_left(large, 4, 0) == numbers({0, 1, 2, 3})
    assert least_left(large, 4, 1) == numbers({0, 1, 3})
    assert least_left(large, 4, 2) == numbers({0, 1}) == numbers({0, 3})
    assert least_left(large, 4, 3) == numbers({0})
