"""A routed model behind lm-eval: every answer against the path run layer by layer, for many families."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from layerprune.eval.harness import LiveModel
from layerprune.model.decoder import Decoder, view_decoder
from layerprune.model.layerwise import Layerwise
from layerprune.model.load import load_model
from layerprune.route.paths import Counts
from layerprune.route.routed import RoutedModel
from layerprune.route.router import Routers
from layerprune.route_lm import RoutedLM

torch.set_num_threads(1)

SCORED = ["Llama", "GPT-2", "OPT", "BLOOM", "Gemma-3", "Mixtral", "Qwen3-Next", "Qwen3-VL"]
GENERATING = ["Llama", "OPT", "BLOOM", "Gemma-3", "Qwen3-Next"]
CONTEXTS = ["w9 w33 w27", "w14", "w50 w51 w52 w53 w54 w55 w56 w57 w58 w59", "w61 w9 w70 w71 w72", "w90 w2 w2 w13 w77 w21 w3"]
CONTINUATIONS = [" w5", " w80 w6", " w30 w31 w32"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import CONFIG_MAPPING

    made: dict[str, Path] = {}

    def decoder(name: str) -> Decoder:
        if families.FAMILIES[name].model_type not in CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {families.FAMILIES[name].model_type}")
        if name not in made:
            made[name] = families.build(name, tmp_path_factory.mktemp("lm") / "model")
        return view_decoder(load_model(made[name], device="cpu", dtype="float32"))

    return decoder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a word, as many as the families have, and `<s>` before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *(f"w{i}" for i in range(2, families.COMMON["vocab_size"]))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def leaning(decoder: Decoder, seed: int = 1) -> Routers:
    """Routers that send prompts different ways."""
    width = Layerwise(decoder).begin(torch.tensor([[3]])).start().hidden.shape[-1]
    routers = Routers(len(decoder), width, seed)
    with torch.no_grad():
        routers.down_LCH.mul_(6.0)
    return routers


def ask(texts: Sequence[tuple[Any, ...]], kind: str = "loglikelihood") -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=text, idx=i) for i, text in enumerate(texts)]


@torch.no_grad()
def logits_along(decoder: Decoder, counts: Counts, ids: Sequence[int]) -> torch.Tensor:
    batch = Layerwise(decoder).begin(torch.tensor([ids]))
    state = batch.start()
    for layer, count in enumerate(counts):
        for _ in range(count):
            state = batch.step(layer, state)
    return batch.logits(state, torch.zeros(len(ids), dtype=torch.long), torch.arange(len(ids)))


def by_hand(decoder: Decoder, counts: Counts, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    logp_TV = logits_along(decoder, counts, [*context, *continuation][:-1]).log_softmax(dim=-1)[-len(continuation) :]
    target_T = torch.tensor(continuation)
    return float(logp_TV.gather(1, target_T[:, None]).sum()), bool((logp_TV.argmax(dim=-1) == target_T).all())


@pytest.mark.parametrize("name", SCORED)
def test_each_request_goes_its_own_way(load: Any, tokenizer: Any, name: str) -> None:
    decoder = load(name)
    routed = RoutedModel(decoder, leaning(decoder))
    lm = RoutedLM(routed, tokenizer)
    asked = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    found = lm.loglikelihood(ask([*asked, ("", " w5 w6")]))
    paths = {context: routed.decide([tokenizer(context)["input_ids"]])[0] for context in CONTEXTS}
    assert len(set(paths.values())) >= 2 and lm.taken == paths
    for (context, continuation), (value, greedy) in zip(asked, found, strict=False):
        ids = tokenizer(context)["input_ids"], tokenizer(continuation, add_special_tokens=False)["input_ids"]
        expected = by_hand(decoder, paths[context], *ids)
        assert value == pytest.approx(expected[0], abs=1e-3) and greedy == expected[1]
        if paths[context] != lm.whole:
            assert value != pytest.approx(by_hand(decoder, lm.whole, *ids)[0], abs=1e-3)
    assert found[-1] == pytest.approx(LiveModel(decoder.model, tokenizer).loglikelihood(ask([("", " w5 w6")]))[0])
    assert lm.seconds > 0


def test_equal_shapes_are_equal_to_the_bit(load: Any, tokenizer: Any) -> None:
    """One request, alone: the tensors have the shapes of the layer-by-layer pass."""
    decoder = load("Llama")
    routed = RoutedModel(decoder, leaning(decoder))
    lm = RoutedLM(routed, tokenizer)
    context = CONTEXTS[2]
    ids = tokenizer(context)["input_ids"]
    (counts,) = routed.decide([ids])
    assert counts != lm.whole
    ((value, _),) = lm.loglikelihood(ask([(context, " w7")]))
    logits_TV = logits_along(decoder, counts, ids)
    # the head reads one position there, and here: the same last state
    lm._along = counts
    assert torch.equal(lm._logits(torch.tensor([ids]), len(ids))[0], logits_TV)
    assert value == pytest.approx(float(logits_TV.log_softmax(-1)[-1, 7]), abs=1e-5)


def test_without_a_context_the_whole_model_answers(load: Any, tokenizer: Any) -> None:
    decoder = load("Llama")
    lm, live = RoutedLM(RoutedModel(decoder, leaning(decoder)), tokenizer), LiveModel(decoder.model, tokenizer)
    texts = [("w4 w8 w15 w16 w23 w42",), ("w4 w9",)]
    assert lm.loglikelihood_rolling(ask(texts)) == pytest.approx(live.loglikelihood_rolling(ask(texts)))
    assert lm.taken == {}


def test_a_context_that_is_too_long_decides_with_its_end(load: Any, tokenizer: Any) -> None:
    decoder = load("Llama")
    routed = RoutedModel(decoder, leaning(decoder))
    lm = RoutedLM(routed, tokenizer)
    text = " ".join(f"w{2 + 7 * i % 150}" for i in range(100))
    lm.loglikelihood(ask([(text, " w5"), (text, " w80 w6")]))
    ids = tokenizer(text)["input_ids"]
    assert lm.max_length == 64 and lm.taken[text] == routed.decide([ids[-64:]])[0]
    assert lm.truncated == 2


def test_the_dial_at_execute_is_the_live_model(load: Any, tokenizer: Any) -> None:
    decoder = load("Llama")
    asked = ask([(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS])
    lm = RoutedLM(RoutedModel(decoder, leaning(decoder), "execute"), tokenizer)
    assert lm.loglikelihood(asked) == LiveModel(decoder.model, tokenizer).loglikelihood(asked)


@pytest.mark.parametrize("name", GENERATING)
def test_each_prompt_generates_along_its_own_path(load: Any, tokenizer: Any, name: str) -> None:
    """Prompts of different lengths in one batch, padded on the left, one of them empty."""
    decoder = load(name)
    routed = RoutedModel(decoder, leaning(decoder))
    lm = RoutedLM(routed, tokenizer, batch_size=len(CONTEXTS) + 1)
    settings = {"until": [], "max_gen_toks": 5, "do_sample": False}
    texts = [*CONTEXTS, ""]
    found = lm.generate_until(ask([(text, settings) for text in texts], "generate_until"))
    paths = {context: routed.decide([tokenizer(context)["input_ids"]])[0] for context in CONTEXTS}
    assert len(set(paths.values())) >= 2 and lm.taken == paths
    for text, made in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        new: list[int] = []
        while len(new) < 5 and 1 not in new:
            new.append(int(logits_along(decoder, paths.get(text, lm.whole), [*ids, *new])[-1].argmax()))
        assert made == tokenizer.decode(new, skip_special_tokens=True), text
    assert len(view_decoder(decoder.model)) == 8 and lm.seconds > 0
