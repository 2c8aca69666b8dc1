"""The items of a search, done here or by several processes; what each has found lies in files of its own until all is done."""

from __future__ import annotations

import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused
from layerprune.model.files import write_json
from layerprune.workers import LOG, SPEC, Worker, as_worker, cores, error_in, sigterm_is_an_exit, visible_gpus


@dataclass(frozen=True)
class Search:
    """One search: the model (its folder and fingerprint), the items, the settings, and how it is loaded."""

    model: Path
    base: str
    layers: int
    items: Sequence[Any]
    settings: Any
    seed: int
    dtype: str
    device: str | None
    trust: bool


def search_items(search: Search, work: Path, jobs: int, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """The record of every item, in their order, from `jobs` processes; what an earlier call has found in `work` counts.

    Raises Refused for what the model or a worker refuses; what was found stays.
    """
    work.mkdir(parents=True, exist_ok=True)
    found = _found(search, work)
    progress(len(found))
    left = [number for number in range(len(search.items)) if number not in found]
    if left and min(jobs, len(left)) == 1:
        label_part(search, left, _part(work), progress)
    elif left:
        _in_processes(search, left, work, min(jobs, len(left)), progress)
    found = _found(search, work)
    return [found[number] for number in range(len(search.items))]


def forget_empty(work: Path) -> None:
    """Remove the folder of a search that has found nothing yet."""
    if not any(path.read_bytes().count(b"\n") > 1 for path in work.glob("part-*.jsonl")):
        shutil.rmtree(work, ignore_errors=True)


def label_part(search: Search, numbers: Sequence[int], path: Path, progress: Callable[[int], None]) -> None:
    """Search some of the items in this process."""
    from layerprune.model.decoder import view_decoder
    from layerprune.model.load import load_model, load_tokenizer
    from layerprune.route.labels import label_items
    from layerprune.route.reward import goes_on_with

    live = load_model(search.model, device=search.device, dtype=search.dtype, trust_remote_code=search.trust)
    goes_on = goes_on_with(load_tokenizer(search.model, search.trust))
    label_items(
        view_decoder(live), search.base, search.items, goes_on, path, search.settings, search.seed, progress=progress,
        numbers=numbers,
    )  # fmt: skip


def _part(work: Path) -> Path:
    """A file that no other process writes, not even one that outlives a killed search for a second."""
    return work / f"part-{uuid.uuid4().hex}.jsonl"


def _found(search: Search, work: Path) -> dict[int, dict[str, Any]]:
    from layerprune.route.labels import found_records

    parts = sorted(work.glob("part-*.jsonl"))
    return found_records(parts, search.base, search.items, search.layers, search.settings, search.seed)


def _in_processes(search: Search, left: Sequence[int], work: Path, jobs: int, progress: Callable[[int], None]) -> None:
    told = {
        **asdict(search), "model": str(search.model), "items": [asdict(item) for item in search.items],
        "cwd": os.getcwd(), "parent": os.getpid(),
    }  # fmt: skip
    places = []
    for k, environment in enumerate(_slots(search.device, jobs)):
        place = work / f"job-{k}"
        place.mkdir(exist_ok=True)
        (place / LOG).write_text("")
        own = _part(work.absolute())
        write_json(place / SPEC, {**told, "numbers": left[k::jobs], "part": str(own), "environment": environment})
        places.append((place, own))
    running: list[tuple[Worker, Path]] = []
    read = dict.fromkeys((part for _, part in places), 0)
    with sigterm_is_an_exit():
        try:
            running += [(Worker(place, "layerprune.route_jobs"), part) for place, part in places]
            waiting = list(running)
            while waiting:
                time.sleep(0.2)
                new = sum(_new_records(part, read) for part in read)
                if new:  # tqdm redraws even where nothing is new, a line each time where stderr is no terminal
                    progress(new)
                for worker, part in list(waiting):
                    fault = worker.ended()
                    if fault:
                        told_by = error_in(worker.place / LOG)
                        raise Refused(fault if fault == told_by else f"a process of the search failed: {fault}")
                    if fault is not None:
                        waiting.remove((worker, part))
        finally:
            for worker, _ in running:
                worker.stop()


def _new_records(part: Path, read: dict[Path, int]) -> int:
    """Records that a file has got since it was last looked at; read: the bytes of each file that were seen."""
    if not part.exists() or part.stat().st_size == read[part]:
        return 0
    with open(part, "rb") as file:
        file.seek(read[part])
        lines = file.read()
    head = int(read[part] == 0 and b"\n" in lines)
    whole = lines.rfind(b"\n") + 1
    read[part] += whole
    return lines.count(b"\n") - head


def _slots(device: str | None, jobs: int) -> list[dict[str, str]]:
    """The environment of each process: its GPU, in turn, and its share of the cores."""
    from layerprune.model.load import pick_device

    found: list[dict[str, str]] = [{} for _ in range(jobs)]
    gpus = visible_gpus() if pick_device(device) == "cuda" else []
    for k, environment in enumerate(found):
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[k % len(gpus)]
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, cores() // jobs))
    return found


def _work(asked: dict[str, Any]) -> None:
    from layerprune.route.items import Item
    from layerprune.route.search import SearchSettings

    def ids(tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(tokens)

    items = [
        Item(**{**item, "prompt": ids(item["prompt"]), "endings": tuple(map(ids, item["endings"]))}) for item in asked["items"]
    ]
    search = Search(
        Path(asked["model"]), asked["base"], asked["layers"], items, SearchSettings(**asked["settings"]), asked["seed"],
        asked["dtype"], asked["device"], asked["trust"],
    )  # fmt: skip
    label_part(search, asked["numbers"], Path(asked["part"]), lambda done: None)


if __name__ == "__main__":
    try:
        as_worker(Path(sys.argv[1]), _work, "the search")
    except Exception:  # it is told in the log
        sys.exit(1)
