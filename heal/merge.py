"""Merge a LoRA adapter into a checkpoint's files: only the weights that change are decoded, one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerprune.heal.settings import MERGES
from layerprune.heal.targets import Target
from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.feed import DTYPES as STORED_DTYPES
from layerprune.model.feed import read_tensor
from layerprune.model.nf4 import NF4_BLOCK
from layerprune.model.plan import find_stack, split_name
from layerprune.model.tensors import StoredTensor, read_checkpoint
from layerprune.model.write import write_checkpoint

DTYPES = {name: dtype for name, dtype in STORED_DTYPES.items() if dtype.is_floating_point}
BASES = MERGES
"""What an adapter is merged into: the checkpoint's own weights, or what NF4 made of them, which it was trained on."""
_ROWS = 4096
"""Rows of a weight that are merged at a time: float32 copies stay small beside the weight."""


@dataclass(frozen=True)
class Stored:
    """Where a target's weight lies in the checkpoint: `name`, and whether it is stored as (in, out)."""

    name: str
    transposed: bool


@dataclass(frozen=True)
class Change:
    """What a merge does to one stored tensor: decode it as NF4 holds it (`rounded`), add the adapter's product (`adapted`).

    module: the linear layer whose weight it is. transposed: the tensor is stored as (in, out).
    """

    module: str
    transposed: bool
    rounded: bool
    adapted: bool


def plan_merge(
    where: Mapping[str, Stored], base: str = "weights", quantised: Mapping[str, Stored] | None = None
) -> dict[str, Change]:
    """The tensors that a merge changes (stored name -> how); arguments as in `merge_adapter`.

    Raises UsageError for an unknown base and for "nf4" without `quantised`, Refused where two layers, one of them
    trained, are stored in one tensor.
    """
    if base not in BASES:
        raise UsageError(f"the base {base!r} of a merge is none of {', '.join(BASES)}")
    if base == "nf4" and quantised is None:
        raise UsageError("merging into the base 'nf4' needs `quantised`, the layers that training held in NF4: give them")
    rounded = {} if base == "weights" else dict(quantised or {})
    changes: dict[str, Change] = {}
    for module, place in {**rounded, **where}.items():
        change = Change(module, place.transposed, module in rounded, module in where)
        other = changes.setdefault(place.name, change)
        if other is not change and (other.adapted or change.adapted or other.transposed != change.transposed):
            raise Refused(
                f"{place.name} holds the weights of both {other.module} and {module} in this checkpoint: healing could not "
                "be merged into it; resave it with save_pretrained, or train other layers (targets)"
            )
    return changes


def quantised_linears(decoder: Decoder) -> list[Target]:
    """The linear layers that a live model holds in four bits, for `locate`; `layer` is -1 for one outside the stack."""
    found = []
    for name, module in decoder.model.named_modules():
        if type(getattr(module, "weight", None)).__name__ != "Params4bit":
            continue
        number, _, inside = name.removeprefix(decoder.path + ".").partition(".")
        in_stack = name.startswith(decoder.path + ".") and number.isdigit()
        found.append(Target(name, int(number), inside, module) if in_stack else Target(name, -1, name, module))
    return found


