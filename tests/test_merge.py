"""Merging an adapter into both bases, and the proof that a healed checkpoint is what it should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, make_config
from safetensors.torch import load_file, save_file

from layerprune.heal import proof
from layerprune.heal.merge import (
    Stored,
    _live_weight,
    locate,
    merge_adapter,
    nf4_rounded,
    plan_merge,
    quantised_linears,
)  # fmt: skip
from layerprune.heal.proof import logits_error, logits_tolerance, prove_healed
from layerprune.heal.quantise import add_lora, load_quantised
from layerprune.heal.settings import heal_settings
from layerprune.heal.targets import Target, choose_targets, target_pattern
from layerprune.model.config import auto_class, load_config
from layerprune.model.decoder import forward_logits, view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.feed import read_tensor
from layerprune.model.load import load_model
from layerprune.model.nf4 import is_linear, unquantised
from layerprune.model.tensors import read_checkpoint
from layerprune.model.verify import meta_decoder

torch.set_num_threads(1)

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "llama-tied": ("llama", {**WIDE, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_inner": 128, "n_head": 4, "n_layer": 3}),
    # project_in and project_out are linear layers outside the stack
    "opt-350m": ("opt", {**WIDE, "hidden_size": 128, "ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": False}),
    "gemma2": ("gemma2", WIDE),
    # an MLP width that is no multiple of NF4's block: down_proj stays unquantised on the CPU
    "llama-odd": ("llama", {**WIDE, "intermediate_size": 96}),
}


def build(kind: str, folder: Path, dtype: torch.dtype, shard: str = "5GB") -> Path:
    torch.manual_seed(0)
    config = make_config(Family(*KINDS[kind]))
    auto_class(config).from_config(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def make_adapter(source: Path, folder: Path, strength: float = 0.1) -> dict[str, Any]:
    """An adapter of rank 4 with random factors in peft's format; returns the arguments that say where it goes."""
    live = load_model(source, device="cpu")
    decoder, stored = view_decoder(live), read_checkpoint(source)
    targets = choose_targets(decoder)
    keep = unquantised(meta_decoder(source).model, "cpu")
    four_bit = load_quantised(source, "cpu", torch.float32, keep)
    arguments = {
        "where": locate(targets, stored, len(decoder)),
        "quantised": locate(quantised_linears(view_decoder(four_bit)), stored, len(decoder)),
    }
    settings = heal_settings(load_config(source), None, lora_rank=4, dropout=0.0)
    adapted = add_lora(live, target_pattern(decoder, targets), settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, strength)
    adapted.save_pretrained(folder)
    return arguments


def merge(source: Path, adapter: Path, out: Path, **arguments: Any) -> Path:
    out.mkdir()
    shutil.copyfile(source / "config.json", out / "config.json")
    merge_adapter(source, adapter, out, **arguments)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path, dict[str, Any]]]:
    """(kind, dtype) -> (source, adapter, arguments of merge and proof), each made once."""
    root, kept = tmp_path_factory.mktemp("made"), {}

    def get(kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path, dict[str, Any]]:
        if (kind, dtype) not in kept:
            folder = root / f"{kind}-{dtype}"
            source = build(kind, folder / "source", dtype, shard="100KB" if kind == "llama" else "5GB")
            kept[kind, dtype] = (source, folder / "adapter", make_adapter(source, folder / "adapter"))
        return kept[kind, dtype]

    return get


# NF4


@pytest.mark.parametrize("kind", ["llama", "llama-odd", "gpt2", "opt-350m"])
@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_nf4_is_to_the_bit_what_the_trained_model_holds(
    kind: str, dtype: torch.dtype, compute: torch.dtype, tmp_path: Path
) -> None:
    source = build(kind, tmp_path / "model", dtype)
    meta = meta_decoder(source).model
    keep = unquantised(meta, "cpu")
    decoder = view_decoder(load_quantised(source, "cpu", compute, keep))
    held, stored = quantised_linears(decoder), read_checkpoint(source)
    assert {t.name for t in held} == {name for name, module in meta.named_modules() if is_linear(module)} - set(keep) != set()
    assert any(t.layer == -1 for t in held) == (kind == "opt-350m")
    places = locate(held, stored, len(decoder))
    assert set(places) == {t.name for t in held}
    for target in held:
        weight, place = read_tensor(stored[places[target.name].name]), places[target.name]
        assert place.transposed == (kind == "gpt2")
        before = weight.clone()
        found = nf4_rounded(weight.T if place.transposed else weight, compute)
        assert found.dtype == compute and torch.equal(found.float(), _live_weight(target.module)), target.name
        assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(96, 100), (128, 96), (65, 67), (1, 64)])
