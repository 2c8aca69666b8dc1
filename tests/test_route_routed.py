"""Routed generation with the cache against passes without one, token for token, for many families."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from layerprune.model.decoder import Decoder, forward_logits, view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.keep import OtherStack
from layerprune.model.layerwise import Layerwise
from layerprune.model.load import load_model
from layerprune.route import routed as routed_module
from layerprune.route.execute import run_path
from layerprune.route.features import Labelled, pooled_states
from layerprune.route.paths import Counts, executed, path_length
from layerprune.route.routed import RoutedModel
from layerprune.route.router import Routers

torch.set_num_threads(1)

STACKED = [
    "Llama", "GPT-2", "GPT-NeoX", "GPT-J", "OPT", "Falcon", "BLOOM", "Mistral", "Mixtral", "Qwen3", "Qwen3-MoE", "Qwen3-Next",
    "Gemma-2", "Gemma-3", "Phi", "OLMo-2", "Cohere2", "Granite-4", "Mamba", "DeepSeek-V3", "GPT-OSS", "LFM2", "LLaVA",
]  # fmt: skip
ROUTED = [
    "Llama", "GPT-2", "GPT-NeoX", "OPT", "Falcon", "BLOOM", "Mistral", "Mixtral", "Qwen3", "Gemma-2", "Gemma-3", "Phi", "OLMo-2",
    "Cohere2", "GPT-OSS",
]  # fmt: skip
REFUSED = {
    "RWKV": "another set of modules", "DiffLlama": "lambda_init", "Gemma-3n": "uses what layer 3 computes",
    "Qwen3-VL": "deepstack",
}  # fmt: skip
PATH = (2, 1, 1, 0, 0, 2, 1, 1)
NEW = 8

Load = Callable[[str], Decoder]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    from transformers import CONFIG_MAPPING

    made: dict[str, Path] = {}

    def decoder(name: str) -> Decoder:
        if families.FAMILIES[name].model_type not in CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {families.FAMILIES[name].model_type}")
        if name not in made:
            made[name] = families.build(name, tmp_path_factory.mktemp("routed") / "model")
        return view_decoder(load_model(made[name], device="cpu", dtype="float32"))

    return decoder


def state(decoder: Decoder) -> list[str]:
    """All that a stack could leave behind: configs, modules by identity, plain attributes."""
    held = [json.dumps(decoder.model.config.to_dict(), default=str), repr(decoder.model.generation_config)]
    for name, module in decoder.model.named_modules(remove_duplicate=False):
        simple = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | list | tuple | None)}
        held.append(f"{name} {id(module)} {sorted(simple.items())} {sorted(vars(module))}")
    return held


@torch.no_grad()
def greedy_without_cache(decoder: Decoder, counts: Counts, prompt: Sequence[int]) -> list[int]:
    layerwise, ids = Layerwise(decoder), list(prompt)
    for _ in range(NEW):
        batch = layerwise.begin(torch.tensor([ids]))
        end = run_path(layerwise, batch, batch.start(), counts)
        ids.append(int(batch.logits(end, torch.tensor([0]), torch.tensor([len(ids) - 1])).argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("name", STACKED)
def test_a_stack_with_repeated_and_skipped_layers(load: Load, name: str) -> None:
    decoder = load(name)
    layerwise, ids_BT = Layerwise(decoder), families.ids_of(2, 14)
    batch = layerwise.begin(ids_BT)
    row_N, position_N = torch.arange(2).repeat_interleave(14), torch.arange(14).repeat(2)
    expected = batch.logits(run_path(layerwise, batch, batch.start(), PATH), row_N, position_N).view(2, 14, -1)
    tokens = greedy_without_cache(decoder, PATH, families.ids_of(1, families.PROMPT)[0].tolist())
    before, whole = state(decoder), forward_logits(decoder, ids_BT)
    stack = OtherStack(decoder, executed(PATH))
    assert state(decoder) == before
    for _ in range(2):  # the second time nothing is proven any more
        with stack.entered() as other:
            assert len(view_decoder(other.model)) == path_length(PATH) == 8
            assert torch.equal(forward_logits(other, ids_BT), expected)
            assert families.greedy(other.model, True) == tokens
        assert state(decoder) == before
    assert torch.equal(forward_logits(decoder, ids_BT), whole)


def test_a_repeated_layer_shares_its_weights_and_has_a_slot_of_its_own(load: Load) -> None:
    decoder = load("Llama")
    with OtherStack(decoder, (0, 1, 1, 7)).entered() as other:
        first, second = other.layers[1], other.layers[2]
        assert first is decoder.layers[1] and second is not first
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        assert all(a is b for a, b in pairs)
        assert [layer.self_attn.layer_idx for layer in other.layers] == [0, 1, 2, 3]
        ids_BT = families.ids_of(1, 5)
        with torch.no_grad():
            cache = other.model(ids_BT, use_cache=True).past_key_values
        assert len(cache) == 4 and all(cache.get_seq_length(layer) == 5 for layer in range(4))
        a, b = cache.layers[1].keys, cache.layers[2].keys
        assert not torch.allclose(a, b)
    assert decoder.layers[1].self_attn.layer_idx == 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_config_cannot_say_is_refused(load: Load, name: str) -> None:
    decoder = load(name)
    before = state(decoder)
    with pytest.raises(Refused, match=REFUSED[name]), OtherStack(decoder, executed(PATH)).entered():
        pass
    assert state(decoder) == before


@pytest.mark.parametrize("order", [(), (1, 0), (0, 8), (-1, 0)])
def test_what_is_no_order_is_refused(load: Load, order: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"are no order of 0\.\.7"):
        OtherStack(load("Llama"), order)


def test_layers_under_hooks_are_not_repeated(load: Load) -> None:
    from accelerate import cpu_offload

    decoder = load("Llama")
    cpu_offload(decoder.layers, torch.device("cpu"))
    with pytest.raises(Refused, match="brought in by hooks"):
        OtherStack(decoder, (0, 0, 1))


def routers_for(decoder: Decoder, seed: int = 1) -> Routers:
    """Random routers that lean to no class, so that prompts take different ways."""
    width = Layerwise(decoder).begin(torch.tensor([[3]])).start().hidden.shape[-1]
    routers = Routers(len(decoder), width, seed)
    with torch.no_grad():
        routers.down_LCH.mul_(6.0)
    return routers


@torch.no_grad()
def decided_by_hand(decoder: Decoder, routers: Routers, prompt: Sequence[int]) -> Counts:
    """One row, one layer after the other: the label of a layer is found with the states along the labels before it."""
    layers = len(decoder)
    chosen: list[int] = []
    real_BW = torch.arange(8)[None] < len(prompt)
    for layer in range(layers):
        along = Labelled(tuple(prompt), (*chosen, *[1] * (layers - layer)))
        pooled_LWD = pooled_states(Layerwise(decoder), along)
        chosen.append(int(routers.one_layer(layer, pooled_LWD[layer][None], real_BW).argmax()))
    return tuple(chosen)


def some_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(2, 150), k=rng.randint(3, 14)) for _ in range(count)]


@pytest.mark.parametrize("name", ROUTED)
def test_each_row_goes_its_own_way(load: Load, name: str) -> None:
    decoder = load(name)
    routers, prompts = routers_for(decoder), some_prompts(5)
    prompts.append(prompts[2])
    before = state(decoder)
    routed = RoutedModel(decoder, routers)
    found = routed.generate(prompts, NEW, min_new_tokens=NEW, eos_token_id=None)
    assert state(decoder) == before
    assert len({made.counts for made in found}) >= 2 and found[5] == found[2]
    for made, prompt in zip(found, prompts, strict=True):
        assert made.counts == decided_by_hand(decoder, routers, prompt)
        assert list(made.tokens) == greedy_without_cache(decoder, made.counts, prompt)


def test_rows_of_one_path_are_generated_together_and_stacks_are_kept(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows on one path, of different lengths: padded on the left, with the tokens that each has alone."""
    decoder = load("Llama")
    prompts = some_prompts(6)
    calls: list[int] = []
    plain = routed_module._continue
    monkeypatch.setattr(routed_module, "_continue", lambda d, p, *a: [calls.append(len(p)), plain(d, p, *a)][1])
    made: list[Any] = []
    stack = routed_module.OtherStack
    monkeypatch.setattr(routed_module, "OtherStack", lambda *a: [made.append(a[1]), stack(*a)][1])
    routed = RoutedModel(decoder, routers_for(decoder))
    monkeypatch.setattr(routed, "_filled", lambda *a: None)  # with it: test_route_prefill.py
    monkeypatch.setattr(routed, "decide", lambda p: [PATH if len(p) > 1 else (1,) * 8] * len(p))
    found = routed.generate(prompts, NEW, min_new_tokens=NEW, eos_token_id=None)
    assert calls == [6]
    for one, prompt in zip(found, prompts, strict=True):
        assert list(one.tokens) == greedy_without_cache(decoder, PATH, prompt)
    routed.generate(prompts, 2)
    assert made == [executed(PATH)]
    monkeypatch.setattr(routed_module, "_MOST_STACKS", 1)
    routed.generate(prompts[:1], 2)
    routed.generate(prompts, 2)
    assert made == [executed(PATH), tuple(range(8)), executed(PATH)]


