"""Where the single commands write, and ranking as a command of its own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerprune.model.errors import Stopped
from layerprune.model.files import must_not_exist, new_folder, write_json
from layerprune.model.source import ModelSource


def rank(model: str | Path, out: str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """`rank_blocks`, written to a new folder as rank.json and figures/; returns the ranking with `folder`.

    Raises Stopped for a Ctrl-C in a pass that the same call goes on with.
    """
    from layerprune.distances import plot_distances
    from layerprune.prune.rank import rank_blocks

    label, folder = _label(model), default_folder(out, model, "rank")
    keep = folder.absolute().parent / f".{folder.name}.pass"  # the folder itself is there only when it is whole
    try:
        ranking = rank_blocks(model, keep=keep, **settings)
    except KeyboardInterrupt:
        if (keep / "rank.safetensors").exists():  # only a pass over the files leaves it
            raise Stopped("the same command goes on with what is done") from None
        raise
    with new_folder(folder) as made:
        write_json(made / "rank.json", ranking)
        plot_distances(ranking, made / "figures", label)
    shutil.rmtree(keep, ignore_errors=True)
    return {**ranking, "folder": str(folder)}


def format_rank(ranking: Mapping[str, Any]) -> str:
    """The best block of some sizes as a table, and where the ranking is."""
    layers = ranking["layers"]
    sizes = "some sizes; rank.json has all" if layers > 20 else "all sizes"
    lines = [f"{layers} layers, {ranking['settings']['documents']} documents ({sizes})", "", "  n  fraction    block  distance"]
    for n in sorted({max(1, round(layers * step / 20)) for step in range(1, 20)} - {layers}):
        start = ranking["best"][str(n)]
        block = f"{start}:{start + n}"
        lines.append(f"{n:>3}  {n / layers:>8.3f}  {block:>7}  {ranking['distance'][n - 1][start]:>8.4f}")
    return "\n".join([*lines, "", f"{ranking['folder']}: rank.json, figures/"])


def default_folder(out: str | Path | None, model: str | Path, what: str) -> Path:
    """The folder of a step's result: the one asked for, else runs/<model>-<what>; it must not exist."""
    folder = Path(out) if out is not None else Path("runs") / f"{_label(model)}-{what}"
    must_not_exist(folder)
    return folder


def prune_folder(out: str | None, model: str, drop: float | None, layers: str | None, strategy: str, **rest: Any) -> Path:
    """Where `prune` writes when it is not told."""
    chosen = f"{strategy}-{drop:g}" if drop is not None else f"layers-{str(layers).replace(':', '-')}"
    return default_folder(out, model, f"{chosen}-pruned")


def _label(model: str | Path) -> str:
    return ModelSource(str(model), Path(), None, None, None).label
