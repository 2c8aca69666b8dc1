"""The tree of virtual cuts: as the model itself, with no layer run twice, for every family that the table knows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from layerprune.model.branches import Asked, Branches, padded
from layerprune.model.config import vocab_size
from layerprune.model.cuts import Block, Kept, last_block
from layerprune.model.decoder import Decoder, forward_logits, view_decoder, virtual_cut
from layerprune.model.errors import Refused, UsageError
from layerprune.model.layerwise import Layerwise, State
from layerprune.model.load import load_model
from layerprune.model.tree import CutTree, exact_branches

torch.set_num_threads(1)




def last_curve(layers: int) -> list[Kept]:
    return [tuple(range(layers)), *(last_block(n, layers).kept(layers) for n in range(1, layers))]


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path) -> Decoder:
    return view_decoder(load_model(tiny_llama, device="cpu", dtype="float32"))


@contextmanager
def counted(decoder: Decoder) -> Iterator[dict[str, list[int]]]:
    """What really runs: layers by index (their attention, since a pass also calls replaced layers), positions of each head."""
    count: dict[str, list[int]] = {"layers": [], "heads": []}
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda m, a, k, i=i: count["layers"].append(i), with_kwargs=True)
        for i, layer in enumerate(decoder.layers)
    ]
    head = decoder.model.get_output_embeddings()
    hooks.append(head.register_forward_pre_hook(lambda m, a: count["heads"].append(a[0].shape[:-1].numel())))
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("layers", [1, 2, 5, 24, 80])
def test_the_last_n_curve_takes_two_passes(layers: int) -> None:
    tree = CutTree(last_curve(layers), layers)
    assert tree.applications == 2 * layers - 1
    assert tree.alone == layers * (layers + 1) // 2
    assert tree.heads == layers


def test_an_application_is_a_distinct_history() -> None:
    rng = random.Random(0)
    for _ in range(50):
        layers = rng.randint(1, 12)
        kept = [tuple(sorted(rng.sample(range(layers), rng.randint(1, layers)))) for _ in range(rng.randint(1, 9))]
        tree = CutTree(kept, layers)
        assert tree.applications == len({one[:end] for one in kept for end in range(1, len(one) + 1)})
        assert tree.heads == len(set(kept))


class Fake:
    """A batch whose states are the histories themselves; it knows how many of them are alive."""

    def __init__(self) -> None:
        self.alive: set[int] = set()
        self.most = 0
        self.steps = 0

    def make(self, history: Kept) -> Any:
        batch = self
        number = self.steps

        class Held:
            def __init__(self) -> None:
                self.history = history
                batch.alive.add(number)
                batch.most = max(batch.most, len(batch.alive))

            def fork(self) -> Any:
                return self

            def __del__(self) -> None:
                batch.alive.discard(number)

        self.steps += 1
        return Held()

    def start(self) -> Any:
        return self.make(())

    def step(self, layer: int, state: Any) -> Any:
        return self.make((*state.history, layer))


def test_every_branch_ends_with_its_own_history_and_few_states_are_alive() -> None:
    rng = random.Random(1)
    for _ in range(60):
        layers = rng.randint(2, 24)
        kept = [tuple(sorted(rng.sample(range(layers), rng.randint(1, layers)))) for _ in range(rng.randint(1, 40))]
        if rng.random() < 0.3:
            kept = last_curve(layers)
        tree, batch = CutTree(kept, layers), Fake()
        seen: dict[int, Kept] = {}
        tree.walk(batch, lambda ends, state, seen=seen: seen.update(dict.fromkeys(ends, state.history)))  # type: ignore
        assert [seen[i] for i in range(len(kept))] == kept
        assert batch.steps - 1 == tree.applications
        assert batch.most <= tree.alive <= len(set(kept)).bit_length() + 2
    assert CutTree(last_curve(80), 80).alive == 3


@pytest.mark.parametrize("bad", [(), (1, 0), (0, 0), (5,), (-1, 2)])
def test_a_tuple_that_is_no_selection_is_refused(bad: Kept) -> None:
    with pytest.raises(UsageError, match="increasing selection"):
        CutTree([(0, 1), bad], 5)


def test_one_pass_is_each_cut_by_itself_to_the_bit(decoder: Decoder) -> None:
    """Same tensor shapes: all positions of the batch are asked, so the head sees what the model's own pass shows it."""
    layers = len(decoder)
    kept = [*last_curve(layers), *(Block(start, 2).kept(layers) for start in range(layers - 1)), (2,)]
    ids_BT = torch.randint(0, 320, (3, 17), generator=torch.Generator().manual_seed(0))
    row_N, position_N = torch.arange(3).repeat_interleave(17), torch.arange(17).repeat(3)
    tree = CutTree(dict.fromkeys(kept), layers)
    found: dict[Kept, torch.Tensor] = {}
    layerwise = Layerwise(decoder)
    with counted(decoder) as count:
        batch = layerwise.begin(ids_BT)

        def see(ends: tuple[int, ...], state: State) -> None:
            for end in ends:
                found[tree.branches[end]] = batch.logits(state, row_N, position_N)

        tree.walk(batch, see)
    assert len(count["layers"]) == tree.applications < tree.alone
    for one in kept:
        with virtual_cut(decoder, one):
            assert torch.equal(found[one], forward_logits(decoder, ids_BT).flatten(0, 1)), one


