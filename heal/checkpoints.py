"""Trainer's checkpoints in a work folder, and which of them were written to their end."""

from __future__ import annotations

import shutil
from pathlib import Path

from layerprune.model.files import read_json, write_json

MARK = "whole.json"
"""Written into a Trainer checkpoint after everything else: one without it was cut short."""


def mark(folder: Path, step: int, seconds: float) -> None:
    """Say that a checkpoint is whole; seconds: of training up to it."""
    # other processes write their random states when they please
    files = {f.name: f.stat().st_size for f in folder.iterdir() if f.is_file() and not f.name.startswith("rng_state")}
    write_json(folder / MARK, {"step": step, "seconds": seconds, "files": files})


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint was marked, and its files are those of then."""
    if not (folder / MARK).exists():
        return False
    files = read_json(folder / MARK).get("files", {})
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def newest_checkpoint(work: Path, remove: bool = True) -> Path | None:
    """The newest Trainer checkpoint in `work` that was written to its end, and has the files of then; others go where `remove`."""
    found = []
    for folder in work.glob("checkpoint-*"):
        if _is_whole(folder):
            found.append(folder)
        elif remove:
            shutil.rmtree(folder, ignore_errors=True)
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
