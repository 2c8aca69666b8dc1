"""A pass over a checkpoint that was killed goes on at the layer where it stopped: its states, in a file beside the results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from layerprune.model.files import no_space_refusal

Tensors = dict[str, torch.Tensor]

_SECONDS = 60.0
_SHARE = 0.05


class PassFile:
    """What a pass has to go on with: the states that wait, and what was found so far.

    key: what else decides the numbers (checkpoint, dtype, device). take: gives what the caller has found in this pass, put:
    takes it back; both as named tensors. A state is written when `seconds` have passed since the last one, and when writing takes
    no more than a twentieth of the time; in one step, so a kill leaves the one before.
    """

    def __init__(
        self, path: Path, key: str, take: Callable[[], Tensors], put: Callable[[Tensors], None], seconds: float = _SECONDS
    ) -> None:
        self.path, self.key, self.take, self.put, self.seconds = path, key, take, put, seconds
        self._saved_at, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        return time.monotonic() - self._saved_at >= max(self.seconds, self._cost / _SHARE)

    def save(self, identity: str, layer: int, length: int | None, states: Tensors) -> None:
        """After `layer`; length: what `Layerwise` found out about the layers' output."""
        from safetensors.torch import save_file

        started = time.monotonic()
        told = {"identity": self._digest(identity), "layer": str(layer), "length": json.dumps(length)}
        tensors = {f"state/{name}": t for name, t in states.items()} | {f"found/{name}": t for name, t in self.take().items()}
        made = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with no_space_refusal(self.path):
            try:
                save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, made, told)
                os.replace(made, self.path)
            finally:
                made.unlink(missing_ok=True)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def load(self, identity: str) -> tuple[int, int | None, Tensors] | None:
        """(layer, length, states) of this very pass, with what was found given back; None where there is none to go on with."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                told: Mapping[str, str] = file.metadata() or {}
                if told.get("identity") != self._digest(identity):
                    return None
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError):  # none, or one that is not whole: the pass begins anew
            return None
        self.put({name.removeprefix("found/"): t for name, t in tensors.items() if name.startswith("found/")})
        states = {name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")}
        return int(told["layer"]), json.loads(told["length"]), states

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _digest(self, identity: str) -> str:
        return hashlib.blake2b(f"{self.key}\n{identity}".encode(), digest_size=16).hexdigest()
