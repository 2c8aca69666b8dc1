"""What identifies a checkpoint, its tokenizer, and a folder of small files: SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from layerprune.model.tensors import read_checkpoint

_ENDS = 1 << 16
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece")


def checkpoint_fingerprint(folder: Path) -> str:
    """Of the config, every tensor's name, type, shape and place, and the first and last 64 KiB of each weight file.

    Reading all of a large checkpoint would take as long as ranking it.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    stored = read_checkpoint(folder)
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} {tensor.file.name} {tensor.begin}\n".encode())
    for path in sorted({tensor.file for tensor in stored.values()}):
        with open(path, "rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, path.stat().st_size - _ENDS))
            digest.update(file.read())
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
