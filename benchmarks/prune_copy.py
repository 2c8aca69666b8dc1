"""The copying phase of a cut against `cp` of as many bytes: ratio of times, and memory above the imports.

    python benchmarks/prune_copy.py --work FOLDER --out benchmarks/prune_copy.json

Makes a random bf16 checkpoint of a shape in FOLDER (default: Llama-2-7B's, 13.5 GB in 3 shards), cuts a block with
`write_checkpoint`, and copies a file of as many bytes with cp. In turns, each round into new files, synced to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import write_record

LAYER = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008), "input_layernorm": (4096,), "post_attention_layernorm": (4096,),
}  # fmt: skip


def make_checkpoint(folder: Path, layers: int) -> None:
    """Safetensors files of the shape with random bytes; written without torch."""
    names = {"model.embed_tokens.weight": (32000, 4096)}
    names |= {f"model.layers.{i}.{n}.weight": shape for i in range(layers) for n, shape in LAYER.items()}
    names |= {"model.norm.weight": (4096,), "lm_head.weight": (32000, 4096)}
    size = {name: 2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in names.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        if filled + size[name] > 5_000_000_000:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size[name]
    folder.mkdir(parents=True)
    block, where = os.urandom(64 << 20), {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for name in shard:
            header[name] = {"dtype": "BF16", "shape": list(names[name]), "data_offsets": [at, at + size[name]]}
            at += size[name]
            where[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, at, len(block)):
                out.write(block[: min(len(block), at - start)])
    index = {"metadata": {"total_size": sum(size.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def copy_cut(source: Path, target: Path, layers: int, start: int, stop: int) -> dict[str, float]:
    """In this process: plan and copy, as `layerprune prune` does; seconds, and bytes of memory above the imports."""
    from layerprune.model.plan import plan_cut
    from layerprune.model.tensors import read_checkpoint
    from layerprune.model.write import write_checkpoint

    before = peak_memory()
    started = time.perf_counter()
    stored = read_checkpoint(source)
    kept = (*range(start), *range(stop, layers))
    plan = plan_cut(stored, layers, kept)
    target.mkdir()
    write_checkpoint({new: stored[old] for old, new in plan.renamed.items()}, target)
    sync(target)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory": peak_memory() - before, "bytes": sum(p.stat().st_size for p in target.iterdir())}


def peak_memory() -> int:
    """Most bytes that this process ever held (Linux). getrusage would count what its parent held before."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def sync(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    parser.add_argument("--cut", help=argparse.SUPPRESS)  # the measured process: its own memory, no torch imported
    given = parser.parse_args()
    work, layers = Path(given.work), given.layers
    start, stop = layers * 5 // 8, layers * 5 // 8 + layers // 4
    if given.cut:
        print(json.dumps(copy_cut(work / "source", Path(given.cut), layers, start, stop)))
        return
    if not (work / "source").exists():
        make_checkpoint(work / "source", layers)
    # What cp copies: files of together as many bytes as the cut keeps.
    rounds: list[dict[str, Any]] = []
    equal = work / "equal"
    for number in range(-1, given.rounds):
        call = [sys.executable, __file__, "--work", str(work), "--layers", str(layers), "--cut", str(work / "cut")]
        cut = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
        if not equal.exists():
            shutil.move(work / "cut", equal)
        else:
            shutil.rmtree(work / "cut")
        (work / "copy").mkdir()
        started = time.perf_counter()
        subprocess.run(["cp", *map(str, sorted(equal.iterdir())), str(work / "copy")], check=True)
        sync(work / "copy")
        cut["cp_seconds"] = time.perf_counter() - started
        shutil.rmtree(work / "copy")
        if number >= 0:  # the first round warms the page cache
            rounds.append(cut)
    shutil.rmtree(equal)
    result = {
        "bytes_kept": rounds[0]["bytes"],
        "cut_seconds": statistics.median(r["seconds"] for r in rounds),
        "cp_seconds": statistics.median(r["cp_seconds"] for r in rounds),
        "ratio": statistics.median(r["seconds"] / r["cp_seconds"] for r in rounds),
        "ratios": [round(r["seconds"] / r["cp_seconds"], 3) for r in rounds],
        "memory_above_imports_bytes": max(r["memory"] for r in rounds),
    }
    write_record(given.out, "cpu", {"layers": layers, "hidden": 4096, "dtype": "bf16", "block": [start, stop]}, result)


if __name__ == "__main__":
    main()
