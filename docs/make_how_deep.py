"""The numbers and the figures of docs/how-deep.md, from the records in benchmarks/.

    python docs/make_how_deep.py

Writes docs/depth-prunability.png and docs/depth-choices.png, and what stands between the marks of docs/how-deep.md; a test
holds the page to the records.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marks import filled_page, read_record

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
MODELS = {"english-32l": "depth_english.json", "demo": "depth_demo.json"}
SIZES = (1, 2, 4, 6, 8, 12, 16, 18)
LEAST = 0.1
"""A change of the answer's distribution above which a token counts as needed; tokens with less of everything are not shown."""


def read(name: str) -> dict[str, Any]:
    return read_record(BENCHMARKS / name)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def claims() -> str:
    from layerprune.depth.effective import effective_depth

    models = read("depth.json")["models"]
    english, demo = models["english-32l"], models["demo"]
    depth = {name: effective_depth(m["residual"], m["lens"]) for name, m in models.items()}
    erasing = {name: [i for i, v in enumerate(m["residual"]["cos_att"]) if v < 0] for name, m in models.items()}
    mlp = {name: [i for i, v in enumerate(m["residual"]["cos_mlp"]) if v < 0] for name, m in models.items()}
    mean = {name: min(map(sum, zip(*(m["residual"][f"cos_{part}"] for part in ("att", "mlp", "layer")), strict=True)))
            for name, m in models.items()}  # fmt: skip
    assert min(mean.values()) > 0

    def shares(model: dict[str, Any]) -> str:
        return " / ".join(f"{depth[model][name]['ratio']:.2f}" for name in ("kl", "overlap"))

    def said(model: dict[str, Any], first: int, last: int) -> str:
        return span([100 * line[0] for line in model["tokens"]["share"][first : last + 1]])

    def flips(model: dict[str, Any], first: int, last: int, groups: slice = slice(1)) -> str:
        return span([100 * rate for line in model["tokens"]["flip_rate"][first : last + 1] for rate in line[groups]])

    def decided(model: dict[str, Any]) -> str:
        return f"yes: {model['tokens']['decided'][0][0]:.1f} against {model['tokens']['decided'][-1][0]:.1f}"

    letters = demo["choices"]["demo_letters"]
    listed = next(i for i in range(len(letters["listed"])) if min(letters["listed"][i:]) > 0.95)
    top = max(range(24), key=lambda i: demo["tokens"]["share"][i][0])
    rows = [
        ["erasing gives way to amplifying (cosine turns from below 0 to above)",
         *(f"no: the mean of the three cosines is never below 0; attention's is in layers {listing(erasing[name])}, the MLP's in "
           f"{listing(mlp[name]) if mlp[name] else 'none'}" for name in ("english-32l", "demo"))],
        ["effective depth is a stable share: (layer + 1) / layers, by KL / by overlap", shares("english-32l"), shares("demo")],  # type: ignore[arg-type]
        ["the lens says the ten most frequent tokens first (arXiv 2510.18871, by a tuned lens)",
         f"no, by the logit lens: {said(english, 6, 17)} % of top-1 tokens in layers 6 to 17, "
         f"{100 * english['tokens']['share_final'][0]:.0f} % of the final ones",
         f"a little: {100 * demo['tokens']['share'][top][0]:.0f} % in layer {top}, "
         f"{100 * demo['tokens']['share_final'][0]:.0f} % in the end"],
        ["early frequent guesses are overturned", *(
            f"{flips(model, *some)} % in layers {some[0]} to {some[1]}, and of rarer ones {flips(model, *some, slice(1, None))} %"
            for model, some in ((english, (1, 7)), (demo, (0, 5))))],
        ["frequent tokens are decided earlier (first layer with rank 1; top 10 against the rest)", decided(english), decided(demo)],
        ["multiple choice: first the options are found, then one is chosen", "",
         f"yes, sharply: all four letters are among the top 8 tokens from layer {listed} on, and the best of them by the "
         f"lens is the model's in {100 * letters['chosen'][-3]:.0f} % of items at the input of layer 22, in "
         f"{100 * letters['chosen'][-2]:.0f} % at that of 23"],
    ]  # fmt: skip
    yes = demo["choices"]["demo_yesno"]["right"]
    return table(["claim", "english-32l", "demo model"], rows) + (
        "\n\nOn the demo's yes/no questions the lens at the input of the last layer is right in "
        f"{100 * yes[-2]:.1f} % of items and the model itself in {100 * yes[-1]:.1f} %: the last layer makes it worse. Why is not "
        "known."
    )


