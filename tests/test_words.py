"""When words and answers are decided: by part of speech, and by place in an answer, each against a plain computation."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import make_llama, make_prose

from layerprune.depth import decided
from layerprune.depth.answers import LINES, answers_probe, mark_answer, read_answers
from layerprune.depth.decided import DecidedSum, Marked, decided_probe
from layerprune.depth.tokens import RANKS
from layerprune.depth.words import TAGS, mark_words, spacy_tagger, words_probe
from layerprune.depth_word_plots import plot_answers, plot_words
from layerprune.model.decoder import Decoder, view_decoder
from layerprune.model.errors import Refused
from layerprune.model.load import load_model

torch.set_num_threads(1)

SENTENCES = [
    "The small bird walks over the river. The green tower runs under the old tree.",
    "A tall king found bread, and the stone lost water slowly. But the night runs over the day.",
    "Old water walks under a small tower. The king found the green bread.",
]
KIND = {
    **dict.fromkeys(["the", "a"], "DET"), **dict.fromkeys(["over", "under"], "ADP"),
    **dict.fromkeys(["walks", "runs", "found", "lost"], "VERB"), **dict.fromkeys(["small", "green", "old", "tall"], "ADJ"),
    **dict.fromkeys(["bird", "river", "tower", "tree", "king", "bread", "stone", "water", "night", "day"], "NOUN"),
    **dict.fromkeys([".", ","], "PUNCT"), "and": "CCONJ", "but": "CCONJ", "slowly": "ADV",
}  # fmt: skip
ITEMS = [
    ("The small bird walks over the", "river"), ("A tall king found", "bread"), ("Old water walks under a small", "tower."),
    ("The king found the", "green"), ("The small bird walks over", "the river."), ("But the night", "walks under"), ("The", "xyz"),
    ("A tall king found bread, and the stone lost", "water slowly"), ("The green tower runs", "under the old"), ("The green", "qz"),
    ("The small bird", "walks over the river and more than that"),
]  # fmt: skip


def tag(text: str) -> list[tuple[int, int, str]]:
    """A tagger that knows its words by heart."""
    found = re.finditer(r"\w+|[^\w\s]", text)
    return [(m.start(), m.end(), KIND.get(m[0].lower(), "X")) for m in found]


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 400 tokens, to which common words are one token and others two or three; `<s>` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(make_prose(), trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A Llama of 5 layers that knows much of the sentences by heart, so that there is something that it predicts."""
    folder = make_llama(tmp_path_factory.mktemp("words") / "model", vocab_size=400)
    model = load_model(folder, device="cpu").train()
    tokenizer = make_tokenizer()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        for text in SENTENCES:
            ids_BT = torch.tensor([tokenizer(text)["input_ids"][:48]])
            model(input_ids=ids_BT, labels=ids_BT).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        model.model.norm.weight += torch.linspace(-0.3, 0.3, 64)  # a state after the final norm is told from one before it
    return view_decoder(model.eval().requires_grad_(False))


