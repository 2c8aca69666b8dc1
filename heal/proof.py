"""Proof that a healed checkpoint is its source with the adapter merged in: keys, tensors, logits."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from layerprune.heal.merge import DTYPES, Change, Stored, adapter_factors, base_weight, nf4_rounded, plan_merge
from layerprune.model.decoder import forward_logits, view_decoder
from layerprune.model.errors import Refused, model_errors, one_line
from layerprune.model.feed import read_tensor
from layerprune.model.load import load_model
from layerprune.model.progress import progress_bar
from layerprune.model.tensors import StoredTensor, read_checkpoint
from layerprune.model.verify import logits_check_dtype, meta_decoder, same_bytes, step_with_cache

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
_FLOAT32 = torch.finfo(torch.float32)
_ROWS = 512
"""Rows of a weight that are compared at a time: float64 copies of them stay below the weight."""
_STORED_ROUNDING = 2.5
_FLOAT32_ROUNDING = 2.0**-17
"""Terms of `logits_tolerance`, which says where they come from."""


def prove_healed(
    source: Path,
    result: Path,
    adapter: Path,
    where: Mapping[str, Stored],
    base: str = "weights",
    quantised: Mapping[str, Stored] | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
    *,
    compute: torch.dtype | None = None,
    ram: int | None = None,
) -> dict[str, str]:
    """Prove the checkpoint that `merge_adapter` wrote with the same arguments; returns what was proven and how, for people.

    structure: transformers' loader finds every key, and none is left over. bytes: every tensor that healing does not
    change is the source's byte for byte; every other one has its dtype and shape, is finite, and is the base plus the
    adapter's product, worked out again in float64, within one rounding. logits: on the CPU in float32 they are those of
    the source with the adapter put on by peft (for the base "nf4" the source's layers go through NF4 first), within
    `logits_tolerance`, and one step works with the KV cache; skipped, and so said, where the model does not fit in the
    free memory, or in `ram`. Memory: one weight, a few times over; for the logits one model in float32.
    Raises UsageError as `merge_adapter` does, Refused where one of them does not hold.
    """
    changes = plan_merge(where, base, quantised)
    meta_decoder(result, trust_remote_code)
    stored = read_checkpoint(source)
    with progress_bar(sum(t.nbytes for t in stored.values()), "compare", "B", progress) as bar:
        _prove_tensors(stored, result, adapter, changes, compute, bar.update)
    healed = sum(change.adapted for change in changes.values())
    told = f"proven: the {healed} healed tensors are the source's plus the adapter to one rounding, and every other is the source's"
    if base == "nf4":
        told = (
            f"proven: the {healed} healed tensors are the source's in NF4 plus the adapter to one rounding, "
            f"{len(changes) - healed} more are the source's in NF4, and every other is the source's"
        )
    verified = {"structure": "proven: transformers finds every key, and none is left over", "bytes": told}
    if logits_check_dtype(stored, ram) != "float32":
        return {**verified, "logits": "skipped (in float32 the model does not fit in the free memory)"}
    rounded = [change.module for change in changes.values() if change.rounded]
    # what NF4 decoded to the stored type is written as it is
    inexact = [DTYPES[stored[name].dtype] for name, c in changes.items() if c.adapted or DTYPES[stored[name].dtype] != compute]
    tolerance = logits_tolerance(set(inexact), len(inexact))
    error = _prove_logits(source, result, adapter, rounded, compute, tolerance, trust_remote_code, progress)
    how = "the source, in NF4 where it was trained so, with" if base == "nf4" else "the source with"
    return {
        **verified,
        "logits": f"proven: those of {how} the adapter on, and a step with the KV cache works (float32 on the CPU; off by "
        f"{error:.2g} of the logits' spread, where rounding explains {tolerance:.2g})",
    }


def _prove_tensors(
    stored: Mapping[str, StoredTensor], result: Path, adapter: Path, changes: Mapping[str, Change],
    compute: torch.dtype | None, progress: Callable[[int], None],
) -> None:  # fmt: skip
    written = read_checkpoint(result)
    factors, scale = adapter_factors(adapter, {change.module for change in changes.values() if change.adapted})
    if set(written) != set(stored):
        odd = min(set(written) ^ set(stored))
        raise Refused(f"the healed checkpoint is wrong: {odd} is in the source or in the result, not in both")
    for name, before in stored.items():
        after = written[name]
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            raise Refused(
                f"the healed checkpoint is wrong: {name} is {after.dtype} {after.shape}, and in the source "
                f"{before.dtype} {before.shape}"
            )
        if name in changes:
            _prove_merged(before, after, changes[name], factors, scale, compute)
        elif not same_bytes(before, after):
            raise Refused(f"the healed checkpoint is wrong: {name} was not healed and is not the source's")
        progress(after.nbytes)


def _prove_merged(
    before: StoredTensor, after: StoredTensor, change: Change, factors: Factors, scale: float, compute: torch.dtype | None
) -> None:
    """`after` is the base plus scale * B A within one rounding to its dtype, and float32's of the sum's terms."""
    found = read_tensor(after)
    if not torch.isfinite(found).all():
        raise Refused(f"the healed checkpoint is wrong: {after.name} is not finite")
    weight, limits = base_weight(before, change, compute), torch.finfo(found.dtype)
    if change.adapted:
        a, b = (factor.double() for factor in factors[change.module])
    else:
        out, width = found.shape[::-1] if change.transposed else found.shape
        a, b = torch.zeros(1, width, dtype=torch.float64), torch.zeros(out, 1, dtype=torch.float64)
    left, right = (a.T, b.T) if change.transposed else (b, a)  # as in merged_weight
    for at in range(0, found.shape[0], _ROWS):
        rows = slice(at, at + _ROWS)
        start, exact = weight[rows].double(), scale * (left[rows] @ right)
        # Cauchy-Schwarz bounds what the product's terms sum to without their signs
        terms = abs(scale) * left[rows].norm(dim=1, keepdim=True) * right.norm(dim=0, keepdim=True) + start.abs()
        exact += start
        bound = limits.eps / 2 * exact.abs() + limits.smallest_normal * limits.eps / 2  # below it numbers lie evenly
        bound = 1.001 * bound + (right.shape[0] + 2) * _FLOAT32.eps * terms
        error = (found[rows].double() - exact).abs()
        if not (error <= bound).all():
            worst = (error - bound).argmax()
            off, most = error.flatten()[worst].item(), bound.flatten()[worst].item()
            what = " in NF4" * change.rounded + " plus the adapter" * change.adapted
            raise Refused(
                f"the healed checkpoint is wrong: {after.name} is not {before.name} of the source{what}: off by {off:.3g}, "
                f"where rounding explains {most:.3g}"
            )


def logits_tolerance(dtypes: set[torch.dtype], inexact: int) -> float:
    """How far rounding may move the logits, as `logits_error` measures it, when `inexact` weights of `dtypes` are rounded.

    Rounding changes a number by at most u (half the type's eps) of it, by 0.41 u in the mean square, and what it does to
    one weight has nothing to do with another's: the noise of N weights adds up as sqrt(N). Measured over 8 families of
    3 and 12 layers, both bases, weak and strong weights, in bf16 and fp16: 0.006 to 0.47 u sqrt(N). 2.5 allows five times
    that. To it comes float32's own rounding, as the merged and the unmerged model add in another order: 0.3 to
    5 sqrt(N) 2^-24 there, and more with wider layers, so 128 is allowed.
    """
    return math.sqrt(inexact) * (_STORED_ROUNDING * max(torch.finfo(dtype).eps for dtype in dtypes) / 2 + _FLOAT32_ROUNDING)


def _prove_logits(
    source: Path, result: Path, adapter: Path, rounded: list[str], compute: torch.dtype | None, tolerance: float,
    trust_remote_code: bool, progress: bool,
) -> float:  # fmt: skip
    """The error of the result's logits (see `logits_tolerance`). One model is in memory at a time."""
    ids_BT = torch.randint(0, 1 << 30, (2, 12), generator=torch.Generator().manual_seed(0))
    expected_BTV = _adapted_logits(source, adapter, rounded, compute, ids_BT, trust_remote_code, progress)
    gc.collect()  # a model that accelerate prepared refers to itself
    if not torch.isfinite(expected_BTV).all():
        raise Refused(
            f"the logits of {source} with the adapter on are not a number (float32 on the CPU), so the healing cannot be "
            "proven: its weights are broken, or overflow"
        )
    live = load_model(result, device="cpu", dtype="float32", trust_remote_code=trust_remote_code, progress=progress)
    decoder = view_decoder(live)
    ids_BT %= live.get_input_embeddings().weight.shape[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = logits_error(expected_BTV, forward_logits(decoder, ids_BT))
        if not error <= tolerance:
            raise Refused(
                f"the healed checkpoint is wrong: its logits differ from the source with the adapter on by {error:.3g} of their "
                f"spread, where rounding explains {tolerance:.3g}"
            )
        try:
            step_with_cache(decoder, ids_BT)
        except model_errors() as failed:
            raise Refused(
                f"transformers cannot generate with a cache from the healed checkpoint ({type(failed).__name__}: "
                f"{one_line(failed)}): compare with its source"
            ) from failed
    return error


def _adapted_logits(
    source: Path, adapter: Path, rounded: list[str], compute: torch.dtype | None, ids_BT: torch.Tensor, trust: bool, progress: bool
) -> torch.Tensor:
    """Logits of the source with peft's LoRA layers on, after its layers in `rounded` went through NF4."""
    from peft import PeftModel

    live: Any = load_model(source, device="cpu", dtype="float32", trust_remote_code=trust, progress=progress)
    live.__dict__.pop("hf_device_map", None)  # with it peft lets accelerate spread the model anew, over GPUs too
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in rounded:
            assert compute is not None
            module = live.get_submodule(name)
            weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T  # else GPT-2's Conv1D
            weight.copy_(nf4_rounded(weight, compute))
        PeftModel.from_pretrained(live, adapter, torch_device="cpu").eval()  # it puts its layers into `live`
        return forward_logits(view_decoder(live), ids_BT % live.get_input_embeddings().weight.shape[0])


def logits_error(expected_BTV: torch.Tensor, found_BTV: torch.Tensor) -> float:
    """A token's root mean squared error over the vocabulary, divided by its logits' standard deviation; the median token's.

    0 means equal, 1.4 unrelated. The median, because rounding can send single tokens to another expert.
    """
    error_BT = (found_BTV - expected_BTV).square().mean(-1).sqrt() / expected_BTV.std(-1)
    return float(error_BT.median())
