"""How much healing gives back: the normalised loss of a model whole, cut, and healed, and the seconds it took.

    python benchmarks/heal_quality.py --model DIR --layers 9:17 --data TRAIN.jsonl.zst --eval-data C4.jsonl \
        --steps 160 --batch-size 4 --length 512 --lora-rank 16 --learning-rate 1e-3 --out benchmarks/heal_quality.json

The loss is measured on documents of at least `--length` tokens, cut at that; `--skip` leaves out the first ones (used
to choose the block). Prints a table and the record, and writes the record to `--out`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import write_record

from layerprune.heal.train import heal_checkpoint
from layerprune.model.config import load_config, vocab_size
from layerprune.model.cuts import describe_dropped
from layerprune.model.data import batches, read_documents, tokenise
from layerprune.model.decoder import view_decoder
from layerprune.model.load import load_model, load_tokenizer, pick_device
from layerprune.model.loss import total_loss
from layerprune.model.source import find_model
from layerprune.prune.cut import prune_checkpoint


def normalised_loss(folder: Path, sequences: list[list[int]], device: str | None) -> float:
    """Loss / ln V of a checkpoint, in float32."""
    decoder = view_decoder(load_model(folder, device=device, dtype="float32"))
    vocab = vocab_size(load_config(folder))
    return total_loss(decoder, batches(sequences, 4096)).normalised(vocab)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", help="block to cut, A:B; without it the model is healed as it is")
    parser.add_argument("--data", required=True, help="training documents")
    parser.add_argument("--eval-data", required=True, help="documents for the loss")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--skip", type=int, default=20)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--warmup-steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--out", help="file for the record")
    args = parser.parse_args()

    source = find_model(args.model)
    documents = read_documents(args.eval_data, "validation", None)
    sequences = tokenise(load_tokenizer(source.folder), documents, args.length, at_least=args.length)
    sequences = sequences[args.skip : args.skip + args.samples]
    with tempfile.TemporaryDirectory() as made:
        whole = normalised_loss(source.folder, sequences, args.device)
        cut, start, dropped = whole, source.folder, "none"
        if args.layers:
            start = Path(made) / "pruned"
            pruned = prune_checkpoint(args.model, start, layers=args.layers, verify=False)
            dropped = describe_dropped(tuple(pruned["kept"]), pruned["layers"])
            cut = normalised_loss(start, sequences, args.device)
        began = time.perf_counter()
        healing = heal_checkpoint(
            start, Path(made) / "healed", data=args.data, steps=args.steps, batch_size=args.batch_size, length=args.length,
            lora_rank=args.lora_rank, learning_rate=args.learning_rate, dropout=args.dropout,
            warmup_steps=args.warmup_steps, seed=args.seed, device=args.device, progress=True,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        healed = normalised_loss(Path(made) / "healed", sequences, args.device)
    print(f"{'model':<16}{'dropped':<10}{'whole':>8}{'cut':>8}{'healed':>8}{'tokens':>12}{'seconds':>9}")
    tokens = healing["tokens"]
    print(f"{source.label:<16}{dropped:<10}{whole:>8.4f}{cut:>8.4f}{healed:>8.4f}{tokens:>12,}{seconds:>9.1f}")
    shape: dict[str, Any] = {"model": source.label, "dropped": dropped, "loss documents": len(sequences), "tokens": tokens}
    result = {
        "normalised loss": {"whole": round(whole, 4), "cut": round(cut, 4), "healed": round(healed, 4)},
        "seconds": {"all": round(seconds, 1), **healing["seconds"]},
        "training loss": [healing["losses"]["first"], healing["losses"]["last"]],
        "settings": {**healing["settings"], "data": Path(healing["settings"]["data"]).name},
        "quantisation": healing["quantisation"],
        "threads": torch.get_num_threads(),
        "healing versions": {name: importlib.metadata.version(name) for name in ("peft", "bitsandbytes", "accelerate")},
    }
    write_record(args.out, pick_device(args.device), shape, result)


if __name__ == "__main__":
    main()
