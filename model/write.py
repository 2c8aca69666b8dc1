"""Write a checkpoint from byte ranges of another: new headers, copied data, no tensor decoded."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from layerprune.model.errors import Refused
from layerprune.model.files import write_text
from layerprune.model.tensors import INDEX, SINGLE, StoredTensor

_CHUNK = 16 << 20

Replace = Mapping[str, Callable[[StoredTensor], bytes]]


def write_checkpoint(
    tensors: Mapping[str, StoredTensor],
    folder: Path,
    replace: Replace | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write `tensors` (new name -> where its bytes are) as safetensors into `folder`.

    The shards mirror the source's shards, less those that became empty; one shard is written as
    model.safetensors without an index. `replace[new name]` gives new bytes of the same length instead of
    the stored ones. Memory: one chunk of 16 MiB, and one tensor where it is replaced.
    """
    shards: dict[Path, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        shards.setdefault(tensor.file, {})[name] = tensor
    groups = [shards[file] for file in sorted(shards, key=lambda f: f.name)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_shard(folder / file, group, replace or {}, progress)
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1:
        total = {"total_size": sum(t.nbytes for t in tensors.values())}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, group: dict[str, StoredTensor], replace: Replace, progress: Callable[[int], None]) -> None:
    ordered = sorted(group.items(), key=lambda item: item[1].begin)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in ordered:
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, as readers expect
    with open(path, "wb") as out, open(ordered[0][1].file, "rb") as source:
        out.write(len(text).to_bytes(8, "little") + text)
        out.flush()
        for begin, end, changed in _ranges(ordered, replace):
            if changed is not None:
                data = replace[changed](group[changed])
                if len(data) != group[changed].nbytes:
                    raise ValueError(f"{changed}: {len(data)} bytes given for {group[changed].nbytes}")
                out.write(data)
                out.flush()
                progress(len(data))
            else:
                _copy(source, out, begin, end, progress)


def _ranges(ordered: Sequence[tuple[str, StoredTensor]], replace: Replace) -> list[tuple[int, int, str | None]]:
    """Neighbouring tensors as one byte range (begin, end, None); a replaced tensor alone with its name."""
    ranges: list[tuple[int, int, str | None]] = []
    for name, tensor in ordered:
        if name in replace:
            ranges.append((tensor.begin, tensor.end, name))
        elif ranges and ranges[-1][2] is None and ranges[-1][1] == tensor.begin:
            ranges[-1] = (ranges[-1][0], tensor.end, None)
        else:
            ranges.append((tensor.begin, tensor.end, None))
    return ranges


def _copy(source: BinaryIO, out: BinaryIO, begin: int, end: int, progress: Callable[[int], None]) -> None:
    """Append bytes begin..end of `source` to `out`, in the kernel where the system can, else by reading."""
    here, there = source.fileno(), out.fileno()
    in_kernel = hasattr(os, "copy_file_range")
    while begin < end:
        want = min(_CHUNK, end - begin)
        done = 0
        if in_kernel:
            try:
                done = os.copy_file_range(here, there, want, offset_src=begin)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                in_kernel = False
            if done == 0:  # some network file systems say so instead of refusing
                in_kernel = False
        if not in_kernel:
            data = os.pread(here, want, begin)
            done = len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(there, view) :]
        if done == 0:
            raise Refused(f"{source.name} became shorter while it was copied")
        begin += done
        progress(done)
