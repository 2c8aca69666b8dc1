"""The deciding pass that fills the KV cache: the same paths and tokens as deciding first and generating afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from layerprune.model.decoder import Decoder, view_decoder
from layerprune.model.errors import Refused
from layerprune.model.keep import OtherStack
from layerprune.model.load import load_model
from layerprune.route import prefill as prefill_module
from layerprune.route.paths import Counts, executed
from layerprune.route.prefill import Prefill
from layerprune.route.routed import RoutedModel
from layerprune.route.router import Routers

torch.set_num_threads(1)

FILLED = ["Llama", "GPT-2", "OPT", "Falcon", "BLOOM", "Mixtral", "Gemma-3", "GPT-OSS", "DeepSeek-V3"]
LINEAR = ["Qwen3-Next", "Mamba"]
NEW = 6
EXACTLY = {"min_new_tokens": NEW, "eos_token_id": None}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import CONFIG_MAPPING

    made: dict[str, Path] = {}

    def decoder(name: str) -> Decoder:
        if families.FAMILIES[name].model_type not in CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {families.FAMILIES[name].model_type}")
        if name not in made:
            made[name] = families.build(name, tmp_path_factory.mktemp("prefill") / "model")
        return view_decoder(load_model(made[name], device="cpu", dtype="float32"))

    return decoder


def leaning(decoder: Decoder, seed: int = 1) -> Routers:
    """Routers that send prompts different ways."""
    routers = Routers(len(decoder), decoder.model.get_input_embeddings().weight.shape[1], seed)
    with torch.no_grad():
        routers.down_LCH.mul_(6.0)
    return routers


def planted(decoder: Decoder, counts: Counts) -> Routers:
    routers = leaning(decoder)
    with torch.no_grad():
        for layer, count in enumerate(counts):
            routers.down_bias_LC[layer, count] = 1e4
    return routers


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    return [
        torch.randint(2, 150, (n,), generator=torch.Generator().manual_seed(n + 100 * i)).tolist() for i, n in enumerate(lengths)
    ]


def without_filling(decoder: Decoder, routers: Routers, prompts: Sequence[Sequence[int]]) -> list[Any]:
    routed = RoutedModel(decoder, routers)
    routed._looked = True  # nothing to look for: two passes over each prompt
    return [routed.generate([prompt], NEW, **EXACTLY)[0] for prompt in prompts]


@pytest.mark.parametrize("name", FILLED)
def test_one_pass_decides_as_two_do(load: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load(name)
    routers, prompts = leaning(decoder), prompts_of([5, 9, 9, 3, 12, 9])
    expected = without_filling(decoder, routers, prompts)
    assert len({one.counts for one in expected}) > 1
    forward = decoder.model.__dict__.get("forward")
    routed = RoutedModel(decoder, routers)
    monkeypatch.setattr(routed, "decide", None)
    assert not routed.one_pass
    assert routed.generate(prompts, NEW, **EXACTLY) == expected and routed.one_pass  # padded on the left, each row its own way
    assert [routed.generate([prompt], NEW, **EXACTLY)[0] for prompt in prompts] == expected
    assert decoder.model.__dict__.get("forward") is forward and len(view_decoder(decoder.model)) == 8


def test_each_prompt_is_passed_over_once(load: Any) -> None:
    decoder = load("Llama")
    counts = (1, 0, 1, 2, 1, 1, 0, 1)
    routed = RoutedModel(decoder, planted(decoder, counts))
    (prompt,) = prompts_of([7])
    routed.generate([prompt], 2)  # what is proven once is proven
    seen: list[tuple[int, int]] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda m, a, o, at=at: seen.append((at, a[0].shape[1])))
        for at, layer in enumerate(decoder.layers)
    ]
    with routed._prefill._double.entered() as double:  # the second runs of layers are shells of their own
        hooks += [
            layer.mlp.register_forward_hook(lambda m, a, o, at=at: seen.append((at, a[0].shape[1])))
            for at, layer in enumerate(list(double.layers)[1::2])
        ]
    made = routed.generate([prompt], 2, min_new_tokens=2, eos_token_id=None)
    for hook in hooks:
        hook.remove()
    assert made[0].counts == counts
    assert [at for at, tokens in seen if tokens == 7] == list(executed(counts))


def test_a_row_that_skips_everything_still_runs(load: Any) -> None:
    decoder = load("Llama")
    routers = planted(decoder, (0,) * 8)
    routers.down_bias_LC.data[5, 1] = 9e3
    prompts = prompts_of([4, 6])
    made = RoutedModel(decoder, routers).generate(prompts, NEW, **EXACTLY)
    assert made == without_filling(decoder, routers, prompts) and made[0].counts.count(1) == 1


@pytest.mark.parametrize("name", LINEAR)
def test_other_caches_are_left_to_generate(load: Any, name: str) -> None:
    decoder = load(name)
    with pytest.raises(Refused, match="not made of keys and values alone"):
        Prefill(decoder, lambda counts: OtherStack(decoder, executed(counts)))


def test_a_cache_that_is_wrong_is_not_used(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load("Llama")
    part = prefill_module.Filled.part

    def wrong(filled: Any, rows: Sequence[int], counts: Counts) -> Any:
        output, slots = part(filled, rows, counts)
        return output, [slots[0], *slots[:-1]]

    monkeypatch.setattr(prefill_module.Filled, "part", wrong)
    with pytest.raises(Refused, match="does not go on as the path's own"):
        Prefill(decoder, lambda counts: OtherStack(decoder, executed(counts)))
    routers, prompts = leaning(decoder), prompts_of([5, 9])
    routed = RoutedModel(decoder, routers)
    assert routed.generate(prompts, NEW, **EXACTLY) == without_filling(decoder, routers, prompts) and not routed.one_pass


def test_a_config_with_another_cache_is_generated_from_in_two_passes(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load("Llama")
    routers, prompts = leaning(decoder), prompts_of([5, 9])
    expected = without_filling(decoder, routers, prompts)
    routed = RoutedModel(decoder, routers)
    monkeypatch.setattr(decoder.model.generation_config, "cache_implementation", "static")
    assert routed.generate(prompts, NEW, **EXACTLY) == expected and not routed._looked


@pytest.mark.parametrize("other", [{"cache_implementation": "static"}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generation_of_another_kind_runs_its_own_first_pass(load: Any, other: dict[str, Any]) -> None:
    """As lm-eval may ask for it: the work given decides how it generates."""
    decoder = load("Llama")
    routed = RoutedModel(decoder, leaning(decoder))
    ids_BT = torch.tensor(prompts_of([7, 7]))

    def work(path: Decoder, rows: Sequence[int]) -> list[list[int]]:
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **EXACTLY, **other}
        mask_BT = torch.ones_like(ids_BT[rows])
        made_BT = path.model.generate(ids_BT[rows], attention_mask=mask_BT, **settings)
        return made_BT[:: len(made_BT) // len(rows), 7:].tolist()

    found = routed.by_path(ids_BT, torch.ones_like(ids_BT), work)
    for row, (tokens, counts) in enumerate(found):
        with torch.no_grad(), routed.stack(counts).entered() as path:
            assert tokens == work(path, [row])[0]