def test_nf4_takes_blocks_over_the_ends_of_rows(shape: tuple[int, int]) -> None:
    """As on a GPU; against the definition in float64, less what the 8-bit scales lose."""
    from bitsandbytes.functional import get_4bit_type

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    levels = get_4bit_type("nf4", device="cpu").double()
    expected = torch.empty(weight.numel(), dtype=torch.float64)
    for at in range(0, weight.numel(), 64):
        block = weight.double().flatten()[at : at + 64]
        scale = block.abs().max()
        expected[at : at + 64] = levels[(block[:, None] / scale - levels).abs().argmin(1)] * scale
    found = nf4_rounded(weight, torch.float32).double().flatten()
    assert torch.linalg.norm(found - expected) < 0.01 * torch.linalg.norm(expected)


# Merging


@pytest.mark.parametrize("base", ["weights", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_tensor_is_the_exact_one_rounded_once_or_untouched(base: str, dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    source, out, rank, alpha = tmp_path / "source", tmp_path / "out", 3, 6
    source.mkdir(), out.mkdir(), (tmp_path / "adapter").mkdir()
    shards = [
        {"l.0.up": random(5000, 64).to(dtype), "l.0.q": random(64, 64).to(dtype), "ids": torch.arange(7)},
        # down is stored as (in, out), gate was not quantised, k was and is not trained
        {"l.0.down": random(128, 64).to(dtype), "l.0.gate": random(40, 64).to(dtype), "l.0.k": random(64, 128).to(dtype)},
        {"mask": torch.ones(5, dtype=torch.bool), "odd": random(6, 4).to(torch.float8_e4m3fn), "bias": random(9).to(dtype)},
    ]
    index = {}
    for number, shard in enumerate(shards, 1):
        save_file(shard, source / f"model-{number:05d}-of-00003.safetensors")
        index |= dict.fromkeys(shard, f"model-{number:05d}-of-00003.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    where = {"m.up": Stored("l.0.up", False), "m.down": Stored("l.0.down", True), "m.gate": Stored("l.0.gate", False)}
    quantised = {"m.up": where["m.up"], "m.down": where["m.down"], "m.q": Stored("l.0.q", False), "m.k": Stored("l.0.k", True)}
    shapes = {"m.up": (5000, 64), "m.down": (64, 128), "m.gate": (40, 64)}
    factors = {name: (random(rank, width), random(out_, rank)) for name, (out_, width) in shapes.items()}
    save_file(
        {f"base_model.model.{name}.lora_{x}.weight": f for name, both in factors.items() for x, f in zip("AB", both, strict=True)},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": alpha}))
    seen: list[int] = []
    merge_adapter(source, tmp_path / "adapter", out, where, seen.append, base=base, quantised=quantised, compute=torch.bfloat16)
    before, after = read_checkpoint(source), read_checkpoint(out)
    assert sum(seen) == sum(t.nbytes for t in before.values())
    assert {n: (t.file.name, t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.file.name, t.dtype, t.shape) for n, t in after.items()
    }
    for name, place in {**quantised, **where}.items():
        start, found = read_tensor(before[place.name]), read_tensor(after[place.name])
        start, found = (start.T, found.T) if place.transposed else (start, found)
        terms = torch.zeros(found.shape, dtype=torch.float64)
        if base == "nf4" and name in quantised:
            start = nf4_rounded(start, torch.bfloat16)
        exact = start.double()
        if name in where:
            a, b = factors[name]
            exact = exact + 2 * (b.double() @ a.double())
            terms = start.double().abs() + 2 * (b.double().abs() @ a.double().abs())
        # one rounding of the result, and float32's of the sum (which the terms, not the result, bound)
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 8 * torch.finfo(torch.float32).eps * terms
        assert ((found.double() - exact).abs() <= bound).all(), name
    untouched = set(before) - {p.name for p in where.values()} - ({p.name for p in quantised.values()} if base == "nf4" else set())
    assert untouched >= {"ids", "mask", "odd", "bias"} and ("l.0.q" in untouched) == (base == "weights")
    assert all(before[name].read() == after[name].read() for name in untouched)
    assert not any(before[name].read() == after[name].read() for name in set(before) - untouched)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt-350m", "llama-odd"])
def test_a_merge_into_nf4_is_the_model_that_was_trained(kind: str, made: Any, tmp_path: Path) -> None:
    """Against the live 4-bit model with its LoRA layers on, computing in float32: only float32's rounding is left."""
    from peft import PeftModel

    source, adapter, arguments = made(kind, torch.float32)
    keep = unquantised(meta_decoder(source).model, "cpu")
    live = PeftModel.from_pretrained(load_quantised(source, "cpu", torch.float32, keep), adapter)
    for module in live.modules():  # 4-bit layers stay in training mode: some CPUs repack them else
        module.training = type(getattr(module, "weight", None)).__name__ == "Params4bit"
    ids_BT = torch.randint(0, 150, (2, 12), generator=torch.Generator().manual_seed(1))
    errors = {}
    with torch.no_grad():
        trained = live(input_ids=ids_BT, use_cache=False).logits
        for base in ("weights", "nf4"):
            merge(source, adapter, tmp_path / base, base=base, compute=torch.float32, **arguments)
            found = forward_logits(view_decoder(load_model(tmp_path / base, device="cpu")), ids_BT)
            errors[base] = logits_error(trained, found)
    assert errors["nf4"] < 1e-5 and errors["weights"] > 0.01, errors


def test_a_merge_that_cannot_be_is_refused(made: Any, tmp_path: Path) -> None:
    source, adapter, arguments = made("llama")
    up, down = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "down"))
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"base": "int8"}, UsageError, "the base 'int8' of a merge is none of weights, nf4"),
        ({"base": "nf4", "quantised": None}, UsageError, "needs `quantised`"),
        ({"base": "nf4"}, UsageError, "needs `compute`"),
        ({"where": {}}, Refused, "does not fit this checkpoint"),
        ({"where": {**arguments["where"], up: arguments["where"][down]}}, Refused, "the weights of both .*up_proj and .*down"),
    ]
    for number, (changed, kind, told) in enumerate(cases):
        with pytest.raises(kind, match=told):
            merge(source, adapter, tmp_path / str(number), **{**arguments, **changed})
    shared = {"a": Stored("x", False), "b": Stored("x", False)}
    assert len(plan_merge({}, "nf4", shared)) == 1, "a layer that two places use, not trained, is rounded once"
    with pytest.raises(Refused, match="x holds the weights of both"):
        plan_merge({"b": shared["b"]}, "nf4", shared)


