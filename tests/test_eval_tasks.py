"""Our task numbers are lm-eval's own: a command line of lm-eval runs on the same checkpoint and the same task files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from layerprune.eval.evaluate import evaluate_checkpoint, evaluate_live, format_table
from layerprune.eval.tasks import TaskSet, load_tasks, run_harness, score_tasks
from layerprune.model.decoder import view_decoder, virtual_cut
from layerprune.model.source import load_model, load_tokenizer
from layerprune.prune.cut import prune_checkpoint

torch.set_num_threads(1)

ALL = ("choice", "yesno", "lastword", "rolling", "text", "long", "school")
FEW = ("choice", "yesno", "lastword", "text", "school")
WORDS = "the a river stone bird green walks over under old tall small king tower found lost bread water".split()
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "acc_mutual_info")
    ],
}
TASKS: dict[str, dict[str, Any]] = {
    "choice": CHOICE,
    "yesno": {**CHOICE, "doc_to_choice": ["yes", "no"], "doc_to_target": "{{answer % 2}}", "metric_list": CHOICE["metric_list"][:1]},
    "long": {**CHOICE, "doc_to_text": "{{long}}\nAnswer:", "metric_list": CHOICE["metric_list"][:2]},
    "school_big": {**CHOICE, "metric_list": CHOICE["metric_list"][:1]},
    "school_small": {**CHOICE, "metric_list": CHOICE["metric_list"][:1]},
    "lastword": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", "aggregation": "mean"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{long}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "text": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}, {"metric": "bleu"}],
    },
}


def write_items(path: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    with open(path, "w") as file:
        for _ in range(count):
            item = {"question": words(2, 7), "long": words(45, 120), "answer": rng.randrange(3)}
            file.write(json.dumps({**item, "choices": [words(1, 3) for _ in range(3)]}) + "\n")


def write_task(folder: Path, name: str, test: Path, train: Path, **config: Any) -> None:
    files = {"data_files": {"test": str(test), "train": str(train)}}
    ground = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "fewshot_split": "train"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**ground, **config}))


@pytest.fixture(scope="session", autouse=True)
def own_dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_items(folder / "train.jsonl", 9, 1)
    for number, (name, config) in enumerate(TASKS.items()):
        items = {"school_big": 24, "school_small": 6, "rolling": 7, "long": 8}.get(name, 15)
        write_items(folder / f"{name}.jsonl", items, 10 + number)
        write_task(folder, name, folder / f"{name}.jsonl", folder / "train.jsonl", **config)
    metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    members = ["school_big", "school_small"]
    school = {"group": "school", "task": members, "aggregate_metric_list": metrics}
    (folder / "school.yaml").write_text(yaml.safe_dump(school))
    (folder / "plain.yaml").write_text(yaml.safe_dump({"group": "plain", "task": members}))
    return folder


@pytest.fixture(scope="session")
def checkpoint(build_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context of 128 tokens: longer than the questions, shorter than the field `long`."""
    return build_llama(tmp_path_factory.mktemp("model") / "m", max_position_embeddings=128)


@pytest.fixture(scope="session")
def live(checkpoint: Path) -> tuple[Any, Any]:
    return load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)


@pytest.fixture(scope="session")
def ready(task_folder: Path) -> TaskSet:
    return load_tasks(dict.fromkeys(ALL), task_folder)


Found = tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]


def run_lm_eval(checkpoint: Path, task_folder: Path, out: Path, tasks: tuple[str, ...], *more: str) -> Found:
    """lm-eval's own command line: its results and its samples."""
    line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={checkpoint},dtype=float32"]
    line += ["--device", "cpu", "--include_path", str(task_folder), "--tasks", ",".join(tasks), *more]
    line += ["--output_path", str(out), "--log_samples"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "datasets"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(out.rglob("results_*.json")).read_text())
    samples = {}
    for path in out.rglob("samples_*.jsonl"):
        name = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        samples[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda s: s["doc_id"])
    return results, samples


@pytest.fixture(scope="session")
def own_zero(checkpoint: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_lm_eval(checkpoint, task_folder, tmp_path_factory.mktemp("zero"), ALL, "--batch_size", "1")


@pytest.fixture(scope="session")
def own_few(checkpoint: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    more = ("--batch_size", "auto", "--max_batch_size", "8", "--num_fewshot", "2", "--limit", "5", "--seed", "7")
    return run_lm_eval(checkpoint, task_folder, tmp_path_factory.mktemp("few"), FEW, *more)


def assert_equal(found: dict[str, Any], own: Found) -> None:
    """Every metric of every task and group, every log-likelihood and every text."""
    results, samples = own
    assert set(found["results"]) == set(results["results"])
    for task, metrics in results["results"].items():
        mine = found["results"][task]
        assert set(mine) == set(metrics)
        for key, value in metrics.items():
            assert mine[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), (task, key)
    assert found["n-shot"] == results["n-shot"]
    assert {name: dict(n) for name, n in found["n-samples"].items()} == results["n-samples"]
    assert set(found["samples"]) == set(samples)
    for task, theirs in samples.items():
        mine_sorted = sorted(found["samples"][task], key=lambda s: s["doc_id"])
        assert len(mine_sorted) == len(theirs) > 0
        for one, other in zip(mine_sorted, theirs, strict=True):
            assert one["prompt_hash"] == other["prompt_hash"]
            for mine_resps, their_resps in zip(one["resps"], other["resps"], strict=True):
                assert_same_response(mine_resps[0], their_resps[0])


def assert_same_response(mine: Any, theirs: Any) -> None:
    if isinstance(theirs, list):  # log-likelihood, greedy
        assert mine[0] == pytest.approx(float(theirs[0]), abs=1e-4)
        assert mine[1] == (str(theirs[1]) == "True")
    elif isinstance(mine, float):  # a rolling log-likelihood
        assert mine == pytest.approx(float(theirs), abs=1e-4 * 120)
    else:
        assert mine == theirs


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_every_number_is_that_of_lm_evals_command_line(
    batch_size: int | None, live: tuple[Any, Any], ready: TaskSet, own_zero: Found
) -> None:
    found, truncated = run_harness(*live, ready, batch_size=batch_size)
    assert_equal(found, own_zero)
    long = [s for s in found["samples"]["long"]]
    lengths = [len(live[1](s["arguments"][0][0])["input_ids"]) for s in long]
    assert max(lengths) > 128 and truncated > 0  # the numbers hold for prompts cut on the left too


def test_few_shots_limit_and_seed_of_lm_evals_command_line(live: tuple[Any, Any], task_folder: Path, own_few: Found) -> None:
    ready = load_tasks(dict.fromkeys(FEW, 2), task_folder, seed=7)
    found, _ = run_harness(*live, ready, limit=5, seed=7)
    assert found["n-shot"]["choice"] == 2
    assert_equal(found, own_few)
    again, _ = run_harness(*live, ready, limit=5, seed=7)  # a task set serves twice
    assert_equal(again, own_few)
