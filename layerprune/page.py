"""The page of a run or a sweep: report.html, one file that needs no network and can be sent around."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from layerprune.curve import healings, held_out_losses, scores, series, trained_losses
from layerprune.figures import LOSS_TOP, shares, short, spread_apart
from layerprune.model.cuts import describe_dropped, drop_count
from layerprune.model.files import read_json, write_text
from layerprune.runfolder import flat

Row = Mapping[str, Any]
Facts = dict[str, Any]

_NAMES = {
    "angular": "angular distance",
    "last": "last n",
    "angular healed": "angular distance, healed",
    "last healed": "last n, healed",
}
_METRICS = {"acc": "accuracy", "acc_norm": "accuracy (normalised)"}
_VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725".split()
_SHADES = 32


def write_report(folder: Path) -> Path:
    """Write report.html into a run or sweep folder, from the files in it; returns its path.

    curve.json is needed; manifest, collapse, rank and eval.json are used where they are there. The same files give the same
    bytes. Raises Refused for a missing curve.json and for files that are no JSON.
    """
    path = folder / "report.html"
    write_text(path, render(folder))
    return path


def render(folder: Path) -> str:
    """The page as text. Every string in it is escaped; what is not measured is left out or shown as a dash."""
    env = Environment(
        loader=PackageLoader("layerprune", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"fixed": _fixed, "percent": _percent, "count": _count, "size": _size, "whole": _whole}
    return env.get_template("report.html.j2").render(**_facts(folder)) + "\n"


def _facts(folder: Path) -> Facts:
    def read(name: str) -> Any:
        return read_json(folder / name) if (folder / name).exists() else {}

    curve, collapse, manifest, rank, evaluation = (
        read_json(folder / "curve.json"), *map(read, ("collapse.json", "manifest.json", "rank.json", "eval.json"))
    )  # fmt: skip
    layers, rows = curve["layers"], curve["rows"]
    own = series(rows)
    names = list(own)
    tasks = list(dict.fromkeys(task for r in rows for task in r["tasks"]))
    answer = manifest.get("answer", {}).get("series")  # of a search: the page speaks of what it found
    spoken = {answer: own[answer]} if answer in own else own
    verdict = _verdict(layers, spoken, collapse, evaluation)
    verdict["points"] += _own_cut(evaluation)
    panels = [_panel(layers, own, task, collapse) for task in tasks] + [_panel(layers, own, None, collapse)]
    panels = [panel for panel in panels if panel["lines"]]
    healing = _healing(healings(folder, curve))
    heat = _heat(rank) if rank.get("distance") else None
    given = manifest.get("given", {})
    return {
        "model": str(given.get("model") or curve["model"]),
        "layers": layers,
        "names": _NAMES,
        "series": names,
        "verdict": verdict,
        "summary": [_summary(name, own[name], collapse) for name in names if name in collapse.get("series", {})],
        "confidence": collapse.get("confidence", 0.95),
        "steps": _steps(evaluation),
        "panels": panels,
        "healing": healing,
        "heat": heat,
        "tasks": tasks,
        "table": [_line(name, r, layers) for name in names for r in own[name] if r["n"] or name == names[0]],
        "settings": _settings(manifest),
        "command": _command(manifest, layers),
        "serve": _serve(folder, given.get("model") or curve["model"], layers, verdict["cut"]),
        "data": {
            "layers": layers,
            "names": [_NAMES[name] for name in names],
            "blocks": [{r["n"]: describe_dropped(tuple(r["kept"]), layers) for r in own[name]} for name in names],
            "panels": [panel["data"] for panel in [*panels, *(healing["panels"] if healing else [])]],
            "heat": heat["data"] if heat else None,
        },
    }


# The verdict


def _verdict(layers: int, own: Mapping[str, Sequence[Row]], collapse: Mapping[str, Any], evaluation: Row) -> Facts:
    """Headline, points (term and text) and the cut (strategy, n, healed) that they speak of, if any."""
    advice = {name: one["recommendation"] for name, one in collapse.get("series", {}).items() if name in own}
    deepest = max(advice, key=lambda name: (advice[name]["n"], advice[name]["likely"]), default=None)  # as curve.verdict
    keep = f"{100 * collapse.get('keep', 0.95):g} %"
    if deepest is not None and advice[deepest]["n"] > 0:
        found = advice[deepest]
        cut = _pick(own[deepest], found["n"])
        points: list[tuple[str, Any]] = [
            _drop(deepest, cut, layers),
            _cost(found, own[deepest][0], cut),
            _saving(own[deepest][0], cut, layers, evaluation),
        ]
        if found["likely"] > found["n"]:
            points.append(("Perhaps more", f"By the estimates alone, {found['likely']} layers. That promises nothing."))
        head = f"Drop {found['n']} of {layers} layers"
        return {"head": head, "points": [*points, *_left_out(found)], "cut": (deepest, found["n"])}
    spoken = [name for name, found in advice.items() if found["status"] in ("not decided", "no cut")]
    if not spoken:
        return _by_loss(layers, own, collapse, evaluation, advice)
    first = next((name for name in spoken if advice[name]["status"] == "not decided"), None)
    fate = "No measured cut keeps" if first is None else "Not decided: no cut is shown to keep"
    head = f"{fate} {keep} of the accuracy above chance"
    shown = first or spoken[0]
    points = [("Why", (f"{_NAMES[shown]}: " if len(spoken) > 1 else "") + advice[shown]["why"])]
    likely = max(spoken, key=lambda name: advice[name]["likely"])
    n = advice[likely]["likely"]
    if first is not None and n > 0:
        cut = _pick(own[likely], n)
        points.append(("By the estimates alone", f"{n} of {layers} layers could go. That promises nothing."))
        points += [_drop(likely, cut, layers), _loss_cost(own[likely][0], cut), _saving(own[likely][0], cut, layers, evaluation)]
    elif first is not None:
        points.append(("By the estimates alone", "No depth measured keeps it either."))
    if first is not None:
        points.append(("To decide", _more_items(collapse["series"][first])))
    return {"head": head, "points": [*points, *_left_out(advice[spoken[0]])], "cut": (likely, n) if n and first else None}


def _own_cut(evaluation: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Of a run: the cut that was asked for, before and after healing."""
    if "pruned" not in evaluation:
        return []
    whole, cut = evaluation["whole"], evaluation["pruned"]
    losses = [_fixed(evaluation[name]["loss"]["normalised"], 4) for name in ("whole", "pruned", "healed") if name in evaluation]
    steps = ("whole", "cut", "healed")[: len(losses)]
    told = ", ".join(f"{loss} {step}" for loss, step in zip(losses, steps, strict=True))
    dropped = whole["layers"] - cut["layers"]
    less = _percent(1 - cut["parameters"] / whole["parameters"], 1)
    return [("The cut of this run", f"{dropped} layers dropped, {less} fewer parameters; normalised loss {told}.")]


