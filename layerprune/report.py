"""The result of a run as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {"whole": "whole", "pruned": "after cutting", "healed": "after healing"}


def format_run(result: Mapping[str, Any]) -> str:
    """A table with one column for the whole, the cut and the healed model, then where everything is."""
    rows = result["rows"]
    lines: list[tuple[str, ...]] = [("", *(_NAMES[row["model"]] for row in rows))]
    lines.append(("layers", *(str(row["layers"]) for row in rows)))
    lines.append(("parameters", *(_count(row["parameters"]) for row in rows)))
    lines.append(("bytes", *(_size(row["bytes"]) for row in rows)))
    lines.append(("normalised loss", *(f"{row['loss']:.4f}" for row in rows)))
    for name, score in rows[0]["tasks"].items():
        chance = "" if score["chance"] is None else f" (chance {score['chance']:.3g})"
        lines.append((name.removesuffix("/acc") + chance, *(_score(row["tasks"].get(name)) for row in rows)))
    lines.append(("tokens/s, generating", *(f"{row['tokens_per_second']:.1f}" for row in rows)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    dropped = len(rows) > 1 and result["layers"] - len(result["kept"])
    head = (
        f"{result['model']}: {dropped} of {result['layers']} layers dropped, {result['dropped']} "
        f"({result['strategy']}, angular distance {result['distance']:.4f})"
    )
    pictures = ", ".join(name for name in result["figures"] if name.endswith(".png"))
    return "\n".join(
        [head, "", *(line.rstrip() for line in table), ""]
        + [f"checkpoint  {result['checkpoint']}", f"figures     {result['folder']}: {pictures}"]
    )


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    spread = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['value']:.3f}{spread}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
