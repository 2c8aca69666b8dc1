"""Documents: formats, sampling, special tokens, truncation, and the laws of batching."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import zstandard
from pyarrow import parquet

from layerprune.model.data import (
    batches,
    check_data,
    check_token_id,
    data_fingerprint,
    document_hash,
    local_documents,
    read_documents,
    stream_documents,
    tokenise,
)
from layerprune.model.errors import Refused, UsageError

TEXTS = ["The river runs.", 'A "quoted" tower\nof two lines.', "Übermut, naïveté, 東京.", "Lost.", "{not json"]
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": lambda data: b"".join(zstandard.compress(data[i : i + 7]) for i in range(0, len(data), 7)),  # many frames
}


def as_lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.dat"])
def test_jsonl_plain_and_packed(name: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / (name + packed)
    path.write_bytes(PACKED[packed](as_lines(TEXTS)))
    assert read_documents(str(path), "validation", None) == TEXTS


@pytest.mark.parametrize("packed", PACKED)
def test_text_has_a_blank_line_between_documents(packed: str, tmp_path: Path) -> None:
    path = tmp_path / ("d.txt" + packed)
    text = "\n \nThe river\nruns.\n\n\t\n  indented, \nand Übermut \n\nno line end"
    path.write_bytes(PACKED[packed](text.encode()))
    assert read_documents(str(path), "validation", None) == ["The river\nruns.", "indented, \nand Übermut", "no line end"]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_byte_order_mark_is_no_text(packed: str, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + as_lines(TEXTS)
    path = tmp_path / ("d.txt" + packed)
    path.write_bytes({"": content, ".gz": gzip.compress(content), ".zst": zstandard.compress(content)}[packed])
    assert read_documents(str(path), "validation", None) == TEXTS


def test_blank_lines_and_empty_texts_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n" + as_lines(["a", "", " \n", "b"]) + b"\n\n")
    assert read_documents(str(path), "validation", None) == ["a", "b"]
    path.write_bytes(as_lines(["a", "b"]).replace(b"\n", b"\r\n"))
    assert read_documents(str(path), "validation", None) == ["a", "b"]


@pytest.mark.parametrize("cut", [1, 5, 100])
@pytest.mark.parametrize("packed", [".gz", ".zst", ".zstd"])
def test_what_is_truncated_anywhere_is_refused(packed: str, cut: int, tmp_path: Path) -> None:
    """Half of the data must not pass for all of it, wherever the file ends."""
    text = as_lines([" ".join(str(random.Random(i).random()) for _ in range(9)) for i in range(300)])
    whole = gzip.compress(text) if packed == ".gz" else zstandard.compress(text)
    path = tmp_path / ("d.jsonl" + packed)
    for data in (whole[:-cut], whole[: len(whole) // 2], whole + whole[:-cut]):
        path.write_bytes(data)
        with pytest.raises(Refused, match=f"{path.name} cannot be read"):
            read_documents(str(path), "validation", None)
    path.write_bytes(whole + whole)
    assert len(read_documents(str(path), "validation", None)) == 600


# Parquet


@pytest.mark.parametrize("name", ["d.parquet", "d.txt", "d.jsonl.gz", "noname"])
@pytest.mark.parametrize("kind", [arrow.string(), arrow.large_string(), arrow.dictionary(arrow.int32(), arrow.string())])
def test_parquet_is_known_by_its_content(kind: arrow.DataType, name: str, tmp_path: Path) -> None:
    column = arrow.array([TEXTS[0], None, "", " \n\t", *TEXTS[1:]]).cast(kind)
    table = arrow.table({"text.en": ["x"] * len(column), "text": column, "n": range(len(column))})
    parquet.write_table(table, tmp_path / name, row_group_size=2)
    assert read_documents(str(tmp_path / name), "validation", None) == TEXTS
    assert sorted(stream_documents(str(tmp_path / name), "train", 0)) == sorted(TEXTS)


def test_parquet_gives_what_the_same_jsonl_gives(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(1000)]
    (tmp_path / "d.jsonl").write_bytes(as_lines(texts))
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "d.parquet", row_group_size=300)
    drawn = [read_documents(str(tmp_path / name), "validation", 20, 3) for name in ("d.jsonl", "d.parquet")]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 20


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"content": ["a"], "url": ["b"]}, "d.parquet has no column `text`, but content, url: rename the one with the text"),
        ({"text": [1, 2]}, "the column `text` of .*d.parquet holds int64 values: they must be strings"),
        ({"text": [["a"], ["b"]]}, r"holds list<\w+: string> values: they must be strings"),
        ({"text": [b"a"]}, "holds binary values: they must be strings"),
        ({"text": [None, " "]}, "d.parquet holds no documents"),
    ],
)
def test_parquet_without_text_is_refused(columns: dict[str, Any], told: str, tmp_path: Path) -> None:
    kinds = {"text": arrow.string()} if columns.get("text") == [None, " "] else None
    table = arrow.table(columns, schema=arrow.schema(kinds) if kinds else None)
    parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(Refused, match=told):
        read_documents(str(tmp_path / "d.parquet"), "validation", None)


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    texts = [" ".join(str(random.Random(i).random()) for _ in range(9)) for i in range(300)]
    parquet.write_table(arrow.table({"text": texts}), path, row_group_size=50, write_page_checksum=True, compression="none")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[1000] ^= 1  # a bit of the first row group's text: only its checksum tells
    lfs_pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for content in (whole[:-1], whole[: len(whole) // 2], b"PAR1", b"", bytes(flipped), lfs_pointer, whole[1:]):
        path.write_bytes(content)
        with pytest.raises(Refused, match="d.parquet cannot be read as Parquet: .*") as told:
            read_documents(str(path), "validation", None)
        assert "\n" not in str(told.value)
    invalid = arrow.Array.from_buffers(
        arrow.string(), 1, [None, arrow.array([0, 2], arrow.int32()).buffers()[1], arrow.py_buffer(b"\xff\xfe")]
    )
    parquet.write_table(arrow.table({"text": invalid}), path)
    with pytest.raises(Refused, match="d.parquet cannot be read as Parquet: .*utf-8"):
        read_documents(str(path), "validation", None)


def test_parquet_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """One row group of 32 MB of text, compressible or not, as many files are."""
    path = tmp_path / "d.parquet"
    rng = random.Random(0)
    texts = [rng.randbytes(2000).hex() for _ in range(8000)]
    parquet.write_table(arrow.table({"text": texts}), path, row_group_size=len(texts))
    del texts
    assert parquet.read_metadata(path).num_row_groups == 1
    before = arrow.total_allocated_bytes()
    most = max(arrow.total_allocated_bytes() for _ in local_documents(path)) - before
    assert most < 16 << 20
    documents = local_documents(path)
    next(documents)
    del documents
    assert arrow.total_allocated_bytes() - before < 1 << 20, "what is begun and dropped is closed"


# Drawing


def test_a_documents_hash_is_that_of_its_words() -> None:
    text = "A river, \n\n  and a\tstone."
    assert document_hash(text) == hashlib.sha256(b"A river, and a stone.").digest()
    for same in ("A river, and a stone.", "\r\n" + text.replace("\n", "\r\n") + " \n"):
        assert document_hash(same) == document_hash(text)
    for other in ("A river,and a stone.", "a river, and a stone.", "A river, and a stone", "", "A river, and a st one."):
        assert document_hash(other) != document_hash(text)


def test_samples_are_drawn_by_the_seed_alone(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    texts = [f"document {i}" for i in range(200)]
    path.write_bytes(as_lines(texts))

    def draw(samples: int | None, seed: int) -> list[str]:
        return read_documents(str(path), "validation", samples, seed)

    assert draw(20, 0) == draw(20, 0) and draw(20, 0) != draw(20, 1)
    assert len(set(draw(20, 0))) == 20 and set(draw(20, 0)) <= set(texts)
    assert draw(20, 0) == sorted(draw(20, 0), key=texts.index), "those drawn stay in the file's order"
    assert draw(20, 0) != texts[:20]
    assert draw(None, 7) == draw(200, 7) == draw(10_000, 7) == texts
    random.seed(0)
    before = random.random()
    random.seed(0)
    draw(20, 3)
    assert random.random() == before, "Python's own generator is not touched"
    often = [0] * 200
    for seed in range(300):
        for text in draw(20, seed):
            often[texts.index(text)] += 1
    # each is drawn 30 times in the mean, with a standard deviation of 5.2
    assert sum(often) == 6000 and min(often) > 5 and max(often) < 60


def test_a_stream_gives_every_document_once_in_an_order_of_its_seed(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    texts = [f"document {i}" for i in range(50)]
    path.write_bytes(as_lines(texts))
    orders = [list(stream_documents(str(path), "train", seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(texts) and orders[0] != texts


def test_the_fingerprint_is_that_of_the_bytes(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(as_lines(TEXTS))
    b.write_bytes(as_lines(TEXTS))
    c.write_bytes(as_lines(TEXTS[::-1]))
    assert data_fingerprint(str(a)) == data_fingerprint(str(b)) != data_fingerprint(str(c))
    assert data_fingerprint("c4").startswith("allenai/c4@")


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.jsonl").write_bytes(as_lines(TEXTS))
    check_data("~/d.jsonl", "--calibration")
    assert read_documents("~/d.jsonl", "validation", None) == TEXTS and data_fingerprint("~/d.jsonl")
    with pytest.raises(UsageError, match="--heal-data ~/none.jsonl"):
        check_data("~/none.jsonl", "--heal-data")


# Tokens


def test_the_tokenizers_special_tokens_are_kept(tiny_tokenizer: Any, prose: list[str]) -> None:
    for text, ids in zip(prose, tokenise(tiny_tokenizer, prose, 10_000), strict=True):
        assert ids[0] == tiny_tokenizer.bos_token_id == 0 and ids.count(0) == 1
        assert ids == tiny_tokenizer(text)["input_ids"] and tiny_tokenizer.decode(ids[1:]) == text


def test_more_documents_than_one_call_takes(tiny_tokenizer: Any) -> None:
    texts = [f"tower {i}" for i in range(2500)]
    assert [tiny_tokenizer.decode(ids[1:]) for ids in tokenise(tiny_tokenizer, texts, 50)] == texts


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_documents_are_truncated_on_the_right(length: int, tiny_tokenizer: Any, prose: list[str]) -> None:
    whole = tokenise(tiny_tokenizer, prose, 10_000)
    assert tokenise(tiny_tokenizer, prose, length) == [ids[:length] for ids in whole]
    assert any(len(ids) > 7 for ids in whole)


def test_an_appended_token_stays_at_the_end_of_a_truncated_document(tiny_tokenizer: Any, prose: list[str]) -> None:
    """Truncation is the tokenizer's own, which makes room for its special tokens."""
    import copy

    from tokenizers import processors

    ends = copy.deepcopy(tiny_tokenizer)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    for ids in tokenise(ends, prose, 8):
        assert (ids[0], ids[-1], len(ids)) == (0, 1, 8)


