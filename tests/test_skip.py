"""Layer skipping against plain forward hooks, one document at a time, and planted truths."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from layerprune.depth import skip
from layerprune.depth.skip import SkipSum, check_followed, depth_score, future_positions, skip_effects
from layerprune.model.decoder import Decoder, hidden_of, view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model

torch.set_num_threads(1)

EXACT = """GPT-2|GPT-Neo|GPT-NeoX|GPT-J|OPT|OPT (350M)|Falcon|BLOOM|MPT|Llama-4|Mistral|Mixtral|Qwen2|Qwen3-MoE|Qwen3-Next|Gemma-2
Gemma-3|Gemma-3n|Gemma-4|Phi|OLMo-2|StarCoder2|Cohere2|GLM-4|LFM2|Mamba|RecurrentGemma|DeepSeek-V3|GPT-OSS""".replace("\n", "|")


def documents(vocab: int, lengths: tuple[int, ...] = (31, 14, 22, 40)) -> list[list[int]]:
    made = torch.Generator().manual_seed(3)
    return [torch.randint(2, vocab, (n,), generator=made).tolist() for n in lengths]


@pytest.fixture
def decoder(tiny_llama: Path) -> Decoder:
    return view_decoder(load_model(tiny_llama, device="cpu", dtype="float32"))


def known(name: str) -> bool:
    from transformers import CONFIG_MAPPING

    return families.FAMILIES[name].model_type in CONFIG_MAPPING


@pytest.fixture
def built(tmp_path: Path) -> Callable[[str], Decoder]:
    def build(name: str) -> Decoder:
        if not known(name):
            pytest.skip("this transformers does not have it")
        return view_decoder(load_model(families.build(name, tmp_path / "source"), device="cpu", dtype="float32"))

    return build


def hooked(decoder: Decoder, ids: list[int], skipped: int | None, where_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own pass with one layer skipped where the mask says, by hooks: contributions (L, T, F), distributions (T, V)."""
    inputs: dict[int, torch.Tensor] = {}
    added: dict[int, torch.Tensor] = {}

    def before(layer: int, args: Any, kwargs: Any) -> None:
        inputs[layer] = args[0] if args else kwargs["hidden_states"]

    def after(layer: int, output: Any) -> Any:
        x = hidden_of(output)
        if layer == skipped:
            x = torch.where(where_T[:, None], inputs[layer], x)
            output = (x, *output[1:]) if isinstance(output, tuple) else x
        one = (x - inputs[layer]).double()
        added[layer] = (one.permute(1, 2, 0, 3).flatten(2) if one.dim() == 4 else one)[0]
        return output

    hooks = []
    for i, layer in enumerate(decoder.layers):
        hooks.append(layer.register_forward_pre_hook(lambda m, a, k, i=i: before(i, a, k), with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda m, a, o, i=i: after(i, o)))
    with torch.no_grad():
        logits = decoder.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    for hook in hooks:
        hook.remove()
    return torch.stack([added[i] for i in range(len(decoder))]), logits.softmax(dim=-1)


Brute = dict[str, tuple[torch.Tensor, torch.Tensor]]


def brute_force(decoder: Decoder, docs: list[list[int]], future: bool) -> Brute:
    """Maps and vectors by aggregate, every effect at every token in one list."""
    layers = len(decoder)
    effects: list[list[list[float]]] = [[[] for _ in range(layers)] for _ in range(layers)]
    outputs: list[list[float]] = [[] for _ in range(layers)]
    for ids in docs:
        at_T = torch.arange(len(ids))
        plain, p = hooked(decoder, ids, None, at_T < 0)
        for t in future_positions(ids) if future else [None]:
            where_T, first = (at_T > 0, 0) if t is None else ((at_T > 0) & (at_T < t), t)
            for s in range(layers):
                added, q = hooked(decoder, ids, s, where_T)
                outputs[s] += (p - q).norm(dim=-1)[first:].tolist()
                for later in range(s + 1, layers):
                    size = plain[later].norm(dim=-1).clamp(min=1e-6)
                    effects[s][later] += ((plain[later] - added[later]).norm(dim=-1) / size)[first:].tolist()
    made: Brute = {}
    for name, take in (("mean", lambda values: sum(values) / len(values)), ("max", max)):
        rows = [[take(values) if values else math.nan for values in row] for row in effects]
        made[name] = torch.tensor(rows).double(), torch.tensor([take(values) for values in outputs]).double()
    return made


