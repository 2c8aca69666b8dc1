"""Merge a LoRA adapter into a checkpoint's files: only the trained weights are decoded, one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerprune.heal.targets import Target
from layerprune.model.errors import Refused
from layerprune.model.plan import find_stack, split_name
from layerprune.model.tensors import StoredTensor, read_checkpoint
from layerprune.model.write import write_checkpoint

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_ROWS = 4096
"""Rows of a weight that are merged at a time: float32 copies stay small beside the weight."""


@dataclass(frozen=True)
class Stored:
    """Where a target's weight lies in the checkpoint: `name`, and whether it is stored as (in, out)."""

    name: str
    transposed: bool


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
    an unrelated matrix gives 1.4). Raises Refused for a target with no such tensor, or with two.
    """
    prefix = find_stack(stored, layers)
    by_layer: dict[int, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        parts = split_name(name)
        if parts is not None and parts[0] == prefix:
            by_layer.setdefault(parts[1], {})[parts[2]] = tensor
    found: dict[str, Stored] = {}
    for target in targets:
        live = _live_weight(target.module)
        held = by_layer[target.layer]
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


def read_tensor(tensor: StoredTensor) -> torch.Tensor:
    """A stored floating tensor, decoded."""
    return torch.frombuffer(bytearray(tensor.read()), dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)


def adapter_factors(adapter: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """(module name -> (A (rank, in), B (out, rank))) of an adapter folder in peft's format, and its LoRA scale."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load_file(adapter / "adapter_model.safetensors")
    factors = {}
    for key, a in weights.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            factors[module] = (a, weights[key.replace(".lora_A.", ".lora_B.")])
    return factors, config["lora_alpha"] / config["r"]


def merged_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, transposed: bool) -> torch.Tensor:
    """weight + scale * B A, computed in float32 and rounded once to the weight's dtype.

    weight: (out, in), or (in, out) where `transposed`. a: (rank, in). b: (out, rank).
    Raises Refused for a result that is not finite.
    """
    left, right = (a.T, b.T) if transposed else (b, a)  # weight's rows are left's rows
    merged = torch.empty_like(weight)
    for at in range(0, weight.shape[0], _ROWS):
        rows = slice(at, at + _ROWS)
        merged[rows] = (weight[rows].float() + scale * (left[rows].float() @ right.float())).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise Refused(f"the merged weights are not finite in {weight.dtype}: heal with a smaller --learning-rate")
    return merged


def merge_adapter(
    source: Path,
    adapter: Path,
    folder: Path,
    where: Mapping[str, Stored],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write the weights of `source` with the adapter merged in to `folder`; all other tensors are copied bytes.

    where: the stored tensor of every module of the adapter, from `locate`. The model is never loaded. Memory: one
    weight, a few times over.
    """
    factors, scale = adapter_factors(adapter)
    if set(factors) != set(where):
        odd = min(set(factors) ^ set(where))
        raise Refused(f"the adapter in {adapter} does not fit this checkpoint: {odd} is in only one of them")

    def replacement(module: str, transposed: bool) -> Callable[[StoredTensor], bytes]:
        def merge(tensor: StoredTensor) -> bytes:
            a, b = factors[module]
            merged = merged_weight(read_tensor(tensor), a, b, scale, transposed)
            return merged.contiguous().view(torch.uint8).numpy().tobytes()

        return merge

    replace = {place.name: replacement(module, place.transposed) for module, place in where.items()}
    write_checkpoint(read_checkpoint(source), folder, replace, progress)
