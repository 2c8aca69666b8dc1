"""A live model behind lm-eval: its log-likelihood requests in batches of tokens, the head only where it is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from layerprune.model.decoder import view_decoder
from layerprune.model.errors import Refused
from layerprune.model.source import one_line, vocab_size

Request = tuple[Any, list[int], list[int]]
"""lm-eval's: the two strings (or None), the context's tokens, the continuation's tokens."""


class LiveModel(HFLM):
    """lm-eval's own Hugging Face model (its tokenisation, truncation and generation) over a model that is loaded.

    Only the scheduling of log-likelihoods is ours: a batch holds a number of tokens instead of rows, requests with
    the same input share a row, the head runs from the first scored position on, and no KV cache is built. What is
    computed for a request is lm-eval's formula: log-softmax in the dtype of the logits, summed over the continuation.

    batch_size: rows a batch, or None for what fits the token budget. A batch that runs out of GPU memory is halved.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None = None, progress: bool = False) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 32, trust_remote_code=None)
        self.rows = batch_size or 10**9
        self.progress = progress
        self.truncated = 0
        """Requests whose prompt was cut on the left to fit the model's context."""
        self.tokens = token_budget(self.device.type)
        self.logit_bytes = logit_budget(self.device.type)
        self.vocab = vocab_size(model.config)
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # One row for each different input: the choices A to D after one question are one row.
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise Refused(f"an answer of {len(continuation)} tokens is longer than the model's context of {self.max_length}")
            self.truncated += len(context) + len(continuation) > self.max_length + 1
            rows.setdefault(tuple((context + continuation)[-(self.max_length + 1) : -1]), []).append(i)
        order = sorted(rows, key=lambda ids: (-len(ids), ids))
        need = {ids: max(len(requests[i][2]) for i in rows[ids]) for ids in order}  # scored positions, from the end
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(order), desc="prompts", disable=disable_tqdm or not self.progress)

        def score(batch: list[tuple[int, ...]]) -> None:
            chosen = [(row, i) for row, ids in enumerate(batch) for i in rows[ids]]
            width, first = len(batch[0]), min(len(ids) - need[ids] for ids in batch)
            ids_BT = torch.zeros((len(batch), width), dtype=torch.long)
            for row, ids in enumerate(batch):
                ids_BT[row, : len(ids)] = torch.tensor(ids)
            logp_BKV, greedy_BK = self._log_probabilities(ids_BT, width - first)
            # all scored tokens of the batch in one gather, so that a GPU is waited for once
            at = [(row, p - first) for row, i in chosen for p in scored_positions(batch[row], requests[i])]
            cont = torch.tensor([t for _, i in chosen for t in requests[i][2]], device=logp_BKV.device)
            row_N, position_N = torch.tensor(at, device=logp_BKV.device).T
            values = logp_BKV[row_N, position_N, cont].split([len(requests[i][2]) for _, i in chosen])
            hits = (greedy_BK[row_N, position_N] == cont).split([len(requests[i][2]) for _, i in chosen])
            sums = torch.stack([v.sum() for v in values]).tolist()
            exact = torch.stack([h.all() for h in hits]).tolist()
            for (_, i), value, hit in zip(chosen, sums, exact, strict=True):
                if value != value:
                    raise Refused("the model's logits are not numbers: its weights or this dtype overflow (try --dtype float32)")
                answers[i] = (value, hit)
            bar.update(len(batch))

        def score_or_halve(batch: list[tuple[int, ...]]) -> None:
            try:
                return score(batch)
            except torch.cuda.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise Refused(f"one prompt of {len(batch[0])} tokens does not fit: {one_line(error)}") from error
            # outside the handler, which would keep the tensors of the failed attempt alive
            torch.cuda.empty_cache()
            self.tokens = max(1, len(batch[0]) * len(batch) // 2)
            score_or_halve(batch[: len(batch) // 2])
            score_or_halve(batch[len(batch) // 2 :])

        start = 0
        while start < len(order):
            stop = start + self._rows_that_fit(order, start, need)
            score_or_halve(order[start:stop])
            start = stop
        bar.close()
        return answers

    def _rows_that_fit(self, order: list[tuple[int, ...]], start: int, need: dict[tuple[int, ...], int]) -> int:
        """How many rows from `start` on (longest first) make a batch within tokens, logits and rows."""
        width, count, first = len(order[start]), 1, len(order[start]) - need[order[start]]
        while start + count < len(order) and count < self.rows and (count + 1) * width <= self.tokens:
            ids = order[start + count]
            first = min(first, len(ids) - need[ids])
            kept = width - first if self.keeps_logits else width
            if (count + 1) * kept * self.vocab * 4 > self.logit_bytes:
                break
            count += 1
        return count

    @torch.no_grad()
    def _log_probabilities(self, ids_BT: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (B, keep, V) and greedy tokens (B, keep) of the last `keep` positions.

        Padding is on the right and causal attention never looks there, so no mask is needed (as in lm-eval).
        """
        more = {"logits_to_keep": keep} if self.keeps_logits else {}
        logits = self.model(ids_BT.to(self.device), use_cache=False, **more).logits[:, -keep:]
        return F.log_softmax(logits, dim=-1), logits.argmax(dim=-1)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        if not is_cut(self.model):
            return super()._model_generate(context, max_length, stop, **kwargs)
        # lm-eval insists on a KV cache, in which a skipped layer would leave its slot empty and the length wrong.
        whole, self._model = self._model, _WithoutCache(self._model.generate)
        try:
            return super()._model_generate(context, max_length, stop, **kwargs)
        finally:
            self._model = whole


class _WithoutCache:
    def __init__(self, generate: Callable[..., Any]) -> None:
        self._generate = generate

    def generate(self, **kwargs: Any) -> Any:
        return self._generate(**kwargs | {"use_cache": False})


def scored_positions(ids: tuple[int, ...], request: Request) -> range:
    """Input positions whose logits predict the request's continuation: the last ones."""
    return range(len(ids) - len(request[2]), len(ids))


def is_cut(model: Any) -> bool:
    """Whether layers of this model are virtually cut (or watched) at this moment."""
    forwards = (layer.__dict__.get("forward") for layer in view_decoder(model).layers)
    return any("replaced_forwards" in getattr(f, "__qualname__", "") for f in forwards)


def token_budget(device: str) -> int:
    """Tokens a batch."""
    return 2048 if device == "cpu" else 16384


def logit_budget(device: str) -> int:
    """Bytes that a batch's float32 logits may take: 256 MiB on the CPU, 1 GiB on a GPU."""
    return 1 << (28 if device == "cpu" else 30)