def _by_loss(layers: int, own: Mapping[str, Sequence[Row]], collapse: Row, evaluation: Row, advice: Mapping[str, Row]) -> Facts:
    why = next((found["why"] for found in advice.values()), "No task was measured.")
    points: list[tuple[str, Any]] = [("Why the loss", why)]
    rises = {
        name: one["loss"] for name, one in collapse.get("series", {}).items()
        if name in own and len(own[name]) > 2 and one["loss"] and one["loss"]["to_n"] is not None
    }  # fmt: skip
    if not rises:
        flat = any(_number(r["loss"]) is not None for rows in own.values() for r in rows if r["n"])
        head = "Not decided: no task above chance, and no sharpest rise of the loss" if flat else "Nothing to decide yet"
        points.append(("To decide", "Measure more depths, and tasks on which the whole model is above chance (--tasks)."))
        return {"head": head, "points": points, "cut": None}
    best = max(rises, key=lambda name: rises[name]["from_n"])
    n, beyond = rises[best]["from_n"], rises[best]["to_n"]
    cut, after = _pick(own[best], n), _pick(own[best], beyond)
    rise = f"From {n} to {beyond} layers dropped: {_fixed(cut['loss'], 4)} to {_fixed(after['loss'], 4)}."
    points.append(("Sharpest rise", rise))
    if n:
        points += [_drop(best, cut, layers), _loss_cost(own[best][0], cut), _saving(own[best][0], cut, layers, evaluation)]
    points.append(("To decide", "A loss says little of what a model still knows: measure tasks that the whole model can do."))
    head = f"By the loss alone: at most {n} of {layers} layers" if n else "By the loss alone: the first cut costs most"
    return {"head": head, "points": points, "cut": (best, n) if n else None}


