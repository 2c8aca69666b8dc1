"""Progress bars on stderr: they appear when something has taken over a second."""

from __future__ import annotations

from typing import Any


def progress_bar(total: int, what: str, unit: str, show: bool) -> Any:
    """A tqdm bar over `total` units (`B` and `token` are scaled); nothing is drawn where `show` is False or all is soon over."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit in ("B", "token"), disable=not show, delay=1.0)