def locate(
    targets: Iterable[Target],
    stored: Mapping[str, StoredTensor],
    layers: int,
    progress: Callable[[int], None] = lambda number: None,
) -> dict[str, Stored]:
    """Map each target's module name to its stored tensor, and prove it by the values.

    A checkpoint may use other names than the model (prefixes, renamed modules) and store weights transposed. The
    tensor of the same name in the same layer is tried first, then every tensor of that layer with the right shape;
    one is believed when the live weight is it, up to four-bit rounding (relative Frobenius error below 0.3, where
    an unrelated matrix gives 1.4). For a target outside the stack (layer -1) it is the tensors outside the stack.
    Raises Refused for a target with no such tensor, or with two.
    """
    prefix = find_stack(stored, layers)
    by_layer: dict[int, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        parts = split_name(name)
        inside = parts is not None and parts[0] == prefix
        layer, rest = (parts[1], parts[2]) if parts is not None and inside else (-1, name)
        by_layer.setdefault(layer, {})[rest] = tensor
    found: dict[str, Stored] = {}
    for target in targets:
        live = _live_weight(target.module)
        held = by_layer.get(target.layer, {})
        named = {k: v for k, v in held.items() if k == f"{target.inside}.weight"}
        matches = _matching(live, named) or _matching(live, held)
        if len(matches) != 1:
            what = "no tensor holds" if not matches else f"{len(matches)} tensors hold"
            raise Refused(
                f"{what} the weight of {target.name} in this checkpoint (it is made from several tensors when loaded, or "
                "stored twice): healing could not be merged into it; resave it with save_pretrained"
            )
        found[target.name] = matches[0]
        progress(1)
    return found


def _live_weight(module: Any) -> torch.Tensor:
    """A linear layer's weight as float32 (out, in), decoded where it is packed to four bits."""
    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return (weight if isinstance(module, torch.nn.Linear) else weight.T).detach().float()


def _matching(live: torch.Tensor, held: Mapping[str, StoredTensor]) -> list[Stored]:
    found = []
    for tensor in held.values():
        for transposed in (False, True):
            shape = tuple(live.shape[::-1] if transposed else live.shape)
            if tensor.shape == shape and tensor.dtype in DTYPES:
                weight = read_tensor(tensor).to(live.device).float()
                weight = weight.T if transposed else weight
                if torch.linalg.norm(weight - live) <= 0.3 * torch.linalg.norm(live):
                    found.append(Stored(tensor.name, transposed))
                    break
    return found


def adapter_factors(adapter: Path, modules: Collection[str]) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """(module name -> (A (rank, in), B (out, rank))) of an adapter folder in peft's format, and its LoRA scale.

    Raises Refused for an adapter of other modules than `modules`.
    """
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load_file(adapter / "adapter_model.safetensors")
    factors = {}
    for key, a in weights.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            factors[module] = (a, weights[key.replace(".lora_A.", ".lora_B.")])
    if set(factors) != set(modules):
        odd = min(set(factors) ^ set(modules))
        raise Refused(f"the adapter in {adapter} does not fit this checkpoint: {odd} is in only one of them")
    return factors, config["lora_alpha"] / config["r"]


def nf4_rounded(weight: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """What a linear layer trained in NF4 computes with in place of `weight`; `weight` itself is left alone.

    weight: (out, in), as the model has it, not as it may be stored. compute: the type that training loaded it in and
    decodes it to (bfloat16, float16 or float32); the result has it. NF4 with double quantisation in blocks of 64
    (QLoRA, arXiv 2305.14314) by bitsandbytes on the CPU, to the bit what `load_quantised` holds there.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # As one row: a block may reach over the end of a row, as it does on a GPU, and bitsandbytes 0.50 decodes rows that
    # are no whole blocks wrongly on the CPU. Zeros at the end change no scale.
    flat = weight.to(compute).reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % NF4_BLOCK))
    packed, state = quantize_4bit(flat, compress_statistics=True, quant_type="nf4", blocksize=NF4_BLOCK)
    return dequantize_4bit(packed, state).reshape(-1)[: weight.numel()].reshape(weight.shape)


def base_weight(tensor: StoredTensor, change: Change, compute: torch.dtype | None) -> torch.Tensor:
    """The weight that the adapter is added to, in the stored orientation: the stored one, or what NF4 makes of it."""
    weight = read_tensor(tensor)
    if not change.rounded:
        return weight
    if compute is None:
        raise UsageError("merging into the base 'nf4' needs `compute`, the type that training computed in: give it")
    return nf4_rounded(weight.T, compute).T if change.transposed else nf4_rounded(weight, compute)


def merged_weight(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, transposed: bool, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """weight + scale * B A, computed in float32 and rounded once to `dtype` (the weight's own where None).

    weight: (out, in), or (in, out) where `transposed`. a: (rank, in). b: (out, rank).
    Raises Refused for a result that is not finite.
    """
    left, right = (a.T, b.T) if transposed else (b, a)  # weight's rows are left's rows
    merged = torch.empty(weight.shape, dtype=dtype or weight.dtype)
    for at in range(0, weight.shape[0], _ROWS):
        rows = slice(at, at + _ROWS)
        merged[rows] = (weight[rows].float() + scale * (left[rows].float() @ right.float())).to(merged.dtype)
    if not torch.isfinite(merged).all():
        raise Refused(f"the merged weights are not finite in {merged.dtype}: heal with a smaller --learning-rate")
    return merged


def merge_adapter(
    source: Path,
    adapter: Path,
    folder: Path,
    where: Mapping[str, Stored],
    progress: Callable[[int], None] = lambda nbytes: None,
    *,
    base: str = "weights",
    quantised: Mapping[str, Stored] | None = None,
    compute: torch.dtype | None = None,
) -> None:
    """Write `source` with the adapter merged in to `folder`, in the source's shards; all other tensors are copied bytes.

    where: the stored tensor of every module of the adapter, from `locate`. The model is never loaded. Memory: one
    weight, a few times over.
    base: "weights" adds the adapter to the checkpoint's own weights. "nf4" adds it to what NF4 made of them, and writes
    every other layer that training held in NF4 so, too: the result is the model that was trained, up to one rounding to
    the stored type. It needs `quantised`, module -> stored tensor of those layers (`locate` of `quantised_linears`; a
    layer of `where` that is not among them was not quantised), and `compute`, as in `nf4_rounded`.
    Raises UsageError for arguments that are missing, Refused for an adapter of another model and for weights that are
    not finite.
    """
    factors, scale = adapter_factors(adapter, where)

    def replacement(change: Change) -> Callable[[StoredTensor], bytes]:
        def merge(tensor: StoredTensor) -> bytes:
            weight, dtype = base_weight(tensor, change, compute), DTYPES[tensor.dtype]
            if change.adapted:
                merged = merged_weight(weight, *factors[change.module], scale, change.transposed, dtype)
            else:
                merged = weight.to(dtype)
                if not torch.isfinite(merged).all():
                    raise Refused(f"the NF4 weights of {change.module} are not finite in {dtype}: merge into the base 'weights'")
            return merged.contiguous().view(torch.uint8).numpy().tobytes()

        return merge

    replace = {name: replacement(change) for name, change in plan_merge(where, base, quantised).items()}
    write_checkpoint(read_checkpoint(source), folder, replace, progress)
