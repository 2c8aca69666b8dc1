"""A model that really has only the kept layers: right logits, a right cache, and restored as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from layerprune.model import keep
from layerprune.model.cuts import parse_layers
from layerprune.model.decoder import Decoder, forward_logits, is_cut, view_decoder, virtual_cut
from layerprune.model.errors import Refused, UsageError
from layerprune.model.keep import kept_model
from layerprune.model.load import load_model

torch.set_num_threads(1)


# One block a family, at turns; where the cut must be refused, what the reason says.
BLOCKS = [*families.BLOCKS.values()]
OWN_BLOCK = {"RWKV": "6:8", "Kimi-Linear": "0:2", "DiffLlama": "6:8", "Jamba": "5:7", "Qwen3-VL": "2:5", "GLM-5": "2:5"}
NO_STACK = {"LongCat-Flash"}
REFUSED = {
    ("MiniMax", "2:5"): "num_hidden_layers of self_attn",
    ("Zamba2", "2:5"): "another set of modules",
    ("Gemma-3n", "0:2"): "holds something for every layer",
    ("Gemma-4", "0:2"): "holds something for every layer",
    ("RWKV", "2:5"): "rescale_every",
    ("DiffLlama", "2:5"): "lambda_init",
    ("Jamba", "2:5"): "attn_layer_period",
    ("GLM-5", "0:2"): "indexer_types",
    ("Qwen3-VL", "0:2"): "deepstack",
    ("Kimi-Linear", "2:5"): "every layer with attention",
}
NOT_CUT = {name for name, _ in REFUSED} - set(OWN_BLOCK)
CUT = {n: OWN_BLOCK.get(n, BLOCKS[i % 4]) for i, n in enumerate(families.FAMILIES) if n not in NOT_CUT | NO_STACK}

Load = Callable[[str], Decoder]


def known(name: str) -> bool:
    from transformers import CONFIG_MAPPING

    return families.FAMILIES[name].model_type in CONFIG_MAPPING


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    made: dict[str, Path] = {}

    def decoder(name: str) -> Decoder:
        if not known(name):
            pytest.skip(f"this transformers has no {families.FAMILIES[name].model_type}")
        if name not in made:
            made[name] = families.build(name, tmp_path_factory.mktemp("keep") / "source")
        return view_decoder(load_model(made[name], device="cpu", dtype="float32"))

    return decoder


def state(decoder: Decoder) -> list[str]:
    """All that a cut could leave behind: configs, modules by identity, and the plain attributes of every module."""
    model = decoder.model
    held = [json.dumps(model.config.to_dict(), default=str), repr(vars(model.config)), repr(model.generation_config)]
    for name, module in model.named_modules(remove_duplicate=False):
        own = {k: v for k, v in vars(module).items() if k != "rope_deltas"}  # Qwen-VL: what it generated last
        simple = {k: v for k, v in own.items() if isinstance(v, int | float | str | list | tuple | None)}
        held.append(f"{name} {id(module)} {simple} {sorted(own)}")
        held += [f"{name} {json.dumps(v.to_dict(), default=str)}" for v in vars(module).values() if hasattr(v, "to_dict")]
    return held


@torch.no_grad()
def greedy_by_hand(decoder: Decoder) -> list[int]:
    """What families.greedy generates, from whole passes without a cache."""
    ids_BT = families.ids_of(1, families.PROMPT)
    for _ in range(8):
        ids_BT = torch.cat([ids_BT, forward_logits(decoder, ids_BT)[:, -1:].argmax(dim=-1)], dim=1)
    return ids_BT[0, families.PROMPT :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", CUT)
def test_a_kept_model_is_the_cut_one_with_and_without_a_cache(load: Load, name: str) -> None:
    decoder = load(name)
    kept = parse_layers(CUT[name], len(decoder)).kept(len(decoder))
    ids_BT = families.ids_of(2, 14)
    whole = forward_logits(decoder, ids_BT)
    with virtual_cut(decoder, kept):
        expected, tokens = forward_logits(decoder, ids_BT), greedy_by_hand(decoder)
    before = state(decoder)
    with kept_model(decoder, kept) as cut:
        assert [id(layer) for layer in cut.layers] == [id(decoder.layers[i]) for i in kept]
        found = view_decoder(cut.model)
        assert found.layers is cut.layers and found.path == cut.path and not is_cut(cut.model)
        assert torch.equal(forward_logits(cut, ids_BT), expected)
        assert families.greedy(cut.model, True) == tokens
        # and what was generated has left nothing in the model
        assert torch.equal(forward_logits(cut, ids_BT), expected)
    assert decoder.model.get_submodule(decoder.path) is decoder.layers
    assert state(decoder) == before
    assert torch.equal(forward_logits(decoder, ids_BT), whole)


@pytest.mark.parametrize(("name", "block"), REFUSED)
def test_what_a_config_cannot_say_is_refused(load: Load, name: str, block: str) -> None:
    decoder = load(name)
    before = state(decoder)
    with (
        pytest.raises(Refused, match=REFUSED[name, block]),
        kept_model(decoder, parse_layers(block, len(decoder)).kept(len(decoder))),
    ):
        pass
    assert state(decoder) == before


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma-3", "SmolLM3", "Granite-4", "Qwen3-Next", "Cohere2", "LLaVA"])
def test_live_and_written_cut_agree(load: Load, name: str, tmp_path: Path) -> None:
    """Logits, tokens, the text config and every layer's plain attributes are those of the reloaded checkpoint."""
    from layerprune.model.config import text_config
    from layerprune.prune.cut import prune_checkpoint

    decoder = load(name)
    source = Path(decoder.model.config._name_or_path)
    prune_checkpoint(source, tmp_path / "out", layers="2:5", verify=False, say=lambda line: None)
    written = view_decoder(load_model(tmp_path / "out", device="cpu", dtype="float32"))
    ids_BT = families.ids_of(2, 14)
    with kept_model(decoder, (0, 1, 5, 6, 7)) as cut:
        assert torch.equal(forward_logits(cut, ids_BT), forward_logits(written, ids_BT))
        assert families.greedy(cut.model, True) == families.greedy(written.model, True)
        a, b = (text_config(d.model.config).to_dict() for d in (cut, written))
        assert a | {"_name_or_path": ""} == b | {"_name_or_path": ""}
        for live, loaded in zip(cut.layers, written.layers, strict=True):
            pairs = zip(live.modules(), loaded.modules(), strict=True)
            assert all(plain(a) == plain(b) for a, b in pairs)


