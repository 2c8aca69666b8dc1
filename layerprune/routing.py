"""`layerprune route search` and `route train`: paths for prompts with known answers, and the routers that learn them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.model.config import layer_count, load_config
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import read_json
from layerprune.model.fingerprint import checkpoint_fingerprint, tokenizer_fingerprint
from layerprune.model.source import ModelSource, find_model
from layerprune.runfolder import MANIFEST, RunFolder, open_run
from layerprune.stages import Say, to_stderr

SEARCH, TRAINING = "route search", "route train"
PATHS, ROUTERS = "paths.jsonl", "routers"


def search_routing(
    model: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    items: str | Path | None = None,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    simulations: int = 50,
    length_penalty: float = 3.0,
    exploration: float = 1.8,
    random_share: float = 0.1,
    longest_skip: int = 2,
    stop_shorter: int | None = 2,
    jobs: int = 1,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    progress: bool = False,
    say: Say = to_stderr,
) -> dict[str, Any]:
    """Search for each item a short path of layers that answers it (arXiv 2510.12773, section 4).

    tasks: lm-eval tasks of multiple choice or with short answers; items: instead of them, a file (`load_items`). limit: items
    of each task. split: documents of the tasks, by default those for training. The settings of the search are those of
    `SearchSettings`. jobs: processes; what is found does not depend on them.

    out: the folder, by default runs/<model>-paths; it gets paths.jsonl (a line an item) and search.json. A killed call goes
    on, item by item. Returns search.json's content with `folder`: layers, settings, left_out (documents that cannot be routed,
    by task and reason), and of all items (`all`) and by task the counts of `summary`, `passes` and the shares `shorter_share`,
    `improved_share` and `run_share`, layer applications made of those of running each path by itself. Raises UsageError and
    Refused.
    """
    from layerprune.model.load import pick_device, pick_dtype
    from layerprune.route.search import SearchSettings
    from layerprune.route_items import want_items

    settings = SearchSettings(simulations, exploration, length_penalty, random_share, longest_skip, stop_shorter)
    if jobs < 1:
        raise UsageError(f"--jobs {jobs} is not a number of processes above 0")
    pick_dtype(dtype, pick_device(device))
    source = find_model(str(model))
    wanted = want_items(
        source, tasks=tasks, items=items, task_folder=task_folder, limit=limit, split=split, default=("train",), seed=seed,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    folder = Path(out) if out is not None else Path("runs") / f"{source.label}-paths"
    layers, base = layer_count(load_config(source.folder, trust_remote_code)), checkpoint_fingerprint(source.folder)
    inputs = {
        "kind": SEARCH, "model": base, "tokenizer": tokenizer_fingerprint(source.folder), "items": wanted.inputs(),
        "settings": vars(settings), "seed": seed, "dtype": dtype, "device": pick_device(device),
    }  # fmt: skip
    with open_run(folder, inputs, {"model": source.name, **wanted.told()}) as opened:
        if opened.other_versions():
            say(opened.other_versions())
        if not (folder / "search.json").exists():
            with opened.phase("search"):
                _search(opened, wanted, base, layers, settings, seed, dtype, device, jobs, progress, say)
        result = opened.once("search.json", dict)
        opened.finish(result)
        return {**result, "folder": str(folder)}


def _search(
    opened: RunFolder, wanted: Any, base: str, layers: int, settings: Any, seed: int, dtype: str, device: str | None, jobs: int,
    progress: bool, say: Say,
) -> None:  # fmt: skip
    """Make paths.jsonl and search.json."""
    from layerprune.model.load import load_tokenizer
    from layerprune.model.progress import progress_bar
    from layerprune.route.labels import write_records
    from layerprune.route_items import read_items
    from layerprune.route_jobs import Search, forget_empty, search_items

    source: ModelSource = wanted.source
    read = read_items(wanted, load_tokenizer(source.folder, wanted.trust))
    for task, why in read.left_out.items():
        say(f"{task}: left out: {', '.join(f'{count} with {what}' for what, count in why.items())}")
    say(f"{source.name}: {layers} layers, {len(read.items):,} items, up to {settings.simulations} simulations each")
    search = Search(source.folder, base, layers, read.items, settings, seed, dtype, device, wanted.trust)
    try:
        with progress_bar(len(read.items), "search", "item", progress) as bar:
            records = search_items(search, opened.work, jobs, bar.update)
    except BaseException:
        forget_empty(opened.work)
        raise
    write_records(opened.path / PATHS, base, records, read.items, layers, settings, seed)
    told = {"model": source.name, "layers": layers, "settings": vars(settings), "seed": seed, "left_out": read.left_out}
    tasks = dict.fromkeys(record["task"] for record in records)
    each = {task: _counts([record for record in records if record["task"] == task]) for task in tasks}
    opened.once("search.json", lambda: {**told, "all": _counts(records), "tasks": each})


def _counts(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from layerprune.route.labels import summary

    found = summary([dict(record) for record in records])
    return {
        **found,
        "passes": found["visited"] + found["items"],
        "improved_share": found["improved"] / found["items"],
        "shorter_share": found["shorter"] / found["items"],
        "run_share": found["applications"] / found["alone"],
    }


def train_routing(
    search: str | Path,
    *,
    epochs: int = 25,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    batch_size: int = 16,
    warm_up: int = 500,
    held_out: float = 0.1,
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    model: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = False,
    say: Say = to_stderr,
) -> dict[str, Any]:
    """Train one router a layer on the paths of a finished search (arXiv 2510.12773, section 3.2).

    held_out: share of the items that are not trained on and on which the routers are judged. model: where the search's
    model lies now, if it has moved; it is run once along each path, in the dtype of the search.

    out: the folder, by default runs/<model>-routers; it gets routers/, train.json and figures/. A killed call goes on, epoch by
    epoch. Returns train.json's content with `folder`: the report of `train_routers`, parameters, and by layer (`by_layer`) the
    shares of skip and repeat in the labels, in those held out, and in what the routers choose there. Raises UsageError and
    Refused.
    """
    from layerprune.model.load import pick_device
    from layerprune.route.labels import labelled
    from layerprune.route.train import TrainSettings

    place = Path(search)
    told, records = _finished_search(place)
    if not 0 < held_out < 1:
        raise UsageError(f"--held-out {held_out:g} is not a share of the items between 0 and 1")
    items = labelled(records)
    if len(items) < 2:
        raise Refused(
            f"the search in {place} has {len(items)} of {len(records)} items with something to learn (a better answer, or as good "
            "a one with fewer layers): search more items, or with more simulations"
        )
    settings = TrainSettings(epochs, batch_size, learning_rate, weight_decay, warm_up, max(1, round(held_out * len(items))), seed)
    settings.split(len(items))
    pick_device(device)
    source = find_model(str(model if model is not None else told["given"]["model"]))
    base = checkpoint_fingerprint(source.folder)
    if base != told["inputs"]["model"]:
        raise Refused(f"the search in {place} was made on another checkpoint than {source.name}: give its own with --model")
    folder = Path(out) if out is not None else Path("runs") / f"{source.label}-routers"
    inputs = {
        "kind": TRAINING, "search": hashlib.sha256((place / PATHS).read_bytes()).hexdigest(), "settings": vars(settings),
        "device": pick_device(device),
    }  # fmt: skip
    with open_run(folder, inputs, {"search": str(search), "model": source.name}) as opened:
        if opened.other_versions():
            say(opened.other_versions())
        if not (folder / "train.json").exists():
            with opened.phase("train"):
                dtype = told["inputs"]["dtype"]
                _train(opened, source, base, records, settings, dtype, device, trust_remote_code, progress, say)
        result = opened.once("train.json", dict)
        _draw(folder, result, source.label)
        opened.finish(result)
        return {**result, "folder": str(folder)}


def _finished_search(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The manifest of a search, and its records."""
    from layerprune.route.labels import read_records

    if not (folder / MANIFEST).exists():
        raise Refused(f"{folder} is not the folder of a search: give the --out of `layerprune route search`")
    told = read_json(folder / MANIFEST)
    if not isinstance(told, dict) or not isinstance(told.get("inputs"), dict) or told["inputs"].get("kind") != SEARCH:
        raise Refused(f"{folder} is not the folder of a search: give the --out of `layerprune route search`")
    if not told.get("finished"):
        raise Refused(f"the search in {folder} is not finished: the command that began it goes on with it")
    return told, read_records(folder / PATHS)


