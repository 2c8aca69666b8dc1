"""The tables and the figure of docs/routing.md, from the records in benchmarks/.

    python docs/make_routing.py

Writes docs/routing.png, and what stands between the marks of docs/routing.md; a test holds the page to the records.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marks import filled_page, read_record

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
STRATEGIES = {"angular": ("angular cut", "#7f7f7f", "-"), "last": ("last n", "#7f7f7f", ":")}
COLOURS = ("#0072B2", "#D55E00")
"""Of the search as it is by default, and with all simulations."""
SHOWN = 0.6
"""Share of the layers from which on accuracy is drawn."""


def read(name: str) -> dict[str, Any]:
    return read_record(BENCHMARKS / name)


def points(made: dict[str, Any]) -> str:
    from layerprune.route_compare import in_points

    difference, low, high = (in_points(made[key]) for key in ("difference", "low", "high"))
    return f"{difference} ({low} to {high}) points"


def verdict(runs: dict[str, Any]) -> str:
    """How often routing won and lost, and what the routers' own choice gave."""
    from layerprune.route_compare import interval, right_answers

    made = [one["against"]["angular"] for run in runs.values() for one in run["measured"]["routed"]]
    won, lost = sum(one["low"] > 0 for one in made), sum(one["high"] < 0 for one in made)
    lines = [
        f"Routers at {len(made)} settings (models, searches, dials) were set beside the angular cut of the same mean depth, not "
        f"healed: they were better at {won}, worse at {lost}, and at {len(made) - won - lost} the items do not decide. The "
        "routers' own choice:",
        "",
    ]
    for name, run in runs.items():
        found = run["measured"]
        own = next(one for one in found["routed"] if one["name"] == "router")
        beside = own["against"]["angular"]
        lines.append(
            f"- {name}: {own['layers']:.2f} of {found['layers']} layers, accuracy {own['accuracy']:.3f} (whole model "
            f"{found['base']['accuracy']:.3f}): {right_answers(beside['difference'])} the cut "
            f"({interval(beside['low'], beside['high'])})."
        )
    return "\n".join(lines)


