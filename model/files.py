"""Write files and folders so that a killed run leaves nothing that looks finished."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
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
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from None


def must_not_exist(out: Path) -> None:
    """Refuse an output path that holds something already, or one that cannot be made."""
    try:
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except (OSError, ValueError) as error:  # a name that is too long, a folder that is closed
        raise UsageError(f"--out {out} cannot be looked up: {getattr(error, 'strerror', None) or error}") from None
    if taken:
        raise UsageError(f"{out} exists already and is left as it is: choose another --out or remove it first")
    above = _nearest_existing(out)
    if not above.is_dir():
        raise UsageError(f"{out} cannot be made because {above} is a file: choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise Refused(f"{out} cannot be written because {above} is read-only: choose another --out")


def _nearest_existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def no_space_refusal(target: Path, left: str | Callable[[], str] = "nothing was left there") -> Iterator[None]:
    """Turn a full disk, a quota, a limit on the size of files or a read-only place into one sentence about `target`.

    One that an inner file was refused with already becomes a sentence about `target` too. left: what became of it, or what
    finds that out.
    """
    try:
        yield
    except Exception as told:
        error = told.__cause__ if isinstance(told, Refused) else told
        why = _no_room(error)
        if why is not None:
            raise Refused(f"{why}: could not write {target}; {left if isinstance(left, str) else left()}") from error
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            named = f" ({error.filename})" if error.filename else ""
            raise Refused(f"{target} cannot be written: {error.strerror}{named}") from error
        raise


def _no_room(error: BaseException | None) -> str | None:
    """Why there was no room for a file, in words; None for an error of another kind."""
    # safetensors reports the system's error in words only
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in text:
        return "the disk is full"
    if number == errno.EFBIG or os.strerror(errno.EFBIG) in text:
        return "a file grows larger than is allowed here (ulimit -f, or the file system's own limit)"
    # torch.save says where it noticed, and not why
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter failed" in text or "inline_container" in text):
        return "a file broke off as it was written (a full disk, or a limit on the size of files)"
    return None


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; when the block fails, those of them that are empty go again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that becomes `out` when the block ends well, and vanishes when it does not.

    A process killed inside the block leaves only `.NAME.PID.partial`, which the next call for the same
    `out` removes. Raises UsageError where `out` holds something already.
    """
    must_not_exist(out)
    out = out.resolve()  # a link to an empty folder elsewhere: the sibling belongs there
    temporary = out.parent / f".{out.name}.{os.getpid()}.partial"
    with no_space_refusal(out), made_folder(out.parent):
        for stale in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
            if not _alive(stale.name.split(".")[-2]):
                shutil.rmtree(stale, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            _sync(temporary)
            must_not_exist(out)
            os.replace(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold `folder` for this process; Refused while another one holds it (`doing`: what it is doing there)."""
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system
        yield
        return
    path = folder / ".lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the holder before may have removed the file between our opening and our locking it
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                raise BlockingIOError
        except OSError:
            raise Refused(f"another process is {doing} in {folder}: wait for it, or choose another --out") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


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
    return shutil.disk_usage(_nearest_existing(path)).free


def must_have_room(out: Path, need: float, held: int = 0) -> None:
    """Refuse a disk on which `need` bytes do not fit; `held` of them are written already."""
    room = free_bytes(out)
    if need > room + held:
        unit, factor = ("GB", 1e9) if need >= 1e8 else ("MB", 1e6)
        raise Refused(
            f"the disk is full: {out} needs {need / factor:.2f} {unit} and {room / factor:.2f} {unit} are free; give another "
            "--out or free some space"
        )


def free_disk(folder: Path | None) -> int:
    """Bytes that may be written to a folder that need not exist yet, a tenth left to others; 0 for none."""
    if folder is None:
        return 0
    there = next((parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir()), Path("/"))
    return int(0.9 * shutil.disk_usage(there).free)
