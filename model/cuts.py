"""Which layers stay: blocks, fractions, and the tuple `kept` that every other part works from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from layerprune.model.errors import UsageError

Kept = tuple[int, ...]
"""Original 0-based indices of the layers that stay, in order."""


@dataclass(frozen=True)
class Block:
    """Layers start .. start+size-1 (0-based; `start+size` is the first layer after the block)."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size

    def kept(self, layers: int) -> Kept:
        """The layers that stay when this block is cut from `layers`. Raises UsageError outside 1..L-1 layers."""
        if not (0 <= self.start < self.stop <= layers):
            raise UsageError(f"layers {self.start}:{self.stop} are not inside the model's {layers} layers (0:{layers})")
        if self.size == layers:
            raise UsageError(f"layers {self.start}:{self.stop} are all {layers} layers; at least one must stay")
        return (*range(self.start), *range(self.stop, layers))

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


def drop_count(drop: float, layers: int) -> int:
    """n, the layers that a fraction drops: drop * L rounded half up. Raises UsageError for n = 0 and n = L."""
    if not 0 < drop < 1:
        raise UsageError(f"--drop {drop:g} is not a fraction between 0 and 1, such as 0.4")
    # A decimal fraction such as 0.35 * 10 is 3.4999999999999996 in binary: the rounding must not see that.
    n = math.floor(round(drop * layers, 9) + 0.5)
    if n == 0:
        raise UsageError(f"--drop {drop:g} of {layers} layers drops none: use at least {math.ceil(500 / layers) / 1000:g}")
    if n == layers:
        most = math.ceil((layers - 0.5) / layers * 1000 - 1) / 1000
        raise UsageError(f"--drop {drop:g} of {layers} layers drops all {layers}; at least one must stay: use at most {most:g}")
    return n


def parse_layers(text: str, layers: int) -> Block:
    """`8:16` as Block(8, 8): 0-based, half-open. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+)\s*:\s*([0-9]+)\s*", text)
    if match is None:
        raise UsageError(f"--layers {text} is not A:B with two whole numbers (0-based, B not included), such as 8:16")
    start, stop = int(match[1]), int(match[2])
    if not 0 <= start < stop <= layers:
        raise UsageError(f"--layers {text} is not inside the model's {layers} layers: use 0 <= A < B <= {layers}")
    block = Block(start, stop - start)
    block.kept(layers)
    return block


def last_block(n: int, layers: int) -> Block:
    """The simple heuristic's block: the deepest n layers except the very last one (arXiv 2403.17887, section 4.4).

    0-based L-1-n .. L-2. Raises UsageError where n layers are not there without the last.
    """
    if not 1 <= n <= layers - 1:
        raise UsageError(f"the last-n heuristic keeps the last layer: of {layers} layers it can drop 1 to {layers - 1}, not {n}")
    return Block(layers - 1 - n, n)


def check_kept(kept: Kept, layers: int) -> None:
    """Raise UsageError unless `kept` is a non-empty increasing selection of range(layers)."""
    if not kept or any(b <= a for a, b in zip(kept, kept[1:], strict=False)) or kept[0] < 0 or kept[-1] >= layers:
        raise UsageError(f"kept layers {kept} are not an increasing selection of 0..{layers - 1}")


def describe_dropped(kept: Kept, layers: int) -> str:
    """The layers that go, as half-open ranges: `8:16`, or `3:5, 9:10`, or `none`."""
    gone = sorted(set(range(layers)) - set(kept))
    return ", ".join(f"{a}:{b}" for a, b in runs(gone)) or "none"


def runs(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending indices as half-open runs of neighbours: 0 1 2 5 as (0, 3), (5, 6)."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found