def _pick(rows: Iterable[Row], n: int) -> Row:
    return next(r for r in rows if r["n"] == n)


def _drop(name: str, cut: Row, layers: int) -> tuple[str, Any]:
    strategy, _, healed = name.partition(" ")
    text = Markup("layers <code>{}</code> (0-based, the end not included): <code>--drop {} --strategy {}</code>{}")
    block = describe_dropped(tuple(cut["kept"]), layers)
    return "Drop", text.format(block, _fraction(cut["n"], layers), strategy, ", then heal" if healed else "")


def _cost(found: Row, whole: Row, cut: Row) -> tuple[str, Any]:
    rest = f" (the limiting one of {len(found['tasks'])} tasks above chance)" if len(found["tasks"]) > 1 else ""
    kept = (
        f"{found['limiting_task']}{rest} keeps {_percent(found['retained'], 1)} of its accuracy above chance "
        f"(interval {_percent(found['low'], 1)} to {_percent(found['high'], 1)}). "
    )
    return "Costs", kept + _loss_cost(whole, cut)[1]


def _loss_cost(whole: Row, cut: Row) -> tuple[str, str]:
    if _number(cut["loss"]) is None or _number(whole["loss"]) is None:
        return "Costs", ""
    return "Costs", f"Normalised loss {_fixed(whole['loss'], 4)} to {_fixed(cut['loss'], 4)}."


def _saving(whole: Row, cut: Row, layers: int, evaluation: Row) -> tuple[str, str]:
    """Bytes and speed only where this very cut was written and measured."""
    parts = [f"{cut['n']} of {layers} layers"]
    parts.append(f"{_change(cut['parameters'], whole['parameters'])} parameters ({_count(cut['parameters'])} stay)")
    made = evaluation.get("healed" if cut["healed"] else "pruned") or {}
    if made.get("layers") == layers - cut["n"]:
        parts.append(f"{_change(made['bytes'], evaluation['whole']['bytes'])} bytes ({_size(made['bytes'])} stay)")
        fast, before = _speed(made), _speed(evaluation["whole"])
        if fast and before:
            parts.append(f"{before:.1f} to {fast:.1f} tokens/s when generating")
    return "Saves", "; ".join(parts) + "."


def _left_out(found: Row) -> list[tuple[str, Any]]:
    names = ", ".join(found["left_out"])
    return [("Says nothing of", f"{names}: the whole model is at chance there.")] if names else []


def _more_items(one: Mapping[str, Any]) -> str:
    """How many items would decide the depth that stopped the plateau: its interval narrows as 1 / sqrt(items)."""
    task = one["recommendation"]["limiting_task"]
    plateau = one["tasks"][task]["plateau"]
    text = "Measure more items (a larger --limit, or none)"
    stop = next((d for d in plateau["depths"] if d["n"] == plateau["first_not_kept"]), None)
    if stop is None or None in (stop["retained"], stop["low"], stop["high"]):
        return text + "."
    gap = stop["retained"] - plateau["share"]
    width = stop["retained"] - stop["low"] if gap > 0 else stop["high"] - stop["retained"]
    need = plateau["items"] * (width / gap) ** 2 if gap else math.inf
    if not plateau["items"] < need < 1e5:
        return text + "."
    rounded = float(f"{need:.2g}")
    fate = "show that it is kept" if gap > 0 else "show that it is not kept"
    return (
        f"{text}: if {stop['n']} dropped goes on keeping {_percent(stop['retained'], 1)}, about {rounded:,.0f} of {task} instead "
        f"of {plateau['items']:,} would {fate}."
    )


def _fraction(n: int, layers: int) -> str:
    """The shortest --drop that gives n."""
    short = (f"{n / layers:.{digits}f}" for digits in range(1, 6))
    return next(text for text in short if 0.5 < float(text) * layers < layers - 0.5 and drop_count(float(text), layers) == n)


# Tables


