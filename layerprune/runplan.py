"""What a run will do, resolved and checked before anything is loaded, and what it will cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from layerprune.model.config import layer_count, load_config, pick_length
from layerprune.model.cuts import drop_count, last_block
from layerprune.model.data import check_data, data_fingerprint
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import must_have_room
from layerprune.model.fingerprint import checkpoint_fingerprint, folder_fingerprint, tokenizer_fingerprint
from layerprune.model.load import pick_device, pick_dtype
from layerprune.model.memory import byte_count
from layerprune.model.recipes import EvalSettings, HealSettings, Recipe, section_of
from layerprune.model.source import ModelSource, find_model
from layerprune.model.tensors import read_checkpoint

DEFAULT_CURVE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class Setup:
    """What a run or a sweep works with, resolved: what the user gave, else the recipe's settings, else the defaults."""

    source: ModelSource
    layers: int
    rank: dict[str, Any]
    evaluation: EvalSettings
    tasks: dict[str, int | None]
    task_folder: str | None
    heal: HealSettings | None
    heal_options: dict[str, Any]
    """What of the above the user gave, None for the rest: healing records where each setting came from."""
    own_heal_data: bool
    """Whether the user gave data for healing."""
    seed: int
    dtype: str
    device: str
    asked_device: str | None
    """As the user gave it: one left open spreads a model over several GPUs."""
    trust_remote_code: bool
    memory: int | None
    ram: int | None
    """Bytes of the GPU's and of the host's memory that may be used, where the user said so."""

    def heal_inputs(self) -> dict[str, Any] | None:
        """What decides how a cut is healed; files count by content, wherever they lie."""
        if self.heal is None:
            return None
        found = {**asdict(self.heal), "data": data_fingerprint(self.heal.data), "targets": list(self.heal.targets)}
        more = {k: v for k, v in self.heal_options.items() if k in _HEAL_WITH and k not in (*found, *_NOT_DECIDING)}
        for key in ("validation",):
            if key in more:
                more[key] = data_fingerprint(more[key])
        return {**found, "with": more} if more else found

    def measured_inputs(self) -> dict[str, Any]:
        """What decides a ranking and what is measured of a cut."""
        return {
            "checkpoint": checkpoint_fingerprint(self.source.folder),
            "tokenizer": tokenizer_fingerprint(self.source.folder),
            "rank": {**self.rank, "data": data_fingerprint(self.rank["data"])},
            "loss": {
                "data": data_fingerprint(self.evaluation.data),
                "samples": self.evaluation.samples,
                "length": self.evaluation.length,
            },
            "task_folder": None if self.task_folder is None else folder_fingerprint(Path(self.task_folder)),
            "limit": self.evaluation.limit,
            "seed": self.seed,
            "dtype": self.dtype,
            "device": self.device,
        }

    def given(self) -> dict[str, Any]:
        """Where the inputs were found, for people who read the manifest."""
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "calibration": self.rank["data"],
            "heal_data": self.heal.data if self.heal else None,
            "eval_data": self.evaluation.data,
            "task_folder": self.task_folder,
        }


@dataclass(frozen=True)
class Plan(Setup):
    """One run: a setup, the block to drop, and the depths of the curve."""

    n: int
    drop: float
    strategy: str
    curve: tuple[int, ...]

    def inputs(self) -> dict[str, Any]:
        """What decides the results: the manifest's identity of the run."""
        own = {"drop": self.drop, "strategy": self.strategy, "tasks": self.tasks, "curve": list(self.curve)}
        return {**self.measured_inputs(), **own, "heal": self.heal_inputs()}


def plan_run(
    model: str | Path,
    drop: float,
    *,
    strategy: str = "angular",
    curve: Sequence[float] | None = None,
    **settings: Any,
) -> Plan:
    """Resolve and check a run's settings (see `set_up`); nothing is loaded. Raises UsageError and Refused."""
    check_strategy(strategy)
    for fraction in curve or ():
        if not 0 < fraction < 1:
            raise UsageError(f"--curve {fraction:g} is not a fraction between 0 and 1, such as 0.4")
    source = find_model(str(model))
    layers = layer_count(load_config(source.folder, settings.get("trust_remote_code", False)))
    n = drop_count(drop, layers)
    if strategy == "last":
        last_block(n, layers)
    setup = set_up(source, **settings)
    fractions = curve if curve is not None else source.recipe.curve if source.recipe else DEFAULT_CURVE
    depths = {drop_count(f, layers) for f in fractions if 0.5 <= round(f * layers, 9) < layers - 0.5} | {n}
    return Plan(**vars(setup), n=n, drop=drop, strategy=strategy, curve=tuple(sorted(depths)))


