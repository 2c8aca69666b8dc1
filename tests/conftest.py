"""Tiny real checkpoints in Hugging Face format, built once a session, without a network."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = (
    "the a river stone bird green walks over under old tall small king tower found lost bread water night day runs "
    "slowly and but then"
).split()


def make_prose(count: int = 60, seed: int = 0) -> list[str]:
    """Documents of 12 to 40 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(12, 40))).capitalize() + "." for _ in range(count)]


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 tokens that puts `<s>` (id 0) before every document, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(make_prose(), trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def make_llama(folder: Path, layers: int = 5, hidden: int = 64, shard: str = "5GB", **config: Any) -> Path:
    """A random Llama with 320 token ids, a context of 64 and the tokenizer above; `shard` is the largest shard."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 320, "hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**settings, **config})).save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prose() -> list[str]:
    return make_prose()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def build_llama() -> Callable[..., Path]:
    """`make_llama`, for tests that need a checkpoint of their own."""
    return make_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 5 layers in one shard, to be read only."""
    return make_llama(tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture
def own_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_llama` that a test may break: `tmp_path / "model"`."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def documents_file(tmp_path: Path, prose: list[str]) -> Path:
    """60 documents as JSONL: `tmp_path / "documents.jsonl"`."""
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose), encoding="utf-8")
    return path


RUN_WORDS = "the a salt mill river goes to by over and stone town lamp bird low high walks sings sees under".split()


@pytest.fixture(scope="session")
def run_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama, data files and one multiple-choice task."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)
    documents = [" ".join(rng.choices(RUN_WORDS, k=rng.randint(30, 80))) for _ in range(120)]
    for name, part in (("calibration", documents[:10]), ("heal", documents[10:110]), ("loss", documents[110:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tasks = folder / "tasks"
    tasks.mkdir()
    items = [
        {"question": " ".join(rng.choices(RUN_WORDS, k=5)), "choices": rng.sample(RUN_WORDS, 3), "gold": rng.randrange(3)}
        for _ in range(12)
    ]
    (tasks / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tasks / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tasks / 'items.jsonl'}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder
