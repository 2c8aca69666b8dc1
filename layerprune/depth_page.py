"""The page of `layerprune depth`: report.html beside depth.json, one file that needs no network and can be sent around."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from layerprune.figures import number
from layerprune.model.files import read_json, write_text
from layerprune.page import fill
from layerprune.page_words import Facts, as_text, packaged
from layerprune.runfolder import flat

_SHARE = "By the logit lens, the model's own end put on the input of layer l: "
_PROBES = {
    "residual": (
        "What the layers add",
        "Above, the cosine (-1 to 1) of what attention, MLP and layer add with the stream they read: below 0 they erase what is "
        "there, at 0 they write something new beside it, at 1 they repeat it; below, the size of what they add: 0 is nothing, 1 as "
        "much as the stream; what the first layers add can be far more, and leaves the panel.",
    ),
    "lens": (
        "When the prediction stands",
        _SHARE + "the divergence is 0, and the overlap of the top 5 and the top-1 agreement (the share of positions where its most "
        "probable token is the model's) are 1 where that says what the model says in the end; at 0 nothing of it shows yet.",
    ),
    "tuned": (
        "When the prediction stands, by a tuned lens",
        "As the logit lens, with an affine map fitted to each layer first: a divergence of 0 and a top-1 agreement of 1 where it "
        "says what the model says in the end; a divergence that is far above the others leaves the panel.",
    ),
    "tokens": (
        "Frequent and rare tokens",
        _SHARE + "the share of top-1 tokens that fall on tokens of each frequency, from 0 to 1; of these, the share that the end "
        "overturns (0: all stand, 1: none does); and the mean first layer at which the final token has rank k or better, dotted "
        "that from which it keeps it (0: at the embedding, L: only in the end).",
    ),
    "words": (
        "Kinds of words",
        _SHARE + "the mean first layer at which the first token of a word has rank k or better, by part of speech, of tokens that "
        "the model predicts (0: at the embedding, L: only in the end; dotted: from which it keeps it).",
    ),
    "answers": (
        "Answers of several tokens",
        _SHARE + "the mean first layer at which a token of an answer has rank k or better, by its place and the answer's length, "
        "of tokens that the model predicts (0: at the embedding, L: only in the end; dotted: from which it keeps it).",
    ),
    "choices": (
        "Multiple choice",
        _SHARE + "the share of items, from 0 to 1, whose n options are all among its top 2n tokens, whose best option is already "
        "the model's, whose best option is the right one; and the probability of all options together.",
    ),
    "skip": (
        "What skipping a layer does",
        "Left, the change of what a later layer adds, 0 for none and 1 for as much as it adds (skips that stand out far above the "
        "others share the last colour); right, on a logarithmic axis that has no 0, the change of the output's distribution, up "
        "to 1.41 (the root of 2) from one certain token to another.",
    ),
    "erasure": (
        "Until when a token's state matters",
        "A token's state is replaced by the mean state of its depth: 0 means that nothing there was needed for the answer any "
        "more, 1.41 (the root of 2) that the answer's distribution moves from one certain token to another; the answer's own "
        "tokens, all but the last, stand right of the dashed line.",
    ),
    "gradients": (
        "Where the answer comes from",
        "What a token's state at a layer adds to the answer's probability (beside the answer; over several tokens the sum of "
        "theirs, which can be above 1), by integrated gradients from the mean state of the prompt: a row adds up to it less the "
        "one at the mean; below 0 the state speaks against the answer, whose own tokens, all but the last, stand right of the "
        "dashed line.",
    ),
    "prunability": (
        "What speaks for a cut",
        "By layer: the angle to the next state in [0, 1] (0: the layer turns nothing), what skipping it does to the output, and "
        "the lens's divergence; and the loss where layers are dropped (0: certain and right, 1: a uniform guess).",
    ),
}  # fmt: skip
_OVER_DOCUMENTS = ("residual", "lens", "tokens", "tuned", "prunability")
"""Probes whose `tokens` are all of the documents'."""
_ASKED = {"items": "file", "steps": "training steps", "data": "training data", "task_folder": "task files"}
"""What a probe was asked, where its key does not say it."""
_METRICS = {"cos": "cosine", "kl": "KL", "overlap": "overlap"}
_IMAGES = {".svg": "image/svg+xml", ".png": "image/png"}


