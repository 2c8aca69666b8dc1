"""What fits in memory: what a process may still take, and halves where a GPU says no."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from layerprune.model.errors import Refused, UsageError, one_line
from layerprune.model.passplan import PROCESS_BYTES

Row = TypeVar("Row")


def available_memory() -> int:
    """Bytes of RAM that this process may still take: the machine's, or its control group's where that is less."""
    second = Path("/sys/fs/cgroup")
    first = second / "memory"
    return max(0, min(
        _of_machine(),
        _of_group(second / "memory.max", second / "memory.current", second / "memory.stat", "inactive_file"),
        _of_group(
            first / "memory.limit_in_bytes", first / "memory.usage_in_bytes", first / "memory.stat", "total_inactive_file"
        ),
    ))  # fmt: skip


def host_room(ram: int | None, held: int = 0) -> int:
    """Bytes of RAM that this process may still take: what is free, and where `ram` is given no more than that in all.

    held: bytes of it that are in use, beside those of the process itself.
    """
    free = available_memory()
    return free if ram is None else max(0, min(free, ram - PROCESS_BYTES - held))


def byte_count(given: str | int | None, option: str) -> int | None:
    """Bytes from text such as `16GiB`, `24 GB` or `512MiB`; None stays None. UsageError for anything else."""
    if given is None or isinstance(given, int):
        return given
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", given, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{option} {given} is no amount of memory, such as 16GiB or 24GB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1))


def _of_machine() -> int:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 0


def _of_group(limit: Path, used: Path, stat: Path, key: str) -> int:
    """A control group's limit less what it uses, the page cache that can go not counted; huge where there is none."""
    try:
        cache = next(int(line.split()[1]) for line in stat.read_text().splitlines() if line.split()[0] == key)
        return int(limit.read_text()) - int(used.read_text()) + cache
    except (OSError, ValueError, StopIteration):  # no control group, or "max"
        return 1 << 62


def in_halves(rows: Sequence[Row], work: Callable[[Sequence[Row]], None]) -> int:
    """Do the work on all rows at once, or in halves (of halves ...) where a GPU is out of memory.

    Returns the rows of the largest part that fitted. Raises Refused when a single row does not fit.
    """
    import torch

    try:
        work(rows)
        return len(rows)
    except torch.cuda.OutOfMemoryError as error:
        if len(rows) == 1:
            raise Refused(f"not even one sequence at a time fits on the GPU beside the model: {one_line(error)}") from error
    # outside the handler, which would keep the tensors of the failed attempt alive
    torch.cuda.empty_cache()
    half = len(rows) // 2
    return max(in_halves(rows[:half], work), in_halves(rows[half:], work))
