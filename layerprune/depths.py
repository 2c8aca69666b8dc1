"""`layerprune depth`: probes of how deep models think, in one folder: one file and one figure a probe, and effective depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.model.config import layer_count, load_config, pick_length
from layerprune.model.data import check_data, data_fingerprint
from layerprune.model.errors import Refused, UsageError
from layerprune.model.fingerprint import checkpoint_fingerprint, folder_fingerprint, tokenizer_fingerprint
from layerprune.model.load import pick_device, pick_dtype
from layerprune.model.recipes import EvalSettings
from layerprune.model.source import ModelSource, find_model
from layerprune.runfolder import RunFolder, open_run
from layerprune.stages import Say, to_stderr

PROBES = {
    "residual": "cosine and relative size of what attention, MLP and layer add to the residual stream",
    "lens": "logit lens: divergence from the final prediction, and overlap of the top 5",
    "tokens": "first choices by frequency and their flips, and when a token is decided",
    "choices": "multiple choice in two stages: when options are listed, when one is chosen (with tasks only)",
    "skip": "what skipping a layer does to later layers and to the output (about L / 2 passes, not by default)",
}
DEFAULT_SAMPLES, DEFAULT_LENGTH = 64, 512
COUNTED = 2000
"""Documents in which tokens are counted, at least: frequent ones are not known from a few."""


@dataclass(frozen=True)
class Subject:
    """One model to be probed. label: its folder's name, unlike those of the others."""

    source: ModelSource
    label: str
    layers: int
    data: str
    length: int


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
    paper's notebooks have it, instead of the first from which all pass.

    out: the folder, by default runs/<model>-depth; it gets <label>/<probe>.json, figures/ and depth.json. A killed call goes
    on, probe by probe. Returns depth.json's content with `folder`. Raises UsageError and Refused.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    chosen = _check_probes(probes, tasks)
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
    with open_run(folder, inputs, {"models": [s.source.name for s in subjects]}) as opened:
        if opened.other_versions():
            say(opened.other_versions())
        found: dict[str, dict[str, Any]] = {}
        for subject in subjects:
            missing = [p for p in chosen if not (folder / subject.label / f"{p}.json").exists()]
            if missing:
                _probe(opened, subject, missing, count, seed, dtype, device, trust_remote_code, progress, say, wanted)
            found[subject.label] = {p: opened.once(f"{subject.label}/{p}.json", dict) for p in chosen}
        result = _summary(subjects, found, reference)
        result["figures"] = _draw(folder, subjects, found)
        opened.finish(result)
        (folder / "depth.json").unlink(missing_ok=True)
        return {**opened.once("depth.json", lambda: result), "folder": str(folder)}


@dataclass(frozen=True)
class Wanted:
    """The tasks of the probe `choices`."""

    tasks: tuple[str, ...]
    limit: int | None
    folder: str | Path | None

    def inputs(self) -> dict[str, Any]:
        """What decides their items."""
        folder = None if self.folder is None else folder_fingerprint(Path(self.folder))
        return {"tasks": list(self.tasks), "limit": self.limit, "task_folder": folder}


def _check_probes(probes: Sequence[str] | None, tasks: Sequence[str] | None) -> list[str]:
    default = [p for p in PROBES if p != "skip" and (p != "choices" or tasks)]
    chosen = default if probes is None else list(dict.fromkeys(probes))
    if "choices" in chosen and not tasks:
        raise UsageError("--probe choices looks at the options of tasks: give --tasks, such as mmlu")
    odd = [p for p in chosen if p not in PROBES]
    if odd or not chosen:
        raise UsageError(f"--probe {odd[0] if odd else ''!r} is none of {', '.join(PROBES)}")
    return [p for p in PROBES if p in chosen]


def _subjects(given: Sequence[str | Path], data: str | None, length: int | None, trust: bool) -> list[Subject]:
    found: list[Subject] = []
    if not given:
        raise UsageError("--model is missing: give a recipe name, a Hub id or a folder")
    for name in given:
        source = find_model(str(name))
        config = load_config(source.folder, trust)
        base = source.recipe.eval if source.recipe else EvalSettings()
        own = source.recipe.data_path(base.data) if source.recipe else base.data
        labels = [s.label for s in found]
        label = source.label if source.label not in labels else f"{source.label}-{len(found) + 1}"
        tokens = pick_length(min(DEFAULT_LENGTH, pick_length(None, config)) if length is None else length, config)
        found.append(Subject(source, label, layer_count(config), data or own, tokens))
    return found


