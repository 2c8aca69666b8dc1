"""The normalised loss against brute force; evaluation of checkpoints and of live models; speed of generation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerprune.eval import memory, speed
from layerprune.eval.evaluate import evaluate_checkpoint, evaluate_live, format_table, loss_sequences, measure_loss, parse_tasks
from layerprune.eval.speed import generation_speed
from layerprune.model.data import batches
from layerprune.model.decoder import view_decoder, virtual_cut
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model, load_tokenizer
from layerprune.model.loss import total_loss
from layerprune.model.recipes import load_recipe
from layerprune.prune.cut import prune_checkpoint

torch.set_num_threads(1)


def brute_force(folder: Path, texts: list[str], length: int) -> tuple[float, int]:
    """Nats and predicted tokens: transformers alone, one document at a time, one token at a time, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    nats, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"][:length]
        if len(ids) < 2:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        for at, token in enumerate(ids[1:]):
            exponentials = [math.exp(value) for value in logits[at].tolist()]
            nats -= math.log(exponentials[token] / sum(exponentials))
            count += 1
    return nats, count


@pytest.fixture
def short_and_long(tmp_path: Path, prose: list[str]) -> tuple[Path, list[str]]:
    """Documents of 1 token (`<s>` is put before each), of a few, and of more than the context."""
    texts = prose[:12] + ["a", "b c", " ".join(prose[12:20]), "x"]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


@pytest.mark.parametrize("length", [None, 20])
@pytest.mark.parametrize("batch_tokens", [1, 100, 5000])
def test_the_loss_is_that_of_brute_force(
    length: int | None,
    batch_tokens: int,
    tiny_llama: Path,
    short_and_long: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "token_budget", lambda device: batch_tokens)
    path, texts = short_and_long
    loss = evaluate_checkpoint(tiny_llama, data=str(path), length=length, device="cpu")["loss"]
    nats, count = brute_force(tiny_llama, texts, length or 64)
    assert (loss["tokens"], loss["documents"]) == (count, 16)
    assert loss["nats_per_token"] == pytest.approx(nats / count, rel=1e-6)
    assert loss["normalised"] == pytest.approx(nats / count / math.log(320), rel=1e-6)  # V of the config, not of the tokenizer


def test_a_uniform_guess_has_loss_one(tiny_llama: Path, short_and_long: tuple[Path, list[str]]) -> None:
    live = load_model(tiny_llama, device="cpu")
    with torch.no_grad():
        live.lm_head.weight.zero_()
    sequences = loss_sequences(load_tokenizer(tiny_llama), live.config, str(short_and_long[0]), None, None)
    assert measure_loss(view_decoder(live), sequences, 320)["normalised"] == pytest.approx(1, rel=1e-6)


def test_padding_on_either_side_changes_nothing(tiny_llama: Path, short_and_long: tuple[Path, list[str]]) -> None:
    decoder = view_decoder(load_model(tiny_llama, device="cpu"))
    sequences = loss_sequences(load_tokenizer(tiny_llama), decoder.model.config, str(short_and_long[0]), None, None)
    alone = total_loss(decoder, batches(sequences, 1))
    assert len(batches(sequences, 1)) == len(sequences)
    for side in ("right", "left"):
        for pad_id in (0, 7):
            padded = batches(sequences, 400, pad_id, side)
            assert any(batch.mask_BT is not None for batch in padded)
            together = total_loss(decoder, padded)
            assert together.tokens == alone.tokens
            assert together.per_token() == pytest.approx(alone.per_token(), abs=1e-5)


def test_documents_of_less_than_two_tokens_are_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # nothing is put before a document
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "the river", "b")))
    config = load_model(tiny_llama, device="cpu").config
    assert len(loss_sequences(tokenizer, config, str(path), None, None)) == 1
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(Refused, match="all 2 documents are shorter than 2 tokens"):
        loss_sequences(tokenizer, config, str(path), None, None)


def test_data_that_holds_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(Refused, match="empty.jsonl holds no documents"):
        evaluate_checkpoint(tiny_llama, data=str(path), device="cpu", out=tmp_path / "out" / "eval.json")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--eval-data .*gone.jsonl"):
        evaluate_checkpoint(tiny_llama, data=str(tmp_path / "gone.jsonl"))


def test_a_loss_that_is_no_number_is_refused(own_llama: Path, documents_file: Path) -> None:
    live = load_model(own_llama, device="cpu")
    with torch.no_grad():
        live.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    live.save_pretrained(own_llama)
    with pytest.raises(Refused, match="loss is not a number"):
        evaluate_checkpoint(own_llama, data=str(documents_file), samples=4, device="cpu")


