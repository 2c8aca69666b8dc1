"""Recipes: one YAML file a model, with its Hub id, its shape and the settings of every step."""

from __future__ import annotations

import difflib
import functools
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from layerprune.model.errors import Refused, UsageError

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Shape:
    """Sizes that estimates need before anything is loaded.

    `parameters` counts the whole model, tied embeddings once. `layer_parameters` is the mean of one layer and
    `mlp` the width inside its MLP; where a recipe leaves them out, estimates approximate them.
    """

    layers: int
    hidden: int
    vocab: int
    parameters: int
    layer_parameters: int | None = None
    mlp: int | None = None


@dataclass(frozen=True)
class RankSettings:
    data: str = "c4"
    samples: int = 256
    length: int | None = None


@dataclass(frozen=True)
class HealSettings:
    """Healing as in papers: LoRA alpha equals its rank, so the LoRA scale is 1. Empty targets: the MLP's linears."""

    data: str = "c4"
    lora_rank: int = 64
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    learning_rate: float = 3e-4
    steps: int = 5000
    batch_size: int = 16
    length: int | None = None
    warmup_steps: int = 100


@dataclass(frozen=True)
class EvalSettings:
    """`tasks` maps an lm-eval task to its number of in-context examples; `limit` bounds items a task."""

    data: str = "c4"
    samples: int = 256
    length: int | None = None
    tasks: dict[str, int] = field(default_factory=dict)
    limit: int | None = None


@dataclass(frozen=True)
class Recipe:
    """The settings of one model. `origin` is `paper` where they are the paper's, else `ours`."""

    name: str
    model: str
    origin: str
    shape: Shape
    rank: RankSettings = RankSettings()
    heal: HealSettings = HealSettings()
    eval: EvalSettings = EvalSettings()
    task_folder: str | None = None
    curve: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    note: str = ""
    file: Path = RECIPES

    @property
    def local_folder(self) -> Path | None:
        """The folder of a model that is shipped beside its recipe (`./demo/model`), else None."""
        return self.file.parent / self.model if self.model.startswith("./") else None

    def data_path(self, value: str) -> str:
        """A data option as a path: `c4` stays, `./...` is relative to the recipe's file."""
        return str(self.file.parent / value) if value.startswith("./") else value

    @property
    def tasks_path(self) -> Path | None:
        return None if self.task_folder is None else Path(self.data_path(self.task_folder))


Section = TypeVar("Section", RankSettings, HealSettings, EvalSettings)


def section_of(recipe: Recipe | None, kind: type[Section]) -> Section:
    """A step's settings as `kind`: the recipe's, with data as a path from here; the defaults where there is no recipe."""
    if recipe is None:
        return kind()
    found = next(part for part in (recipe.rank, recipe.heal, recipe.eval) if isinstance(part, kind))
    return replace(found, data=recipe.data_path(found.data))


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


