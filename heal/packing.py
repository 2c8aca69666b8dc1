"""Documents, one after another, cut into sequences of one length: no token is padding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from layerprune.model.data import stream_documents
from layerprune.model.errors import Refused
from layerprune.model.files import must_have_room, no_space_refusal, read_json, write_json
from layerprune.model.progress import progress_bar

_TOGETHER = 512
"""Documents that are tokenised in one call."""


@dataclass(frozen=True)
class Packed:
    """Packed sequences on disk and what they were made of.

    ids_NT: int32 (sequences, tokens of each), memory-mapped. documents: read, repeats counted again.
    epochs: how often the data was begun; 1 where it did not have to be repeated.
    """

    ids_NT: Any
    documents: int
    epochs: int


def pack(
    tokenizer: Any, data: str, sequences: int, length: int, seed: int, folder: Path, progress: bool = False
) -> Packed:
    """Fill `sequences` sequences of `length` tokens from the data's train split; they depend on `seed` alone.

    Documents follow one another in a random order, each with the tokenizer's own special tokens and an end-of-text
    token after it where the tokenizer has one and does not add it. A document longer than what is left of a
    sequence goes on in the next. Data that is too short is gone through again in another order. The result is kept
    in `folder` (tokens.npy, tokens.json) and read from there when it exists: a killed run does not tokenise again.
    Raises Refused for data that does not fill one sequence, and whatever reading it refuses.
    """
    tokens, about = folder / "tokens.npy", folder / "tokens.json"
    if not about.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "tokens.partial"
        must_have_room(folder, 4 * sequences * length)
        with no_space_refusal(tokens):
            ids_NT = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int32, shape=(sequences, length))
            _take_blocks(temporary)
            with progress_bar(sequences * length, "tokenise", "token", progress) as bar:
                documents, epochs = _fill(ids_NT, tokenizer, data, seed, bar.update)
            ids_NT.flush()
        os.replace(temporary, tokens)
        write_json(about, {"documents": documents, "epochs": epochs})
    made = read_json(about)
    return Packed(np.load(tokens, mmap_mode="r"), made["documents"], made["epochs"])


def check_one_sequence(tokenizer: Any, data: str, length: int, seed: int) -> None:
    """Refuse a data file that cannot be read to its end, or whose documents do not fill one sequence."""
    tokens = 0
    for ids in _documents(tokenizer, stream_documents(data, "train", seed)):
        tokens += len(ids)
        if tokens >= length:
            return
    raise _too_short(data, tokens, length)


def _too_short(data: str, tokens: int, length: int) -> Refused:
    return Refused(
        f"{data} holds {tokens:,} tokens, which do not fill one sequence of {length:,}: give more data or a smaller --length"
    )


def _take_blocks(sparse: Path) -> None:
    """Give a mapped file its blocks: a disk found full when a page is written would kill the process without a word."""
    if hasattr(os, "posix_fallocate"):
        with open(sparse, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, sparse.stat().st_size)


def _fill(ids_NT: Any, tokenizer: Any, data: str, seed: int, progress: Callable[[int], Any]) -> tuple[int, int]:
    flat = ids_NT.reshape(-1)
    at = documents = epochs = 0
    while at < len(flat):
        epochs += 1
        began = at
        # every epoch has an order of its own; the first must be that of `seed`, which was checked to be in reach
        for ids in _documents(tokenizer, stream_documents(data, "train", seed + epochs - 1)):
            documents += 1
            part = ids[: len(flat) - at]
            flat[at : at + len(part)] = part
            at += len(part)
            progress(len(part))
            if at == len(flat):
                return documents, epochs
        if epochs == 1 and at < ids_NT.shape[1]:
            raise _too_short(data, at, ids_NT.shape[1])
        assert at > began, "the first epoch had tokens, so each has"
    return documents, epochs


def _documents(tokenizer: Any, texts: Iterator[str]) -> Iterator[list[int]]:
    end = tokenizer.eos_token_id
    while some := list(islice(texts, _TOGETHER)):
        # verbose=False: documents longer than the context are no fault here, since they are cut up
        for ids in tokenizer(some, verbose=False)["input_ids"]:
            yield ids if end is None or ids[-1:] == [end] else [*ids, end]