def test_nf4_weights_that_overflow_their_type_are_refused(tmp_path: Path) -> None:
    """bf16's rounding can carry what fp16 holds beyond fp16's range."""
    (tmp_path / "adapter").mkdir(), (tmp_path / "source").mkdir(), (tmp_path / "out").mkdir()
    save_file({"w": torch.full((64, 64), 65504, dtype=torch.float16)}, tmp_path / "source" / "model.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    arguments: dict[str, Any] = {"quantised": {"m": Stored("w", False)}, "compute": torch.bfloat16}
    with pytest.raises(Refused, match="the NF4 weights of m are not finite in torch.float16: merge into the base 'weights'"):
        merge_adapter(tmp_path / "source", tmp_path / "adapter", tmp_path / "out", {}, base="nf4", **arguments)


# Proof


@pytest.mark.parametrize("base", ["weights", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_healed_checkpoint_is_proven(
    kind: str, dtype: torch.dtype, base: str, made: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    source, adapter, arguments = made(kind, dtype)
    out = merge(source, adapter, tmp_path / "out", base=base, compute=torch.float32, **arguments)
    seen: list[tuple[float, float]] = []

    def error_of(expected: torch.Tensor, found: torch.Tensor) -> float:
        seen.append((logits_error(expected, found), logits_error(expected, expected.roll(1, 1))))
        return seen[-1][0]

    monkeypatch.setattr(proof, "logits_error", error_of)
    told = prove_healed(source, out, adapter, base=base, compute=torch.float32, **arguments)
    assert list(told) == ["structure", "bytes", "logits"] and all(how.startswith("proven: ") for how in told.values())
    healed, rounded = len(arguments["where"]), set(arguments["quantised"]) - set(arguments["where"])
    assert f"the {healed} healed tensors" in told["bytes"]
    assert (f"{len(rounded)} more are the source's in NF4" in told["bytes"]) == (base == "nf4")
    inexact = healed + (len(rounded) if base == "nf4" and dtype != torch.float32 else 0)
    tolerance = logits_tolerance({dtype}, inexact)
    assert f"{tolerance:.2g}" in told["logits"]
    # what the tolerance was chosen by, and that it is far from what another text gives
    assert seen[0][0] < tolerance / 4 and tolerance < seen[0][1] / 4


@pytest.fixture
def healed(made: Any, tmp_path: Path) -> tuple[Path, Path, Path, dict[str, Any]]:
    """(source, a result of its own, adapter, arguments of the proof) of a bf16 Llama in several shards."""
    source, adapter, arguments = made("llama")
    out = merge(source, adapter, tmp_path / "out", **arguments)
    assert len(list(out.glob("*.safetensors"))) > 1
    return source, out, adapter, arguments


def change(out: Path, name: str, new: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace a tensor of a checkpoint by `new` of it; None takes it away."""
    file = read_checkpoint(out)[name].file
    held = load_file(file)
    value = new(held.pop(name))
    save_file(held if value is None else {**held, name: value.contiguous()}, file)
    if value is None:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (out / "model.safetensors.index.json").write_text(json.dumps(index))


def poke(number: int, bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Flip the lowest bits of one bf16 element."""

    def poked(weight: torch.Tensor) -> torch.Tensor:
        weight.view(torch.int16).view(-1)[number] ^= bits
        return weight

    return poked


UP, Q, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("name", "new", "told"),
    [
        (NORM, poke(5, 1), f"{NORM} was not healed and is not the source's"),
        ("model.embed_tokens.weight", poke(-1, 1), "embed_tokens.weight was not healed and is not the source's"),
        (Q, lambda w: None, f"1 of 29 tensors missing, such as {Q}"),
        (Q, lambda w: w.float(), rf"{Q} is F32 \(64, 64\), and in the source BF16 \(64, 64\)"),
        (UP, lambda w: w.half(), rf"{UP} is F16 \(128, 64\), and in the source BF16"),
        (UP, lambda w: w * torch.tensor(float("inf")), f"{UP} is not finite"),
        (UP, poke(77, 2), f"{UP} is not {UP} of the source plus the adapter: off by .*, where rounding explains"),
        (UP, poke(-1, 0x4000), f"{UP} is not {UP} of the source plus the adapter"),
        (UP, lambda w: w.roll(1, 0), f"{UP} is not {UP} of the source plus the adapter"),
    ],
)
def test_a_corrupted_tensor_is_refused(healed: Any, name: str, new: Any, told: str) -> None:
    source, out, adapter, arguments = healed
    change(out, name, new)
    with pytest.raises(Refused, match=told):
        prove_healed(source, out, adapter, **arguments)


def test_a_tensor_that_the_model_does_not_need_must_be_there_too(made: Any, tmp_path: Path) -> None:
    source, adapter, arguments = made("gpt2")
    own = Path(shutil.copytree(source, tmp_path / "own"))
    stray = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}  # as the Hub's older checkpoints have
    save_file({**load_file(own / "model.safetensors"), **stray}, own / "model.safetensors", {"format": "pt"})
    out = merge(own, adapter, tmp_path / "out", **arguments)
    prove_healed(own, out, adapter, **arguments)
    save_file({k: v for k, v in load_file(out / "model.safetensors").items() if k not in stray}, out / "model.safetensors")
    with pytest.raises(Refused, match="transformer.h.0.attn.bias is in the source or in the result, not in both"):
        prove_healed(own, out, adapter, **arguments)
    save_file({**load_file(own / "model.safetensors"), "lost": torch.ones(2)}, out / "model.safetensors")
    with pytest.raises(Refused, match="1 of 42 tensors left over, such as lost"):
        prove_healed(own, out, adapter, **arguments)


def test_the_right_product_in_the_wrong_layer_is_refused_by_the_logits(made: Any, tmp_path: Path) -> None:
    """Bytes that fit `where` prove nothing if `where` is wrong: peft alone knows which module the adapter names."""
    source, adapter, arguments = made("llama")
    gate, up = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up"))
    swapped = {**arguments["where"], gate: arguments["where"][up], up: arguments["where"][gate]}
    for base in ("weights", "nf4"):
        wrong = {**arguments, "where": swapped, "base": base, "compute": torch.bfloat16}
        out = merge(source, adapter, tmp_path / base, **wrong)
        with pytest.raises(Refused, match="its logits differ from the source with the adapter on by .* of their spread"):
            prove_healed(source, out, adapter, **wrong)


def test_a_checkpoint_of_the_other_base_is_refused(made: Any, tmp_path: Path) -> None:
    source, adapter, arguments = made("llama")
    arguments = {**arguments, "compute": torch.bfloat16}
    for base, other, told in (("weights", "nf4", "of the source in NF4"), ("nf4", "weights", "was not healed and is not|plus the")):
        out = merge(source, adapter, tmp_path / base, base=base, **arguments)
        prove_healed(source, out, adapter, base=base, **arguments)
        with pytest.raises(Refused, match=told):
            prove_healed(source, out, adapter, base=other, **arguments)
    with pytest.raises(UsageError, match="needs `compute`"):
        prove_healed(source, out, adapter, base="nf4", **{**arguments, "compute": None})


def test_an_nf4_layer_that_was_left_as_it_was_is_refused(made: Any, tmp_path: Path) -> None:
    source, adapter, arguments = made("llama")
    out = merge(source, adapter, tmp_path / "out", base="nf4", compute=torch.bfloat16, **arguments)
    change(out, Q, lambda w: read_tensor(read_checkpoint(source)[Q]))
    with pytest.raises(Refused, match=f"{Q} is not {Q} of the source in NF4: off by"):
        prove_healed(source, out, adapter, base="nf4", compute=torch.bfloat16, **arguments)


def test_an_adapter_of_other_modules_proves_nothing(healed: Any) -> None:
    source, out, adapter, arguments = healed
    fewer = dict(list(arguments["where"].items())[1:])
    with pytest.raises(Refused, match="does not fit this checkpoint: model.layers.0.mlp"):
        prove_healed(source, out, adapter, fewer)


def test_a_model_that_is_too_big_for_the_logits_is_said_and_not_refused(healed: Any, monkeypatch: Any) -> None:
    source, out, adapter, arguments = healed
    for fits in ("bfloat16", None):
        monkeypatch.setattr(proof, "logits_check_dtype", lambda stored, fits=fits: fits)
        told = prove_healed(source, out, adapter, **arguments)
        assert told["logits"] == "skipped (in float32 the model does not fit in the free memory)"
        assert told["bytes"].startswith("proven")


def test_a_step_with_the_cache_that_fails_is_refused(healed: Any, monkeypatch: Any) -> None:
    source, out, adapter, arguments = healed

    def breaks(decoder: Any, ids_BT: torch.Tensor) -> None:
        raise IndexError("no such slot")

    monkeypatch.setattr(proof, "step_with_cache", breaks)
    with pytest.raises(Refused, match=r"cannot generate with a cache from the healed checkpoint \(IndexError: no such slot\)"):
        prove_healed(source, out, adapter, **arguments)


def test_a_source_whose_logits_are_no_numbers_is_refused(made: Any, tmp_path: Path) -> None:
    source, adapter, arguments = made("gpt2", torch.float32)
    own = Path(shutil.copytree(source, tmp_path / "own"))
    tensors = load_file(own / "model.safetensors")
    tensors["transformer.ln_f.weight"] *= float("nan")
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    out = merge(own, adapter, tmp_path / "out", **arguments)
    with pytest.raises(Refused, match="the logits of .* with the adapter on are not a number"):
        prove_healed(own, out, adapter, **arguments)


def test_targets_outside_the_stack_are_not_looked_for_inside_it(made: Any) -> None:
    source = made("llama")[0]
    module = load_model(source, device="cpu").get_submodule("model.layers.0.mlp.up_proj")
    with pytest.raises(Refused, match="no tensor holds the weight of elsewhere"):
        locate([Target("elsewhere", -1, "elsewhere", module)], read_checkpoint(source), 3)