@functools.cache
def load_recipe(name: str) -> Recipe:
    """Read `recipes/NAME.yaml`. Raises UsageError for an unknown name, Refused with all faults of a bad file."""
    if name not in recipe_names():
        near = difflib.get_close_matches(name.lower(), recipe_names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`layerprune recipes` lists them all"
        raise UsageError(f"there is no recipe {name!r}; {hint}")
    return read_recipe(RECIPES / f"{name}.yaml")


def read_recipe(path: Path) -> Recipe:
    """Read one recipe file and report all of its faults at once (Refused)."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _NoRepeats)
    except FileNotFoundError:
        raise UsageError(f"the recipe file {path} does not exist") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    recipe, faults = check_recipe(raw, path)
    if recipe is None:
        raise Refused(f"{path} has {len(faults)} fault{'s' * (len(faults) != 1)}: " + "; ".join(faults))
    return recipe


class _NoRepeats(yaml.SafeLoader):
    """YAML in which a setting that is written twice is a fault; plain YAML lets the last one win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value!r} is set twice, the second time on line {line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def check_recipe(raw: Any, path: Path) -> tuple[Recipe | None, list[str]]:
    """Check a parsed recipe; returns (recipe, []) or (None, every fault in plain words)."""
    if not isinstance(raw, dict):
        return None, ["it is not a mapping of settings"]
    faults: list[str] = []
    kinds = {"shape": Shape, "rank": RankSettings, "heal": HealSettings, "eval": EvalSettings}
    allowed = {"model", "origin", "task_folder", "curve", "note", *kinds}
    for key in sorted(map(str, set(raw) - allowed)):
        near = difflib.get_close_matches(key, sorted(allowed), n=1)
        faults.append(f"unknown setting {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    sections: dict[str, Any] = {}
    for key, kind in kinds.items():
        sections[key] = _section(key, raw.get(key), kind, faults)
    model, origin = raw.get("model"), raw.get("origin")
    if not isinstance(model, str) or not model:
        faults.append("model: a Hub id is missing")
    elif model.startswith("./") and not (path.parent / model).is_dir():
        faults.append(f"model: the folder {model} beside the recipe does not exist")
    if origin not in ("paper", "ours"):
        faults.append(f"origin: {origin!r} is neither 'paper' nor 'ours'")
    curve = raw.get("curve", [0.1, 0.2, 0.3, 0.5])
    if not isinstance(curve, list) or not all(isinstance(f, float) and 0 < f < 1 for f in curve):
        faults.append(f"curve: {curve!r} is not a list of fractions between 0 and 1")
        curve = []
    for key in ("task_folder", "note"):
        if not isinstance(raw.get(key, ""), str | None):
            faults.append(f"{key}: {raw[key]!r} is not text")
    faults += _missing_files(raw, path) + _contradictions(sections)
    if faults:
        return None, faults
    extra = {k: raw[k] for k in ("task_folder", "note") if raw.get(k) is not None}
    return Recipe(name=path.stem, model=str(model), origin=str(origin), curve=tuple(curve), file=path, **extra, **sections), []


def _missing_files(raw: dict[Any, Any], path: Path) -> list[str]:
    """Files and folders that the recipe names relative to itself (`./...`) and that are not there."""
    named = {"task_folder": raw.get("task_folder")}
    for section in ("rank", "heal", "eval"):
        if isinstance(raw.get(section), dict):
            named[f"{section}.data"] = raw[section].get("data")
    return [
        f"{key}: {value} does not exist beside the recipe"
        for key, value in named.items()
        if isinstance(value, str) and value.startswith("./") and not (path.parent / value).exists()
    ]


def _contradictions(sections: dict[str, Any]) -> list[str]:
    """Settings that are fine one by one and make no sense together."""
    faults = []
    heal, shape = sections["heal"], sections["shape"]
    if heal is not None and heal.warmup_steps >= heal.steps:
        faults.append(f"heal.warmup_steps: {heal.warmup_steps} leaves none of the {heal.steps} steps")
    if shape is not None and shape.layers * (shape.layer_parameters or 0) > shape.parameters:
        faults.append(
            f"shape.layer_parameters: {shape.layers} layers of {shape.layer_parameters:,} are more than the "
            f"model's {shape.parameters:,} parameters"
        )
    return faults


_POSITIVE = {
    "layers", "hidden", "vocab", "parameters", "layer_parameters", "mlp",
    "samples", "length", "lora_rank", "steps", "batch_size", "limit",
}  # fmt: skip


def _section(name: str, raw: Any, kind: Any, faults: list[str]) -> Any:
    """One section as its dataclass; faults are appended, and None returned when there are any."""
    if raw is None:
        if name == "shape":
            faults.append("shape: layers, hidden, vocab and parameters are missing")
            return None
        return kind()
    if not isinstance(raw, dict):
        faults.append(f"{name}: {raw!r} is not a mapping")
        return None
    before = len(faults)
    known = {f.name for f in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            faults.append(f"{name}.{key}: unknown setting" + (f" (did you mean {near[0]!r}?)" if near else ""))
            continue
        fault = _value_fault(str(key), value)
        if fault:
            faults.append(f"{name}.{key}: {fault}")
        values[str(key)] = tuple(value) if key == "targets" and isinstance(value, list) else value
    if name == "shape":
        required = {f.name for f in fields(kind) if f.default is MISSING}
        faults.extend(f"shape.{key}: missing" for key in sorted(required - set(values)))
    return kind(**values) if len(faults) == before else None


def _value_fault(key: str, value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _POSITIVE and not (isinstance(value, int) and number and value > 0):
        return f"{value!r} is not a whole number above 0"
    if key == "warmup_steps" and not (isinstance(value, int) and number and value >= 0):
        return f"{value!r} is not a whole number from 0"
    if key == "dropout" and not (number and 0 <= value < 1):
        return f"{value!r} is not between 0 and 1"
    if key == "learning_rate" and not (number and 0 < value < 1):
        return f"{value!r} is not between 0 and 1 (write 3.0e-4: YAML reads 3e-4 as text)"
    if key == "data" and not isinstance(value, str):
        return f"{value!r} is neither 'c4' nor a file"
    if key == "targets" and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
        return f"{value!r} is not a list of module names"
    if key == "tasks" and not (
        isinstance(value, dict)
        and all(isinstance(k, str) and isinstance(v, int) and not isinstance(v, bool) and v >= 0 for k, v in value.items())
    ):
        return f"{value!r} is not a mapping of task names to numbers of examples"
    return None
