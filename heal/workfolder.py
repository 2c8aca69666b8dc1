"""The folder of a healing that is going on: opened for one healing, and gone on with by the same one only."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerprune.heal.checkpoints import newest_checkpoint
from layerprune.heal.settings import Healing
from layerprune.heal.teacher import Teacher
from layerprune.heal.world import first_alone, rank, world_size
from layerprune.model.data import data_fingerprint
from layerprune.model.errors import UsageError
from layerprune.model.files import locked, made_folder, no_space_refusal, read_json, write_json
from layerprune.model.fingerprint import checkpoint_fingerprint, tokenizer_fingerprint
from layerprune.model.source import ModelSource


def identity_of(source: ModelSource, settings: Healing, device: str, teacher: Teacher | None) -> dict[str, Any]:
    """What decides the trained weights: a started healing is gone on with only if all of it is the same."""
    chosen = settings.record()
    for key in ("micro_batch", "kernels"):  # a run that ran out of memory may go on with others: they differ by rounding
        del chosen[key]
    return {
        **chosen,
        "data": data_fingerprint(settings.data),
        "validation": None if settings.validation is None else data_fingerprint(settings.validation),
        "model": checkpoint_fingerprint(source.folder),
        "tokenizer": tokenizer_fingerprint(source.folder),
        "teacher": None if teacher is None else checkpoint_fingerprint(teacher.source.folder),
        "device": device.partition(":")[0],
        "processes": world_size(),
    }


@contextlib.contextmanager
def work_folder(work: Path, identity: dict[str, Any], out: Path, device: str) -> Iterator[bool]:
    """Open `work` for one process, or the first of several; yields whether it holds a healing that was begun.

    UsageError for another one's.
    """
    state = work / "heal.json"

    def begin() -> bool:
        stack.enter_context(made_folder(work))
        stack.enter_context(locked(work, "healing"))
        resumed = state.exists()
        if resumed:
            before = read_json(state)
            changed = sorted(key for key in identity if before.get(key) != identity[key])
            if changed:
                told = "; ".join(f"{key} was {before.get(key)}, now {identity[key]}" for key in changed[:3])
                raise UsageError(
                    f"{work} holds a healing for {out} that was begun with other settings ({told}): give the same settings "
                    "to go on with it, or remove that folder"
                )
        else:
            write_json(state, identity)
        return resumed

    def stays() -> str:
        if (work / "trained.json").exists():
            what = "the trained adapter stays"
        elif (saved := newest_checkpoint(work, remove=False)) is not None:
            what = f"step {saved.name.rpartition('-')[2]} stays"
        else:
            return "nothing was left there"
        return f"{what} in {work}: make room and give the same command again, it goes on from there"

    with contextlib.ExitStack() as stack:
        stack.enter_context(no_space_refusal(out, stays))
        resumed = first_alone(begin, device)
        try:
            yield resumed
        except Exception:
            if rank() == 0:
                # what was cut short goes, and a refusal before the first saved step leaves nothing worth going on from
                kept = newest_checkpoint(work) is not None or (work / "trained.json").exists()
                if not resumed and not kept:
                    for path in work.iterdir():
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise
