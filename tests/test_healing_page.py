"""docs/healing.md says what the records in benchmarks/ say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts import load_script

DOCS = Path(__file__).parent.parent / "docs"


def maker() -> Any:
    return load_script("docs/make_healing.py")


def test_the_tables_are_those_of_the_records() -> None:
    page = (DOCS / "healing.md").read_text(encoding="utf-8")
    made = maker().filled(page)
    assert made == page, "run python docs/make_healing.py"
    assert maker().filled(page.replace("0.4404", "0.1404")) == page, "a changed number is seen"


def test_the_figure_is_drawn_from_them(tmp_path: Path) -> None:
    maker().draw(tmp_path / "healing.png")
    assert (tmp_path / "healing.png").stat().st_size > 20_000
