"""The healings of a folder on the page: pictures, a row each, and what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.curve import held_out_losses, trained_losses
from layerprune.figures import number, shares
from layerprune.page_pictures import healing_panel
from layerprune.page_words import NAMES, Facts, Row, as_text, fixed

_PACKINGS = {
    "documents": "documents joined, none sees another",
    "joined": "documents joined, they see one another",
    "truncate": "one document a sequence, truncated",
}
_ADAPTERS = {"all": "all layers", "after": "the layers after the cut"}
_BASES = {"weights": "the checkpoint's own weights", "nf4": "the weights as NF4 holds them"}


def healing_of(found: Sequence[Row], manifest: Mapping[str, Any]) -> Facts | None:
    """The healings of a folder: pictures, a row each, and what they share; None without any. Older records know less.

    manifest: of the folder, which names the documents that the losses of the curve are measured on.
    """
    if not found:
        return None
    share = shares([one["n"] for one in found])
    made: list[Facts] = []
    for one in found:
        strategy, strength = one["strategy"], round(100 * share[one["n"]])
        colour = "" if strength == 100 else f"color-mix(in srgb, var(--{strategy}) {strength}%, var(--page))"
        made.append({**one, "name": f"{NAMES[strategy]}, n = {one['n']}", "style": f"{strategy}-healed", "colour": colour})
    panels = [
        healing_panel(made, held_out)
        for held_out, points in ((False, trained_losses), (True, held_out_losses)) if any(map(points, made))
    ]  # fmt: skip
    shared = {"Settings": _heal_settings, "Memory": _heal_memory, "Held-out documents": _heal_documents}
    facts = [(title, _together([(one["name"], told(one)) for one in made])) for title, told in shared.items()]
    return {
        "panels": panels,
        "legend": [one for one in made if panels and trained_losses(one)],
        "known": {key: any(number(one[key]) is not None for one in made) for key in ("whole", "cut", "healed")},
        "caption": _caption([one for one in made if held_out_losses(one)], manifest),
        "held": any(map(held_out_losses, made)),
        "table": [_healing_row(one) for one in made],
        "facts": [(title, part) for title, part in facts if part],
    }


def _caption(made: Sequence[Row], manifest: Mapping[str, Any]) -> str:
    """Which documents and which weights each number of the held-out picture is of."""
    evaluated, given = manifest.get("inputs", {}).get("loss") or {}, manifest.get("given", {}).get("eval_data")
    names = [_held_out_name(one["healing"]) for one in made]
    counts = [one["healing"].get("validation") or {} for one in made]
    measured = {one.get("measured") for one in counts}
    some = f"{measured.pop():,}" if len(measured) == 1 and None not in measured else "some"
    held = {one.get("documents") for one in counts}
    many = f" {held.pop():,}" if len(held) == 1 and None not in held else ""
    on = "the documents that losses are measured on"
    if given:
        every = f"up to {evaluated['samples']:,} documents" if evaluated.get("samples") else "the documents"
        on = f"{every} of {Path(given).name}"
    told = (
        f"The points are the loss while training: {some} of the{many} held-out documents of {' and '.join(dict.fromkeys(names))}, "
        "with the weights in NF4 and the adapter beside them. The horizontal lines are the loss of the checkpoints as written: "
        f"{on}. So a line of points need not begin at its cut's line, nor end at its healed checkpoint's: what healing gave back "
        "is between the horizontal lines."
    )
    if given and any(name not in ("unknown data", Path(given).name) for name in names):
        told += " The held-out documents of training are not those of the horizontal lines: only points compare with points."
    return told


def _held_out_name(healing: Mapping[str, Any]) -> str:
    settings = healing.get("settings") or {}
    if "validation" not in settings:
        return "unknown data"
    return str(settings["validation"] or ("c4" if settings.get("data") == "c4" else "the training data"))


def _healing_row(one: Row) -> Facts:
    healing = one["healing"]
    seconds, tokens = number((healing.get("seconds") or {}).get("train")), number(healing.get("tokens"))
    losses, held = healing.get("losses") or {}, held_out_losses(one)
    return {
        "series": NAMES[one["strategy"]],
        "n": one["n"],
        "steps": healing.get("steps"),
        "tokens": tokens,
        "seconds": seconds,
        "speed": tokens / seconds if tokens and seconds else None,
        "peak": _gib((healing.get("memory") or {}).get("peak")),
        "loss": _from_to([losses.get("first"), losses.get("last")]),
        "held": _from_to([held[0][1], held[-1][1]], 4) if held else "–",
        "before": one["cut"],
        "after": one["healed"],
    }


def _heal_settings(one: Row) -> dict[str, tuple[str, str]]:
    """What decides how good a healing is, each as (text, origin)."""
    healing, bridge = one["healing"], one["bridge"]
    given, origin = healing.get("settings") or {}, healing.get("origin") or {}
    packing = _PACKINGS.get(str(given.get("packing")))
    if given.get("packing") == "documents" and not healing.get("documents_apart"):
        packing = "documents joined; this model lets them see one another"
    told: dict[str, tuple[Any, str]] = {
        "data": (given.get("data"), "data"),
        "steps": (_thousands(given.get("steps")), "steps"),
        "sequences a step": (given.get("batch_size"), "batch_size"),
        "tokens a sequence": (_thousands(given.get("length")), "length"),
        "packing": (packing, "packing"),
        "peak learning rate": (f"{given['learning_rate']:g}" if "learning_rate" in given else None, "learning_rate"),
        "warm-up steps": (given.get("warmup_steps"), "warmup_steps"),
        "LoRA rank": (given.get("lora_rank"), "lora_rank"),
        "LoRA alpha": (given.get("lora_alpha"), "lora_rank"),
        "LoRA dropout": (given.get("dropout"), "dropout"),
        "adapters on": (as_text(healing.get("modules") or []) or None, "targets"),
        "adapters in": (adapters_place(given.get("adapters")), "adapters"),
        "distillation": (f"weight {given['distil']:g}, by {healing.get('teacher')}" if given.get("distil") else None, "distil"),
        "merged into": (_BASES.get(str(given.get("merge"))), "merge"),
    }  # fmt: skip
    if bridge.get("form"):
        told["bridge"] = (f"{bridge['form']}, fitted on {bridge['tokens']:,} tokens", "bridge")
        errors = (_from_to([b["error"]["cut"], b["error"]["bridged"]]) for b in bridge["bridges"])
        told["bridge: squared error"] = ("; ".join(errors), "")
    if bridge.get("loss"):
        told["bridge: held-out loss"] = (_from_to([bridge["loss"]["cut"], bridge["loss"]["bridged"]], 4), "")
    return {key: (str(text), origin.get(source, "")) for key, (text, source) in told.items() if text is not None}


def adapters_place(adapters: str | None) -> str | None:
    """Which layers get adapters, in words; None where a record does not say it."""
    kind, _, size = (adapters or "").partition(":")
    return f"{size} layers on each side of the cut" if kind == "window" else _ADAPTERS.get(kind)


def _heal_memory(one: Row) -> dict[str, tuple[str, str]]:
    healing = one["healing"]
    memory = healing.get("memory") or {}
    told: dict[str, Any] = {"base": healing.get("quantisation")}
    if memory:
        plan = [f"{memory['micro_batch']} sequences at once" if memory["micro_batch"] > 1 else "one sequence at once"]
        plan.append(f"weights kept decoded in {memory['decoded']} layers" if memory["decoded"] else "no weights kept decoded")
        again = memory["recomputed"]
        plan.append(f"activations of {again} layers computed again" if again else "all activations kept")
        told |= {"plan": "; ".join(plan + ["layers compiled"] * memory["compiled"])}
        told |= {"planned peak, at most": _gib(memory["estimate"]), "measured peak": _gib(memory["peak"])}
    told |= {"device": healing.get("device"), "processes": healing.get("processes")}
    return {key: (str(text), "") for key, text in told.items() if text not in (None, "–")}


def _heal_documents(one: Row) -> dict[str, tuple[str, str]]:
    given, documents = one["healing"].get("settings") or {}, one["healing"].get("validation") or {}
    if not documents.get("documents"):
        return {}
    return {
        "from": (given.get("validation") or "the training data", ""),
        "documents": (f"{documents['documents']:,}", ""),
        "of the training data, left out": (f"{documents['left_out']:,}", ""),
        "hash of them all": (as_text(documents["hash"]), ""),
    }


def _together(each: Sequence[tuple[str, dict[str, tuple[str, str]]]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Facts of several healings by key: one value where they agree, else each with the healing it is of."""
    told: list[tuple[str, list[tuple[str, str]]]] = []
    for key in dict.fromkeys(key for _, facts in each for key in facts):
        values: dict[tuple[str, str], list[str]] = {}
        for name, facts in each:
            if key in facts:
                values.setdefault(facts[key], []).append(name)
        lines = [(f"{' and '.join(names)}: {text}", origin) for (text, origin), names in values.items()]
        told.append((key, lines if len(values) > 1 else list(values)))
    return told


def _from_to(values: Sequence[Any], digits: int = 3) -> str:
    return "–" if any(number(v) is None for v in values) else " to ".join(fixed(v, digits) for v in values)


def _thousands(value: Any) -> str | None:
    return None if value is None else f"{value:,}"


def _gib(value: Any) -> str:
    known = number(value)
    return "–" if known is None else f"{known / 2**30:.1f} GiB"
