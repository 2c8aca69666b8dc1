"""Safetensors checkpoints as byte ranges: read headers, never decode a tensor.

Format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from layerprune.model.errors import Refused
from layerprune.model.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: bytes `begin..end` (absolute, half-open) of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.begin)
            return file.read(self.nbytes)  # os.pread gives at most 2 GiB at once


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one safetensors file, checked against the file's size.

    Raises Refused for a file that is truncated, has a broken header, overlapping or out-of-range data,
    or sizes that contradict dtype and shape.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise Refused(f"{path} is not a whole safetensors file: truncated or corrupt header")
            header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise Refused(f"{path} is not a whole safetensors file: its header is not JSON") from None
    except FileNotFoundError:
        raise Refused(f"{path} does not exist") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(header, dict):
        raise Refused(f"{path} is not a whole safetensors file: its header is not a JSON object")
    start = 8 + length
    tensors: dict[str, StoredTensor] = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (begin, end, *entry["shape"])):
                raise TypeError
            tensor = StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), start + begin, start + end)
            tensors[name] = tensor
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Refused(f"{path} is corrupt: tensor {name!r} has a malformed header entry") from None
    at = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        bits = DTYPE_BITS.get(tensor.dtype)
        if bits is not None and tensor.nbytes * 8 != tensor.numel * bits:
            raise Refused(f"{path} is corrupt: {tensor.name!r} has {tensor.nbytes} bytes for {tensor.dtype} {tensor.shape}")
        if tensor.begin != at or tensor.end < tensor.begin:
            raise Refused(f"{path} is corrupt: the data of {tensor.name!r} is not where it should be")
        at = tensor.end
    if at != size:
        state = "truncated" if size < at else "longer than its header says"
        raise Refused(f"{path} is {state}: {size:,} bytes, the header describes {at:,}")
    if not tensors:
        raise Refused(f"{path} holds no tensors")
    return tensors


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder, single-file or sharded, in index order.

    Where there are both, the single file counts, as it does for transformers.
    Raises Refused for pickle-only checkpoints, missing shards, shards outside the folder, and tensors that the index
    and the shards disagree about.
    """
    index = folder / INDEX
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not index.exists():
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        pickles = [n for n in found if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickles:
            raise Refused(
                f"{folder} holds only pickled weights ({pickles[0]}): loading them can run code; convert them to "
                "safetensors first (model.save_pretrained does that)"
            )
        raise Refused(f"{folder} holds no weights: expected {SINGLE} or {INDEX}")
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused(f"{index} has no weight_map")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise Refused(f"{index} names {shard!r}, a path outside the folder")
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            raise Refused(f"{index} names {shard}, which is not in {folder}: the download or copy is not complete")
        shards[shard] = read_header(folder / shard)
    tensors = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise Refused(f"{index} says that {name!r} is in {shard}, but it is not")
        tensors[name] = shards[shard][name]
    for shard, held in shards.items():
        for name in held:
            if name not in tensors:
                raise Refused(f"{folder / shard} holds {name!r}, which {INDEX} does not list")
    return tensors
