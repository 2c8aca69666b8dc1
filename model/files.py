"""Write files and folders so that a killed run leaves nothing that looks finished."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused, UsageError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step (temporary sibling, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with no_space_refusal(path), open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing or broken one is refused by name."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{path} is not valid JSON: {error}") from None


def must_not_exist(out: Path) -> None:
    """Refuse an output path that holds something already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already and is left as it is: choose another --out or remove it first")


@contextlib.contextmanager
def no_space_refusal(target: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a read-only place into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Refused(f"the disk is full: could not write {target}; nothing was left there") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise Refused(f"{target} cannot be written: {error.strerror}") from error
        raise


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that becomes `out` when the block ends well, and vanishes when it does not.

    A process killed inside the block leaves only `.NAME.PID.partial`, which the next call for the same
    `out` removes. Raises UsageError where `out` holds something already.
    """
    out = out.absolute()
    must_not_exist(out)
    with no_space_refusal(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{out.name}.*.partial"):
            if not _alive(stale.name.split(".")[-2]):
                shutil.rmtree(stale, ignore_errors=True)
        temporary = out.parent / f".{out.name}.{os.getpid()}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        with no_space_refusal(out):
            yield temporary
            _sync(temporary)
            must_not_exist(out)
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _alive(pid: str) -> bool:
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def free_bytes(path: Path) -> int:
    """Bytes free on the file system that holds (or will hold) `path`."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
