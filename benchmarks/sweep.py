"""The whole curve in one pass: against its layer and head applications timed alone, against each depth by itself, and
against lm-eval on requests shaped like MMLU.

    python benchmarks/sweep.py --device cuda --shape llama-2-7b --out benchmarks/sweep_7b.json
    python benchmarks/sweep.py --device cpu --model CHECKPOINT --dtype float32 --out benchmarks/sweep_cpu.json

Curves: the last-n one at every n, and the angular one at the starts that the paper's scripts hold for this number of layers
(arXiv 2403.17887). Both ways of measuring must give the same losses, or the benchmark fails. Weights of a shape are random:
they do not change the time. "alone": the applications that the counter counts, each timed by itself: one layer on the
batch's own arguments; the final norm and the head on the scored positions.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rank_speed import SHAPES, random_model
from record import write_record

STARTS = {
    32: "23 24 23 23 23 22 22 21 20 19 18 18 17 16 15 8 8 7 4 4 4 2 2 2",
    40: "33 32 31 30 29 28 27 27 27 26 25 24 24 23 22 22 20 19 18 18 17 17 15 3 3 3 3 3 3 3 3 3",
    80: "62 62 61 62 61 60 61 58 59 58 58 57 56 55 54 53 53 53 53 53 51 50 49 50 49 49 48 48 46 46 45 44 43 42 41 40 39 37 35 35 "
    "33 33 29 30 29 28 28 28 26 25 23 22 22 21 20 19 19 18 16 16 14 14 13 10",
}


def curves(layers: int, largest: int | None) -> dict[str, list[tuple[int, ...]]]:
    from layerprune.model.cuts import Block, last_block

    whole = tuple(range(layers))
    most = min(layers - 1, largest or layers)
    made = {"last": [whole, *(last_block(n, layers).kept(layers) for n in range(1, most + 1))]}
    if layers in STARTS:
        starts = [int(s) for s in STARTS[layers].split()][:most]
        made["angular"] = [whole, *(Block(start, n).kept(layers) for n, start in enumerate(starts, 1))]
    return made


class Clock:
    """Seconds and peak memory of a piece of work."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def __call__(self, work: Callable[[], Any]) -> tuple[float, int]:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts anew
        started = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return seconds, torch.cuda.max_memory_allocated() if self.cuda else _peak()

    def alone(self, work: Callable[[], Any], times: int) -> float:
        """Seconds of one call, the median of `times` after a warm-up; a GPU is given them all in a row."""
        work()
        if self.cuda:
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(times):
                work()
            torch.cuda.synchronize()
            return (time.perf_counter() - started) / times
        return statistics.median(self(work)[0] for _ in range(times))


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def counted(model: Any, layers: Any) -> Iterator[dict[str, int]]:
    """Counts what really runs: layers (by their first part, since a pass also calls layers that are replaced by
    recorders), heads, and the positions that the head sees."""
    count = {"layers": 0, "heads": 0, "head_positions": 0}

    def layer(module: Any, args: Any, kwargs: Any) -> None:
        count["layers"] += 1

    def head(module: Any, args: Any) -> None:
        count["heads"] += 1
        count["head_positions"] += args[0].shape[:-1].numel()

    hooks = [next(one.children()).register_forward_pre_hook(layer, with_kwargs=True) for one in layers]
    hooks.append(model.get_output_embeddings().register_forward_pre_hook(head))
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    from layerprune.eval.memory import logit_budget
    from layerprune.model.branches import Branches
    from layerprune.model.data import TokenBatch
    from layerprune.model.decoder import view_decoder, virtual_cut
    from layerprune.model.load import load_model
    from layerprune.model.loss import batch_nats

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--model", help="a checkpoint folder instead of random weights of a shape")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8, help="documents a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, help="the largest n of the curves")
    parser.add_argument("--prompts", type=int, default=64, help="MMLU-shaped prompts of 4 choices; 0 for none")
    parser.add_argument("--hflm-batch", default="16", help="lm-eval's batch sizes; the fastest counts")
    parser.add_argument("--out")
    given = parser.parse_args()
    clock = Clock(given.device)
    if given.model:
        model = load_model(Path(given.model), device=given.device, dtype=given.dtype)
    else:
        model = random_model(given.shape, given.device)
    decoder = view_decoder(model)
    layers, vocab = len(decoder), model.config.vocab_size
    maker = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocab, (given.batch, given.length), generator=maker)
    result: dict[str, Any] = {"loss": {}}
    for name, kept in curves(layers, given.largest).items():
        branches = Branches(decoder, kept, logit_budget(decoder.device.type))
        assert branches.shared and not branches.broken
        tree = branches.tree(branches.kept)
        asked = everything(ids_BT)
        losses: list[torch.Tensor] = []

        def together(branches: Any = branches, asked: Any = asked, losses: Any = losses) -> None:
            losses[:] = [branches.score(branches.kept, ids_BT, None, asked, dtype=torch.float32)[0]]

        single: list[float] = []

        def each(branches: Any = branches, single: Any = single) -> None:
            single.clear()
            for one in branches.kept:
                with virtual_cut(decoder, one):
                    single.append(sum(loss.nats for loss in batch_nats(decoder, TokenBatch(ids_BT, None, ()))))

        with counted(model, decoder.layers) as count:
            together()
        positions = given.batch * (given.length - 1)
        assert count["layers"] == tree.applications, (count, tree.applications)
        spare = count["head_positions"] - tree.heads * positions
        assert 0 <= spare < 0.01 * tree.heads * positions, (count, tree.heads * positions)
        layer, head = apart(decoder, ids_BT, clock)
        together()
        rounds = [(clock(together), clock(each)) for _ in range(given.rounds)]
        mine = losses[0].double().sum(dim=1).neg().tolist()
        worst = max(abs(a - b) for a, b in zip(mine, single, strict=True)) / given.batch
        assert worst < (1e-4 if model.dtype == torch.float32 else 2e-3 * single[0] / given.batch), worst
        alone = tree.applications * layer + tree.heads * head
        predicted = (tree.alone * layer + tree.heads * head) / alone
        factors = [b[0] / a[0] for a, b in rounds]
        result["loss"][name] = {
            "depths": len(kept),
            "layer_applications": tree.applications,
            "layer_applications_each_depth_by_itself": tree.alone,
            "head_applications": tree.heads,
            "hidden_states_at_once": tree.alive,
            "layer_seconds_alone": layer,
            "head_seconds_alone": head,
            "seconds": statistics.median(a[0] for a, _ in rounds),
            "over_alone": statistics.median(a[0] for a, _ in rounds) / alone,
            "seconds_each_depth_by_itself": statistics.median(b[0] for _, b in rounds),
            "factor": statistics.median(factors),
            "factors": [round(f, 3) for f in factors],
            "predicted_factor": predicted,
            "share_of_prediction": statistics.median(factors) / predicted,
            "peak_bytes": max(a[1] for a, _ in rounds),
            "peak_bytes_each_depth_by_itself": max(b[1] for _, b in rounds),
            "worst_difference_nats_a_document": worst,
        }
        print(name, result["loss"][name], flush=True)
    if given.prompts:
        result["mmlu_shaped"] = requests(model, decoder, given, clock)
    shape = {
        "hidden": model.config.hidden_size,
        "layers": layers,
        "vocab": vocab,
        "dtype": str(model.dtype),
        "length": given.length,
        "batch": given.batch,
    }
    write_record(given.out, given.device, shape, result)


