"""Routing beside static cuts: search, train and measure on two small models, and what the search costs.

    python benchmarks/routing.py WORK ENGLISH_MODEL ENGLISH_DOCUMENTS.jsonl --out benchmarks/routing.json

WORK gets the items (of benchmarks/route_items.py) and the folders of the commands; what is there is gone on with. ENGLISH_MODEL
is any causal model, DOCUMENTS are texts that it has not seen; angular cuts are ranked on them too. Each model is run with the
search as it is by default, which stops at a path two layers shorter; the demo also with all simulations, on half of the items.
Accuracy is on items of other documents or about other facts than those searched. Routers are trained once more on states as
they are, not divided by their size, to see what that does.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import route_items
from record import rounded, write_record

DIALS = (-0.6, "router", -0.4, -0.25)
MEASURED = 300
"""Items of each task on which accuracy is measured, at most."""


@dataclass(frozen=True)
class Run:
    """One search with its routers. limit: items of each task that are searched, None for all; stop: None for all simulations."""

    name: str
    model: str
    items: Path
    stop: int | None
    limit: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("english")
    parser.add_argument("documents", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out")
    given = parser.parse_args()
    texts = [json.loads(line)["text"] for line in given.documents.read_text(encoding="utf-8").splitlines()]
    items = {"english": given.work / "english-items", "demo": given.work / "demo-items"}
    route_items.write(items["english"], *route_items.cloze(texts))
    route_items.write(items["demo"], *route_items.demo(150, 100))
    runs = [
        Run("demo", "demo", items["demo"], 2),
        Run("demo, all simulations", "demo", items["demo"], None, 75),
        Run("english-32l", given.english, items["english"], 2, 420),
    ]
    ranks = {
        "demo": rank(given.work / "rank-demo", "demo", None, given.device),
        given.english: rank(given.work / "rank-english", given.english, str(given.documents), given.device),
    }
    found = {run.name: measure(run, given.work, ranks[run.model], given.jobs, given.device) for run in runs}
    write_record(given.out, given.device, {"jobs": given.jobs}, {"runs": found})


def rank(folder: Path, model: str, data: str | None, device: str) -> Path:
    from layerprune.steps import rank as rank_blocks

    if not folder.exists():
        rank_blocks(model, folder, data=data, length=512, samples=128, device=device)
    return folder / "rank.json"


def measure(run: Run, work: Path, ranking: Path, jobs: int, device: str) -> dict[str, Any]:
    """The results of the three commands, without the folders of this machine."""
    from layerprune.route_use import evaluate_routing
    from layerprune.routing import search_routing, train_routing

    folder = work / run.name.replace(", ", "-").replace(" ", "-")
    search = search_routing(
        run.model, items=run.items / "train.jsonl", limit=run.limit, stop_shorter=run.stop, jobs=jobs, device=device,
        out=folder / "paths", progress=True,
    )  # fmt: skip
    training = train_routing(folder / "paths", device=device, out=folder / "routers", progress=True)
    measured = evaluate_routing(
        run.model, folder / "routers", items=run.items / "test.jsonl", limit=MEASURED, dials=DIALS, rank=ranking, device=device,
        out=folder / "routed", progress=True,
    )  # fmt: skip
    seconds = {name: json.loads((folder / name / "manifest.json").read_text())["done"] for name in ("paths", "routers", "routed")}
    own = ("folder", "model", "figures", "routers")  # those of this machine
    return {
        "search": {key: value for key, value in search.items() if key not in own} | {"labels": labels(folder / "paths")},
        "training": rounded({key: value for key, value in training.items() if key not in own}),
        "unscaled": rounded(unscaled(run.model, folder, device)),
        "measured": rounded(without_detail({key: value for key, value in measured.items() if key not in own})),
        "seconds": seconds,
    }


def without_detail(measured: dict[str, Any]) -> dict[str, Any]:
    """Without how often each layer ran, but for the routers' own choice, and of the cuts depth and accuracy alone."""
    base, *routed = (
        one if one["name"] == "router" else {key: value for key, value in one.items() if key != "usage"}
        for one in (measured["base"], *measured["routed"])
    )
    static = {
        strategy: [{"layers": cut["layers"], "accuracy": cut["accuracy"]} for cut in cuts]
        for strategy, cuts in measured["static"].items()
    }
    return {**measured, "base": base, "routed": routed, "static": static}


def unscaled(model: str, folder: Path, device: str) -> dict[str, Any]:
    """What routers choose that are trained on the states as they are: the report of their training, and the states' sizes."""
    from layerprune.model.decoder import view_decoder
    from layerprune.model.fingerprint import checkpoint_fingerprint
    from layerprune.model.load import load_model
    from layerprune.model.source import find_model
    from layerprune.route.features import collect_features
    from layerprune.route.labels import labelled, read_records
    from layerprune.route.train import TrainSettings, state_sizes, train_routers

    source, items = find_model(model), labelled(read_records(folder / "paths" / "paths.jsonl"))
    decoder = view_decoder(load_model(source.folder, device=device))
    features = collect_features(decoder, checkpoint_fingerprint(source.folder), items, folder / "unscaled")
    settings = TrainSettings(held_out=max(1, round(0.1 * len(items))), scaled=False)
    sizes = state_sizes(features, settings.split(len(items))[0], settings.batch).tolist()
    return {**train_routers(features, settings, folder / "unscaled", device)[1], "sizes": sizes}


def labels(folder: Path) -> dict[str, Any]:
    """How many different paths the items teach, how many of them teach the commonest, and the mean layers of a path."""
    records = [json.loads(line) for line in (folder / "paths.jsonl").read_text().splitlines()[1:]]
    paths = Counter(tuple(record["best"]) for record in records if record["useful"])
    items = sum(paths.values())
    return {
        "items": items, "paths": len(paths), "commonest": paths.most_common(1)[0][1],
        "mean_layers": sum(sum(path) * count for path, count in paths.items()) / items,
    }  # fmt: skip


if __name__ == "__main__":
    main()
