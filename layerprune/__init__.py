"""Make large language models shallower: rank, prune, heal, evaluate, find the collapse point.

The functions below are the whole public API; each is also a command. They are imported lazily, because
torch and transformers take seconds to import and `layerprune --help` must not pay for them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "rank_blocks": "layerprune.prune.rank",
    "prune_checkpoint": "layerprune.prune.cut",
    "heal_checkpoint": "layerprune.heal.train",
    "evaluate_checkpoint": "layerprune.eval.evaluate",
    "run": "layerprune.pipeline",
    "sweep": "layerprune.sweeping",
    "find": "layerprune.search",
    "compare": "layerprune.comparison",
    "probe_depth": "layerprune.depths",
    "search_routing": "layerprune.routing",
    "train_routing": "layerprune.routing",
    "evaluate_routing": "layerprune.route_use",
    "bake_routing": "layerprune.route_bake",
}

__all__ = [*_PUBLIC, "__version__"]

# A checkout that lost its symbolic links (a zip download, Windows) still finds the step folders.
if not (Path(__file__).parent / "model" / "__init__.py").exists():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'layerprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
