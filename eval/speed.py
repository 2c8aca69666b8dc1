"""Tokens per second of greedy generation."""

from __future__ import annotations

import random
import time
from typing import Any

from layerprune.model.config import context_length, vocab_size
from layerprune.model.decoder import is_cut


def generation_speed(
    model: Any, tokenizer: Any, *, prompt_tokens: int = 64, new_tokens: int = 64, repeats: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Generate greedily for one sequence with the KV cache; the fastest of `repeats` runs after one warm-up, or of up
    to four times as many where the two fastest differ by more than 5 %.

    The prompt is random ordinary tokens (their values do not change the time); the end token is suppressed, so that
    every run makes exactly `new_tokens`. Both numbers shrink to fit a model whose context is shorter. Returns
    tokens_per_second (new tokens over the whole run, the prompt's pass included), seconds, prompt_tokens, new_tokens.
    A virtually cut model cannot use its cache: cut it really first (ValueError).
    """
    import torch

    if is_cut(model):
        raise ValueError("a virtually cut model has no KV cache to be timed with")
    context = context_length(model.config)
    if context is not None and prompt_tokens + new_tokens > context:
        new_tokens = max(1, min(new_tokens, context // 2))
        prompt_tokens = max(1, min(prompt_tokens, context - new_tokens))
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(min(vocab_size(model.config), len(tokenizer))) if i not in special]
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([random.Random(seed).choices(plain, k=prompt_tokens)], device=device)

    def once() -> float:
        _wait(device)
        start = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        _wait(device)
        seconds = time.perf_counter() - start
        if made.shape[1] != prompt_tokens + new_tokens:
            raise RuntimeError(f"{made.shape[1] - prompt_tokens} tokens were generated instead of {new_tokens}")
        return seconds

    training = model.training
    model.eval()
    try:
        once()
        times = sorted(once() for _ in range(repeats))
        # what else runs on the machine only ever makes it slower: go on until the two fastest agree
        while len(times) < 4 * repeats and times[:2][-1] > 1.05 * times[0]:
            times = sorted([*times, once()])
        seconds = times[0]
    finally:
        model.train(training)
    return {
        "tokens_per_second": new_tokens / seconds,
        "seconds": seconds,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
    }


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