def check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is not a number above 0")


def check_strategy(strategy: str) -> None:
    from layerprune.prune.cut import STRATEGIES

    if strategy not in STRATEGIES:
        raise UsageError(f"--strategy {strategy} is none of {', '.join(STRATEGIES)}")


def set_up(
    source: ModelSource,
    *,
    tasks: Sequence[str] | Mapping[str, int | None] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_folder: str | Path | None = None,
    calibration: str | None = None,
    heal_data: str | None = None,
    eval_data: str | None = None,
    heal_steps: int | None = None,
    heal_tokens: int | None = None,
    heal_with: Sequence[str] | Mapping[str, Any] = (),
    heal: bool = True,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    memory: str | int | None = None,
    ram: str | int | None = None,
) -> Setup:
    """Resolve and check settings; nothing is loaded. What is None comes from the recipe, else from the defaults.

    memory, ram: of the GPU and of the host, as text such as `8GiB` or in bytes; a model that does not fit in them (by default:
    in what is free) is ranked and measured layer by layer from its files, and healing plans for them. heal: whether there
    will be healing, whose data and device are checked then. heal_with: other settings of `heal_checkpoint`, as a mapping or
    as `key=value` texts. Raises UsageError and Refused.
    """
    from layerprune.eval.evaluate import parse_tasks
    from layerprune.prune.rank import rank_settings

    numbers = {"--samples": samples, "--limit": limit, "--heal-steps": heal_steps, "--heal-tokens": heal_tokens}
    for option, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(f"{option} {number} is not a number above 0")
    more = heal_settings_from(heal_with)
    pick_dtype(dtype, pick_device(device))
    gpu, host = byte_count(memory, "--memory"), byte_count(ram, "--ram")
    if gpu is not None and pick_device(device) == "cpu":
        raise UsageError("--memory is the GPU's, and the model runs on the CPU: use --ram for the host's memory")
    if gpu is not None and heal:
        more.setdefault("memory", str(memory) if isinstance(memory, str) else gpu)
    if host is not None and heal:
        more.setdefault("ram", str(ram) if isinstance(ram, str) else host)
    config = load_config(source.folder, trust_remote_code)
    recipe = source.recipe
    base = section_of(recipe, EvalSettings)
    evaluation = EvalSettings(
        data=eval_data or base.data,
        samples=samples or base.samples,
        length=base.length if length is None else length,
        limit=limit or base.limit,
    )
    ranking = rank_settings(source, calibration, samples, length)
    pick_length(ranking["length"], config)
    pick_length(evaluation.length, config)
    healing = None
    if heal:
        healing = section_of(recipe, HealSettings)
        if heal_tokens is not None:
            if heal_steps is not None:
                raise UsageError("--heal-steps and --heal-tokens both say how long to heal: give one of them")
            batch = int(more.get("batch_size", healing.batch_size))
            heal_steps = -(-heal_tokens // (batch * pick_length(healing.length if length is None else length, config)))
        own_keys = ("learning_rate", "lora_rank", "dropout", "batch_size", "warmup_steps")
        changed: dict[str, Any] = {key: more[key] for key in own_keys if key in more}
        if "targets" in more:
            changed["targets"] = tuple(more["targets"])
        healing = replace(
            healing,
            data=heal_data or healing.data,
            steps=healing.steps if heal_steps is None else heal_steps,
            length=healing.length if length is None else length,
            **changed,
        )
        check_data(healing.data, "--heal-data", "train", seed)
    check_data(ranking["data"], "--calibration", "validation", seed)
    check_data(evaluation.data, "--eval-data", "validation", seed)
    folder = task_folder if task_folder is not None else recipe.tasks_path if recipe else None
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"the task folder {folder} does not exist")
    if healing is not None:
        from layerprune.heal.checks import check_device

        check_device(pick_device(device))
    return Setup(
        source=source,
        layers=layer_count(config),
        rank=ranking,
        evaluation=evaluation,
        tasks=parse_tasks(tasks, num_fewshot, recipe),
        task_folder=None if folder is None else str(folder),
        heal=healing,
        heal_options={"steps": heal_steps, "length": length, **more},
        own_heal_data=heal_data is not None,
        seed=seed,
        dtype=dtype,
        device=pick_device(device),
        asked_device=device,
        trust_remote_code=trust_remote_code,
        memory=gpu,
        ram=host,
    )


