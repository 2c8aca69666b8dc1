"""Residual erasure against plain forward hooks, one place at a time, and planted truths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from layerprune.depth import erasure
from layerprune.depth.erasure import Erasure, StateMean, erase, mean_states
from layerprune.model.decoder import Decoder, hidden_of, view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model

torch.set_num_threads(1)

NAMES = "GPT-2 GPT-J Falcon OPT Qwen3-MoE Gemma-2 Gemma-3n Gemma-4 Cohere2 LFM2 Mamba DeepSeek-V3".split()


def documents(vocab: int, lengths: tuple[int, ...] = (12, 5, 9)) -> list[list[int]]:
    made = torch.Generator().manual_seed(5)
    return [torch.randint(2, vocab, (n,), generator=made).tolist() for n in lengths]


@pytest.fixture
def decoder(tiny_llama: Path) -> Decoder:
    return view_decoder(load_model(tiny_llama, device="cpu", dtype="float32"))


@pytest.fixture
def built(tmp_path: Path) -> Callable[[str], Decoder]:
    def build(name: str) -> Decoder:
        from transformers import CONFIG_MAPPING

        if families.FAMILIES[name].model_type not in CONFIG_MAPPING:
            pytest.skip("this transformers does not have it")
        return view_decoder(load_model(families.build(name, tmp_path / "source"), device="cpu", dtype="float32"))

    return build


def streams(x: torch.Tensor) -> torch.Tensor:
    """The states of a batch of one as (T, F); Gemma-3n's streams one after another."""
    return x[:, 0].transpose(0, 1).flatten(1) if x.dim() == 4 else x[0]


