"""The tables and the figure of docs/healing.md, from the records in benchmarks/.

    python docs/make_healing.py

Writes docs/healing.png, and the tables between the marks of docs/healing.md; a test holds the page to the records.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marks import filled_page, read_record

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
PAPER = "all layers, MLP (paper)"
SHOWN = {
    PAPER: ("#0072B2", "-"),
    "MLP and attention": ("#009E73", "-"),
    "bridge (projection), then all layers": ("#D55E00", "-"),
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
    head = "| way | " + " | ".join(f"drop {float(d):g}" for d in drops) + " | trained parameters |"
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


def tables() -> dict[str, str]:
    """The page's tables by their marks."""
    return {
        "ways-english": table_of_ways(read("heal_variants.json")),
        "ways-demo": table_of_ways(read("heal_variants_demo.json")),
        "speed": table_of_speed(read("heal_speed.json")),
    }


def filled(page: str) -> str:
    """The page with its tables as the records have them."""
    return filled_page(page, tables())


def draw(target: Path) -> None:
    """Held-out loss against tokens trained, a panel a fraction: what each way reaches, and how soon."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = {"english-32l": read("heal_variants.json"), "demo model": read("heal_variants_demo.json")}
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.4), constrained_layout=True)
    for row, (model, record) in zip(grid, records.items(), strict=True):
        settings = record["settings"]
        each = settings["batch_size"] * settings["length"] / 1e3
        for panel, (d, drop) in zip(row, record["drops"].items(), strict=True):
            ends = []
            for name, (colour, dash) in SHOWN.items():
                if name in drop["variants"]:
                    points = drop["variants"][name]["held out"]
                    panel.plot([s * each for s, _ in points], [v for _, v in points], dash, color=colour, label=name, lw=1.5)
                    ends.append(points[-1][1])
            low, high = min(ends), max(ends)
            panel.set_ylim(low - 0.15 * (high - low), high + 1.6 * (high - low))
            panel.set_title(f"{model}, drop {float(d):g} (layers {drop['block'][0]}:{drop['block'][1]})", fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
        row[0].set_ylabel("held-out loss / ln V", fontsize=9)
        for panel in row:
            panel.set_xlabel("thousand tokens trained", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(target, dpi=130)


def main() -> None:
    page = HERE / "healing.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(HERE / "healing.png")


if __name__ == "__main__":
    main()
