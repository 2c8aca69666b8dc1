"""`layerprune depth`: probes of how deep models think, in one folder: one file and one figure a probe, and effective depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.depth_page import write_depth_page
from layerprune.depth_probes import run_probes
from layerprune.depth_subject import Ask, Subject, Wanted
from layerprune.model.config import layer_count, load_config, pick_length
from layerprune.model.data import check_data, data_fingerprint
from layerprune.model.errors import UsageError
from layerprune.model.files import read_json
from layerprune.model.fingerprint import checkpoint_fingerprint, tokenizer_fingerprint
from layerprune.model.load import pick_device, pick_dtype
from layerprune.model.recipes import EvalSettings, section_of
from layerprune.model.source import find_model
from layerprune.runfolder import open_run
from layerprune.stages import Say, to_stderr

PROBES = {
    "residual": "cosine and relative size of what attention, MLP and layer add to the residual stream",
    "lens": "logit lens: divergence from the final prediction, and overlap of the top 5",
    "tokens": "first choices by frequency and their flips, and when a token is decided",
    "choices": "multiple choice in two stages: when options are listed, when one is chosen (with tasks only)",
    "skip": "what skipping a layer does to later layers and to the output (about 2.5 L passes over the data)",
    "prunability": "angular distance, skip effect, lens and the loss of cuts on one axis (about 0.7 L passes over the data)",
    "erasure": "until which layer each token of one prompt matters to its answer (half a pass for each layer and token)",
    "gradients": "at which layer and token an answer's probability arises (16 L passes of one prompt and back, or more)",
    "words": "when words are decided, by part of speech (needs spaCy: the extra `words`)",
    "answers": "when each token of short answers is decided, by its place (with --answers only)",
    "tuned": "a tuned lens beside the logit lens (with --lens or --train-lens only)",
}
DEFAULT_SAMPLES, DEFAULT_LENGTH = 64, 512
DEFAULT = ("residual", "lens", "tokens")


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

    models: recipe names, Hub ids or folders. probes: of `PROBES`; None for the cheap ones. tasks, limit, task_folder: lm-eval
    tasks with letters as options, for the probe `choices`. eval_data: a file or `c4`, by default each model's recipe's, else
    C4's validation split. samples: documents (64), length: tokens that they are cut at (512, or
    the model's context where that is shorter). reference: effective depth by the first layer that passes a threshold, as the
    paper's notebooks have it, instead of the first from which all pass. prompt, answer: for `erasure` and `gradients`; by
    default the start of the first document. lens: a trained lens for `tuned` (a folder of ours or of the tuned-lens library);
    train_lens: steps, to train one instead. answers: a file for `answers`, JSON lines with `prompt` and `answer`.

    out: the folder, by default runs/<model>-depth; it gets <label>/<probe>.json, figures/, depth.json and report.html. A killed
    call goes on, probe by probe. Returns depth.json's content with `folder`. Raises UsageError and Refused.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    chosen = _check_probes(probes, tasks)
    _check_texts(chosen, prompt, answer)
    items, tagger = _check_words(chosen, answers)
    folder_of_lens = _check_lens(chosen, lens, train_lens, len(given))
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} is not a number above 0")
    if task_folder is not None and not Path(task_folder).is_dir():
        raise UsageError(f"the task folder {task_folder} does not exist")
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
        "choices": None if wanted is None else wanted.inputs(),
    }
    told = {"models": [s.source.name for s in subjects], "data": {s.label: s.data for s in subjects}}
    with open_run(folder, inputs, told) as opened:
        if opened.other_versions():
            say(opened.other_versions())
        found: dict[str, dict[str, Any]] = {}
        for subject in subjects:
            for probe in chosen:
                _same_settings(folder / subject.label / f"{probe}.json", ask.settings(probe, subject))
            missing = [p for p in chosen if not (folder / subject.label / f"{p}.json").exists()]
            if missing:
                run_probes(opened, subject, missing, ask)
            found[subject.label] = {p: opened.once(f"{subject.label}/{p}.json", dict) for p in chosen}
        result = _summary(subjects, found, reference)
        result["figures"] = _draw(folder, subjects, found)
        write_depth_page(folder, result, found)
        opened.finish(result)
        (folder / "depth.json").unlink(missing_ok=True)
        return {**opened.once("depth.json", lambda: result), "folder": str(folder)}


def _check_probes(probes: Sequence[str] | None, tasks: Sequence[str] | None) -> list[str]:
    default = [*DEFAULT, *(["choices"] if tasks else [])]
    chosen = default if probes is None else list(dict.fromkeys(probes))
    if "choices" in chosen and not tasks:
        raise UsageError("--probe choices looks at the options of tasks: give --tasks, such as mmlu")
    odd = [p for p in chosen if p not in PROBES]
    if odd or not chosen:
        raise UsageError(f"--probe {odd[0] if odd else ''!r} is none of {', '.join(PROBES)}")
    return [p for p in PROBES if p in chosen]


def _check_texts(chosen: Sequence[str], prompt: str | None, answer: str | None) -> None:
    if (prompt is None) != (answer is None):
        there, missing = ("--answer", "--prompt") if prompt is None else ("--prompt", "--answer")
        raise UsageError(f"{there} is given without {missing}: give both, or none for the start of the first document")
    for option, value in (("--prompt", prompt), ("--answer", answer)):
        if value is not None and not value.strip():
            raise UsageError(f"{option} {value!r} is empty")
    if prompt is not None and not {"erasure", "gradients"} & set(chosen):
        raise UsageError("--prompt is for the probes erasure and gradients: add --probe erasure,gradients")


def _check_lens(chosen: Sequence[str], lens: str | Path | None, steps: int | None, models: int) -> Path | None:
    """The folder of --lens, which is read once, so that a broken lens is refused before a model is loaded."""
    if "tuned" not in chosen:
        if lens is not None or steps is not None:
            raise UsageError(f"--{'lens' if lens is not None else 'train-lens'} is for the probe tuned: add --probe tuned")
        return None
    if (lens is None) == (steps is None):
        raise UsageError("--probe tuned needs a lens: give either --lens DIR or --train-lens STEPS")
    if steps is not None:
        if steps < 1:
            raise UsageError(f"--train-lens {steps} is not a number of steps above 0")
        return None
    if models > 1:
        raise UsageError(f"--lens is of one model, and {models} are given: give one --model, or --train-lens STEPS")
    from layerprune.depth.tuned_file import load_lens
    from layerprune.depth_lens import lens_folder

    assert lens is not None
    folder = lens_folder(lens)
    load_lens(folder)
    return folder


def _check_words(chosen: Sequence[str], answers: str | Path | None) -> tuple[Path | None, Any]:
    """The file of --answers and the tagger, each where its probe is chosen: both are tried before a model is loaded."""
    if ("answers" in chosen) != (answers is not None):
        missing = "--probe answers" if answers is not None else "--answers FILE"
        raise UsageError(f"--probe answers and --answers FILE (JSON lines with `prompt` and `answer`) go together: add {missing}")
    tagger = None
    if answers is not None:
        from layerprune.depth.answers import read_answers

        read_answers(answers)
    if "words" in chosen:
        from layerprune.depth.words import spacy_tagger

        tagger = spacy_tagger()
    return None if answers is None else Path(answers), tagger


def _same_settings(path: Path, asked: Mapping[str, Any] | None) -> None:
    """Raise UsageError where a probe's result is there and was made with other settings of its own."""
    if asked is None or not path.exists():
        return
    before = read_json(path).get("asked", {})
    changed = [f"{key} was {before.get(key)!r}, now {asked[key]!r}" for key in asked if before.get(key) != asked[key]]
    if changed:
        told = "; ".join(changed)
        raise UsageError(f"{path} was made with other settings ({told}): choose another --out or remove that file first")


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
        notes.append(
            f"gradients: probability of the answer's tokens, summed, {own['probability']:.3g}; sums miss the change by at most "
            f"{own['worst']:.2g} ({min(own['points'])} to {max(own['points'])} points; {100 * own['tolerance']:g} % is let pass)"
        )
    if "tuned" in probes:
        own = probes["tuned"]
        kl, top1 = ([sum(own[lens][name]) / len(own[lens][name]) for lens in ("tuned", "logit")] for name in ("kl_final", "top1"))
        notes.append(
            f"tuned lens: mean over layers of KL(final || lens) {kl[0]:.3f} nats against {kl[1]:.3f} by the logit lens; "
            f"first choice right {100 * top1[0]:.1f} % against {100 * top1[1]:.1f} %"
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
    """The table of effective depth, and where everything is."""
    rows = [("model", "layers", "cosine", "KL", "overlap")]
    for model in result["models"]:
        metrics = model["effective_depth"]
        cells = ["-"] * 3 if metrics is None else [_cell(metrics[name]) for name in ("cos", "kl", "overlap")]
        rows.append((model["label"], str(model["layers"]), *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["effective depth: layer (0-based) and (layer + 1) / layers", ""]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    lines += ["", *(f"{model['label']}: {note}" for model in result["models"] for note in model["notes"])]
    while not lines[-1]:
        lines.pop()
    pictures = ", ".join(name for name in result["figures"] if name.endswith(".png"))
    return "\n".join([*lines, "", f"{result['folder']}: report.html, depth.json, a file for each probe, {pictures}"])


def _cell(metric: Mapping[str, Any]) -> str:
    return "none" if metric["layer"] is None else f"{metric['layer']} ({metric['ratio']:.2f})"