def test_logits_only_where_they_are_asked(decoder: Decoder) -> None:
    kept = last_curve(len(decoder))
    branches = Branches(decoder, kept, 1 << 28)
    ids_BT = torch.randint(0, 320, (2, 12))
    asked = Asked.make(torch.tensor([0, 1, 1, 1]), torch.tensor([3, 7, 7, 2]), torch.tensor([5, 6, 7, 8]), 12)
    with counted(decoder) as count:
        values, _ = branches.score(branches.kept, ids_BT, None, asked)
    assert count["heads"] == [3] * len(kept)  # row 1, position 7 is asked for twice
    assert sorted(count["layers"]) == sorted([*range(5), *[4] * 4])
    for one, value_N in zip(branches.kept, values, strict=True):
        with virtual_cut(decoder, one):
            logp = forward_logits(decoder, ids_BT).log_softmax(dim=-1)
        expected = torch.stack([logp[0, 3, 5], logp[1, 7, 6], logp[1, 7, 7], logp[1, 2, 8]])
        assert torch.allclose(value_N, expected, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 20_000, 1 << 28])
def test_slices_of_the_head_do_not_change_a_document(decoder: Decoder, budget: int) -> None:
    """Padded rows, positions asked out of order and several times, and a budget that cuts them into many slices."""
    rng = random.Random(2)
    rows = [[rng.randrange(320) for _ in range(rng.randint(2, 30))] for _ in range(6)]
    ids_BT = padded(rows)
    at = [(r, p, rng.randrange(320)) for r, ids in enumerate(rows) for p in range(len(ids) - 1) for _ in range(rng.randint(1, 3))]
    rng.shuffle(at)
    row_N, position_N, token_N = torch.tensor(at).T
    branches = Branches(decoder, last_curve(5), budget)
    values, greedy = branches.score(
        branches.kept, ids_BT, None, Asked.make(row_N, position_N, token_N, ids_BT.shape[1]), dtype=torch.float32, greedy=True
    )
    assert greedy is not None
    for b, one in enumerate(branches.kept):
        with virtual_cut(decoder, one):
            alone = [forward_logits(decoder, torch.tensor([ids])).log_softmax(dim=-1)[0] for ids in rows]
        expected = torch.stack([alone[r][p, t] for r, p, t in at])
        assert torch.allclose(values[b], expected, atol=2e-5)
        assert greedy[b].tolist() == [int(alone[r][p].argmax()) == t for r, p, t in at]


def test_what_is_not_a_number_is_left_out_or_refused(own_llama: Path) -> None:
    live = load_model(own_llama, device="cpu", dtype="float32")
    with torch.no_grad():
        live.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    decoder = view_decoder(live)
    asked = Asked.make(torch.tensor([0]), torch.tensor([2]), torch.tensor([4]), 4)
    ids_BT = torch.ones((1, 4), dtype=torch.long)
    branches = Branches(decoder, [(0, 1, 3, 4), (0, 1, 2, 4)], 1 << 20)
    values, _ = branches.score(branches.kept, ids_BT, None, asked)
    assert list(branches.broken) == [(0, 1, 2, 4)] and values.isnan().tolist() == [[False], [True]]
    whole = Branches(decoder, [(0, 1, 3, 4), (0, 1, 2, 3, 4)], 1 << 20)
    with pytest.raises(Refused, match="not numbers"):
        whole.score(whole.kept, ids_BT, None, asked)


