"""Where states wait between two layers: the device, host memory, a scratch file; each is filled before the next.

The file is read and written, not mapped (mapped pages count as the process's memory), and has no name: a kill leaves nothing.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerprune.model.files import no_space_refusal


@dataclass
class Waiting:
    """A state on the shelf. place: `device`, `host` or `file`; held: the tensor, the buffer, or where it begins in the file."""

    place: str
    held: Any
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int


class Shelf:
    """States of one pass over a checkpoint.

    device: where they are computed, and wanted again. here: bytes that may wait there (0 on a CPU, whose memory is the host's);
    host: bytes of host memory; scratch: a folder for what goes beyond both, None for none: then host memory takes it after
    all. On a GPU host memory is pinned, and copies are queued on the stream that computes.
    """

    def __init__(self, device: torch.device, here: int, host: int, scratch: Path | None = None) -> None:
        self.device, self.scratch = device, scratch
        self.room = {"device": here if device.type != "cpu" else 0, "host": host}
        self.used = {"device": 0, "host": 0, "file": 0}
        self.most = dict(self.used)
        self._free: dict[tuple[str, int], list[Any]] = {}
        self._pinned: list[torch.Tensor] = []
        self._file: Any = None
        self._staging: torch.Tensor | None = None

    def put(self, state: torch.Tensor) -> Waiting:
        """Keep a state. Raises Refused where the disk takes no more."""
        state = state.detach().contiguous()
        size = state.nbytes
        fits = [place for place in ("device", "host") if self.used[place] + size <= self.room[place]]
        place = fits[0] if fits else "file" if self.scratch is not None else "host"
        self.used[place] += size
        self.most[place] = max(self.most[place], self.used[place])
        held: Any = state
        if place == "file":
            held = self._write(state)
        elif place == "host" and self.device.type == "cuda":
            free = self._free.get((place, size))
            held = free.pop() if free else self._pin(size)
            held.copy_(_bytes(state), non_blocking=True)
        return Waiting(place, held, state.shape, state.dtype, size)

    def get(self, waiting: Waiting, last: bool) -> torch.Tensor:
        """The state, on the device. last: nobody will ask for it again."""
        if waiting.place == "file":
            state = self._read(waiting)
        elif waiting.place == "host" and self.device.type == "cuda":
            state = _shaped(waiting.held.to(self.device, non_blocking=True), waiting)
        else:
            state = waiting.held
        if last:
            self.used[waiting.place] -= waiting.nbytes
            if waiting.place == "file" or waiting.place == "host" and self.device.type == "cuda":
                self._free.setdefault((waiting.place, waiting.nbytes), []).append(waiting.held)
        return state

    def host_copy(self, waiting: Waiting) -> torch.Tensor:
        """The state in host memory, whole, for writing it elsewhere."""
        if waiting.place == "host" and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
            return _shaped(waiting.held, waiting)
        return self.get(waiting, last=False).cpu()

    def close(self) -> None:
        """Give back the file and the pinned memory."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._pinned:
            torch.cuda.current_stream(self.device).synchronize()
            for buffer in self._pinned:
                torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
            self._pinned.clear()

    def _pin(self, size: int) -> torch.Tensor:
        # torch's own pinned allocations are rounded up to a power of two
        buffer = torch.empty(size, dtype=torch.uint8)
        if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)) == 0:
            self._pinned.append(buffer)
        return buffer

    def _write(self, state: torch.Tensor) -> int:
        assert self.scratch is not None
        if self._file is None:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.scratch, prefix=".states-")  # noqa: SIM115 (until close)
        free = self._free.get(("file", state.nbytes))
        begin = int(free.pop()) if free else os.fstat(self._file.fileno()).st_size
        view = memoryview(_bytes(state).cpu().numpy())
        at = 0
        with no_space_refusal(self.scratch, "what was found is kept, and the same command goes on with it"):
            while at < len(view):
                at += os.pwrite(self._file.fileno(), view[at : at + (64 << 20)], begin + at)
        return begin

    def _read(self, waiting: Waiting) -> torch.Tensor:
        raw = torch.empty(waiting.nbytes, dtype=torch.uint8)
        view = memoryview(raw.numpy())
        at = 0
        while at < len(view):
            got = os.preadv(self._file.fileno(), [view[at : at + (64 << 20)]], waiting.held + at)
            if not got:
                raise RuntimeError("the scratch file of states is shorter than what was written")
            at += got
        return _shaped(raw.to(self.device), waiting)


def _bytes(state: torch.Tensor) -> torch.Tensor:
    return state.reshape(-1).view(torch.uint8)


def _shaped(raw: torch.Tensor, waiting: Waiting) -> torch.Tensor:
    return raw.view(waiting.dtype).view(waiting.shape)
