"""Names and numbers as the page of a run says them; what is not known is a dash."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from layerprune.figures import number

Row = Mapping[str, Any]
Facts = dict[str, Any]

NAMES = {
    "angular": "angular distance",
    "last": "last n",
    "angular healed": "angular distance, healed",
    "last healed": "last n, healed",
}


def fixed(value: Any, digits: int = 3) -> str:
    known = number(value)
    return "–" if known is None else f"{known:.{digits}f}"


def whole_number(value: Any) -> str:
    known = number(value)
    return "–" if known is None else f"{known:,.0f}"


def percent(value: Any, digits: int = 0) -> str:
    known = number(value)
    return "–" if known is None else f"{100 * known:.{digits}f} %"


def count(value: Any) -> str:
    known = number(value)
    return "–" if known is None else f"{known / 1e9:.2f} B" if known >= 1e9 else f"{known / 1e6:.2f} M"


def size(value: Any) -> str:
    known = number(value)
    return "–" if known is None else f"{known / 1e9:.2f} GB" if known >= 1e9 else f"{known / 1e6:.1f} MB"


def speed_of(found: Mapping[str, Any]) -> float | None:
    return number((found.get("speed") or {}).get("tokens_per_second"))


def as_text(value: Any) -> str:
    if isinstance(value, list):
        run = len(value) > 2 and all(isinstance(v, int) for v in value) and value == list(range(value[0], value[-1] + 1))
        return f"{value[0]} to {value[-1]}" if run else ", ".join(map(str, value))
    text = str(value)
    return text[:12] + "…" if re.fullmatch("[0-9a-f]{40,}", text) else text


def packaged(path: Any) -> Any:
    """A file of a recipe by its place under recipes/: where this machine keeps it is no one's business."""
    return str(path).partition("/layerprune/recipes/")[2] or path
