"""Memory plans from made-up measurements: what they take, how long they last, and which one is chosen."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn

from layerprune.heal import memory
from layerprune.heal import planner as planning
from layerprune.heal.measure import Layer, Measured
from layerprune.heal.memory import (
    CPU_SLACK,
    GIB,
    MOST_CONTEXT,
    Memory,
    Saved,
    apply_plan,
    context_bytes,
    plan_on_cpu,
    refuse_ram,
    trained_layers,
)
from layerprune.heal.planner import HEADROOM, SLACK, Planner
from layerprune.heal.student import Teaching
from layerprune.model.errors import Refused
from layerprune.model.memory import byte_count
from layerprune.model.passplan import PROCESS_BYTES

torch.set_num_threads(1)

PACKED, DECODED = 280, 1000
"""Bytes of each layer's weights."""
EACH = 0.05
"""Seconds to decode a layer."""


@dataclass
class Part:
    """A 4-bit layer as far as plans see it."""

    packed_bytes: int = PACKED
    decoded_bytes: int = DECODED

    def decode(self) -> None:
        self.packed_bytes = 0


class Block(nn.Module):
    """A decoder layer, with one adapter of ten numbers or without."""

    def __init__(self, adapter: bool) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.adapter = nn.Parameter(torch.zeros(10)) if adapter else None
        self.part = Part()


class Stack:
    """A decoder as far as plans see it."""

    def __init__(self, with_adapter: Sequence[bool]) -> None:
        self.layers = nn.ModuleList(Block(one) for one in with_adapter)
        self.model, self.device = self.layers, torch.device("cpu")

    def __len__(self) -> int:
        return len(self.layers)


@pytest.fixture(autouse=True)
def made_up_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (memory, planning):
        monkeypatch.setattr(module, "four_bit_linears", lambda layer: [layer.part])


def student_of(with_adapter: Sequence[int] = (1, 1, 1, 1), teaching: Teaching | None = None) -> Any:
    decoder: Any = Stack([bool(one) for one in with_adapter])
    kept = teaching.kept if teaching else tuple(range(len(decoder)))
    return SimpleNamespace(decoder=decoder, kept=kept, teaching=teaching, compiled=False, recomputed=frozenset())


def planner_of(student: Any, sequences: int = 8, world: int = 1) -> Planner:
    return Planner(student, 64, 100, sequences, None, world)