def compare(total: SkipSum, expected: Brute) -> None:
    layers = total.layers
    upper = torch.ones(layers, layers, dtype=torch.bool).triu(1)
    for name, (effect_SL, output_S) in expected.items():
        found = total.result(name)
        assert found.contribution_SL[~upper].isnan().all() and effect_SL[upper].max() > 0.01
        # the mean to 1e-5; one token's division by a small contribution magnifies rounding
        limit = 1e-5 if name == "mean" else 1e-4
        assert ((found.contribution_SL - effect_SL)[upper].abs() / effect_SL[upper].clamp(min=1)).max() < limit
        assert (found.output_S - output_S).abs().max() < min(1e-5, 1e-2 * output_S.max())


@pytest.mark.parametrize("future", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 60, 4096])
def test_a_llama_is_as_by_hooks(decoder: Decoder, future: bool, max_tokens: int) -> None:
    """Whatever the batches and their padding."""
    docs = documents(320)
    total = skip_effects(decoder, docs, variant="future" if future else "all", max_tokens=max_tokens)
    compare(total, brute_force(decoder, docs, future))
    found = total.result()
    positions = sum(len(future_positions(ids)) for ids in docs) if future else 4
    assert (found.documents, found.positions) == (4, positions)
    measured = sum(len(ids) - t for ids in docs for t in (future_positions(ids) if future else [0]))
    assert found.tokens == measured


@pytest.mark.parametrize("name", EXACT.split("|"))
def test_families(name: str, built: Callable[[str], Decoder]) -> None:
    """`future` on every family: it needs masks of every row, and the measured tokens of a padded batch."""
    decoder = built(name)
    docs = documents(160, (14, 21, 11, 30))
    total = skip_effects(decoder, docs, variant="future")
    assert total.documents == 3  # 11 tokens are too few
    compare(total, brute_force(decoder, docs, True))


@pytest.mark.parametrize("name", ["GPT-J", "Gemma-3n", "Gemma-4", "Mamba"])
def test_all_tokens_of_families(name: str, built: Callable[[str], Decoder]) -> None:
    decoder = built(name)
    docs = documents(160, (2, 9, 5))
    compare(skip_effects(decoder, docs), brute_force(decoder, docs, False))


@pytest.mark.parametrize("name", ["RWKV", "GLM-5", "LongCat-Flash"])
def test_a_family_that_hands_on_more_is_refused(name: str, built: Callable[[str], Decoder]) -> None:
    with pytest.raises(Refused, match="does more between its layers|no stack"):
        skip_effects(built(name), documents(160))


@pytest.mark.parametrize("variant", ["all", "future"])
def test_skipping_an_identity_has_no_effect_to_the_bit(own_llama: Path, variant: str) -> None:
    live = load_model(own_llama, device="cpu", dtype="float32")
    with torch.no_grad():
        live.model.layers[2].self_attn.o_proj.weight.zero_()
        live.model.layers[2].mlp.down_proj.weight.zero_()
    found = skip_effects(view_decoder(live), documents(320), variant=variant).result("max")
    assert (found.contribution_SL[2, 3:] == 0).all() and found.output_S[2] == 0
    # nor can a skip of others be seen in its contribution, which is nothing before and after
    assert (found.contribution_SL[:2, 2] == 0).all()
    if variant == "future":
        assert found.output_S[4] == 0  # earlier tokens are not looked at after the last layer
    rest = [0, 1, 3, 4] if variant == "all" else [0, 1, 3]
    assert (found.output_S[rest] > 1e-3).all() and (found.contribution_SL[0, [1, 3, 4]] > 1e-3).all()


