"""docs/how-deep.md says what the records in benchmarks/ say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from scripts import load_script

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "how-deep.md").read_text(encoding="utf-8")


def maker() -> Any:
    return load_script("docs/make_how_deep.py")


def test_the_numbers_are_those_of_the_records() -> None:
    made = maker().filled(PAGE)
    assert made == PAGE, "run python docs/make_how_deep.py"
    number = re.search(r"rank correlation (0\.\d\d)", PAGE)
    assert number is not None
    assert maker().filled(PAGE.replace(number[1], "0.01")) == PAGE, "a changed number is seen"


def test_no_measured_number_stands_outside_the_marks() -> None:
    results = PAGE[PAGE.index("## Which claims hold here") :]
    outside = re.sub(r"<!-- (\w+) -->.*?<!-- end -->", "", results, flags=re.DOTALL)
    assert len(results) - len(outside) > 3000
    assert re.findall(r"\d+\.\d+(?!\d*\.\d)|\d+ %", outside) == []


def test_the_figure_is_drawn_from_them(tmp_path: Path) -> None:
    maker().draw(tmp_path / "cuts.png")
    assert (tmp_path / "cuts.png").stat().st_size > 20_000


def test_runs_of_numbers_are_read_as_ranges() -> None:
    listing = maker().listing
    assert listing([]) == "none" and listing([4]) == "4" and listing([4, 5]) == "4 and 5"
    assert listing([10, 11, 14, 15, 16]) == "10, 11 and 14 to 16" and listing([1, 2, 3]) == "1 to 3"
