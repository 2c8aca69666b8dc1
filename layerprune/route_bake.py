"""`layerprune route bake`: layers that the routers skip on all of somebody's prompts, handed over to `prune`."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerprune.model.config import layer_count, load_config, pick_length, vocab_size
from layerprune.model.cuts import Kept, runs
from layerprune.model.data import check_data, check_seed, data_fingerprint, read_documents, tokenise
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import read_json
from layerprune.model.fingerprint import checkpoint_fingerprint, folder_fingerprint, tokenizer_fingerprint
from layerprune.model.source import ModelSource, find_model
from layerprune.route_use import find_routers
from layerprune.runfolder import open_run
from layerprune.stages import Say, to_stderr

_KIND = "route bake"
_NEAREST = 3


def bake_routing(
    model: str | Path,
    routers: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    items: str | Path | None = None,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    eval_data: str | None = None,
    dial: str | float = "router",
    always: float = 1.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    progress: bool = False,
    say: Say = to_stderr,
) -> dict[str, Any]:
    """Ask the routers about prompts, and say which layers a static cut could drop.

    The prompts are those of tasks or items (as in `evaluate_routing`; by default the training documents), or the documents of
    `eval_data` (a file, or c4; `limit` of them, 256 by default). always: the share of prompts, above 0 to 1, on which a layer
    must be skipped to count as always skipped; at 1 the cut model is the routed one on these prompts where nothing else
    is skipped or repeated.

    out: the folder, by default runs/<model>-baked; it gets cut.json. Returns its content with `folder`: by layer the shares of
    prompts that skip, execute and repeat it, `paths` (how many different ones, and the share of the most frequent), `dropped`
    and `kept` (the layers always skipped, and the rest), `blocks` (their runs, half-open, the deepest first), `commands` that
    cut them, one a block, `same` (the share of prompts on which the cut model is the routed one), and `nearest`, the layers
    skipped most. refused: why a cut of them cannot be written, None where it can. Nothing is cut. Raises UsageError and Refused.
    """
    from layerprune.model.load import pick_device, pick_dtype
    from layerprune.route.router import parse_dial
    from layerprune.route_items import want_items

    if not 0 < always <= 1:
        raise UsageError(f"--always {always:g} is no share of the prompts: use more than 0 and at most 1")
    value = parse_dial(dial)
    pick_dtype(dtype, pick_device(device))
    check_seed(seed)
    source = find_model(str(model))
    if not tasks and items is None and eval_data is None:
        raise UsageError("the prompts are missing: give --tasks, --items or --eval-data")
    if eval_data is None:
        wanted: Any = want_items(
            source, tasks=tasks, items=items, task_folder=task_folder, limit=limit, split=split, default=("train",), seed=seed,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        asked = wanted.inputs()
    else:
        if tasks or items is not None:
            raise UsageError("--eval-data gives the prompts: leave --tasks and --items out")
        if limit is not None and limit < 1:
            raise UsageError(f"--limit {limit} is not a number above 0")
        check_data(eval_data, "--eval-data", "validation", seed)
        wanted, asked = None, {"data": data_fingerprint(eval_data), "limit": limit}
    place, _ = find_routers(Path(routers), source)
    inputs = {
        "kind": _KIND, "model": checkpoint_fingerprint(source.folder), "tokenizer": tokenizer_fingerprint(source.folder),
        "routers": folder_fingerprint(place), "prompts": asked, "dial": value, "always": always, "seed": seed, "dtype": dtype,
        "device": pick_device(device),
    }  # fmt: skip
    folder = Path(out) if out is not None else Path("runs") / f"{source.label}-baked"
    with open_run(folder, inputs, {"model": source.name, "routers": str(routers)}) as opened:

        def make() -> dict[str, Any]:
            prompts = _prompts(source, wanted, eval_data, limit, seed, trust_remote_code)
            say(f"{source.name}: deciding the paths of {len(prompts):,} prompts")
            paths = _paths(source, place, prompts, value, dtype, device, trust_remote_code, progress)
            found = cut_of(paths, always)
            refused = _refusal(source, tuple(found["kept"]), trust_remote_code) if found["dropped"] else None
            orders = [] if refused else prune_orders(source.name, found["blocks"], folder, trust_remote_code)
            return {"model": source.name, **found, "commands": orders, "refused": refused, "dial": value}

        with opened.phase("bake"):
            result = opened.once("cut.json", make)
        opened.finish(result)
        return {**result, "folder": str(folder)}


def _prompts(
    source: ModelSource, wanted: Any, data: str | None, limit: int | None, seed: int, trust: bool
) -> list[tuple[int, ...]]:
    """Token ids of the prompts; a text is its own prompt."""
    from layerprune.model.load import load_tokenizer
    from layerprune.route_items import read_items

    tokenizer = load_tokenizer(source.folder, trust)
    if data is None:
        return [item.prompt for item in read_items(wanted, tokenizer).items]
    config = load_config(source.folder, trust)
    documents = read_documents(data, "validation", limit or 256, seed)
    return [tuple(ids) for ids in tokenise(tokenizer, documents, pick_length(None, config), vocab=vocab_size(config))]


def _paths(
    source: ModelSource, routers: Path, prompts: Sequence[Sequence[int]], dial: float, dtype: str, device: str | None, trust: bool,
    progress: bool,
) -> list[tuple[int, ...]]:  # fmt: skip
    from layerprune.model.decoder import view_decoder
    from layerprune.model.load import load_model
    from layerprune.model.progress import progress_bar
    from layerprune.route.routed import RoutedModel
    from layerprune.route.router_file import load_routers

    live = load_model(source.folder, device=device, dtype=dtype, trust_remote_code=trust, progress=progress)
    routed = RoutedModel(view_decoder(live), load_routers(routers, source.folder), dial)
    found: list[tuple[int, ...]] = []
    with progress_bar(len(prompts), "paths", "prompt", progress) as bar:
        for start in range(0, len(prompts), 256):
            part = prompts[start : start + 256]
            found += routed.decide(part)
            bar.update(len(part))
    return found


def cut_of(paths: Sequence[tuple[int, ...]], always: float = 1.0) -> dict[str, Any]:
    """What paths say about a static cut: see `bake_routing`."""
    layers, prompts = len(paths[0]), len(paths)
    share = {
        name: [sum(counts[layer] == count for counts in paths) / prompts for layer in range(layers)]
        for count, name in enumerate(("skip", "execute", "repeat"))
    }
    dropped = [layer for layer in range(layers) if share["skip"][layer] >= always]
    kept = tuple(layer for layer in range(layers) if layer not in dropped)
    if not kept:
        raise UsageError(f"--always {always:g} drops all {layers} layers; at least one must stay: use a larger share")
    alone = tuple(int(layer in kept) for layer in range(layers))
    ((often, times),) = Counter(paths).most_common(1)
    nearest = sorted(range(layers), key=lambda layer: (-share["skip"][layer], layer))[:_NEAREST]
    return {
        "layers": layers, "prompts": prompts, "always": always, **share,
        "paths": {"different": len(set(paths)), "most_frequent": "".join(map(str, often)), "share": times / prompts},
        "dropped": dropped, "kept": list(kept), "blocks": [list(run) for run in reversed(runs(dropped))],
        "same": sum(counts == alone for counts in paths) / prompts,
        "nearest": [[layer, share["skip"][layer]] for layer in nearest],
    }  # fmt: skip


def prune_orders(model: str, blocks: Sequence[Sequence[int]], folder: Path, trust: bool = False) -> list[str]:
    """The commands that cut these blocks, one after another, from the deepest on: what lies before keeps its indices."""
    found = []
    for place, (start, stop) in enumerate(blocks, 1):
        out = str(folder / ("pruned" if place == len(blocks) else f"pruned-{place}"))
        order = ["layerprune", "prune", "--model", model, "--layers", f"{start}:{stop}", "--out", out]
        found.append(shlex.join([*order, *(["--trust-remote-code"] if trust else [])]))
        model = out
    return found


def _refusal(source: ModelSource, kept: Kept, trust: bool) -> str | None:
    """Why this architecture has no checkpoint of these layers."""
    from layerprune.model.plan import plan_cut
    from layerprune.model.surgery import cut_config
    from layerprune.model.tensors import read_checkpoint

    try:
        config = load_config(source.folder, trust)
        plan = plan_cut(read_checkpoint(source.folder), layer_count(config), kept)
        cut_config(read_json(source.folder / "config.json"), config, kept, plan.extra, plan.renamed)
    except Refused as refusal:
        return str(refusal)
    return None