def run(decoder: Decoder, ids: list[int], depth: int, edit: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Distributions (T, V) with x^(depth) edited on its way: at a layer's input, at the end at the last layer's output."""

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def after(module: Any, args: Any, output: Any) -> Any:
        edited = edit(hidden_of(output))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    layers = decoder.layers
    if depth < len(layers):
        hook = layers[depth].register_forward_pre_hook(before, with_kwargs=True)
    else:
        hook = layers[-1].register_forward_hook(after)
    with torch.no_grad():
        logits = decoder.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    hook.remove()
    return logits.softmax(dim=-1)


def means_by_hooks(decoder: Decoder, docs: list[list[int]]) -> torch.Tensor:
    rows = []
    for depth in range(len(decoder) + 1):
        seen: list[torch.Tensor] = []
        for ids in docs:
            run(decoder, ids, depth, lambda x, seen=seen: (seen.append(streams(x).double()), x)[1])
        rows.append(torch.cat(seen).mean(dim=0))
    return torch.stack(rows)


def brute_force(decoder: Decoder, ids: list[int], answer: int, baseline: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    predicting = slice(-(answer + 1), -1)
    largest, mean = torch.zeros(2, len(decoder) + 1, len(ids), dtype=torch.float64)
    for depth in range(len(decoder) + 1):
        plain = run(decoder, ids, depth, lambda x: x)[predicting]
        for t in range(len(ids)):

            def edit(x: torch.Tensor, depth: int = depth, t: int = t) -> torch.Tensor:
                x = x.clone()
                x[..., t, :] = baseline[depth].view(-1, 1, x.shape[-1])
                return x

            moved = (run(decoder, ids, depth, edit)[predicting] - plain).norm(dim=-1)
            largest[depth, t], mean[depth, t] = moved.max(), moved.mean()
    return largest, mean


def compare(decoder: Decoder, docs: list[list[int]], answer: int, found: Erasure, baseline: torch.Tensor) -> None:
    largest, mean = brute_force(decoder, docs[0], answer, baseline)
    assert largest.max() > 1e-4 and largest.shape == found.max_LT.shape == (len(decoder) + 1, len(docs[0]))
    limit = min(1e-5, 1e-2 * float(largest.max()))
    assert (found.max_LT - largest).abs().max() < limit
    assert (found.mean_LT - mean).abs().max() < limit < (largest - mean).max()


@pytest.mark.parametrize("max_tokens", [1, 34, 4096])
def test_a_llama_is_as_by_hooks(decoder: Decoder, max_tokens: int) -> None:
    """With one place a batch, with chunks that do not come out even (3 rows of 11 tokens), and all at once."""
    docs = documents(320)
    baseline = mean_states(decoder, docs, max_tokens=24).result()
    assert torch.allclose(baseline, means_by_hooks(decoder, docs), rtol=1e-5, atol=1e-6)
    found = erase(decoder, docs[0], 3, baseline, max_tokens=max_tokens)
    compare(decoder, docs, 3, found, baseline)
    rows, chunks = {1: (1, 11), 34: (3, 4), 4096: (11, 1)}[max_tokens]
    assert found.applications == rows * (5 + chunks * 15) and found.naive == 5 * (1 + 11 * 6)


@pytest.mark.parametrize("name", NAMES)
def test_families(name: str, built: Callable[[str], Decoder]) -> None:
    decoder = built(name)
    docs = documents(160, (7, 5))
    baseline = mean_states(decoder, docs).result()
    assert torch.allclose(baseline, means_by_hooks(decoder, docs), rtol=1e-5, atol=1e-5)
    compare(decoder, docs, 2, erase(decoder, docs[0], 2, baseline, max_tokens=20), baseline)


@pytest.mark.parametrize("name", ["RWKV", "GLM-5"])
def test_a_family_that_hands_on_more_is_refused(name: str, built: Callable[[str], Decoder]) -> None:
    with pytest.raises(Refused, match="does more between its layers|no stack"):
        erase(built(name), [3, 4, 5], 1, torch.zeros(9, 32))


def test_erasing_to_what_is_there_changes_nothing(decoder: Decoder) -> None:
    """A prompt of one token over and over: without positions in the embedding, depth 0 is its own mean."""
    ids = [7] * 10
    baseline = mean_states(decoder, [ids]).result()
    found = erase(decoder, ids, 2, baseline)
    assert found.max_LT[0].max() < 1e-6
    other = erase(decoder, documents(320)[0], 2, baseline)
    assert (other.max_LT[0, :-1] > 1e-4).all()


def test_after_the_last_layer_only_the_answer_is_left(decoder: Decoder) -> None:
    docs = documents(320)
    found = erase(decoder, docs[0], 2, mean_states(decoder, docs).result()).max_LT
    assert (found[-1, :9] == 0).all() and (found[-1, 9:11] > 1e-3).all()
    assert (found[:, -1] == 0).all() and (found[:-1, :-1] > 0).all()


def test_a_token_that_no_layer_looks_at_is_not_needed(own_llama: Path) -> None:
    """From layer 2 on attention adds nothing: then an earlier token cannot matter, and before it can."""
    live = load_model(own_llama, device="cpu", dtype="float32")
    with torch.no_grad():
        for layer in live.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
    decoder, docs = view_decoder(live), documents(320)
    found = erase(decoder, docs[0], 1, mean_states(decoder, docs).result()).max_LT
    assert (found[2:, :10] == 0).all() and (found[:2, :10] > 1e-4).all() and (found[:, 10] > 1e-3).all()


def test_means_of_halves_merged_are_the_whole_whatever_the_padding(decoder: Decoder) -> None:
    docs = documents(320)
    whole = mean_states(decoder, docs, max_tokens=1000)
    first, second = mean_states(decoder, docs[:1]), mean_states(decoder, docs[1:], max_tokens=1)
    second.merge(first)
    empty = StateMean(5)
    empty.merge(second)
    assert whole.counts == empty.counts == [26] * 6
    assert torch.allclose(whole.result(), empty.result(), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(first.result(), whole.result(), rtol=1e-2)


def test_small_slices_of_the_head_change_nothing(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents(320)
    baseline = mean_states(decoder, docs).result()
    whole = erase(decoder, docs[0], 3, baseline)
    monkeypatch.setattr(erasure, "LOGIT_BYTES", 4 * 320 * 3 * 4)  # slices of 4, 4 and 3 of 11 rows
    sliced = erase(decoder, docs[0], 3, baseline)
    assert torch.allclose(sliced.max_LT, whole.max_LT, atol=1e-6) and torch.allclose(sliced.mean_LT, whole.mean_LT, atol=1e-6)


def test_the_model_is_restored(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents(320)
    baseline = mean_states(decoder, docs).result()
    erase(decoder, docs[0], 2, baseline)
    assert not any("forward" in layer.__dict__ for layer in decoder.layers)
    monkeypatch.setattr(erasure, "_moved", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        erase(decoder, docs[0], 2, baseline)
    assert not any("forward" in layer.__dict__ for layer in decoder.layers)


def test_what_cannot_be_measured_is_refused(decoder: Decoder) -> None:
    good = torch.zeros(6, 64)
    for answer in (0, 3, -1):
        with pytest.raises(UsageError, match=f"an answer of {answer} tokens in a prompt of 3: it must be 1 to 2"):
            erase(decoder, [1, 2, 3], answer, good)
    with pytest.raises(UsageError, match=r"the baseline is \(5, 64\): this model needs \(6, 64\)"):
        erase(decoder, [1, 2, 3], 1, good[:5])
    with pytest.raises(Refused, match="token id 320"):
        erase(decoder, [1, 320], 1, good)
    with pytest.raises(Refused, match="not numbers"):
        erase(decoder, [1, 2, 3], 1, good / 0)
    with pytest.raises(UsageError, match="at least one token"):
        mean_states(decoder, [[1], []])
    total = StateMean(2)
    total.update(0, torch.ones(2, 3))
    with pytest.raises(Refused, match="1 of 3 depths"):
        total.result()
    total.update(1, torch.full((2, 3), torch.inf))
    total.update(2, torch.ones(2, 3))
    with pytest.raises(Refused, match="after layer 0 are not numbers"):
        total.result()
