"""What the routers see while they learn: the pooled states along each item's labelled path, in one file.

Teacher forcing: an item is run once along its labelled path, and each layer's router gets the state that enters the layer on
that path. The base model has done its work then; all epochs read the file. `features.bin` holds (N, L, 8, D) numbers in the
model's own dtype (32 layers of 4,096 features: 2 MiB an item in half precision), `features.json` how many items are done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from layerprune.model.decoder import Decoder, states_BTD
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import must_have_room, no_space_refusal, read_json, write_json
from layerprune.model.layerwise import Layerwise
from layerprune.route.execute import check_routable, step_along
from layerprune.route.paths import Counts, check_counts
from layerprune.route.router import WINDOWS, pool_windows

_SAVED_EVERY = 32


@dataclass(frozen=True)
class Labelled:
    """A prompt's token ids, and the path that answers it."""

    prompt: tuple[int, ...]
    counts: Counts


@dataclass(frozen=True)
class Features:
    """pooled_NLWD lies on the disk and is read where it is used; real_NW: which windows a prompt has; labels_NL.

    key identifies the base model and the labelled prompts.
    """

    pooled_NLWD: torch.Tensor
    real_NW: torch.Tensor
    labels_NL: torch.Tensor
    key: str


@torch.no_grad()
def collect_features(
    decoder: Decoder,
    base: str,
    items: Sequence[Labelled],
    folder: Path,
    progress: Callable[[int], None] = lambda items: None,
) -> Features:
    """Run every item once along its path, and keep what the routers would see; a call that was killed is gone on with.

    base: the fingerprint of the decoder's checkpoint. folder is made where it is missing; progress is told items as they are
    done. Raises UsageError for no item and for a path of another model, Refused for a model whose layers cannot be routed, a
    folder with other features, a path that the model cannot run, states that are not finite, and a disk that is too small.
    """
    if not items:
        raise UsageError("there is no labelled prompt to train on")
    for item in items:
        check_counts(item.counts, len(decoder))
    check_routable(decoder)
    layerwise = Layerwise(decoder)
    first = layerwise.begin(torch.tensor([items[0].prompt])).start().hidden
    width, dtype = states_BTD(first, 1, len(items[0].prompt)).shape[-1], first.dtype
    shape = (len(items), len(decoder), WINDOWS, width)
    item_bytes = len(decoder) * WINDOWS * width * dtype.itemsize
    key = _key(base, items, dtype)
    with no_space_refusal(folder, "the features that are done stay"):
        folder.mkdir(parents=True, exist_ok=True)
    data = folder / "features.bin"
    done = _done(folder, key)
    if done and (not data.exists() or data.stat().st_size < done * item_bytes):
        done = 0
    must_have_room(data, len(items) * item_bytes, done * item_bytes)
    progress(done)
    with no_space_refusal(data, "the features that are done stay"), open(data, "r+b" if done else "wb") as file:
        file.seek(done * item_bytes)
        for number in range(done, len(items)):
            file.write(_bytes(pooled_states(layerwise, items[number]).to(dtype)))
            if (number + 1) % _SAVED_EVERY == 0 or number + 1 == len(items):
                file.flush()
                os.fsync(file.fileno())
                write_json(folder / "features.json", {"key": key, "done": number + 1})
            progress(1)
    stored = torch.from_file(str(data), shared=False, size=len(items) * item_bytes // dtype.itemsize, dtype=dtype)
    lengths_N = torch.tensor([len(item.prompt) for item in items])
    return Features(
        stored.view(shape), torch.arange(WINDOWS)[None] < lengths_N[:, None], torch.tensor([item.counts for item in items]), key
    )


def pooled_states(layerwise: Layerwise, item: Labelled) -> torch.Tensor:
    """(L, 8, D), float32, on the CPU: the windows of the state that enters each layer along the item's path."""
    ids_BT = torch.tensor([item.prompt])
    batch = layerwise.begin(ids_BT)
    state, found = batch.start(), []
    mask_BT = torch.ones_like(ids_BT)
    for layer, count in enumerate(item.counts):
        found.append(pool_windows(states_BTD(state.hidden, *ids_BT.shape), mask_BT)[0][0].cpu())
        for _ in range(count):
            state = step_along(batch, layer, state, item.counts)
    pooled_LWD = torch.stack(found)
    if not bool(pooled_LWD.isfinite().all()):
        raise Refused("the model's states are not numbers: its weights or this dtype overflow (try --dtype float32)")
    return pooled_LWD


def _done(folder: Path, key: str) -> int:
    """The items that an earlier call has finished."""
    if not (folder / "features.json").exists():
        return 0
    state = read_json(folder / "features.json")
    if not isinstance(state, dict) or state.get("key") != key or type(state.get("done")) is not int:
        raise Refused(f"{folder} holds the features of another model or of other prompts: choose another folder or remove it")
    return int(state["done"])


def _key(base: str, items: Sequence[Labelled], dtype: torch.dtype) -> str:
    digest = hashlib.sha256(f"{base} {dtype}\n".encode())
    for item in items:
        digest.update(json.dumps([item.prompt, item.counts]).encode() + b"\n")
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
