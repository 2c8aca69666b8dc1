"""What an evaluation of routers found, from its parts: accuracies, depths, usage of the layers, and the comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused
from layerprune.model.files import read_json
from layerprune.model.source import ModelSource
from layerprune.route_compare import CONFIDENCE, compare, depths_around, sentence
from layerprune.runfolder import RunFolder


@dataclass(frozen=True)
class Plan:
    """What is measured, checked as far as that goes without the model. dials: by name, `execute` first."""

    source: ModelSource
    routers: Path
    wanted: Any
    dials: dict[str, float]
    strategies: tuple[str, ...]
    ranking: dict[str, Any] | None
    layers: int
    searched: frozenset[str] | None
    seed: int
    dtype: str
    device: str | None
    trust: bool
    inputs: dict[str, Any]


def routed_file(name: str) -> str:
    return f"parts/dial-{name}.json"


def static_file(strategy: str, stay: int) -> str:
    return f"parts/{strategy}-{stay}.json"


def left(plan: Plan, part: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """The items of a part that were not in the search, by task. Raises Refused where a task has none."""
    searched = plan.searched or frozenset()
    found = {}
    for task, made in part["tasks"].items():
        places = [i for i, keys in enumerate(made["keys"]) if not searched.intersection(keys)]
        if not places:
            raise all_searched(task, len(made["keys"]))
        found[task] = {"places": places, **{key: [made[key][i] for i in places] for key in ("right", "paths")}}
    return found


def all_searched(task: str, items: int) -> Refused:
    return Refused(f"all {items} items of {task} were in the search of these routers: measure on another --split or others")


def mean_layers(tasks: Mapping[str, Mapping[str, Any]]) -> tuple[float, dict[str, float]]:
    """Mean layers of a token's way, on average over tasks and by task."""
    by_task = {task: sum(usage(made["paths"])) for task, made in tasks.items()}
    return sum(by_task.values()) / len(by_task), by_task


def usage(paths: Sequence[Sequence[str]]) -> list[float]:
    """How often each layer runs, the mean over items (and over the contexts of an item)."""
    import numpy as np

    mean_NL = np.array([np.mean([[int(digit) for digit in path] for path in one], axis=0) for one in paths])
    found: list[float] = mean_NL.mean(axis=0).tolist()
    return found


def summarise(plan: Plan, opened: RunFolder) -> dict[str, Any]:
    """What eval.json says, from the parts."""
    from layerprune.eval.collapse import accuracy_interval

    def read(file: str) -> Any:
        return read_json(opened.path / file)

    def scored(right: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        tasks = {}
        for task, values in right.items():
            low, high = accuracy_interval(list(values))
            tasks[task] = {"accuracy": sum(values) / len(values), "low": float(low), "high": float(high)}
        return {"accuracy": sum(t["accuracy"] for t in tasks.values()) / len(tasks), "tasks": tasks}

    parts = {name: read(routed_file(name)) for name in plan.dials}
    kept = {name: left(plan, part) for name, part in parts.items()}
    cuts: dict[str, dict[int, Any]] = {}
    for strategy in plan.strategies:
        found = {stay: opened.path / static_file(strategy, stay) for stay in range(1, plan.layers + 1)}
        cuts[strategy] = {stay: read_json(path) for stay, path in found.items() if path.exists()}
    any_tasks = kept["execute"]
    right_of = {
        strategy: {
            stay: {task: [cut["right"][task][i] for i in any_tasks[task]["places"]] for task in any_tasks}
            for stay, cut in by_stay.items()
            if cut["right"] is not None
        }
        for strategy, by_stay in cuts.items()
    }
    routed = []
    for name, value in plan.dials.items():
        mean, by_task = mean_layers(kept[name])
        right = {task: made["right"] for task, made in kept[name].items()}
        one = {"dial": value, "name": name, "layers": mean, **scored(right)}
        for task, depth in by_task.items():
            one["tasks"][task]["layers"] = depth
        one |= {key: parts[name][key] for key in ("seconds", "building_seconds", "truncated")}
        one["usage"] = {task: usage(made["paths"]) for task, made in kept[name].items()}
        one["against"] = {
            strategy: made for strategy in plan.strategies
            if (made := _against(plan, right, right_of[strategy], mean, by_task, name, strategy)) is not None
        }  # fmt: skip
        routed.append(one)
    return {
        "model": plan.source.name, "layers": plan.layers, "routers": str(plan.routers),
        "searched_known": plan.searched is not None,
        "items": {
            task: {
                "items": len(made["right"]), "left_out": len(parts["execute"]["tasks"][task]["right"]) - len(made["right"]),
                "chance": parts["execute"]["tasks"][task]["chance"],
            }
            for task, made in any_tasks.items()
        },
        "base": routed[0], "routed": routed[1:],
        "static": {
            strategy: [
                {"layers": stay, "kept": cuts[strategy][stay]["kept"], **scored(right)} for stay, right in by_stay.items()
            ]
            for strategy, by_stay in right_of.items()
        },
        "confidence": CONFIDENCE,
    }  # fmt: skip


def _against(
    plan: Plan, right: Mapping[str, list[int]], static: Mapping[int, Mapping[str, list[int]]], mean: float,
    by_task: Mapping[str, float], dial: str, strategy: str,
) -> dict[str, Any] | None:  # fmt: skip
    """The comparison with one strategy; None where the model does not run under a cut that it needs."""
    by_depth = {task: {stay: static[stay][task] for stay in static} for task in right}
    if dial == "execute" or not all(depths_around(depth, plan.layers) <= static.keys() for depth in (mean, *by_task.values())):
        return None
    whole = compare(right, by_depth, mean, plan.layers, plan.seed)
    each = {
        task: asdict(compare({task: right[task]}, {task: by_depth[task]}, depth, plan.layers, plan.seed))
        for task, depth in by_task.items()
    }
    return {**asdict(whole), "sentence": sentence(whole, dial, strategy), "tasks": each}
