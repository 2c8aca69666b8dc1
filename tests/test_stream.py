"""Layers that come one at a time are those of the loaded model, and what is computed with them is equal to the bit."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from layerprune.eval.answers import Answers
from layerprune.eval.evaluate import evaluate_checkpoint
from layerprune.eval.streamed import sweep_streamed
from layerprune.eval.sweep import sweep_live
from layerprune.model import stream
from layerprune.model.branches import Branches
from layerprune.model.budget import GIB, Budget, certain_bytes, refuse_too_little, streaming_budget
from layerprune.model.config import load_config
from layerprune.model.decoder import Decoder, view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.layermajor import layer_major, prove_stack, sizes_of, working_bytes
from layerprune.model.layerwise import Batch, Layerwise, State
from layerprune.model.load import load_model, load_tokenizer, pick_dtype
from layerprune.model.passplan import PROCESS_BYTES, PassPlan, Sizes, nodes_of, plan_passes, stored_states
from layerprune.model.stream import StreamedModel
from layerprune.model.tensors import read_checkpoint
from layerprune.model.tree import CutTree, Node
from layerprune.prune.rank import rank_blocks, rank_decoder
from layerprune.prune.rank_streamed import rank_streamed

torch.set_num_threads(1)
WHOLE_ONLY = {"RWKV", "GLM-5", "LongCat-Flash", "Zamba", "Zamba2"}
"""Families that are refused: layers that share weights, or hand on more than a state."""
PLENTY = Budget(None, 8 << 30)


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def sequences(vocab: int, lengths: tuple[int, ...] = (14, 12, 14, 9, 10, 14)) -> list[list[int]]:
    some = torch.Generator().manual_seed(0)
    return [torch.randint(2, vocab, (n,), generator=some).tolist() for n in lengths]


def cuts(layers: int) -> list[tuple[int, ...]]:
    """The whole model, its last-n curve, and two blocks, one of them at the start."""
    last = [(*range(layers - 1 - n), layers - 1) for n in range(1, layers - 1)]
    blocks = [tuple(i for i in range(layers) if not a <= i < b) for a, b in ((2, 4), (0, 2))]
    return [tuple(range(layers)), *last, *blocks]


def must_not_count_too_much(streamed: StreamedModel, least: float = 0.0) -> None:
    """What the headers say is never more than what the plan of the passes counts, and not less than `least` of it."""
    config, stored = load_config(streamed.folder), read_checkpoint(streamed.folder)
    kept = pick_dtype(streamed.dtype, "cpu")
    outside, layer, arriving = certain_bytes(config, stored, streamed.dtype, kept)
    exact = sizes_of(streamed)
    pairs = ((outside, exact.rest), (layer, max(exact.layers)), (arriving, exact.arriving))
    assert all(least * known <= certain <= known for certain, known in pairs), pairs


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_equal_to_the_bit_or_refused(name: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    if families.FAMILIES[name].model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know it")
    folder = families.build(name, tmp_path / "source")
    asked = sequences(families.COMMON["vocab_size"])
    if name in WHOLE_ONLY:
        with pytest.raises(Refused, match=r"layer by layer|layout is not supported"):
            rank_streamed(StreamedModel(folder, device="cpu", dtype="float32"), asked, PLENTY)
        return
    live = load_model(folder, device="cpu", dtype="float32")
    streamed = StreamedModel(folder, device="cpu", dtype="float32")
    own, inside = tensors(live), f"{streamed.decoder.path}."
    rest = {n: t for n, t in tensors(streamed.decoder.model).items() if not n.startswith(inside)}
    assert_same(rest, {n: t for n, t in own.items() if not n.startswith(inside)})
    for layer in streamed.layers(range(len(streamed))):
        assert_same(tensors(streamed.decoder.layers[layer]), tensors(view_decoder(live).layers[layer]))
    must_not_count_too_much(streamed)
    distance, _ = rank_streamed(streamed, asked, PLENTY)
    assert distance == rank_decoder(view_decoder(live), asked)
    kept = cuts(families.LAYERS)
    found = sweep_streamed(streamed, None, kept, PLENTY, sequences=asked)
    assert found == sweep_live(live, None, kept, sequences=asked)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "GPT-J", "Mixtral", "Gemma-3", "BLOOM"])
def test_in_half_precision_too(name: str, tmp_path: Path) -> None:
    folder = families.build(name, tmp_path / "source")
    live = load_model(folder, device="cpu", dtype="bfloat16")
    streamed = StreamedModel(folder, device="cpu", dtype="bfloat16")
    for layer in streamed.layers(range(len(streamed))):
        assert_same(tensors(streamed.decoder.layers[layer]), tensors(view_decoder(live).layers[layer]))
    inside = f"{streamed.decoder.path}."
    rest = {n: t for n, t in tensors(streamed.decoder.model).items() if not n.startswith(inside)}
    assert_same(rest, {n: t for n, t in tensors(live).items() if not n.startswith(inside)})


@pytest.fixture
def sharded(build_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return build_llama(tmp_path / "sharded", layers=6, shard="100KB")


def absent(layer: torch.nn.Module) -> bool:
    return all(t.is_meta for t in layer.parameters())


def test_layers_come_and_go_and_each_byte_is_read_once(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 3
    streamed = StreamedModel(sharded, device="cpu", dtype="float32")
    layers = streamed.decoder.layers
    before, total = streamed.read, sum(p.stat().st_size for p in sharded.glob("*.safetensors"))
    seen = []
    for layer in streamed.layers([0, 1, 3, 5], hold=[5]):
        seen.append(layer)
        assert not absent(layers[layer]) and not absent(layers[5]) and absent(layers[2])
        assert layer in (0, 5) or absent(layers[0])
    assert seen == [0, 1, 3, 5]
    assert all(map(absent, layers))
    assert streamed.read - before == sum(streamed.stored_bytes(i) for i in (0, 1, 3, 5))
    for _ in streamed.layers(range(6)):
        pass
    each = sum(streamed.stored_bytes(i) for i in range(6))
    assert before + each <= total < 1.1 * (before + each)  # the rest of the files are their headers


def test_a_pass_that_is_left_takes_its_layers_along(sharded: Path) -> None:
    streamed = StreamedModel(sharded, device="cpu", dtype="float32")
    with contextlib.closing(streamed.layers(range(6), hold=[5])) as coming:
        next(coming)
        with pytest.raises(RuntimeError, match="being streamed already"):
            next(streamed.layers([0]))
    assert all(map(absent, streamed.decoder.layers))
    assert not [t for t in threading.enumerate() if t.name.startswith("weights")]
    assert next(streamed.layers([2])) == 2


def test_files_are_read_and_not_mapped(sharded: Path) -> None:
    streamed = StreamedModel(sharded, device="cpu", dtype="float32")
    for _ in streamed.layers(range(6)):
        assert str(sharded) not in Path("/proc/self/maps").read_text()


def test_what_cannot_be_streamed_is_refused(own_llama: Path) -> None:
    weights = load_file(own_llama / "model.safetensors")
    config = json.loads((own_llama / "config.json").read_text())
    (own_llama / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(Refused, match="stored quantised"):
        StreamedModel(own_llama, device="cpu")
    (own_llama / "config.json").write_text(json.dumps(config))
    gone = next(n for n in weights if ".layers.3." in n)
    save_file({n: t for n, t in weights.items() if n != gone}, own_llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refused, match="contradict its config"):
        StreamedModel(own_llama, device="cpu")


def test_a_file_that_shrinks_meanwhile_is_told(own_llama: Path) -> None:
    streamed = StreamedModel(own_llama, device="cpu")
    file = own_llama / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 8)
    with pytest.raises(Refused, match="became shorter"):
        list(streamed.layers(range(len(streamed))))
    assert all(map(absent, streamed.decoder.layers))


Key = tuple[int, ...]


def outputs(layers: int, tree: CutTree) -> dict[int, Key]:
    """The layers run up to each node, by the node's identity."""
    found: dict[int, Key] = {}
    waiting: list[tuple[Node, Key]] = [(root, ()) for root in tree.roots]
    while waiting:
        node, before = waiting.pop()
        found[id(node)] = (*before, node.layer)
        waiting += [(child, found[id(node)]) for child in node.children]
    return found