def test_documents_that_are_too_short_are_left_out(tiny_tokenizer: Any) -> None:
    texts = ["", "a", "a river runs"]
    assert [len(ids) for ids in tokenise(tiny_tokenizer, texts, 100)][:2] == [1, 2]
    assert len(tokenise(tiny_tokenizer, texts, 100, at_least=2)) == 2
    assert tokenise(tiny_tokenizer, texts, 100, at_least=3) == [tiny_tokenizer("a river runs")["input_ids"]]
    with pytest.raises(Refused, match="all 3 documents are shorter than 50 tokens"):
        tokenise(tiny_tokenizer, texts, 100, at_least=50)


def test_ids_that_the_model_does_not_know_are_refused(tiny_tokenizer: Any, prose: list[str]) -> None:
    largest = max(map(max, tokenise(tiny_tokenizer, prose, 100)))
    assert tokenise(tiny_tokenizer, prose, 100, vocab=largest + 1)
    with pytest.raises(Refused, match=f"token id {largest}, the model has {largest} tokens"):
        tokenise(tiny_tokenizer, prose, 100, vocab=largest)
    with pytest.raises(Refused, match="token id 5, the model has 5 tokens"):
        check_token_id(5, 5)


# Batches


def some_sequences(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, 300) for _ in range(rng.choice((1, 2, 5, 5, 30, 64)))] for _ in range(rng.randrange(1, 60))]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_tokens", [1, 63, 64, 200, 10**9])
@pytest.mark.parametrize("seed", range(4))
def test_laws_of_batching(seed: int, max_tokens: int, side: str) -> None:
    sequences = some_sequences(seed)
    made = batches(sequences, max_tokens, pad_id=299, padding_side=side)
    assert sorted(row for batch in made for row in batch.rows) == list(range(len(sequences))), "every row exactly once"
    widths = [batch.ids_BT.shape[1] for batch in made]
    assert widths == sorted(widths, reverse=True) and widths[0] == max(map(len, sequences))
    for batch in made:
        rows, width = batch.ids_BT.shape
        assert len(batch.rows) == rows and str(batch.ids_BT.dtype) == "torch.int64"
        assert rows * width <= max(max_tokens, width), "no more tokens than asked for, but one row always goes"
        assert width == max(len(sequences[row]) for row in batch.rows), "no column is only padding"
        padded = any(len(sequences[row]) < width for row in batch.rows)
        assert (batch.mask_BT is not None) == padded
        for b, row in enumerate(batch.rows):
            ids, gap = sequences[row], width - len(sequences[row])
            mask = batch.mask_BT[b].tolist() if padded else [1] * width
            if side == "right":
                assert mask == [1] * len(ids) + [0] * gap and batch.ids_BT[b].tolist() == ids + [299] * gap
            else:
                assert mask == [0] * gap + [1] * len(ids) and batch.ids_BT[b].tolist() == [299] * gap + ids


def test_batches_are_as_full_as_they_may_be() -> None:
    made = batches([[1] * 10] * 25, 100)
    assert [batch.ids_BT.shape for batch in made] == [(10, 10), (10, 10), (5, 10)]
    assert all(batch.mask_BT is None for batch in made)
    assert batches([], 100) == []
