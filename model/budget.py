"""Whether a model is loaded whole or streamed, and within which memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerprune.model.config import layer_count, load_config, text_config, vocab_size
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import pick_device, pick_dtype
from layerprune.model.memory import available_memory, byte_count
from layerprune.model.nf4 import NF4_BYTES
from layerprune.model.passplan import PROCESS_BYTES
from layerprune.model.plan import by_layer, in_other_part, split_name
from layerprune.model.tensors import DTYPE_BITS, StoredTensor, read_checkpoint

WORKING_BYTES = 2 << 30
"""What evaluating takes beside the weights of a model that is loaded whole: activations, logits, the process itself."""
GIB = 1 << 30


@dataclass(frozen=True)
class Budget:
    """Bytes that may be used of the GPU's memory (None without a GPU) and of the host's.

    why: what was counted when it was decided that the model is streamed, for people.
    """

    memory: int | None
    ram: int
    why: str = field(default="", compare=False)


def streaming_budget(
    folder: Path,
    *,
    device: str | None,
    dtype: str,
    memory: str | int | None = None,
    ram: str | int | None = None,
    trust_remote_code: bool = False,
) -> Budget | None:
    """None where the whole model fits in the memory given (or, where none is given, in what is free): it is loaded then.

    memory: the GPU's, such as `6GiB`; ram: the host's. Of several GPUs all count while the device is left open. Raises
    UsageError for what is no amount of memory, and for --memory without a GPU; Refused where the headers of the weight files
    show already that the model cannot be streamed within it (the plan of the passes, which knows more, may refuse later).
    """
    import torch

    gpu, host = byte_count(memory, "--memory"), byte_count(ram, "--ram")
    chosen = pick_device(device)
    free_host = available_memory()
    tensors = read_checkpoint(folder)
    kept = pick_dtype(dtype, chosen)
    sizes = _sizes(dtype, kept)
    weights = int(sum(sizes(name, tensor) for name, tensor in tensors.items()))
    held = "as they are stored" if kept == "auto" else f"in {dtype if dtype == 'nf4' else str(kept).removeprefix('torch.')}"
    counted = f"{weights / GIB:.2f} GiB of weights {held}"
    if not chosen.startswith("cuda"):
        if gpu is not None:
            raise UsageError(f"--memory is the GPU's, and the model runs on {chosen}: use --ram for the host's memory")
        limit = free_host if host is None else host
        if weights + WORKING_BYTES <= limit or _small(weights, host):
            return None
        beside = "working memory and the process"
        given = f"the {limit / GIB:.2f} GiB that are free" if host is None else f"--ram {limit / GIB:.2f}GiB"
        budget = Budget(None, limit, _why(counted, beside, given))
    else:
        spread = device in (None, "auto") and torch.cuda.device_count() > 1
        cards = range(torch.cuda.device_count()) if spread else [torch.device(chosen).index or 0]
        free = sum(torch.cuda.mem_get_info(card)[0] for card in cards)
        if weights + WORKING_BYTES <= (free if gpu is None else min(gpu, free)):
            return None
        given = f"the {free / GIB:.2f} GiB that are free" if gpu is None or free < gpu else f"--memory {gpu / GIB:.2f}GiB"
        here = torch.cuda.mem_get_info(cards[0])[0]
        budget = Budget(
            int(0.95 * here) if gpu is None else gpu, free_host if host is None else host, _why(counted, "working memory", given)
        )
    refuse_too_little(load_config(folder, trust_remote_code), tensors, dtype, kept, budget)
    return budget


def _why(counted: str, beside: str, given: str) -> str:
    reserve = f"{WORKING_BYTES / GIB:.2f} GiB kept free for {beside}"
    return f"not loaded whole, the layers come from the files: {counted} and {reserve} are more than {given}"


def refuse_too_little(config: Any, tensors: Mapping[str, StoredTensor], dtype: str, kept: Any, budget: Budget) -> None:
    """Refuse memory that any plan of passes over this checkpoint would refuse, by the headers of its files alone."""
    if getattr(config, "quantization_config", None) is not None:
        return  # refused in other words
    try:
        outside, layer, arriving = certain_bytes(config, tensors, dtype, kept)
    except Refused:  # no stack is found: refused in other words
        return
    within = f"embedding and head ({outside / GIB:.2f} GiB), two layers and the one that arrives"
    weights = outside + 2 * layer + arriving
    if budget.memory is None:
        needs = [("--ram", budget.ram, weights + PROCESS_BYTES, f"{within}, and the process")]
    else:
        needs = [
            ("--memory", budget.memory, weights, within),
            ("--ram", budget.ram, 2 * arriving + PROCESS_BYTES, "two layers as they are stored, and the process"),
        ]
    for option, given, need, what in needs:
        if given < need:
            raise Refused(
                f"{option} {given / GIB:.2f}GiB is too little for this model layer by layer: {what} take "
                f"{math.ceil(need / GIB * 100) / 100:.2f}GiB, and what is computed comes on top: give more than that"
            )


def certain_bytes(config: Any, tensors: Mapping[str, StoredTensor], dtype: str, kept: Any) -> tuple[int, int, int]:
    """What streaming has in memory for certain: (outside the stack, the largest layer, the largest as stored), in bytes.

    Of layers only matrices are counted; outside them only embedding and head (one of them where the config may tie them), for
    loaders leave parts of some checkpoints out. Never more than `layerprune.model.layermajor.sizes_of` says of the model
    itself. Raises Refused where no stack of layers is found.
    """
    sizes = _sizes(dtype, kept)
    # what says no dtype is loaded in that of its first weight, whichever that is
    floats = [DTYPE_BITS[t.dtype] // 8 for t in tensors.values() if t.dtype in ("F16", "BF16", "F32", "F64")]
    stated = getattr(getattr(config, "dtype", None), "itemsize", None) or min(floats, default=None)

    def size(name: str, tensor: StoredTensor) -> float:
        stored = sizes(name, tensor)
        # a loader that is left the choice takes the config's dtype
        return stored if stated is None or kept != "auto" else min(stored, tensor.numel * stated)

    groups, rest = by_layer(tensors, layer_count(config))
    vocabulary = sorted(
        (
            size(name, tensor)
            for name, tensor in rest.items()
            if len(tensor.shape) == 2 and tensor.shape[0] == vocab_size(config) and not in_other_part(name) and "mtp" not in name
        ),
        reverse=True,
    )
    tied = any(getattr(part, "tie_word_embeddings", True) is not False for part in (config, text_config(config)))
    return (
        int(sum(vocabulary[: 1 if tied else 2])),
        int(max(sum(size(name, t) for name, t in group.items() if _is_matrix(name, t)) for group in groups)),
        max(sum(tensor.nbytes for tensor in group.values()) for group in groups),
    )


def _is_matrix(name: str, tensor: StoredTensor) -> bool:
    """Whether a layer's tensor is a weight that counts: vectors weigh nothing, and constants are computed by the models."""
    return len(tensor.shape) > 1 and (name.endswith("weight") or "expert" in name)


def _sizes(dtype: str, kept: Any) -> Callable[[str, StoredTensor], float]:
    """Bytes that a stored tensor takes in memory."""

    def size(name: str, tensor: StoredTensor) -> float:
        if dtype == "nf4":
            return tensor.numel * (NF4_BYTES if _quantised(name, tensor) else kept.itemsize)
        if kept == "auto":
            return tensor.nbytes
        return tensor.numel * kept.itemsize if DTYPE_BITS.get(tensor.dtype, 0) >= 16 else tensor.nbytes

    return size


def _quantised(name: str, stored: StoredTensor) -> bool:
    """Roughly: the matrices of layers."""
    return split_name(name) is not None and len(stored.shape) == 2


def _small(weights: int, given: int | None) -> bool:
    """Without a limit from the user, a model of which hardly anything is gained by streaming is loaded."""
    return given is None and weights < WORKING_BYTES
