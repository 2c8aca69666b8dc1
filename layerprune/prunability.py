"""The probe `prunability`: what speaks for a cut, layer by layer, beside what cuts do to the loss."""

from __future__ import annotations

import math
from typing import Any

from layerprune.depth_stored import stored
from layerprune.depth_subject import Loaded
from layerprune.model.cuts import Block, Kept, last_block

MOST = 0.6
"""Share of the layers that is dropped at most: beyond it a model is broken by either strategy."""


def prunability(loaded: Loaded) -> dict[str, Any]:
    """By layer l: `angle`, mean d(x^(l), x^(l+1)) of last tokens, in [0, 1]; `skip`, the mean change of the output (L2 of two
    distributions) where l is skipped at all tokens but the first; `kl`, KL(lens || final) in nats at the input of l.

    `whole`: normalised loss of the whole model. `cuts`: by strategy (angular, last), for n = 1 .. 0.6 L, the block's start and
    its normalised loss, None where it is not finite or the model does not run so. lens.json and skip.json are taken from the
    folder where they are there; each other part is kept in .work until the end, so that a killed call goes on with the next.
    """
    opened, label, layers = loaded.opened, loaded.subject.label, len(loaded.decoder)
    distance = opened.once(f".work/{label}/distance.json", lambda: _ranking(loaded))
    cuts = opened.once(f".work/{label}/cuts.json", lambda: _losses(loaded, distance))
    path = opened.path / label
    skip = stored(path / "skip.json", "skip")["all"] if (path / "skip.json").exists() else _part(loaded, "skip-all")
    lens = stored(path / "lens.json", "lens") if (path / "lens.json").exists() else _part(loaded, "lens")
    return {
        "angle": distance[0] if layers > 1 else [],
        "skip": skip["mean"]["output"],
        "kl": lens["kl"],
        **cuts,
        "documents": len(loaded.sequences),
        "tokens": lens["tokens"],
    }


def _part(loaded: Loaded, name: str) -> Any:
    from layerprune.depth_probes import lens_values, skip_variant

    makes = {"skip-all": lambda: skip_variant(loaded, "all"), "lens": lambda: lens_values(loaded)}
    return loaded.opened.once(f".work/{loaded.subject.label}/{name}.json", makes[name])


def _ranking(loaded: Loaded) -> list[list[float]]:
    from layerprune.model.progress import progress_bar
    from layerprune.prune.rank import rank_decoder

    with progress_bar(len(loaded.sequences), "rank", "doc", loaded.ask.progress) as bar:
        return rank_decoder(loaded.decoder, loaded.sequences, progress=bar.update)


def _losses(loaded: Loaded, distance: list[list[float]]) -> dict[str, Any]:
    """Loss of all cuts, and of the whole model, from one pass."""
    from layerprune.eval.sweep import sweep_live
    from layerprune.prune.rank import best_starts

    layers = len(loaded.decoder)
    starts = best_starts(distance)
    sizes = range(1, max(2, math.floor(MOST * layers) + 1)) if layers > 1 else range(0)
    blocks = {
        "angular": [Block(starts[str(n)], n) for n in sizes],
        "last": [last_block(n, layers) for n in sizes],
    }
    whole: Kept = tuple(range(layers))
    kept = [whole, *(block.kept(layers) for found in blocks.values() for block in found)]
    ask = loaded.ask
    found = sweep_live(
        loaded.decoder.model, loaded.tokenizer, kept, sequences=loaded.sequences, seed=ask.seed, progress=ask.progress, say=ask.say
    )

    def loss(one: Kept) -> float | None:
        value = (found[one] or {}).get("loss")
        return value["normalised"] if value is not None and math.isfinite(value["normalised"]) else None

    return {
        "whole": loss(whole),
        "cuts": {
            name: [{"n": block.size, "start": block.start, "loss": loss(block.kept(layers))} for block in some]
            for name, some in blocks.items()
        },
    }  # fmt: skip
