"""The settings of a run as the page tells them, and the command that makes its folder again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from layerprune.page_verdict import shortest_drop
from layerprune.page_words import as_text, packaged
from layerprune.runfolder import flat


def settings_of(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    inputs, asked = manifest.get("inputs", {}), manifest.get("asked", {})
    parts: dict[str, Mapping[str, Any]] = {
        "Where from": {key: packaged(value) for key, value in manifest.get("given", {}).items()},
        "Settings": flat({**inputs, **asked, "limit": inputs.get("limit") or "all items"}, ": "),
        "Versions": manifest.get("versions", {}),
        "Seconds": manifest.get("done", {}),
    }
    told = [(title, [(k, as_text(v)) for k, v in part.items() if v not in (None, [], {})]) for title, part in parts.items()]
    return [(title, part) for title, part in told if part] if manifest else []


def command_of(manifest: Mapping[str, Any], layers: int) -> str | None:
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
        options["--" + key.replace("_", "-")] = own if packaged(own) == own else None
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
    return ",".join(shortest_drop(n, layers) for n in depths) or None
