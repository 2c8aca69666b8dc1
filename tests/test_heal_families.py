"""Healing of many model families, and the table of docs/healing-families.md.

`python tests/test_heal_families.py` tries all families of tests/families.py and writes the table (two minutes); the tests
try those that differ in layout or structure, and hold the table's rows to what happens.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from layerprune.heal.train import heal_checkpoint
from layerprune.model.config import auto_class
from layerprune.model.errors import LayerpruneError
from layerprune.model.load import load_model

torch.set_num_threads(1)

TABLE = Path(__file__).parent.parent / "docs" / "healing-families.md"
_spec = importlib.util.spec_from_file_location("families", Path(__file__).with_name("families.py"))
assert _spec is not None and _spec.loader is not None
families = sys.modules.setdefault("families", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(families)

STRUCTURES = [
    "GPT-2", "GPT-NeoX", "OPT", "Falcon", "BLOOM", "Llama", "Llama (tied)", "Llama-4", "Mixtral", "Qwen2-MoE", "Phi", "Phi-3",
    "Cohere2", "Bamba", "Mamba", "RWKV", "RecurrentGemma", "GLM-4", "Nemotron-H", "LFM2", "DeepSeek-V3", "GPT-OSS",
    "Gemma-3n", "Gemma-3 (multimodal)", "Qwen2.5-VL",
]  # fmt: skip
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 3}
FOUR_BIT = {
    "gpt2": {"n_embd": 64, "n_inner": 128, "n_head": 4, "n_layer": 3},
    "opt": {**WIDE, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neox": WIDE,
    "phi3": {**WIDE, "sliding_window": None},
    "gemma2": WIDE,
}


@dataclass(frozen=True)
class Outcome:
    """`modules`: the linear layers trained, or none and the `reason` of the refusal."""

    modules: tuple[str, ...]
    reason: str


def write_words(folder: Path) -> Path:
    """A tokenizer of 150 words for the checkpoint, and documents in them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(150)]
    ids = {word: i for i, word in enumerate(["<s>", "</s>", "<u>", *words])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    rng, data = random.Random(0), folder.parent / "words.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=30))}) + "\n" for _ in range(20)))
    return data


def try_healing(source: Path) -> Outcome:
    """Heal two steps; the merged checkpoint's logits must be those of the adapter over the source, to float32 rounding."""
    from peft import PeftModel

    data, out = write_words(source), source.parent / "healed"
    settings = {"steps": 2, "batch_size": 2, "length": 16, "lora_rank": 4, "learning_rate": 1e-2, "dropout": 0.0}
    try:
        result = heal_checkpoint(source, out, data=str(data), device="cpu", report=lambda line: None, **settings)
    except LayerpruneError as refusal:
        left = sorted(path.name for path in source.parent.iterdir())
        assert left == sorted([source.name, data.name]), f"a refused healing left {left}"
        return Outcome((), str(refusal))
    base, merged = load_model(source, device="cpu"), load_model(out, device="cpu")
    ids_BT = families.ids_of(2, 10)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, found = (model(input_ids=ids_BT, use_cache=False).logits for model in (base, merged))
        expected = PeftModel.from_pretrained(base, out / "adapter").eval()(input_ids=ids_BT, use_cache=False).logits
    error, moved = ((expected - other).abs().max().item() for other in (found, plain))
    assert error <= 2e-5 * expected.abs().max().item(), f"merged and adapter-on differ by {error:.3g}"
    assert moved > 1000 * error, "the adapter changes nothing"
    attention = re.compile(r"attn|attention|mamba|conv|[qkv]_proj|router|\.gate$")
    assert not any(attention.search(name) for name in result["modules"]), result["modules"]
    return Outcome(tuple(result["modules"]), "")


def row(name: str, outcome: Outcome) -> str:
    """A row of the table."""
    note = families.FAMILIES[name].note or ""
    if outcome.modules:
        return f"| {name} | healed | {', '.join(f'`{m}`' for m in outcome.modules)} | {note} |"
    fused = "holds 4 experts in one parameter" in outcome.reason
    reason = "experts fused into one parameter" if fused else outcome.reason.partition(":")[0].partition(" in the ")[0]
    return f"| {name} | refused | {reason} | {note} |"


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_family_is_healed_rightly_or_refused_as_the_table_says(name: str, tmp_path: Path) -> None:
    outcome = try_healing(families.build(name, tmp_path / "model"))
    assert row(name, outcome) in TABLE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_a_family_whose_linears_are_quantised_is_healed_rightly(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = families.make_config(families.Family(kind, FOUR_BIT[kind]))
    auto_class(config).from_config(config).save_pretrained(tmp_path / "model")
    assert try_healing(tmp_path / "model").modules


def test_the_table_names_families_that_are_tried() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if " | healed | " in line or " | refused | " in line]
    assert len(rows) > 60 and set(STRUCTURES) <= set(rows) <= set(families.FAMILIES)


HEAD = """# Which families can be healed

Tried on tiny random checkpoints of each family, in the layouts in which the Hub holds them (`tests/families.py`). *Healed*: after
two steps of training, the merged checkpoint loads without a missing or unexpected key, and its logits are those of the adapter over
the source, to float32 rounding. The third column names the linear layers that were found and trained, or says why not.

**How they are found.** Every part of a decoder layer is run twice, the second time with another first token. A part whose results
for the later tokens stay the same is position-wise; attention and state-space mixers are not. Of the position-wise parts the one
with the most weights in linear layers is the MLP. No family's names are needed.

**How the merge finds their weights.** A checkpoint may use other names than the model, or store weights transposed. A stored tensor
is taken for a layer's weight only if its values are, up to 4-bit rounding; else healing is refused before it trains.

**Fused experts are refused.** Transformers 5 holds all experts of a layer in one 3-D parameter. bitsandbytes leaves those in full
precision, so nothing is saved, and peft wraps them (`target_parameters`) without dropout only. Cut such a model with `--no-heal`.

**In 4 bits or not.** Linear layers narrower than NF4's block of 64 stay unquantised. On the CPU so do layers whose input width is
no multiple of 64: bitsandbytes 0.50 decodes these wrongly there. Healing says so when it happens.

This table is written by `python tests/test_heal_families.py`.

| family | | linear layers, or the reason | layout |
|---|---|---|---|
"""


def main() -> None:
    rows = []
    for name in families.FAMILIES:
        with tempfile.TemporaryDirectory() as made:
            try:
                source = families.build(name, Path(made) / "model")
            except Exception as error:  # a family that this transformers does not have
                print(f"{name} left out: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            rows.append(row(name, try_healing(source)))
        print(rows[-1], flush=True)
    TABLE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
