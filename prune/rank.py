"""Angular distance of every block from one pass over the data (arXiv 2403.17887, section 3.2)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import must_not_exist, read_json, write_json


def angles_L1L1(states_LD: Any) -> Any:
    """Angular distance between all pairs of states: arccos(cosine) / pi, in [0, 1].

    states_LD: (..., L+1, D). Returns float64 (..., L+1, L+1): 0 for the same direction, 0.5 for orthogonal, 1 for
    opposite; unchanged when a state is scaled. Computed as 2 atan2(|u-v|, |u+v|) of unit vectors, which keeps its
    precision where arccos of a float cosine near 1 does not.
    """
    import torch

    unit = states_LD.double()
    unit = unit / unit.norm(dim=-1, keepdim=True)
    exact = "donot_use_mm_for_euclid_dist"  # the matrix-product form would cancel for nearby states
    apart = torch.cdist(unit, unit, compute_mode=exact)
    along = torch.cdist(unit, -unit, compute_mode=exact)
    return 2 * torch.atan2(apart, along) / math.pi


class DistanceSum:
    """Accumulates angular distances over samples; the mean is taken once, at the end.

    `update` takes (B, L+1, D) states of last tokens, `distances` gives the triangle of rank.json.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.samples = 0
        self.total: Any = None

    def update(self, states_BLD: Any) -> None:
        angles = angles_L1L1(states_BLD).sum(dim=0).cpu()
        self.total = angles if self.total is None else self.total + angles
        self.samples += states_BLD.shape[0]

    def distances(self) -> list[list[float]]:
        """Row n-1 (n = 1..L-1) holds the mean distance d(x^(l), x^(l+n)) for l = 0..L-n."""
        mean = self.total / self.samples
        return [[mean[l, l + n].item() for l in range(self.layers - n + 1)] for n in range(1, self.layers)]  # noqa: E741


def best_starts(distance: list[list[float]]) -> dict[str, int]:
    """For every n the start l*(n) of the block with the smallest distance; the lowest start on ties."""
    return {str(n): row.index(min(row)) for n, row in enumerate(distance, 1)}


def last_token_states(decoder: Any, batch: Any) -> Any:
    """States of each row's last real token at all depths: (B, L+1, D), x^(L) before the final norm.

    Only these vectors are kept: (L+1) x D numbers a sample, whatever its length.
    """
    import torch

    from layerprune.model.decoder import walk_states

    rows, width = batch.ids_BT.shape
    last = last_positions(rows, width, batch.mask_BT)
    kind = type(decoder.model).__name__
    picked: list[Any] = []

    def see(layer: int, states_BTD: Any) -> None:
        picked.append(at_positions(states_BTD, last, width, kind))

    walk_states(decoder, batch.ids_BT, batch.mask_BT, see)
    if len(picked) != len(decoder) + 1:
        raise Refused(
            f"this {kind} runs {len(picked) - 1} of its {len(decoder)} layers on text alone: their states cannot be compared"
        )
    device = picked[0].device
    return torch.stack([p.to(device) for p in picked], dim=1)


def last_positions(rows: int, width: int, mask_BT: Any) -> Any:
    """The position of each row's last real token, (rows,)."""
    import torch

    return torch.full((rows,), width - 1) if mask_BT is None else width - 1 - mask_BT.flip(1).argmax(1)


def at_positions(states_BTD: Any, last_B: Any, width: int, kind: str) -> Any:
    """The states (rows, features) at these positions; Refused for states that are laid out in another way."""
    import torch

    rows, device = len(last_B), states_BTD.device
    if states_BTD.shape[:2] != (rows, width):
        raise Refused(
            f"the states of this {kind} are {tuple(states_BTD.shape)} for {rows} documents of {width} tokens: its layers are laid "
            "out in a way that is not supported"
        )
    return states_BTD[torch.arange(rows, device=device), last_B.to(device)]


def rank_decoder(
    decoder: Any,
    sequences: list[list[int]],
    *,
    max_tokens: int | None = None,
    pad_id: int = 0,
    padding_side: str = "right",
    progress: Callable[[int], None] = lambda rows: None,
) -> list[list[float]]:
    """Distances of all blocks of a live decoder over tokenised samples: the triangle of rank.json.

    One forward pass without the head; a batch that runs out of GPU memory is halved. Raises Refused when a state is not
    finite or is the zero vector, and where one document does not fit.
    """

    from layerprune.model.data import TokenBatch, batches
    from layerprune.model.memory import in_halves

    if max_tokens is None:
        max_tokens = 16384 if decoder.device.type != "cpu" else 2048
    total = DistanceSum(len(decoder))

    def add(part: Sequence[int], batch: TokenBatch) -> None:
        if len(part) < len(batch.rows):
            again = [sequences[batch.rows[row]] for row in part]
            (batch,) = batches(again, sum(map(len, again)) * len(again), pad_id, padding_side)
        states = last_token_states(decoder, batch)
        must_be_numbers(states)
        total.update(states)

    for batch in batches(sequences, max_tokens, pad_id, padding_side):
        in_halves(range(len(batch.rows)), functools.partial(add, batch=batch))
        progress(len(batch.rows))
    return total.distances()


