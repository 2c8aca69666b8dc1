"""A live model behind lm-eval: its log-likelihood requests in batches of tokens, the head only where it is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM

from layerprune.eval.memory import logit_budget, token_budget
from layerprune.model.branches import padded
from layerprune.model.config import vocab_size
from layerprune.model.decoder import is_cut
from layerprune.model.errors import Refused, one_line
from layerprune.model.memory import in_halves
from layerprune.model.progress import progress_bar

Request = tuple[Any, list[int], list[int]]
"""lm-eval's: the two strings (or None), the context's tokens, the continuation's tokens."""

Row = tuple[int, ...]
"""The tokens that the model reads for one request or more."""


class LiveModel(HFLM):
    """lm-eval's own Hugging Face model (its tokenisation, truncation and generation) over a model that is loaded.

    Only the scheduling of log-likelihoods is ours: a batch holds a number of tokens instead of rows, requests with
    the same input share a row, the head runs from the first scored position on, and no KV cache is built. What is
    computed for a request is lm-eval's formula: log-softmax in the dtype of the logits, summed over the continuation.

    batch_size: rows a batch, or None for what fits the budgets of memory.py. A batch that runs out of GPU memory is
    halved. Raises Refused for logits that are not numbers, and for what lm-eval itself cannot score.
    """

    batch_size_per_gpu: Any
    _model: Any

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None = None, progress: bool = False) -> None:
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise Refused("the tokenizer has neither a bos nor an eos token: lm-eval cannot start a text with it")
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 32, trust_remote_code=None)
        self.rows = batch_size or 10**9
        self.progress = progress
        self.truncated = 0
        """Requests whose prompt was cut on the left to fit the model's context."""
        self.tokens = token_budget(self.device.type)
        self.logit_bytes = logit_budget(self.device.type)
        self.vocab = vocab_size(model.config)
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=not self.progress)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        # lm-eval hands its windows over in batches of this size; here they are batched later, all of them together
        size, self.batch_size_per_gpu = self.batch_size_per_gpu, 10**9
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=not self.progress)
        finally:
            self.batch_size_per_gpu = size

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def score(batch: Sequence[Row], asked: list[tuple[int, int]]) -> None:
            scored = self._score(batch, [(row, requests[i][2]) for row, i in asked])
            for (_, i), answer in zip(asked, scored, strict=True):
                answers[i] = answer

        self._in_batches(requests, [self._row(request) for request in requests], score)
        return answers

    def _in_batches(
        self,
        requests: Sequence[Request],
        rows: Sequence[Row],
        score: Callable[[Sequence[Row], list[tuple[int, int]]], None],
    ) -> None:
        """Call `score` with batches of rows, longest first, and (row in the batch, request) pairs that read them.

        rows: the row of each request; requests with the same row share it.
        """
        readers: dict[Row, list[int]] = {}
        for i, row in enumerate(rows):
            readers.setdefault(row, []).append(i)
        order = sorted(readers, key=lambda ids: (-len(ids), ids))
        need = {ids: max(len(requests[i][2]) for i in readers[ids]) for ids in order}  # scored positions, from the end

        def part(batch: Sequence[Row]) -> None:
            score(batch, [(row, i) for row, ids in enumerate(batch) for i in readers[ids]])

        with progress_bar(len(order), "prompts", "prompt", self.progress) as bar:
            start = 0
            while start < len(order):
                batch = order[start : start + self._rows_that_fit(order, start, need)]
                fitted = in_halves(batch, part)
                if fitted < len(batch):
                    self.tokens = fitted * len(batch[0])
                start += len(batch)
                bar.update(len(batch))

    def _row(self, request: Request) -> Row:
        """What the model reads for a request: all tokens but the last, cut on the left to the model's context."""
        strings, context, continuation = request
        if not context or not continuation:
            raise Refused(f"a task holds a prompt or an answer without tokens: {strings!r}")
        if len(continuation) > self.max_length:
            raise Refused(f"an answer of {len(continuation)} tokens is longer than the model's context of {self.max_length}")
        self.truncated += len(context) + len(continuation) > self.max_length + 1
        self._check_ids(max(max(context), max(continuation)))
        return tuple((context + continuation)[-(self.max_length + 1) : -1])

    def _check_ids(self, largest: int) -> None:
        if largest >= self.vocab:
            raise Refused(
                f"the tokenizer does not belong to this model: it makes token id {largest}, the model has {self.vocab} tokens"
            )

    def _rows_that_fit(self, order: list[Row], start: int, need: dict[Row, int]) -> int:
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

    def _score(self, batch: Sequence[Row], asked: list[tuple[int, list[int]]]) -> list[tuple[float, bool]]:
        """For each (row of the batch, continuation): its summed log-probability, and whether it is the greedy one."""
        ids_BT = padded(batch)
        width = ids_BT.shape[1]
        first = min(len(batch[row]) - len(tokens) for row, tokens in asked)
        logits_BKV = self._logits(ids_BT, width - first)
        # N scored tokens: all of them in a few large steps, so that a GPU is not waited for at every request
        at = [(row, p - first) for row, tokens in asked for p in range(len(batch[row]) - len(tokens), len(batch[row]))]
        row_N, position_N = torch.tensor(at, device=logits_BKV.device).T
        token_N = torch.tensor([t for _, tokens in asked for t in tokens], device=logits_BKV.device)
        values, greedy = [], []
        step = max(1, self.logit_bytes // (16 * self.vocab))  # a quarter of the budget
        for part in (slice(n, n + step) for n in range(0, len(at), step)):
            logp_NV = F.log_softmax(logits_BKV[row_N[part], position_N[part]], dim=-1)
            values.append(logp_NV.gather(1, token_N[part, None])[:, 0])
            greedy.append(logp_NV.argmax(dim=-1) == token_N[part])
        lengths = [len(tokens) for _, tokens in asked]
        sums = torch.stack([v.sum() for v in torch.cat(values).split(lengths)]).tolist()
        exact = torch.stack([g.all() for g in torch.cat(greedy).split(lengths)]).tolist()
        if any(value != value for value in sums):
            raise _not_numbers()
        return list(zip(sums, exact, strict=True))

    @torch.no_grad()
    def _logits(self, ids_BT: torch.Tensor, keep: int) -> torch.Tensor:
        """The logits (B, keep, V) of the last `keep` positions.

        Padding is on the right and causal attention never looks there, so no mask is needed (as in lm-eval).
        """
        more = {"logits_to_keep": keep} if self.keeps_logits else {}
        return self.model(ids_BT.to(self.device), use_cache=False, **more).logits[:, -keep:]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        truncated = self.truncated
        try:
            # Greedy search makes text of NaN without complaint: one prompt shows it.
            prompt = torch.tensor([self.tok_encode(requests[0].args[0])[-self.max_length :]], dtype=torch.long)
            if prompt.numel() and self._logits(prompt, 1).isnan().any():
                raise _not_numbers()
            return super().generate_until(requests, disable_tqdm=not self.progress)
        except AssertionError as error:  # lm-eval's word for a task that wants more tokens than the context holds
            raise Refused(f"lm-eval cannot generate for this task: {one_line(error)}") from error
        except torch.cuda.OutOfMemoryError as error:
            if self.batch_size_per_gpu == 1:
                raise Refused(f"generating does not fit on the GPU beside the model: {one_line(error)}") from error
        torch.cuda.empty_cache()
        self.truncated = truncated
        self.batch_size_per_gpu //= 2
        return self.generate_until(requests)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids_BT, mask_BT = super().tok_batch_encode(strings, padding_side, None, truncation)
        self._check_ids(int(ids_BT.max()))
        if left_truncate_len is None:
            return ids_BT, mask_BT
        self.truncated += int((mask_BT.sum(dim=1) > left_truncate_len).sum())
        return ids_BT[:, -left_truncate_len:], mask_BT[:, -left_truncate_len:]

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


def _not_numbers() -> Refused:
    return Refused("the model's logits are not numbers: its weights or this dtype overflow (try --dtype float32)")
