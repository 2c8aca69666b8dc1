"""A routed model behind lm-eval: every prompt is answered along its own path."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from layerprune.eval.harness import LiveModel, Request
from layerprune.model.decoder import Decoder
from layerprune.model.layerwise import Layerwise
from layerprune.model.progress import progress_bar
from layerprune.route.execute import run_path
from layerprune.route.paths import Counts, whole_path
from layerprune.route.routed import RoutedModel


class RoutedLM(LiveModel):
    """lm-eval's model over a `RoutedModel`: its tokenisation, truncation and metrics, and the routers' paths.

    The context alone decides: all continuations of a context share one path, and a generated text goes along the path of its
    prompt. A request without a context (an empty one, and the windows of rolling log-likelihoods) is not routed: the whole
    model answers. A context that is too long counts as far as the model's context reaches, from its end. Requests of one path
    are batched together; results are those of the path run by itself, to the bit at equal tensor shapes.

    taken: the path of every context so far, by its text. seconds: what answering took (deciding, passes, generating), without
    tokenising and without what is done once a path (`RoutedModel.built_seconds`). Raises what `LiveModel` and `RoutedModel` raise.
    """

    def __init__(self, routed: RoutedModel, tokenizer: Any, batch_size: int | None = None, progress: bool = False) -> None:
        super().__init__(routed.decoder.model, tokenizer, batch_size, progress)
        self.routed = routed
        self.whole = whole_path(len(routed.decoder))
        self.taken: dict[str, Counts] = {}
        self.seconds = 0.0
        self._layerwise = Layerwise(routed.decoder)
        self._along = self.whole
        self._texts: Sequence[str] = ()

    def warm_up(self) -> None:
        """One short prompt through all that is timed."""
        prompt = [self.prefix_token_id] * 8
        for counts in (self.whole, self.routed.decide([prompt])[0]):
            self._along = counts
            self._logits(torch.tensor([prompt]), 1)
        self._along = self.whole

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        started = time.perf_counter()
        groups: dict[Counts, list[int]] = {}
        for i, counts in enumerate(self._paths(requests)):
            groups.setdefault(counts, []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        shown, self.progress = self.progress, False
        try:
            with progress_bar(len(requests), "routed", "request", shown) as bar:
                for self._along, members in groups.items():
                    found = super()._loglikelihood_tokens([requests[i] for i in members])
                    for i, answer in zip(members, found, strict=True):
                        answers[i] = answer
                    bar.update(len(members))
        finally:
            self._along, self.progress = self.whole, shown
        self.seconds += time.perf_counter() - started
        return answers

    def _paths(self, requests: Sequence[Request]) -> list[Counts]:
        """The path of each request."""
        texts = [request[0][0] if request[0] is not None and request[0][0].strip() else None for request in requests]
        asked = {text: request[1] for text, request in zip(texts, requests, strict=True) if text is not None and request[1]}
        self._decide({text: ids for text, ids in asked.items() if text not in self.taken})
        return [self.whole if text is None else self.taken.get(text, self.whole) for text in texts]

    def _decide(self, contexts: dict[str, list[int]]) -> None:
        if contexts:
            self._check_ids(max(map(max, contexts.values())))
            decided = self.routed.decide([ids[-self.max_length :] for ids in contexts.values()])
            self.taken |= zip(contexts, decided, strict=True)

    def _logits(self, ids_BT: torch.Tensor, keep: int) -> torch.Tensor:
        if self._along == self.whole:
            return super()._logits(ids_BT, keep)
        rows, tokens = ids_BT.shape
        with torch.no_grad():
            batch = self._layerwise.begin(ids_BT)
            state = run_path(self._layerwise, batch, batch.start(), self._along)
            row_N = torch.arange(rows).repeat_interleave(keep)
            position_N = torch.arange(tokens - keep, tokens).repeat(rows)
            return batch.logits(state, row_N, position_N).view(rows, keep, -1)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self._texts = strings  # lm-eval encodes a batch, and generates from it at once
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        mask_BT = kwargs.pop("attention_mask")
        generate, made = super()._model_generate, dict[int, torch.Tensor]()
        started, built = time.perf_counter(), self.routed.built_seconds

        def work(routed: Decoder, rows: Sequence[int]) -> Sequence[torch.Tensor]:
            at = [ours[row] for row in rows]
            return list(generate(context[at], max_length, stop, attention_mask=mask_BT[at], **kwargs))

        ours = [row for row, text in enumerate(self._texts) if not text.strip()]
        if ours:
            made |= zip(ours, work(self.routed.decoder, range(len(ours))), strict=True)
        ours = [row for row in range(len(self._texts)) if row not in made]
        if ours:
            for row, (ids_T, counts) in zip(ours, self.routed.by_path(context[ours], mask_BT[ours], work), strict=True):
                made[row], self.taken[self._texts[row]] = ids_T, counts
        self.seconds += time.perf_counter() - started - (self.routed.built_seconds - built)
        rows = [made[row] for row in range(len(self._texts))]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float(self.tokenizer.pad_token_id))
