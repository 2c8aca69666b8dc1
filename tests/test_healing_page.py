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
    for name, draw in (("healing.png", maker().draw), ("healing-seconds.png", maker().draw_seconds)):
        draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 20_000


def test_a_way_is_read_at_a_time_and_not_at_a_step() -> None:
    made = maker()
    costs = {made.PAPER: 1.0, "MLP and attention": 2.0, "bridge (map) alone": 30.0}
    curve = [[0, 3.0], [100, 2.0], [200, 1.0]]
    assert made.loss_at(made.times_of(made.PAPER, curve, costs), 150) == 1.5
    assert made.loss_at(made.times_of("MLP and attention", curve, costs), 150) == 2.25
    bridged = made.times_of("bridge (map), then all layers", curve, costs)
    assert made.loss_at(bridged, 20) is None and made.loss_at(bridged, 80) == 2.5 and made.loss_at(bridged, 999) == 1.0