def _summary(name: str, rows: Sequence[Row], collapse: Mapping[str, Any]) -> Facts:
    one = collapse["series"][name]
    found, loss = one["recommendation"], one["loss"] or {}
    rises = f"{loss['from_n']} to {loss['to_n']}" if loss.get("to_n") is not None and len(rows) > 2 else None
    counted = found["status"] != "no task above chance"
    return {
        "series": _NAMES[name],
        "n": found["n"] if counted else None,
        "likely": found["likely"] if counted else None,
        "limit": found["limiting_task"],
        "kept": f"{_percent(found['low'], 1)} to {_percent(found['high'], 1)}" if found["n"] else None,
        "rises": rises,
        "above": loss.get("above_one"),
    }


def _steps(evaluation: Mapping[str, Any]) -> list[Facts]:
    """The written checkpoints of a run: one column each."""
    titles = {"whole": "whole", "pruned": "after cutting", "healed": "after healing"}
    return [
        {
            "title": titles[name], "layers": found["layers"], "parameters": found["parameters"], "bytes": found["bytes"],
            "loss": _number((found.get("loss") or {}).get("normalised")), "speed": _speed(found),
            "tasks": scores({"tasks": found.get("tasks")}),
        }
        for name, found in evaluation.items() if name in titles
    ]  # fmt: skip


def _line(name: str, row: Row, layers: int) -> Facts:
    block = describe_dropped(tuple(row["kept"]), layers)
    return {**row, "series": _NAMES[name] if row["n"] else "whole model", "block": block if row["n"] else None}


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    inputs, asked = manifest.get("inputs", {}), manifest.get("asked", {})
    parts: dict[str, Mapping[str, Any]] = {
        "Where from": {key: _packaged(value) for key, value in manifest.get("given", {}).items()},
        "Settings": flat({**inputs, **asked, "limit": inputs.get("limit") or "all items"}, ": "),
        "Versions": manifest.get("versions", {}),
        "Seconds": manifest.get("done", {}),
    }
    told = [(title, [(k, _told(v)) for k, v in part.items() if v not in (None, [], {})]) for title, part in parts.items()]
    return [(title, part) for title, part in told if part] if manifest else []


def _told(value: Any) -> str:
    if isinstance(value, list):
        run = len(value) > 2 and all(isinstance(v, int) for v in value) and value == list(range(value[0], value[-1] + 1))
        return f"{value[0]} to {value[-1]}" if run else ", ".join(map(str, value))
    text = str(value)
    return text[:12] + "…" if re.fullmatch("[0-9a-f]{40,}", text) else text


def _packaged(path: Any) -> Any:
    """A file of a recipe by its place under recipes/: where this machine keeps it is no one's business."""
    return str(path).partition("/layerprune/recipes/")[2] or path


# Healing

_PACKINGS = {
    "documents": "documents joined, none sees another",
    "joined": "documents joined, they see one another",
    "truncate": "one document a sequence, truncated",
}
_ADAPTERS = {"all": "all layers", "after": "the layers after the cut"}
_BASES = {"weights": "the checkpoint's own weights", "nf4": "the weights as NF4 holds them"}


def _healing(found: Sequence[Row]) -> Facts | None:
    """The healings of a folder: pictures, a row each, and what they share; None without any. Older records know less."""
    if not found:
        return None
    share = shares([one["n"] for one in found])
    made: list[Facts] = []
    for one in found:
        strategy, strength = one["strategy"], round(100 * share[one["n"]])
        colour = "" if strength == 100 else f"color-mix(in srgb, var(--{strategy}) {strength}%, var(--page))"
        made.append({**one, "name": f"{_NAMES[strategy]}, n = {one['n']}", "style": f"{strategy}-healed", "colour": colour})
    panels = [
        _healing_panel(made, held_out)
        for held_out, points in ((False, trained_losses), (True, held_out_losses)) if any(map(points, made))
    ]  # fmt: skip
    shared = {"Settings": _heal_settings, "Memory": _heal_memory, "Held-out documents": _heal_documents}
    facts = [(title, _together([(one["name"], told(one)) for one in made])) for title, told in shared.items()]
    return {
        "panels": panels,
        "legend": [one for one in made if panels and trained_losses(one)],
        "known": {key: any(_number(one[key]) is not None for one in made) for key in ("whole", "cut")},
        "held": any(map(held_out_losses, made)),
        "table": [_healing_row(one) for one in made],
        "facts": [(title, part) for title, part in facts if part],
    }


