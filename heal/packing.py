"""Training documents as sequences of one length, on disk, and the documents held out of them."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from layerprune.model.data import document_hash, local_documents, read_documents, stream_documents
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import must_have_room, no_space_refusal, read_json, write_json
from layerprune.model.progress import progress_bar

PACKINGS = ("documents", "truncate")
"""Documents one after another, cut where a sequence ends; or one document a sequence, truncated, as in the paper."""
NO_LABEL = -100
"""What PyTorch's cross entropy passes over."""
_TOGETHER = 512
"""Documents that are tokenised in one call."""


@dataclass(frozen=True)
class Packed:
    """Sequences of one length on disk (N sequences of T tokens) and what they were made of.

    ids_NT: int32 token ids, memory-mapped. starts_NT: bool, memory-mapped; True where a document begins within this
    sequence, and at t = 0, where one may go on. real_N: int32, the tokens of each sequence that are not padding.
    documents: placed in the sequences, repeats counted again. epochs: how often the data was begun; 1 where it did
    not have to be repeated. excluded: documents left out in the first epoch because they were excluded.
    order: SHA-256 (hex) over the `document_hash` of each document, in order: two packings where it is equal hold the
    same documents in the same order.
    """

    ids_NT: Any
    starts_NT: Any
    real_N: Any
    documents: int
    epochs: int
    excluded: int
    order: str

    @property
    def tokens(self) -> int:
        """Tokens of all sequences that are not padding."""
        return int(self.real_N.sum(dtype=np.int64))

    def labels(self, i: int) -> Any:
        """int64 (T,): the ids of sequence i; -100 on padding and at starts, which another document would have to predict."""
        labels_T = self.ids_NT[i].astype(np.int64)
        labels_T[self.starts_NT[i]] = NO_LABEL
        labels_T[self.real_N[i] :] = NO_LABEL
        return labels_T

    def positions(self, i: int) -> Any:
        """int64 (T,): each token's position in its piece of a document, 0 at every start; padding is counted on."""
        t_T = np.arange(self.ids_NT.shape[1], dtype=np.int64)
        return t_T - np.maximum.accumulate(np.where(self.starts_NT[i], t_T, 0))


def pack(
    tokenizer: Any,
    data: str,
    sequences: int,
    length: int,
    seed: int,
    folder: Path,
    progress: bool = False,
    *,
    packing: str = "documents",
    exclude: Set[bytes] = frozenset(),
) -> Packed:
    """Fill `sequences` sequences of `length` tokens from the data's train split; `seed` alone decides their order.

    Each document has the tokenizer's own special tokens, and an end-of-text token after it where the tokenizer has
    one and does not add it. packing: with `documents` they follow one another without padding, and one longer than
    what is left of a sequence goes on in the next; with `truncate` each has a sequence of its own, is truncated at
    `length` and padded on the right with the tokenizer's pad id (0 where it has none), and those of fewer than 2
    tokens are passed over (arXiv 2403.17887, appendix A.1). exclude: what `document_hash` gives for documents that
    must not be trained on. Data that is too short is gone through again in another order.

    The result is kept in `folder` (tokens.npy, starts.npy, real.npy, tokens.json), where a later call with the same
    arguments reads it whatever `data` is; one that was killed begins anew and ends with the same bytes.
    Raises UsageError for another packing, Refused for data that does not fill one sequence and for a full disk, and
    whatever reading the data refuses.
    """
    check_packing(packing)
    about = folder / "tokens.json"
    excluded = hashlib.sha256(b"".join(sorted(exclude))).hexdigest()
    asked = {"packing": packing, "sequences": sequences, "length": length, "seed": seed, "exclude": excluded}
    if not (about.exists() and read_json(about).get("asked") == asked):  # an older version's says nothing of this
        about.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        bar = progress_bar(sequences * length, "tokenise", "token", progress)
        with _new_files(folder, sequences, length) as arrays, bar:
            tally = _fill(arrays, tokenizer, data, seed, packing, exclude, bar.update)
        found = {"documents": tally.documents, "epochs": tally.epochs, "excluded": tally.excluded}
        write_json(about, {**found, "order": tally.order.hexdigest(), "asked": asked})
    told = read_json(about)
    ids_NT, starts_NT = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "starts"))
    counts = (told["documents"], told["epochs"], told["excluded"], told["order"])
    return Packed(ids_NT, starts_NT, np.load(folder / "real.npy"), *counts)