def test_the_first_token_is_never_skipped(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it could not be affected at all; and a skip of it would be felt by the others."""
    masks: list[torch.Tensor] = []
    original = skip._skipped
    monkeypatch.setattr(skip, "_skipped", lambda b, x, y, mask: (masks.append(mask.clone()), original(b, x, y, mask))[1])
    docs = documents(320, (20, 13))
    for variant in ("all", "future"):
        skip_effects(decoder, docs, variant=variant)
    assert masks and not any(mask[:, 0].any() for mask in masks) and all(mask[:, 1:8].any() for mask in masks)
    plain, p = hooked(decoder, docs[0], None, torch.zeros(20, dtype=torch.bool))
    added, q = hooked(decoder, docs[0], 1, torch.arange(20) > 0)
    assert torch.equal(plain[:, 0], added[:, 0]) and torch.equal(p[0], q[0])


@pytest.mark.parametrize("variant", ["all", "future"])
def test_halves_merged_are_the_whole(decoder: Decoder, variant: str) -> None:
    docs = documents(320)
    whole = skip_effects(decoder, docs, variant=variant)
    first, second = skip_effects(decoder, docs[:1], variant=variant), skip_effects(decoder, docs[1:], variant=variant)
    second.merge(first)
    for name in ("mean", "max"):
        a, b = whole.result(name), second.result(name)
        assert torch.allclose(a.contribution_SL, b.contribution_SL, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert torch.allclose(a.output_S, b.output_S, rtol=1e-5, atol=1e-7)
        assert math.isclose(a.score, b.score, rel_tol=1e-5)
        assert (a.documents, a.positions, a.tokens, a.naive) == (b.documents, b.positions, b.tokens, b.naive)


def test_half_of_the_layers_are_run(decoder: Decoder) -> None:
    """Counted at the layers themselves: the rows that each of them saw."""
    rows: list[int] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda m, a, k: rows.append(k["hidden_states"].shape[0]), with_kwargs=True)
        for layer in decoder.layers
    ]
    docs = documents(320)
    counts = {}
    check_followed(decoder)
    check = sum(rows)
    for variant in ("all", "future"):
        rows.clear()
        counts[variant] = found = skip_effects(decoder, docs, variant=variant, max_tokens=60).result()
        # tuple_length runs the first layer on one row for each batch
        assert 1 <= sum(rows) - check - found.applications <= 4
        assert found.applications < 0.65 * found.naive
    assert counts["all"].applications == 4 * (5 + 4 + 3 + 2 + 1) and counts["all"].naive == 4 * (5 + 5 * 5)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("variant", ["all", "future"])
def test_a_batch_that_does_not_fit_is_halved(decoder: Decoder, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents(320)
    whole = skip_effects(decoder, docs, variant=variant).result()
    original = skip._batch_effects

    def small(decoder: Decoder, tokens: Any, *args: Any) -> SkipSum:
        if len(tokens.ids_BT) > 2:
            raise torch.cuda.OutOfMemoryError
        return original(decoder, tokens, *args)

    monkeypatch.setattr(skip, "_batch_effects", small)
    halved = skip_effects(decoder, docs, variant=variant).result()
    assert torch.allclose(halved.contribution_SL, whole.contribution_SL, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (halved.documents, halved.tokens) == (whole.documents, whole.tokens)


def test_small_slices_of_the_head_change_nothing(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents(320)
    whole = skip_effects(decoder, docs).result()
    monkeypatch.setattr(skip, "LOGIT_BYTES", 4 * 320 * 7)
    assert torch.allclose(skip_effects(decoder, docs).result().output_S, whole.output_S, atol=1e-6)


def test_positions_belong_to_a_document() -> None:
    ids = documents(320, (200,))[0]
    assert future_positions(ids[:12]) == [] and future_positions(ids[:13]) == [8]
    chosen = future_positions(ids)
    assert len(set(chosen)) == 4 and set(chosen) <= set(range(8, 196, 8)) and chosen == future_positions(ids)
    others = [*(future_positions(ids, seed) for seed in (1, 2)), future_positions([7, *ids[1:]])]
    assert all(other != chosen for other in others)


def test_depth_score() -> None:
    assert depth_score(torch.tensor([0.0, 0.0, 2.0, 0.0])) == 2
    assert depth_score(torch.ones(5)) == 2 and depth_score(torch.tensor([3.0, 1.0])) == 0.25
    assert math.isnan(depth_score(torch.zeros(3)))


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_restored(decoder: Decoder, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken:
        monkeypatch.setattr(skip, "distributions", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            skip_effects(decoder, documents(320))
    else:
        skip_effects(decoder, documents(320))
    assert not any("forward" in layer.__dict__ for layer in decoder.layers)


def test_what_cannot_be_measured_is_refused(decoder: Decoder, own_llama: Path) -> None:
    with pytest.raises(UsageError, match="'local' is none of all, future"):
        skip_effects(decoder, documents(320), variant="local")
    with pytest.raises(Refused, match="all 2 documents are shorter than 13 tokens"):
        skip_effects(decoder, documents(320, (12, 5)), variant="future")
    with pytest.raises(Refused, match="token id 320"):
        skip_effects(decoder, [[1, 320]])
    with pytest.raises(UsageError, match="'sum' is none of mean, max"):
        SkipSum(3).result("sum")
    live = load_model(own_llama, device="cpu", dtype="float32")
    with torch.no_grad():
        live.model.embed_tokens.weight[50] = torch.nan  # a token that the check of the model does not see
    with pytest.raises(Refused, match="not numbers"):
        skip_effects(view_decoder(live), [[1, 50, 3], [4, 5]])
