"""Train the demo model: plain pre-training of a Llama of 24 layers on the world's training stream.

    python recipes/demo/train.py --until 105 150 200 --out OUT

Run: on one H100, 200 s from start to end, 205 M tokens (about 3,130 steps of 65,536), final training loss 0.577 nats a token.

One GPU. Documents are generated and tokenised by the other cores while the model trains on those that are there; they
follow one another, each after `<s>`, cut into sequences of 512; once all are used they come again in a new order. Loss:
mean cross-entropy of the next token, nothing else. The block is written out as a function so that one compilation
serves all layers; test_demo_train.py shows that it is transformers' Llama to rounding. The matrices inside the blocks
are trained by Muon (orthogonalised momentum, https://kellerjordan.github.io/posts/muon/), embedding and norms by AdamW.

Learning rates follow the clock: `--until 110 150` decays to zero at 110 s after the start and saves, then goes on
with a second, lower cycle to 150 s. Checkpoints alternate between OUT/a and OUT/b (bf16 shards, the index last).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

STARTED = time.time()
HERE = Path(__file__).parent
LENGTH = 512
PART = 2000  # documents of one piece of work
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, MLP, VOCAB, EPS, THETA = 24, 192, 3, 1, 64, 512, 2048, 1e-6, 10000.0
SHARD_BYTES = 12_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCAB,
    "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "max_position_embeddings": LENGTH, "rms_norm_eps": EPS,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True, "initializer_range": 0.02,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "use_cache": True,
}  # fmt: skip

# One name a matrix, as in the checkpoint; shape (out, in).
MATRICES = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
NORMS = ("input_layernorm", "post_attention_layernorm")


def say(text: str) -> None:
    print(f"{time.time() - STARTED:7.1f} s  {text}", flush=True)


# ---------------------------------------------------------------- data


def read_tokenizer() -> Any:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))


def tokens_of_part(part: int) -> Any:
    """Token ids (uint16) of one piece of the training stream."""
    import numpy as np

    sys.path.insert(0, str(HERE))
    import streams

    tokenizer = read_tokenizer()
    documents = streams.documents("train", PART, part * PART)
    return np.concatenate([np.array(tokenizer.encode(text).ids, dtype=np.uint16) for text in documents])


class Sequences:
    """Training sequences: the newest first-time ones while there are any, then all of them again, shuffled."""

    def __init__(self, documents: int, workers: int) -> None:
        self.rows: list[Any] = []  # (N, 512) arrays in order of arrival
        self.ready = 0
        self.complete = False
        self.parts = math.ceil(documents / PART)
        self.pool = multiprocessing.get_context("spawn").Pool(workers)
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        import numpy as np

        rest = np.zeros(0, dtype=np.uint16)
        for tokens in self.pool.imap(tokens_of_part, range(self.parts)):
            rest = np.concatenate([rest, tokens])
            whole = len(rest) // LENGTH * LENGTH
            self.rows.append(rest[:whole].astype(np.int16).reshape(-1, LENGTH))
            rest = rest[whole:]
            self.ready += whole // LENGTH
        self.complete = True
        say(f"{self.ready * LENGTH / 1e6:.0f} M tokens generated ({self.parts * PART:,} documents)")

    def batches(self, size: int, device: str) -> Any:
        """Yields (size, 512) int64 ids on `device` for ever."""
        import numpy as np
        import torch

        order = np.random.RandomState(0)
        held = torch.zeros((0, LENGTH), dtype=torch.int16, device=device)
        taken, used = 0, 0
        while True:
            if used + size > len(held) and taken < len(self.rows):
                arrived = self.rows[taken:]
                taken += len(arrived)
                held = torch.cat([held, torch.from_numpy(np.concatenate(arrived)).to(device)])
            if used + size <= len(held):
                yield held[used : used + size].long()
                used += size
            elif len(held) < size or (len(held) < 20 * size and not self.complete):
                time.sleep(0.05)  # at the start only
            else:
                yield held[torch.from_numpy(order.randint(0, len(held), size)).to(device)].long()


# ---------------------------------------------------------------- model


def make_parameters(device: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(matrices, norms, rest): stacked over layers, fp32; normal(0, 0.02), outputs of a block scaled by 1/sqrt(2L)."""
    import torch

    torch.manual_seed(0)
    matrices = {name: torch.randn(LAYERS, *shape) * 0.02 for name, shape in MATRICES.items()}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        matrices[name] /= math.sqrt(2 * LAYERS)
    norms = {name: torch.ones(LAYERS, HIDDEN) for name in NORMS}
    rest = {"embed_tokens": torch.randn(VOCAB, HIDDEN) * 0.02, "norm": torch.ones(HIDDEN)}
    groups = (matrices, norms, rest)
    return tuple({k: v.to(device).requires_grad_() for k, v in g.items()} for g in groups)  # type: ignore[return-value]


