"""The tables and the figure of docs/healing.md, from the records in benchmarks/.

    python docs/make_healing.py

Writes docs/healing.png and docs/healing-seconds.png, and the tables between the marks of docs/healing.md; a test holds the page to
the records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marks import filled_page, read_record

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
PAPER = "all layers, MLP (paper)"
Places = Callable[[str, str, list[list[float]], dict[str, Any]], list[tuple[float, float]]]
MODELS = ("english-32l", "demo model")
SHOWN = {
    PAPER: ("#0072B2", "-"),
    "MLP and attention": ("#009E73", "-"),
    "bridge (projection), then all layers": ("#D55E00", "-"),
    "bridge (projection), MLP and attention": ("#000000", "-"),
    "distilled, all layers": ("#CC79A7", "-"),
    "window of 4": ("#7f7f7f", "--"),
    "after the cut": ("#7f7f7f", ":"),
}


def read(name: str) -> dict[str, Any]:
    return read_record(BENCHMARKS / name)


def table_of_ways(record: dict[str, Any]) -> str:
    """Normalised loss of every way at every fraction; the best of a column is bold."""
    drops = record["drops"]
    names = list(dict.fromkeys(name for drop in drops.values() for name in drop["variants"]))
    names.sort(key=lambda name: (name != PAPER, "alone" in name, name))
    best = {d: min(v["loss"] for v in drop["variants"].values()) for d, drop in drops.items()}
    head = "| way | " + " | ".join(f"drop {float(d):g}" for d in drops) + f" | trained at {float(next(iter(drops))):g} |"
    lines = [head, "|---" * (len(drops) + 2) + "|"]
    lines.append("| not healed | " + " | ".join(f"{drop['cut']:.4f}" for drop in drops.values()) + " | 0 |")
    for name in names:
        cells = []
        for d, drop in drops.items():
            found = drop["variants"].get(name)
            text = "" if found is None else f"{found['loss']:.4f}"
            cells.append(f"**{text}**" if found is not None and found["loss"] == best[d] else text)
        first = next(drop["variants"][name] for drop in drops.values() if name in drop["variants"])
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {first['trained']:,} |")
    return "\n".join(lines)


def table_of_speed(record: dict[str, Any]) -> str:
    """Tokens a second and memory of the plans, against the plain script."""
    rows = record["rows"]
    plain = next(row for name, row in rows.items() if name.startswith("plain"))
    lines = [
        "| | tokens/s | of the plain script | peak GiB | estimated | of the card's matrix rate | plan |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted(rows, key=lambda name: (not name.startswith("plain"), float(name.split()[0]) if name[0].isdigit() else 0))
    for name in order:
        row, plan = rows[name], rows[name].get("plan")
        told = "16 sequences at once, all recomputed"
        if plan:
            told = f"{plan['micro_batch']} at once, {plan['recomputed']} layers recomputed, {plan['decoded']} decoded"
            told += ", compiled" if plan["compiled"] else ""
        lines.append(
            f"| {name} | {row['tokens/s']:,} | {row['tokens/s'] / plain['tokens/s']:.2f} | {row['peak GiB']:.1f} | "
            f"{row.get('estimated GiB', '')} | {row['share of the matrix rate']:.0%} | {told} |"
        )
    return "\n".join(lines)


def step_costs(record: dict[str, Any]) -> tuple[dict[str, float], float]:
    """Seconds of each way against the paper's, and those of one of the paper's steps; ways that are a bridge alone: in all."""
    (drop,) = record["drops"].values()
    seconds = {name: way["seconds"] for name, way in drop["variants"].items()}
    step = seconds[PAPER] / record["settings"]["steps"]
    return {name: s / step if "alone" in name else s / seconds[PAPER] for name, s in seconds.items()}, step


def times_of(name: str, points: list[list[float]], costs: dict[str, float]) -> list[tuple[float, float]]:
    """(time in steps of the paper's way, held-out loss) of a way's curve; a bridge before it takes its time first."""
    begun, way = 0.0, name
    if name.startswith("bridge"):
        bridge, _, rest = name.partition(", ")
        begun = costs[f"{bridge} alone"]
        way = {"then all layers": PAPER, "MLP and attention": "MLP and attention", "window of 4": "window of 4"}[rest]
    each = costs.get(way, 1.0)
    return [(begun + step * each, loss) for step, loss in points]


def loss_at(points: list[tuple[float, float]], time: float) -> float | None:
    """The held-out loss at a time, between two measurements; after the last one that, before the first one None."""
    if time < points[0][0]:
        return None
    for (t0, v0), (t1, v1) in zip(points, points[1:], strict=False):
        if t0 <= time <= t1:
            return v0 + (v1 - v0) * (time - t0) / (t1 - t0)
    return points[-1][1]


def table_of_seconds(
    record: dict[str, Any], timed: dict[str, Any], speed: dict[str, Any] | None = None, shares: Sequence[float] = (0.5, 1.0)
) -> str:
    """What a step of each way costs against the paper's (a token on a GPU: of `speed`), and its loss when these shares of the
    paper's way are through."""
    costs, _ = step_costs(timed)
    steps = record["settings"]["steps"]
    drops = list(record["drops"])
    head = (
        ["way", "time a step, CPU"]
        + ["time a token, H200"] * bool(speed)
        + [f"drop {float(d):g}" + ": half, whole" * (len(shares) > 1) for d in drops]
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    ways = {name: way for drop in record["drops"].values() for name, way in drop["variants"].items()}
    names = [name for name, way in ways.items() if way["held out"] and (name.startswith("bridge") or name in costs)]
    names.sort(key=lambda name: (name != PAPER, name))
    for name in names:
        cells = []
        for d in drops:
            points = times_of(name, record["drops"][d]["variants"][name]["held out"], costs)
            found = [loss_at(points, share * steps) for share in shares]
            cells.append(", ".join("" if v is None else f"{v:.4f}" for v in found))
        first = times_of(name, [[0, 0.0], [1, 0.0]], costs)
        each = f"{first[1][0] - first[0][0]:.2f}" + (f" after {first[0][0]:.1f} steps' time" if first[0][0] else "")
        if speed is not None:
            base, own = (speed["ways"].get(one) for one in ("all layers, MLP", "all layers, MLP" if name == PAPER else name))
            cells.insert(0, "" if own is None else f"{base['tokens/s'] / own['tokens/s']:.2f}")
        cells = [name, each, *cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """The page's tables by their marks."""
    return {
        "ways-english": table_of_ways(read("heal_variants.json")),
        "ways-demo": table_of_ways(read("heal_variants_demo.json")),
        "seconds": table_of_seconds(read("heal_variants.json"), read("heal_ways_cpu.json"), read("heal_speed.json")),
        # its held-out losses lie too far apart to tell them at half
        "seconds-demo": table_of_seconds(read("heal_variants_demo.json"), read("heal_ways_demo_cpu.json"), shares=(1.0,)),
        "speed": table_of_speed(read("heal_speed.json")),
    }


def filled(page: str) -> str:
    """The page with its tables as the records have them."""
    return filled_page(page, tables())


def draw(target: Path) -> None:
    """Held-out loss against tokens trained, a panel a fraction: what each way reaches, and how soon."""

    def tokens(model: str, name: str, points: list[list[float]], record: dict[str, Any]) -> list[tuple[float, float]]:
        each = record["settings"]["batch_size"] * record["settings"]["length"] / 1e3
        return [(step * each, loss) for step, loss in points]

    _draw(target, "thousand tokens trained", tokens)


def _draw(target: Path, axis: str, places: Places) -> None:
    """A panel for each model and fraction; places: a way's (model, name, curve, record) to points of the panel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = {MODELS[0]: read("heal_variants.json"), MODELS[1]: read("heal_variants_demo.json")}
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.4), constrained_layout=True)
    for row, (model, record) in zip(grid, records.items(), strict=True):
        for panel, (d, drop) in zip(row, record["drops"].items(), strict=True):
            ends, right = [], 0.0
            for name, (colour, dash) in SHOWN.items():
                if name in drop["variants"]:
                    points = places(model, name, drop["variants"][name]["held out"], record)
                    panel.plot([x for x, _ in points], [y for _, y in points], dash, color=colour, label=name, lw=1.5)
                    ends.append(points[-1][1])
                    right = points[-1][0] if name == PAPER else right
            low, high = min(ends), max(ends)
            panel.set_ylim(low - 0.15 * (high - low), high + 1.6 * (high - low))
            panel.set_xlim(0, 1.1 * right)
            panel.set_title(f"{model}, drop {float(d):g} (layers {drop['block'][0]}:{drop['block'][1]})", fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
            panel.set_xlabel(axis, fontsize=8)
        row[0].set_ylabel("held-out loss / ln V", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(target, dpi=130)


def draw_seconds(target: Path) -> None:
    """Held-out loss against time: each way's steps by what they cost when timed alone."""
    timed = {MODELS[0]: step_costs(read("heal_ways_cpu.json")), MODELS[1]: step_costs(read("heal_ways_demo_cpu.json"))}

    def minutes(model: str, name: str, points: list[list[float]], record: dict[str, Any]) -> list[tuple[float, float]]:
        costs, step = timed[model]
        return [(time * step / 60, loss) for time, loss in times_of(name, points, costs)]

    _draw(target, "minutes on one core", minutes)


def main() -> None:
    page = HERE / "healing.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(HERE / "healing.png")
    draw_seconds(HERE / "healing-seconds.png")


if __name__ == "__main__":
    main()
