"""Make what the repository keeps of the world: tokenizer, data streams, tasks.

    python recipes/demo/make_data.py

Everything follows from the world's seed, so running it again writes the same bytes. Writes into this folder:
model/ (tokenizer), data/{calibration,heal,valid}.jsonl.zst and tasks/*.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import puzzles
import quiz
import streams
import zstandard
from world import SEED, Rng

HERE = Path(__file__).parent
VOCAB = 2048
DOCUMENTS = {"calibration": 512, "heal": 6000, "valid": 512}
ITEMS = 1000


def make_tokenizer(folder: Path, count: int = 30_000) -> None:
    """Byte-level BPE of 2,048 tokens, trained on the first documents of the training stream; `<s>` begins a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(streams.documents("train", count), trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    ).save_pretrained(folder)


def write_stream(name: str, path: Path) -> None:
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in streams.documents(name, DOCUMENTS[name]))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress("".join(lines).encode()))


def write_items(name: str, items: Iterable[dict]) -> None:
    path = HERE / "tasks" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


def main() -> None:
    make_tokenizer(HERE / "model")
    for name in DOCUMENTS:
        write_stream(name, HERE / "data" / f"{name}.jsonl.zst")
    for name, items in quiz.items(ITEMS).items():
        write_items(name, items)
    write_items("reasoning", puzzles.items(Rng(SEED + "/reasoning-items"), ITEMS))


if __name__ == "__main__":
    main()