def _healing_row(one: Row) -> Facts:
    healing = one["healing"]
    seconds, tokens = _number((healing.get("seconds") or {}).get("train")), _number(healing.get("tokens"))
    losses, held = healing.get("losses") or {}, held_out_losses(one)
    return {
        "series": _NAMES[one["strategy"]],
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
        "adapters on": (_told(healing.get("modules") or []) or None, "targets"),
        "adapters in": (adapters_place(given.get("adapters")), "adapters"),
        "distillation": (f"weight {given['distil']:g}, by {healing.get('teacher')}" if given.get("distil") else None, "distil"),
        "merged into": (_BASES.get(str(given.get("merge"))), "merge"),
    }  # fmt: skip
    if bridge.get("form"):
        told["bridge"] = (f"{bridge['form']}, fitted on {bridge['tokens']:,} tokens", "bridge")
        errors = (_from_to([b["error"]["cut"], b["error"]["bridged"]]) for b in bridge["bridges"])
        told["bridge: squared error"] = ("; ".join(errors), "")
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
        "hash of them all": (_told(documents["hash"]), ""),
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
    return "–" if any(_number(v) is None for v in values) else " to ".join(_fixed(v, digits) for v in values)


def _thousands(value: Any) -> str | None:
    return None if value is None else f"{value:,}"


def _gib(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number / 2**30:.1f} GiB"


# Commands


def _command(manifest: Mapping[str, Any], layers: int) -> str | None:
    """The command line that makes this folder again, from the manifest; what the recipe would give again is left out."""
    given, inputs, asked = manifest.get("given"), manifest.get("inputs", {}), manifest.get("asked", {})
    if not given:
        return None
    heal = inputs.get("heal") or asked.get("heal_settings")
    options: dict[str, Any] = {"--model": given.get("model")}
    kind = inputs.get("kind", "run")
    if kind == "find":
        options["--strategy"] = inputs.get("strategy")
    elif kind == "sweep":
        every = asked.get("drops") == list(range(1, layers))
        options |= {
            "--strategy": ",".join(asked.get("strategies", [])),
            "--drops": None if every else _fractions(asked.get("drops", []), layers),
            "--heal": _fractions(asked.get("heal", []), layers),
        }
    else:
        options |= {"--drop": inputs.get("drop"), "--strategy": inputs.get("strategy")}
        options |= {"--curve": _fractions(inputs.get("curve", []), layers), "--no-heal": None if heal else ""}
    tasks = asked.get("tasks") or inputs.get("tasks") or {}
    options |= {
        "--keep": asked.get("keep", inputs.get("keep", manifest.get("keep"))),
        "--tasks": ",".join(name if shots is None else f"{name}:{shots}" for name, shots in tasks.items()),
        "--limit": inputs.get("limit"),
    }
    for key in ("task_folder", "calibration", "heal_data", "eval_data"):
        own = given.get(key)
        options["--" + key.replace("_", "-")] = own if _packaged(own) == own else None
    # One option sets the samples and the length of all steps: where they differ, they came from the recipe.
    steps = [inputs.get("rank") or {}, inputs.get("loss") or {}, *([heal] if heal else [])]
    for key, among in {"samples": steps[:2], "length": steps}.items():
        values = {step.get(key) for step in among}
        options[f"--{key}"] = values.pop() if len(values) == 1 else None
    options |= {"--heal-steps": heal.get("steps") if heal else None, "--seed": inputs.get("seed")}
    options |= {f"--{key}": v for key in ("dtype", "device") for v in [inputs.get(key)] if v not in ("auto", "cuda")}
    words = []
    for option, value in options.items():
        if option == "--no-heal" and value is not None:
            words.append(option)
        elif value not in (None, ""):
            words += [option, shlex.quote(str(value))]
    return " ".join(["layerprune", kind, *words])


def _fractions(depths: Sequence[int], layers: int) -> str | None:
    return ",".join(_fraction(n, layers) for n in depths) or None