def rms_norm(x: Any, weight: Any) -> Any:
    import torch

    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight.to(x.dtype)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    import torch

    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def block(x, cos, sin, norm1, norm2, q, k, v, o, gate, up, down):  # type: ignore[no-untyped-def]
    """One Llama block. x (B, T, H); weights in fp32, computed in x's dtype."""
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention, silu

    B, T, _ = x.shape
    y = rms_norm(x, norm1)
    qkv = linear(y, torch.cat([q, k, v]).to(x.dtype))
    heads = qkv.view(B, T, HEADS + 2 * KV_HEADS, HEAD).transpose(1, 2)
    query = rotate(heads[:, :HEADS], cos, sin)
    key = rotate(heads[:, HEADS : HEADS + KV_HEADS], cos, sin).expand(B, HEADS, T, HEAD)
    value = heads[:, HEADS + KV_HEADS :].expand(B, HEADS, T, HEAD)
    mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
    x = x + linear(mixed.transpose(1, 2).reshape(B, T, HEADS * HEAD), o.to(x.dtype))
    y = rms_norm(x, norm2)
    both = linear(y, torch.cat([gate, up]).to(x.dtype))
    return x + linear(silu(both[..., :MLP]) * both[..., MLP:], down.to(x.dtype))


def head(x: Any, norm: Any, embedding: Any) -> Any:
    from torch.nn.functional import linear

    return linear(rms_norm(x, norm), embedding.to(x.dtype))


def head_loss(x: Any, norm: Any, embedding: Any, ids_BT: Any) -> Any:
    from torch.nn.functional import cross_entropy

    logits = head(x, norm, embedding)[:, :-1].flatten(0, 1).float()
    return cross_entropy(logits, ids_BT[:, 1:].flatten())


def rope(length: int, device: str, dtype: Any) -> tuple[Any, Any]:
    import torch

    frequency = 1.0 / THETA ** (torch.arange(0, HEAD, 2, device=device).float() / HEAD)
    angles = torch.outer(torch.arange(length, device=device).float(), frequency)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def hidden_states(parameters: Any, ids_BT: Any, dtype: Any, run_block: Any = block) -> Any:
    """x (B, T, H) after the last block."""
    matrices, norms, rest = parameters
    x = rest["embed_tokens"].to(dtype)[ids_BT]
    cos, sin = rope(ids_BT.shape[1], str(ids_BT.device), dtype)
    layers = zip(*(stack.unbind() for stack in (*norms.values(), *matrices.values())), strict=True)
    for weights in layers:
        x = run_block(x, cos, sin, *weights)
    return x


# ---------------------------------------------------------------- optimiser


def orthogonalise(update: Any, dtype: Any) -> Any:
    """About the nearest semi-orthogonal matrices of (N, rows, columns), rows <= columns: five Newton-Schulz steps."""
    x = update.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def orthogonalise_all(updates: list[Any], dtype: Any) -> list[Any]:
    """`orthogonalise` of each (L, out, in), those of one shape (up to a transpose) together."""
    import torch

    made: list[Any] = [None] * len(updates)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, update in enumerate(updates):
        groups.setdefault(tuple(sorted(update.shape[-2:])), []).append(i)
    for members in groups.values():
        flat = [updates[i].mT if updates[i].shape[-2] > updates[i].shape[-1] else updates[i] for i in members]
        for i, part in zip(members, orthogonalise(torch.cat(flat), dtype).split(LAYERS), strict=True):
            made[i] = part.mT if updates[i].shape[-2] > updates[i].shape[-1] else part
    return made


