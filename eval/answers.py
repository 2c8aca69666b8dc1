"""Answers of single samples, kept on disk, so that no branch is asked the same twice."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from layerprune.model.cuts import Kept
from layerprune.model.errors import Refused
from layerprune.model.files import no_space_refusal

Key = bytes
"""What a sample asks, as 16 bytes: see `sample_key`."""

_SECONDS = 20.0
"""How much work a killed process may lose."""


def sample_key(kind: str, *parts: Sequence[int] | str) -> Key:
    """The identity of a sample: its kind (`loss`, `loglikelihood`, `text`) and the tokens or texts that it consists of."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else np.asarray(part, dtype=np.int64).tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


class Answers:
    """Numbers and flags by (branch, sample): log-likelihoods in nats with whether they are greedy, or losses in nats.

    folder: where they are kept, as one file of numbers for every few seconds of work; None keeps them in memory only.
    A file appears in one step, so a killed process loses the last seconds and nothing else. Texts that a branch
    generated are kept beside them. All answers of a folder must come from one checkpoint, dtype and device: the caller
    sees to that. Raises Refused for a file that is not readable.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._at: dict[Key, int] = {}
        self._value: dict[Kept, np.ndarray] = {}
        self._flag: dict[Kept, np.ndarray] = {}
        self._text: dict[tuple[Kept, Key], str] = {}
        self._unsaved: list[tuple[list[Kept], list[Key], np.ndarray, np.ndarray]] = []
        self._unsaved_text: list[tuple[Kept, Key, str]] = []
        self._saved_at = time.monotonic()
        self._files = 0
        for path in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
            if path.suffix in (".npz", ".json") and not path.name.startswith("."):
                self._read(path)

    def __len__(self) -> int:
        return len(self._at)

    def missing(self, branches: Sequence[Kept], keys: Sequence[Key]) -> dict[tuple[Kept, ...], list[int]]:
        """Which branches have no answer, and to which of the keys (their indices), grouped by the same branches."""
        at = np.array([self._at.get(key, -1) for key in keys], dtype=np.int64)
        lacks_BK = np.ones((len(branches), len(keys)), dtype=bool)
        for b, kept in enumerate(branches):
            have = self._value.get(kept)
            if have is not None:
                known = (at >= 0) & (at < len(have))
                lacks_BK[b, known] = np.isnan(have[at[known]])
        if not lacks_BK.any():
            return {}
        patterns, which = np.unique(lacks_BK, axis=1, return_inverse=True)
        return {
            tuple(kept for b, kept in enumerate(branches) if patterns[b, p]): np.flatnonzero(which.ravel() == p).tolist()
            for p in range(patterns.shape[1])
            if patterns[:, p].any()
        }

    def add(self, branches: Sequence[Kept], keys: Sequence[Key], value_BK: np.ndarray, flag_BK: np.ndarray | None = None) -> None:
        """Keep the answers of some branches to some samples. They are numbers: NaN stands for none."""
        flags = np.zeros(value_BK.shape, dtype=bool) if flag_BK is None else flag_BK
        self._take(list(branches), list(keys), value_BK, flags)
        self._unsaved.append((list(branches), list(keys), value_BK, flags))
        if time.monotonic() - self._saved_at > _SECONDS:
            self.save()

    def values(self, kept: Kept, keys: Sequence[Key]) -> np.ndarray:
        """float64 of each key; KeyError or NaN where there is no answer."""
        return self._value[kept][[self._at[key] for key in keys]]

    def flags(self, kept: Kept, keys: Sequence[Key]) -> np.ndarray:
        return self._flag[kept][[self._at[key] for key in keys]]

    def text(self, kept: Kept, key: Key) -> str | None:
        return self._text.get((kept, key))

    def add_text(self, kept: Kept, key: Key, text: str) -> None:
        self._text[kept, key] = text
        self._unsaved_text.append((kept, key, text))
        if time.monotonic() - self._saved_at > _SECONDS:
            self.save()

    def save(self) -> None:
        """Write what was added since the last time."""
        self._saved_at = time.monotonic()
        if self._folder is None:
            self._unsaved.clear()
            self._unsaved_text.clear()
            return
        groups: dict[tuple[Kept, ...], list[int]] = {}
        for i, (branches, *_) in enumerate(self._unsaved):
            groups.setdefault(tuple(branches), []).append(i)
        for asked, members in groups.items():
            parts = [self._unsaved[i] for i in members]
            file = io.BytesIO()
            np.savez(
                file,
                branches=np.array(json.dumps(asked)),
                keys=np.frombuffer(b"".join(key for part in parts for key in part[1]), dtype=np.uint8).reshape(-1, 16),
                values=np.concatenate([part[2] for part in parts], axis=1),
                flags=np.concatenate([part[3] for part in parts], axis=1),
            )
            self._write(".npz", file.getvalue())
        if self._unsaved_text:
            rows = [[list(kept), key.hex(), text] for kept, key, text in self._unsaved_text]
            self._write(".json", json.dumps(rows).encode())
        self._unsaved.clear()
        self._unsaved_text.clear()

    def _write(self, suffix: str, content: bytes) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        while any(self._folder.glob(f"{self._files:06d}.*")):
            self._files += 1
        path = self._folder / f"{self._files:06d}{suffix}"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with no_space_refusal(path), open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        try:
            if path.suffix == ".json":
                for kept, key, text in json.loads(path.read_bytes()):
                    self._text[tuple(kept), bytes.fromhex(key)] = text
                return
            with np.load(path, allow_pickle=False) as stored:
                branches = [tuple(kept) for kept in json.loads(str(stored["branches"]))]
                self._take(branches, [row.tobytes() for row in stored["keys"]], stored["values"], stored["flags"])
        except Exception as error:  # whatever a damaged archive raises
            raise Refused(f"{path} is damaged ({type(error).__name__}): remove it, and its answers are made again") from error

    def _take(self, branches: list[Kept], keys: list[Key], value_BK: np.ndarray, flag_BK: np.ndarray) -> None:
        at = np.array([self._at.setdefault(key, len(self._at)) for key in keys], dtype=np.int64)
        for b, kept in enumerate(branches):
            have = self._value.get(kept)
            if have is None or len(have) < len(self._at):
                room = max(1024, 2 * len(self._at))
                value, flag = np.full(room, np.nan), np.zeros(room, dtype=bool)
                if have is not None:
                    value[: len(have)], flag[: len(have)] = have, self._flag[kept]
                self._value[kept], self._flag[kept] = value, flag
            self._value[kept][at] = value_BK[b]
            self._flag[kept][at] = flag_BK[b]