def test_tokens_after_the_end_of_a_text_are_left_out(load: Load) -> None:
    decoder = load("Llama")
    routed = RoutedModel(decoder, routers_for(decoder), "execute")
    prompts = some_prompts(4)
    free = routed.generate(prompts, NEW, min_new_tokens=NEW, eos_token_id=None)
    end = free[0].tokens[2]
    for one, ended in zip(free, routed.generate(prompts, NEW, eos_token_id=end), strict=True):
        place = one.tokens.index(end) + 1 if end in one.tokens else NEW
        assert ended.tokens == one.tokens[:place]


def test_the_dial_at_execute_is_the_model_itself_and_asks_no_router(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load("Llama")
    routed = RoutedModel(decoder, routers_for(decoder), "execute")
    monkeypatch.setattr(routed, "_decide_batch", None)
    prompts = some_prompts(3)
    for one, prompt in zip(routed.generate(prompts, NEW, min_new_tokens=NEW, eos_token_id=None), prompts, strict=True):
        assert one.counts == (1,) * 8
        assert list(one.tokens) == greedy_without_cache(decoder, (1,) * 8, prompt)
    assert RoutedModel(decoder, routers_for(decoder), 1.0).decide(prompts) == [(2,) * 8] * 3


def test_the_dial_turns_what_the_routers_say(load: Load) -> None:
    decoder = load("Llama")
    routers, prompts = routers_for(decoder), some_prompts(8)
    own = RoutedModel(decoder, routers).decide(prompts)
    towards = RoutedModel(decoder, routers, 0.2).decide(prompts)
    assert own == RoutedModel(decoder, routers, -0.5).decide(prompts)
    assert sum(counts.count(1) for counts in own) < sum(counts.count(1) for counts in towards)
    # always skip would leave nothing: one layer runs after all
    assert all(path_length(counts) == 1 for counts in RoutedModel(decoder, routers, -1).decide(prompts))
    assert all(0 in counts for counts in RoutedModel(decoder, routers, -0.9).decide(prompts))


def test_half_precision_is_proven_and_routed(load: Load) -> None:
    decoder = load("Qwen3")
    routers = routers_for(decoder)
    decoder.model.to(torch.bfloat16)
    with OtherStack(decoder, executed(PATH)).entered() as other:
        assert len(other) == 8
    prompts = some_prompts(3)
    made = RoutedModel(decoder, routers).generate(prompts, 3, min_new_tokens=3, eos_token_id=None)
    assert [one.counts for one in made] == [decided_by_hand(decoder, routers, prompt) for prompt in prompts]


@torch.no_grad()
def test_layers_that_share_keys_are_decided_row_by_row(load: Load) -> None:
    """Gemma-3n: rows cannot take different ways through layers that hand each other keys and values."""
    decoder = load("Gemma-3n")
    prompts = some_prompts(3)
    width = pooled_states(Layerwise(decoder), Labelled((3, 4), (1,) * 8)).shape[-1]
    routers = Routers(8, width, seed=1)
    routers.down_bias_LC[3:5, 1] = 100.0  # the layers whose keys are read later
    found = RoutedModel(decoder, routers).decide(prompts)
    assert found == [decided_by_hand(decoder, routers, prompt) for prompt in prompts]
    routers.down_bias_LC[3, 0] = 200.0
    with pytest.raises(Refused, match="does not run along the path"):
        RoutedModel(decoder, routers).decide(prompts)


def test_what_does_not_fit_is_refused(load: Load) -> None:
    decoder = load("Llama")
    with pytest.raises(UsageError, match="routers of 5 layers do not fit a model of 8"):
        RoutedModel(decoder, Routers(5, 32))
    with pytest.raises(UsageError, match="a state of 32 features was given to routers of 16"):
        RoutedModel(decoder, Routers(8, 16)).decide([[3]])
    with pytest.raises(UsageError, match="the dial 2 is none"):
        RoutedModel(decoder, Routers(8, 32), 2)
    with pytest.raises(UsageError, match="without a token"):
        RoutedModel(decoder, Routers(8, 32)).decide([[3], []])