def _serve(folder: Path, model: str, layers: int, cut: tuple[str, int] | None) -> Facts:
    """The checkpoints of the folder, and where they can be served; without any, the commands that make one."""
    found = [name for name in ("healed", "pruned") if (folder / name).is_dir()][:1]
    if not found:
        advised = f"heal/{cut[0].partition(' ')[0]}-{cut[1]}/healed" if cut else ""
        every = sorted(str(p.relative_to(folder)) for p in folder.glob("heal/*/healed"))
        found = sorted(every, key=lambda name: name != advised) if advised in every or not cut else []
    note = None
    if found and (folder / found[0] / "layerprune.json").exists():
        note = read_json(folder / found[0] / "layerprune.json").get("serving")
    if found:
        return {"checkpoint": found[0], "others": found[1:], "make": [], "note": note}
    drop, strategy = (_fraction(cut[1], layers), cut[0].partition(" ")[0]) if cut else ("F", "angular")
    make = [f"layerprune prune --model {shlex.quote(str(model))} --drop {drop} --strategy {strategy} --out cut"]
    return {"checkpoint": "healed", "others": [], "make": [*make, "layerprune heal --model cut --out healed"], "note": None}


# Pictures: geometry in the units of a panel's viewBox

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, STRIP = 440, 290, 44, 14, 42, 11


def _panel(layers: int, own: Mapping[str, Sequence[Row]], task: str | None, collapse: Mapping[str, Any]) -> Facts:
    """One picture against the fraction dropped: a task, or the loss (None). `data` is what the tooltip says."""
    points: dict[str, list[tuple[int, list[float | None]]]] = {}
    for name, rows in own.items():
        values = [(r["n"], r["tasks"].get(task, {}) if task else {"value": r["loss"]}) for r in rows]
        numbers = [(n, [_number(v.get(key)) for key in ("value", "low", "high")]) for n, v in values]
        points[name] = [(n, v) for n, v in numbers if v[0] is not None]
        if len(rows) == 2:  # one depth: a line to it would show what nobody measured
            points[name] = [p for p in points[name] if p[0]] if name.endswith("healed") else points[name]
    about: Mapping[str, Any] = next((r["tasks"][task] for rows in own.values() for r in rows if task in r["tasks"]), {})
    depths = sorted({n for found in points.values() for n, _ in found})
    top, most = 10 + STRIP * len(own), max([*depths, 1])
    seen = [v for found in points.values() for _, value in found for v in value if v is not None] or [1.0]
    chance = _number(about.get("chance"))
    unit = task is not None and min(seen) >= 0 and max(seen) <= 1
    ticks = [0, 0.25, 0.5, 0.75, 1] if unit else _ticks(min(0.0, *seen), max(*seen, 0.1))
    low, high = ticks[0], ticks[-1]

    def x(n: float) -> float:
        return round(LEFT + 6 + (WIDTH - LEFT - RIGHT - 12) * n / most, 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - top) * (value - low) / (high - low), 1)

    every = max(1, math.ceil(7 * len(depths) / (WIDTH - LEFT - RIGHT)))
    lines = []
    for at, (name, found) in enumerate(points.items()):
        if not found:
            continue
        band = [(x(n), y(b), y(c)) for n, (_, b, c) in found if b is not None and c is not None]
        place = [(x(n), y(value[0] or 0.0)) for n, value in found]
        edge = [(a, c) for a, _, c in band] + [(a, b) for a, b, _ in reversed(band)]
        lines.append(
            {
                "style": name.replace(" ", "-"),
                "line": _path(place),
                "marks": _path(place[::every]),
                "band": _path(edge) if len(band) > 1 else "",
                "bars": "".join(f"M{_n(a)} {_n(b)}V{_n(c)}" for a, b, c in band) if len(band) == 1 else "",
                "strip": _strip(collapse, name, task, x, 8 + STRIP * at) if len(own[name]) > 2 else None,
            }
        )
    step = _step(most, 7, whole=True)
    title, _, metric = (task or "normalised loss").partition("/")
    sub = _METRICS.get(metric, metric) if task else "nats a token / ln V; 1 is a uniform guess"
    if task and about.get("n"):
        sub += f", {about['n']:,} items"
    if chance is not None:
        sub += f"; chance {chance:.3g}" + (f" ({about['chance_from']})" if about.get("chance_from") == "majority class" else "")
    line = chance if task else 1 if low <= 1 <= high else None
    return {
        "title": title,
        "sub": sub,
        "label": f"{title} against the fraction of layers dropped",
        "axis": ("drop", "layers"),
        "top": top,
        "lines": lines,
        "level": y(line) if line is not None and low <= line <= high else None,
        "yticks": [(y(v), f"{v:g}") for v in ticks],
        "xticks": [(x(n), n, f"{100 * n / layers:.0f} %") for n in range(0, most + 1, step)],
        "data": {
            "n": depths,
            "x": [x(n) for n in depths],
            "v": [[_rounded(dict(found).get(n)) for n in depths] for found in points.values()],
        },
    }


