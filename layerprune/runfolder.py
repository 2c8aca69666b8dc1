"""The run folder: one manifest, one file a result, so that a killed run goes on where it stopped."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layerprune.heal.world import world_size
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import locked, made_folder, must_not_exist, no_space_refusal, read_json, write_json

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

    def other_versions(self) -> str:
        """A sentence where the folder was begun with other versions of the packages that decide results, else ''."""
        before = self.manifest.get("versions", {})
        names = [name for name in ("layerprune", "torch", "transformers", "lm_eval") if name in before]
        now = {name: importlib.metadata.version(name) for name in names}
        changed = [f"{name} {before[name]}, now {version}" for name, version in now.items() if before[name] != version]
        return f"{self.path} was begun with {'; '.join(changed)}: what is there is kept as it is" if changed else ""

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
def open_run(path: Path, inputs: dict[str, Any], given: dict[str, Any] | None = None) -> Iterator[RunFolder]:
    """Open a new run folder, or the one of the same inputs, for one process at a time.

    given: what a new manifest says of the inputs beside what decides whether they are the same.
    Raises UsageError for a folder that holds something else, and for a run with other inputs (it names them).
    """
    if world_size() > 1:
        raise UsageError(
            f"{world_size()} processes were started together, and only `layerprune heal` is made for that: start this command alone"
        )
    manifest_path = path / MANIFEST
    # what a process killed before its first manifest leaves (.lock, partial files) is nobody's result
    try:
        begun = manifest_path.exists() or (path.is_dir() and all(map(_is_leftover, path.iterdir())))
    except OSError:  # a name that is too long, a folder that is closed: refused below
        begun = False
    if not begun:
        must_not_exist(path)
    kept = "what was found is kept, and the same command goes on with it"
    with no_space_refusal(path, kept), made_folder(path), locked(path, "at work"):
        new = not manifest_path.exists()
        try:
            if new:
                versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
                manifest = {"given": given or {}, "inputs": inputs, "versions": versions, "finished": False, "done": {}}
                write_json(manifest_path, manifest)
            else:
                manifest = read_json(manifest_path)
                _same_inputs(path, manifest, inputs)
            yield RunFolder(path, manifest)
        except BaseException:
            if new:
                _remove_unless_something_was_found(path)
            raise


def _is_leftover(path: Path) -> bool:
    return path.name in (".lock", ".work") or (path.name.startswith(".") and path.name.endswith(".partial"))


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
    was, now = flat(before), flat(inputs)
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if changed:
        told = "; ".join(f"{key} was {_short(was.get(key))}, now {_short(now.get(key))}" for key in changed[:3])
        raise UsageError(f"{path} holds a run of other inputs ({told}): choose another --out or remove it first")


def flat(value: Mapping[str, Any], between: str = ".", above: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as `rank.samples`; `between` joins the names."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, between, f"{above}{key}{between}") if isinstance(item, Mapping) else {f"{above}{key}": item}
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
