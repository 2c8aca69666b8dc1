"""The probes of one prompt and its gold answer: residual erasure and integrated gradients."""

from __future__ import annotations

from typing import Any

from layerprune.depth_subject import Ask, Loaded, Prompt
from layerprune.model.errors import UsageError

PROMPT, ANSWER = 24, 2
"""Tokens of a prompt and an answer that are taken from the data where the user gives none."""
STEPS, MOST = 32, 1024
"""Points of the path that a layer's gradients are taken at, to begin with and at most."""


def pick_prompt(tokenizer: Any, config: Any, ask: Ask, sequences: list[list[int]]) -> Prompt:
    """The prompt and the answer that the user gave, else the start of the first document that is long enough.

    The answer's tokens are those in which prompt + answer differs from the prompt alone, so a token that lies across the two
    is the answer's. A document shorter than both is taken where none is longer. Raises UsageError for a prompt or an answer
    without a token, and for more tokens than the model's context.
    """
    from layerprune.model.config import context_length, vocab_size
    from layerprune.model.data import check_token_id

    if ask.prompt is None:
        long = [ids for ids in sequences if len(ids) >= PROMPT + ANSWER]
        ids = (long or [max(sequences, key=len)])[0][: PROMPT + ANSWER]
        answer = min(ANSWER, len(ids) - 1)
    else:
        alone, ids = tokenizer(ask.prompt)["input_ids"], tokenizer(ask.prompt + str(ask.answer))["input_ids"]
        if alone and ids and alone[-1] == ids[-1] == tokenizer.eos_token_id:
            alone, ids = alone[:-1], ids[:-1]
        same = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
        answer = len(ids) - same
        if not same:
            raise UsageError(f"--prompt {ask.prompt!r} leaves no token before the answer: make it longer")
        if not answer:
            raise UsageError(f"--answer {ask.answer!r} adds no token to the prompt")
        context = context_length(config)
        if context and len(ids) > context:
            raise UsageError(f"--prompt and --answer are {len(ids)} tokens, beyond the model's context of {context}")
        check_token_id(max(ids), vocab_size(config))
    return Prompt(list(ids), answer, [tokenizer.decode([token]) for token in ids], ask.prompt is not None)


def erasure(loaded: Loaded) -> dict[str, Any]:
    """erasure.json: `max` and `mean` (L+1, T), see `Erasure`; the baseline is the mean state over the documents' tokens."""
    from layerprune.depth.erasure import erase, mean_states
    from layerprune.model.progress import progress_bar

    prompt, decoder, show = _prompt(loaded), loaded.decoder, loaded.ask.progress
    with progress_bar(len(loaded.sequences), "erasure: mean states", "doc", show) as bar:
        mean = mean_states(decoder, loaded.sequences, progress=bar.update)
    with progress_bar(len(decoder) + 1, "erasure", "depth", show) as bar:
        found = erase(decoder, prompt.ids, prompt.answer, mean.result(), progress=bar.update)
    return {
        **_told(prompt),
        "max": found.max_LT.tolist(),
        "mean": found.mean_LT.tolist(),
        "baseline_tokens": mean.counts[0],
        "applications": found.applications,
        "naive": found.naive,
    }


def gradients(loaded: Loaded) -> dict[str, Any]:
    """gradients.json: `map` (L, T), its completeness, and `points` of the path taken by layer, see `Attribution`.

    `probability` is that of the answer's one token, and over several the sum of theirs, in [0, number of tokens].

    Raises Refused at the first layer that is not within the tolerance at the most points.
    """
    from layerprune.depth.gradients import integrated_gradients
    from layerprune.model.progress import progress_bar

    prompt, decoder = _prompt(loaded), loaded.decoder
    with progress_bar(len(decoder), "gradients", "layer", loaded.ask.progress) as bar:
        found = integrated_gradients(
            decoder, prompt.ids, prompt.answer, rule="adaptive", steps=STEPS, most=MOST, only_complete=True, progress=bar.update
        )  # fmt: skip
    return {
        **_told(prompt),
        "map": found.map_LT.tolist(),
        "probability": found.whole,
        "change": found.change_L.tolist(),
        "error": found.error_L.tolist(),
        "worst": float(found.error_L.abs().max()),
        "tolerance": found.tolerance,
        "points": found.points_L.tolist(),
        "baseline": "mean of the layer's output over the prompt's tokens",
        "applications": found.applications,
        "naive": found.naive,
    }


def _prompt(loaded: Loaded) -> Prompt:
    assert loaded.prompt is not None
    return loaded.prompt


def _told(prompt: Prompt) -> dict[str, Any]:
    return {"tokens": prompt.texts, "ids": prompt.ids, "answer_tokens": prompt.answer, "from_data": not prompt.given}
