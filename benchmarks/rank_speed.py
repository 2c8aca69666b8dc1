"""Ranking against a bare forward pass over the same tokens without the head: ratio of times, and of peak GPU memory.

    python benchmarks/rank_speed.py --device cuda --shape llama-2-7b --out benchmarks/rank_speed_gpu.json
    python benchmarks/rank_speed.py --device cpu --model CHECKPOINT --length 512 --out benchmarks/rank_speed_cpu.json

Both run in turns on the same batches, so that a change of the machine's speed meets both. Weights of a shape are
random: they do not change the time.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from record import timed, write_record

SHAPES = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
    "80-layers": {  # as deep as Llama-2-70B, as wide as the 7B, so that it fits on one card
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 80,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
}


def random_model(shape: str, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def main() -> None:
    from layerprune.model.decoder import view_decoder
    from layerprune.model.load import load_model
    from layerprune.prune.rank import rank_decoder

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--model", help="a checkpoint folder instead of random weights of a shape")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8, help="documents a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    given = parser.parse_args()
    cuda = given.device.startswith("cuda")
    if given.model:
        model = load_model(Path(given.model), device=given.device, dtype="auto")
    else:
        model = random_model(given.shape, given.device)
    decoder = view_decoder(model)
    vocab = model.config.vocab_size
    maker = torch.Generator().manual_seed(0)
    documents = torch.randint(0, vocab, (given.batch * given.batches, given.length), generator=maker).tolist()
    together = [torch.tensor(documents[i : i + given.batch]) for i in range(0, len(documents), given.batch)]
    base = model.base_model

    @torch.no_grad()
    def bare() -> None:
        for ids_BT in together:
            base(input_ids=ids_BT.to(given.device), use_cache=False)

    def rank() -> None:
        rank_decoder(decoder, documents, max_tokens=given.batch * given.length)

    timed(bare, cuda), timed(rank, cuda)  # warm-up
    rounds = [(timed(bare, cuda), timed(rank, cuda)) for _ in range(given.rounds)]
    ratios = [b[0] / a[0] for a, b in rounds]
    result: dict[str, Any] = {
        "documents": len(documents),
        "tokens": len(documents) * given.length,
        "bare_seconds": statistics.median(a[0] for a, _ in rounds),
        "rank_seconds": statistics.median(b[0] for _, b in rounds),
        "ratio": statistics.median(ratios),
        "ratios": [round(r, 4) for r in ratios],
    }
    if cuda:
        result["bare_peak_bytes"] = max(a[1] for a, _ in rounds)
        result["rank_peak_bytes"] = max(b[1] for _, b in rounds)
        result["memory_ratio"] = result["rank_peak_bytes"] / result["bare_peak_bytes"]
    shape = {
        "hidden": model.config.hidden_size,
        "layers": len(decoder),
        "dtype": str(model.dtype),
        "length": given.length,
    }
    write_record(given.out, given.device, {**shape, "batch": given.batch}, result)


if __name__ == "__main__":
    main()