def lens_ranks(decoder: Decoder, ids: Sequence[int], end: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, list[int]]:
    """For the last of `ids`, after the others and nothing else: the model's own choice, and its rank in the lens by layer."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0, -1].clone())

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in decoder.layers]
    with torch.no_grad():
        own_V = decoder.model(input_ids=torch.tensor([list(ids[:-1])]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        lenses = [end(state) for state in seen]
    place = [int((lens_V > lens_V[ids[-1]]).sum()) + 1 for lens_V in lenses]
    return int(own_V.argmax()), place


def llama_end(decoder: Decoder) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda state: decoder.model.lm_head(decoder.model.model.norm(state))


def by_hand(
    decoder: Decoder, texts: Sequence[tuple[Sequence[int], Sequence[tuple[int, str]]]], groups: Sequence[str],
    end: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Any]:  # fmt: skip
    """What a probe's result should be, one prefix of one text at a time."""
    layers = len(decoder)
    marked, firsts, lasts = dict.fromkeys(groups, 0), {g: [] for g in groups}, {g: [] for g in groups}
    for ids, marks in texts:
        for place, group in marks:
            marked[group] += 1
            choice, ranks = lens_ranks(decoder, ids[: place + 1], end)
            if choice != ids[place]:
                continue
            firsts[group].append([next((at for at, rank in enumerate(ranks) if rank <= k), layers) for k in RANKS])
            lasts[group].append([max((at + 1 for at, rank in enumerate(ranks) if rank > k), default=0) for k in RANKS])

    def mean(rows: list[list[int]]) -> list[float | None]:
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [None] * len(RANKS)

    return {
        "marked": list(marked.values()), "predicted": [len(firsts[g]) for g in groups],
        "decided": [mean(firsts[g]) for g in groups], "kept": [mean(lasts[g]) for g in groups],
    }  # fmt: skip


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    json.dumps(found, allow_nan=False)
    assert (found["marked"], found["predicted"]) == (expected["marked"], expected["predicted"])
    for name in ("decided", "kept"):
        assert [row == pytest.approx(want) for row, want in zip(found[name], expected[name], strict=True)]
        for row, want in zip(found[name], expected[name], strict=True):
            assert row == (want if want[0] is None else pytest.approx(want, abs=1e-12))


def word_starts(text: str, ids: Sequence[int], tokenizer: Any) -> list[tuple[int, str]]:
    """The marks by the text that the tokens before make, without offsets."""
    words = {start: kind for start, _, kind in tag(text) if kind in TAGS}
    found = []
    for at in range(1, len(ids)):
        before = tokenizer.decode(ids[1:at])
        piece = tokenizer.decode(ids[1 : at + 1])[len(before) :]
        start = len(before) + len(piece) - len(piece.lstrip())
        if piece.strip() and start in words:
            found.append((at, words[start]))
    return found


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_words_against_one_prefix_at_a_time(learnt: Decoder, max_tokens: int | None) -> None:
    tokenizer = make_tokenizer()
    documents = [*SENTENCES, "qqq zzz", SENTENCES[0][:30]]
    texts = []
    for text in documents:
        ids = tokenizer(text)["input_ids"][:40]
        texts.append((ids, word_starts(text, ids, tokenizer)))
    expected = by_hand(learnt, texts, TAGS, llama_end(learnt))
    seen: list[int] = []
    total = words_probe(learnt, tokenizer, documents, tag, length=40, max_tokens=max_tokens, progress=seen.append)
    found = total.result()
    assert sum(seen) == 4 and total.left_out == found["left_out"] == 1
    assert found["groups"] == list(TAGS) and found["ranks"] == list(RANKS) and found["layers"] == 5
    assert min(found["predicted"]) >= 1 and total.tokens == sum(found["predicted"]) < sum(found["marked"])
    assert any(first != last for first, last in zip(found["decided"], found["kept"], strict=True))
    assert_same(found, expected)


@pytest.mark.parametrize("max_tokens", [None, 30])
def test_answers_against_one_prefix_at_a_time(learnt: Decoder, max_tokens: int | None) -> None:
    tokenizer = make_tokenizer()
    texts, left_out = [], 0
    for prompt, answer in ITEMS:
        before, after = tokenizer(prompt)["input_ids"], tokenizer(" " + answer)["input_ids"][1:]
        if len(after) > 3:
            left_out += 1
        else:
            texts.append((before + after, [(len(before) + i, f"len{len(after)}-pos{i + 1}") for i in range(len(after))]))
    assert left_out > 0 and {len(marks) for _, marks in texts} == {1, 2, 3}
    expected = by_hand(learnt, texts, LINES, llama_end(learnt))
    total = answers_probe(learnt, tokenizer, ITEMS, max_tokens=max_tokens)
    found = total.result()
    assert found["groups"] == list(LINES) and found["left_out"] == left_out
    assert 0 < total.tokens < sum(found["marked"])
    assert_same(found, expected)