class Muon:
    """Nesterov momentum of 0.95, orthogonalised; rate scaled by sqrt(out / in) where out > in."""

    def __init__(self, stacks: list[Any], dtype: Any, momentum: float = 0.95) -> None:
        import torch

        self.stacks, self.dtype, self.momentum = stacks, dtype, momentum
        self.buffers = [torch.zeros_like(s) for s in stacks]

    def step(self, lr: float) -> None:
        gradients = [stack.grad for stack in self.stacks]
        for buffer, gradient in zip(self.buffers, gradients, strict=True):
            buffer.lerp_(gradient, 1 - self.momentum)
        updates = [g.lerp(b, self.momentum) for g, b in zip(gradients, self.buffers, strict=True)]
        for stack, update in zip(self.stacks, orthogonalise_all(updates, self.dtype), strict=True):
            scale = math.sqrt(max(1.0, stack.shape[-2] / stack.shape[-1]))
            stack.data.add_(update.to(stack.dtype), alpha=-lr * scale)
            stack.grad = None


def learning_rate(now: float, ends: list[float], begun: float, again: float) -> float:
    """Share of the peak at second `now`: linear warm-up (4 s, 2 s later), then a cosine to zero at each end."""
    start = begun
    for cycle, end in enumerate(ends):
        if now < end:
            warm = 4.0 if cycle == 0 else 2.0
            passed = (now - start) / max(end - start, 1e-9)
            height = 1.0 if cycle == 0 else again
            return height * min(1.0, 0.02 + (now - start) / warm) * 0.5 * (1 + math.cos(math.pi * passed))
        start = end
    return 0.0


# ---------------------------------------------------------------- scores and checkpoints


def read_items(limit: int = 200) -> dict[str, list[dict[str, Any]]]:
    """First items of each task, tokenised: rows (ids, first scored position), gold."""
    tokenizer = read_tokenizer()
    tasks: dict[str, list[dict[str, Any]]] = {}
    for name in ("cloze", "letters", "yesno", "reasoning"):
        with open(HERE / "tasks" / f"{name}.jsonl", encoding="utf-8") as lines:
            items = [json.loads(line) for line, _ in zip(lines, range(limit), strict=False)]
        tasks[name] = [
            {
                "gold": item["gold"],
                "rows": [
                    (tokenizer.encode(f"{item['prompt']} {choice}").ids, len(tokenizer.encode(item["prompt"]).ids))
                    for choice in item["choices"]
                ],
            }
            for item in items
        ]
    return tasks


def accuracy(parameters: Any, items: list[dict[str, Any]], device: str, dtype: Any) -> float:
    """Share of items whose right choice is the likeliest (summed log-likelihood, as lm-eval's acc)."""
    import torch

    rows = [row for item in items for row in item["rows"]]
    totals: list[float] = []
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        width = max(len(ids) for ids, _ in part)
        ids_BT = torch.zeros((len(part), width), dtype=torch.long)
        scored_BT = torch.zeros((len(part), width - 1))
        for b, (ids, first) in enumerate(part):
            ids_BT[b, : len(ids)] = torch.tensor(ids)
            scored_BT[b, first - 1 : len(ids) - 1] = 1
        ids_BT, scored_BT = ids_BT.to(device), scored_BT.to(device)
        with torch.no_grad():
            x = hidden_states(parameters, ids_BT, dtype)
            logp = head(x, parameters[2]["norm"], parameters[2]["embed_tokens"])[:, :-1].float().log_softmax(-1)
            each = logp.gather(-1, ids_BT[:, 1:, None])[..., 0]
        totals.extend((each * scored_BT).sum(1).tolist())
    right, at = 0, 0
    for item in items:
        scores = totals[at : at + len(item["rows"])]
        right += scores.index(max(scores)) == item["gold"]
        at += len(scores)
    return right / len(items)


