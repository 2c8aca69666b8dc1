"""Run a path through a live model: alone, or beside others that begin alike.

The candidate paths of one prompt differ in few layers, so most of them share their first layers. `PathCache` keeps the states
after the prefixes that have run, up to a number of bytes, and starts each path from the longest one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused, model_errors, one_line
from layerprune.model.layerwise import Batch, Layerwise, State
from layerprune.model.tree import must_run_layer_by_layer
from layerprune.route.paths import Counts, Order, check_counts, executed


def check_routable(decoder: Decoder) -> None:
    """Refuse a model whose layers, called one by one, do not give what it gives itself (compared on a few tokens)."""
    must_run_layer_by_layer(decoder, "its layers cannot be routed")


def run_path(layerwise: Layerwise, batch: Batch, state: State, counts: Counts) -> State:
    """x^(L) of a path from `state`, an x^(0) of the batch, which stays as it is. Without a cache.

    Each application of a layer gets the arguments that the whole model hands that layer. Raises UsageError for a path that
    is none of this model's, Refused where a layer needs what a skipped one would have handed on.
    """
    check_counts(counts, len(layerwise))
    state = state.fork()
    for layer in executed(counts):
        state = step_along(batch, layer, state, counts)
    return state


def step_along(batch: Batch, layer: int, state: State, counts: Counts) -> State:
    """`Batch.step` on the way along `counts`; Refused where the layer cannot run on it."""
    try:
        return batch.step(layer, state)
    except torch.cuda.OutOfMemoryError:
        raise
    except model_errors() as error:
        raise Refused(
            f"layer {layer} does not run along the path {''.join(map(str, counts))}, whose skipped layers pass on more than their "
            f"states ({type(error).__name__}: {one_line(error)})"
        ) from error


class PathCache:
    """The paths of one batch, one after another; every prefix of them is run once as long as its state is kept.

    limit: bytes of states that are kept beside the first and the one at work; the least recently used go first, of those
    used together the longest. kept_bytes: what they take now. applications: layer applications that were run; alone: those
    of running every path by itself. Results are those of `run_path` to the bit.
    """

    def __init__(self, layerwise: Layerwise, batch: Batch, limit: int = 1 << 30) -> None:
        self._layerwise, self._batch, self._limit = layerwise, batch, limit
        self._first = batch.start()
        self._states: OrderedDict[Order, tuple[State, int]] = OrderedDict()
        self.kept_bytes = self.applications = self.alone = 0

    def run(self, counts: Counts) -> State:
        """x^(L) of a path: to be read, not written. Raises what `run_path` raises."""
        check_counts(counts, len(self._layerwise))
        order = executed(counts)
        self.alone += len(order)
        self._touch(order)
        done = next((end for end in range(len(order), 0, -1) if order[:end] in self._states), 0)
        state = self._states[order[:done]][0] if done else self._first
        for end in range(done + 1, len(order) + 1):
            # what is kept must not see what a later layer writes into the mappings
            state = step_along(self._batch, order[end - 1], state.fork(), counts)
            self.applications += 1
            self._keep(order, end, state)
        self._touch(order)
        return state

    def _touch(self, order: Order) -> None:
        """Mark the prefixes of a path as used, the shortest, which serve most other paths, last."""
        for end in range(len(order), 0, -1):
            if order[:end] in self._states:
                self._states.move_to_end(order[:end])

    def _keep(self, order: Order, end: int, state: State) -> None:
        size = _nbytes(state)
        if size > self._limit:
            return
        while self.kept_bytes + size > self._limit:
            oldest = next(iter(self._states))
            if oldest == order[: len(oldest)]:  # the path's own beginning is worth more than its end
                return
            self.kept_bytes -= self._states.pop(oldest)[1]
        self._states[order[:end]] = (state, size)
        self.kept_bytes += size


def _nbytes(value: Any) -> int:
    """Bytes of the tensors in a state; one that several states share counts in each of them."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, State):
        return value.hidden.nbytes + _nbytes(value.shared)
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0