def write_depth_page(folder: Path, result: Mapping[str, Any], found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Path:
    """Write report.html into the folder of `layerprune depth`; returns its path. The same files give the same bytes.

    result: the content of depth.json (`models`, with or without `notes`, `probes`, `reference`, `figures`). found: by model and
    probe, its values, of any subset of probes; one that is not known here gets its figures only. A figure belongs to the probe
    whose name it has, alone or before a hyphen. manifest.json gives settings and versions where it is there.
    Raises Refused for a manifest that is no JSON.
    """
    path = folder / "report.html"
    write_text(path, fill("depth.html.j2", _facts(folder, result, found)))
    return path


def _facts(folder: Path, result: Mapping[str, Any], found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Facts:
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    names = [str(model["label"]) for model in result["models"]]
    probes = list(dict.fromkeys([*result["probes"], *(probe for own in found.values() for probe in own)]))
    figures = _by_probe(folder, result["figures"], probes)
    sections = [
        {
            "id": f"probe-{index}",
            "title": _PROBES[probe][0] if probe in _PROBES else probe or "More figures",
            "name": probe if probe in _PROBES else "",
            "reading": _PROBES[probe][1] if probe in _PROBES else "",
            "figures": figures.get(probe, []),
            "counted": _counted(probe, found),
            "files": [f"{label}/{probe}.json" for label, own in found.items() if probe in own],
        }
        for index, probe in enumerate([*probes, *([""] if "" in figures else [])])
    ]
    return {
        "models": names,
        "metrics": _metrics(bool(result.get("reference"))),
        "table": [_line(model) for model in result["models"]],
        "notes": [(str(model["label"]), str(note)) for model in result["models"] for note in model.get("notes", [])],
        "sections": sections,
        "settings": _settings(manifest, result, found),
    }


def _metrics(reference: bool) -> list[tuple[str, str]]:
    """What each column of the table says, in one sentence."""
    at = "The first layer at which" if reference else "The first layer from which on"
    return [
        ("Cosine", "The last layer after which what is added turns from erasing (mean cosine below 0) to amplifying."),
        ("KL", f"{at} the lens's divergence from the final prediction is below half of its largest value."),
        ("Overlap", f"{at} the lens shares more than 0.3 of its top 5 tokens with the final ones."),
        ("In brackets", "(layer + 1) / layers: near 0 the first layers decide, at 1 only the last one does."),
    ]


def _line(model: Mapping[str, Any]) -> Facts:
    """A row of the table: `none` where a metric gives no layer, a dash where it was not measured."""
    found = model.get("effective_depth") or {}
    cells = []
    for name in _METRICS:
        metric = found.get(name)
        at = None if metric is None else number(metric["layer"])
        cells.append("–" if metric is None else "none" if at is None else f"{at:.0f} ({metric['ratio']:.2f})")
    same = str(model["model"]) == str(model["label"])
    return {"label": model["label"], "model": "" if same else model["model"], "layers": model["layers"], "cells": cells}


def _by_probe(folder: Path, names: Sequence[str], probes: Sequence[str]) -> dict[str, list[Facts]]:
    """The figures that are there, as data, by probe; those of none under the empty name. SVG where there is one."""
    stems: dict[str, list[Path]] = {}
    for name in names:
        path = folder / name
        if path.suffix in _IMAGES and path.is_file():
            stems.setdefault(path.stem, []).append(path)
    made: dict[str, list[Facts]] = {}
    for stem, paths in stems.items():
        owners = [probe for probe in probes if stem == probe or stem.startswith(f"{probe}-")]
        path = min(paths, key=lambda p: list(_IMAGES).index(p.suffix))
        data = base64.b64encode(path.read_bytes()).decode()
        made.setdefault(max(owners, key=len, default=""), []).append(
            {"name": stem, "source": f"data:{_IMAGES[path.suffix]};base64,{data}"}
        )
    return made


def _counted(probe: str, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """By model: what a probe was asked and what it counted, in words; models of the same words share a line."""
    lines: dict[str, list[str]] = {}
    for label, own in found.items():
        values = own.get(probe, {})
        asked = values.get("asked")
        asked = flat(asked, ": ") if isinstance(asked, Mapping) else {}
        said = [f"{_ASKED.get(key, key)} {_said(v)}" for key, v in asked.items() if v not in (None, [], {})]
        said += _counts(values)
        parts = ((part, _counts(v)) for part, v in values.items() if isinstance(v, Mapping) and part != "asked")
        said += [f"{part}: {' and '.join(counts)}" for part, counts in parts if counts]
        if said:
            lines.setdefault(", ".join(said), []).append(label)
    return [(", ".join(labels), text) for text, labels in lines.items()]


def _counts(values: Mapping[str, Any]) -> list[str]:
    return [f"{values[key]:,} {key}" for key in ("documents", "positions", "items", "tokens") if _is_count(values.get(key))]


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _said(value: Any) -> str:
    return f"{value:,}" if _is_count(value) else f"“{value}”" if isinstance(value, str) and " " in value else as_text(value)


def _settings(
    manifest: Mapping[str, Any], result: Mapping[str, Any], found: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Models, data, documents, tokens, seed, dtype and versions: title, and (key, value) under it."""
    settings = dict(manifest.get("inputs", {}))
    renamed = {
        "models": "checkpoint",
        "tokenizers": "tokenizer",
        "lengths": "tokens of a document, at most",
        "samples": "documents",
    }
    settings = {renamed.get(key, key): value for key, value in settings.items() if key != "kind"}
    tokens = {label: [own[p].get("tokens") for p in _OVER_DOCUMENTS if p in own] for label, own in found.items()}
    known = {label: [count for count in counts if _is_count(count)] for label, counts in tokens.items()}
    settings["tokens"] = {label: f"{max(counts):,}" for label, counts in known.items() if counts}
    settings["effective depth"] = "the first layer past a threshold" if result.get("reference") else None
    parts: dict[str, Mapping[str, Any]] = {
        "Where from": flat(manifest.get("given", {}), ": "),
        "Settings": flat(settings, ": "),
        "Versions": manifest.get("versions", {}),
        "Seconds": manifest.get("done", {}),
    }
    told = {title: {key: v for key, v in part.items() if v not in (None, [], {})} for title, part in parts.items()}
    shown = {
        title: [(key, as_text(packaged(v) if isinstance(v, str) else v)) for key, v in part.items()] for title, part in told.items()
    }
    return [(title, part) for title, part in shown.items() if part]