def exact_plan(streamed: StreamedModel, tree: CutTree, shapes: list[tuple[int, int]], passes: int) -> PassPlan:
    """The plan of a budget that holds about `passes` parts of the batches."""
    roomy = plan_passes(sizes_of(streamed), tree, shapes, memory=None, ram=8 << 30, working=0)
    return plan_passes(sizes_of(streamed), tree, shapes, memory=None, ram=roomy.fixed + roomy.states // passes + 4096, working=0)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_states_are_those_of_the_tree_whatever_the_passes(sharded: Path, passes: int) -> None:
    streamed = StreamedModel(sharded, device="cpu", dtype="float32")
    live = view_decoder(load_model(sharded, device="cpu", dtype="float32"))
    tree = CutTree(cuts(6), 6)
    batches = [(torch.tensor([ids]), None) for ids in sequences(100, (9, 9, 9, 9, 9, 9))]
    plan = exact_plan(streamed, tree, [(1, 9)] * 6, passes)
    assert len(plan.groups) == passes and plan.hold == (5,)
    before = streamed.read
    paths = outputs(6, tree)
    found: dict[tuple[int, Key], torch.Tensor] = {}

    def see(number: int, batch: Batch, node: Node | None, state: State) -> None:
        found[number, () if node is None else paths[id(node)]] = state.hidden

    layer_major(streamed, tree, batches, plan, see)
    assert streamed.read - before == plan.read == passes * sum(streamed.stored_bytes(i) for i in range(6))
    layerwise = Layerwise(live)
    for number, (ids_BT, _) in enumerate(batches):
        batch = layerwise.begin(ids_BT)
        for path in {*paths.values(), ()}:
            state = batch.start()
            for layer in path:
                state = batch.step(layer, state)
            assert torch.equal(found[number, path], state.hidden)


@pytest.mark.parametrize("kept", [cuts(8), cuts(8)[:1], [cuts(8)[0], *cuts(8)[-2:]], cuts(8)[1:7], cuts(8)[-2:]])
def test_the_states_that_wait_are_counted_right(
    kept: list[tuple[int, ...]], build_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerprune.model import layermajor

    streamed = StreamedModel(build_llama(tmp_path / "eight", layers=8), device="cpu", dtype="float32")
    tree = CutTree(kept, 8)
    plan = plan_passes(sizes_of(streamed), tree, [(1, 5)], memory=None, ram=8 << 30, working=0)
    walks: list[Any] = []
    made = layermajor._Walk.__init__
    monkeypatch.setattr(layermajor._Walk, "__init__", lambda self, *a: (made(self, *a), walks.append(self), None)[-1])
    waiting: list[int] = []

    def see(number: int, batch: Batch, node: Node | None, state: State) -> None:
        waiting.append(len(walks[-1].waiting) if walks else 0)

    layer_major(streamed, tree, [(torch.tensor([[1, 2, 3, 4, 5]]), None)], plan, see)
    # beside those that wait: the state at work and its result
    assert max(waiting) + 2 <= plan.most == stored_states(tree, plan.hold)
    assert plan.most <= max(waiting) + 3


def test_the_last_layer_is_held_only_where_branches_part_before_it() -> None:
    tree = CutTree(cuts(8)[:7], 8)
    assert stored_states(tree, (7,)) < stored_states(tree)
    assert len(nodes_of(tree)) == tree.applications


def test_too_little_memory_is_refused_with_what_would_do(sharded: Path) -> None:
    streamed = StreamedModel(sharded, device="cpu", dtype="float32")
    with pytest.raises(Refused, match=r"^--ram 0\.50GiB is too little .*: use at least 0\.\d\dGiB") as told:
        rank_streamed(streamed, sequences(100), Budget(None, 1 << 29))
    enough = float(str(told.value).split("at least ")[1].split("GiB")[0])
    rank_streamed(streamed, sequences(100), Budget(None, int(enough * 2**30)))


def test_a_model_that_does_more_between_its_layers_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = view_decoder(load_model(tiny_llama, device="cpu", dtype="float32"))
    tree = CutTree(cuts(len(decoder)), len(decoder))
    prove_stack(Layerwise(decoder), tree)
    inner = decoder.model.model
    forward = inner.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        """As if the embedding were added again after all layers."""
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 0.1 * inner.embed_tokens(kwargs["input_ids"])
        return output

    monkeypatch.setattr(inner, "forward", scaled)
    with pytest.raises(Refused, match="does more between its layers"):
        prove_stack(Layerwise(decoder), tree)


def test_a_killed_sweep_goes_on_with_the_next_pass(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = StreamedModel(sharded, device="cpu", dtype="float32")
    kept, asked = cuts(6), sequences(100, (20,) * 6)
    tree = CutTree(kept, 6)
    monkeypatch.setattr("layerprune.eval.streamed.token_budget", lambda kind: 20)  # a document a batch
    monkeypatch.setattr("layerprune.eval.streamed.logit_budget", lambda kind: 1 << 20)
    told: list[str] = []
    whole = sweep_streamed(streamed, None, kept, PLENTY, sequences=asked, say=told.append)
    assert len(told) == 1 and "1 pass over" in told[0]
    working = working_bytes(streamed.decoder, 20) + (1 << 20)
    need = plan_passes(sizes_of(streamed), tree, [(1, 20)] * 6, memory=None, ram=8 << 30, working=working)
    small = Budget(None, need.fixed + need.states // 3 + 4096)

    class Killed(Exception):
        pass

    added = Answers.save
    saves: list[int] = []

    def save(self: Answers) -> None:
        added(self)
        saves.append(1)
        if len(saves) == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "save", save)
        with contextlib.suppress(Killed):
            sweep_streamed(streamed, None, kept, small, sequences=asked, answers=Answers(tmp_path / "answers"))
    before = streamed.read
    told.clear()
    again = sweep_streamed(streamed, None, kept, small, sequences=asked, answers=Answers(tmp_path / "answers"), say=told.append)
    assert again == whole
    assert "2 passes over" in told[0], told  # of three
    assert streamed.read - before == 2 * sum(streamed.stored_bytes(i) for i in range(6))
    before = streamed.read
    assert sweep_streamed(streamed, None, kept, small, sequences=asked, answers=Answers(tmp_path / "answers")) == whole
    assert streamed.read == before


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    yield lambda free: monkeypatch.setattr("layerprune.model.budget.available_memory", lambda: free)


def test_what_fits_is_loaded(tiny_llama: Path, limits: Callable[[int], None]) -> None:
    def choice(**given: Any) -> Budget | None:
        return streaming_budget(tiny_llama, device="cpu", dtype="auto", **given)

    assert choice() is None
    assert choice(ram="8GiB") is None
    assert choice(ram="1GiB") == Budget(None, 1 << 30)
    limits(1 << 20)  # a machine that is full: a tiny model is loaded all the same
    assert choice() is None
    with pytest.raises(UsageError, match="--memory is the GPU's"):
        choice(memory="8GiB")
    with pytest.raises(UsageError, match="--ram much is no amount"):
        choice(ram="much")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "nf4"])
def test_what_can_never_be_streamed_is_refused_by_the_headers(
    build_llama: Callable[..., Path], tmp_path: Path, limits: Callable[[int], None], tied: bool, dtype: str
) -> None:
    folder = build_llama(tmp_path / "model", tie_word_embeddings=tied)
    streamed = StreamedModel(folder, device="cpu", dtype=dtype)
    must_not_count_too_much(streamed, 0.99 if dtype != "nf4" else 0.2)
    exact = sizes_of(streamed)
    outside, layer, arriving = certain_bytes(load_config(folder), read_checkpoint(folder), dtype, pick_dtype(dtype, "cpu"))
    stored = read_checkpoint(folder)
    head = {**stored, "lm_head.weight": replace(stored["model.embed_tokens.weight"], name="lm_head.weight")}
    assert certain_bytes(load_config(folder), head, dtype, pick_dtype(dtype, "cpu"))[0] == outside  # stored, and tied all the same
    least = outside + 2 * layer + arriving + PROCESS_BYTES
    assert least <= exact.rest + 2 * max(exact.layers) + exact.arriving + PROCESS_BYTES
    assert streaming_budget(folder, device="cpu", dtype=dtype, ram=least) == Budget(None, least)
    with pytest.raises(Refused, match=rf"--ram {(least - 1) / GIB:.2f}GiB is too little .* give more than that") as refusal:
        streaming_budget(folder, device="cpu", dtype=dtype, ram=least - 1)
    assert least / GIB <= float(str(refusal.value).split(" take ")[1].split("GiB")[0]) < least / GIB + 0.011


def test_the_two_memories_of_a_gpu_are_weighed_apart(tiny_llama: Path) -> None:
    config, stored = load_config(tiny_llama), read_checkpoint(tiny_llama)
    outside, layer, arriving = certain_bytes(config, stored, "bfloat16", torch.bfloat16)
    memory, ram = outside + 2 * layer + arriving, 2 * arriving + PROCESS_BYTES

    def weigh(memory: int, ram: int) -> None:
        refuse_too_little(config, stored, "bfloat16", torch.bfloat16, Budget(memory, ram))

    weigh(memory, ram)
    with pytest.raises(Refused, match=r"^--memory 0.00GiB is too little .* give more than that$"):
        weigh(memory - 1, ram)
    with pytest.raises(
        Refused, match=r"^--ram 0.68GiB is too little .* two layers as they are stored, and the process take 0.69GiB"
    ):
        weigh(memory, ram - 1)
    # and a plan says no less
    sizes = Sizes(
        rest=outside, layers=(layer,) * 5, stored=(arriving,) * 5, arriving=arriving, width=1, itemsize=2, beside=0, pair=0
    )
    for given in ((memory - 1, ram + (1 << 20)), (memory + (1 << 20), ram - 1)):
        with pytest.raises(Refused):
            plan_passes(sizes, CutTree([tuple(range(5))], 5), [(1, 1)], memory=given[0], ram=given[1], working=0)
    plan_passes(sizes, CutTree([tuple(range(5))], 5), [(1, 1)], memory=memory + 99, ram=ram + 99, working=0)


def test_a_refusal_comes_before_any_weight_is_read(run_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any, **more: Any) -> None:
        raise AssertionError("the model was begun")

    monkeypatch.setattr(stream.StreamedModel, "__init__", never)
    monkeypatch.setattr("layerprune.model.load.load_model", never)
    given: dict[str, Any] = {"data": str(run_inputs / "loss.jsonl"), "samples": 4, "length": 16, "ram": "500MiB"}
    with pytest.raises(Refused, match="--ram 0.49GiB is too little"):
        rank_blocks(run_inputs / "model", **given)
    with pytest.raises(Refused, match="--ram 0.49GiB is too little"):
        evaluate_checkpoint(run_inputs / "model", **given)


def test_it_is_told_why_a_model_is_streamed(tiny_llama: Path, limits: Callable[[int], None]) -> None:
    weights = sum(t.numel for t in read_checkpoint(tiny_llama).values()) * 4
    found = streaming_budget(tiny_llama, device="cpu", dtype="auto", ram="2GiB")
    assert found is not None and found.why == (
        f"not loaded whole, the layers come from the files: {weights / GIB:.2f} GiB of weights in float32 and 2.00 GiB kept free "
        "for working memory and the process are more than --ram 2.00GiB"
    )


def test_the_public_functions_stream_within_a_budget(run_inputs: Path, tmp_path: Path) -> None:
    told: list[str] = []
    given = {"data": str(run_inputs / "loss.jsonl"), "samples": 6, "length": 24}
    expected = rank_blocks(run_inputs / "model", **given)
    found = rank_blocks(run_inputs / "model", **given, ram="1.5GiB", say=told.append)
    assert found["distance"] == expected["distance"] and "1 pass over the checkpoint" in told[1]
    assert found["settings"]["streamed"]["passes"] == 1
    assert "streamed" not in expected["settings"]
    assert found["settings"]["streamed"]["bytes_read"] < sum(p.stat().st_size for p in (run_inputs / "model").glob("*.safetensors"))


def test_tasks_are_answered_alike(run_inputs: Path) -> None:
    from layerprune.eval.tasks import load_tasks

    folder = run_inputs / "model"
    tokenizer, live = load_tokenizer(folder), load_model(folder, device="cpu", dtype="float32")
    kept = cuts(len(view_decoder(live)))
    tasks = load_tasks({"tiny": 0}, run_inputs / "tasks", 0)
    streamed = StreamedModel(folder, device="cpu", dtype="float32")
    expected = sweep_live(live, tokenizer, kept, tasks=tasks, limit=12)
    assert sweep_streamed(streamed, tokenizer, kept, PLENTY, tasks=tasks, limit=12) == expected


def test_the_branches_of_a_skeleton_are_not_tried(sharded: Path) -> None:
    streamed = StreamedModel(sharded, device="cpu", dtype="float32")
    assert Branches(streamed.decoder, cuts(6), 1 << 20, absent=True).broken == {}
    with pytest.raises((NotImplementedError, RuntimeError, Refused)):  # torch: no data on the meta device
        Branches(streamed.decoder, cuts(6), 1 << 20)
    assert isinstance(streamed.decoder, Decoder) and stream.StreamedModel is StreamedModel


class Cut(Exception):
    """As if the process were killed."""


@pytest.mark.parametrize("after", [0, 2, 4])
@pytest.mark.parametrize("what", ["rank", "loss", "tasks"])
def test_a_killed_pass_goes_on_at_its_layer(
    run_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, after: int
) -> None:
    from layerprune.eval.tasks import load_tasks
    from layerprune.model import layermajor, passfile

    folder = run_inputs / "model"
    streamed, tokenizer = StreamedModel(folder, device="cpu", dtype="float32"), load_tokenizer(folder)
    asked, kept, layers = sequences(300), cuts(8), 8
    tasks = load_tasks({"tiny": 0}, run_inputs / "tasks", 0)
    folder_of = tmp_path / "pass"
    file = folder_of / f"{what}.safetensors"

    def call(keep: Path | None) -> Any:
        if what == "rank":
            return rank_streamed(streamed, asked, PLENTY, keep=keep)[0]
        given: dict[str, Any] = {"sequences": asked} if what == "loss" else {"tasks": tasks, "limit": 8}
        return sweep_streamed(streamed, tokenizer, kept, PLENTY, keep=keep, **given)

    expected = call(None)
    monkeypatch.setattr(passfile.PassFile, "due", lambda self: True)
    save = passfile.PassFile.save

    def killed(self: Any, identity: str, group: Any, layer: int, *rest: Any) -> None:
        save(self, identity, group, layer, *rest)
        if layer == after:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(passfile.PassFile, "save", killed)
        with pytest.raises(Cut):
            call(folder_of)
    assert [p.name for p in folder_of.iterdir()] == [file.name]
    before, run = streamed.read, []
    step = layermajor.Batch.step
    with monkeypatch.context() as patch:
        patch.setattr(layermajor.Batch, "step", lambda self, i, s: (run.append(i), step(self, i, s))[1])
        assert call(folder_of) == expected
    held = () if what == "rank" else (layers - 1,)
    left = {*range(after + 1, layers), *held}
    assert streamed.read - before == sum(streamed.stored_bytes(i) for i in left)
    # the stand-ins of the proof run once for each branch; of the real layers none up to the kill is run again
    assert {i for i in run if run.count(i) > 3} <= left
    assert not file.exists()


def test_the_states_of_another_pass_are_left_alone(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerprune.model import passfile

    streamed = StreamedModel(sharded, device="cpu", dtype="float32")
    monkeypatch.setattr(passfile.PassFile, "due", lambda self: True)
    file = tmp_path / "rank.safetensors"
    monkeypatch.setattr(passfile.PassFile, "remove", lambda self: None)  # as if killed after the last layer but one
    mine, other = sequences(100), sequences(90)
    expected = rank_streamed(streamed, other, PLENTY)[0]
    rank_streamed(streamed, mine, PLENTY, keep=tmp_path)
    assert file.exists()
    assert rank_streamed(streamed, other, PLENTY, keep=tmp_path)[0] == expected  # another question: from the first layer
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    before = streamed.read
    assert rank_streamed(streamed, other, PLENTY, keep=tmp_path)[0] == expected  # not whole: from the first layer
    assert streamed.read - before == sum(streamed.stored_bytes(i) for i in range(6))


def test_a_file_is_written_only_now_and_then(tmp_path: Path) -> None:
    from layerprune.model.passfile import PassFile

    def nothing(group: Any, found: Any = None) -> dict[str, torch.Tensor]:
        return {}

    file = PassFile(tmp_path / "a" / "pass", "key", nothing, nothing, seconds=0.0)
    assert file.due()
    file.save("same", (0,), 3, None, {"x": torch.ones(2)})
    assert not file.due() or file._cost == 0  # twenty times what writing took must pass first
    assert file.load("other", (0,)) is None
    found = file.load("same", (0,))
    assert found is not None and found[:2] == (3, None) and torch.equal(found[2]["x"].bring(), torch.ones(2))
    assert not PassFile(tmp_path / "b", "key", nothing, nothing).due()
    told: list[str] = []
    (tmp_path / "c").write_text("a file where the folder should be")
    full = PassFile(tmp_path / "c" / "pass", "key", nothing, nothing, told.append, seconds=0.0)
    full.save("same", (0,), 3, None, {"x": torch.ones(2)})
    assert len(told) == 1 and "will begin anew" in told[0] and not full.due()


@pytest.mark.parametrize("what", ["rank", "loss"])
def test_states_that_no_memory_holds_lie_in_a_file(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """One pass instead of six, with the same numbers; a kill leaves no scratch file, and the pass goes on."""
    from layerprune.model import passfile, shelf

    streamed = StreamedModel(sharded, device="cpu", dtype="float32")
    kept, asked = cuts(6), sequences(100, (20,) * 6)
    monkeypatch.setattr("layerprune.eval.streamed.token_budget", lambda kind: 20)
    monkeypatch.setattr("layerprune.eval.streamed.logit_budget", lambda kind: 1 << 20)
    tree = CutTree(kept, 6) if what == "loss" else CutTree([tuple(range(6))], 6)
    working = working_bytes(streamed.decoder, 20) + ((1 << 20) if what == "loss" else 0)
    sizes = sizes_of(streamed)
    need = plan_passes(sizes, tree, [(1, 20)] * 6, memory=None, ram=8 << 30, working=working)
    others = 5 * 20 * (sizes.beside + 20 * sizes.pair)  # what the other batches hold beside their states does not go to a file
    small = Budget(None, need.fixed + need.states // 6 + others)
    folder = tmp_path / "pass"
    said: list[str] = []

    def call(budget: Budget, keep: Path | None) -> Any:
        if what == "rank":
            return rank_streamed(streamed, asked, budget, max_tokens=20, keep=keep, say=said.append)[0]
        return sweep_streamed(streamed, None, kept, budget, sequences=asked, keep=keep, say=said.append)

    used: list[dict[str, int]] = []
    close = shelf.Shelf.close
    monkeypatch.setattr(shelf.Shelf, "close", lambda self: (used.append(dict(self.most)), close(self))[1])
    expected = call(small, None)
    assert " passes " in said[-1] and all(most["file"] == 0 for most in used)
    used.clear()
    before = streamed.read
    assert call(small, folder) == expected
    assert "1 pass " in said[-1] and "in a scratch file" in said[-1]
    held = streamed.stored_bytes(5) if what == "loss" else 0
    assert streamed.read - before == sum(streamed.stored_bytes(i) for i in range(6 if not held else 5)) + held
    (most,) = used
    plan = plan_passes(sizes_of(streamed), tree, [(1, 20)] * 6, memory=None, ram=small.ram, working=working, scratch=1 << 40)
    assert 0 < most["host"] <= plan.rooms[1] and 0 < most["file"] <= plan.file
    monkeypatch.setattr(passfile.PassFile, "due", lambda self: True)
    save = passfile.PassFile.save

    def killed(self: Any, identity: str, group: Any, layer: int, *rest: Any) -> None:
        save(self, identity, group, layer, *rest)
        if layer == 2:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(passfile.PassFile, "save", killed)
        with pytest.raises(Cut):
            call(small, folder)
    assert [p.suffix for p in folder.iterdir()] == [".safetensors"]
    before = streamed.read
    assert call(small, folder) == expected
    assert streamed.read - before == sum(streamed.stored_bytes(i) for i in (3, 4, 5))


def test_a_full_disk_under_the_scratch_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from layerprune.model.shelf import Shelf

    shelf = Shelf(torch.device("cpu"), 0, 100, tmp_path / "pass")
    states = [torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(4)]  # 192 bytes each: none fits in 100
    waiting = [shelf.put(state) for state in states]
    assert shelf.used == {"device": 0, "host": 0, "file": 4 * 192}
    assert all(torch.equal(shelf.get(w, last=True), s) for w, s in zip(waiting, states, strict=True))
    again = shelf.put(states[0].bfloat16().mT)  # another size, and no contiguous memory
    assert torch.equal(shelf.get(again, last=False), states[0].bfloat16().mT)
    more = shelf.put(states[1])
    assert more.held in {w.held for w in waiting}, "room in the file is used again"

    def full(*given: Any) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Refused, match="the disk is full"):
        shelf.put(states[2])
    shelf.close()
    assert list((tmp_path / "pass").iterdir()) == []


@pytest.mark.parametrize("what", ["rank", "loss"])
def test_a_kill_in_a_later_pass_keeps_the_earlier_ones(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The batches that are left are numbered anew then."""
    from layerprune.model import passfile

    for room in ("layerprune.eval.streamed", "layerprune.prune.rank_streamed"):
        monkeypatch.setattr(f"{room}.free_disk", lambda folder: 0)  # else a scratch file would make one pass of it

    streamed = StreamedModel(sharded, device="cpu", dtype="float32")
    kept, asked = cuts(6), sequences(100, (20,) * 6)
    monkeypatch.setattr("layerprune.eval.streamed.token_budget", lambda kind: 20)
    monkeypatch.setattr("layerprune.eval.streamed.logit_budget", lambda kind: 1 << 20)
    tree = CutTree(kept, 6) if what == "loss" else CutTree([tuple(range(6))], 6)
    working = working_bytes(streamed.decoder, 20) + ((1 << 20) if what == "loss" else 0)
    need = plan_passes(sizes_of(streamed), tree, [(1, 20)] * 6, memory=None, ram=8 << 30, working=working)
    small = Budget(None, need.fixed + need.states // 3 + 4096)
    folder = tmp_path / "pass"

    def call(budget: Budget) -> Any:
        if what == "rank":
            return rank_streamed(streamed, asked, budget, max_tokens=20, keep=folder)[0]
        return sweep_streamed(streamed, None, kept, budget, sequences=asked, answers=Answers(folder / "a"), keep=folder)

    expected = (
        rank_streamed(streamed, asked, PLENTY, max_tokens=20)[0]
        if what == "rank"
        else sweep_streamed(streamed, None, kept, PLENTY, sequences=asked)
    )
    monkeypatch.setattr(passfile.PassFile, "due", lambda self: True)
    save = passfile.PassFile.save
    saves: list[int] = []

    def killed(self: Any, identity: str, group: Any, layer: int, *rest: Any) -> None:
        save(self, identity, group, layer, *rest)
        saves.append(layer)
        if len(saves) == 8:  # five in the first pass, three in the second
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(passfile.PassFile, "save", killed)
        with pytest.raises(Cut):
            call(small)
    assert saves == [0, 1, 2, 3, 4, 0, 1, 2]
    before = streamed.read
    assert call(small) == expected
    held = (5,) if what == "loss" else ()
    second = sum(streamed.stored_bytes(i) for i in {3, 4, 5, *held})
    assert streamed.read - before == second + sum(streamed.stored_bytes(i) for i in range(6))


def test_a_run_within_a_budget_ends_with_the_numbers_of_one_without(run_inputs: Path, tmp_path: Path) -> None:
    import layerprune

    given: dict[str, Any] = {
        "heal": False, "calibration": str(run_inputs / "calibration.jsonl"), "eval_data": str(run_inputs / "loss.jsonl"),
        "tasks": ["tiny"], "task_folder": str(run_inputs / "tasks"), "device": "cpu", "length": 32, "curve": [0.25],
        "say": lambda line: None,
    }  # fmt: skip
    whole = layerprune.run(run_inputs / "model", 0.4, out=tmp_path / "whole", **given)
    streamed = layerprune.run(run_inputs / "model", 0.4, out=tmp_path / "streamed", ram="1.5GiB", **given)
    for ours, expected in zip(streamed["rows"], whole["rows"], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-6) and ours["tasks"] == expected["tasks"]
        assert ours["tokens_per_second"] is None and expected["tokens_per_second"] > 0
    assert streamed["kept"] == whole["kept"]
    assert not [p for p in (tmp_path / "streamed").rglob(".*") if p.name != ".work"] and not list(tmp_path.glob(".*"))
    record = json.loads((tmp_path / "streamed" / "pruned" / "layerprune.json").read_text())
    assert record["verified"]["logits"] == "skipped (the model does not fit in --ram)"
    assert record["verified"]["bytes"].startswith("proven")
    from layerprune.report import format_run

    assert "tokens/s" not in format_run(streamed) and "tokens/s" in format_run(whole)
    assert layerprune.run(run_inputs / "model", 0.4, out=tmp_path / "streamed", **given)["kept"] == whole["kept"]


def test_a_model_that_is_held_does_not_count_against_itself(run_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that the model nearly fills: with it in memory, what is free would not hold it again."""
    from layerprune.model.source import find_model
    from layerprune.runplan import set_up
    from layerprune.stages import Stages

    setup = set_up(find_model(str(run_inputs / "model")), heal=False, device="cpu", eval_data=str(run_inputs / "loss.jsonl"),
                   calibration=str(run_inputs / "calibration.jsonl"))  # fmt: skip
    stages = Stages(setup, lambda line: None, False)
    monkeypatch.setattr(
        "layerprune.model.budget.streaming_budget", lambda *a, **k: None if stages._source is None else Budget(None, 1)
    )
    assert stages.budget(setup.source.folder) is None
    held = stages.source()
    assert stages.budget(setup.source.folder) is None and stages.source() is held
    assert stages.budget(run_inputs / "another") is None and stages._source is None  # the source goes before another is weighed


def test_tasks_that_generate_are_refused_before_anything_is_read(run_inputs: Path, tmp_path: Path) -> None:
    from layerprune.eval.tasks import load_tasks

    (tmp_path / "gen.yaml").write_text(
        f"task: gen\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {run_inputs / 'tasks' / 'items.jsonl'}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{question}}'\n"
        "generation_kwargs:\n  until: ['.']\nmetric_list:\n  - metric: exact_match\n"
    )
    streamed, tokenizer = StreamedModel(run_inputs / "model", device="cpu"), load_tokenizer(run_inputs / "model")
    before = streamed.read
    with pytest.raises(Refused, match="generates text"):
        sweep_streamed(streamed, tokenizer, cuts(8), PLENTY, tasks=load_tasks({"gen": 0}, tmp_path, 0), sequences=sequences(300))
    assert streamed.read == before


@pytest.mark.parametrize("name", ["Llama", "Gemma-2", "Gemma-3n", "Gemma-4", "Falcon (RW)"])
def test_a_plan_counts_all_that_a_batch_holds(name: str, tmp_path: Path) -> None:
    folder = families.build(name, tmp_path / "source")
    rows, tokens = 3, 29
    ids_BT, mask_BT = torch.ones((rows, tokens), dtype=torch.long), torch.ones((rows, tokens), dtype=torch.long)
    mask_BT[1, 20:] = 0
    batch = Layerwise(view_decoder(load_model(folder, device="cpu", dtype="float32"))).begin(ids_BT, mask_BT)
    state = batch.start().hidden
    batch.forget_start()
    held = sum(tensor.untyped_storage().nbytes() for tensor in batch.held())
    sizes = sizes_of(StreamedModel(folder, device="cpu", dtype="float32"))
    assert sizes.width * rows * tokens == state.numel()
    stays = rows * tokens * (sizes.beside + tokens * sizes.pair)
    # what the rows share, such as the angles of positions, is counted for each of them
    assert held <= stays <= 3 * held
    tree = CutTree([tuple(range(8))], 8)
    plan = plan_passes(sizes, tree, [(rows, tokens)], memory=None, ram=8 << 30, working=0)
    assert plan.states == stays + plan.most * state.nbytes and plan.rooms == (0, (8 << 30) - plan.fixed - stays)


@pytest.mark.parametrize("memory", [None, 1 << 30])
def test_masks_do_not_go_to_the_scratch_file(memory: int | None) -> None:
    sizes = Sizes(rest=0, layers=(1 << 28,) * 4, stored=(1 << 28,) * 4, arriving=1 << 28, width=8, itemsize=4, beside=16, pair=1)
    tree = CutTree([tuple(range(4))], 4)
    shapes = [(1, 1000)] * 50
    stays = 1000 * (16 + 1000)
    roomy = plan_passes(sizes, tree, shapes, memory=1 << 40 if memory else None, ram=1 << 40, working=0)
    ram, given = roomy.fixed + 10 * stays, None if memory is None else roomy.fixed + 10 * stays
    plan = plan_passes(sizes, tree, shapes, memory=given, ram=1 << 33 if memory else ram, working=0, scratch=1 << 40)
    assert max(map(len, plan.groups)) == 10 and plan.rooms[memory is None] == 0
    with pytest.raises(Refused, match="--memory" if memory else "--ram"):
        less = roomy.fixed + stays - 1
        given, ram = (less, 1 << 33) if memory else (None, less)
        plan_passes(sizes, tree, shapes, memory=given, ram=ram, working=0, scratch=1 << 40)
