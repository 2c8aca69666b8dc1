"""What every benchmark records beside its numbers: commit, device, versions, command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def commit() -> str:
    """The commit that is measured; LAYERPRUNE_COMMIT where the code runs outside its repository."""
    if "LAYERPRUNE_COMMIT" in os.environ:
        return os.environ["LAYERPRUNE_COMMIT"]
    root = Path(__file__).parent.parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    return found.stdout.strip()


def device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return f"{os.cpu_count()} cores, {model}"


def timed(work: Callable[[], Any], cuda: bool) -> tuple[float, int]:
    """Seconds, and the peak of GPU memory in bytes."""
    import torch

    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() if cuda else 0


def write_record(out: str | None, device: str, shape: dict[str, Any], result: dict[str, Any]) -> None:
    """Print the result, and write it with what identifies the measurement to `out`."""
    record = {
        "commit": commit(),
        "command": shlex.join(["python", *map(_plain, sys.argv)]),
        "device": device_name(device),
        "shape": shape,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        **result,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if out:
        Path(out).write_text(text + "\n")


def rounded(value: Any) -> Any:
    """Numbers to five decimals, in nested lists and dicts."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def _plain(argument: str) -> str:
    """Arguments, alone or on both sides of `=`, without the folders of the machine that measured."""
    return "=".join("/".join(part.split("/")[-2:]) if part.startswith("/") else part for part in argument.split("="))
