"""Results of probes that lie in the folder already: read only where they are what the probe writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import read_json

_HOLDS = {
    "residual": ("cos_att", "cos_mlp", "cos_layer", "rc_att", "rc_mlp", "rc_layer"),
    "lens": ("kl", "kl_final", "overlap", "top1", "tokens"),
    "tokens": ("buckets", "ranks", "share", "share_final", "flip_rate", "decided", "kept"),
    "choices": (),  # a key for each task
    "skip": ("all", "future"),
    "prunability": ("angle", "skip", "kl", "whole", "cuts"),
    "erasure": ("tokens", "answer_tokens", "from_data", "max"),
    "gradients": ("tokens", "answer_tokens", "from_data", "map", "probability", "worst", "points", "tolerance"),
    "words": ("groups", "ranks", "layers", "marked", "predicted", "decided", "kept"),
    "answers": ("groups", "ranks", "layers", "marked", "predicted", "decided", "kept"),
    "tuned": ("tuned", "logit", "training"),
}


def stored(path: Path, probe: str) -> dict[str, Any]:
    """The result of a probe in `path`. Raises Refused for a file that is no JSON, or not what the probe writes."""
    found = read_json(path)
    whole = isinstance(found, dict) and isinstance(found.get("asked", {}), dict)
    missing = [key for key in _HOLDS[probe] if key not in found] if whole else []
    if not whole or missing:
        why = f", for it has no `{missing[0]}`" if missing else ""
        raise Refused(f"{path} is no result of the probe {probe}{why}: remove it, and the same command makes it again")
    return dict(found)


def must_be_asked_alike(path: Path, probe: str, asked: Mapping[str, Any] | None) -> None:
    """Raise UsageError where a probe's result is there and was made with other settings of its own."""
    if asked is None or not path.exists():
        return
    before = stored(path, probe).get("asked", {})
    changed = [f"{key} was {before.get(key)!r}, now {asked[key]!r}" for key in asked if before.get(key) != asked[key]]
    if changed:
        told = "; ".join(changed)
        raise UsageError(f"{path} was made with other settings ({told}): choose another --out or remove that file first")
