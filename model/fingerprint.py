"""What identifies a checkpoint, its tokenizer, and a folder of small files: SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

from layerprune.model.tensors import read_checkpoint

_WHOLE = 256 << 20
_PIECE = 1 << 12
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece")


def checkpoint_fingerprint(folder: Path) -> str:
    """Of the config, every tensor's name, type and shape, and its bytes.

    Of a checkpoint of more than 256 MiB, whose reading would take as long as ranking it, three pieces of 4 KiB of every
    tensor count instead of all its bytes: at its start, its middle and its end.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    stored = read_checkpoint(folder)
    whole = sum(tensor.nbytes for tensor in stored.values()) <= _WHOLE
    with contextlib.ExitStack() as files:
        opened = {path: files.enter_context(open(path, "rb")) for path in {t.file for t in stored.values()}}
        for name, tensor in sorted(stored.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            last = max(tensor.begin, tensor.end - _PIECE)
            middle = (tensor.begin + last) // 2
            size = tensor.nbytes if whole else min(_PIECE, tensor.nbytes)
            for begin in (tensor.begin,) if whole else (tensor.begin, middle, last):
                opened[tensor.file].seek(begin)
                digest.update(opened[tensor.file].read(size))
    return digest.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """Of the names and bytes of the files that a tokenizer is made of."""
    files = (p for p in folder.iterdir() if p.name.startswith(_TOKENIZER) or p.suffix in (".model", ".tiktoken"))
    return _of_files(folder, files)


def folder_fingerprint(folder: Path) -> str:
    """Of the names and bytes of all files below a folder, caches of Python aside."""
    return _of_files(folder, (p for p in folder.rglob("*") if "__pycache__" not in p.parts))


def _of_files(folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in files if p.is_file()):
        with open(path, "rb") as file:
            digest.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
