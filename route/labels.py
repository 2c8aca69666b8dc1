"""Label items with paths: the search for each of them, one line a result in a file that a killed run goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused
from layerprune.model.files import no_space_refusal, write_text
from layerprune.model.layerwise import Layerwise
from layerprune.route.execute import check_routable
from layerprune.route.features import Labelled
from layerprune.route.items import Item
from layerprune.route.reward import GoesOn, PathReward
from layerprune.route.search import SearchSettings, search_path

_KIND = "layerprune_paths"


def label_items(
    decoder: Decoder,
    base: str,
    items: Sequence[Item],
    goes_on: GoesOn,
    path: Path,
    settings: SearchSettings | None = None,
    seed: int = 0,
    limit: int = 1 << 30,
    progress: Callable[[int], None] = lambda items: None,
    numbers: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Search a path for every item, and write what was found to `path`, item by item; a call that was killed is gone on with.

    base: the fingerprint of the decoder's checkpoint. limit: bytes of states that one item's paths share. progress is told
    items as they are done. numbers: which of the items (0-based) to search, where several calls share the work; what is found
    for an item hangs on its number and on nothing else. A record has the item's number, line, task and prompt (token ids), the
    fields of `Found` and whether it is useful, and the layer applications made and those of running each path by itself.
    Raises Refused for a model whose layers cannot be routed, and for a file that belongs to another search.
    """
    settings = settings or SearchSettings()
    check_routable(decoder)
    head = _head(base, items, len(decoder), settings, seed)
    with no_space_refusal(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with no_space_refusal(path, "the items that are done stay"), open(path, "a+b") as file:
        records = _go_on(file, path, head)
        progress(len(records))
        done = {record["number"] for record in records}
        layerwise = Layerwise(decoder)
        for number in range(len(items)) if numbers is None else numbers:
            if number in done:
                continue
            item = items[number]
            reward = PathReward(layerwise, item, goes_on, limit)
            found = search_path(reward, len(decoder), settings, seed * 1_000_003 + number)
            work = {"applications": reward.paths.applications, "alone": reward.paths.alone}
            best = None if found.best is None else list(found.best)
            own = {"number": number, "line": item.line, "task": item.task, "prompt": list(item.prompt), "useful": found.useful}
            records.append({**own, **asdict(found), "best": best, **work})
            _append(file, records[-1])
            progress(1)
    return records


def found_records(
    parts: Iterable[Path], base: str, items: Sequence[Item], layers: int, settings: SearchSettings, seed: int
) -> dict[int, dict[str, Any]]:
    """By the item's number: the records that lie in files of one search, whoever wrote them; a line begun is not counted.

    Raises Refused for a file of another search.
    """
    head = _head(base, items, layers, settings, seed)
    found: dict[int, dict[str, Any]] = {}
    for path in parts:
        data = path.read_bytes()
        found |= {record["number"]: record for record in _records(data, path, head)}
    return found


def write_records(path: Path, base: str, records: Sequence[dict[str, Any]], items: Sequence[Item], layers: int,
                  settings: SearchSettings, seed: int) -> None:  # fmt: skip
    """Write the records of a whole search, in their order, in one step."""
    head = _head(base, items, layers, settings, seed)
    write_text(path, b"".join(map(_line, (head, *records))).decode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a finished search. Raises Refused for a file that is none."""
    try:
        head, *records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        if head["kind"] == _KIND and all({"prompt", "best", "useful", "task"} <= record.keys() for record in records):
            return records
    except FileNotFoundError:
        raise Refused(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise Refused(f"{path} does not hold the paths of a search")


def labelled(records: Sequence[dict[str, Any]]) -> list[Labelled]:
    """What there is to learn from: items answered better than by the whole model, or as well with fewer layers."""
    return [Labelled(tuple(r["prompt"]), tuple(r["best"])) for r in records if r["useful"]]


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all items, and the mean of the layers saved over those that there is to learn from (None where none is).

    improved: items answered better than by the whole model; shorter: as well, with fewer layers.
    """
    useful = labelled(records)
    improved = sum(r["reward"] > r["base"] for r in records if r["useful"])
    saved = sum(len(item.counts) - sum(item.counts) for item in useful)
    return {
        "items": len(records), "answered": sum(r["base"] > 0 for r in records), "useful": len(useful), "improved": improved,
        "shorter": len(useful) - improved, "mean_saved": saved / len(useful) if useful else None,
        **{name: sum(r[name] for r in records) for name in ("visited", "simulations", "applications", "alone")},
    }  # fmt: skip


def _go_on(file: Any, path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of an earlier call, a line that it did not finish cut off; a new file gets its head."""
    file.seek(0)
    data = file.read()
    records = _records(data, path, head)
    whole = data.rfind(b"\n") + 1
    file.truncate(whole)
    if not whole:
        _append(file, head)
    return records


def _records(data: bytes, path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    whole = data[: data.rfind(b"\n") + 1]
    try:
        first, *records = (json.loads(line) for line in whole.splitlines()) if whole else (head,)
    except ValueError:
        first, records = None, []
    # a file without a whole line is ours only if it holds the beginning of our head
    if first != head or (not whole and not _line(head).startswith(data)):
        raise Refused(f"{path} is not of this search (another model, other items, settings or seed): choose another or remove it")
    return records


def _append(file: Any, value: dict[str, Any]) -> None:
    file.write(_line(value))
    file.flush()
    os.fsync(file.fileno())


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _head(base: str, items: Sequence[Item], layers: int, settings: SearchSettings, seed: int) -> dict[str, Any]:
    return {"kind": _KIND, "layers": layers, "key": _key(base, items, settings, seed)}


def _key(base: str, items: Sequence[Item], settings: SearchSettings, seed: int) -> str:
    digest = hashlib.sha256(json.dumps([base, asdict(settings), seed]).encode())
    for item in items:
        digest.update(json.dumps(asdict(item)).encode() + b"\n")
    return digest.hexdigest()
