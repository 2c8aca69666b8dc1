"""Where a real model collapses: the whole curve by both strategies, on documents and on minimal pairs.

    python benchmarks/collapse.py --model FOLDER --documents FILE.jsonl --pairs FOLDER --out benchmarks/collapse.json

--documents: JSONL with `text`; of those that have at least 512 tokens the first 20 rank the blocks and the next 20 give the
loss, truncated at 512. --pairs: minimal pairs as in BLiMP, a JSONL file for each kind, with `sentence_good` and
`sentence_bad`; they are scored as one group.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from eval_speed import write_tasks
from record import write_record


def write_documents(model: Path, documents: Path, folder: Path) -> None:
    from layerprune.model.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    texts = (json.loads(line)["text"] for line in documents.read_text().splitlines())
    long = [text for text in texts if len(tokenizer(text)["input_ids"]) >= 512][:40]
    for name, part in (("rank", long[:20]), ("loss", long[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))


def first_dropped(kept: list[int]) -> int:
    return next((i for i, layer in enumerate(kept) if i != layer), len(kept))


def main() -> None:
    from layerprune import sweep

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200, help="pairs of each kind")
    parser.add_argument("--keep", type=float, default=0.9)
    parser.add_argument("--sweep", type=Path, help="where the sweep's folder goes, which has the figures")
    parser.add_argument("--out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "tasks").mkdir()
        write_documents(given.model, given.documents, folder)
        names = write_tasks(given.pairs.resolve(), folder / "tasks")
        group = {"group": "pairs", "task": names, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
        (folder / "tasks" / "group.yaml").write_text(json.dumps(group))
        started = time.perf_counter()
        found = sweep(
            given.model, tasks=["pairs"], task_folder=folder / "tasks", calibration=str(folder / "rank.jsonl"),
            eval_data=str(folder / "loss.jsonl"), length=512, limit=given.limit, keep=given.keep, device="cpu",
            out=folder / "sweep", progress=True,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        if given.sweep:
            shutil.copytree(folder / "sweep", given.sweep)
    rows: list[dict[str, Any]] = [
        {"strategy": r["strategy"], "n": r["n"], "first": first_dropped(r["kept"]) if r["n"] else None, "loss": r["loss"]}
        | {"pairs": r["tasks"]["pairs/acc"]["value"]}
        for r in found["rows"]
    ]
    collapse = {
        name: {"loss": one["loss"], "transition": one["tasks"]["pairs/acc"]["transition"], "recommendation": one["recommendation"]}
        for name, one in found["collapse"]["series"].items()
    }
    result = {"seconds": round(seconds, 1), "keep": given.keep, "rows": rows, "collapse": collapse}
    shape = {"layers": found["layers"], "kinds_of_pairs": len(names), "pairs_a_kind": given.limit, "dtype": "float32"}
    write_record(given.out, "cpu", shape, result)


if __name__ == "__main__":
    main()
