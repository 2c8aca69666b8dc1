"""Items, and whether a path answers them: against generation and log-likelihoods by plain passes of a model that is really cut."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerprune.model.decoder import Decoder, forward_logits, view_decoder
from layerprune.model.errors import Refused
from layerprune.model.layerwise import Layerwise
from layerprune.model.load import load_model
from layerprune.route.items import Item, load_items
from layerprune.route.paths import Counts, executed, path_length, whole_path
from layerprune.route.reward import PathReward, goes_on_with
from layerprune.route.search import SearchSettings, search_path

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path) -> Decoder:
    return view_decoder(load_model(tiny_llama, device="cpu", dtype="float32"))


def stacked(decoder: Decoder, counts: Counts) -> Any:
    """The logits (tokens, vocabulary) of ids, from a plain loop over the modules of a Llama."""
    inner = decoder.model.model

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        x = inner.embed_tokens(torch.tensor([ids]))
        positions = torch.arange(len(ids))[None]
        rotary = inner.rotary_emb(x, positions)
        mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)[None, None]
        for layer in executed(counts):
            out = inner.layers[layer](x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            x = out[0] if isinstance(out, tuple) else out
        return decoder.model.lm_head(inner.norm(x))[0]

    return logits


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def test_items_are_read_in_order(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "items.jsonl", [
        {"prompt": "the old tower", "answer": "found"}, "",
        {"prompt": "a small ", "options": ["king", "river"], "gold": 1, "id": 4},
        {"prompt": "a small", "options": [" king", "\nriver"], "gold": 0},
    ])  # fmt: skip
    first, second, third = load_items(path, tiny_tokenizer, 320, 64)
    assert (first.line, second.line, third.line) == (1, 3, 4)
    assert (first.gold, second.gold, third.gold) == (None, 1, 0)

    def text(ids: tuple[int, ...]) -> str:
        return str(tiny_tokenizer.decode(list(ids), skip_special_tokens=True))

    assert first.prompt[0] == 0 and text(first.prompt) == "the old tower"
    assert [text(e) for e in first.endings] == [" found"]
    assert [text(e) for e in second.endings] == [" king", " river"]
    assert [text(e) for e in third.endings] == [" king", "\nriver"]
    assert all(e[0] != 0 for item in (first, second, third) for e in item.endings)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        ({"answer": "x"}, "has no `prompt` with text"),
        ({"prompt": " ", "answer": "x"}, "has no `prompt` with text"),
        ({"prompt": 3, "answer": "x"}, "has no `prompt` with text"),
        ('{"prompt": "\\ud800", "answer": "x"}', "has no `prompt` with text"),
        ({"prompt": "a"}, "needs either an `answer` or `options`$"),
        ({"prompt": "a", "answer": "x", "options": ["x", "y"], "gold": 0}, "needs either an `answer` or `options`, not both"),
        ({"prompt": "a", "answer": ""}, "has an `answer` that is no text"),
        ({"prompt": "a", "answer": 4}, "has an `answer` that is no text"),
        ({"prompt": "a", "options": ["x"], "gold": 0}, "not two texts or more"),
        ({"prompt": "a", "options": "xy", "gold": 0}, "not two texts or more"),
        ({"prompt": "a", "options": ["x", "x"], "gold": 0}, "the same option twice"),
        ({"prompt": "a", "options": ["x", "y"]}, "the `gold` None, which is none of its options 0 to 1"),
        ({"prompt": "a", "options": ["x", "y"], "gold": 2}, "the `gold` 2"),
        ({"prompt": "a", "options": ["x", "y"], "gold": True}, "the `gold` True"),
        ({"prompt": "a " * 70, "answer": "x"}, "takes 73 tokens, and the model's context is 64"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, tiny_tokenizer: Any, line: Any, sentence: str) -> None:
    path = write(tmp_path / "items.jsonl", [{"prompt": "the", "answer": "bird"}, line])
    with pytest.raises(Refused, match=f"^line 2 of {path} .*{sentence}"):
        load_items(path, tiny_tokenizer, 320, 64)


def test_a_bad_file_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(Refused, match="does not exist"):
        load_items(tmp_path / "none.jsonl", tiny_tokenizer, 320)
    with pytest.raises(Refused, match="holds no item"):
        load_items(write(tmp_path / "empty.jsonl", ["", " "]), tiny_tokenizer, 320)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match="is not text in UTF-8"):
        load_items(tmp_path / "bytes.jsonl", tiny_tokenizer, 320)
    with pytest.raises(Refused, match="cannot be read: Is a directory"):
        load_items(tmp_path, tiny_tokenizer, 320)
    with pytest.raises(Refused, match="does not belong to this model: it makes token id"):
        load_items(write(tmp_path / "one.jsonl", [{"prompt": "the", "answer": "bird"}]), tiny_tokenizer, 50)


def test_a_token_that_goes_on_with_the_word(tiny_tokenizer: Any) -> None:
    goes_on = goes_on_with(tiny_tokenizer)

    def ids(text: str) -> list[int]:
        return list(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])

    answer = tuple(ids(" 4"))
    assert goes_on(answer, ids("2")[0])
    assert not goes_on(answer, ids(" 2")[0]) and not goes_on(answer, ids(".")[0]) and not goes_on(answer, 1)
    assert not goes_on(tuple(ids(" 4.")), ids("2")[0])


def paths_of(layers: int, count: int) -> list[Counts]:
    rng = random.Random(0)
    made = (tuple(rng.choices((0, 1, 2), (1, 3, 1), k=layers)) for _ in range(4 * count))
    return list(dict.fromkeys([whole_path(layers), *filter(any, made)]))[:count]


def never(answer: tuple[int, ...], token: int) -> bool:
    return False


def test_options_by_their_log_likelihood(decoder: Decoder) -> None:
    layerwise = Layerwise(decoder)
    rng = random.Random(1)
    rewards = []
    for gold in (0, 1, 2):
        prompt = tuple(rng.choices(range(2, 300), k=5))
        item = Item(1, prompt, tuple(tuple(rng.choices(range(2, 300), k=k)) for k in (2, 1, 3)), gold)
        reward = PathReward(layerwise, item, never)
        for counts in paths_of(5, 12):
            logits, totals = stacked(decoder, counts), []
            for ending in item.endings:
                logp = logits(list(prompt + ending)).log_softmax(-1)
                totals.append(sum(float(logp[4 + i, token]) for i, token in enumerate(ending)))
            rewards.append(reward(counts))
            assert rewards[-1] == float(max(range(3), key=totals.__getitem__) == gold)
    assert 0 < sum(rewards) < len(rewards)


def test_answers_by_greedy_generation(decoder: Decoder) -> None:
    """The answer is what another path generates: paths that generate it too, and only those, are right."""
    layerwise, prompt = Layerwise(decoder), [0, 9, 30, 77, 5]
    paths = paths_of(5, 40)
    generated = []
    for counts in paths:
        logits, ids = stacked(decoder, counts), list(prompt)
        for _ in range(3):
            ids.append(int(logits(ids)[-1].argmax()))
        generated.append(tuple(ids[5:]))
    rights = 0
    for length, source in itertools.product((1, 2), range(0, 40, 4)):
        answer = generated[source][:length]
        found = PathReward(layerwise, Item(1, tuple(prompt), (answer,), None), never)
        stops = PathReward(layerwise, Item(1, tuple(prompt), (answer,), None), lambda a, token: token % 2 == 0)
        for counts, tokens in zip(paths, generated, strict=True):
            assert found(counts) == float(tokens[:length] == answer)
            assert stops(counts) == float(tokens[:length] == answer and tokens[length] % 2 == 1)
            rights += tokens[:length] == answer
    assert 20 < rights < 400


def test_logits_that_are_not_numbers_answer_nothing(decoder: Decoder) -> None:
    layerwise = Layerwise(decoder)
    before = decoder.model.model.norm.weight.clone()
    try:
        with torch.no_grad():
            decoder.model.model.norm.weight[0] = torch.nan
        assert PathReward(layerwise, Item(1, (3, 4), ((0,),), None), never)((1, 1, 1, 1, 1)) == 0
        assert PathReward(layerwise, Item(1, (3, 4), ((5,), (6,)), 0), never)((1, 1, 1, 1, 1)) == 0
    finally:
        with torch.no_grad():
            decoder.model.model.norm.weight.copy_(before)


def planted(build_llama: Callable[..., Path], folder: Path) -> Decoder:
    """8 layers of which 3, 4 and 6 add nothing to the stream."""
    decoder = view_decoder(load_model(build_llama(folder, layers=8), device="cpu", dtype="float32"))
    with torch.no_grad():
        for layer in (3, 4, 6):
            decoder.layers[layer].self_attn.o_proj.weight.zero_()
            decoder.layers[layer].mlp.down_proj.weight.zero_()
    return decoder


def test_layers_that_do_nothing_are_skipped_and_most_work_is_shared(build_llama: Callable[..., Path], tmp_path: Path) -> None:
    """The answers are the model's own, so the layers that are the identity may always go."""
    decoder = planted(build_llama, tmp_path / "model")
    layerwise = Layerwise(decoder)
    for start in range(3):
        prompt = (0, *range(20 + start, 32 + start))
        ids = list(prompt)
        for _ in range(4):
            ids.append(int(forward_logits(decoder, torch.tensor([ids]))[0, -1].argmax()))
        reward = PathReward(layerwise, Item(1, prompt, (tuple(ids[len(prompt) :]),), None), never)
        assert reward((1, 1, 1, 0, 0, 1, 0, 1)) == 1
        found = search_path(reward, 8, SearchSettings(simulations=200, stop_shorter=None), seed=start)
        assert found.best is not None and found.base == 1 and found.saved >= 3
        if found.saved == 3:
            assert found.best == (1, 1, 1, 0, 0, 1, 0, 1)
        assert path_length(found.best) == 8 - found.saved
        assert reward.paths.applications < 0.6 * reward.paths.alone


def test_a_path_that_the_model_cannot_run_answers_nothing(tmp_path: Path) -> None:
    import families

    folder = families.build("Gemma-3n", tmp_path / "model")
    layerwise = Layerwise(view_decoder(load_model(folder, device="cpu", dtype="float32")))
    reward = PathReward(layerwise, Item(1, (3, 4, 5), ((6,), (7,)), 0), never)
    other = PathReward(layerwise, Item(1, (3, 4, 5), ((6,), (7,)), 1), never)
    assert reward(whole_path(8)) + other(whole_path(8)) == 1
    assert reward((1, 1, 1, 0, 1, 1, 1, 1)) == other((1, 1, 1, 0, 1, 1, 1, 1)) == 0
