"""Run the probes of one model, and store each when it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from layerprune.depth_subject import Ask, Loaded, Subject
from layerprune.model.config import load_config
from layerprune.runfolder import RunFolder

COUNTED = 2000
"""Documents in which tokens are counted, at least: frequent ones are not known from a few."""


def run_probes(opened: RunFolder, subject: Subject, probes: Sequence[str], ask: Ask) -> None:
    """Load one model and run its probes into <label>/<probe>.json. Raises Refused for what a probe cannot be used on."""
    from layerprune.depth_lens import tuned
    from layerprune.depth_prompt import erasure, gradients
    from layerprune.model.tree import must_run_layer_by_layer
    from layerprune.prunability import prunability

    runs: dict[str, Callable[[Loaded], dict[str, Any]]] = {
        "residual": _residual, "lens": lens_values, "tokens": _by_frequency, "choices": _choices, "skip": _skip,
        "prunability": prunability, "erasure": erasure, "gradients": gradients, "tuned": tuned,
        "words": _words, "answers": _answers,
    }  # fmt: skip
    loaded = _load(opened, subject, probes, ask)
    decoder, sequences = loaded.decoder, loaded.sequences
    tokens = sum(map(len, sequences))
    ask.say(f"{subject.source.name}: {len(decoder)} layers, {len(sequences)} documents, {tokens:,} tokens")
    for probe in probes:
        if probe != "residual":
            must_run_layer_by_layer(decoder, f"--probe {probe} cannot be used on it; leave that probe out")
        with opened.phase(f"{subject.label}: {probe}"):
            asked = ask.settings(probe, subject)
            found = {} if asked is None else {"asked": asked}
            found |= runs[probe](loaded)
            opened.once(f"{subject.label}/{probe}.json", found.copy)


def _load(opened: RunFolder, subject: Subject, probes: Sequence[str], ask: Ask) -> Loaded:
    from layerprune.depth_prompt import pick_prompt
    from layerprune.model.config import vocab_size
    from layerprune.model.data import read_documents, tokenise
    from layerprune.model.decoder import view_decoder
    from layerprune.model.load import load_model, load_tokenizer

    folder = subject.source.folder
    config = load_config(folder, ask.trust)
    tokenizer, vocab = load_tokenizer(folder, ask.trust), vocab_size(config)
    documents = read_documents(subject.data, "validation", ask.samples, ask.seed)
    sequences = tokenise(tokenizer, documents, subject.length, at_least=2, vocab=vocab, progress=ask.progress)
    prompt = pick_prompt(tokenizer, config, ask, sequences) if {"erasure", "gradients"} & set(probes) else None
    live = load_model(folder, device=ask.device, dtype=ask.dtype, trust_remote_code=ask.trust, progress=ask.progress)
    return Loaded(opened, subject, ask, view_decoder(live), tokenizer, documents, sequences, prompt)


def _residual(loaded: Loaded) -> dict[str, Any]:
    from layerprune.depth.residual import residual_probe

    return _over_documents(loaded, "residual", residual_probe)


def lens_values(loaded: Loaded) -> dict[str, Any]:
    from layerprune.depth.lens import lens_probe

    return _over_documents(loaded, "lens", lens_probe)


def _by_frequency(loaded: Loaded) -> dict[str, Any]:
    from layerprune.depth.tokens import count_buckets, tokens_probe
    from layerprune.model.data import read_documents, tokenise

    subject, ask = loaded.subject, loaded.ask
    more = read_documents(subject.data, "validation", max(ask.samples, COUNTED), ask.seed)
    rows = loaded.decoder.model.get_input_embeddings().weight.shape[0]
    counted = count_buckets(tokenise(loaded.tokenizer, more, subject.length, progress=ask.progress), rows)

    def probe(decoder: Any, sequences: list[list[int]], **told: Any) -> Any:
        return tokens_probe(decoder, sequences, counted, **told)

    return _over_documents(loaded, "tokens", probe)


def _over_documents(loaded: Loaded, name: str, probe: Callable[..., Any]) -> dict[str, Any]:
    """The means of a probe that goes through the documents once, and the tokens that they are over."""
    from layerprune.model.progress import progress_bar

    with progress_bar(len(loaded.sequences), name, "doc", loaded.ask.progress) as bar:
        total = probe(loaded.decoder, loaded.sequences, progress=bar.update)
    tokens = total.tokens_L.max().item() if hasattr(total, "tokens_L") else total.tokens
    return {**total.result(), "tokens": int(tokens)}


def _words(loaded: Loaded) -> dict[str, Any]:
    from layerprune.depth.words import words_probe
    from layerprune.model.progress import progress_bar

    assert loaded.ask.tagger is not None
    with progress_bar(len(loaded.documents), "words", "doc", loaded.ask.progress) as bar:
        total = words_probe(
            loaded.decoder, loaded.tokenizer, loaded.documents, loaded.ask.tagger, length=loaded.subject.length, progress=bar.update
        )
    return {**total.result(), "tokens": total.tokens}


def _answers(loaded: Loaded) -> dict[str, Any]:
    from layerprune.depth.answers import answers_probe, read_answers
    from layerprune.model.config import pick_length
    from layerprune.model.progress import progress_bar

    assert loaded.ask.answers is not None
    items, longest = read_answers(loaded.ask.answers), pick_length(None, loaded.decoder.model.config)
    with progress_bar(len(items), "answers", "item", loaded.ask.progress) as bar:
        total = answers_probe(loaded.decoder, loaded.tokenizer, items, length=longest, progress=bar.update)
    return {**total.result(), "items": len(items), "tokens": total.tokens}


def _choices(loaded: Loaded) -> dict[str, Any]:
    """The probe of every task, by task."""
    from layerprune.choice_items import choice_items
    from layerprune.depth.choices import choices_probe
    from layerprune.eval.evaluate import parse_tasks
    from layerprune.model.progress import progress_bar

    recipe, wanted, seed = loaded.subject.source.recipe, loaded.ask.tasks, loaded.ask.seed
    assert wanted is not None
    folder = wanted.folder or (recipe.tasks_path if recipe else None)
    asked, path = parse_tasks(list(wanted.tasks), None, recipe), None if folder is None else str(folder)
    found = {}
    for task, own in choice_items(loaded.decoder.model, loaded.tokenizer, asked, path, wanted.limit, seed).items():
        with progress_bar(len(own), f"choices: {task}", "item", loaded.ask.progress) as bar:
            found[task] = choices_probe(loaded.decoder, own, progress=bar.update).result()
    return found


def _skip(loaded: Loaded) -> dict[str, Any]:
    """Both variants: skipped at all tokens but the first, and only at those before the ones that are measured."""
    from layerprune.depth.skip import VARIANTS

    return {variant: skip_variant(loaded, variant) for variant in VARIANTS}


def skip_variant(loaded: Loaded, variant: str) -> dict[str, Any]:
    """One variant of skip.json: by aggregate, the map and the effect on the output; and what was counted."""
    from layerprune.depth.skip import AGGREGATES, skip_effects
    from layerprune.model.progress import progress_bar

    with progress_bar(len(loaded.sequences), f"skip: {variant}", "doc", loaded.ask.progress) as bar:
        total = skip_effects(loaded.decoder, loaded.sequences, variant=variant, progress=bar.update)
    found: dict[str, Any] = {}
    for aggregate in AGGREGATES:
        effects = total.result(aggregate)
        rows = [[None if v != v else v for v in row] for row in effects.contribution_SL.tolist()]
        found[aggregate] = {"contribution": rows, "output": effects.output_S.tolist(), "score": effects.score}
    counted = {"documents": effects.documents, "positions": effects.positions, "tokens": effects.tokens}
    return found | {**counted, "applications": effects.applications, "naive": effects.naive}
