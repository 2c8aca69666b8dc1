"""Packing: what a sequence holds and where documents begin, what is left out, kills; documents held out of the data."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerprune.heal import packing
from layerprune.heal.packing import check_one_sequence, pack, validation_documents
from layerprune.model.data import document_hash, stream_documents
from layerprune.model.errors import Refused, UsageError

BOTH = pytest.mark.parametrize("kind", ["documents", "truncate"])


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, prose: list[str]) -> str:
    return write(tmp_path_factory.mktemp("data") / "train.jsonl", prose)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """A document as it is trained on: `<s> ... </s>`."""
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


class Counting:
    """A tokenizer that breaks in the n-th call, as a killed process would."""

    def __init__(self, tokenizer: Any, dies_in: int | None = None) -> None:
        self.tokenizer, self.dies_in, self.calls = tokenizer, dies_in, 0
        self.eos_token_id, self.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.dies_in:
            raise KeyboardInterrupt
        return self.tokenizer(*args, **kwargs)


# One document after another


def test_documents_are_joined_with_the_tokenizers_own_tokens(
    tiny_tokenizer: Any, prose: list[str], data: str, tmp_path: Path
) -> None:
    packed = pack(tiny_tokenizer, data, 60, 16, 0, tmp_path)
    stream = packed.ids_NT.reshape(-1).tolist()
    begin, end = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    texts = tiny_tokenizer.decode(stream).split("</s>")
    assert stream[0] == begin and stream.count(end) >= 5
    assert all(stream[i + 1] == begin for i, token in enumerate(stream[:-1]) if token == end)
    assert all(text.removeprefix("<s>").strip() in prose for text in texts[:-1])
    assert len({*texts[:-1]}) == len(texts) - 1, "no document twice in one epoch"
    assert (packed.documents, packed.epochs, packed.excluded) == (len(texts), 1, 0)
    assert packed.real_N.tolist() == [16] * 60 and packed.tokens == 960


def test_documents_depend_on_the_seed_alone(tiny_tokenizer: Any, data: str, tmp_path: Path) -> None:
    first, again, other = (
        pack(tiny_tokenizer, data, 20, 16, seed, tmp_path / name) for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert not np.array_equal(first.ids_NT, other.ids_NT)
    assert first.order == again.order != other.order


def test_short_data_is_repeated_in_another_order(tiny_tokenizer: Any, prose: list[str], data: str, tmp_path: Path) -> None:
    one = sum(len(ids_of(tiny_tokenizer, text)) for text in prose)
    packed = pack(tiny_tokenizer, data, 3 * one // 32, 32, 0, tmp_path)
    assert packed.epochs == 3 and 2 * len(prose) < packed.documents <= 3 * len(prose)
    stream = packed.ids_NT.reshape(-1)
    assert sorted(stream[:one]) == sorted(stream[one : 2 * one]) and not np.array_equal(stream[:one], stream[one : 2 * one])


def test_no_token_is_predicted_from_another_document(tiny_tokenizer: Any, data: str, tmp_path: Path) -> None:
    packed = pack(tiny_tokenizer, data, 60, 16, 0, tmp_path)
    begin = tiny_tokenizer.bos_token_id
    assert packed.starts_NT.dtype == bool and packed.ids_NT.dtype == packed.real_N.dtype == np.int32
    # `<s>` is at the beginning of every document and nowhere else; what goes on from the sequence before starts, too
    expected = packed.ids_NT == begin
    assert not expected[:, 0].all() and expected[:, 1:].any()
    expected[:, 0] = True
    assert np.array_equal(packed.starts_NT, expected)
    for i in range(60):
        labels, positions = packed.labels(i), packed.positions(i)
        assert labels.dtype == positions.dtype == np.int64 and labels.shape == positions.shape == (16,)
        at = 0
        for t in range(16):
            at = 0 if expected[i, t] else at + 1
            assert positions[t] == at
            assert labels[t] == (-100 if expected[i, t] else packed.ids_NT[i, t])


# One document a sequence


def test_truncated_documents_have_a_sequence_of_their_own(tiny_tokenizer: Any, prose: list[str], data: str, tmp_path: Path) -> None:
    lengths = sorted(len(ids_of(tiny_tokenizer, text)) for text in prose)
    length = lengths[30]
    assert lengths[0] < length < lengths[-1]
    packed = pack(tiny_tokenizer, data, 60, length, 0, tmp_path, packing="truncate")
    order = list(stream_documents(data, "train", 0))
    assert (packed.documents, packed.epochs) == (60, 1)
    assert packed.starts_NT[:, 0].all() and not packed.starts_NT[:, 1:].any()
    for i, text in enumerate(order):
        ids = ids_of(tiny_tokenizer, text)[:length]
        assert packed.real_N[i] == len(ids)
        assert packed.ids_NT[i].tolist() == ids + [0] * (length - len(ids))
        assert packed.labels(i).tolist() == [-100, *ids[1:]] + [-100] * (length - len(ids))
        assert packed.positions(i).tolist() == list(range(length))
    assert packed.tokens == sum(min(length, n) for n in lengths) < 60 * length


def test_padding_is_the_tokenizers_and_is_never_a_label(tiny_tokenizer: Any, data: str, tmp_path: Path) -> None:
    padded = copy.deepcopy(tiny_tokenizer)
    padded.pad_token = "</s>"  # as many set it: the real end-of-text token must stay a label
    packed = pack(padded, data, 60, 200, 0, tmp_path, packing="truncate")
    for i in range(60):
        real = packed.real_N[i]
        assert set(packed.ids_NT[i, real:].tolist()) == {1} and (packed.labels(i)[real:] == -100).all()
        assert packed.labels(i)[real - 1] == 1 != packed.labels(i)[real - 2]


def test_truncated_documents_are_repeated_and_those_of_one_token_passed_over(
    tiny_tokenizer: Any, prose: list[str], tmp_path: Path
) -> None:
    from tokenizers import processors

    bare = copy.deepcopy(tiny_tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    bare.eos_token = None
    few = ["a", *prose[:5], "b"]
    assert [len(ids) for ids in bare(["a", "b"])["input_ids"]] == [1, 1]
    packed = pack(bare, write(tmp_path / "few.jsonl", few), 12, 8, 0, tmp_path / "p", packing="truncate")
    assert (packed.documents, packed.epochs, packed.real_N.min()) == (12, 3, 8)
    rows = [tuple(row) for row in packed.ids_NT.tolist()]
    assert set(rows[:5]) == set(rows[5:10]) and len(set(rows[:5])) == 5
    ones = write(tmp_path / "ones.jsonl", ["a", "b"])
    check_one_sequence(bare, str(tmp_path / "few.jsonl"), 9999, 0, "truncate")
    for call in (
        lambda: pack(bare, ones, 12, 8, 0, tmp_path / "q", packing="truncate"),
        lambda: check_one_sequence(bare, ones, 8, 0, "truncate"),
    ):
        with pytest.raises(Refused, match="ones.jsonl holds no document of at least 2 tokens: give more data"):
            call()
    check_one_sequence(tiny_tokenizer, ones, 8, 0, "truncate")  # `<s> a </s>`


# What is left out


@BOTH
def test_excluded_documents_and_their_duplicates_are_left_out(
    kind: str, tiny_tokenizer: Any, prose: list[str], tmp_path: Path
) -> None:
    twice = [*prose, prose[3].replace(" ", "\n") + "\n"]
    held = frozenset(map(document_hash, prose[3:5]))
    kept = [text for text in prose if text not in prose[3:5]]
    made = pack(tiny_tokenizer, write(tmp_path / "all.jsonl", twice), 58, 16, 0, tmp_path / "a", packing=kind, exclude=held)
    text = tiny_tokenizer.decode(made.ids_NT.reshape(-1))
    assert made.epochs == 1 and all(start[:15] not in text for start in prose[3:5])
    whole = 58 if kind == "truncate" else sum(len(ids_of(tiny_tokenizer, t)) for t in kept) // 16 + 1
    made = pack(tiny_tokenizer, str(tmp_path / "all.jsonl"), whole + 40, 16, 0, tmp_path / "b", packing=kind, exclude=held)
    assert (made.epochs, made.excluded) == (2, 3), "counted in the first epoch"
    seen = [t for seed in (0, 1) for t in stream_documents(str(tmp_path / "all.jsonl"), "train", seed)]
    trained = [document_hash(t) for t in seen if document_hash(t) not in held][: made.documents]
    assert made.order == hashlib.sha256(b"".join(trained)).hexdigest()


def test_only_documents_before_the_last_one_count_as_excluded(tiny_tokenizer: Any, data: str, tmp_path: Path) -> None:
    order = list(stream_documents(data, "train", 0))
    held = frozenset(map(document_hash, (order[1], order[50])))
    assert pack(tiny_tokenizer, data, 10, 16, 0, tmp_path, packing="truncate", exclude=held).excluded == 1


@BOTH
def test_the_order_is_that_of_the_documents_alone(kind: str, tiny_tokenizer: Any, data: str, tmp_path: Path) -> None:
    def order(name: str, sequences: int = 10, length: int = 100, tokenizer: Any = tiny_tokenizer, source: str = data) -> str:
        return pack(tokenizer, source, sequences, length, 0, tmp_path / name, packing=kind).order

    texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    spaced = write(tmp_path / "spaced.jsonl", [text.replace(" ", "\r\n") + "\n" for text in texts])
    assert len(order("a")) == 64 and order("a") != order("b", sequences=20)
    if kind == "truncate":  # whatever the length and the tokens are
        assert order("a") == order("c", length=20) == order("d", source=spaced)


@BOTH
def test_a_file_that_is_all_excluded_is_refused(
    kind: str, tiny_tokenizer: Any, prose: list[str], data: str, tmp_path: Path
) -> None:
    held = frozenset(map(document_hash, prose))
    for call in (
        lambda: pack(tiny_tokenizer, data, 4, 16, 0, tmp_path / "x", packing=kind, exclude=held),
        lambda: check_one_sequence(tiny_tokenizer, data, 16, 0, kind, held),
    ):
        with pytest.raises(Refused, match="train.jsonl holds .*, the 60 held out for validation aside.*: give more data"):
            call()
    check_one_sequence(tiny_tokenizer, data, 16, 0, kind, frozenset(list(held)[:-1]))


# Kills and what is there already


@BOTH
def test_a_packing_killed_midway_ends_with_the_same_bytes(
    kind: str, tiny_tokenizer: Any, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_TOGETHER", 7)
    held = frozenset(map(document_hash, list(stream_documents(data, "train", 0))[5:9]))

    def go(name: str, dies_in: int | None = None) -> int:
        tokenizer = Counting(tiny_tokenizer, dies_in)
        pack(tokenizer, data, 200, 32, 0, tmp_path / name, packing=kind, exclude=held)
        return tokenizer.calls

    def partial_is_gone(folder: Path, need: int) -> None:
        assert not list(folder.glob("*.partial")), "what is to be replaced does not take room twice"

    calls = go("whole")
    assert calls > 9
    for dies_in in (1, 4, calls):
        with pytest.raises(KeyboardInterrupt):
            go("killed", dies_in)
        assert "tokens.json" not in files(tmp_path / "killed")
        # what a process that is killed outright would leave
        (tmp_path / "killed" / "tokens.partial").write_bytes(b"half")
        (tmp_path / "killed" / "starts.npy").write_bytes(b"half")
        monkeypatch.setattr(packing, "must_have_room", partial_is_gone)
    assert go("killed") == calls
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert set(files(tmp_path / "whole")) == {"tokens.npy", "starts.npy", "real.npy", "tokens.json"}


@pytest.mark.parametrize("step", range(4))
def test_a_kill_between_the_files_never_passes_for_a_whole(
    step: int, tiny_tokenizer: Any, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another packing is in the folder; its description must not outlive its arrays."""
    for name in ("whole", "killed"):
        pack(tiny_tokenizer, data, 30, 16, 1, tmp_path / name)
    expected = files(tmp_path / "whole")
    left = [step]

    def replace(old: Any, new: Any, real: Callable[..., None] = packing.os.replace) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(packing.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            pack(tiny_tokenizer, data, 30, 16, 0, tmp_path / "killed")
    again = pack(tiny_tokenizer, data, 30, 16, 1, tmp_path / "killed")
    assert files(tmp_path / "killed") == expected
    assert np.array_equal(again.ids_NT, pack(tiny_tokenizer, data, 30, 16, 1, tmp_path / "new").ids_NT)


def test_what_is_complete_is_not_made_twice(tiny_tokenizer: Any, data: str, tmp_path: Path) -> None:
    made = pack(tiny_tokenizer, data, 4, 16, 0, tmp_path)
    again = pack(None, "gone", 4, 16, 0, tmp_path)
    assert np.array_equal(again.ids_NT, made.ids_NT) and np.array_equal(again.starts_NT, made.starts_NT)
    assert (again.order, again.tokens, again.documents) == (made.order, 64, made.documents)


@pytest.mark.parametrize(
    "other", [{"packing": "truncate"}, {"exclude": frozenset([document_hash("a")])}, {"seed": 1}, {"sequences": 5}, {"length": 8}]
)
def test_what_was_made_with_other_arguments_is_made_again(
    other: dict[str, Any], tiny_tokenizer: Any, data: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"sequences": 4, "length": 16, "seed": 0}
    pack(tiny_tokenizer, data, folder=tmp_path / "a", **given)
    pack(tiny_tokenizer, data, folder=tmp_path / "a", **{**given, **other})
    pack(tiny_tokenizer, data, folder=tmp_path / "b", **{**given, **other})
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_folder_of_an_older_version_is_made_again(tiny_tokenizer: Any, data: str, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.full((4, 16), 7, dtype=np.int32))
    (tmp_path / "tokens.json").write_text('{"documents": 9, "epochs": 1}')
    packed = pack(tiny_tokenizer, data, 4, 16, 0, tmp_path)
    assert packed.ids_NT[0, 0] == 0 and packed.documents < 9


# Refusals


def test_what_cannot_be_packed_is_refused(tiny_tokenizer: Any, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="train.jsonl holds .* tokens, which do not fill one sequence of 9,999: give more data or a"):
        pack(tiny_tokenizer, data, 1, 9999, 0, tmp_path)
    with pytest.raises(Refused, match="tokens, which do not fill one sequence of 9,999"):
        check_one_sequence(tiny_tokenizer, data, 9999, 0)
    check_one_sequence(tiny_tokenizer, data, 999, 0)
    with pytest.raises(UsageError, match="--packing wrap is not one of documents, truncate"):
        pack(tiny_tokenizer, data, 1, 16, 0, tmp_path, packing="wrap")
    with pytest.raises(UsageError, match="--packing wrap is not one of documents, truncate"):
        check_one_sequence(tiny_tokenizer, data, 16, 0, "wrap")
    with pytest.raises(Refused, match=r"the disk is full: .* needs 5000.00 GB and"):
        pack(tiny_tokenizer, data, 10**6, 10**6, 0, tmp_path)
    assert files(tmp_path) == {}, "nothing is left"


def test_a_full_disk_is_told_for_the_place_that_is_full(
    tiny_tokenizer: Any, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def hub_is_full(*args: Any) -> Iterator[str]:
        raise Refused("the disk of the Hub cache is full") from OSError(errno.ENOSPC, "No space left on device")
        yield ""

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_take_blocks", full)
        with pytest.raises(Refused, match="the disk is full: could not write .*tokens.npy; nothing was left there"):
            pack(tiny_tokenizer, data, 4, 16, 0, tmp_path)
    assert files(tmp_path) == {}
    monkeypatch.setattr(packing, "stream_documents", hub_is_full)
    with pytest.raises(Refused, match="^the disk of the Hub cache is full$"):
        pack(tiny_tokenizer, "c4", 4, 16, 0, tmp_path)


# Documents held out


def numbered(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


@pytest.mark.parametrize(
    ("count", "samples", "held"), [(19, 10, 0), (20, 10, 1), (39, 10, 1), (40, 10, 2), (400, 10, 10), (400, 100, 20), (400, 0, 0)]
)
def test_at_most_a_twentieth_is_held_out(count: int, samples: int, held: int, tmp_path: Path) -> None:
    texts = numbered(count)
    found = validation_documents(None, write(tmp_path / "t.jsonl", texts), samples, 0)
    assert len(found) == len(set(found)) == held and set(found) <= set(texts)


def test_those_held_out_are_drawn_by_the_seed_alone_and_evenly(tmp_path: Path) -> None:
    texts = numbered(100)
    source = write(tmp_path / "t.jsonl", texts)
    shuffled = write(tmp_path / "s.jsonl", random.Random(0).sample(texts, 100))
    often: Counter[str] = Counter()
    for seed in range(200):
        found = validation_documents(None, source, 5, seed)
        often.update(found)
        assert found == validation_documents(None, shuffled, 5, seed)
        assert found[:2] == validation_documents(None, source, 2, seed)
    # each is drawn 10 times in the mean, with a standard deviation of 3.1
    assert sum(often.values()) == 1000 and len(often) == 100 and max(often.values()) < 26


def test_duplicates_count_towards_the_twentieth(tmp_path: Path) -> None:
    """Packing leaves out every copy of what is held out: a document that is half of the file must not be it."""
    texts = ["often"] * 100 + ["some \n times", "some times"] * 2 + numbered(96)
    for seed in range(60):
        for samples in (1, 3, 50):
            found = validation_documents(None, write(tmp_path / "t.jsonl", texts), samples, seed)
            copies = Counter(map(document_hash, texts))
            assert 1 <= len(found) <= samples and len({*map(document_hash, found)}) == len(found)
            left_out = sum(copies[document_hash(text)] for text in found)
            assert left_out <= 10 and (samples < 50 or left_out == 10)
            assert "often" not in found
    assert validation_documents(None, write(tmp_path / "o.jsonl", ["often"] * 100), 5, 0) == []
    # 19 that are there too often and one that is not: whatever the seed, that one is found
    heavy = write(tmp_path / "h.jsonl", [f"often {i}" for i in range(19) for _ in range(40)] + ["seldom"] * 38)
    assert all(validation_documents(None, heavy, 1, seed) == ["seldom"] for seed in range(20))
    twice = [text for text in numbered(20) for _ in range(2)]
    assert len(validation_documents(None, write(tmp_path / "w.jsonl", twice), 5, 0)) == 1


def test_memory_holds_little_more_than_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    class Text(str):
        """A string that can be watched."""

    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    most = 0

    def documents(path: Path) -> Iterator[str]:
        nonlocal most
        for i in range(3000):
            text = Text(f"document {i}")
            alive.add(text)
            most = max(most, len(alive))
            yield text

    monkeypatch.setattr(packing, "local_documents", documents)
    assert len(validation_documents(None, "some", 30, 0)) == 30
    assert most <= 30 + 19 + 3


def test_what_is_held_out_is_never_trained_on(tiny_tokenizer: Any, prose: list[str], data: str, tmp_path: Path) -> None:
    held = validation_documents(None, data, 100, 0)
    assert len(held) == 3
    exclude = frozenset(map(document_hash, held))
    packed = pack(tiny_tokenizer, data, 57, 400, 0, tmp_path, packing="truncate", exclude=exclude)
    assert (packed.epochs, packed.documents) == (1, 57)
    rows = {tuple(row[:n]) for row, n in zip(packed.ids_NT.tolist(), packed.real_N, strict=True)}
    assert rows == {tuple(ids_of(tiny_tokenizer, text)) for text in prose if text not in held} and len(rows) == 57


def test_a_file_or_c4_gives_its_own_documents(data: str, prose: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write(tmp_path / "o.jsonl", numbered(12))
    assert validation_documents(other, data, 50, 0) == numbered(12), "all of a file given for it"
    assert len(validation_documents(other, "c4", 5, 0)) == 5
    asked = []
    monkeypatch.setattr(packing, "read_documents", lambda *args: asked.append(args) or ["x"])
    assert validation_documents("c4", data, 50, 3) == validation_documents(None, "c4", 50, 3) == ["x"]
    assert asked == [("c4", "validation", 50, 3)] * 2