def check_packing(packing: str) -> None:
    """Refuse a packing that there is not."""
    if packing not in PACKINGS:
        raise UsageError(f"--packing {packing} is not one of {', '.join(PACKINGS)}")


def check_one_sequence(
    tokenizer: Any, data: str, length: int, seed: int, packing: str = "documents", exclude: Set[bytes] = frozenset()
) -> None:
    """Refuse data that cannot be read to its end, or whose documents, without those excluded, do not fill one sequence.

    With `packing="truncate"` one document of 2 tokens is enough.
    """
    check_packing(packing)
    tokens = excluded = 0
    for _, ids in _documents(tokenizer, stream_documents(data, "train", seed), exclude):
        if ids is None:
            excluded += 1
        else:
            tokens = tokens + len(ids) if packing == "documents" else max(tokens, len(ids[:length]))
        if tokens >= (length if packing == "documents" else 2):
            return
    raise _too_short(data, tokens, length, packing, excluded)


def validation_documents(data: str | None, training_data: str, samples: int, seed: int) -> list[str]:
    """The documents on which the loss during training is measured, `samples` of them or as many as there are.

    data: a file, `c4` for its validation split, or None for what the training data gives: C4's validation split
    with `c4`; of a file, documents of its own that together with their duplicates are at most a twentieth of it.
    These are drawn from its different documents, whatever their order, in one pass that keeps no more than 19
    documents besides `samples`; there is at least one where 20 are different, and none where the file has fewer than
    20. The caller gives the `document_hash` of each to `pack` as `exclude`, which leaves their duplicates out too.
    Raises what reading the data refuses.
    """
    if data is not None or training_data == "c4":
        return read_documents(data or "c4", "validation", samples, seed)
    # The smallest of random keys that depend on the text: one that belongs to them at the end does so from its first
    # copy on, hence its copies are counted to the last. At most 19 documents are more than a twentieth of the file.
    kept: dict[int, tuple[str, int]] = {}  # key: text, copies
    keys: list[int] = []  # a heap of -key, the largest key first
    total = 0
    for text in local_documents(Path(training_data).expanduser()):
        total += 1
        key = int.from_bytes(hashlib.sha256(b"%d " % seed + document_hash(text)).digest())
        if key in kept:
            kept[key] = (kept[key][0], kept[key][1] + 1)
            continue
        heapq.heappush(keys, -key)
        kept[key] = (text, 1)
        if len(keys) > samples + 19:
            del kept[-heapq.heappop(keys)]
    drawn: list[str] = []
    room = total // 20
    for key in sorted(kept):
        text, copies = kept[key]
        if copies <= room and len(drawn) < samples:
            drawn.append(text)
            room -= copies
    return drawn


@dataclass
class _Tally:
    """What was placed so far."""

    documents: int = 0
    epochs: int = 0
    excluded: int = 0
    order: Any = field(default_factory=hashlib.sha256)