def must_be_numbers(states_BLD: Any) -> None:
    """Raise Refused where a state is not finite, or the zero vector, which has no direction."""
    import torch

    sizes = states_BLD.double().norm(dim=-1)
    bad = ~torch.isfinite(sizes) | (sizes == 0)
    if bad.any():
        depth = int(bad.any(0).nonzero()[0])
        what = "zero" if (sizes[:, depth] == 0).any() else "not a number"
        where = "the embedding" if depth == 0 else f"layer {depth - 1}"
        raise Refused(
            f"the activations after {where} are {what}: the weights are broken or overflow in this dtype (try --dtype float32)"
        )


def rank_blocks(
    model: str | Path,
    *,
    data: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    memory: str | int | None = None,
    ram: str | int | None = None,
    out: str | Path | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Rank all blocks of a model by angular distance, in one pass over the data.

    A model that does not fit in memory (or in `memory` of the GPU and `ram` of the host, where they are given: bytes or
    text such as `8GiB`) is not loaded: its layers come from its files one at a time, and `say` is told the plan first;
    with `keep`, the name of a folder, a call that is killed meanwhile goes on at the layer where it stopped (the caller
    removes it).

    model: recipe name, Hub id or folder. Options left at None come from the model's recipe, else: C4 validation,
    256 samples, 2048 tokens or the model's context. Returns (and writes to `out`) the content of rank.json:
    `layers` L; `distance`, row n-1 for n = 1..L-1 with d for start l = 0..L-n, in [0, 1] (0: the block turns the
    state of the last token by nothing); `best` {n: start}; `model` and `checkpoint`, what was ranked; `settings`.
    Raises UsageError or Refused (model, data, device, activations that are not finite).
    """
    from layerprune.model.budget import streaming_budget
    from layerprune.model.config import load_config, pick_length
    from layerprune.model.data import check_data
    from layerprune.model.decoder import view_decoder
    from layerprune.model.files import made_folder
    from layerprune.model.load import load_model, load_tokenizer, pick_device, pick_dtype
    from layerprune.model.source import find_model
    from layerprune.model.stream import StreamedModel

    if out is not None:
        must_not_exist(Path(out))
    source = find_model(str(model))
    settings = rank_settings(source, data, samples, length)
    check_data(settings["data"], "--calibration", "validation", seed)
    pick_dtype(dtype, pick_device(device))
    pick_length(settings["length"], load_config(source.folder, trust_remote_code))
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    budget = streaming_budget(
        source.folder, device=device, dtype=dtype, memory=memory, ram=ram, trust_remote_code=trust_remote_code
    )
    if budget is not None:
        say(f"{source.name}: {budget.why}")
        streamed = StreamedModel(source.folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        result = rank_from_disk(streamed, tokenizer, settings, source, budget, seed=seed, progress=progress, say=say, keep=keep)
    else:
        live = load_model(source.folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress)
        result = rank_live(view_decoder(live), tokenizer, settings, source, seed=seed, progress=progress)
    if out is not None:
        with made_folder(Path(out).absolute().parent):
            write_json(Path(out), result)
    return result


def rank_settings(source: Any, data: str | None, samples: int | None, length: int | None) -> dict[str, Any]:
    """The data settings of a ranking: what the user gave, else the recipe's, else the defaults."""
    from layerprune.model.recipes import RankSettings, section_of

    base = section_of(source.recipe, RankSettings)
    if samples is not None and samples < 1:
        raise UsageError(f"--samples {samples} is not a number above 0")
    return {"data": data or base.data, "samples": samples or base.samples, "length": base.length if length is None else length}


def rank_live(
    decoder: Any, tokenizer: Any, settings: dict[str, Any], source: Any, *, seed: int = 0, progress: bool = False
) -> dict[str, Any]:
    """`rank_blocks` for a model that is loaded already from `source`; settings as `rank_settings` gives them."""

    def measure(sequences: list[list[int]], pad_id: int) -> tuple[list[list[float]], dict[str, Any]]:
        from layerprune.model.progress import progress_bar

        with progress_bar(len(sequences), "rank", "doc", progress) as bar:
            return rank_decoder(decoder, sequences, pad_id=pad_id, progress=bar.update), {}

    return _rank(decoder, tokenizer, settings, source, measure, seed, progress)


def rank_from_disk(
    streamed: Any, tokenizer: Any, settings: dict[str, Any], source: Any, budget: Any, *,
    seed: int = 0, progress: bool = False, say: Callable[[str], None] = lambda line: None, keep: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`rank_live` for a model whose layers come from its files one at a time (`layerprune.model.stream`)."""

    def measure(sequences: list[list[int]], pad_id: int) -> tuple[list[list[float]], dict[str, Any]]:
        from layerprune.prune.rank_streamed import rank_streamed

        before = streamed.read
        distance, plan = rank_streamed(streamed, sequences, budget, pad_id=pad_id, say=say, progress=progress, keep=keep)
        passes = {"passes": len(plan.groups), "bytes_read": streamed.read - before, "scratch": plan.file}
        return distance, {"streamed": passes, "dtype": streamed.dtype}

    return _rank(streamed.decoder, tokenizer, settings, source, measure, seed, progress)


def _rank(
    decoder: Any, tokenizer: Any, settings: dict[str, Any], source: Any,
    measure: Callable[[list[list[int]], int], tuple[list[list[float]], dict[str, Any]]], seed: int, progress: bool,
) -> dict[str, Any]:  # fmt: skip
    """Read the documents, measure, and put the ranking together."""
    from layerprune.model.config import pick_length, vocab_size
    from layerprune.model.data import data_fingerprint, read_documents, tokenise
    from layerprune.model.fingerprint import checkpoint_fingerprint
    from layerprune.model.load import dtype_name

    config = decoder.model.config
    length = pick_length(settings["length"], config)
    documents = read_documents(settings["data"], "validation", settings["samples"], seed)
    sequences = tokenise(tokenizer, documents, length, vocab=vocab_size(config), progress=progress)
    started = time.perf_counter()
    # padding is masked, so any id will do that the model has an embedding for
    pad_id = tokenizer.pad_token_id if 0 <= (tokenizer.pad_token_id or 0) < vocab_size(config) else 0
    distance, how = measure(sequences, pad_id or 0)
    return {
        "model": source.name,
        "checkpoint": checkpoint_fingerprint(source.folder),
        "layers": len(decoder),
        "distance": distance,
        "best": best_starts(distance),
        "settings": {
            **settings,
            "data_fingerprint": data_fingerprint(settings["data"]),
            "length": length,
            "documents": len(sequences),
            "tokens": sum(map(len, sequences)),
            "seed": seed,
            "dtype": dtype_name(decoder.model),
            "device": str(decoder.device),
            "token": "last real token of each document",
            **how,
        },
        "seconds": round(time.perf_counter() - started, 3),
    }


def read_ranking(given: str | Path | Mapping[str, Any], source: Any, layers: int) -> dict[str, Any]:
    """A ranking of `source`, from rank.json, from the folder that holds it, or from its content.

    Raises Refused when it is none, UsageError when it ranks another checkpoint.
    """
    if isinstance(given, Mapping):
        path, ranking = "the ranking", dict(given)
    else:
        path = str(Path(given) / "rank.json" if Path(given).is_dir() else given)
        ranking = read_json(Path(path))
    _check_ranking(path, ranking, source, layers)
    return ranking


def _check_ranking(path: str, ranking: Any, source: Any, layers: int) -> None:
    from layerprune.model.fingerprint import checkpoint_fingerprint

    rows = ranking.get("distance") if isinstance(ranking, dict) else None
    found = ranking.get("layers") if isinstance(ranking, dict) else None
    whole = (
        isinstance(found, int)
        and isinstance(rows, list)
        and len(rows) == found - 1
        and all(isinstance(r, list) and len(r) == found - n + 1 for n, r in enumerate(rows, 1))
        and all(isinstance(d, int | float) and 0 <= d <= 1 for r in rows for d in r)
        and ranking.get("best") == best_starts(rows)
    )
    if not whole:
        raise Refused(f"{path} is not a ranking written by `layerprune rank`")
    if found != layers:
        raise UsageError(f"{path} ranks a model of {found} layers, this one has {layers}")
    if ranking.get("checkpoint", "") != checkpoint_fingerprint(source.folder):
        raise UsageError(
            f"{path} ranks another checkpoint ({ranking.get('model', 'it does not say which')}), not {source.name}: rank this one, "
            "or take a block from there with --layers A:B"
        )