def cuts() -> str:
    rows, lines = [], []
    for name, file in MODELS.items():
        found = read(file)["prunability"]
        angular, last = ({cut["n"]: cut for cut in found["cuts"][kind]} for kind in ("angular", "last"))
        for kind, some in (("angular", angular), ("last n", last)):
            cells = [f"{some[n]['loss']:.3f} ({some[n]['start']})" if n in some else "" for n in SIZES]
            rows.append([name, kind, f"{found['whole']:.3f}", *cells])
        ahead = [n for n in angular if angular[n]["loss"] < last[n]["loss"]]
        behind = [n for n in angular if angular[n]["loss"] > last[n]["loss"]]
        correlation = found["rank_correlation"]
        lines.append(
            f"- {name}: angle and skip effect put the layers in much the same order (rank correlation "
            f"{correlation['angle_skip']:.2f}, without layer 0 {correlation['angle_skip_without_layer_0']:.2f}). Of cuts of 1 to "
            f"{max(angular)} layers the angular one is better at {listing(ahead)}, the last n at {listing(behind)}."
        )
    return table(["model", "cut", "whole", *(f"n = {n}" for n in SIZES)], rows) + "\n\n" + "\n".join(lines)


def prompts() -> str:
    parts = []
    for name, file in MODELS.items():
        record = read(file)
        erased, own = record["erasure"], record["gradients"]
        cut = len(own["tokens"]) - own["answer_tokens"]
        layers = (0, record["layers"] // 4, record["layers"] // 2, 3 * record["layers"] // 4, record["layers"] - 1)
        rows, left = [], 0
        for t, text in enumerate(own["tokens"][:-1]):
            column, shares = [row[t] for row in erased["max"]], [own["map"][layer][t] for layer in layers]
            needed = [depth for depth, value in enumerate(column) if value > LEAST]
            if not needed and max(map(abs, shares)) <= LEAST:
                left += 1
                continue
            rows.append([f"`{text}`", hundredths(max(column)), str(needed[-1]) if needed else "none", *map(hundredths, shares)])
        head = ["token", "erased: largest change", f"last depth above {LEAST}", *(f"gradients, layer {layer}" for layer in layers)]
        answer, count = "".join(own["tokens"][cut:]), own["answer_tokens"]
        likely = "probability" if count == 1 else f"probabilities of its {count} tokens, summed:"
        parts.append(
            f"{name}, answer `{answer}`, {likely} {own['probability']:.2f}; gradients took {min(own['points'])} to "
            f"{max(own['points'])} points a layer and miss at most {own['worst']:.4f}"
            f"{f' ({left} tokens with at most {LEAST} of everything are not shown)' if left else ''}:\n\n" + table(head, rows)
        )
    return "\n\n".join(parts)


def lenses() -> str:
    parts = []
    for name, file in MODELS.items():
        record = read(file)
        own, training = record["tuned"], record["tuned"]["training"]
        layers = [*range(0, record["layers"], 4), record["layers"] - 1]
        rows = [
            [f"{label}, {lens} lens", *(form(own[lens][value][layer]) for layer in layers)]
            for value, label, form in (
                ("kl_final", "KL(final ‖ lens), nats", hundredths),
                ("top1", "top-1 agreement", percent),
            )
            for lens in ("tuned", "logit")
        ]
        lower = sum(a < b for a, b in zip(own["tuned"]["kl_final"], own["logit"]["kl_final"], strict=True))
        parts.append(
            f"{name}, {training['steps']} steps, {training['tokens']:,} tokens of {training['documents']:,} documents, "
            f"repeats counted; the tuned lens's KL is lower in {lower} of {record['layers']} layers:\n\n"
            + table(["layer", *map(str, layers)], rows)
        )
    return "\n\n".join(parts)


def words() -> str:
    found = read(MODELS["english-32l"])["words"]
    first, tenth = found["ranks"].index(1), found["ranks"].index(10)
    order = sorted(range(len(found["groups"])), key=lambda g: found["decided"][g][first])
    rows = [
        [found["groups"][g], f"{found['marked'][g]:,}", f"{found['predicted'][g]:,}", f"{found['decided'][g][first]:.1f}",
         f"{found['decided'][g][tenth]:.1f}", f"{found['kept'][g][first]:.1f}"]
        for g in order
    ]  # fmt: skip
    head = ["part of speech", "words", "predicted", "first layer with rank 1", "with rank 10", "keeps rank 1 from"]
    return f"english-32l, tags by {found['tagger']}:\n\n" + table(head, rows)


def cost() -> str:
    models = read("depth_cost.json")["models"]
    told = [
        f"`{probe}` "
        + " and ".join(
            f"{found[probe]['ratio']:.1f} times ({name}; {min(found[probe]['ratios']):.1f} to {max(found[probe]['ratios']):.1f})"
            for name, found in models.items()
        )
        for probe in ("residual", "lens")
    ]
    parts = " and ".join(f"{sorted(found['lens']['to_parts'])[1]:.1f} times ({name})" for name, found in models.items())
    skip = {found["skip"]["all"]["times_fewer"] for found in models.values()}
    assert skip == {2.0}
    return (
        f"Against a bare pass over the same batches, {told[0]}, {told[1]}: it runs the head, a softmax and a top 5 for every "
        f"layer, and takes {parts} as long as a bare pass and these alone. The skip map runs half of the layers that one whole "
        "pass for each skip would.\n\n" + on_gpu()
    )


def on_gpu() -> str:
    """What the probes cost at the shape of a large model."""
    record = read("depth_gpu.json")
    ((name, found),) = record["models"].items()
    residual = found["residual"]
    return (
        f"On {record['device']} at the shape of {name} ({found['layers']} layers, random bf16 weights, {found['documents']} "
        f"documents of {record['shape']['length']} tokens): `residual` {residual['ratio']:.2f} times a bare pass "
        f"({min(residual['ratios']):.2f} to {max(residual['ratios']):.2f}), `lens` {found['lens']['ratio']:.2f} times, which is "
        f"{sorted(found['lens']['to_parts'])[2]:.2f} times a bare pass and head, softmax and top 5 of each layer alone."
    )


def hundredths(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def span(values: Sequence[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"


def listing(numbers: Sequence[int]) -> str:
    """Numbers in words, runs of three and more as ranges."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    shown = [text for run in runs for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    return "none" if not shown else " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


BLOCKS: dict[str, Callable[[], str]] = {
    "claims": claims, "cuts": cuts, "prompts": prompts, "lenses": lenses, "words": words, "cost": cost
}  # fmt: skip


def filled(page: str) -> str:
    """The page with what stands between its marks made anew."""
    return filled_page(page, {name: make() for name, make in BLOCKS.items()})


def draw(target: Path) -> None:
    from layerprune.depth_maps import plot_prunability

    _draw(target, plot_prunability, {name: read(file)["prunability"] for name, file in MODELS.items()})


def draw_choices(target: Path) -> None:
    from layerprune.depth_plots import plot_choices

    models = read("depth.json")["models"]
    _draw(target, plot_choices, {name: found["choices"] for name, found in models.items() if "choices" in found})


def _draw(target: Path, plot: Callable[..., list[Path]], values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (made,) = (path for path in plot(values, folder) if path.suffix == ".png")
        target.write_bytes(made.read_bytes())


def main() -> None:
    page = HERE / "how-deep.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(HERE / "depth-prunability.png")
    draw_choices(HERE / "depth-choices.png")


if __name__ == "__main__":
    main()