@contextlib.contextmanager
def _new_files(folder: Path, sequences: int, length: int) -> Iterator[list[Any]]:
    """Zeros in files of `folder` (tokens, starts, real), which get their names when the block ends well."""
    shape = (sequences, length)
    kinds = {"tokens": (np.int32, shape), "starts": (np.bool_, shape), "real": (np.int32, shape[:1])}
    partial = {name: folder / f"{name}.partial" for name in kinds}
    try:
        for path in partial.values():
            path.unlink(missing_ok=True)  # a killed run's would take the room twice
        must_have_room(folder, 5 * sequences * length + 4 * sequences)
        with no_space_refusal(folder / "tokens.npy"):
            arrays = []
            for name, (dtype, extent) in kinds.items():
                arrays.append(np.lib.format.open_memmap(partial[name], mode="w+", dtype=dtype, shape=extent))
                _take_blocks(partial[name])
        yield arrays  # outside: a full disk of the Hub's cache is told as such
        with no_space_refusal(folder / "tokens.npy"):
            for array, (name, path) in zip(arrays, partial.items(), strict=True):
                array.flush()
                os.replace(path, folder / f"{name}.npy")
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _take_blocks(sparse: Path) -> None:
    """Give a mapped file its blocks: a disk found full when a page is written would kill the process without a word."""
    if hasattr(os, "posix_fallocate"):
        with open(sparse, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, sparse.stat().st_size)


def _fill(
    arrays: Sequence[Any],
    tokenizer: Any,
    data: str,
    seed: int,
    packing: str,
    exclude: Set[bytes],
    progress: Callable[[int], Any],
) -> _Tally:
    """Place documents until every sequence has its tokens; `at` counts the places taken, those of padding too."""
    ids_NT, starts_NT, real_N = arrays
    ids, starts, length = ids_NT.reshape(-1), starts_NT.reshape(-1), ids_NT.shape[1]
    alone = packing == "truncate"
    starts_NT[:, 0] = True
    real_N[:] = 0 if alone else length
    tally, at = _Tally(), 0
    for epoch in count():
        tally.epochs, began = epoch + 1, at
        # every epoch has an order of its own; the first must be that of `seed`, which was checked to be in reach
        for digest, document in _documents(tokenizer, stream_documents(data, "train", seed + epoch), exclude):
            if document is None:
                tally.excluded += epoch == 0
                continue
            part = document[: length if alone else len(ids) - at]
            if len(part) < (2 if alone else 1):
                continue
            end = at + (length if alone else len(part))
            ids[at : at + len(part)] = part
            starts[at] = True
            if alone:
                ids[at + len(part) : end] = getattr(tokenizer, "pad_token_id", None) or 0
                real_N[at // length] = len(part)
            tally.documents += 1
            tally.order.update(digest)
            progress(end - at)
            at = end
            if at == len(ids):
                return tally
        if epoch == 0 and at < length:
            raise _too_short(data, at, length, packing, tally.excluded)
        assert at > began, "the first epoch had tokens, so each has"
    raise AssertionError("the epochs have no end")


def _documents(tokenizer: Any, texts: Iterator[str], exclude: Set[bytes]) -> Iterator[tuple[bytes, list[int] | None]]:
    """(document_hash, token ids) of each document; None for those of one that is excluded."""
    end = tokenizer.eos_token_id
    while some := list(islice(texts, _TOGETHER)):
        digests = [document_hash(text) for text in some]
        kept = [text for text, digest in zip(some, digests, strict=True) if digest not in exclude]
        # verbose=False: documents longer than the context are no fault here, since they are cut up
        tokens = iter(tokenizer(kept, verbose=False)["input_ids"] if kept else ())
        for digest in digests:
            if digest in exclude:
                yield digest, None
            else:
                ids = next(tokens)
                yield digest, ids if end is None or ids[-1:] == [end] else [*ids, end]


def _too_short(data: str, tokens: int, length: int, packing: str, excluded: int) -> Refused:
    aside = f", the {excluded:,} held out for validation aside" if excluded else ""
    if packing == "truncate":
        return Refused(f"{data} holds no document of at least 2 tokens{aside}: give more data")
    return Refused(
        f"{data} holds {tokens:,} tokens{aside}, which do not fill one sequence of {length:,}: give more data or a smaller --length"
    )
