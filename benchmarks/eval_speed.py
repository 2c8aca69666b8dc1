"""Our evaluation against lm-eval's own command line: the same checkpoint, the same tasks, in turns, in one run.

    python benchmarks/eval_speed.py --model FOLDER --pairs FOLDER --out benchmarks/eval_speed.json

--pairs holds minimal pairs as in BLiMP: a JSONL file for each task, with `sentence_good` and `sentence_bad`.
"process": whole processes, as a user waits for them. "scoring": lm-eval's `evaluate` alone, on loaded tasks and a loaded
model, with its Hugging Face model and with ours. The accuracies have to agree, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import write_record


def write_tasks(pairs: Path, folder: Path) -> list[str]:
    names = []
    for data in sorted(pairs.glob("*.jsonl")):
        name = f"pairs_{data.stem}".lower()
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_target": 0,
            "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
        names.append(name)
    return names


def timed(line: list[str], folder: Path) -> tuple[float, str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *line], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - started, done.stdout


Run = tuple[float, dict[str, float]]
"""Seconds, and the accuracy of each task."""


def scoring(given: argparse.Namespace, tasks: list[str], folder: Path, sizes: list[str]) -> dict[str, list[Run]]:
    """In one process: lm-eval's `evaluate` with our model and with its own, in turns."""
    import datasets
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from layerprune.eval.harness import LiveModel
    from layerprune.eval.tasks import load_tasks
    from layerprune.model.load import load_model, load_tokenizer

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    live = load_model(Path(given.model), device=given.device, dtype=given.dtype)
    tokenizer = load_tokenizer(Path(given.model))
    ready = load_tasks(dict.fromkeys(tasks), folder / "tasks")

    def score(lm: Any) -> Run:
        started = time.perf_counter()
        found = evaluate(lm=lm, task_dict=ready.loaded, limit=given.limit)["results"]
        return time.perf_counter() - started, {name: found[name]["acc,none"] for name in tasks}

    runs: dict[str, list[Run]] = {name: [] for name in ("ours", *sizes)}
    for _ in range(given.rounds):
        runs["ours"].append(score(LiveModel(live, tokenizer)))
        for size in sizes:
            runs[size].append(score(HFLM(pretrained=live, tokenizer=tokenizer, batch_size=size)))
    return runs


def processes(given: argparse.Namespace, tasks: list[str], folder: Path, sizes: list[str]) -> dict[str, list[Run]]:
    """The two command lines, in turns."""
    more = ["--tasks", ",".join(tasks), "--limit", str(given.limit), "--device", given.device]
    ours = ["layerprune", "eval", "--model", given.model, "--task-folder", str(folder / "tasks"), "--no-loss", "--json"]
    theirs = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={given.model},dtype={given.dtype}"]
    theirs += ["--include_path", str(folder / "tasks")]

    def accuracies(results: dict[str, Any]) -> dict[str, float]:
        return {name: results[name]["acc,none"] for name in tasks}

    runs: dict[str, list[Run]] = {name: [] for name in ("ours", *sizes)}
    for number in range(given.rounds):
        seconds, text = timed([*ours, *more, "--dtype", given.dtype, "--out", str(folder / f"ours-{number}")], folder)
        runs["ours"].append((seconds, accuracies(json.loads(text)["tasks"]["results"])))
        for size in sizes:
            out = folder / f"{size}-{number}"
            seconds, _ = timed([*theirs, *more, "--batch_size", size, "--output_path", str(out)], folder)
            found = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
            runs[size].append((seconds, accuracies(found)))
    return runs


def summary(runs: dict[str, list[Run]]) -> dict[str, Any]:
    expected = runs["ours"][0][1]
    for name, several in runs.items():
        for _, accuracies in several:
            if accuracies != expected:
                raise SystemExit(f"the accuracies of {name} differ: {accuracies} instead of {expected}")
    made: dict[str, Any] = {"ours": {"seconds": round(statistics.median(seconds for seconds, _ in runs["ours"]), 3)}}
    for size in [name for name in runs if name != "ours"]:
        ratios = [round(theirs[0] / ours[0], 3) for ours, theirs in zip(runs["ours"], runs[size], strict=True)]
        seconds = round(statistics.median(seconds for seconds, _ in runs[size]), 3)
        made[f"lm_eval, batch size {size}"] = {"seconds": seconds, "ratio": statistics.median(ratios), "ratios": ratios}
    return {**made, "mean_accuracy": round(statistics.mean(expected.values()), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100, help="pairs of each task")
    parser.add_argument("--batch-sizes", default="1,32", help="of lm-eval; ours chooses for itself")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out")
    given = parser.parse_args()
    sizes = given.batch_sizes.split(",")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "tasks").mkdir()
        tasks = write_tasks(given.pairs.resolve(), folder / "tasks")
        result = {
            "scoring": summary(scoring(given, tasks, folder, sizes)),
            "process": summary(processes(given, tasks, folder, sizes)),
            "versions": {name: importlib.metadata.version(name) for name in ("layerprune", "torch", "transformers", "lm_eval")},
        }
    config = json.loads((Path(given.model) / "config.json").read_text())
    shape = {name: config.get(name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    shape |= {"tasks": len(tasks), "pairs_a_task": given.limit, "dtype": given.dtype}
    write_record(given.out, given.device, shape, result)


if __name__ == "__main__":
    main()
