"""Bars appear after a second, and only where they are asked for."""

import time

import pytest

from layerprune.model.progress import progress_bar


def test_nothing_is_drawn_for_what_is_soon_over(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(3, "copy", "B", True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("show", [True, False])
def test_a_bar_is_drawn_after_a_second_where_it_is_asked_for(show: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(2, "rank", "doc", show) as bar:
        bar.update(1)
        time.sleep(1.1)
        bar.update(1)
    assert ("rank: 100%" in capsys.readouterr().err) is show
