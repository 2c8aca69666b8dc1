"""A model in training against the model's own loss: slices, layers computed again, teachers, documents kept apart."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.nn import functional as F

from layerprune.heal import fused, prepare
from layerprune.heal.fused import IGNORED, Pieces, next_token_loss
from layerprune.heal.linear import four_bit_linears, lora_linears
from layerprune.heal.measure import saved_on_cpu
from layerprune.heal.prepare import Prepared, keeps_apart
from layerprune.heal.settings import heal_settings
from layerprune.heal.student import Student, Teaching
from layerprune.heal.teacher import find_teacher, recorded_cut
from layerprune.model.config import auto_class, load_config
from layerprune.model.source import find_model
from layerprune.prune.cut import prune_checkpoint

torch.set_num_threads(1)

_spec = importlib.util.spec_from_file_location("families", Path(__file__).with_name("families.py"))
assert _spec is not None and _spec.loader is not None
families = sys.modules.setdefault("families", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(families)

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 4}
"""Wide enough for NF4's blocks of 64."""
FALCON = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "gpt2": ("gpt2", {"n_embd": 64, "n_inner": 128, "n_head": 4, "n_layer": 4}),
    "gpt_neox": ("gpt_neox", WIDE),
    "falcon": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon (alibi)": ("falcon", {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "opt": ("opt", {**WIDE, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.2}),
    "opt (projected)": ("opt", {
        **WIDE, "ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "init_std": 0.2,
    }),
    "bloom": ("bloom", {"hidden_size": 64, "n_head": 4, "n_layer": 4}),
    "gemma2": ("gemma2", WIDE),
    "gemma3": ("gemma3_text", WIDE),
    "qwen2": ("qwen2", {**WIDE, "tie_word_embeddings": True}),
    "phi": ("phi", WIDE),
    "cohere": ("cohere", WIDE),
    "granite": ("granite", {**WIDE, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "mamba": ("mamba", {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 4}),
    "mixtral": ("mixtral", WIDE),
    "gemma3n": ("gemma3n_text", families.FAMILIES["Gemma-3n"].settings),
}  # fmt: skip
UNPACKED = {"gemma3n", "falcon", "falcon (alibi)"}
"""Narrower than NF4's blocks, or of a linear layer that transformers does not pack."""
TARGETS = {"mixtral": ["attention"], "mamba": ["mixer.in_proj", "mixer.x_proj"], "cohere": ["mlp", "attention"]}
"""Experts in one parameter are not healed; a mamba layer has no MLP."""

ONE_ANOTHER = {"opt", "opt (projected)", "bloom", "mamba"}
"""Their documents see one another whatever the positions: they have none, or no mask of them."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of a kind, made when it is first asked for."""
    root = tmp_path_factory.mktemp("kinds")

    def build(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            model_type, settings = KINDS[kind]
            torch.manual_seed(0)
            model = auto_class(config := families.make_config(families.Family(model_type, settings))).from_config(config)
            with torch.no_grad():
                for key, value in model.named_parameters():
                    if value.dim() == 1 and ("norm" in key.lower() or ".ln_" in key):
                        value.add_(torch.rand_like(value) - 0.5)
            model.generation_config.eos_token_id = None
            model.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every CPU, with bfloat16 instructions or without."""
    monkeypatch.setattr(prepare, "compute_dtype", lambda device: torch.float32)


def test_what_a_sequence_leaves_for_the_way_back_is_counted(built: Callable[[str], Path]) -> None:
    """Storages that the graph of a pass holds, each once: against those that are alive after it, weights aside."""
    made = made_ready(built("llama"))
    model: Any = made.student.decoder.model
    found = {}
    with made.student.installed():
        for length in (16, 32, 64):
            found[length] = saved_on_cpu(made.student, length, None, torch.float32)
            assert 0 < found[length].again < found[length].kept
            ids_BT = torch.randint(0, 50, (1, length))
            hidden = made.student.states(ids_BT, {})
            own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
            held, seen, open_nodes = {}, set(), [hidden.grad_fn]
            while open_nodes:
                node = open_nodes.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                open_nodes += [above for above, _ in node.next_functions]
                named = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
                named += list(getattr(node, "saved_tensors", ()))
                for tensor in (t for one in named for t in (one if isinstance(one, tuple | list) else [one])):
                    if isinstance(tensor, torch.Tensor):
                        storage = tensor.untyped_storage()
                        if storage.data_ptr() not in own:
                            held[storage.data_ptr()] = storage.nbytes()
            state = hidden.numel() * hidden.element_size()
            assert found[length].kept == pytest.approx(sum(held.values()) + 2 * state, rel=2e-3)
            del hidden, node, seen, open_nodes, named
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(one.fixed > 12 * adapters for one in found.values())
    assert made.student.recomputed == frozenset()


def made_ready(folder: Path, kind: str = "llama", teacher: Path | None = None, **options: Any) -> Prepared:
    """A checkpoint as healing trains it, adapters away from zero, without dropout of its own."""
    source = find_model(str(folder))
    options = {"targets": TARGETS.get(kind), "distil": 1.0 if teacher else None, **options}
    settings = heal_settings(
        load_config(folder), None, data="x", steps=2, batch_size=2, length=16, lora_rank=4, dropout=0.0, **options
    )
    pair = None if teacher is None else find_teacher(source, str(teacher))
    made = prepare.prepare(source, settings, recorded_cut(source), pair, "cpu", False, False, lambda line: None, False)
    generator = torch.Generator().manual_seed(1)
    for layer in lora_linears(made.live):
        b: Any = layer.lora_B[layer.adapter].weight
        b.data.copy_(0.1 * torch.randn(b.shape, generator=generator))
    made.live.eval()  # some kinds have dropout of their own
    return made


def labelled(rows: int = 3, tokens: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and labels with gaps, one row without any."""
    ids_BT = families.ids_of(rows, tokens)
    labels_BT = ids_BT.clone()
    labels_BT[0, :4], labels_BT[1, 5:9], labels_BT[2, :] = IGNORED, IGNORED, IGNORED
    return ids_BT, labels_BT


def adapters(made: Prepared) -> dict[str, torch.Tensor]:
    return {name: p for name, p in made.live.named_parameters() if p.requires_grad}


def gradients(made: Prepared, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the adapters; zeros where the loss does not depend on one."""
    found = torch.autograd.grad(loss, list(adapters(made).values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(adapters(made).items(), found, strict=True)}


def student_gradients(made: Prepared, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids_BT, labels_BT = labelled()
    with made.student.installed():
        loss = made.student.loss(ids_BT, labels_BT, **inputs)["loss"]
        return loss.detach(), gradients(made, loss)


def close(found: torch.Tensor, expected: torch.Tensor, by: float = 1e-5) -> bool:
    """Within `by` of the size of what is expected."""
    return bool(torch.linalg.norm(found - expected) <= by * torch.linalg.norm(expected))


# The loss in slices

VOCAB, FEATURES = 37, 8


def plain_loss(
    hidden: torch.Tensor, labels_BT: torch.Tensor, finish: Callable[..., torch.Tensor], teacher: torch.Tensor | None, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, next-token part), summed, all at once."""
    rows, tokens = labels_BT.shape
    log_p = finish(hidden, rows, tokens).log_softmax(-1)[:, :-1]
    aims = labels_BT[:, 1:]
    counts = aims != IGNORED
    nats = -(log_p.gather(-1, aims.clamp(min=0).unsqueeze(-1)).squeeze(-1) * counts).sum()
    if teacher is None:
        return nats, nats
    log_q = finish(teacher, rows, tokens).log_softmax(-1)[:, :-1]
    return nats + weight * (F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * counts).sum(), nats


def end(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """A model's end: norm, head and soft cap; of several streams, their weighted sum."""
    head = torch.randn(VOCAB, FEATURES, generator=torch.Generator().manual_seed(2)).to(dtype)

    def finish(part: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
        if part.dim() == 4 and part.shape[1:3] == (rows, tokens):
            part = part[0] + 0.5 * part[1]
        part = part.reshape(rows, tokens, -1, FEATURES).sum(2)
        return 4 * torch.tanh(F.linear(F.layer_norm(part, (FEATURES,)), head) / 4)

    return finish


SHAPES = {"plain": (3, 7, FEATURES), "streams first": (2, 3, 7, FEATURES), "streams last": (3, 7, 2, FEATURES)}


@pytest.mark.parametrize("weight", [None, 0.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_in_slices_is_the_whole_one(shape: str, weight: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(SHAPES[shape], generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = None if weight is None else other
    labels_BT = torch.randint(0, VOCAB, (3, 7), generator=generator)
    labels_BT[0, 2:4], labels_BT[2, :] = IGNORED, IGNORED
    exact = hidden.clone().requires_grad_(True)
    total, nats = plain_loss(exact, labels_BT, end(torch.float64), teacher, weight or 0.0)
    (slope,) = torch.autograd.grad(3.0 * total, exact)
    total, nats = total.detach(), nats.detach()
    assert slope.abs().max() > 0.1
    for positions in (*range(1, 24), 10**6):
        monkeypatch.setitem(fused.SLICE_ELEMENTS, "cpu", positions * VOCAB + 5)
        given = hidden.float().requires_grad_(True)
        found = next_token_loss(
            given, labels_BT, end(torch.float32), VOCAB, None if teacher is None else teacher.float(), weight or 0.0
        )
        assert abs(float(found[0].detach()) - float(total)) < 1e-5 * float(total), positions
        assert abs(float(found[1].detach()) - float(nats)) < 1e-5 * float(nats), positions
        assert close(torch.autograd.grad(3.0 * found[0], given)[0].double(), slope), positions


@pytest.mark.parametrize("shape", SHAPES)
def test_slices_hold_every_position_once_and_no_more_logits_than_allowed(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.zeros(SHAPES[shape])
    for positions in range(1, 24):
        monkeypatch.setitem(fused.SLICE_ELEMENTS, "cpu", positions * VOCAB)
        pieces, seen_BT = Pieces.cut(hidden, 3, 7, VOCAB), torch.zeros(3, 7)
        assert pieces.streams is (shape == "streams first")
        for at in pieces.bounds:
            part = pieces.take(seen_BT, at, state=False)
            part += 1
            assert 0 < part.numel() <= positions
            assert pieces.take(hidden, at).numel() * 21 == hidden.numel() * part.numel()
        assert (seen_BT == 1).all()
    monkeypatch.setitem(fused.SLICE_ELEMENTS, "cpu", VOCAB // 2)
    assert len(Pieces.cut(hidden, 3, 7, VOCAB).bounds) == 21, "one position, where not even that is allowed"


def test_the_next_token_part_has_no_gradient_and_evaluation_none_at_all() -> None:
    hidden = torch.randn(2, 5, FEATURES, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    labels_BT = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    total, nats = next_token_loss(hidden, labels_BT, end(torch.float32), VOCAB, hidden.detach().flip(0), 0.5)
    assert total.requires_grad and not nats.requires_grad and total > nats
    with torch.no_grad():
        still, _ = next_token_loss(hidden, labels_BT, end(torch.float32), VOCAB, hidden.detach().flip(0), 0.5)
    assert not still.requires_grad and torch.equal(still, total.detach())


def test_a_batch_without_a_label_costs_nothing() -> None:
    hidden = torch.randn(2, 5, FEATURES).requires_grad_(True)
    total, nats = next_token_loss(hidden, torch.full((2, 5), IGNORED), end(torch.float32), VOCAB, hidden.detach(), 0.5)
    (slope,) = torch.autograd.grad(total, hidden)
    assert total == nats == 0 and not slope.any()


# Families


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_are_the_model_s_own(kind: str, built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_ready(built(kind), kind)
    assert (kind in UNPACKED or four_bit_linears(made.live)) and not made.student.whole
    ids_BT, labels_BT = labelled()
    expected = made.live(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
    slopes, expected = gradients(made, expected), expected.detach()
    assert sum(bool(g.any()) for g in slopes.values()) >= 0.7 * len(slopes)
    for elements in (1 << 23, 3 * 160):  # in one slice, and in parts of rows
        monkeypatch.setitem(fused.SLICE_ELEMENTS, "cpu", elements)
        loss, found = student_gradients(made)
        assert abs(float(loss) - float(expected)) < 1e-5 * float(expected)
        for name, slope in slopes.items():
            assert torch.linalg.norm(found[name] - slope) <= 1e-4 * torch.linalg.norm(slope) + 1e-7, name
    with made.student.installed(), torch.no_grad():
        count = (labels_BT[:, 1:] != IGNORED).sum()
        assert close(made.student.nats(ids_BT, labels_BT) / count, expected)
        made.student.whole = True
        assert close(made.student.loss(ids_BT, labels_BT)["loss"], expected)
        assert close(made.student.nats(ids_BT, labels_BT) / count, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_computed_again_change_nothing(kind: str, built: Any) -> None:
    made = made_ready(built(kind), kind)
    loss, slopes = student_gradients(made)
    for again in ({0}, {1, 2}, set(range(len(made.student.decoder)))):
        made.student.recomputed = frozenset(again)
        found, others = student_gradients(made)
        assert torch.equal(found, loss)
        for name, slope in slopes.items():
            assert torch.equal(others[name], slope), name


def test_layers_computed_again_keep_less_and_draw_the_same_dropout(built: Any) -> None:
    made = made_ready(built("llama"))
    for layer in lora_linears(made.live):
        layer.rate = 0.5
    made.live.train()
    kept: dict[bool, int] = {}
    found = {}
    for again in (False, True):
        made.student.recomputed = frozenset(range(4) if again else ())
        held: list[int] = []

        def pack(tensor: torch.Tensor, held: list[int] = held) -> torch.Tensor:
            held.append(tensor.numel())
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), made.student.installed():
            loss = made.student.loss(*labelled())["loss"]
            kept[again] = sum(held)
        with made.student.installed():
            found[again] = gradients(made, loss)
    assert kept[True] < kept[False] / 4
    assert all(torch.equal(found[True][name], slope) for name, slope in found[False].items())


def test_num_items_in_batch_divides_the_loss(built: Any) -> None:
    made = made_ready(built("llama"))
    ids_BT, labels_BT = labelled()
    with made.student.installed(), torch.no_grad():
        out = made.student.loss(ids_BT, labels_BT, num_items_in_batch=torch.tensor(7))
        alone = made.student.loss(ids_BT, labels_BT)
    assert torch.equal(out["loss"], out["nats"] / 7) and torch.equal(out["nats"], alone["nats"])
    assert torch.equal(alone["loss"], alone["nats"] / (labels_BT[:, 1:] != IGNORED).sum())


def test_a_compiled_student_computes_the_same(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_ready(built("llama"))
    loss, slopes = student_gradients(made)
    compile_, calls = torch.compile, []

    def eager(function: Any, **options: Any) -> Any:
        calls.append(options)
        return compile_(function, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", eager)
    torch._dynamo.reset()
    made.student.compiled = True
    for again in (frozenset[int](), frozenset([0, 1])):
        made.student.recomputed = again
        found, others = student_gradients(made)
        assert close(found, loss) and all(close(others[name], slope, 1e-4) for name, slope in slopes.items())
    assert len(calls) == 4, "one for each layer, however often it runs"


# The model stays whole


def state_of(made: Prepared) -> list[Any]:
    parts = [made.live, made.live.get_base_model(), *made.student.decoder.layers]
    return [sorted(part.__dict__) for part in parts] + [layer.active for layer in lora_linears(made.live)]


@pytest.mark.parametrize("teaching", [False, True])
def test_the_model_is_as_it_was_afterwards(built: Any, teaching: bool) -> None:
    made = made_ready(built("llama"))
    if teaching:
        made = dataclasses.replace(made, student=Student(made.student.decoder, Teaching((0, 2), 1.0, 1)))
    student, (ids_BT, labels_BT) = made.student, labelled()
    before, logits = state_of(made), made.live(input_ids=ids_BT).logits
    with student.installed(made.live):
        out = made.live(input_ids=ids_BT, labels=labels_BT)
        assert set(out) == {"loss", "nats"}, "peft's model returns what the student does"
    assert state_of(made) == before and torch.equal(made.live(input_ids=ids_BT).logits, logits)

    class Broken(RuntimeError):
        """What a layer raises."""

    broken = [0]
    mlp: Any = student.decoder.layers[2].mlp  # a kept layer after the seam, in the teacher's pass and in the student's
    forward = mlp.forward

    def trip(x: torch.Tensor) -> torch.Tensor:
        broken[0] -= 1
        if broken[0] == 0:
            raise Broken
        return forward(x)

    mlp.forward = trip
    changed = state_of(made)
    for passes in (1, 2) if teaching else (1,):
        broken[0] = passes
        with pytest.raises(Broken), student.installed(made.live):
            made.live(input_ids=ids_BT, labels=labels_BT)
        assert state_of(made) == changed
        assert torch.equal(made.live(input_ids=ids_BT).logits, logits)
        with student.installed(made.live):
            again = made.live(input_ids=ids_BT, labels=labels_BT)
        assert torch.equal(again["loss"], out["loss"]), "a pass that broke off leaves nothing behind"


# Teachers


@pytest.fixture(scope="module")
def pairs(built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """(a checkpoint of a kind, the same without a block)."""
    root = tmp_path_factory.mktemp("cuts")

    def pair(kind: str, block: str) -> tuple[Path, Path]:
        out = root / f"{kind}-{block.replace(':', '-')}"
        if not out.exists():
            prune_checkpoint(built(kind), out, layers=block, say=lambda line: None)
        return built(kind), out

    return pair


def in_cut(made: Prepared, name: str) -> str:
    """An adapter's name by the cut checkpoint's layer numbers."""
    start = f"base_model.model.{made.student.decoder.path}."
    number, _, inside = name.removeprefix(start).partition(".")
    return f"{start}{made.renamed[int(number)]}.{inside}"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "bloom", "gemma2", "cohere"])
def test_a_student_beside_its_teacher_is_the_cut_checkpoint_s_model(kind: str, pairs: Any) -> None:
    whole, cut = pairs(kind, "1:3")
    weight = 0.7
    pair, alone = made_ready(cut, kind, whole, distil=weight), made_ready(cut, kind)
    student = pair.student
    assert student.kept == (0, 3) and student.teaching == Teaching((0, 3), weight, 0) and len(student.decoder) == 4
    assert {in_cut(pair, n) for n in adapters(pair)} == set(adapters(alone)), "dropped layers have no adapters"
    for name, p in adapters(pair).items():
        p.data.copy_(adapters(alone)[in_cut(pair, name)].data)
    ids_BT, labels_BT = labelled()
    counts = (labels_BT[:, 1:] != IGNORED).float()
    logits = alone.live(input_ids=ids_BT).logits
    with torch.no_grad(), pair.live.disable_adapter():
        for layer in lora_linears(pair.live):
            layer.active = False
        aim = pair.live(input_ids=ids_BT).logits
        for layer in lora_linears(pair.live):
            layer.active = True
    nats = alone.live(input_ids=ids_BT, labels=labels_BT).loss * counts.sum()
    log_p, log_q = logits[:, :-1].log_softmax(-1), aim[:, :-1].log_softmax(-1)
    apart = ((log_q.exp() * (log_q - log_p)).sum(-1) * counts).sum()
    assert apart > 1e-3 * counts.sum()
    expected = gradients(alone, (nats + weight * apart) / counts.sum())
    with student.installed():
        out = student.loss(ids_BT, labels_BT)
        found = gradients(pair, out["loss"])
        assert close(student.nats(ids_BT, labels_BT), nats.detach())
    assert close(out["nats"].detach(), nats.detach())
    assert close(out["loss"].detach() * counts.sum(), (nats + weight * apart).detach())
    for name, slope in found.items():
        assert close(slope, expected[in_cut(pair, name)], 1e-4), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "gemma3"])
def test_layers_that_teacher_and_student_share_run_once(kind: str, pairs: Any) -> None:
    whole, cut = pairs(kind, "2:3")
    made = made_ready(cut, kind, whole, adapters="after")
    student = made.student
    assert student.kept == (0, 1, 3) and student.teaching is not None and student.teaching.shared == 2
    runs: list[int] = []
    run = student.run

    def counted(index: int, *args: Any, **kwargs: Any) -> Any:
        runs.append(index)
        return run(index, *args, **kwargs)

    student.run = counted  # type: ignore[method-assign]
    loss, slopes = student_gradients(made)
    assert runs == [0, 1, 2, 3, 3]
    runs.clear()
    student.teaching = dataclasses.replace(student.teaching, shared=0)
    apart, others = student_gradients(made)
    assert runs == [0, 1, 2, 3, 0, 1, 3]
    assert torch.equal(loss, apart) and all(torch.equal(others[name], slope) for name, slope in slopes.items())
    assert all(slope.any() for slope in slopes.values())


# Documents kept apart


def two_documents(rows: int = 2, first: int = 6, tokens: int = 14) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and positions of sequences that hold two documents each, the border moving from row to row."""
    ids_BT = families.ids_of(rows, tokens)
    labels_BT, positions_BT = ids_BT.clone(), torch.arange(tokens).repeat(rows, 1)
    for row in range(rows):
        labels_BT[row, [0, first + row]] = IGNORED
        positions_BT[row, first + row :] -= first + row
    return ids_BT, labels_BT, positions_BT


def apart_by_own_loss(made: Prepared) -> bool:
    """Whether the loss of two packed documents is the sum of each alone."""
    ids_BT, labels_BT, positions_BT = two_documents()
    with made.student.installed(), torch.no_grad():
        together = made.student.loss(ids_BT, labels_BT, position_ids=positions_BT)["nats"]
        alone = torch.zeros(())
        for row in range(2):
            for part in (slice(0, 6 + row), slice(6 + row, 14)):
                ids_1T = ids_BT[row : row + 1, part]
                alone = alone + made.student.nats(ids_1T, ids_1T)
    return close(together, alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "mixtral", "phi"])
def test_positions_that_restart_keep_documents_apart(kind: str, attention: str, built: Any) -> None:
    made = made_ready(built(kind), kind)
    made.student.decoder.model.set_attn_implementation(attention)
    with made.student.installed():
        assert keeps_apart(made.student, made.student.decoder)
    assert made.separate and apart_by_own_loss(made)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rounding_is_not_taken_for_documents_that_see_one_another(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, in many layers that double what is rounded, and with states a thousand times as large in one feature."""
    monkeypatch.setattr(prepare, "compute_dtype", lambda device: torch.bfloat16)
    model_type, settings = KINDS[kind]
    deep = {"num_hidden_layers": 12, "initializer_range": 0.3} if kind == "llama" else {"n_layer": 12, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = families.make_config(families.Family(model_type, {**settings, **deep}))
    model = auto_class(config).from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] += 30.0
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "deep")
    made = made_ready(tmp_path / "deep", kind)
    ids_BT = torch.randint(0, 50, (1, 16), generator=torch.Generator().manual_seed(5))
    positions = {"position_ids": torch.arange(16).remainder(8).unsqueeze(0)}
    with torch.no_grad(), made.student.installed():
        made.live.eval()
        both, alone = made.student.states(ids_BT, positions)[:, 8:].float(), made.student.states(ids_BT[:, 8:], {}).float()
        assert (both - alone).abs().max() > 0.05 * alone.std(), "there is something to be mistaken"
    assert made.separate


@pytest.mark.parametrize("kind", KINDS)
def test_whether_documents_are_kept_apart_is_found_out_rightly(kind: str, built: Any) -> None:
    made = made_ready(built(kind), kind)
    try:
        apart = apart_by_own_loss(made)
    except (TypeError, ValueError):
        apart = False
    assert made.separate is apart is (kind not in ONE_ANOTHER)
