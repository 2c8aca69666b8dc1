"""`layerprune depth`: probes of how deep models think, in one folder: one file and one figure a probe, and effective depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.depth_checks import PROBES, check_lens, check_probes, check_tasks, check_texts, check_words
from layerprune.depth_page import write_depth_page
from layerprune.depth_probes import run_probes
from layerprune.depth_stored import must_be_asked_alike, stored
from layerprune.depth_subject import Ask, Subject, Wanted
from layerprune.model.config import layer_count, load_config, pick_length
from layerprune.model.data import check_data, data_fingerprint
from layerprune.model.errors import UsageError
from layerprune.model.fingerprint import checkpoint_fingerprint, tokenizer_fingerprint
from layerprune.model.load import pick_device, pick_dtype
from layerprune.model.recipes import EvalSettings, section_of
from layerprune.model.source import find_model
from layerprune.runfolder import open_run
from layerprune.stages import Say, to_stderr

DEFAULT_SAMPLES, DEFAULT_LENGTH = 64, 512


def probe_depth(
    models: str | Path | Sequence[str | Path],
    *,
    probes: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    task_folder: str | Path | None = None,
    eval_data: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    reference: bool = False,
    prompt: str | None = None,
    answer: str | None = None,
    lens: str | Path | None = None,
    train_lens: int | None = None,
    answers: str | Path | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    progress: bool = False,
    say: Say = to_stderr,
) -> dict[str, Any]:
    """Probe how deep one or several models think (arXiv 2512.14064): per layer, and as effective depth.

    models: recipe names, Hub ids or folders. probes: of `depth_checks.PROBES`; None for the cheap ones. tasks, limit,
    task_folder: lm-eval tasks with letters as options, for the probe `choices`. eval_data: a file or `c4`, by default each
    model's recipe's, else C4's validation split. samples: documents (64), length: tokens that they are cut at (512, or the
    model's context where that is shorter). reference: effective depth by the first layer that passes a threshold, as the
    paper's notebooks have it, instead of the first from which all pass. prompt, answer: for `erasure` and `gradients`; by
    default the start of the first document. lens: a trained lens for `tuned` (a folder of ours or of the tuned-lens library);
    train_lens: steps, to train one instead. answers: a file for `answers`, JSON lines with `prompt` and `answer`.

    out: the folder, by default runs/<model>-depth; it gets <label>/<probe>.json, figures/, depth.json and report.html. A killed
    call goes on, probe by probe; what earlier calls probed of the same models and texts stays in the summary. Returns depth.json's
    content with `folder`. Raises UsageError and Refused.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    chosen = check_probes(probes, tasks)
    check_tasks(chosen, tasks, limit, task_folder)
    check_texts(chosen, prompt, answer)
    items, tagger = check_words(chosen, answers)
    folder_of_lens = check_lens(chosen, lens, train_lens, len(given))
    wanted = None if "choices" not in chosen else Wanted(tuple(tasks or ()), limit, task_folder)
    if samples is not None and samples < 1:
        raise UsageError(f"--samples {samples} is not a number above 0")
    pick_dtype(dtype, pick_device(device))
    subjects = _subjects(given, eval_data, length, trust_remote_code)
    for data in dict.fromkeys(subject.data for subject in subjects):
        check_data(data, "--eval-data", "validation", seed)
    count = samples or DEFAULT_SAMPLES
    ask = Ask(
        count, seed, dtype, device, trust_remote_code, progress, say, wanted, prompt, answer, folder_of_lens, train_lens,
        items, tagger,
    )  # fmt: skip
    if train_lens is not None:
        for data in dict.fromkeys(subject.lens_data for subject in subjects):
            check_data(data, "--train-lens", "train", seed)
    folder = Path(out) if out is not None else Path("runs") / f"{subjects[0].source.label}-depth"
    inputs = {
        "kind": "depth",
        "models": {s.label: checkpoint_fingerprint(s.source.folder) for s in subjects},
        "tokenizers": {s.label: tokenizer_fingerprint(s.source.folder) for s in subjects},
        "data": {s.label: data_fingerprint(s.data) for s in subjects},
        "lengths": {s.label: s.length for s in subjects},
        "samples": count,
        "seed": seed,
        "dtype": dtype,
        "device": pick_device(device),
    }
    told = {"models": [s.source.name for s in subjects], "data": {s.label: s.data for s in subjects}}
    with open_run(folder, inputs, told) as opened:
        if opened.other_versions():
            say(opened.other_versions())
        found: dict[str, dict[str, Any]] = {}
        for subject in subjects:
            for probe in chosen:
                must_be_asked_alike(folder / subject.label / f"{probe}.json", probe, ask.settings(probe, subject))
            missing = [p for p in chosen if not (folder / subject.label / f"{p}.json").exists()]
            if missing:
                run_probes(opened, subject, missing, ask)
        there = [p for p in PROBES if p in chosen or all((folder / s.label / f"{p}.json").exists() for s in subjects)]
        for subject in subjects:
            found[subject.label] = {p: stored(folder / subject.label / f"{p}.json", p) for p in there}
        result = _summary(subjects, found, reference)
        result["figures"] = _draw(folder, subjects, found)
        write_depth_page(folder, result, found)
        opened.finish(result)
        (folder / "depth.json").unlink(missing_ok=True)
        return {**opened.once("depth.json", lambda: result), "folder": str(folder)}


