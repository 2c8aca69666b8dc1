"""The settings of a healing: what the user gave, else the recipe's, else the defaults; each with its origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerprune.model.config import pick_length
from layerprune.model.errors import UsageError
from layerprune.model.recipes import HealSettings, Recipe, load_recipe, section_of

PACKINGS = ("documents", "joined", "truncate")
BRIDGES = ("map", "projection")
MERGES = ("weights", "nf4")
KERNELS = ("liger",)


@dataclass(frozen=True)
class Healing:
    """Resolved settings. `origin` maps each to `user`, `paper` (arXiv 2403.17887, App. A.1) or `ours`.

    LoRA alpha equals the rank, so the LoRA scale is 1. Empty targets: the MLP's linear layers. micro_batch:
    sequences in memory at once, None where it is still to be chosen. packing: `documents` (joined, none sees another),
    `joined` (they see one another) or `truncate` (one a sequence, as in the paper). adapters: `all` layers (as in the paper),
    those `after` the cut, or `window:K`, K on each side of it. distil: the weight of KL(unpruned || healed), 0 for none.
    bridge: a least-squares map over the cut to begin with, `map` or `projection`. merge: into the checkpoint's own
    `weights`, or into those that were trained, `nf4`. validation: documents for the loss during training. kernels: `liger` in
    place of the model's own norms, rotary embeddings and gated MLPs, or None.
    """

    data: str
    steps: int
    learning_rate: float
    lora_rank: int
    dropout: float
    warmup_steps: int
    batch_size: int
    micro_batch: int | None
    length: int
    targets: tuple[str, ...]
    seed: int
    packing: str
    adapters: str
    distil: float
    bridge: str | None
    merge: str
    validation: str | None
    validation_samples: int
    kernels: str | None
    origin: dict[str, str]

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.length

    @property
    def window(self) -> int | None:
        """Layers on each side of the cut that get adapters, None where it is no window."""
        kind, _, size = self.adapters.partition(":")
        return int(size) if kind == "window" else None

    def record(self) -> dict[str, Any]:
        """The settings without their origins, as JSON takes them."""
        values = asdict(self)
        del values["origin"]
        return {**values, "targets": list(self.targets)}


def heal_settings(
    config: Any,
    recipe: Recipe | str | None,
    *,
    data: str | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    lora_rank: int | None = None,
    dropout: float | None = None,
    warmup_steps: int | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    length: int | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    tokens: int | None = None,
    packing: str | None = None,
    adapters: str | None = None,
    distil: float | None = None,
    bridge: str | None = None,
    merge: str | None = None,
    validation: str | None = None,
    validation_samples: int | None = None,
    kernels: str | None = None,
    origins: Mapping[str, str] | None = None,
) -> Healing:
    """Resolve and check the settings; None takes the recipe's value, or the default where there is no recipe.

    config: the model's config object, for its context length. A user's own `steps` shorten the warm-up to a tenth
    of them, unless the warm-up is given too. tokens: instead of steps, as many steps as hold them. Raises UsageError for a
    value out of range, naming the option. origins: of settings that a caller gave for the user.
    """
    if targets is not None and not targets:
        raise UsageError("--targets is empty: give mlp, attention or names, or leave it out for the MLP")
    if tokens is not None and steps is not None:
        raise UsageError(f"--heal-steps {steps} and --heal-tokens {tokens} both say how long to heal: give one of them")
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    base = section_of(recipe, HealSettings)
    given: dict[str, Any] = {
        "data": data,
        "steps": steps,
        "learning_rate": learning_rate,
        "lora_rank": lora_rank,
        "dropout": dropout,
        "warmup_steps": warmup_steps,
        "batch_size": batch_size,
        "length": length,
        "targets": None if targets is None else tuple(targets),
    }
    ours = recipe.origin if recipe is not None else "ours"
    origin = {key: ours if value is None else "user" for key, value in given.items()}
    values = {key: getattr(base, key) if value is None else value for key, value in given.items()}
    values["length"] = pick_length(values["length"], config)
    if tokens is not None:
        if tokens < 1:
            raise UsageError(f"--heal-tokens {tokens} is not a number above 0")
        steps = values["steps"] = -(-tokens // max(1, values["batch_size"] * values["length"]))
        origin["steps"] = "user"
    _check(values, micro_batch, bridge)
    if steps is not None and warmup_steps is None and steps // 10 < base.warmup_steps:
        values["warmup_steps"], origin["warmup_steps"] = steps // 10, "ours"
    if values["warmup_steps"] >= values["steps"] > 0:
        raise UsageError(f"{values['warmup_steps']} warm-up steps leave none of the {values['steps']} steps: use fewer")
    if length is None and base.length is None:
        origin["length"] = "ours"
    options: dict[str, tuple[Any, Any]] = {
        "packing": (packing, "documents"),
        "adapters": (adapters, "all"),
        "distil": (distil, 0.0),
        "bridge": (None if bridge == "none" else bridge, None),
        "merge": (merge, "weights"),
        "validation": (validation, None),
        "validation_samples": (validation_samples, 32),
        "kernels": (None if kernels == "none" else kernels, None),
    }
    origin |= {key: "ours" if value is None else "user" for key, (value, _) in options.items()}
    if values["steps"] == 0:
        values["warmup_steps"] = 0
    values |= {key: default if value is None else value for key, (value, default) in options.items()}
    _check_options(values)
    origin |= {"micro_batch": "ours" if micro_batch is None else "user", "seed": "user" if seed else "ours"}
    origin |= origins or {}
    return Healing(**values, micro_batch=micro_batch, seed=seed, origin=origin)


def _check(values: dict[str, Any], micro_batch: int | None, bridge: str | None) -> None:
    options = {"steps": "--heal-steps", "batch_size": "--batch-size", "lora_rank": "--lora-rank"}
    for key, option in options.items():
        if values[key] < (key != "steps" or bridge in (None, "none")):
            hint = ", or 0 with --bridge" if key == "steps" else ""
            raise UsageError(f"{option} {values[key]} is not a number above 0{hint}")
    if not 0 < values["learning_rate"] < 1:
        raise UsageError(f"--learning-rate {values['learning_rate']:g} is not between 0 and 1, such as 3e-4")
    if not 0 <= values["dropout"] < 1:
        raise UsageError(f"a LoRA dropout of {values['dropout']:g} is not between 0 and 1, such as 0.05")
    if values["warmup_steps"] < 0:
        raise UsageError(f"{values['warmup_steps']} warm-up steps are fewer than none: use 0 or more")
    if micro_batch is not None and (micro_batch < 1 or values["batch_size"] % micro_batch):
        fits = ", ".join(map(str, divisors(values["batch_size"])))
        raise UsageError(f"--micro-batch {micro_batch} does not divide the batch of {values['batch_size']}: use one of {fits}")


def _check_options(values: dict[str, Any]) -> None:
    for key, option, allowed in (
        ("packing", "--packing", PACKINGS),
        ("bridge", "--bridge", (None, *BRIDGES)),
        ("merge", "--merge", MERGES),
        ("kernels", "--kernels", (None, *KERNELS)),
    ):
        if values[key] not in allowed:
            raise UsageError(f"{option} {values[key]} is none of {', '.join(a for a in allowed if a)}")
    kind, _, size = values["adapters"].partition(":")
    if not (values["adapters"] in ("all", "after") or (kind == "window" and size.isascii() and size.isdecimal() and int(size) > 0)):
        raise UsageError(f"--adapters {values['adapters']} is none of all, after, window:K (K layers on each side of the cut)")
    if not 0 <= values["distil"] <= 100:
        raise UsageError(f"--distil {values['distil']:g} is no weight from 0 to 100, such as 1")
    if values["validation_samples"] < 0:
        raise UsageError(f"{values['validation_samples']} validation documents are fewer than none: use 0 or more")


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