def _amount(text: str) -> str | int:
    """Memory as text with its unit, or as bytes where it was handed on as a number."""
    return int(text) if text.isdigit() and len(text) > 6 else text


_HEAL_WITH: dict[str, Callable[[str], Any]] = {
    "learning_rate": float, "lora_rank": int, "dropout": float, "warmup_steps": int, "batch_size": int, "micro_batch": int,
    "targets": lambda text: text.split("+"), "packing": str, "adapters": str, "distil": float, "bridge": str, "merge": str,
    "memory": _amount, "ram": _amount, "report_to": lambda text: text.split("+"), "teacher": str, "validation": str,
    "validation_samples": int, "kernels": str,
}  # fmt: skip
"""Settings of healing that a run takes beside those with options of their own; several names are joined by `+`."""
_NOT_DECIDING = ("memory", "ram", "micro_batch", "report_to", "kernels")


def heal_settings_from(given: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Settings of healing from `key=value` texts (a mapping stays what it is). UsageError for a key or a value that is none."""
    if isinstance(given, Mapping):
        given = [f"{key}={'+'.join(value) if isinstance(value, list | tuple) else value}" for key, value in given.items()]
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if key not in _HEAL_WITH or not equals:
            raise UsageError(f"--heal-with {text}: give KEY=VALUE, with one of {', '.join(_HEAL_WITH)}")
        try:
            found[key] = _HEAL_WITH[key](value.strip())
        except ValueError:
            raise UsageError(f"--heal-with {text}: {value.strip()!r} is no value of {key}") from None
    return found


def run_cost(plan: Plan, out: Path) -> str:
    """Disk and time of a run, estimated; refuses a disk that cannot hold it."""
    kept = 1 - plan.n / plan.layers
    try:
        found, kind = costs(plan, plan.n)
    except Refused as refusal:
        need = sum(t.nbytes for t in read_checkpoint(plan.source.folder).values()) * kept * (1 if plan.heal is None else 2)
        must_have_room(out, need, held_bytes(out))
        return f"estimate: up to {as_bytes(need)} of disk; its time cannot be estimated ({refusal})"
    names = ["pruned"] if plan.heal is None else ["pruned", "healed", "work"]
    need = sum(found.disk[name] for name in names)
    must_have_room(out, need, held_bytes(out))
    evaluations = 4  # whole, cut, healed, and what the curve adds to the whole
    hours = sum(s.hours * (1 if s.name in ("rank", "heal") else evaluations) for s in found.steps)
    hours -= 0 if plan.heal else step_hours(found, "heal")
    return f"estimate: {as_bytes(need)} of disk, {as_time(hours)} on one {kind.name}{unknown_tasks(found)}"


def costs(setup: Setup, n: int) -> tuple[Any, Any]:
    """The estimate of one run that drops n layers, and the device it is for. Raises Refused where it cannot be made."""
    from layerprune.model.estimate import DEVICES, estimate, shape_of_checkpoint

    shape, width = shape_of_checkpoint(setup.source.folder)
    base = setup.source.recipe
    imagined = Recipe(
        name=setup.source.label,
        model=setup.source.name,
        origin=base.origin if base else "ours",
        shape=shape,
        rank=replace(base.rank, **setup.rank) if base else replace(Recipe.rank, **setup.rank),
        heal=setup.heal or HealSettings(steps=1),
        eval=replace(setup.evaluation, tasks={t: s or 0 for t, s in setup.tasks.items()}),
    )
    kind = DEVICES["cpu" if setup.device == "cpu" else "h100"]
    return estimate(imagined, n / setup.layers, kind, width), kind


def step_hours(found: Any, *names: str) -> float:
    """Hours of some steps of an estimate."""
    return float(sum(step.hours for step in found.steps if step.name in names))


def unknown_tasks(found: Any) -> str:
    return f" (without the tasks {', '.join(found.unknown_tasks)})" if found.unknown_tasks else ""


def held_bytes(out: Path) -> int:
    """Bytes of a run that was begun: they are there already."""
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) if out.is_dir() else 0


def as_bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def as_time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours * 60 >= 1.5 else f"{hours * 3600:.0f} seconds"