def _subjects(given: Sequence[str | Path], data: str | None, length: int | None, trust: bool) -> list[Subject]:
    found: list[Subject] = []
    if not given:
        raise UsageError("--model is missing: give a recipe name, a Hub id or a folder")
    for name in given:
        source = find_model(str(name))
        config = load_config(source.folder, trust)
        labels = [s.label for s in found]
        label = source.label if source.label not in labels else f"{source.label}-{len(found) + 1}"
        tokens = pick_length(min(DEFAULT_LENGTH, pick_length(None, config)) if length is None else length, config)
        found.append(Subject(source, label, layer_count(config), data or section_of(source.recipe, EvalSettings).data, tokens))
    return found


def _summary(subjects: Sequence[Subject], found: Mapping[str, Mapping[str, Any]], reference: bool) -> dict[str, Any]:
    from layerprune.depth.effective import effective_depth

    models = []
    for subject in subjects:
        probes = found[subject.label]
        both = {"residual", "lens"} <= set(probes)
        models.append({
            "label": subject.label,
            "model": subject.source.name,
            "layers": subject.layers,
            "effective_depth": effective_depth(probes["residual"], probes["lens"], reference) if both else None,
            "notes": _notes(probes),
        })  # fmt: skip
    return {"models": models, "probes": list(next(iter(found.values()))), "reference": reference}


def _notes(probes: Mapping[str, Any]) -> list[str]:
    """A sentence each on what is not to be seen in a table: the prompt, the completeness, the lenses."""
    notes = []
    prompt = probes.get("erasure") or probes.get("gradients")
    if prompt and prompt["from_data"]:
        cut = len(prompt["tokens"]) - prompt["answer_tokens"]
        notes.append(
            f"no --prompt was given: the prompt is the first {cut} tokens of a document, the answer what follows there, "
            f"{''.join(prompt['tokens'][cut:])!r}"
        )
    if "gradients" in probes:
        own = probes["gradients"]
        count = own["answer_tokens"]
        told = "probability of the answer" if count == 1 else f"probabilities of the answer's {count} tokens, summed:"
        notes.append(
            f"gradients: {told} {own['probability']:.3g}; a layer's gradients miss its change by at most "
            f"{own['worst']:.2g} ({min(own['points'])} to {max(own['points'])} points; {100 * own['tolerance']:g} % is let pass)"
        )
    for name in ("words", "answers"):
        if name in probes:
            marked, predicted = (sum(probes[name][key]) for key in ("marked", "predicted"))
            notes.append(f"{name}: the model predicts {predicted:,} of the {marked:,} tokens looked at, and only these count")
    if "tuned" in probes:
        own = probes["tuned"]
        kl, top1 = ([sum(own[lens][name]) / len(own[lens][name]) for lens in ("tuned", "logit")] for name in ("kl_final", "top1"))
        notes.append(
            f"tuned lens: mean over layers of KL(final || lens) {kl[0]:.3f} nats against {kl[1]:.3f} by the logit lens; "
            f"top-1 agreement {100 * top1[0]:.1f} % against {100 * top1[1]:.1f} %"
        )
    return notes


def _draw(folder: Path, subjects: Sequence[Subject], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    from layerprune import depth_maps, depth_plots, depth_word_plots

    written: list[Path] = []
    draws = {
        "residual": depth_plots.plot_residual, "lens": depth_plots.plot_lens, "tokens": depth_plots.plot_tokens,
        "choices": depth_plots.plot_choices, "skip": depth_plots.plot_skip, "prunability": depth_maps.plot_prunability,
        "erasure": depth_maps.plot_erasure, "gradients": depth_maps.plot_gradients, "tuned": depth_plots.plot_tuned,
        "words": depth_word_plots.plot_words, "answers": depth_word_plots.plot_answers,
    }  # fmt: skip
    for name, draw in draws.items():
        have = {label: probes[name] for label, probes in found.items() if name in probes}
        if have:
            written += draw(have, folder / "figures")
    return [str(path.relative_to(folder)) for path in written]


def format_depth(result: Mapping[str, Any]) -> str:
    """The table of effective depth, what its columns say, notes, and where everything is."""
    lines = []
    if any(model["effective_depth"] is not None for model in result["models"]):
        lines += [*_table(result["models"]), "", *_legend(bool(result["reference"])), ""]
    else:
        lines += ["effective depth is not told: it needs the probes residual and lens", ""]
    notes = [f"{model['label']}: {note}" for model in result["models"] for note in model["notes"]]
    lines += [*notes, ""] if notes else []
    pictures = ", ".join(name for name in result["figures"] if name.endswith(".png"))
    return "\n".join([*lines, f"{result['folder']}: report.html, depth.json, a file for each probe, {pictures}"])


def _table(models: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [("model", "layers", "cosine", "KL", "overlap")]
    for model in models:
        metrics = model["effective_depth"]
        cells = ["-"] * 3 if metrics is None else [_cell(metrics[name]) for name in ("cos", "kl", "overlap")]
        rows.append((model["label"], str(model["layers"]), *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["effective depth: layer (0-based) and, in brackets, (layer + 1) / layers", ""]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return lines


def _legend(reference: bool) -> list[str]:
    at = "first layer at which" if reference else "first layer from which on"
    return [
        "cosine   last layer before what is added turns from erasing (mean cosine below 0) to amplifying; none: no such turn",
        f"KL       {at} the lens's divergence from the final prediction is below half of its largest value",
        f"overlap  {at} more than 0.3 of the lens's top 5 tokens are among the final top 5",
    ]


def _cell(metric: Mapping[str, Any]) -> str:
    return "none" if metric["layer"] is None else f"{metric['layer']} ({metric['ratio']:.2f})"