def plain(module: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None)}


@pytest.fixture
def llama(load: Load) -> Decoder:
    return load("Llama")


@pytest.mark.parametrize("kept", [(), (0, 0, 1), (2, 1), (-1, 0), (0, 8)])
def test_a_bad_selection_is_refused(llama: Decoder, kept: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="not an increasing selection of 0..7"), kept_model(llama, kept):
        pass


def test_all_layers_are_the_model_itself(llama: Decoder) -> None:
    with kept_model(llama, tuple(range(8))) as cut:
        assert cut is llama


def test_single_layers_anywhere_may_go(llama: Decoder) -> None:
    with virtual_cut(llama, (1, 4, 7)):
        tokens = greedy_by_hand(llama)
    with kept_model(llama, (1, 4, 7)) as cut:
        assert families.greedy(cut.model, True) == tokens


@torch.no_grad()
def test_cuts_of_a_kept_model(llama: Decoder) -> None:
    """A virtual cut and a kept model inside a kept model count its layers anew."""
    ids_BT = families.ids_of(2, 14)
    with virtual_cut(llama, (0, 5, 7)):
        expected, tokens = forward_logits(llama, ids_BT), greedy_by_hand(llama)
    before = state(llama)
    with kept_model(llama, (0, 1, 5, 6, 7)) as cut:
        with virtual_cut(cut, (0, 2, 4)):
            assert torch.equal(forward_logits(cut, ids_BT), expected)
        with kept_model(cut, (0, 2, 4)) as smaller:
            assert torch.equal(forward_logits(smaller, ids_BT), expected)
            assert families.greedy(smaller.model, True) == tokens
        assert len(view_decoder(llama.model)) == 5
    assert state(llama) == before


