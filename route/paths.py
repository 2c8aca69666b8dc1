"""Paths of layer routing: how often each layer runs on one prompt, and the edits that lead from one path to the next.

A path is a tuple of counts, one a layer: 0 skips it, 1 executes it, 2 applies it twice in a row. Layers keep their order.
The edits are those of Dr.LLM (arXiv 2510.12773, section 4): skip one layer or two neighbours, repeat one layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from layerprune.model.errors import UsageError

Counts = tuple[int, ...]
"""How often each of the L layers runs: SKIP, EXECUTE or REPEAT."""

Order = tuple[int, ...]
"""Original 0-based indices of the layers in the order in which they run; a repeated layer stands there twice."""

SKIP, EXECUTE, REPEAT = 0, 1, 2
ACTIONS = ("skip", "execute", "repeat")
"""The names of the counts, and the order of the routers' classes."""


def whole_path(layers: int) -> Counts:
    """Every layer once: the model itself."""
    return (EXECUTE,) * layers


def check_counts(counts: Counts, layers: int) -> None:
    """Raise UsageError unless `counts` has one of 0, 1, 2 for each of `layers` layers, and runs at least one of them."""
    if len(counts) != layers:
        raise UsageError(f"a path of {len(counts)} counts does not fit a model of {layers} layers: it needs one count a layer")
    for layer, count in enumerate(counts):
        if type(count) is not int or not SKIP <= count <= REPEAT:
            raise UsageError(f"a path gives layer {layer} the count {count!r}: it must be 0 (skip), 1 (execute) or 2 (repeat)")
    if not any(counts):
        raise UsageError(f"a path skips all {layers} layers; at least one must run")


def executed(counts: Counts) -> Order:
    """The layers in the order in which they run."""
    return tuple(layer for layer, count in enumerate(counts) for _ in range(count))


def path_length(counts: Counts) -> int:
    """|path|: layer applications, 1 to 2 L."""
    return sum(counts)


def unique_layers(counts: Counts) -> int:
    """Layers that run at all."""
    return sum(count > 0 for count in counts)


def edits(counts: Counts, longest_skip: int | None = 2) -> Iterator[Counts]:
    """The paths one edit away, each once: skip one layer, skip two neighbours, repeat one layer.

    Skipping takes a repeated layer out altogether, and repeating is for layers that run once, so no count passes 2 (and no
    path 2 L), no edit leaves the path as it is, and no edits lead in a circle. longest_skip: neighbours that edits which
    follow each other may skip together; None for any number. An edit that would leave no layer is not there.
    """
    layers = len(counts)
    for size in (1, 2):
        for start in range(layers - size + 1):
            if SKIP in counts[start : start + size]:
                continue
            made = (*counts[:start], *(SKIP,) * size, *counts[start + size :])
            if any(made) and (longest_skip is None or _skipped_around(made, start) <= longest_skip):
                yield made
    for layer, count in enumerate(counts):
        if count == EXECUTE:
            yield (*counts[:layer], REPEAT, *counts[layer + 1 :])


def _skipped_around(counts: Counts, layer: int) -> int:
    """The length of the run of skipped layers that holds `layer`."""
    first = last = layer
    while first and counts[first - 1] == SKIP:
        first -= 1
    while last + 1 < len(counts) and counts[last + 1] == SKIP:
        last += 1
    return last - first + 1