def test_where_a_gpu_is_full_halves_give_the_same(learnt: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answers_probe(learnt, make_tokenizer(), ITEMS).result()
    real, rows = decided._one_batch, []

    def full(layerwise: Any, batch: Any, *args: Any) -> DecidedSum:
        rows.append(len(batch.rows))
        if len(batch.rows) > 1:
            raise torch.cuda.OutOfMemoryError
        return real(layerwise, batch, *args)

    monkeypatch.setattr(decided, "_one_batch", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = answers_probe(learnt, make_tokenizer(), ITEMS).result()
    assert max(rows) > 3 and rows.count(1) == len(ITEMS) - whole["left_out"]
    assert_same(found, whole)


def test_after_a_wrong_token_the_next_gold_one_is_looked_at(learnt: Decoder) -> None:
    tokenizer, end = make_tokenizer(), llama_end(learnt)
    ids = tokenizer("The small bird walks over the river.")["input_ids"]
    # planted: the model goes on otherwise after the prompt, and with its own choice after the gold token that it did not choose
    prompt = ids[:6]
    choice = lens_ranks(learnt, [*prompt, 0], end)[0]
    wrong = next(token for token in range(60, 90) if token != choice)
    then = lens_ranks(learnt, [*prompt, wrong, 0], end)[0]
    found = decided_probe(learnt, [Marked([*prompt, wrong, then], [(6, 1), (7, 2)])], LINES[:3]).result()
    assert found["marked"] == [0, 1, 1] and found["predicted"] == [0, 0, 1]


ENDS: dict[str, Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "Llama": lambda m: lambda x: m.lm_head(m.model.norm(x)),
    "Gemma-2": lambda m: lambda x: m.lm_head(m.model.norm(x)),  # soft-capping leaves the order as it is
    "GPT-2": lambda m: lambda x: m.lm_head(m.transformer.ln_f(x)),
    "GPT-NeoX": lambda m: lambda x: m.get_output_embeddings()(m.gpt_neox.final_layer_norm(x)),
    "Falcon": lambda m: lambda x: m.lm_head(m.transformer.ln_f(x)),
}


@pytest.mark.parametrize("name", ENDS)
def test_marked_tokens_of_other_families(name: str, tmp_path: Path) -> None:
    decoder = view_decoder(load_model(families.build(name, tmp_path / "model"), device="cpu"))
    end = ENDS[name](decoder.model)
    generator = torch.Generator().manual_seed(5)
    texts = []
    for length in (9, 14, 6):
        ids = torch.randint(3, 150, (3,), generator=generator).tolist()
        while len(ids) < length:  # the model's own choices, and some others
            own = lens_ranks(decoder, [*ids, 0], end)[0]
            ids.append(own if torch.rand(1, generator=generator) < 0.8 else 7)
        texts.append(Marked(ids, [(at, at % 3) for at in range(1, length)]))
    groups = ["a", "b", "c"]
    hand = [(text.ids, [(at, groups[group]) for at, group in text.marks]) for text in texts]
    expected = by_hand(decoder, hand, groups, end)
    found = decided_probe(decoder, texts, groups, max_tokens=28).result()
    assert min(found["predicted"]) >= 2
    assert_same(found, expected)


def test_planted_layers_that_do_nothing_decide_everything_before_them(tmp_path: Path) -> None:
    random, planted = (view_decoder(load_model(make_llama(tmp_path / name, vocab_size=400), device="cpu")) for name in "ab")
    with torch.no_grad():
        for layer in planted.model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    ids = make_tokenizer()(SENTENCES[0])["input_ids"]
    kept: dict[str, list[float]] = {"planted": [], "before": []}
    for name, subject in (("planted", planted), ("before", random)):
        for at in range(1, len(ids)):
            own = lens_ranks(subject, [*ids[:at], 0], llama_end(subject))[0]
            found = decided_probe(subject, [Marked([*ids[:at], own], [(at, 0)])], ["all"]).result()
            assert found["predicted"] == [1] and found["decided"][0][0] <= found["kept"][0][0]
            kept[name].append(found["kept"][0][0])
    assert max(kept["planted"]) == 2  # the input of the first layer that does nothing
    assert max(kept["before"]) > 2


def test_first_crossings_and_for_good() -> None:
    total = DecidedSum(4, ["a", "b", "c"])
    total.mark(torch.tensor([0, 0, 1, 2]))
    total.update(torch.tensor([[3, 1, 40], [1, 1, 30], [6, 1, 20], [1, 1, 12]]), torch.tensor([0, 0, 1]))
    found = total.result()
    assert found["marked"] == [2, 1, 1] and found["predicted"] == [2, 1, 0]
    # rank 1: first at layers 1 and 0; for good from 3 and 0; the third token is never first before the end
    assert (found["decided"][0][0], found["kept"][0][0]) == (0.5, 1.5)
    assert (found["decided"][1][0], found["kept"][1][0]) == (4, 4)
    assert found["decided"][1][RANKS.index(100)] == 0 and found["decided"][2] == [None] * len(RANKS)
    double = DecidedSum(4, ["a", "b", "c"], left_out=2)
    for _ in range(2):
        double.merge(total)
    again = double.result()
    assert again["marked"] == [4, 2, 2] and again["left_out"] == 2 and again["decided"] == found["decided"]


def test_words_are_found_by_the_text_alone() -> None:
    tokenizer = make_tokenizer()
    marked = mark_words(tokenizer, "The tall king found bread.", tag, 64)
    pieces = [tokenizer.decode(marked.ids[at]) for at, _ in marked.marks]
    assert [TAGS[group] for _, group in marked.marks] == ["DET", "ADJ", "NOUN", "VERB", "NOUN", "PUNCT"]
    assert [p.strip()[:1] for p in pieces] == ["T", "t", "k", "f", "b", "."]
    # one character of several tokens begins one word
    smile = mark_words(tokenizer, "a \N{GRINNING FACE} day", lambda text: [(2, 3, "NOUN"), (4, 7, "NOUN")], 64)
    assert len(smile.ids) > 7 and [TAGS[group] for _, group in smile.marks] == ["NOUN", "NOUN"]
    assert smile.marks[0][0] + 4 <= smile.marks[1][0]
    # the tagger sees the word that is cut, and none beyond it
    seen: list[str] = []
    mark_words(tokenizer, "qwertyuiop asdfghjkl zxcvbnm", lambda text: seen.append(text) or [], 4)  # type: ignore[func-returns-value]
    assert seen == ["qwertyuiop"]
    # the first token of all is predicted from nothing
    bare = tokenizer.backend_tokenizer
    bare.post_processor = None
    tokenizer = type(tokenizer)(tokenizer_object=bare)
    assert mark_words(tokenizer, "The king", tag, 64).marks[0][0] > 0
    assert [TAGS[group] for _, group in mark_words(tokenizer, "The king", tag, 64).marks] == ["NOUN"]


def test_answers_begin_with_a_token_of_their_own() -> None:
    tokenizer = make_tokenizer()
    marked = mark_answer(tokenizer, "The tall ", " king\n")
    assert marked is not None and tokenizer.decode(marked.ids[1:]) == "The tall king"
    assert mark_answer(tokenizer, "The tall", "king", length=len(marked.ids)) == marked
    assert mark_answer(tokenizer, "The tall", "king", length=len(marked.ids) - 1) is None
    assert mark_answer(tokenizer, "The tall", "king " * 4) is None

    class Joins:
        """A tokenizer whose blank makes another token of the word before."""

        eos_token_id = 9

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [5, 9] if " " not in text else [6, 7, 9] if "joined" in text else [5, 7, 9]}

    assert mark_answer(Joins(), "a", "joined") is None
    assert mark_answer(Joins(), "a", "b") == Marked([5, 7], [(1, 0)])


def test_what_cannot_be_probed_is_refused(learnt: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(Refused, match="fast tokenizer"):
        words_probe(learnt, types.SimpleNamespace(is_fast=False), SENTENCES, tag)
    with pytest.raises(Refused, match="no word of the 1 documents is tagged DET"):
        words_probe(learnt, tokenizer, ["qqq"], tag)
    with pytest.raises(Refused, match="none of the 1 items has an answer of 1 to 3 tokens within 4 tokens"):
        answers_probe(learnt, tokenizer, ITEMS[:1], length=4)
    with pytest.raises(Refused, match="makes token id 400"):
        decided_probe(learnt, [Marked([0, 400], [(1, 0)])], ["a"])
    weight = learnt.model.model.norm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    try:
        with pytest.raises(Refused, match="not a number"):
            decided_probe(learnt, [Marked([0, 3], [(1, 0)])], ["a"])
    finally:
        with torch.no_grad():
            weight.copy_(before)
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(Refused, match=r"not installed: pip install 'layerprune\[words\]'"):
        spacy_tagger()


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError("[E050]"), "python -m spacy download en_x"), (ValueError("[E002]\nfactory"), r"cannot be loaded: \[E002\] factory")],
)
def test_a_missing_model_of_spacy_is_refused(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    with pytest.raises(Refused, match=said):
        spacy_tagger("en_x")


def test_spacy_tells_the_parts_of_speech() -> None:
    spacy = pytest.importorskip("spacy")
    if not spacy.util.is_package("en_core_web_sm"):
        pytest.skip("no en_core_web_sm")
    text = "The small bird walks over the river."
    found = [(text[a:b], kind) for a, b, kind in spacy_tagger()(text)]
    assert found == [
        ("The", "DET"), ("small", "ADJ"), ("bird", "NOUN"), ("walks", "VERB"), ("over", "ADP"), ("the", "DET"), ("river", "NOUN"),
        (".", "PUNCT"),
    ]  # fmt: skip


def test_answers_are_read_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "\u00e9", "answer": "d", "more": 1}\n', encoding="utf-8")
    assert read_answers(path) == [("a", "b"), ("\u00e9", "d")]
    for bad in (
        '{"prompt": "a"}',
        "[1]",
        "{",
        '{"prompt": "a", "answer": 3}',
        '{"prompt": " ", "answer": "b"}',
        '{"prompt": "a", "answer": "\\ud800"}',
    ):
        path.write_text('{"prompt": "a", "answer": "b"}\n' + bad)
        with pytest.raises(Refused, match="line 2 of .* is not a JSON object with the strings `prompt` and `answer`"):
            read_answers(path)
    path.write_text("\n")
    with pytest.raises(Refused, match="holds no items"):
        read_answers(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="cannot be read as JSON lines"):
        read_answers(path)
    with pytest.raises(Refused, match="No such file"):
        read_answers(tmp_path / "none.jsonl")


@pytest.mark.parametrize("models", [1, 2, 4])
def test_the_figures_show_every_line(models: int, learnt: Decoder, tmp_path: Path) -> None:
    words = words_probe(learnt, make_tokenizer(), SENTENCES, tag, length=40).result()
    answers = answers_probe(learnt, make_tokenizer(), ITEMS).result()
    names = [f"model {n}" for n in range(models)]
    for draw, name, found in ((plot_words, "words", words), (plot_answers, "answers", answers)):
        files = draw(dict.fromkeys(names, found), tmp_path)
        assert files == [tmp_path / f"{name}.png", tmp_path / f"{name}.svg"]
        svg = files[1].read_text()
        assert all(model in svg for model in names)
        for group, count in zip(found["groups"], found["predicted"], strict=True):
            label = f"{group} ({count:,})" if models == 1 else f">{group}<"
            assert (label in svg) == (count > 0)
    empty = {**answers, "predicted": [0] * len(LINES)}
    assert len(plot_answers({"a": empty}, tmp_path)) == 2