def _probe(
    opened: RunFolder, subject: Subject, probes: Sequence[str], samples: int, seed: int, dtype: str, device: str | None,
    trust: bool, progress: bool, say: Say, wanted: Wanted | None,
) -> None:  # fmt: skip
    """Load one model, run its probes, store each when it is done."""
    from layerprune.depth.lens import lens_probe
    from layerprune.depth.residual import residual_probe
    from layerprune.depth.tokens import count_buckets, tokens_probe
    from layerprune.model.config import vocab_size
    from layerprune.model.data import read_documents, tokenise
    from layerprune.model.decoder import view_decoder
    from layerprune.model.load import load_model, load_tokenizer
    from layerprune.model.progress import progress_bar
    from layerprune.model.tree import exact_branches

    folder = subject.source.folder
    tokenizer = load_tokenizer(folder, trust)
    vocab = vocab_size(load_config(folder, trust))
    documents = read_documents(subject.data, "validation", samples, seed)
    sequences = tokenise(tokenizer, documents, subject.length, at_least=2, vocab=vocab, progress=progress)
    decoder = view_decoder(load_model(folder, device=device, dtype=dtype, trust_remote_code=trust, progress=progress))

    def counted() -> Any:
        more = read_documents(subject.data, "validation", max(samples, COUNTED), seed)
        rows = decoder.model.get_input_embeddings().weight.shape[0]
        return count_buckets(tokenise(tokenizer, more, subject.length, progress=progress), rows)

    runs: dict[str, Callable[[Callable[[int], None]], Any]] = {
        "residual": lambda told: residual_probe(decoder, sequences, progress=told),
        "lens": lambda told: lens_probe(decoder, sequences, progress=told),
        "tokens": lambda told: tokens_probe(decoder, sequences, counted(), progress=told),
    }
    say(f"{subject.source.name}: {len(decoder)} layers, {len(sequences)} documents, {sum(map(len, sequences)):,} tokens")
    for probe in probes:
        if probe != "residual" and not exact_branches(decoder, [tuple(range(len(decoder)))], vocab)[0]:
            raise Refused(
                f"--probe {probe} cannot be used on this {type(decoder.model).__name__}: run layer by layer it gives other logits "
                "than by itself; leave that probe out"
            )
        if probe == "skip":
            with opened.phase(f"{subject.label}: {probe}"):
                effects = _skips(decoder, sequences, progress)
                opened.once(f"{subject.label}/{probe}.json", effects.copy)
            continue
        if probe == "choices":
            assert wanted is not None
            with opened.phase(f"{subject.label}: {probe}"):
                by_task = _choices(decoder, tokenizer, wanted, subject, seed, progress)
                opened.once(f"{subject.label}/{probe}.json", by_task.copy)
            continue
        with opened.phase(f"{subject.label}: {probe}"), progress_bar(len(sequences), probe, "doc", progress) as bar:
            total = runs[probe](bar.update)
            measured = {**total.result(), "tokens": _tokens(total)}
            opened.once(f"{subject.label}/{probe}.json", measured.copy)


def _choices(
    decoder: Any, tokenizer: Any, wanted: Wanted, subject: Subject, seed: int, progress: bool
) -> dict[str, Any]:
    """The probe of every task, by task."""
    from layerprune.choice_items import choice_items
    from layerprune.depth.choices import choices_probe
    from layerprune.eval.evaluate import parse_tasks
    from layerprune.model.progress import progress_bar

    recipe = subject.source.recipe
    folder = wanted.folder or (recipe.tasks_path if recipe else None)
    asked = parse_tasks(list(wanted.tasks), None, recipe)
    items = choice_items(decoder.model, tokenizer, asked, None if folder is None else str(folder), wanted.limit, seed)
    found = {}
    for task, own in items.items():
        with progress_bar(len(own), f"choices: {task}", "item", progress) as bar:
            found[task] = choices_probe(decoder, own, progress=bar.update).result()
    return found


def _skips(decoder: Any, sequences: list[list[int]], progress: bool) -> dict[str, Any]:
    """Both variants: skipped at all tokens but the first, and only at those before the ones that are measured."""
    from layerprune.depth.skip import VARIANTS, skip_effects
    from layerprune.model.progress import progress_bar

    found: dict[str, Any] = {}
    for variant in VARIANTS:
        with progress_bar(len(sequences), f"skip: {variant}", "doc", progress) as bar:
            total = skip_effects(decoder, sequences, variant=variant, progress=bar.update)
        found[variant] = {}
        for aggregate in ("mean", "max"):
            effects = total.result(aggregate)
            rows = [[None if v != v else v for v in row] for row in effects.contribution_SL.tolist()]
            found[variant][aggregate] = {"contribution": rows, "output": effects.output_S.tolist(), "score": effects.score}
        counted = {"documents": effects.documents, "positions": effects.positions, "tokens": effects.tokens}
        found[variant] |= {**counted, "applications": effects.applications, "naive": effects.naive}
    return found


def _tokens(total: Any) -> int:
    tokens = total.tokens_L.max().item() if hasattr(total, "tokens_L") else total.tokens
    return int(tokens)


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
        })  # fmt: skip
    return {"models": models, "probes": list(next(iter(found.values()))), "reference": reference}


def _draw(folder: Path, subjects: Sequence[Subject], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    from layerprune.depth_plots import plot_choices, plot_lens, plot_residual, plot_skip, plot_tokens

    written: list[Path] = []
    draws = {"residual": plot_residual, "lens": plot_lens, "tokens": plot_tokens, "choices": plot_choices, "skip": plot_skip}
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
    pictures = ", ".join(name for name in result["figures"] if name.endswith(".png"))
    return "\n".join([*lines, "", f"{result['folder']}: depth.json, a file for each probe, {pictures}"])


def _cell(metric: Mapping[str, Any]) -> str:
    return "none" if metric["layer"] is None else f"{metric['layer']} ({metric['ratio']:.2f})"