def test_an_exception_inside_restores(llama: Decoder) -> None:
    before = state(llama)
    with pytest.raises(KeyError), kept_model(llama, (0, 1, 7)):
        raise KeyError
    assert state(llama) == before


def test_a_failure_half_way_in_restores(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    before, put, count = state(llama), keep._put, 0

    def failing(attributes: dict[str, Any], name: str, value: Any) -> None:
        nonlocal count
        count += 1
        put(attributes, name, value)
        if count == 3:
            assert state(llama) != before
            raise KeyError

    monkeypatch.setattr(keep, "_put", failing)
    with pytest.raises(KeyError), kept_model(llama, (0, 1, 7)):
        pass
    assert count > 3
    assert state(llama) == before


@pytest.mark.parametrize(
    ("forgotten", "sentence"),
    [("layer_idx", "with a KV cache are not those without|cannot generate with a cache"), ("layers", "not those of the model")],
)
def test_the_proof_sees_what_was_forgotten(llama: Decoder, monkeypatch: pytest.MonkeyPatch, forgotten: str, sentence: str) -> None:
    found = keep._changes
    before = state(llama)
    monkeypatch.setattr(keep, "_changes", lambda *a: [c for c in found(*a) if c[1] != forgotten])
    with pytest.raises(Refused, match=sentence), kept_model(llama, (0, 1, 5, 6, 7)):
        pass
    assert state(llama) == before


def test_a_copy_of_the_config_is_cut_too(llama: Decoder) -> None:
    """A module that holds a config of its own gets the layers cut, and keeps what it has otherwise."""
    held = llama.model.model.config = copy.deepcopy(llama.model.config)
    held.rope_parameters = {"rope_type": "default", "rope_theta": 7.0}
    before = state(llama)
    with kept_model(llama, (0, 1, 5, 6, 7)):
        assert llama.model.model.config is held
        assert (held.num_hidden_layers, held.rope_parameters["rope_theta"]) == (5, 7.0)
    assert state(llama) == before


def test_an_attribute_that_was_changed_is_refused(llama: Decoder) -> None:
    llama.layers[5].self_attn.layer_idx = 50
    with pytest.raises(Refused, match="layers.5.self_attn.layer_idx would have to become 2"), kept_model(llama, (0, 1, 5, 6, 7)):
        pass


@torch.no_grad()
def test_hooks_of_accelerate_stay(llama: Decoder) -> None:
    """Weights that accelerate keeps elsewhere come in through hooks on the modules, which stay the same objects."""
    from accelerate import cpu_offload

    kept, ids_BT = (0, 1, 5, 6, 7), families.ids_of(2, 14)
    with virtual_cut(llama, kept):
        expected, tokens = forward_logits(llama, ids_BT), greedy_by_hand(llama)
    cpu_offload(llama.layers, torch.device("cpu"))
    assert next(llama.layers.parameters()).device.type == "meta"
    with kept_model(llama, kept) as cut:
        assert torch.equal(forward_logits(cut, ids_BT), expected)
        assert families.greedy(cut.model, True) == tokens


@torch.no_grad()
def test_bfloat16_passes_the_proof(load: Load) -> None:
    decoder = load("Qwen3")
    decoder.model.to(torch.bfloat16)
    with kept_model(decoder, (0, 1, 5, 6, 7)) as cut:
        assert len(cut) == 5
