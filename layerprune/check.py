"""Check a recipe without loading anything: all faults at once, then what a run will need."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerprune.model.cuts import Kept
from layerprune.model.errors import Refused, UsageError
from layerprune.model.estimate import DEVICES, estimate, shape_of_checkpoint
from layerprune.model.memory import byte_count
from layerprune.model.passplan import PROCESS_BYTES
from layerprune.model.recipes import EvalSettings, RankSettings, Recipe, load_recipe, read_recipe, recipe_names

DISK_RATE = 3e9
"""Bytes a second that a checkpoint is read with in the estimates: an ordinary NVMe disk."""
_STEPS = {"rank": "ranking", "heal": "healing", "loss": "the loss"}
"""Steps that may not fit in the memory, even layer by layer, as `too_large` names them."""


def check_recipe_file(
    name_or_path: str | Path,
    drop: float = 0.4,
    device: str = "h100",
    memory: str | int | None = None,
    ram: str | int | None = None,
) -> dict[str, Any]:
    """Check a recipe (its name, a YAML file, or a local checkpoint folder) and estimate a run of it.

    drop: the fraction of layers to drop. device: `h100` or `cpu`, whose rate gives the hours. memory, ram: of the GPU and of
    the host, bytes or text such as `24GiB` (80 GB and 64 GB; on the CPU 16 GB of the host's): a model that does not fit is
    ranked and measured layer by layer, and `streamed` holds the plans for that. `limit`: of the GPU's memory, or on the
    CPU of the host's. `too_large` names the steps that do not fit even so, and `healing_verdict` says what would do where healing
    is one of them (else it is empty).
    Returns what `format_check` prints; sizes in bytes. Raises Refused with every fault of the recipe,
    UsageError for a name that is no recipe and for a fraction that drops no or all layers.
    """
    if device not in DEVICES:
        raise UsageError(f"{device!r} is no device of the estimates: use {' or '.join(DEVICES)}")
    recipe, stored_bytes = _find(str(name_or_path))
    gpu, host = byte_count(memory, "--memory"), byte_count(ram, "--ram")
    if device == "cpu" and gpu is not None:
        raise UsageError("--memory is the GPU's: use --ram for the host's memory, or --device h100")
    found = estimate(recipe, drop, DEVICES[device], stored_bytes)
    limits = _limits(device, gpu, host, ram if device == "cpu" else memory)
    lines, too_large = _streamed(recipe, device, stored_bytes, limits)
    healing = _healing_verdict(next(step.memory for step in found.steps if step.name == "heal"), device, limits)
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        "origin": recipe.origin,
        "note": recipe.note,
        "shape": asdict(recipe.shape),
        "drop": drop,
        "device": DEVICES[device].name,
        "heal": {"length": recipe.heal.length or 2048, "batch_size": recipe.heal.batch_size},
        "limit": limits.healing,
        "streamed": lines,
        "too_large": too_large + ([_STEPS["heal"]] if healing else []),
        "healing_verdict": healing,
        **asdict(found),
    }


@dataclass(frozen=True)
class _Limits:
    """Bytes of the GPU (None on the CPU) and of the host; told: the one that healing must fit in, in words."""

    memory: int | None
    ram: int
    told: str

    @property
    def healing(self) -> int:
        """Of the GPU where there is one: what healing, and a model that is loaded whole, must fit in."""
        return self.ram if self.memory is None else self.memory


def _limits(device: str, gpu: int | None, host: int | None, asked: str | int | None) -> _Limits:
    """asked: what the user gave for the one that healing must fit in."""
    memory = None if device == "cpu" else gpu or 80_000_000_000
    ram = host or (16_000_000_000 if device == "cpu" else 64_000_000_000)
    option, given = ("--ram", host) if memory is None else ("--memory", gpu)
    told = f"the {_with_unit(given, asked)} of {option}" if given else f"{size(memory or ram)}, which {option} would change"
    return _Limits(memory, ram, told)


def _healing_verdict(need: float, device: str, limits: _Limits) -> str:
    """What would do where healing does not fit; empty where it does."""
    if limits.memory is None:
        need += PROCESS_BYTES
    elif limits.ram < PROCESS_BYTES:
        return (
            f"Healing does not fit: Python, torch and transformers alone take {size(PROCESS_BYTES)} of the host's memory, more "
            f"than the {size(limits.ram)} of --ram."
        )
    if need <= limits.healing:
        return ""
    least = f"{math.ceil(need / 1e8) / 10:.1f}GB"
    ways = f"--ram {least}" if device == "cpu" else f"--memory {least}, several GPUs with recipes/accelerate/fsdp.yaml"
    return (
        f"Healing does not fit: it takes {size(need)}, more than {limits.told}, however ranking and loss are streamed. What would "
        f"do: at least {ways}, or no healing (--no-heal)."
    )


def _streamed(recipe: Recipe, device: str, stored: float, limits: _Limits) -> tuple[list[str], list[str]]:
    """How ranking and the whole last-n curve are computed where the weights do not fit, and which of them does not fit even so;
    nothing where the weights do."""
    from layerprune.model.streamplan import last_branches, plan_streaming, rank_branches

    kind, shape = DEVICES[device], recipe.shape
    memory, ram = limits.memory, limits.ram
    if shape.parameters * kind.weight_bytes + (2 << 30) <= (ram if memory is None else memory):
        return [], []
    lines, too_large = [], []
    wanted: list[tuple[str, list[Kept], RankSettings | EvalSettings, bool]] = [
        ("rank", rank_branches(shape.layers), recipe.rank, False),
        ("loss, last n", last_branches(shape.layers), recipe.eval, True),
    ]
    for name, kept, settings, heads in wanted:
        try:
            cost = plan_streaming(
                shape, kept, kind, name=name, data=settings.data, samples=settings.samples, length=settings.length,
                memory=memory, ram=ram, disk_rate=DISK_RATE, heads=heads, stored_bytes=stored,
            )  # fmt: skip
            lines.append(
                f"{name}, {cost.plan.line()}; {_round(cost.read_hours)} hours of reading at {DISK_RATE / 1e9:g} GB/s beside "
                f"{_round(cost.compute_hours)} of computing"
            )
        except Refused as refusal:
            lines.append(f"{name}: {refusal}")
            too_large.append(_STEPS[name.partition(",")[0]])
    return lines, too_large


def _find(name: str) -> tuple[Recipe, float]:
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return read_recipe(path), 2.0
    if path.is_dir() and (path / "config.json").exists():
        shape, stored_bytes = shape_of_checkpoint(path)
        note = "A local checkpoint: sizes are counted in its files, settings are the defaults."
        return Recipe(name=path.resolve().name, model=name, origin="ours", shape=shape, note=note), stored_bytes
    recipe = load_recipe(name)
    if recipe.local_folder is not None:
        return recipe, shape_of_checkpoint(recipe.local_folder)[1]
    return recipe, 2.0


def format_check(checked: dict[str, Any]) -> str:
    """The result of `check_recipe_file` as a page of text."""
    shape, disk = checked["shape"], checked["disk"]
    whose = "the paper's settings" if checked["origin"] == "paper" else "settings of ours"
    about = "" if checked["exact"] else "about "
    left = checked["kept_parameters"]
    misfits = checked["too_large"]
    verdict = "no fault found"
    if misfits:
        verdict = f"no fault in the recipe, but {_joined(misfits)} {'do' if len(misfits) > 1 else 'does'} not fit in the memory"
    lines = [
        f"{checked['recipe']}: {checked['model']}, {whose}, {verdict}",
        f"{shape['layers']} layers, hidden size {shape['hidden']:,}, vocabulary {shape['vocab']:,}, "
        f"{_count(shape['parameters'])} parameters",
        f"--drop {checked['drop']:g} drops {checked['dropped']} layers and keeps {checked['kept']}: "
        f"{about}{_count(left)} parameters ({left / shape['parameters']:.0%})",
    ]
    if checked["note"]:
        lines += ["", "Note: " + " ".join(checked["note"].split())]
    lines += [
        "",
        f"{'step':<12}{'documents':>11}{'tokens':>11}{'steps':>9}{'PFLOP':>11}{'hours':>9}{'memory':>11}",
    ]
    for step in checked["steps"]:
        lines.append(
            f"{step['name']:<12}{step['documents']:>11,}{_count(step['tokens']):>11}{step['steps']:>9,}"
            f"{_round(step['flops'] / 1e15):>11}{_round(step['hours']):>9}{size(step['memory']):>11}"
            + ("  does not fit" if _STEPS.get(step["name"]) in misfits and step["memory"] > checked["limit"] else "")
        )
    if checked["healing_verdict"]:
        lines += ["", checked["healing_verdict"]]
    if checked["streamed"]:
        lines += ["", "The weights do not fit in the memory given, so they come from the files:", *checked["streamed"]]
    parts = ", ".join(f"{name} {size(amount)}" for name, amount in disk.items() if amount)
    lines += ["", f"disk {size(sum(disk.values()))}: {parts}", ""]
    lines += [
        f"Hours on one {checked['device']}. Healing memory: NF4, gradient checkpointing, one sequence of "
        f"{checked['heal']['length']:,} tokens at a time.",
        "Loss and tasks are for one evaluation of the pruned model; the unpruned one takes "
        f"{shape['parameters'] / left:.1f} times as long.",
    ]
    if checked["unknown_tasks"]:
        lines.append(f"Not estimated: the tasks {', '.join(checked['unknown_tasks'])}.")
    return "\n".join(lines)


def size(amount: float) -> str:
    """Bytes for people: `138 GB`, `1.5 GB`, `42 MB` (decimal units)."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if amount >= factor:
            return f"{_round(amount / factor)} {unit}"
    return f"{amount / 1e3:.0f} kB"


def _with_unit(amount: int, asked: str | int | None) -> str:
    """Bytes for people, and in brackets as the user gave them where that reads otherwise: `26 GB (24GiB)`."""
    told, text = size(amount), "".join(str(asked).split())
    return told if not isinstance(asked, str) or text.upper() == told.replace(" ", "") else f"{told} ({text})"


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _count(amount: float) -> str:
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if amount >= factor:
            return f"{amount / factor:.2f} {unit}" if unit != "M" else f"{amount / factor:.1f} {unit}"
    return f"{amount:,.0f}"


def _round(amount: float) -> str:
    """Three digits where they matter: 1,234 or 123 or 12.3 or 1.2 or 0.12 or `<0.01`."""
    if amount >= 9.95:
        return f"{amount:,.0f}"
    if amount >= 0.995:
        return f"{amount:.1f}"
    return f"{amount:.2f}" if amount >= 0.005 else "<0.01"


def list_recipes(name: str | None = None) -> list[dict[str, Any]]:
    """All recipes (or the one named) as plain data: name, model, origin, layers, parameters, settings."""
    found = [load_recipe(n) for n in ([name] if name is not None else recipe_names())]
    return [{k: v for k, v in asdict(recipe).items() if k != "file"} for recipe in found]


def recipe_text(name: str) -> str:
    """The YAML file of a recipe, comments included."""
    return load_recipe(name).file.read_text(encoding="utf-8")


def format_recipes(found: list[dict[str, Any]]) -> str:
    """The list of recipes as a table."""
    width = max(len(recipe["name"]) for recipe in found)
    lines = [f"{'recipe':<{width}}  {'settings':<8}  {'layers':>6}  {'parameters':>10}  model"]
    for recipe in found:
        shape, origin = recipe["shape"], recipe["origin"]
        lines.append(
            f"{recipe['name']:<{width}}  {origin:<8}  {shape['layers']:>6}  {_count(shape['parameters']):>10}  {recipe['model']}"
        )
    return "\n".join(lines)
