"""What `route eval` and `route bake` print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerprune.route_report import columns

_COLUMNS = {"angular": "angular", "last": "last n"}


def format_routing(result: Mapping[str, Any]) -> str:
    """The dials beside static cuts of their depth as a table, and who wins."""
    strategies = list(result["static"])
    static = [f"{_COLUMNS[strategy]} *" for strategy in strategies]
    rows = [("", "layers", "accuracy", *static, "seconds")]
    for one in (result["base"], *result["routed"]):
        beside = [_beside(one, strategy) for strategy in strategies]
        name = "whole model" if one["name"] == "execute" else f"dial {one['name']}"
        rows.append((name, f"{one['layers']:.2f}", f"{one['accuracy']:.4f}", *beside, f"{one['seconds']:.1f}"))
    lines = [_items(result), "", *columns(rows)]
    if strategies:
        lines.append("* the static cut of the same mean depth")
    tasks = list(result["items"])
    main = next((one for one in result["routed"] if one["name"] == "router"), next(iter(result["routed"]), None))
    if len(tasks) > 1 and main is not None:
        rows = [(f"dial {main['name']}", "items", "layers", "accuracy", *static, "whole model")]
        for task in tasks:
            own, whole = main["tasks"][task], result["base"]["tasks"][task]["accuracy"]
            beside = [_beside(main, strategy, task) for strategy in strategies]
            items = f"{result['items'][task]['items']:,}"
            rows.append((task, items, f"{own['layers']:.2f}", f"{own['accuracy']:.4f}", *beside, f"{whole:.4f}"))
        lines += ["", *columns(rows)]
    told = [] if main is None else list(dict.fromkeys(made["sentence"] for made in main["against"].values()))
    lines += ["", *told] if told else []
    return "\n".join([*lines, "", f"{result['folder']}: eval.json, figures/routing.png, figures/usage.png"])


def _items(result: Mapping[str, Any]) -> str:
    counts = result["items"].values()
    measured, left = (sum(task[key] for task in counts) for key in ("items", "left_out"))
    told = f"; {left:,} more were in the search of the routers" if left else ""
    unknown = "" if result["searched_known"] else "; the routers do not say which items they learnt from: none is left out"
    return f"{result['model']}: {result['layers']} layers, {measured:,} items{told}{unknown}"


def _beside(one: Mapping[str, Any], strategy: str, task: str | None = None) -> str:
    """The accuracy of the static cut as deep, by what the comparison says."""
    against = one["against"].get(strategy)
    if against is None:
        return "-"
    own, against = (one, against) if task is None else (one["tasks"][task], against["tasks"][task])
    return f"{own['accuracy'] - against['difference']:.4f}"


def format_baked(result: Mapping[str, Any]) -> str:
    """What the routers do with each layer, and how the layers that they always skip are cut."""
    paths, shares = result["paths"], [result[name] for name in ("skip", "execute", "repeat")]
    lines = [
        f"{result['model']}: {result['layers']} layers, {result['prompts']:,} prompts, {paths['different']:,} different paths "
        f"(the most frequent on {_percent(paths['share'])} of the prompts)"
    ]
    moved = [layer for layer in range(result["layers"]) if shares[1][layer] < 1]
    if moved:
        rows: list[tuple[str, ...]] = [("layer", "skipped", "executed", "repeated")]
        rows += [(str(layer), *(_percent(share[layer]) for share in shares)) for layer in moved]
        lines += ["", *columns(rows), *([] if len(moved) == result["layers"] else ["all others are executed on every prompt"])]
    which = "on every prompt" if result["always"] == 1 else f"on {_percent(result['always'])} of the prompts or more"
    if not result["dropped"]:
        nearest = ", ".join(f"{layer} (on {_percent(share)})" for layer, share in result["nearest"] if share)
        told = f"nearest: layer {nearest}" if nearest else "none is skipped on any"
        lines += ["", f"No layer is skipped {which} ({told}): there is nothing to cut for good."]
    else:
        blocks = ", ".join(f"{start}:{stop}" for start, stop in reversed(result["blocks"]))
        lines += ["", f"Skipped {which}: layers {blocks} (0-based, half-open)."]
        lines.append(f"Without them the model is the routed one on {_percent(result['same'])} of the prompts.")
        if result["refused"]:
            lines.append(f"It cannot be written as a checkpoint: {result['refused']}")
        elif len(result["commands"]) > 1:
            lines.append(f"They are {len(result['commands'])} blocks, and `prune` cuts one at a time, from the deepest on:")
        lines += result["commands"]
    return "\n".join([*lines, "", f"{result['folder']}: cut.json"])


def _percent(share: float) -> str:
    """A share in per cent; 100 and 0 are exact."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{min(max(100 * share, 0.1), 99.9):.1f} %"