def test_loss_batches_that_run_out_of_memory_are_halved(
    tiny_llama: Path, documents_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = load_model(tiny_llama, device="cpu")
    sequences = loss_sequences(load_tokenizer(tiny_llama), live.config, str(documents_file), 30, None)
    usual = measure_loss(view_decoder(live), sequences, 320)
    forward, failures = live.forward, []

    def limited(rows: int) -> Callable[..., Any]:
        def small(input_ids: torch.Tensor, **more: Any) -> Any:
            if len(input_ids) > rows:
                failures.append(len(input_ids))
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return forward(input_ids=input_ids, **more)

        return small

    monkeypatch.setattr(live, "forward", limited(3))
    assert measure_loss(view_decoder(live), sequences, 320) == {
        **usual,
        "normalised": pytest.approx(usual["normalised"], abs=1e-6),
        "nats_per_token": pytest.approx(usual["nats_per_token"], abs=1e-5),
    }
    assert max(failures) > 6
    monkeypatch.setattr(live, "forward", limited(0))
    with pytest.raises(Refused, match="not even one sequence"):
        measure_loss(view_decoder(live), sequences, 320)


def test_a_virtual_cut_has_the_loss_of_the_written_checkpoint(tiny_llama: Path, documents_file: Path, tmp_path: Path) -> None:
    prune_checkpoint(tiny_llama, layers="1:3", out=tmp_path / "cut")
    written = evaluate_checkpoint(tmp_path / "cut", data=str(documents_file), samples=20, device="cpu")
    live, tokenizer = load_model(tiny_llama, device="cpu"), load_tokenizer(tiny_llama)
    sequences = loss_sequences(tokenizer, live.config, str(documents_file), 20, None)
    whole = evaluate_live(live, tokenizer, sequences=sequences)
    with virtual_cut(view_decoder(live), (0, 3, 4)):
        cut = evaluate_live(live, tokenizer, sequences=sequences)
    assert cut == {"loss": written["loss"], "tasks": None}
    assert cut["loss"]["nats_per_token"] != whole["loss"]["nats_per_token"]
    assert (written["layers"], written["kept"]) == (3, [0, 3, 4])


def test_eval_json_says_what_was_measured(tiny_llama: Path, documents_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "eval.json"
    found = evaluate_checkpoint(str(tiny_llama), data=str(documents_file), samples=9, length=30, device="cpu", out=out, seed=3)
    assert json.loads(out.read_text()) == found
    assert found["settings"] == {
        "tasks": {},
        "task_folder": None,
        "limit": None,
        "loss": {"data": str(documents_file), "samples": 9, "length": 30},
        "seed": 3,
        "dtype": "float32",
        "device": "cpu",
        "recipe": None,
    }
    assert (found["layers"], found["kept"], found["tasks"]) == (5, None, None)
    assert found["loss"]["documents"] == 9
    assert format_table(found).splitlines()[1].startswith(f"loss {found['loss']['normalised']:.4f} normalised")
    with pytest.raises(UsageError, match="eval.json exists already"):
        evaluate_checkpoint(tiny_llama, data=str(documents_file), out=out)


@pytest.mark.parametrize(
    ("asked", "shots", "recipe", "found"),
    [
        (["boolq"], None, None, {"boolq": None}),
        (["boolq:3", "arc_easy"], 1, None, {"boolq": 3, "arc_easy": 1}),
        ({"boolq": 2, "arc_easy": None}, None, None, {"boolq": 2, "arc_easy": None}),
        (None, None, None, {}),
        (None, None, "llama-2-7b", {"mmlu": 5, "boolq": 0}),  # as in the paper
        (None, 1, "llama-2-7b", {"mmlu": 1, "boolq": 1}),
        (["mmlu", "arc_easy"], None, "llama-2-7b", {"mmlu": 5, "arc_easy": None}),
        (["mmlu:0"], None, "llama-2-7b", {"mmlu": 0}),
    ],
)
def test_the_shots_of_tasks(asked: Any, shots: int | None, recipe: str | None, found: dict[str, int | None]) -> None:
    assert parse_tasks(asked, shots, load_recipe(recipe) if recipe else None) == found


def test_the_speed_of_generation(tiny_llama: Path) -> None:
    live, tokenizer = load_model(tiny_llama, device="cpu"), load_tokenizer(tiny_llama)
    made = generation_speed(live, tokenizer, prompt_tokens=10, new_tokens=20, repeats=3)
    assert (made["prompt_tokens"], made["new_tokens"]) == (10, 20)
    assert made["tokens_per_second"] == pytest.approx(20 / made["seconds"])
    fitted = generation_speed(live, tokenizer, prompt_tokens=100, new_tokens=100, repeats=1)
    assert fitted["prompt_tokens"] + fitted["new_tokens"] == 64  # the context
    assert not live.training
    with virtual_cut(view_decoder(live), (0, 4)), pytest.raises(ValueError, match="virtually cut"):
        generation_speed(live, tokenizer)


def test_speed_runs_the_prompt_once_and_then_a_token_a_pass(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, tokenizer = load_model(tiny_llama, device="cpu"), load_tokenizer(tiny_llama)
    widths, forward = [], live.forward

    def watch(*args: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        widths.append(input_ids.shape[1])
        return forward(*args, input_ids=input_ids, **more)

    def clock(*durations: int) -> SimpleNamespace:
        """A clock by which the runs take these seconds, one after the other."""
        ticks = iter([tick for seconds in durations for tick in (0, seconds)])
        return SimpleNamespace(perf_counter=lambda: next(ticks))

    monkeypatch.setattr(live, "forward", watch)
    monkeypatch.setattr(speed, "time", clock(9, 1, 1))
    generation_speed(live, tokenizer, prompt_tokens=6, new_tokens=4, repeats=2)
    assert widths == [6, 1, 1, 1] * 3  # a warm-up and two runs, with the KV cache
    widths.clear()
    monkeypatch.setattr(speed, "time", clock(9, 5, 7, 3, 3))
    made = generation_speed(live, tokenizer, prompt_tokens=6, new_tokens=4, repeats=2)
    assert len(widths) == 4 * 5 and made["seconds"] == 3  # two runs more, until the two fastest agree
    monkeypatch.setattr(speed, "time", clock(9, *range(80, 0, -10)))
    assert generation_speed(live, tokenizer, prompt_tokens=6, new_tokens=4, repeats=2)["seconds"] == 10  # eight, no more
