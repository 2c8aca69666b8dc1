"""What `route search` and `route train` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_search(result: Mapping[str, Any]) -> str:
    """What was found by task, and what it cost."""
    whole = result["all"]
    rows = [("", "items", "right", "to learn", "better", "shorter", "layers saved")]
    tasks = result["tasks"]
    for name, found in [*tasks.items(), *([("all", whole)] if len(tasks) > 1 else [])]:
        saved = "-" if found["mean_saved"] is None else f"{found['mean_saved']:.2f}"
        right = f"{100 * found['answered'] / found['items']:.1f} %"
        counts = (found["useful"], found["improved"], found["shorter"])
        rows.append((name, f"{found['items']:,}", right, *(f"{count:,}" for count in counts), saved))
    lines = [f"{result['layers']} layers, up to {result['settings']['simulations']} simulations an item", "", *columns(rows), ""]
    lines += [
        "right: by all layers; better: answered by a path where they do not; shorter: as well, with fewer layers",
        f"{whole['visited']:,} paths tried ({whole['visited'] / whole['items']:.1f} an item); {whole['applications']:,} layers "
        f"run, {whole['run_share']:.2f} of those of running each path by itself",
    ]
    for task, why in result["left_out"].items():
        lines.append(f"{task}: left out: {', '.join(f'{count} with {what}' for what, count in why.items())}")
    return "\n".join([*lines, "", f"{result['folder']}: paths.jsonl, search.json"])


def format_training(result: Mapping[str, Any]) -> str:
    """How well the routers choose on the items that they were not trained on."""
    held, settings = result["held_out"], result["settings"]
    rows = [("", "precision", "recall", "F1", "of the layers")]
    for c, action in enumerate(held["precision"]):
        share = sum(held["confusion"][c]) / held["layers"]
        cells = ("-" if held[what][action] is None else f"{held[what][action]:.2f}" for what in ("precision", "recall", "f1"))
        rows.append((action, *cells, f"{100 * share:.1f} %"))
    out = result["items"] - result["trained_on"]
    lines = [
        f"routers of {result['layers']} layers, {result['parameters'] / 1e6:.2f} M parameters: {settings['epochs']} epochs of "
        f"{result['trained_on']:,} items",
        "",
        f"on {out:,} other items, along their paths:",
        *columns(rows),
        f"accuracy {held['accuracy']:.3f} (executing every layer: {held['always_execute']:.3f}), macro-F1 {held['macro_f1']:.2f}",
    ]
    return "\n".join([*lines, "", f"{result['folder']}: routers/, train.json, figures/learning.png, figures/layers.png"])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines
