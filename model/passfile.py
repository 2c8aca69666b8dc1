"""A pass over a checkpoint that was killed goes on at the layer where it stopped: its states, in a file beside the results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from layerprune.model.errors import Refused
from layerprune.model.feed import DTYPES, read_tensor
from layerprune.model.tensors import read_header

Tensors = dict[str, torch.Tensor]
Take = Callable[[Sequence[int]], Tensors]
Put = Callable[[Sequence[int], Tensors], None]


@dataclass(frozen=True)
class Brought:
    """A tensor that is brought into host memory only when it is wanted."""

    dtype: torch.dtype
    shape: torch.Size
    nbytes: int
    bring: Callable[[], torch.Tensor]


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARE = 0.05


class PassFile:
    """What a pass has to go on with: the states that wait, and what was found so far.

    key: what else decides the numbers (checkpoint, dtype, device, questions). take: gives what the caller has found about the
    batches of this pass, put: takes it back; both as tensors, named by a batch's position in the pass, since a call that goes on
    numbers the batches anew. Written when `seconds` have passed since the last time, and when writing takes no more than a
    twentieth of the time; in one step, so that a kill leaves the one before. Where the disk takes no more it is left alone,
    which `say` is told once.
    """

    def __init__(
        self, path: Path, key: str, take: Take, put: Put, say: Callable[[str], None] = lambda line: None, seconds: float = 60.0
    ) -> None:
        self.path, self.key, self.take, self.put, self.say, self.seconds = path, key, take, put, say, seconds
        self._saved_at, self._cost, self._closed = time.monotonic(), 0.0, False

    def due(self) -> bool:
        return not self._closed and time.monotonic() - self._saved_at >= max(self.seconds, self._cost / _SHARE)

    def save(
        self, identity: str, group: Sequence[int], layer: int, length: int | None, states: Mapping[str, torch.Tensor | Brought]
    ) -> None:
        """After `layer`; length: what `Layerwise` found out about the layers' output."""
        started = time.monotonic()
        told = {"identity": self._digest(identity), "layer": str(layer), "length": json.dumps(length)}
        tensors: dict[str, torch.Tensor | Brought] = {f"state/{name}": t for name, t in states.items()}
        tensors |= {f"found/{name}": t for name, t in self.take(group).items()}
        try:
            write_tensors(self.path, tensors, told)
        except OSError as error:
            self._closed = True
            self.remove()
            self.say(f"{self.path} cannot be written ({error.strerror}): a pass that is killed will begin anew")
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def load(self, identity: str, group: Sequence[int]) -> tuple[int, int | None, dict[str, Brought]] | None:
        """(layer, length, states) of this very pass, with what was found given back; None where there is none to go on with.

        The states are read one by one, when they are asked for.
        """
        found = open_tensors(self.path)
        if found is None or found[0].get("identity") != self._digest(identity):
            return None
        told, tensors = found
        states = {name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")}
        self.put(group, {name.removeprefix("found/"): t.bring() for name, t in tensors.items() if name.startswith("found/")})
        return int(told["layer"]), json.loads(told["length"]), states

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _digest(self, identity: str) -> str:
        return hashlib.blake2b(f"{self.key}\n{identity}".encode(), digest_size=16).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor | Brought], told: Mapping[str, str]) -> None:
    """A safetensors file that appears in one step; one tensor at a time is brought to the host. OSError is let through."""
    header: dict[str, object] = {"__metadata__": dict(told)}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes],
        }  # fmt: skip
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.partial")  # one process at a time writes here
    try:
        with open(made, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                if tensor.nbytes:
                    own = tensor.bring() if isinstance(tensor, Brought) else tensor
                    file.write(memoryview(own.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()))
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)


def open_tensors(path: Path) -> tuple[dict[str, str], dict[str, Brought]] | None:
    """The metadata and tensors of such a file, none read yet; None for one that is not there or not whole."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            told = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})
        return told, {
            name: Brought(DTYPES[stored.dtype], torch.Size(stored.shape), stored.nbytes, partial(read_tensor, stored))
            for name, stored in read_header(path).items()
        }
    except (OSError, ValueError, KeyError, Refused):
        return None


def read_tensors(path: Path) -> tuple[dict[str, str], Tensors] | None:
    """The metadata and tensors of such a file, read and not mapped; None for one that is not there or not whole."""
    found = open_tensors(path)
    try:
        return None if found is None else (found[0], {name: tensor.bring() for name, tensor in found[1].items()})
    except (OSError, Refused, MemoryError):
        return None