def _train(
    opened: RunFolder, source: ModelSource, base: str, records: Sequence[Mapping[str, Any]], settings: Any, dtype: str,
    device: str | None, trust: bool, progress: bool, say: Say,
) -> None:  # fmt: skip
    """Make routers/ and train.json."""
    from layerprune.model.decoder import view_decoder
    from layerprune.model.load import load_model, pick_device
    from layerprune.model.progress import progress_bar
    from layerprune.route.features import collect_features
    from layerprune.route.items import prompt_key
    from layerprune.route.labels import labelled
    from layerprune.route.router import parameter_count
    from layerprune.route.router_file import save_routers
    from layerprune.route.train import train_routers

    items = labelled([dict(record) for record in records])
    live = load_model(source.folder, device=device, dtype=dtype, trust_remote_code=trust, progress=progress)
    say(f"{source.name}: {len(items):,} of {len(records):,} items have something to learn")
    with progress_bar(len(items), "states", "item", progress) as bar:
        features = collect_features(view_decoder(live), base, items, opened.work / "features", bar.update)
    del live
    with progress_bar(settings.epochs, "training", "epoch", progress) as bar:
        routers, report = train_routers(features, settings, opened.work / "training", pick_device(device), bar.update)
    if not (opened.path / ROUTERS).exists():
        prompts = sorted({prompt_key(record["prompt"]) for record in records})
        about = {"settings": vars(settings), "items": len(items), "held_out": report["held_out"], "prompts": prompts}
        save_routers(routers, source.folder, opened.path / ROUTERS, about)
    report |= {
        "model": source.name, "layers": routers.layers, "width": routers.width,
        "parameters": parameter_count(routers.layers, routers.width), "searched": len(records), "settings": vars(settings),
        "by_layer": _by_layer(routers, features, settings),
    }  # fmt: skip
    opened.once("train.json", lambda: report)


def _by_layer(routers: Any, features: Any, settings: Any) -> dict[str, dict[str, list[float]]]:
    """The shares of skip and repeat in each layer: of all labels, of those held out, and of what the routers choose there."""
    import torch

    from layerprune.route.paths import REPEAT, SKIP

    _, held_N = settings.split(len(features.labels_NL))
    with torch.no_grad():
        parts = held_N.split(settings.batch)
        chosen_NL = torch.cat([routers(features.pooled_NLWD[part], features.real_NW[part]).argmax(dim=-1) for part in parts])
    all_NL = features.labels_NL
    found = {"labels": all_NL, "held_out": all_NL[held_N], "routers": chosen_NL}
    actions = {"skip": SKIP, "repeat": REPEAT}
    return {
        name: {action: (label_NL == count).double().mean(dim=0).tolist() for action, count in actions.items()}
        for name, label_NL in found.items()
    }


def _draw(folder: Path, result: Mapping[str, Any], label: str) -> None:
    from layerprune.route_figures import plot_layers, plot_learning

    plot_learning(result, folder / "figures", label)
    plot_layers(result, folder / "figures", label)
