"""Documents for ranking, healing and loss: local files or C4, tokenised one by one, batched by length."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from layerprune.model.errors import Refused, UsageError, network_errors, one_line
from layerprune.model.progress import progress_bar

C4_ID = "allenai/c4"
C4_REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
C4_SHARDS = {"train": 1024, "validation": 8}
_ROWS = 256
"""Rows of a Parquet file that are in memory at once."""


@dataclass(frozen=True)
class TokenBatch:
    """Documents of similar length, padded on the right (or the left) to one.

    ids_BT: int64 token ids. mask_BT: 1 on real tokens; None where nothing is padded.
    rows: each row's index in the list that was batched.
    """

    ids_BT: Any
    mask_BT: Any
    rows: tuple[int, ...]


def read_documents(data: str, split: str, samples: int | None, seed: int = 0) -> list[str]:
    """Draw `samples` documents (all where None) from a file or from C4, in an order that only `seed` decides.

    data: a JSONL file with a `text` field, or plain text with a blank line between documents; plain, .gz or
    .zst; a Parquet file with a `text` column of strings; or `c4` for allenai/c4 `en` at a pinned revision,
    `split` being `train` or `validation`.
    From C4 the documents are drawn from as few shards as hold them, the shards in an order of `seed`.
    Raises Refused for a file that is missing, empty or broken, and for a C4 that cannot be reached.
    """
    rng = random.Random(seed)
    if data == "c4":
        return list(islice(_c4_documents(split, rng), samples))
    path = Path(data).expanduser()
    if samples is None:
        documents = list(local_documents(path))
        if not documents:
            raise Refused(f"{path} holds no documents")
        return documents
    # two passes, so that a few documents of a large file take no more memory than they need
    count = sum(1 for _ in local_documents(path))
    if count == 0:
        raise Refused(f"{path} holds no documents")
    chosen = set(rng.sample(range(count), samples)) if samples < count else range(count)
    return [text for i, text in enumerate(local_documents(path)) if i in chosen]


def stream_documents(data: str, split: str, seed: int = 0) -> Iterator[str]:
    """All documents of a file or of C4, one by one, in an order that only `seed` decides.

    A file is read whole and shuffled; from C4 one shard is fetched when the one before it is used up.
    """
    rng = random.Random(seed)
    if data == "c4":
        yield from _c4_documents(split, rng)
        return
    documents = read_documents(data, split, None)
    rng.shuffle(documents)
    yield from documents


def _c4_documents(split: str, rng: random.Random) -> Iterator[str]:
    for shard in _c4_order(split, rng):
        documents = list(_json_lines(_c4_shard(split, shard)))
        rng.shuffle(documents)
        yield from documents


def check_data(data: str, option: str, split: str | None = None, seed: int = 0) -> None:
    """Refuse a data file that is not there or cannot be read, and a seed that is none, before anything expensive starts.

    With a split, C4 is asked for too: its first shard must be in the local cache or within reach of the network.
    """
    check_seed(seed)
    if data != "c4":
        try:
            path = Path(data).expanduser()
            there = path.is_file()
        except (OSError, RuntimeError, ValueError):
            there = False
        if not there:
            raise UsageError(f"{option} {data} is neither 'c4' nor an existing file")
        if not os.access(path, os.R_OK):
            raise Refused(f"{option} {data} cannot be read: permission denied")
    elif split is not None:
        _c4_in_reach(split, _c4_order(split, random.Random(seed))[0], option)


def check_seed(seed: int) -> None:
    """Refuse a seed that one of the random generators does not take."""
    if not 0 <= seed < 1 << 31:
        raise UsageError(f"--seed {seed} is not a whole number from 0 to {(1 << 31) - 1}")


def _c4_order(split: str, rng: random.Random) -> list[int]:
    shards = list(range(C4_SHARDS[split]))
    rng.shuffle(shards)
    return shards


def _c4_in_reach(split: str, shard: int, option: str) -> None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    name = _c4_name(split, shard)
    if isinstance(try_to_load_from_cache(C4_ID, name, repo_type="dataset", revision=C4_REVISION), str):
        return
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
    try:
        if not constants.HF_HUB_OFFLINE:
            get_hf_file_metadata(hf_hub_url(C4_ID, name, repo_type="dataset", revision=C4_REVISION), timeout=20)
            return
    except Exception as error:  # whatever the network layer raises: it is not within reach
        why += f" ({type(error).__name__})"
    raise Refused(f"{option} c4: {name} is not in the local Hub cache and {why}; give a local file, such as {option} FILE.jsonl")


def _c4_name(split: str, shard: int) -> str:
    return f"en/c4-{split}.{shard:05d}-of-{C4_SHARDS[split]:05d}.json.gz"


def data_fingerprint(data: str) -> str:
    """What identifies the data in a manifest: the C4 revision, or the file's SHA-256."""
    if data == "c4":
        return f"{C4_ID}@{C4_REVISION}"
    with open(Path(data).expanduser(), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def document_hash(text: str) -> bytes:
    """SHA-256 (32 bytes) of a document, each run of white space in it taken as one blank, that at its ends as none.

    So one document in two files is the same one where they differ in line ends, indentation or a last newline.
    """
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def _c4_shard(split: str, shard: int) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = _c4_name(split, shard)
    last = ""
    for _attempt in range(3):
        try:
            return Path(hf_hub_download(C4_ID, name, repo_type="dataset", revision=C4_REVISION))
        except LocalEntryNotFoundError as error:
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
            raise Refused(f"C4 ({name}) is not in the local Hub cache and {why}: give a local file instead of c4") from error
        except network_errors() as error:  # such as a connection that was cut in mid-shard
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                full = f"the disk of the Hub cache ({constants.HF_HUB_CACHE}) is full"
                raise Refused(f"C4 ({name}) could not be downloaded: {full}") from error
            last = " ".join(str(error).split()) or type(error).__name__
    raise Refused(f"C4 ({name}) could not be downloaded in 3 attempts: {last}")


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")  # with or without a byte-order mark
    if path.suffix in (".zst", ".zstd"):
        return io.TextIOWrapper(io.BufferedReader(_ZstdFile(path)), encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


class _ZstdFile(io.RawIOBase):
    """The decompressed bytes of all frames of a file; zstandard's own readers end silently where one is truncated."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed with this object)
        self._frame: Any = None
        self._left = b""  # compressed bytes that are read and not yet used
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._ready:
            data = self._left or self._file.read(1 << 17)
            self._left = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the file is truncated")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _json_lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (the number is for the messages below)
                if line.strip():
                    text = json.loads(line)["text"]
                    if not isinstance(text, str):
                        raise TypeError
                    text.encode()  # half of a surrogate pair is valid JSON and no text
                    if text.strip():
                        yield text
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError, UnicodeEncodeError):
        raise Refused(f"line {number} of {path} is not a JSON object with a `text` string") from None
    except _unreadable() as error:
        raise Refused(f"{path} cannot be read: {error or 'truncated'}") from error


def local_documents(path: Path) -> Iterator[str]:
    """The documents of a local file, one by one in the file's order; the file is never in memory as a whole.

    `PAR1` at its beginning makes it Parquet, a first line that is a JSON object makes it JSONL, else it is plain text.
    Raises Refused for a file that is missing or broken, or whose rows have no text.
    """
    if not path.is_file():
        raise Refused(f"the data file {path} does not exist")
    try:
        with open(path, "rb") as start:
            magic = start.read(4)
        # by name too: what is called so and is something else, such as a Git LFS pointer, must not pass for text
        if magic == b"PAR1" or path.suffix == ".parquet":
            yield from _parquet_documents(path)
            return
        with _open(path) as file:
            head = next((line for line in file if line.strip()), "")
        if head.lstrip().startswith("{") or ".json" in path.name:
            yield from _json_lines(path)
            return
        paragraph: list[str] = []
        with _open(path) as file:
            for line in file:
                if "\0" in line:
                    raise Refused(f"{path} cannot be read as text: it holds zero bytes")
                if line.strip():
                    paragraph.append(line)
                elif paragraph:
                    yield "".join(paragraph).strip()
                    paragraph = []
        if paragraph:
            yield "".join(paragraph).strip()
    except _unreadable() as error:
        raise Refused(f"{path} cannot be read as text: {error or 'truncated'}") from error


def _parquet_documents(path: Path) -> Iterator[str]:
    import pyarrow as arrow
    from pyarrow.parquet import ParquetFile

    try:
        # buffered, not pre-buffered: piece by piece within a row group, which in many files is all of it
        with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            if schema.get_field_index("text") < 0:
                raise Refused(f"{path} has no column `text`, but {', '.join(schema.names) or 'none'}: rename the one with the text")
            kind = schema.field("text").type
            kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if str(kind) not in ("string", "large_string", "string_view"):
                raise Refused(f"the column `text` of {path} holds {kind} values: they must be strings")
            # without threads: they would not outlive a fork
            for batch in file.iter_batches(_ROWS, columns=["text"], use_threads=False):
                yield from (text for text in batch.column("text").to_pylist() if text and text.strip())
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read as Parquet: {one_line(error)}") from error


def _unreadable() -> tuple[type[Exception], ...]:
    import zstandard

    return EOFError, OSError, zlib.error, zstandard.ZstdError, UnicodeDecodeError


def tokenise(
    tokenizer: Any,
    documents: Sequence[str],
    length: int,
    at_least: int = 1,
    vocab: int | None = None,
    progress: bool = False,
) -> list[list[int]]:
    """Token ids of each document, with the tokenizer's own special tokens, truncated at `length` tokens.

    Documents of fewer than `at_least` tokens are left out; Refused when none remains, and when an id is not below
    `vocab`, the number of tokens that the model knows.
    """
    kept = []
    with progress_bar(len(documents), "tokenise", "doc", progress) as bar:
        for start in range(0, len(documents), 1024):
            part = list(documents[start : start + 1024])
            kept += [ids[:length] for ids in tokenizer(part, truncation=True, max_length=length)["input_ids"]]
            bar.update(len(part))
    kept = [ids for ids in kept if len(ids) >= at_least]
    if not kept:
        raise Refused(f"all {len(documents)} documents are shorter than {at_least} tokens: nothing can be measured on them")
    if vocab is not None:
        check_token_id(max(map(max, kept)), vocab)
    return kept


def check_token_id(largest: int, vocab: int) -> None:
    """Refuse a tokenizer that makes ids which the model has no embedding for."""
    if largest >= vocab:
        raise Refused(f"the tokenizer does not belong to this model: it makes token id {largest}, the model has {vocab} tokens")


def batches(
    sequences: Sequence[Sequence[int]], max_tokens: int, pad_id: int = 0, padding_side: str = "right"
) -> list[TokenBatch]:
    """Group sequences by length, longest first, into batches of at most `max_tokens` tokens, padding included.

    Sorting keeps padding small, and the largest batch comes first: what does not fit fails at once.
    """
    import torch

    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    made: list[TokenBatch] = []
    at = 0
    while at < len(order):
        width = len(sequences[order[at]])
        rows = order[at : at + max(1, max_tokens // width)]
        at += len(rows)
        ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long)
        mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
        for b, row in enumerate(rows):
            ids = torch.tensor(sequences[row], dtype=torch.long)
            where = slice(width - len(ids), width) if padding_side == "left" else slice(0, len(ids))
            ids_BT[b, where] = ids
            mask_BT[b, where] = 1
        made.append(TokenBatch(ids_BT, None if bool(mask_BT.all()) else mask_BT, tuple(rows)))
    return made
