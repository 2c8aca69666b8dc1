"""The run folder: one manifest, one file a result, so that a killed run goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import locked, made_folder, must_not_exist, no_space_refusal, read_json, write_json
from layerprune.model.tensors import read_checkpoint

MANIFEST = "manifest.json"
_VERSIONED = ("layerprune", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "lm_eval")


class RunFolder:
    """A folder whose manifest names the inputs; a result that lies in it is never made again.

    Open it with `open_run`. `once` makes a JSON result and stores it, or reads the stored one. Phases that write
    folders check for the folder; every file and folder appears in one step, so what exists is whole.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.work = path / ".work"

    @property
    def finished(self) -> bool:
        return bool(self.manifest.get("finished"))

    def once(self, file: str, make: Callable[[], Any]) -> Any:
        """The JSON result in `file`, made and stored by `make` where it is not there yet."""
        path = self.path / file
        if path.exists():
            return read_json(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
        return read_json(path)

    def note(self, **entries: Any) -> None:
        """Add entries to the manifest."""
        self.manifest |= entries
        write_json(self.path / MANIFEST, self.manifest)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record in the manifest that a phase is done, and the seconds it took in this process."""
        started = time.perf_counter()
        yield
        done = self.manifest.setdefault("done", {})
        if name not in done:
            done[name] = round(time.perf_counter() - started, 1)
            self.note()

    def finish(self, result: dict[str, Any]) -> None:
        self.note(finished=True, result=result)
        shutil.rmtree(self.work, ignore_errors=True)


@contextlib.contextmanager
def open_run(path: Path, inputs: dict[str, Any]) -> Iterator[RunFolder]:
    """Open a new run folder, or the one of the same inputs, for one process at a time.

    Raises UsageError for a folder that holds something else, and for a run with other inputs (it names them).
    """
    manifest_path = path / MANIFEST
    if not manifest_path.exists():
        # what a process killed before its first manifest leaves (.lock, partial files) is nobody's result
        if path.is_dir() and all(p.name.startswith(".") for p in path.iterdir()):
            pass
        else:
            must_not_exist(path)
    with no_space_refusal(path), made_folder(path), locked(path, "at work"):
        new = not manifest_path.exists()
        try:
            if new:
                versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
                manifest = {"inputs": inputs, "versions": versions, "finished": False, "done": {}}
                write_json(manifest_path, manifest)
            else:
                manifest = read_json(manifest_path)
                _same_inputs(path, manifest, inputs)
            yield RunFolder(path, manifest)
        except BaseException:
            if new:
                _remove_unless_something_was_found(path)
            raise


def _remove_unless_something_was_found(path: Path) -> None:
    """Take a new run's manifest away when there is no result yet beside it, so that nothing is left of a refusal."""
    if not any(p.is_file() for p in path.rglob("*") if p not in (path / MANIFEST, path / ".lock")):
        (path / MANIFEST).unlink(missing_ok=True)
        for folder in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
            folder.rmdir()


def _same_inputs(path: Path, manifest: Any, inputs: Mapping[str, Any]) -> None:
    before = manifest.get("inputs") if isinstance(manifest, dict) else None
    if not isinstance(before, dict):
        raise Refused(f"{path / MANIFEST} is not the manifest of a run: choose another --out")
    changed = sorted(key for key in before.keys() | dict(inputs).keys() if before.get(key) != inputs.get(key))
    if changed:
        told = "; ".join(f"{key} was {_short(before.get(key))}, now {_short(inputs.get(key))}" for key in changed[:3])
        raise UsageError(f"{path} holds a run of other inputs ({told}): choose another --out or remove it first")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fingerprint(folder: Path) -> str:
    """SHA-256 that identifies a checkpoint: its config, every tensor's name, type, shape and place, and the first
    and last 64 KiB of each weight file (reading all of a large checkpoint would take as long as ranking it)."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    stored = read_checkpoint(folder)
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} {tensor.file.name} {tensor.begin}\n".encode())
    for path in sorted({tensor.file for tensor in stored.values()}):
        with open(path, "rb") as file:
            digest.update(file.read(1 << 16))
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()
