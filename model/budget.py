"""Whether a model is loaded whole or streamed, and within which memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerprune.model.errors import UsageError
from layerprune.model.load import pick_device, pick_dtype
from layerprune.model.memory import available_memory, byte_count
from layerprune.model.nf4 import NF4_BYTES
from layerprune.model.plan import split_name
from layerprune.model.tensors import DTYPE_BITS, StoredTensor, read_checkpoint

WORKING_BYTES = 2 << 30
"""What evaluating takes beside the weights of a model that is loaded whole: activations, logits, the process itself."""


@dataclass(frozen=True)
class Budget:
    """Bytes that may be used of the GPU's memory (None without a GPU) and of the host's."""

    memory: int | None
    ram: int


def streaming_budget(
    folder: Path, *, device: str | None, dtype: str, memory: str | int | None = None, ram: str | int | None = None
) -> Budget | None:
    """None where the whole model fits in the memory given (or, where none is given, in what is free): it is loaded then.

    memory: the GPU's, such as `6GiB`; ram: the host's. Of several GPUs all count while the device is left open. Raises
    UsageError for what is no amount of memory, and for --memory without a GPU.
    """
    import torch

    gpu, host = byte_count(memory, "--memory"), byte_count(ram, "--ram")
    chosen = pick_device(device)
    free_host = available_memory()
    tensors = read_checkpoint(folder)
    stored = tensors.values()
    kept = pick_dtype(dtype, chosen)
    if dtype == "nf4":
        weights = int(sum(t.numel * (NF4_BYTES if _quantised(name, t) else kept.itemsize) for name, t in tensors.items()))
    elif kept == "auto":
        weights = sum(t.nbytes for t in stored)
    else:
        weights = sum(t.numel * kept.itemsize if DTYPE_BITS.get(t.dtype, 0) >= 16 else t.nbytes for t in stored)
    if not chosen.startswith("cuda"):
        if gpu is not None:
            raise UsageError(f"--memory is the GPU's, and the model runs on {chosen}: use --ram for the host's memory")
        limit = free_host if host is None else host
        return None if weights + WORKING_BYTES <= limit or _small(weights, host) else Budget(None, limit)
    spread = device in (None, "auto") and torch.cuda.device_count() > 1
    cards = range(torch.cuda.device_count()) if spread else [torch.device(chosen).index or 0]
    free = sum(torch.cuda.mem_get_info(card)[0] for card in cards)
    if weights + WORKING_BYTES <= (free if gpu is None else min(gpu, free)):
        return None
    here = torch.cuda.mem_get_info(cards[0])[0]
    return Budget(int(0.95 * here) if gpu is None else gpu, free_host if host is None else host)


def _quantised(name: str, stored: StoredTensor) -> bool:
    """Roughly: the matrices of layers."""
    return split_name(name) is not None and len(stored.shape) == 2


def _small(weights: int, given: int | None) -> bool:
    """Without a limit from the user, a model of which hardly anything is gained by streaming is loaded."""
    return given is None and weights < WORKING_BYTES