def _healing_panel(found: Sequence[Facts], held_out: bool) -> Facts:
    """One picture against the tokens trained: the training loss, or the held-out loss with those of the cut and the whole model."""
    points = [(held_out_losses if held_out else trained_losses)(one) for one in found]
    drawn = [(one, own) for one, own in zip(found, points, strict=True) if own]
    known = {key: [_number(one[key]) if held_out else None for one, _ in drawn] for key in ("whole", "cut")}
    whole = next((v for v in known["whole"] if v is not None), None)
    seen = [v for _, own in drawn for _, v in own] + [v for values in known.values() for v in values if v is not None]
    top = max(LOSS_TOP, 1.2 * (whole or 0)) if held_out else math.inf
    ticks = _ticks(min(seen), max(min(max(seen), top), min(seen) + 0.01))
    low, high = ticks[0], ticks[-1]
    most = max(one["healing"]["tokens"] for one, _ in drawn)
    room = 30 if held_out and len(drawn) > 1 else 0  # for the depth at each line's end

    def x(tokens: float) -> float:
        return round(LEFT + 6 + (WIDTH - LEFT - RIGHT - 12 - room) * tokens / most, 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10) * (value - low) / (high - low), 1)

    ends = spread_apart([-y(own[-1][1]) for _, own in drawn], 13)
    lines = []
    for (one, own), before, end in zip(drawn, known["cut"], ends, strict=True):
        place = [(x(t), y(v)) for t, v in own]
        lines.append(
            {
                "style": one["style"], "colour": one["colour"], "line": _path(place),
                "dots": "".join(f"M{_n(a)} {_n(b)}h0" for a, b in place) if held_out else "",
                "before": None if before is None or before > high else y(before),
                "end": (place[-1][0] + 8, round(4 - end, 1), one["n"]) if room else None,
            }
        )  # fmt: skip
    steps = sorted({t for _, own in drawn for t, _ in own})
    far = [(one["n"], v) for (one, _), v in zip(drawn, known["cut"], strict=True) if v is not None and v > high]
    above = [f"{v:.2f} with n\u00a0=\u00a0{n}" for n, v in far]
    title, sub = ("held-out loss", "while training, nats a token / ln V") if held_out else ("training loss", "nats a token")
    if not held_out and any((one["healing"].get("settings") or {}).get("distil") for one, _ in drawn):
        sub += ", the distillation's part included"
    return {
        "title": title,
        "sub": sub + (f"; above the picture: the cut, {' and '.join(above)}" if above else ""),
        "label": f"{title} against the tokens trained",
        "axis": ("tokens", ""),
        "top": 10,
        "lines": lines,
        "level": None if whole is None else y(whole),
        "yticks": [(y(v), f"{v:g}") for v in ticks],
        "xticks": [(x(t), t, short(t)) for t in _ticks(0, most) if t <= most],
        "data": {
            "x": [x(t) for t in steps],
            "heads": [f"{t:,.0f} tokens trained" for t in steps],
            "names": [one["name"] for one, _ in drawn],
            "v": [[[round(v, 5), None, None] if (v := dict(own).get(t)) is not None else None for t in steps] for _, own in drawn],
        },
    }


def _strip(collapse: Mapping[str, Any], name: str, task: str | None, x: Any, y: int) -> Facts | None:
    """Above the picture: the collapse point and its interval, or where the loss rises most."""
    one = collapse.get("series", {}).get(name)
    if one is None:
        return None
    if task is None:
        loss = one["loss"] or {}
        if loss.get("to_n") is None:
            return None
        return {"path": f"M{_n(x(loss['from_n']))} {y - 3}v6m0-3H{_n(x(loss['to_n']))}m0-3v6", "at": None, "y": y}
    step = one["tasks"].get(task, {}).get("transition", {})
    if step.get("low") is None:
        return None
    end = WIDTH - 4
    path = f"M{_n(x(step['low']))} {y - 3}v6m0-3H"
    path += f"{end}l-5-3m5 3l-5 3" if step["high"] is None else f"{_n(x(step['high']))}m0-3v6"
    return {"path": path, "at": None if step["first"] is None else _n(x(step["first"])), "y": y}


