"""Trainer's checkpoints in a work folder, and which of them were written to their end."""

from __future__ import annotations

import shutil
from pathlib import Path

from layerprune.model.files import write_json

MARK = "whole.json"
"""Written into a Trainer checkpoint after everything else: one without it was cut short."""


def mark(folder: Path, step: int, seconds: float) -> None:
    """Say that a checkpoint is whole; seconds: of training up to it."""
    write_json(folder / MARK, {"step": step, "seconds": seconds})


def newest_checkpoint(work: Path, remove: bool = True) -> Path | None:
    """The newest Trainer checkpoint in `work` that was written to its end; the others are removed where `remove`."""
    found = []
    for folder in work.glob("checkpoint-*"):
        if (folder / MARK).exists():
            found.append(folder)
        elif remove:
            shutil.rmtree(folder, ignore_errors=True)
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