def test_a_model_that_does_more_between_its_layers_is_not_trusted_to_the_tree(own_llama: Path) -> None:
    """Its layers are run as the model runs them, each branch by itself, and the numbers are right all the same."""
    live = load_model(own_llama, device="cpu", dtype="float32")
    norm = live.model.layers[1].input_layernorm

    def forward(*args: Any, whole: Any = live.model.forward, **kwargs: Any) -> Any:
        norm.weight.data *= 1.5  # something that a layer does to the next call
        try:
            return whole(*args, **kwargs)
        finally:
            norm.weight.data /= 1.5

    live.model.forward = forward
    decoder = view_decoder(live)
    kept = last_curve(5)
    branches = Branches(decoder, kept, 1 << 28)
    assert not branches.shared and not branches.broken
    ids_BT = torch.randint(0, 320, (2, 9))
    asked = Asked.make(torch.tensor([0, 1]), torch.tensor([3, 5]), torch.tensor([7, 8]), 9)
    values, _ = branches.score(branches.kept, ids_BT, None, asked)
    for b, one in enumerate(branches.kept):
        with virtual_cut(decoder, one):
            logp = forward_logits(decoder, ids_BT).log_softmax(dim=-1)
        assert torch.equal(values[b], torch.stack([logp[0, 3, 7], logp[1, 5, 8]]))


UNLIKE = {"RWKV", "GLM-5", "LongCat-Flash"}
"""Their layers hand on more than states (shown by docs/families.md too), or no stack is found."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decoder]:
    def build(name: str) -> Decoder:
        folder = families.build(name, tmp_path_factory.mktemp("tree") / "source")
        return view_decoder(load_model(folder, device="cpu", dtype="float32"))

    return build


@pytest.mark.parametrize("name", sorted(set(families.FAMILIES) - UNLIKE))
def test_families(name: str, built: Callable[[str], Decoder]) -> None:
    from transformers import CONFIG_MAPPING

    if families.FAMILIES[name].model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have it")
    decoder = built(name)
    layers = len(decoder)
    kept = [*last_curve(layers), Block(0, 2).kept(layers), Block(1, layers // 2).kept(layers)]
    exact, broken = exact_branches(decoder, kept, vocab_size(decoder.model.config))
    assert exact
    assert not broken or name in ("Gemma-3n", "Gemma-4"), broken  # their last layers need keys of layers that go


def test_a_family_that_hands_on_more_is_seen(built: Callable[[str], Decoder]) -> None:
    decoder = built("RWKV")
    exact, _ = exact_branches(decoder, last_curve(len(decoder)), vocab_size(decoder.model.config))
    assert not exact


@pytest.mark.parametrize("name", ["Gemma-4", "Gemma-3n"])
def test_a_fork_has_the_shared_keys_and_values_to_itself(name: str, tmp_path: Path) -> None:
    """Layers that share keys and values hand them on in a mapping, which one branch must not write for another."""
    decoder = view_decoder(load_model(families.build(name, tmp_path / "model"), device="cpu"))
    ids_BT = torch.arange(4, 14).unsqueeze(0)
    batch = Layerwise(decoder).begin(ids_BT)
    start = batch.start()
    assert start.shared, "this family shares"
    apart, alone = start.fork(), batch.start()
    for layer in range(len(decoder)):
        batch.step(layer, State(torch.randn_like(apart.hidden), apart.shared))  # another branch runs first
    expected, found = alone, start
    for layer in range(len(decoder)):
        expected, found = batch.step(layer, expected), batch.step(layer, found)
    other = Layerwise(decoder).begin(ids_BT)
    fresh = other.start()
    for layer in range(len(decoder)):
        fresh = other.step(layer, fresh)
    assert torch.equal(found.hidden, fresh.hidden) and torch.equal(expected.hidden, fresh.hidden)
