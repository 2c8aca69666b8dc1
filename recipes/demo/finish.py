"""Finish the demo model: a short second stage on questions, after train.py.

    python recipes/demo/finish.py --model OUT/a --minutes 40 --out OUT/finished

Run: RUN_LINE

What train.py leaves answers few yes/no questions: one token in twenty of those documents carries the answer, and they
are one document in twenty. This stage takes the documents that follow in the same training stream, keeps those of
questions more often than the others, and counts only the answers of the questions in the loss (as instruction tuning
does); the prose and the puzzles that stay count whole. All layers are trained alike. AdamW, linear warm-up, cosine
over the time given; made for a CPU.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import train

FIRST = 1_200_000  # documents before this number were train.py's
KEPT = {"yesno": 1.0, "mixed": 0.4, "letters": 0.4, "other": 0.04}
ANSWER_WEIGHT = 3.0


def kind(text: str) -> str:
    if not text.startswith(("Question:", "In the register", "The ")) or "\nAnswer:" not in text:
        return "other"
    questions = text.split("\n\n")
    yes_no = sum(q.endswith(("Answer: yes", "Answer: no")) for q in questions)
    if yes_no == len(questions):
        return "yesno"
    return "letters" if all("\nA. " in q for q in questions) else "mixed"


def sequences(worker: int, workers: int) -> Iterator[tuple[Any, Any]]:
    """(ids, weights) of 512, for ever: weights 0 on what a question says, ANSWER_WEIGHT on its answer, 1 elsewhere."""
    import numpy as np

    sys.path.insert(0, str(train.HERE))
    import streams

    tokenizer = train.read_tokenizer()
    chance = np.random.RandomState(worker)
    ids: list[int] = []
    weights: list[float] = []
    for text in streams.documents("train", 10**9, FIRST + worker * 10_000_000 // workers):
        what = kind(text)
        if chance.rand() > KEPT[what]:
            continue
        encoded = tokenizer.encode(text)
        ids.extend(encoded.ids)
        if what == "other":
            weights.extend([1.0] * len(encoded.ids))
        else:
            inside = [False] * (len(text) + 1)
            at = 0
            for question in text.split("\n\n"):
                answer = question.rfind("\nAnswer:")
                if answer >= 0:
                    inside[at + answer + len("\nAnswer:") : at + len(question)] = [True] * (len(question) - answer - 8)
                at += len(question) + 2
            weights.extend(ANSWER_WEIGHT if b > a and inside[a] else 0.0 for a, b in encoded.offsets)
        while len(ids) >= train.LENGTH:
            yield np.array(ids[: train.LENGTH]), np.array(weights[: train.LENGTH], dtype=np.float32)
            del ids[: train.LENGTH], weights[: train.LENGTH]


def feed(queue: Any, worker: int, workers: int) -> None:
    for pair in sequences(worker, workers):
        queue.put(pair)


def load(folder: Path) -> Any:
    """train.py's parameters from its shards."""
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        state |= load_file(shard)
    parameters = train.make_parameters("cpu")
    matrices, norms, rest = parameters
    for name, stack in (*matrices.items(), *norms.items()):
        for layer in range(train.LAYERS):
            stack.data[layer] = state[f"model.layers.{layer}.{name}.weight"].float()
    rest["embed_tokens"].data[:] = state["model.embed_tokens.weight"].float()
    rest["norm"].data[:] = state["model.norm.weight"].float()
    return parameters


def weighted_loss(x: Any, norm: Any, embedding: Any, ids_BT: Any, weights_BT: Any) -> Any:
    from torch.nn.functional import cross_entropy

    logits = train.head(x, norm, embedding)[:, :-1].flatten(0, 1).float()
    each = cross_entropy(logits, ids_BT[:, 1:].flatten(), reduction="none")
    weights = weights_BT[:, 1:].flatten()
    return (each * weights).sum() / weights.sum()


def main() -> None:
    import numpy as np
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint of train.py")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 512 tokens a step")
    parser.add_argument("--peak", type=float, default=4e-4)
    parser.add_argument("--items", type=int, default=100, help="items of each task to look at on the way")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    parameters = load(given.model)
    _, _, rest = parameters
    everything = [p for group in parameters for p in group.values()]
    queue: Any = multiprocessing.get_context("spawn").Queue(256)
    multiprocessing.get_context("spawn").Process(target=feed, args=(queue, 0, 1), daemon=True).start()
    run_block = torch.compile(train.block, dynamic=False)
    run_loss = torch.compile(weighted_loss, dynamic=False)
    optimizer = torch.optim.AdamW(everything, lr=given.peak, betas=(0.9, 0.98), weight_decay=0.0)
    items = train.read_items(given.items)
    losses: list[float] = []
    begun = time.time()
    looked = -1e9
    step = 0
    while (share := (time.time() - begun) / (given.minutes * 60)) < 1:
        if time.time() - looked > 480:
            looked = time.time()
            part = {k: train.accuracy(parameters, v, "cpu", torch.float32) for k, v in items.items() if k != "reasoning"}
            train.say(f"step {step}, loss {np.mean(losses[-50:] or [0]):.4f}; {part}")
            if step:
                train.save(parameters, given.out)
        pairs = [queue.get() for _ in range(given.batch)]
        ids_BT, weights_BT = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
        x = train.hidden_states(parameters, ids_BT, torch.bfloat16, run_block)
        loss = run_loss(x, rest["norm"], rest["embed_tokens"], ids_BT, weights_BT)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = given.peak * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * share))
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        if step % 25 == 0:
            train.say(f"step {step}, loss {np.mean(losses[-25:]):.4f}")
    train.save(parameters, given.out)
    scores = {name: train.accuracy(parameters, part, "cpu", torch.float32) for name, part in train.read_items(1000).items()}
    tokens = step * given.batch * train.LENGTH / 1e6
    train.say(f"done: {step} steps, {tokens:.2f} M tokens, {time.time() - begun:.0f} s, loss {np.mean(losses[-50:]):.4f}")
    train.say(", ".join(f"{name} {value:.3f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