def state_dict(parameters: Any) -> dict[str, Any]:
    """The checkpoint's tensors under transformers' names, bf16."""
    import torch

    matrices, norms, rest = parameters
    state = {"model.embed_tokens.weight": rest["embed_tokens"], "model.norm.weight": rest["norm"]}
    for name, stack in (*norms.items(), *matrices.items()):
        for layer in range(LAYERS):
            state[f"model.layers.{layer}.{name}.weight"] = stack[layer]
    return {k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in state.items()}


def save(parameters: Any, folder: Path) -> None:
    """A standard sharded checkpoint; the index is written last, so that it names whole shards only."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in state_dict(parameters).items():
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / (name + ".tmp"), metadata={"format": "pt"})
        os.replace(folder / (name + ".tmp"), folder / name)
    total = sum(t.nbytes for shard in shards for t in shard.values())
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    part = folder / "index.tmp"
    part.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n")
    os.replace(part, index)


# ---------------------------------------------------------------- training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", type=float, nargs="+", default=[540.0], help="ends of the cycles, seconds from the start")
    parser.add_argument("--documents", type=int, default=1_200_000)
    parser.add_argument("--batch", type=int, default=128, help="sequences of 512 tokens a step")
    parser.add_argument("--peak", type=float, default=0.02, help="learning rate of Muon")
    parser.add_argument("--adam-peak", type=float, default=4e-3, help="learning rate of embedding and norms")
    parser.add_argument("--again", type=float, default=0.5, help="peak of the later cycles, as a share of the first")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    sequences = Sequences(given.documents, given.workers)
    import torch

    torch.set_float32_matmul_precision("high")
    say(f"torch {torch.__version__}, {given.device}")
    cuda = given.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    parameters = make_parameters(given.device)
    matrices, norms, rest = parameters
    count = sum(p.numel() for group in parameters for p in group.values())
    say(f"{count:,} parameters")
    muon = Muon(list(matrices.values()), dtype)
    adam = torch.optim.AdamW([*norms.values(), *rest.values()], betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)
    run_block = torch.compile(block, dynamic=False) if cuda else block
    run_loss = torch.compile(head_loss, dynamic=False) if cuda else head_loss
    losses: list[Any] = []
    step, begun, cycle = 0, 0.0, 0
    items = read_items()
    for ids_BT in sequences.batches(given.batch, given.device):
        try:
            x = hidden_states(parameters, ids_BT, dtype, run_block)
            loss = run_loss(x, rest["norm"], rest["embed_tokens"], ids_BT)
            loss.backward()
        except Exception as error:  # a compiler that does not work here
            if run_block is block:
                raise
            say(f"compiling failed ({type(error).__name__}: {str(error)[:200]}), going on without")
            run_block, run_loss = block, head_loss
            continue
        if step == 0:
            begun = time.time()
            say(f"first step (compiled), loss {loss.item():.3f}")
        share = learning_rate(time.time() - STARTED, given.until, begun - STARTED, given.again)
        for group in adam.param_groups:
            group["lr"] = given.adam_peak * share
        muon.step(given.peak * share)
        adam.step()
        adam.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        step += 1
        if step % 10 == 0:
            losses[-10].item()  # keeps the clock honest: work is queued no more than ten steps ahead
        if step in (20, 100) or step % 300 == 0:
            mean = torch.stack(losses[-20:]).mean().item()
            rate = step * given.batch * LENGTH / (time.time() - begun) / 1e6
            say(f"step {step}, loss {mean:.4f}, {rate:.2f} M tokens/s, {sequences.ready * LENGTH / 1e6:.0f} M generated")
        if time.time() - STARTED >= given.until[cycle]:
            save(parameters, given.out / "ab"[cycle % 2])
            mean = torch.stack(losses[-50:]).mean().item()
            scores = {name: accuracy(parameters, part, given.device, dtype) for name, part in items.items()}
            text = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            tokens = step * given.batch * LENGTH / 1e6
            say(f"saved {'ab'[cycle % 2]}: {step} steps, {tokens:.0f} M tokens, final loss {mean:.4f}; {text}")
            cycle += 1
            if cycle == len(given.until):
                break
    sequences.pool.terminate()


if __name__ == "__main__":
    main()