def table_of_accuracy(runs: dict[str, Any]) -> str:
    """Every dial beside the static cuts of the same mean depth."""
    lines = [
        "| routers of | dial | mean layers | accuracy | angular cut | last n | routing minus angular cut |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        found = run["measured"]
        base = found["base"]
        items = sum(one["items"] for one in found["items"].values())
        lines.append(f"| {name} | whole model, {items} items | {base['layers']:.0f} | {base['accuracy']:.3f} | | | |")
        for one in sorted(found["routed"], key=lambda one: -one["dial"]):
            against = one["against"]
            cuts = {strategy: one["accuracy"] - made["difference"] for strategy, made in against.items()}
            cells = [f"{cuts[strategy]:.3f}" if strategy in cuts else "" for strategy in STRATEGIES]
            told = ""
            if "angular" in against:
                made = against["angular"]
                told = f"**{points(made)}**" if made["low"] > 0 or made["high"] < 0 else points(made)
            lines.append(f"| | {one['name']} | {one['layers']:.2f} | {one['accuracy']:.3f} | {' | '.join(cells)} | {told} |")
    return "\n".join(lines)


def table_of_searches(runs: dict[str, Any]) -> str:
    """What was found, and what that took."""
    lines = [
        "| search of | items | right | better | shorter | layers saved | different paths | paths tried an item | layers run, of "
        "each path by itself | minutes |",
        "|---" * 10 + "|",
    ]
    for name, run in runs.items():
        found, labels = run["search"]["all"], run["search"]["labels"]
        lines.append(
            f"| {name} | {found['items']} | {found['answered'] / found['items']:.1%} | {found['improved']} | {found['shorter']} | "
            f"{found['mean_saved']:.2f} | {labels['paths']} of {labels['items']} | {found['visited'] / found['items']:.1f} | "
            f"{found['run_share']:.2f} | {run['seconds']['paths']['search'] / 60:.0f} |"
        )
    return "\n".join(lines)


def table_of_routers(runs: dict[str, Any]) -> str:
    """How well the routers choose on items that they were not trained on."""
    lines = [
        "| routers of | items, held out | labels skip, repeat | skip: precision, recall, F1 | repeat: precision, recall, F1 | "
        "accuracy (always execute) | macro-F1 | macro-F1, states as they are |",
        "|---" * 8 + "|",
    ]
    for name, run in runs.items():
        made = run["training"]
        held = made["held_out"]
        share = [sum(held["confusion"][c]) / held["layers"] for c in (0, 2)]
        cells = [
            ", ".join("-" if (v := held[what][action]) is None else f"{v:.2f}" for what in ("precision", "recall", "f1"))
            for action in ("skip", "repeat")
        ]
        lines.append(
            f"| {name} | {made['items']}, {made['items'] - made['trained_on']} | {share[0]:.1%}, {share[1]:.1%} | {cells[0]} | "
            f"{cells[1]} | {held['accuracy']:.3f} ({held['always_execute']:.3f}) | {held['macro_f1']:.2f} | "
            f"{run['unscaled']['held_out']['macro_f1']:.2f} |"
        )
    return "\n".join(lines)


def overhead() -> str:
    """What deciding costs in generation, where a GPU has been measured."""
    if not (BENCHMARKS / "route_overhead.json").exists():
        return "What the decision costs on a GPU has not been measured yet (`benchmarks/route_overhead.py`)."
    record = read("route_overhead.json")
    shape = record["shape"]
    runs = record["runs"]

    def each(value: Any) -> str:
        return ", ".join(f"{value(one)} at {one['rows']} row{'s' * (one['rows'] > 1)}" for one in runs)

    routers = each(lambda one: f"{one['share_of_bare']['routers']:.1%}")
    added = each(lambda one: f"{one['share_of_bare']['decide'] - one['share_of_bare']['prefill']:.1%}")
    whole = each(lambda one: f"{one['ratio'] - 1:+.1%} ({min(one['ratios']) - 1:+.0%} to {max(one['ratios']) - 1:+.0%})")
    same = each(lambda one: f"{one['same_tokens']:.0%}")
    return (
        f"On {record['device']}, {shape['layers']} layers of width {shape['hidden']} in {shape['dtype'].removeprefix('torch.')}, "
        f"prompts of {shape['prompt']} and {shape['new']} new tokens, every layer executed. Of the time of transformers' own "
        f"`generate` the routers' arithmetic is {routers}; the pass that decides, which is the prefill, takes {added} more than a "
        f"prefill alone. Whole generations: {whole}; they scatter that much between rounds, since Python sets their pace here. "
        f"{same} of the tokens are those of `generate`: random weights make logits that bfloat16's rounding puts in another order "
        "(in float32 on the CPU all are the same; `benchmarks/route_overhead.py`)."
    )


def sizes(runs: dict[str, Any]) -> str:
    """How large the states are that enter the layers."""
    told = " and ".join(
        f"{min(run['unscaled']['sizes']):.2g} to {max(run['unscaled']['sizes']):.3g} in {name}"
        for name, run in runs.items() if "," not in name
    )  # fmt: skip
    return (
        "The states that enter the layers are of very different size from model to model (root mean square from the first layer "
        f"to the last: {told}), and the paper's routers have no norm."
    )


def tables() -> dict[str, str]:
    """What stands between the page's marks."""
    runs = read("routing.json")["runs"]
    return {
        "verdict": verdict(runs),
        "accuracy": table_of_accuracy(runs),
        "searches": table_of_searches(runs),
        "routers": table_of_routers(runs),
        "sizes": sizes(runs),
        "overhead": overhead(),
    }


def filled(page: str) -> str:
    """The page as the records have it."""
    return filled_page(page, tables())


def draw(target: Path) -> None:
    """A column a model: accuracy against mean depth, and which layers are skipped."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = read("routing.json")["runs"]
    models: dict[str, list[str]] = {}
    for name in runs:
        models.setdefault(name.partition(",")[0], []).append(name)
    figure, grid = plt.subplots(2, len(models), figsize=(11, 6.6), constrained_layout=True, squeeze=False)
    for (model, names), above, below in zip(models.items(), grid[0], grid[1], strict=True):
        first = runs[names[0]]["measured"]
        layers = first["layers"]
        for strategy, (label, colour, dash) in STRATEGIES.items():
            cuts = {c["layers"]: c["accuracy"] for name in names for c in runs[name]["measured"]["static"].get(strategy, [])}
            line = sorted((depth, value) for depth, value in cuts.items() if depth >= SHOWN * layers)
            above.plot(*zip(*line, strict=True), dash, color=colour, label=label, lw=1.5)
        above.plot(layers, first["base"]["accuracy"], "k*", ms=9, label="whole model")
        for name, colour in zip(names, COLOURS, strict=False):
            told = "routed (all simulations)" if "," in name else "routed (search stops at 2 layers fewer)"
            line = sorted((one["layers"], one["accuracy"]) for one in runs[name]["measured"]["routed"])
            line = [point for point in line if point[0] >= SHOWN * layers]
            above.plot(*zip(*line, strict=True), "o-", color=colour, label=told, lw=1.2, ms=4)
            own = next(one for one in runs[name]["measured"]["routed"] if one["name"] == "router")
            above.plot(own["layers"], own["accuracy"], "o", color=colour, mfc="white", ms=9, mew=1.6)
            by_layer = runs[name]["training"]["by_layer"]
            below.plot(by_layer["held_out"]["skip"], "-", color=colour, lw=1.0, alpha=0.55)
            below.plot(by_layer["routers"]["skip"], "s-", color=colour, lw=1.5, ms=3)
        above.set(title=model, xlabel="mean layers")
        below.set(xlabel="layer")
        below.set_ylim(bottom=0)
        for panel in (above, below):
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
    grid[0][0].set_ylabel("accuracy on items not searched", fontsize=9)
    grid[1][0].set_ylabel("share of held-out items that skip\n(squares: routers; pale: labels)", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(target, dpi=110)


def main() -> None:
    page = HERE / "routing.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(HERE / "routing.png")


if __name__ == "__main__":
    main()
