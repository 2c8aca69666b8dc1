"""Write the tables of docs/scale.md from the planner that runs.

    python docs/make_scale.py
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from marks import filled_page, read_record

from layerprune.model.cuts import Kept
from layerprune.model.errors import Refused
from layerprune.model.estimate import DEVICES, Device
from layerprune.model.recipes import Shape, load_recipe
from layerprune.model.streamplan import last_branches, plan_streaming, rank_branches

PAGE = Path(__file__).parent / "scale.md"
CPU = PAGE.parents[1] / "benchmarks" / "streaming_cpu.json"
GPU = CPU.with_name("streaming_gpu.json")
DISK = 3e9
HOST = 64_000_000_000
SCRATCH = 1_000_000_000_000
CARDS: dict[str, tuple[int, Device]] = {
    # 40 % of 165 TFLOP/s: the share that an H100 sustains, of the dense bf16 rate of a consumer card with 24 GB
    "24 GB": (24_000_000_000, replace(DEVICES["h100"], name="24 GB card", forward_rate=0.4 * 165e12)),
    "80 GB": (80_000_000_000, DEVICES["h100"]),
}
LLAMA_405B = Shape(
    layers=126, hidden=16_384, vocab=128_256, parameters=405_853_388_800, mlp=53_248,
    layer_parameters=2 * 16_384 * 16_384 + 2 * 1024 * 16_384 + 3 * 16_384 * 53_248 + 2 * 16_384,
)  # fmt: skip
QWEN_235B = Shape(
    # 94 layers of 128 experts with width 1,536, 8 of them used; 64 heads of 128, 4 of keys and values
    layers=94, hidden=4096, vocab=151_936, parameters=235_093_634_560, mlp=8 * 1536,
    layer_parameters=2 * 4096 * 8192 + 2 * 4096 * 512 + 128 * 3 * 4096 * 1536 + 128 * 4096 + 2 * 4096 + 2 * 128,
)  # fmt: skip
QWEN_ACTIVE = (2 * 4096 * 8192 + 2 * 4096 * 512 + 8 * 3 * 4096 * 1536 + 128 * 4096) / (QWEN_235B.layer_parameters or 1)


def models() -> dict[str, tuple[Shape, float]]:
    return {
        "Llama-2-70B": (load_recipe("llama-2-70b").shape, 1.0),
        "Llama-3.1-405B": (LLAMA_405B, 1.0),
        "Qwen3-235B-A22B": (QWEN_235B, QWEN_ACTIVE),
    }


def steps(shape: Shape) -> dict[str, tuple[list[Kept], bool]]:
    return {"rank": (rank_branches(shape.layers), False), "sweep, last n": (last_branches(shape.layers), True)}


def table() -> str:
    rows = [
        "| model | card | step | passes | read | states, and where | GPU memory | reading | computing |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, (shape, active) in models().items():
        for card, (memory, device) in CARDS.items():
            for step, (kept, heads) in steps(shape).items():
                try:
                    cost = plan_streaming(
                        shape, kept, device, name=step, data="c4", samples=256, length=2048, memory=memory, ram=HOST,
                        disk_rate=DISK, heads=heads, active=active, scratch=SCRATCH,
                    )  # fmt: skip
                except Refused as refusal:
                    rows.append(f"| {model} | {card} | {step} | does not fit: {str(refusal).split(': ')[1]} | | | | | |")
                    continue
                plan = cost.plan
                held = plan.fixed + plan.here
                places = ((plan.here, "GPU"), (plan.host, "host"), (plan.file, "file"))
                states = " + ".join(f"{size / 1e9:.1f} GB {place}" for size, place in places if size)
                rows.append(
                    f"| {model} | {card} | {step} | {len(plan.groups)} | {plan.read / 1e9:,.0f} GB | {states} "
                    f"| {held / 1e9:.1f} GB | {_time(cost.read_hours)} | {_time(cost.compute_hours)} |"
                )
    return "\n".join(rows)


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def measured() -> str:
    """What the records say."""
    if not CPU.exists():
        return "Nothing yet."
    record = read_record(CPU)
    shape = record["shape"]
    rows = [
        f"{record['device']}; a random bf16 checkpoint of the shape {shape['name']} ({shape['layers']} layers, "
        f"{record['rank']['read'] / 1e9:.1f} GB of layers), computed in bf16, `--ram 4GiB`, {shape['documents']} documents of "
        f"{shape['length']} tokens (`benchmarks/streaming.py`):",
        "",
        "| | passes | read / stored | planned memory | peak of the process | seconds |",
        "|---|---|---|---|---|---|",
    ]
    names = {"read": "all layers brought in, nothing computed", "rank": "rank", "sweep": "loss at all depths, last n"}
    for key, name in names.items():
        one = record[key]
        told = " ".join(one["plan"])
        sizes = [float(n) for n in re.findall(r"([\d.]+) GB (?:in host memory|of states|of weights)", told)]
        planned = f"{sum(sizes) * 1e9 / 2**30:.2f} GiB" if sizes else ""
        rows.append(
            f"| {name} | {one['passes']} | {one['read_of_checkpoint']:.3f} | {planned} | {one['rss_peak'] / 2**30:.2f} GiB "
            f"| {one['seconds']:.0f} |"
        )
    return "\n".join(rows)


def measured_on_gpu() -> str:
    """What the GPU's record says."""
    record = read_record(GPU)
    shape = record["shape"]
    rows = [
        f"{record['device']}; a random bf16 checkpoint of the shape {shape['name']} ({shape['layers']} layers, "
        f"{record['rank']['read'] / 1e9:.1f} GB of layers) in the page cache, `--memory 6GiB`, {shape['documents']} documents of "
        f"{shape['length']} tokens:",
        "",
        "| | seconds | of the GPU's memory | of the slower of reading and computing | largest difference from the loaded model |",
        "|---|---|---|---|---|",
    ]
    names = {
        "bare": "the layers' bytes to the GPU, a few lines of plain code", "read": "all layers brought in, nothing computed",
        "resident-rank": "rank, the model loaded", "rank": "rank, streamed",
        "resident-sweep": "loss at all depths, the model loaded", "sweep": "loss at all depths, streamed",
    }  # fmt: skip
    for key, name in names.items():
        one = record[key]
        share = f"{one['share']:.2f}" if "share" in one else ""
        apart = "" if "share" not in one else f"{one['largest_difference']:.0e}" if one["largest_difference"] else "0"
        rows.append(f"| {name} | {one['seconds']:.2f} | {one['gpu_peak'] / 2**30:.2f} GiB | {share} | {apart} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """The page with its tables as they must be."""
    return filled_page(text, {"plans": table(), "measured": measured(), "gpu": measured_on_gpu()})


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
