"""Train the demo model: plain pre-training of a Llama of 24 layers on the world's training stream.

    python recipes/demo/train.py --minutes 9 --out OUT

Run: RUN_LINE

One GPU; the whole stream is generated and tokenised first, by all cores. Documents follow one another, each after
`<s>`, cut into sequences of 512. AdamW, linear warm-up, then a cosine over the time given: learning rates follow the
clock, so that a run ends when it should on any machine. Ends with a checkpoint in OUT/model (bf16).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
LENGTH = 512
PART = 4000  # documents of one piece of work


def tokens_of_part(part: int) -> np.ndarray:
    """Tokens of one piece of the training stream."""
    sys.path.insert(0, str(HERE))
    import streams
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
    documents = list(streams.documents("train", PART, part * PART))
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(documents)])


def make_sequences(documents: int) -> np.ndarray:
    """(N, 512) token ids of the first `documents` documents of the training stream."""
    parts = range(math.ceil(documents / PART))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        flat = np.concatenate(list(pool.imap(tokens_of_part, parts)))
    return flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)


def make_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=24, num_attention_heads=3,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        rope_theta=10000.0, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.02,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    return model


def learning_rate(progress: float, step: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up over steps, cosine to a twentieth of the peak over the share of time that has passed."""
    return peak * min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def read_items() -> dict[str, list[dict[str, Any]]]:
    names = ("cloze", "letters", "yesno", "reasoning")
    return {n: [json.loads(line) for line in open(HERE / "tasks" / f"{n}.jsonl", encoding="utf-8")] for n in names}


def accuracy(model: Any, tokenizer: Any, items: list[dict[str, Any]], device: str) -> float:
    """Share of items whose right choice is the likeliest (summed log-likelihood, as lm-eval's acc)."""
    import torch

    right = 0
    for start in range(0, len(items), 64):
        rows, spans, owner = [], [], []
        for i, item in enumerate(items[start : start + 64]):
            stem = tokenizer.encode(item["prompt"]).ids
            for choice in item["choices"]:
                ids = tokenizer.encode(item["prompt"] + " " + choice).ids
                rows.append(ids)
                spans.append((len(stem), len(ids)))
                owner.append(i)
        width = max(map(len, rows))
        ids_BT = torch.zeros((len(rows), width), dtype=torch.long)
        for b, ids in enumerate(rows):
            ids_BT[b, : len(ids)] = torch.tensor(ids)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            logp = model(input_ids=ids_BT.to(device)).logits.float().log_softmax(-1).cpu()
        scores: dict[int, list[float]] = {}
        for b, (first, last) in enumerate(spans):
            total = sum(logp[b, t - 1, ids_BT[b, t]].item() for t in range(first, last))
            scores.setdefault(owner[b], []).append(total)
        for i, values in scores.items():
            right += int(np.argmax(values)) == items[start + i]["gold"]
    return right / len(items)


def main() -> None:
    import torch
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time of training, after the data are made")
    parser.add_argument("--documents", type=int, default=1_200_000)
    parser.add_argument("--batch", type=int, default=256, help="sequences of 512 tokens a step")
    parser.add_argument("--peak", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    started = time.time()

    def say(text: str) -> None:
        print(f"{time.time() - started:7.1f} s  {text}", flush=True)

    sequences_NT = make_sequences(given.documents)
    say(f"{sequences_NT.size / 1e6:.0f} M tokens of {given.documents:,} documents")
    items = read_items()
    tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
    torch.set_float32_matmul_precision("high")
    model = make_model().to(given.device)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    cuda = given.device == "cuda"
    compiled = torch.compile(model) if cuda else model
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=given.peak, betas=(0.9, 0.95), fused=cuda,
    )  # fmt: skip
    data = torch.from_numpy(sequences_NT.astype(np.int16))  # ids are below 2,048
    data = data.to(given.device)
    order = np.random.RandomState(0)
    begun = time.time()
    step, at, epoch, shuffled = 0, 0, 0, torch.from_numpy(order.permutation(len(data)))
    losses: list[Any] = []

    def report() -> None:
        model.eval()
        small = {name: accuracy(model, tokenizer, part[:200], given.device) for name, part in items.items()}
        model.train()
        mean = torch.stack(losses[-100:]).mean().item()
        rate = step * given.batch * LENGTH / (time.time() - begun)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in small.items())
        say(f"step {step}, epoch {epoch}, loss {mean:.4f}, {rate / 1e6:.2f} M tokens/s; {scores}")

    def save() -> None:
        folder = given.out / "model"
        model.to(torch.bfloat16).save_pretrained(folder)
        model.float()

    next_report = 60.0
    while (spent := time.time() - begun) < given.minutes * 60:
        if at + given.batch > len(shuffled):
            at, epoch, shuffled = 0, epoch + 1, torch.from_numpy(order.permutation(len(data)))
        ids_BT = data[shuffled[at : at + given.batch].to(given.device)].long()
        at += given.batch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spent / (given.minutes * 60), step, given.peak)
        with torch.autocast(given.device, torch.bfloat16):
            logits = compiled(input_ids=ids_BT, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        step += 1
        if step % 20 == 0:
            losses[-1].item()  # keeps the clock honest: work is queued no further ahead
        if spent > next_report:
            report()
            next_report += 60.0
    report()
    save()
    say(f"done: {step} steps, {step * given.batch * LENGTH / 1e6:.0f} M tokens, {time.time() - begun:.0f} s of training")


if __name__ == "__main__":
    main()
