"""Blocks, fractions, kept layers: laws and refusals."""

from __future__ import annotations

import pytest

from layerprune.model.cuts import Block, check_kept, describe_dropped, drop_count, last_block, parse_layers
from layerprune.model.errors import UsageError


@pytest.mark.parametrize("layers", [2, 3, 10, 24, 32, 40, 80, 126])
def test_kept_and_dropped_are_all_layers(layers: int) -> None:
    for size in range(1, layers):
        for start in range(0, layers - size + 1):
            kept = Block(start, size).kept(layers)
            assert len(kept) == layers - size
            assert set(kept) | set(range(start, start + size)) == set(range(layers))
            check_kept(kept, layers)


@pytest.mark.parametrize(
    ("drop", "layers", "n"),
    [(0.4, 80, 32), (0.25, 32, 8), (0.35, 10, 4), (0.05, 10, 1), (0.449, 10, 4), (0.45, 10, 5), (0.125, 4, 1), (0.3, 5, 2)],
)
def test_a_half_is_rounded_up(drop: float, layers: int, n: int) -> None:
    assert drop_count(drop, layers) == n


@pytest.mark.parametrize("drop", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), 0.01, 0.99])
def test_fractions_that_drop_nothing_or_all_are_refused(drop: float) -> None:
    with pytest.raises(UsageError, match=f"{drop:g}"):
        drop_count(drop, 24)


@pytest.mark.parametrize("layers", [2, 3, 7, 24, 80])
def test_the_bounds_that_a_refusal_names_are_right(layers: int) -> None:
    for drop in (0.0001, 0.9999):
        with pytest.raises(UsageError) as caught:
            drop_count(drop, layers)
        named = float(str(caught.value).split()[-1])
        assert drop_count(named, layers) in (1, layers - 1)


def test_the_heuristic_keeps_the_last_layer() -> None:
    # arXiv 2403.17887 counts from 1: "(L-n) to (L-1) inclusive" is 0-based L-1-n .. L-2
    assert last_block(8, 32) == Block(23, 8)
    assert last_block(8, 32).kept(32)[-1] == 31
    assert last_block(31, 32).kept(32) == (31,)
    for n in (0, 32):
        with pytest.raises(UsageError, match=str(n)):
            last_block(n, 32)


@pytest.mark.parametrize("text", ["8", "8:", ":8", "8:8", "9:8", "-1:3", "0:33", "a:b", "8-16", "0:32", "", "1:2:3", "1.0:2"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_layers(text, 32)


def test_a_range_is_half_open() -> None:
    assert parse_layers("8:16", 32) == Block(8, 8)
    assert parse_layers(" 31:32 ", 32).kept(32) == tuple(range(31))


def test_dropped_layers_read_as_ranges() -> None:
    assert describe_dropped((0, 1, 2, 5, 6, 7, 8), 10) == "3:5, 9:10"
    assert describe_dropped((0, 1), 2) == "none"
