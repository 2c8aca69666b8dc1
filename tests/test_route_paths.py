"""Paths of layer routing: their edits, and running them with and without shared beginnings."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from layerprune.model.decoder import Decoder, forward_logits, view_decoder, virtual_cut
from layerprune.model.errors import Refused, UsageError
from layerprune.model.layerwise import Layerwise, State
from layerprune.model.load import load_model
from layerprune.route.execute import PathCache, run_path
from layerprune.route.paths import Counts, check_counts, edits, executed, path_length, unique_layers, whole_path

torch.set_num_threads(1)

# families whose layers hand on more than the state (Gemma-3n), return tuples (Falcon, BLOOM), or differ among themselves
NAMES = ["Llama", "GPT-2", "Falcon", "BLOOM", "Gemma-2", "Gemma-3n", "Qwen3-MoE", "Mamba"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decoder]:
    def decoder(name: str) -> Decoder:
        folder = families.build(name, tmp_path_factory.mktemp("route") / "model")
        return view_decoder(load_model(folder, device="cpu", dtype="float32"))

    return decoder


def test_what_a_path_is() -> None:
    counts = (1, 0, 2, 1)
    assert executed(counts) == (0, 2, 2, 3)
    assert (path_length(counts), unique_layers(counts)) == (4, 3)
    assert executed(whole_path(3)) == (0, 1, 2)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((1, 1), "a path of 2 counts does not fit a model of 3 layers"),
        ((1, 3, 1), "layer 1 the count 3"),
        ((1, 1, -1), "layer 2 the count -1"),
        ((1, True, 1), "layer 1 the count True"),
        ((0, 0, 0), "skips all 3 layers"),
    ],
)
def test_what_a_path_is_not(counts: Counts, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_counts(counts, 3)


def test_the_edits_of_the_whole_model() -> None:
    assert set(edits((1, 1, 1))) == {
        (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1), (1, 0, 0), (2, 1, 1), (1, 2, 1), (1, 1, 2),
    }  # fmt: skip
    assert set(edits((1,))) == {(2,)}
    assert set(edits((2, 0))) == set()


@pytest.mark.parametrize("longest", [2, 3, None])
def test_edits_by_their_definition(longest: int | None) -> None:
    """Of all paths of 5 layers: exactly those that differ by one skip of one or two neighbours, or by one repetition."""

    def one_edit(a: Counts, b: Counts) -> bool:
        changed = [i for i in range(5) if a[i] != b[i]]
        if len(changed) == 1 and a[changed[0]] == 1 and b[changed[0]] == 2:
            return True
        runs = [len(list(group)) for skipped, group in itertools.groupby(b, lambda count: count == 0) if skipped]
        near = len(changed) in (1, 2) and changed[-1] - changed[0] == len(changed) - 1
        # a run that was there already stays; it is the one that the edit makes that must not be too long
        return near and all(b[i] == 0 for i in changed) and any(b) and (longest is None or max(runs) <= longest)

    every = list(itertools.product((0, 1, 2), repeat=5))
    allowed = [c for c in every if any(c)]
    for counts in allowed:
        runs = [len(list(group)) for skipped, group in itertools.groupby(counts, lambda count: count == 0) if skipped]
        if longest is not None and max(runs, default=0) > longest:
            continue
        found = list(edits(counts, longest))
        assert len(found) == len(set(found)) and counts not in found
        assert set(found) == {other for other in every if one_edit(counts, other)}
        for other in found:
            check_counts(other, 5)
            assert path_length(other) <= 10


def test_edits_that_follow_each_other_pass_no_limit() -> None:
    """From the whole model, edit after edit: no count beyond 2, no run of skipped layers beyond 2, and an end."""
    seen, edge = set(), [whole_path(5)]
    while edge:
        counts = edge.pop()
        for other in edits(counts):
            if other not in seen:
                seen.add(other)
                edge.append(other)
    every = {c for c in itertools.product((0, 1, 2), repeat=5) if "000" not in "".join(map(str, c))}
    assert seen == every - {whole_path(5)}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_paths_that_share_their_beginning_are_those_run_alone(load: Callable[[str], Decoder], name: str) -> None:
    decoder = load(name)
    layerwise = Layerwise(decoder)
    batch = layerwise.begin(families.ids_of(2, 14))
    rng = random.Random(0)
    paths = [whole_path(8), *(tuple(rng.choices((0, 1, 2), (2, 5, 1), k=8)) for _ in range(12))]
    if name == "Gemma-3n":  # whose last layers read keys and values of layers 3 and 4
        paths = [(*p[:3], p[3] or 1, p[4] or 1, *p[5:]) for p in paths]
    paths = [p for p in paths if any(p)] * 2
    size = PathCache(layerwise, batch)
    size.run(whole_path(8))
    for limit in (1 << 30, 3 * size.kept_bytes // 8, 0):
        cache = PathCache(layerwise, batch, limit)
        for counts in paths:
            alone = run_path(layerwise, batch, batch.start(), counts)
            assert torch.equal(cache.run(counts).hidden, alone.hidden), (name, counts)
            assert cache.kept_bytes <= limit
        assert cache.alone == sum(map(path_length, paths))
        if limit == 1 << 30:
            assert cache.applications == len({executed(p)[:end] for p in paths for end in range(1, path_length(p) + 1)})
        assert (cache.applications < cache.alone) == (limit > 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma-2"])
def test_a_path_without_repetition_is_a_virtual_cut(load: Callable[[str], Decoder], name: str) -> None:
    decoder = load(name)
    layerwise, ids_BT = Layerwise(decoder), families.ids_of(2, 14)
    batch = layerwise.begin(ids_BT)
    row_N, position_N = torch.arange(2).repeat_interleave(14), torch.arange(14).repeat(2)
    with virtual_cut(decoder, (0, 1, 4, 5, 6, 7)):
        expected = forward_logits(decoder, ids_BT).flatten(0, 1)
    found = run_path(layerwise, batch, batch.start(), (1, 1, 0, 0, 1, 1, 1, 1))
    assert torch.equal(batch.logits(found, row_N, position_N), expected)


@torch.no_grad()
def test_a_repeated_layer_is_applied_to_its_own_output(load: Callable[[str], Decoder]) -> None:
    decoder = load("Llama")
    layerwise, ids_BT = Layerwise(decoder), families.ids_of(2, 14)
    batch = layerwise.begin(ids_BT)
    found = run_path(layerwise, batch, batch.start(), (1, 1, 2, 1, 1, 1, 1, 0))
    forward = decoder.layers[2].forward
    with virtual_cut(decoder, tuple(range(7))):
        decoder.layers[2].forward = lambda hidden, *a, **k: forward(forward(hidden, *a, **k), *a, **k)
        expected = forward_logits(decoder, ids_BT).flatten(0, 1)
    row_N, position_N = torch.arange(2).repeat_interleave(14), torch.arange(14).repeat(2)
    assert torch.equal(batch.logits(found, row_N, position_N), expected)


def test_a_path_that_the_model_cannot_run_is_refused(load: Callable[[str], Decoder]) -> None:
    layerwise = Layerwise(load("Gemma-3n"))
    batch = layerwise.begin(families.ids_of(1, 6))
    for run in (lambda p: run_path(layerwise, batch, batch.start(), p), PathCache(layerwise, batch).run):
        with pytest.raises(Refused, match="does not run along the path 11101111, whose skipped layers pass on more"):
            run((1, 1, 1, 0, 1, 1, 1, 1))


class Counter:
    """A batch of states that take 100 bytes and hold their own history."""

    def start(self) -> State:
        return State(torch.zeros(25), {})

    def step(self, layer: int, state: State) -> State:
        return State(state.hidden + 3.0**layer, {})


def test_the_beginning_stays_where_memory_is_short() -> None:
    """With room for two states, the first two layers' are kept: they serve most other paths."""
    stack: Any = range(6)
    batch: Any = Counter()
    cache = PathCache(stack, batch, 200)
    for counts, fresh in (((1, 1, 1, 1, 1, 1), 6), ((1, 1, 0, 1, 1, 1), 3), ((1, 1, 1, 1, 0, 0), 2), ((0, 1, 0, 0, 0, 0), 1)):
        before = cache.applications
        assert cache.run(counts).hidden[0] == sum(3.0**layer for layer in executed(counts))
        assert cache.applications - before == fresh
        assert cache.kept_bytes == 200
    # the path before took the place of the state that was used least recently, the longer one
    before = cache.applications
    cache.run((1, 1, 0, 0, 0, 0))
    assert cache.applications - before == 1


def test_of_states_used_together_the_longest_goes_first() -> None:
    stack: Any = range(6)
    batch: Any = Counter()
    cache = PathCache(stack, batch, 300)
    cache.run((1, 1, 1, 0, 0, 0))
    cache.run((0, 1, 0, 0, 0, 0))
    before = cache.applications
    cache.run((1, 0, 0, 0, 0, 0))
    assert cache.applications == before


def test_a_path_of_another_model_is_refused(load: Callable[[str], Decoder], tiny_llama: Path) -> None:
    layerwise = Layerwise(view_decoder(load_model(tiny_llama, device="cpu", dtype="float32")))
    batch = layerwise.begin(families.ids_of(1, 4))
    for run in (lambda p: run_path(layerwise, batch, batch.start(), p), PathCache(layerwise, batch).run):
        with pytest.raises(UsageError, match="8 counts does not fit a model of 5 layers"):
            run(whole_path(8))
