"""Stored tensors into memory by their byte ranges: straight into host memory, or through a few pinned buffers onto a GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from layerprune.model.errors import Refused
from layerprune.model.tensors import StoredTensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_READ_AT_ONCE = 64 << 20
_PIECE = 32 << 20
_FEEDERS = 4
"""Threads that fill a pinned buffer each: one copies about 8 GB/s out of the page cache, a GPU takes several times that."""


def read_onto(stored: Sequence[StoredTensor], device: torch.device) -> list[torch.Tensor]:
    """The tensors on a device, as they are stored. Files are read, never mapped: mapped pages count as the process's memory.

    Onto a GPU they go on a stream of their own, beside what is being computed; they are there when this returns. Host memory
    that takes: 128 MiB, pinned, for the process's life. Raises Refused where a file ends too soon.
    """
    if device.type == "cuda":
        return _feeder(device).fetch(stored)
    return [read_tensor(one).to(device) for one in stored]


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The tensor in host memory, as it is stored. Raises Refused where the file ends too soon."""
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    _read_into(stored, 0, raw)
    return _as_stored(raw, stored)


def _as_stored(raw: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    return raw.view(DTYPES[stored.dtype]).view(stored.shape)


def _read_into(stored: StoredTensor, begin: int, raw: torch.Tensor) -> None:
    """Fill a uint8 tensor with a stored tensor's bytes from `begin` on. Raises Refused where the file ends too soon."""
    if raw.numel() == 0:
        return
    view = memoryview(raw.numpy())
    with open(stored.file, "rb", buffering=0) as file:
        file.seek(stored.begin + begin)
        at = 0
        while at < len(view):
            got = file.readinto(view[at : at + _READ_AT_ONCE])
            if not got:
                raise Refused(f"{stored.file} became shorter while it was read")
            at += got


class _Feeder:
    """Pinned buffers, a thread for each, and the stream that empties them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = ThreadPoolExecutor(_FEEDERS, thread_name_prefix="feed")
        self.own = threading.local()

    def fetch(self, stored: Sequence[StoredTensor]) -> list[torch.Tensor]:
        # allocated for the side stream: memory that waiting kernels still use is not handed out for writing
        with torch.cuda.stream(self.stream):
            raws = [torch.empty(one.nbytes, dtype=torch.uint8, device=self.device) for one in stored]
        pieces = [
            self.pool.submit(self._feed, one, begin, raw[begin : begin + _PIECE])
            for one, raw in zip(stored, raws, strict=True)
            for begin in range(0, one.nbytes, _PIECE)
        ]
        for piece in pieces:
            piece.result()
        for raw in raws:
            raw.record_stream(torch.cuda.default_stream(self.device))
        return [_as_stored(raw, one) for raw, one in zip(raws, stored, strict=True)]

    def _feed(self, stored: StoredTensor, begin: int, target: torch.Tensor) -> None:
        if not hasattr(self.own, "buffer"):
            self.own.buffer = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
            self.own.arrived = torch.cuda.Event()
        piece = self.own.buffer[: target.numel()]
        _read_into(stored, begin, piece)
        with torch.cuda.stream(self.stream):
            target.copy_(piece, non_blocking=True)
            self.own.arrived.record()
        self.own.arrived.synchronize()


_feeders: dict[torch.device, _Feeder] = {}


def _feeder(device: torch.device) -> _Feeder:
    if device not in _feeders:
        _feeders[device] = _Feeder(device)
    return _feeders[device]