def everything(ids_BT: torch.Tensor) -> Any:
    """Every token of a document but its first is asked."""
    from layerprune.model.branches import Asked

    rows, tokens = ids_BT.shape
    row_N = torch.arange(rows).repeat_interleave(tokens - 1)
    return Asked.make(row_N, torch.arange(tokens - 1).repeat(rows), ids_BT[:, 1:].flatten(), tokens)


@torch.no_grad()
def apart(decoder: Any, ids_BT: torch.Tensor, clock: Clock) -> tuple[float, float]:
    """Seconds of one layer on this batch (mean over a few layers), and of the final norm and the head on all but the last
    position of each document."""
    from layerprune.model.layerwise import Layerwise

    batch = Layerwise(decoder).begin(ids_BT)
    state = batch.start()
    some = [0, len(decoder) // 2, len(decoder) - 1]
    layer = statistics.mean(clock.alone(lambda i=i: batch.step(i, state), 10) for i in some)
    scored = state.hidden[:, :-1].reshape(1, -1, state.hidden.shape[-1])
    norm, head = decoder.model.base_model.norm, decoder.model.get_output_embeddings()
    return layer, clock.alone(lambda: head(norm(scored)), 10)


def requests(model: Any, decoder: Any, given: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Five examples and a question, four answers of one token: all depths of the last-n curve against lm-eval's own model
    on the whole one."""
    from lm_eval.models.huggingface import HFLM

    from layerprune.eval.answers import Answers
    from layerprune.eval.memory import logit_budget
    from layerprune.eval.sweep import BranchedModel
    from layerprune.model.branches import Branches

    rng = random.Random(0)
    tokenizer = any_tokenizer(model.config.vocab_size)
    asked = []
    for number in range(given.prompts):
        context = rng.choices(range(5, model.config.vocab_size), k=rng.randint(500, 900))
        asked += [((f"prompt {number}", f"answer {k}"), context, [10 + k]) for k in range(4)]
    kept = curves(len(decoder), given.largest)["last"]
    all_depths, one_depth = Branches(decoder, kept, logit_budget(decoder.device.type)), Branches(decoder, kept[:1], 1 << 30)
    answers: dict[str, list[Any]] = {}

    def ours(branches: Any, name: str) -> Callable[[], None]:
        lm = BranchedModel(branches, tokenizer, Answers(), None, False, print)

        def work() -> None:
            lm.store = Answers()
            answers[name] = lm._loglikelihood_tokens(asked)

        return work

    def theirs(size: int) -> Callable[[], None]:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)

        def work() -> None:
            answers["lm-eval"] = lm._loglikelihood_tokens(asked, disable_tqdm=True)

        return work

    every, whole = ours(all_depths, "all"), ours(one_depth, "one")
    sizes = [int(size) for size in given.hflm_batch.split(",")]
    for work in (every, whole, *map(theirs, sizes)):
        work()
    worst = max(abs(a[0] - b[0]) for a, b in zip(answers["one"], answers["lm-eval"], strict=True))
    rounds = [(clock(every), clock(whole), min(clock(theirs(size)) for size in sizes)) for _ in range(given.rounds)]
    tree = all_depths.tree(all_depths.kept)
    over = statistics.median(a[0] / c[0] for a, _, c in rounds)
    return {
        "prompts": given.prompts,
        "requests": len(asked),
        "seconds_all_depths": statistics.median(a[0] for a, _, _ in rounds),
        "seconds_whole_model": statistics.median(b[0] for _, b, _ in rounds),
        "seconds_lm_eval_whole_model": statistics.median(c[0] for _, _, c in rounds),
        "whole_model_over_lm_eval": statistics.median(b[0] / c[0] for _, b, c in rounds),
        "all_depths_over_lm_eval": over,
        "layer_applications_over_whole": tree.applications / len(decoder),
        "a_depth_over_lm_eval": over / len(kept),
        "peak_bytes_all_depths": max(a[1] for a, _, _ in rounds),
        "peak_bytes_lm_eval": max(c[1] for _, _, c in rounds),
        "worst_difference_nats": worst,
    }


def any_tokenizer(vocab: int) -> Any:
    """lm-eval wants a tokenizer; the requests are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


if __name__ == "__main__":
    main()