def _heat(rank: Mapping[str, Any]) -> Facts:
    """Distances as cells, a path for each shade; each row rescaled, as in figures/distance-heatmap."""
    layers, distance = rank["layers"], rank["distance"]
    top = 10
    cell = (WIDTH - LEFT - RIGHT) / max(1, layers)
    tall = (HEIGHT + 40 - BOTTOM - top) / max(1, len(distance))
    shades: dict[int, list[str]] = {}
    for n, row in enumerate(distance, 1):
        known = [d for d in map(_number, row) if d is not None]
        # the embedding is so far from everything that it would leave one colour for all the rest
        low, high = (min(known), max(known[1:] or known)) if known else (0, 0)
        for start, d in enumerate(map(_number, row)):
            if d is None:
                continue
            shade = min(_SHADES - 1, round((_SHADES - 1) * (d - low) / (high - low))) if high > low else 0
            shades.setdefault(shade, []).append(f"M{start} {len(distance) - n}h1v1h-1z")
    best = {int(n): start for n, start in rank.get("best", {}).items()}
    trace = [(LEFT + (best[n] + 0.5) * cell, top + (len(distance) - n + 0.5) * tall) for n in sorted(best)]
    step = _step(layers, 8, whole=True)
    return {
        "height": HEIGHT + 40,
        "top": top,
        "cell": cell,
        "tall": tall,
        "shades": [(_shade(s / (_SHADES - 1)), "".join(shades[s])) for s in sorted(shades)],
        "trace": _path(trace),
        "dot": max(0.9, min(3.0, cell / 3)),
        "dots": [(_n(a), _n(b)) for a, b in trace],
        "xticks": [(_n(LEFT + (n + 0.5) * cell), n) for n in range(0, layers, step)],
        "yticks": [(_n(top + (len(distance) - n + 0.5) * tall + 4), n) for n in range(step, len(distance) + 1, step)],
        "ramp": ",".join(f"#{c}" for c in _VIRIDIS),
        "data": {
            "d": [_rounded([_number(d) for d in row]) for row in distance],
            "best": best,
            "box": [LEFT, top, cell, tall],
        },
    }


def _shade(t: float) -> str:
    """Viridis at t in [0, 1], straight between its tenths."""
    place = t * (len(_VIRIDIS) - 1)
    at = min(int(place), len(_VIRIDIS) - 2)
    a, b = (bytes.fromhex(_VIRIDIS[i]) for i in (at, at + 1))
    return "#" + bytes(round(p + (q - p) * (place - at)) for p, q in zip(a, b, strict=True)).hex()


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in points)


def _step(span: float, most: int, whole: bool = False) -> Any:
    """The smallest step 1, 2, 5, 10, ... (or a tenth, ...) that takes at most so many to cover the span."""
    ten = 10.0 ** math.floor(math.log10(span / most))
    step = next(ten * k for k in (1, 2, 5, 10) if ten * k * most >= span * (1 - 1e-9))
    return max(1, round(step)) if whole else step


def _ticks(low: float, high: float) -> list[float]:
    step = _step(high - low, 5)
    return [round(k * step, 10) for k in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]


# Numbers


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _rounded(values: Sequence[float | None] | None) -> list[float | None] | None:
    return None if values is None else [None if v is None else round(v, 5) for v in values]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _fixed(value: Any, digits: int = 3) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:.{digits}f}"


def _whole(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:,.0f}"


def _percent(value: Any, digits: int = 0) -> str:
    number = _number(value)
    return "–" if number is None else f"{100 * number:.{digits}f} %"


def _count(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _size(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _change(now: float, before: float) -> str:
    return f"{100 * (before - now) / before:.0f} % of the" if before else "–"


def _speed(found: Mapping[str, Any]) -> float | None:
    return _number((found.get("speed") or {}).get("tokens_per_second"))