def layer(seconds: float = 1.0, kept: int = 100, again: int = 10) -> Layer:
    """Forward a third of the time, back two thirds; once more forward where it is computed again."""
    return Layer(kept, again, kept // 2, kept + kept // 2, seconds, seconds * 4 / 3, seconds / 3)


def measured(size: int, layers: int, **changes: Any) -> Measured:
    given = {"head": 60, "head_seconds": 0.5, "inputs": 7, "state": 10, **changes}
    return Measured(size, {i: layer() for i in range(layers)}, **given)


def test_a_planner_knows_the_adapters_and_the_order_of_decoding() -> None:
    planner = planner_of(student_of((0, 0, 1, 1)))
    assert planner.trained == [2, 3]
    assert [i for i, _ in planner.weights] == [2, 3, 0, 1], "weights that are used most often are decoded first"
    assert planner.later == 8 * 20 and planner_of(student_of((0, 0, 1, 1)), world=2).later == 12 * 20


def test_the_peak_is_what_adding_up_gives() -> None:
    planner, one = planner_of(student_of()), measured(2, 4)
    # all kept: 400 behind; then the loss (60), or a layer's way back (10 + 50)
    assert planner.peak(one, 1000, 0, 0) == int(SLACK * (1000 + 7 + 400 + 60))
    assert planner.peak(replace(one, head=30), 1000, 0, 0) == int(SLACK * (1000 + 7 + 400 + 10 + 50))
    # two of four computed again
    assert planner.peak(one, 1000, 0, 2) == int(SLACK * (1000 + 7 + 2 * 100 + 2 * 10 + 60))
    # all computed again: the way back holds a layer's own share too
    assert planner.peak(one, 1000, 0, 4) == int(SLACK * (1000 + 7 + 4 * 10 + 10 + 150))
    assert planner.peak(one, 1000, 3, 4) == int(SLACK * (1000 + 3 * (DECODED - PACKED) + 7 + 4 * 10 + 10 + 150))
    # one that takes long on its way back is at the peak though another is kept
    slow = replace(one, layers={i: replace(layer(), again_back=400) for i in range(4)})
    assert planner.peak(slow, 1000, 0, 3) == int(SLACK * (1000 + 7 + 3 * 10 + 10 + 400))
    taught = planner_of(student_of(teaching=Teaching((0, 1, 2, 3), 1.0)))
    assert taught.peak(one, 1000, 0, 0) == int(SLACK * (1000 + 7 + 2 * 10 + 400 + 60)), "the teacher's state, and the one shared"


def test_the_peak_grows_with_decoded_and_falls_with_recomputed() -> None:
    planner, one = planner_of(student_of((0, 1, 1, 1, 1, 1))), measured(2, 6)
    for recomputed in range(6):
        peaks = [planner.peak(one, 0, decoded, recomputed) for decoded in range(7)]
        assert all(a < b for a, b in itertools.pairwise(peaks))
    for decoded in range(7):
        # the last layer that is kept is on its way back when there is nothing else
        peaks = [planner.peak(one, 0, decoded, recomputed) for recomputed in range(5)]
        assert all(a > b for a, b in itertools.pairwise(peaks))


def test_weights_that_a_trial_has_decoded_are_not_counted_twice() -> None:
    """`static` is what was allocated before any trial, with all weights packed."""
    planner, one = planner_of(student_of()), measured(2, 4)
    before = [planner.peak(one, 1000, decoded, 1) for decoded in range(5)]
    apply_plan(planner.student, Memory(2, 1, 3), planner.trained, [i for i, _ in planner.weights])
    assert [planner.peak(one, 1000, decoded, 1) for decoded in range(5)] == before


def test_seconds_are_those_of_all_micro_batches_less_the_decodings_saved() -> None:
    planner, one = planner_of(student_of(), sequences=8), measured(2, 4)
    assert planner.seconds(one, 0, 0, EACH) == pytest.approx(4 * (4 * 1.0 + 0.5))
    assert planner.seconds(one, 0, 3, EACH) == pytest.approx(4 * (3 * 4 / 3 + 1.0 + 0.5))
    # a layer that is kept decodes forward and back, one computed again once more
    assert planner.seconds(one, 1, 0, EACH) == pytest.approx(4 * (4.5 - 2 * EACH))
    assert planner.seconds(one, 1, 1, EACH) == pytest.approx(4 * (4.5 + 1 / 3 - 3 * EACH))
    assert planner.seconds(one, 3, 2, EACH) == pytest.approx(4 * (4.5 + 2 / 3 - (3 + 3 + 2) * EACH))


def test_layers_before_the_first_adapter_only_run_forward() -> None:
    planner, one = planner_of(student_of((0, 0, 1, 1)), sequences=2), measured(2, 4)
    assert planner.seconds(one, 0, 0, EACH) == pytest.approx(2 * 1.0 + 2 / 3 + 0.5)
    assert planner.seconds(one, 2, 0, EACH) == pytest.approx(2 * 1.0 + 2 / 3 + 0.5 - 4 * EACH)
    assert planner.seconds(one, 4, 1, EACH) == pytest.approx(4 / 3 + 1.0 + 2 / 3 + 0.5 - (3 + 2 + 1 + 1) * EACH)


def test_a_teacher_runs_all_layers_but_the_shared_ones_once_more() -> None:
    one = measured(2, 5)
    # 5 layers, the student without layer 2; adapters from layer 3 on
    apart = planner_of(student_of((0, 0, 0, 1, 1), Teaching((0, 1, 3, 4), 1.0, 0)), sequences=2)
    shared = planner_of(student_of((0, 0, 0, 1, 1), Teaching((0, 1, 3, 4), 1.0, 2)), sequences=2)
    assert apart.trained == shared.trained == [3, 4] and [i for i, _ in apart.weights] == [3, 4, 0, 1, 2]
    assert apart.seconds(one, 0, 0, EACH) == pytest.approx(2 * 1.0 + (2 + 5) / 3 + 0.5)
    # kept and taught: 3; kept before the adapters and taught: 2; dropped, hence taught alone: 1
    assert apart.seconds(one, 0, 0, EACH) - apart.seconds(one, 5, 0, EACH) == pytest.approx((3 + 3 + 2 + 2 + 1) * EACH)


def test_the_shared_layers_run_once() -> None:
    one = measured(2, 5)
    shared = planner_of(student_of((0, 0, 0, 1, 1), Teaching((0, 1, 3, 4), 1.0, 2)), sequences=2)
    assert shared.seconds(one, 0, 0, EACH) == pytest.approx(2 * 1.0 + (2 + 3) / 3 + 0.5)
    assert shared.seconds(one, 0, 0, EACH) - shared.seconds(one, 5, 0, EACH) == pytest.approx((3 + 3 + 1 + 1 + 1) * EACH)


def all_plans(planner: Planner, pool: Sequence[Measured], static: int, each: float, floor: int = 0) -> list[Memory]:
    return [
        Memory(one.micro_batch, r, d, False, planner.peak(one, static, d, r), planner.seconds(one, d, r, each))
        for one in pool
        for d in range(floor, len(planner.weights) + 1)
        for r in range(len(planner.trained) + 1)
    ]


def test_the_best_plan_is_the_one_that_trying_all_finds() -> None:
    rng, chosen, none = random.Random(0), set(), 0
    for _ in range(300):
        count = rng.randint(2, 6)
        first = rng.randrange(count)
        teaching = None
        if rng.random() < 0.3:
            kept = tuple(i for i in range(count) if i != first)
            teaching = Teaching(kept, 1.0, 0)
        planner = planner_of(student_of([i >= first for i in range(count)], teaching))
        pool = []
        for size in (1, 2, 4):
            layers = {
                i: layer(size * rng.uniform(0.5, 1.5), size * rng.randint(50, 150), size * rng.randint(5, 15)) for i in range(count)
            }
            pool.append(Measured(size, layers, rng.randint(20, 900), size * 0.3, 5 * size, 10 * size))
        each, static, floor = rng.uniform(0.0, 0.1), rng.randint(0, 500), rng.choice([0, 0, 1, 2])
        plans = all_plans(planner, pool, static, each, floor)
        peaks = sorted(plan.estimate or 0 for plan in plans)
        room = rng.randint(peaks[0] - 200, peaks[-1] + 50)
        fitting = [plan for plan in plans if (plan.estimate or 0) <= room]
        best = planner._best(pool, static, room, each, floor=floor)
        if not fitting:
            assert best is None
            none += 1
            continue
        assert best is not None and best in fitting and best.decoded >= floor
        fastest = min(plan.seconds or 0 for plan in fitting)
        assert (best.seconds or 0) <= 1.005 * fastest
        # of those as fast that recompute no more than they must, none takes less
        least = {(p.micro_batch, p.decoded): p for p in sorted(fitting, key=lambda p: -p.recomputed)}
        assert best.estimate == min(p.estimate or 0 for p in least.values() if (p.seconds or 0) <= 1.005 * fastest)
        chosen.add((best.micro_batch, best.recomputed > 0, best.decoded > floor))
    assert len(chosen) >= 8 and none > 5, "the cases differ"


def test_of_plans_that_are_as_fast_the_smallest_is_taken() -> None:
    planner = planner_of(student_of())
    one = measured(2, 4)
    same = replace(one.scaled(4), head_seconds=2 * one.head_seconds)
    best = planner._best([same, one], 0, 10**9, 0.0)
    assert best == Memory(2, 0, 0, False, planner.peak(one, 0, 0, 0), planner.seconds(one, 0, 0, 0.0)), "decoding gains nothing"
    quicker = planner._best([same, one], 0, 10**9, EACH)
    assert quicker is not None and (quicker.micro_batch, quicker.decoded) == (2, 4)
    least = min(planner.peak(one, 0, 0, recomputed) for recomputed in range(5))
    assert planner._best([one], 0, least, EACH) is not None and planner._best([one], 0, least - 1, EACH) is None


def test_a_micro_batch_that_was_not_measured_is_scaled() -> None:
    one = measured(2, 3)
    three = one.scaled(6)
    assert three.layers[1] == Layer(300, 30, 150, 450, 3.0, 4.0, 1.0) and isinstance(three.layers[1].kept, int)
    # the loss goes through its slices one by one: only its state grows
    assert (three.micro_batch, three.head, three.head_seconds, three.inputs, three.state) == (6, 60 + 2 * 10, 1.5, 21, 30)


# A whole choice, without a GPU


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """torch.cuda's questions about memory, answered from a dictionary."""
    told = {"free": 6000, "total": 10_000, "reserved": 1000, "allocated": 900}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (told["free"], told["total"]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: told["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: told["allocated"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(total_memory=told["total"]))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device=None: told.update(allowed=round(part * told["total"]))
    )
    return told


def test_the_context_is_bounded(no_gpu: dict[str, int]) -> None:
    device = torch.device("cpu")
    assert context_bytes(device) == 10_000 - 6000 - 1000
    no_gpu |= {"free": 9500}
    assert context_bytes(device) == 0, "the allocator may give back between two questions"
    no_gpu |= {"total": 80 * GIB, "free": 20 * GIB, "reserved": GIB}
    assert context_bytes(device) == MOST_CONTEXT, "the rest is another process's"


def test_the_room_is_the_budget_less_the_context_and_never_more_than_is_free(no_gpu: dict[str, int]) -> None:
    planner = planner_of(student_of())
    assert planner.room(None) == (int(7000 * 0.92), 0)
    assert planner.room(5000) == (5000 - 3000, 3000)
    assert planner.room(50_000) == (7000, 3000)


def stub(planner: Planner, pool: Sequence[Measured], tried: list[Memory], fits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner whose measurements are `pool`, and whose trials decode as real ones do."""

    def trial(plan: Memory) -> Memory | None:
        apply_plan(planner.student, plan, planner.trained, [i for i, _ in planner.weights])
        tried.append(plan)
        return replace(plan, estimate=4321, seconds=1.0) if fits(plan) else None

    monkeypatch.setattr(planner, "_measure_sizes", lambda sizes, static, room: list(pool))
    monkeypatch.setattr(planner.meter, "decode_seconds", lambda weights: EACH)
    monkeypatch.setattr(planner, "_try", trial)


def test_a_plan_that_does_not_fit_when_tried_gives_way_to_smaller_ones(
    no_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, tried = planner_of(student_of()), list[Memory]()
    planner.steps = 1  # too few to compile for
    one = replace(measured(2, 4), layers={i: layer(1.0, 400) for i in range(4)})
    stub(planner, [one], tried, lambda plan: len(tried) == 3, monkeypatch)
    # room for all decoded and all kept
    room = planner.peak(one, no_gpu["allocated"] + planner.later, 4, 0)
    no_gpu |= {"free": 3 * room, "total": 4 * room, "reserved": 0}
    budget = int(room / HEADROOM) + 2 + context_bytes(planner.device)
    found = planner.choose([1, 2], budget, lambda line: None)
    assert found == replace(tried[2], estimate=4321 + room, seconds=1.0), "what the trial took, and the context"
    assert (tried[0].decoded, tried[0].recomputed) == (4, 0)
    for before, after, number in zip(tried, tried[1:], (1, 2), strict=False):
        assert after.decoded == 4, "weights stay decoded"
        assert after.recomputed > before.recomputed and (after.estimate or 0) <= room * 0.95**number * 1.001
    assert no_gpu["allowed"] == budget - room, "training may take all of the budget, a trial a little less"
    assert all(p.grad is None for p in planner.parameters)


def test_where_nothing_fits_the_refusal_says_what_helps(no_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    planner, tried = planner_of(student_of()), list[Memory]()
    stub(planner, [measured(2, 4)], tried, lambda plan: False, monkeypatch)
    with pytest.raises(Refused, match="does not fit in 0.0 GiB with sequences of 64 tokens: use a smaller --length"):
        planner.choose([1, 2], None, lambda line: None)
    assert tried, "plans were tried before that"
    tried.clear()
    with pytest.raises(Refused, match="does not fit"):
        planner.choose([1, 2], 3001, lambda line: None)
    assert not tried and no_gpu["allowed"] == 1


def test_compiled_layers_are_taken_only_where_they_are_faster(no_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu |= {"free": 10**7, "total": 10**7, "reserved": 0}
    for head_seconds, taken in ((0.25, True), (0.45, False)):  # of 4.5 seconds in all: 6 % less, 1 % less
        planner, tried = planner_of(student_of()), list[Memory]()
        compiled = measured(2, 4, head_seconds=head_seconds)
        stub(planner, [measured(2, 4)], tried, lambda plan: True, monkeypatch)
        monkeypatch.setattr(planner.meter, "measure", lambda size, compiled=compiled: compiled.scaled(size))
        found = planner.choose([2], None, lambda line: None)
        assert found.compiled is planner.student.compiled is taken and len(tried) == 1

    def broken(size: int) -> Measured:
        raise RuntimeError("no compiler")

    said: list[str] = []
    planner, tried = planner_of(student_of()), list[Memory]()
    stub(planner, [measured(2, 4)], tried, lambda plan: True, monkeypatch)
    monkeypatch.setattr(planner.meter, "measure", broken)
    assert not planner.choose([2], None, said.append).compiled and not planner.student.compiled
    assert said == ["compiling the layers", "the layers are not compiled (RuntimeError)"]

    said.clear()
    planner, tried = Planner(student_of(), 64, 100, 8, None, compiles=False), list[Memory]()
    stub(planner, [measured(2, 4)], tried, lambda plan: True, monkeypatch)
    monkeypatch.setattr(planner.meter, "measure", broken)
    assert not planner.choose([2], None, said.append).compiled and not said, "nobody asks the compiler"


def test_the_adapters_gradients_are_there_while_it_is_measured_and_gone_after(no_gpu: dict[str, int]) -> None:
    planner = planner_of(student_of((0, 1, 1, 1)))
    assert len(planner.parameters) == 3
    with contextlib.suppress(KeyError), planner._gradients():
        assert all(p.grad is not None and not p.grad.any() for p in planner.parameters)
        raise KeyError
    assert all(p.grad is None for p in planner.parameters)


# Layers and CPUs


@pytest.mark.parametrize(
    ("with_adapter", "kept", "expected"),
    [
        ((1, 1, 1, 1, 1), None, [0, 1, 2, 3, 4]),
        ((0, 0, 1, 1, 1), None, [2, 3, 4]),  # after a cut
        ((0, 1, 1, 0, 0), None, [1, 2, 3, 4]),  # in a window: the way back goes through all that follow
        ((0, 0, 0, 1, 1), (0, 1, 3, 4), [3, 4]),  # beside a teacher, whose layer 2 the student has not
        ((1, 1, 0, 1, 1), (0, 1, 3, 4), [0, 1, 3, 4]),
        ((0, 0, 0, 0, 0), None, []),
    ],
)
def test_layers_are_trained_from_the_first_adapter_on(
    with_adapter: tuple[int, ...], kept: tuple[int, ...] | None, expected: list[int]
) -> None:
    assert trained_layers(student_of(with_adapter, None if kept is None else Teaching(kept, 1.0))) == expected


def test_a_plan_is_applied_to_the_first_layers_of_its_order() -> None:
    student = student_of((0, 1, 1, 1))
    apply_plan(student, Memory(2, 2, 3, True), [1, 2, 3], [1, 2, 3, 0])
    assert student.compiled and student.recomputed == {1, 2}
    assert [block.part.packed_bytes for block in student.decoder.layers] == [PACKED, 0, 0, 0]
    apply_plan(student, Memory(2, 1, 0), [1, 2, 3], [1, 2, 3, 0])
    assert not student.compiled and student.recomputed == {1}
    assert student.decoder.layers[1].part.packed_bytes == 0, "decoded once, decoded for good"


def test_a_cpu_keeps_all_and_decodes_where_half_of_the_memory_holds_it() -> None:
    student = student_of()
    for free, decoded in ((2 * 4 * DECODED + 2, 4), (2 * 4 * DECODED, 0)):
        assert plan_on_cpu(student, [1, 2, 3, 6], 4, free) == Memory(3, 0, decoded)
    assert plan_on_cpu(student, [8, 16], 4, 0).micro_batch == 8, "the smallest, where all are too large"


def test_within_a_limit_of_host_memory_the_mildest_plan_that_fits_is_taken() -> None:
    saved = Saved(kept=4000, again=400, fixed=1000)
    student, held = student_of(), 50_000
    assert saved.need(3, 0, 4) == int(CPU_SLACK * (1000 + 3 * (4000 + 900))), "a layer's slopes come beside what is kept"
    assert saved.need(1, 4, 4) == int(CPU_SLACK * (1000 + 400 + 2 * 900)), "and beside what is computed again"
    decoding = 4 * DECODED
    ways = [(3, 0, 4), (3, 0, 0), (2, 0, 4), (2, 0, 0), (1, 0, 4), (1, 0, 0), (1, 2, 0), (1, 3, 0), (1, 4, 0)]
    found = []
    for room in range(30_000, 0, -1):
        try:
            plan = plan_on_cpu(student, [1, 2, 3, 6], 4, room, saved, held, 1 << 30)
        except Refused as refusal:
            assert "GiB of host memory that are free" in str(refusal), "others take it, not what was given for --ram"
            assert room == min(saved.need(1, r, 4) for r in range(5)) - 1
            break
        took = saved.need(plan.micro_batch, plan.recomputed, 4) + (decoding if plan.decoded else 0)
        assert took <= room and plan.estimate == held + took
        way = plan.micro_batch, plan.recomputed, plan.decoded
        found += [] if way in found else [way]
    assert found == [way for way in ways if way in found] and {(3, 0, 4), (3, 0, 0), (1, 0, 0), (1, 4, 0)} <= set(found)
    assert plan_on_cpu(student, [2], 2, saved.need(2, 1, 4) - 1, saved).micro_batch == 2, "a size that was given stays"
    assert plan_on_cpu(student, [2], 2, saved.need(2, 1, 4) - 1, saved).recomputed == 2


def test_a_refusal_names_the_ram_that_was_given_and_the_least_that_is_enough() -> None:
    student, held = student_of(), 700 << 20
    saved = Saved(kept=80 << 20, again=8 << 20, fixed=20 << 20)
    least = held + min(saved.need(1, recomputed, 4) for recomputed in range(5))
    for processes in (1, 2):
        given = processes * (720 << 20)
        with pytest.raises(Refused) as refusal:
            plan_on_cpu(student, [1, 2], 4, given // processes - held, saved, held, given, processes)
        told = str(refusal.value)
        assert f"does not fit in --ram {int(processes * 72000 / 1024) / 100:.2f}GiB" in told and "take 0.68 GiB, a step 0.0" in told
        assert ("shared by 2 processes" in told) == (processes == 2)
        enough = byte_count(told.partition("give at least ")[2].partition(",")[0], "--ram")
        assert enough is not None and 0 <= enough - processes * least < GIB / 100, "rounded up"
        plan = plan_on_cpu(student, [1, 2], 4, enough // processes - held, saved, held, enough, processes)
        assert plan.micro_batch == 1 and plan.estimate is not None and plan.estimate <= enough // processes


def test_ram_that_the_model_alone_does_not_fit_in_is_refused() -> None:
    numbers = 1 << 28
    least = PROCESS_BYTES + numbers // 2
    refuse_ram(None, numbers)
    refuse_ram(least, numbers)
    with pytest.raises(Refused, match=r"--ram 0.80GiB: the process and the model take 0.81 GiB alone, .* more than 0.81GiB"):
        refuse_ram(least - 1, numbers)
    with pytest.raises(Refused, match="shared by 2 processes"):
        refuse_ram(2 * least - 1, numbers, 2)


def test_a_plan_is_recorded_whole() -> None:
    plan = Memory(2, 1, 3, True, 5, 0.5)
    assert plan.record() == asdict(plan) and Memory(**plan.record()) == plan
