"""Our task numbers are lm-eval's own: a command line of lm-eval runs on the same checkpoint and the same task files."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from layerprune.eval import harness, sweep
from layerprune.eval.answers import Answers
from layerprune.eval.evaluate import evaluate_checkpoint, format_table
from layerprune.eval.sweep import BranchedModel
from layerprune.eval.tasks import TaskSet, ask_harness, built_once, load_tasks, run_harness, score_tasks
from layerprune.model.branches import Branches
from layerprune.model.decoder import view_decoder, virtual_cut
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model, load_tokenizer
from layerprune.model.tree import CutTree
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
    "yesno": {**CHOICE, "doc_to_choice": ["Y", "N"], "doc_to_target": "{{answer % 2}}", "metric_list": CHOICE["metric_list"][:1]},
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
    (folder / "mixed.yaml").write_text(yaml.safe_dump({"group": "mixed", "task": ["yesno", "text"]}))
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


def start_lm_eval(checkpoint: Path, task_folder: Path, out: Path, tasks: tuple[str, ...], *more: str) -> subprocess.Popen[str]:
    """lm-eval's own command line."""
    line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={checkpoint},dtype=float32"]
    line += ["--device", "cpu", "--include_path", str(task_folder), "--tasks", ",".join(tasks), *more]
    line += ["--output_path", str(out), "--log_samples"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "datasets"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], out: Path) -> Found:
    """Its results, and its samples by task."""
    _, log = process.communicate()
    assert process.returncode == 0, log[-3000:]
    results = json.loads(next(out.rglob("results_*.json")).read_text())
    samples = {}
    for path in out.rglob("samples_*.jsonl"):
        name = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        samples[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda s: s["doc_id"])
    return results, samples


@pytest.fixture(scope="session")
def lm_evals_own(checkpoint: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    out = tmp_path_factory.mktemp("own")
    few = ("--batch_size", "auto", "--max_batch_size", "8", "--num_fewshot", "2", "--limit", "5", "--seed", "7")
    started = {
        "zero": start_lm_eval(checkpoint, task_folder, out / "zero", ALL, "--batch_size", "1"),
        "few": start_lm_eval(checkpoint, task_folder, out / "few", FEW, *few),
    }
    return {name: wait_for(process, out / name) for name, process in started.items()}


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
    if isinstance(theirs, list | tuple):  # log-likelihood, greedy
        assert mine[0] == pytest.approx(float(theirs[0]), abs=1e-4)
        assert mine[1] == (str(theirs[1]) == "True")
    elif isinstance(mine, float):  # a rolling log-likelihood
        assert mine == pytest.approx(float(theirs), abs=1e-4 * 120)
    else:
        assert mine == theirs


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_every_number_is_that_of_lm_evals_command_line(
    batch_size: int | None, live: tuple[Any, Any], ready: TaskSet, lm_evals_own: dict[str, Found]
) -> None:
    found, truncated = run_harness(*live, ready, batch_size=batch_size)
    assert_equal(found, lm_evals_own["zero"])
    lengths = [len(live[1](s["arguments"][0][0])["input_ids"]) for s in found["samples"]["long"]]
    assert max(lengths) > 128 and truncated > 0  # the numbers hold for prompts cut on the left too


def test_few_shots_limit_and_seed_of_lm_evals_command_line(
    live: tuple[Any, Any], task_folder: Path, lm_evals_own: dict[str, Found]
) -> None:
    ready = load_tasks(dict.fromkeys(FEW, 2), task_folder, seed=7)
    found, _ = run_harness(*live, ready, limit=5, seed=7)
    assert found["n-shot"]["choice"] == 2
    assert_equal(found, lm_evals_own["few"])
    again, _ = run_harness(*live, ready, limit=5, seed=7)  # a task set serves twice
    assert_equal(again, lm_evals_own["few"])


def test_tables_show_the_plain_mean_over_subjects_beside_lm_evals(live: tuple[Any, Any], task_folder: Path) -> None:
    scores = score_tasks(*live, {"school": None, "yesno": None}, task_folder=task_folder, samples=True)
    big, small = (scores["results"][name]["acc,none"] for name in ("school_big", "school_small"))
    assert big != small
    weighted, mean, yesno = scores["table"]
    assert weighted["task"] == mean["task"] == "school"
    assert (weighted["metric"], mean["metric"]) == ("acc", "acc (mean of subjects)")
    assert weighted["value"] == pytest.approx((24 * big + 6 * small) / 30)
    assert mean["value"] == pytest.approx((big + small) / 2)
    errors = [scores["results"][name]["acc_stderr,none"] for name in ("school_big", "school_small")]
    assert mean["stderr"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    assert (mean["n"], mean["shots"], mean["chance"], mean["majority"]) == (30, 0, pytest.approx(1 / 3), None)
    answers = [json.loads(line)["answer"] % 2 for line in (task_folder / "yesno.jsonl").read_text().splitlines()]
    assert yesno["chance"] == 0.5
    assert yesno["majority"] == pytest.approx(max(sum(answers), 15 - sum(answers)) / 15)
    correct = scores["correct"]
    assert set(correct) == {"school_big", "school_small", "yesno"}
    assert (len(correct["school_big"]), sum(correct["school_big"]) / 24) == (24, pytest.approx(big))


def test_a_group_that_lm_eval_does_not_aggregate(live: tuple[Any, Any], task_folder: Path) -> None:
    scores = score_tasks(*live, {"plain": None, "mixed": None}, task_folder=task_folder, limit=4)
    rows = [(row["task"], row["metric"], row["n"]) for row in scores["table"]]
    # where not every task has an accuracy there is no mean, and each task shows its own
    assert rows == [("plain", "acc (mean of subjects)", 8), ("yesno", "acc", 4), ("text", "exact_match", 4)]


def test_correct_is_in_the_order_of_the_data(live: tuple[Any, Any], ready: TaskSet) -> None:
    found, _ = run_harness(*live, ready)
    correct = score_tasks(*live, ready, samples=True)["correct"]
    for name in ("choice", "lastword", "text"):
        samples = sorted(found["samples"][name], key=lambda s: s["doc_id"])
        metric = "exact_match" if name == "text" else "acc"
        assert correct[name] == [int(s[metric]) for s in samples]
    assert "rolling" not in correct


def test_a_virtual_cut_scores_as_the_written_checkpoint(
    checkpoint: Path, live: tuple[Any, Any], ready: TaskSet, tmp_path: Path
) -> None:
    prune_checkpoint(checkpoint, layers="1:3", out=tmp_path / "cut")
    written = run_harness(load_model(tmp_path / "cut", device="cpu"), live[1], ready)[0]
    whole = run_harness(*live, ready)[0]
    with virtual_cut(view_decoder(live[0]), (0, 3, 4)):
        found = run_harness(*live, ready)[0]
    assert_equal(found, sorted_samples(written))
    assert found["results"] != whole["results"]
    assert [s["resps"] for s in found["samples"]["text"]] != [s["resps"] for s in whole["samples"]["text"]]


@dataclass
class Watch:
    """What the model was asked in a run: a shape of input ids and a number of logits a row for each forward pass."""

    shapes: list[tuple[int, int]]
    kept: list[int]


@pytest.fixture
def watch(live: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Watch:
    seen = Watch([], [])
    forward = live[0].forward

    def look(ids_BT: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        seen.shapes.append(tuple(ids_BT.shape))
        seen.kept.append(logits_to_keep)
        return forward(ids_BT, use_cache=use_cache, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(live[0], "forward", look)
    return seen


def test_requests_of_one_input_share_a_row(live: tuple[Any, Any], task_folder: Path, watch: Watch) -> None:
    found, _ = run_harness(*live, load_tasks({"yesno": None}, task_folder))
    assert sum(len(s["arguments"]) for s in found["samples"]["yesno"]) == 30
    # " Y" and " N" are two tokens each, and differ in the last
    assert sum(rows for rows, _ in watch.shapes) == 15
    assert max(watch.kept) < min(width for _, width in watch.shapes)  # the head does not run over the prompts


@pytest.mark.parametrize("short", ["tokens", "logits", "rows"])
def test_batches_stay_within_budgets(
    short: str, live: tuple[Any, Any], ready: TaskSet, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "token_budget", lambda device: 300 if short == "tokens" else 10**6)
    monkeypatch.setattr(harness, "logit_budget", lambda device: 4 * 320 * 140 if short == "logits" else 10**9)
    small, _ = run_harness(*live, load_without_text(ready), batch_size=4 if short == "rows" else None)
    pairs = list(zip(watch.shapes, watch.kept, strict=True))
    assert any(rows > 1 for (rows, _), _ in pairs)
    for (rows, width), kept in pairs:
        assert rows == 1 or rows * width <= 300 or short != "tokens"
        assert rows == 1 or rows * kept <= 140 or short != "logits"
        assert rows <= 4 or short != "rows"
    monkeypatch.undo()
    usual, _ = run_harness(*live, load_without_text(ready))
    assert_equal(small, sorted_samples(usual))


def load_without_text(ready: TaskSet) -> TaskSet:
    """Generation's batches are lm-eval's own."""
    kept = {name: task for name, task in ready.tasks.items() if name != "text"}
    names = tuple(name for name in ready.names if name != "text")
    return TaskSet(names, {name: ready.members[name] for name in names}, {**ready.loaded, "tasks": kept})


def sorted_samples(found: dict[str, Any]) -> Found:
    return found, {name: sorted(s, key=lambda sample: sample["doc_id"]) for name, s in found["samples"].items()}


def out_of_memory_above(rows: int, forward: Callable[..., Any], failures: list[int]) -> Callable[..., Any]:
    """A forward pass that a GPU of so many rows could do."""

    def limited(input_ids: torch.Tensor, **more: Any) -> Any:
        if len(input_ids) > rows:
            failures.append(len(input_ids))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(input_ids, **more)

    return functools.wraps(forward)(limited)


def test_a_batch_that_runs_out_of_memory_is_halved(
    live: tuple[Any, Any], ready: TaskSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, _ = run_harness(*live, ready)
    failures: list[int] = []
    monkeypatch.setattr(live[0], "forward", out_of_memory_above(3, live[0].forward, failures))
    found, truncated = run_harness(*live, ready)
    assert_equal(found, sorted_samples(usual))
    assert 1 < len(failures) < 20  # later batches have learned from the first


def test_a_row_that_does_not_fit_is_refused(live: tuple[Any, Any], task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live[0], "forward", out_of_memory_above(0, live[0].forward, []))
    for task in ("choice", "text"):
        with pytest.raises(Refused, match="fit.*GPU.*Tried to allocate"):
            score_tasks(*live, {task: None}, task_folder=task_folder)


@pytest.mark.parametrize("task", ["choice", "rolling", "text"])
def test_logits_that_are_not_numbers_are_refused(task: str, checkpoint: Path, live: tuple[Any, Any], task_folder: Path) -> None:
    broken = load_model(checkpoint, device="cpu")
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(Refused, match="not numbers"):
        score_tasks(broken, live[1], {task: None}, task_folder=task_folder)


# What cannot be scored


Edit = Callable[[Path], None]


def edited(name: str, **changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))

    return edit


def file(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text) and None or None


BAD_TASKS: dict[str, tuple[str, Edit | None, type[Exception], str]] = {
    "unknown": ("choise", None, UsageError, "no task choise; did you mean choice"),
    "unknown, nothing near": ("zzzzzz", None, UsageError, "no task zzzzzz"),
    "broken YAML": ("new", file("new.yaml", "task: new\n  - : ["), UsageError, "new; .*new.yaml is not valid YAML: .*line 2"),
    "missing include": ("new", file("new.yaml", "task: new\ninclude: gone.yaml"), UsageError, "new.yaml includes gone.yaml"),
    "no data file": (
        "choice", edited("choice", dataset_kwargs={"data_files": "no/such"}), Refused, "data set of task choice.*no/such",
    ),
    "no split": ("choice", edited("choice", test_split="validation"), Refused, "task choice cannot be loaded.*validation"),
    "no metric": ("choice", edited("choice", metric_list=[{"metric": "accuracy9"}]), Refused, "task choice cannot be loaded"),
    "a field that is not there": ("choice", edited("choice", doc_to_text="{{missing.part}}"), Refused, "task choice.*missing"),
    "a package that is not there": ("new", file("new.yaml", "task: new\nclass: !function helper.Task"), Refused, "no_such_package"),
    "empty data": ("choice", file("choice.jsonl", ""), Refused, "task choice|data set of task choice"),
    "more shots than items": ("choice:12", None, Refused, "task choice.*12"),
    "no room to generate": (
        "text", edited("text", generation_kwargs={"max_gen_toks": 500}), Refused, "500.*maximum sequence length.*128",
    ),
    "an answer without tokens": (
        "lastword", edited("lastword", doc_to_target="", target_delimiter=""), Refused, "without tokens",
    ),
    "an answer beyond the context": (
        "yesno", edited("yesno", doc_to_choice=["Y", "N" * 400]), Refused, "answer of 401 tokens.*context of 128",
    ),
    "twice": ("school,school_big", None, UsageError, "school_big is asked for twice"),
    "the same name": ("school,school", None, UsageError, "school twice"),
    "an empty name": (":5", None, UsageError, "empty name"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TASKS)
def test_a_task_that_cannot_be_scored_is_refused_in_one_sentence(
    what: str, checkpoint: Path, task_folder: Path, tmp_path: Path
) -> None:
    names, edit, kind, words = BAD_TASKS[what]
    folder = tmp_path / "tasks"
    folder.mkdir()
    for path in task_folder.iterdir():
        (folder / path.name).write_text(path.read_text().replace(str(task_folder), str(folder)))
    (folder / "helper.py").write_text("import no_such_package\n")
    if edit is not None:
        edit(folder)
    with pytest.raises(kind, match=words) as caught:
        evaluate_checkpoint(checkpoint, tasks=names.split(","), task_folder=folder, loss=False, device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_task_folders_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone does not exist"):
        load_tasks({"a": None}, tmp_path / "gone")
    with pytest.raises(UsageError, match="has no tasks: no .yaml file"):
        load_tasks({"a": None}, tmp_path)
    (tmp_path / "a.yaml").write_text("task: [")
    with pytest.raises(UsageError, match="has no tasks: .*a.yaml is not valid YAML"):
        load_tasks({"a": None}, tmp_path)


def test_counts_that_measure_nothing(live: tuple[Any, Any], task_folder: Path) -> None:
    with pytest.raises(UsageError, match="--limit 0"):
        score_tasks(*live, {"choice": None}, task_folder=task_folder, limit=0)
    with pytest.raises(UsageError, match="--batch-size -1"):
        score_tasks(*live, {"choice": None}, task_folder=task_folder, batch_size=-1)
    with pytest.raises(UsageError, match="-2 in-context examples"):
        score_tasks(*live, {"choice": -2}, task_folder=task_folder)


def test_a_data_set_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = {**CHOICE, "task": "far", "dataset_path": "no-such-owner/no-such-data", "test_split": "test"}
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(Refused, match="data set of task far cannot be loaded: .*no-such-data.*local cache"):
        load_tasks({"far": None}, tmp_path)


# The command line's side


def test_stdout_holds_nothing_but_results(
    checkpoint: Path, task_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "eval.json"
    result = evaluate_checkpoint(
        checkpoint, tasks=ALL, task_folder=task_folder, limit=3, loss=False, items=True, out=out, progress=True, device="cpu"
    )
    printed, log = capfd.readouterr()
    assert printed == ""
    assert log and "subject" not in log
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert result["settings"]["tasks"] == dict.fromkeys(ALL)
    assert result["tasks"]["results"]["school"]["sample_count"] == {"acc,none": 6}
    text = format_table(result)
    assert text.splitlines()[0].endswith("5 layers, 0.2 M parameters")
    assert [line.split()[0] for line in text.splitlines()[3:]][:3] == ["choice", "yesno", "lastword"]
    assert f"{result['tasks']['truncated']:,} prompts were cut on the left" in text


def asked_of_each(
    live: tuple[Any, Any], ready: TaskSet, kept: list[tuple[int, ...]], store: Answers, limit: int | None = None, seed: int = 0
) -> tuple[dict[tuple[int, ...], dict[str, Any]], Branches]:
    """lm-eval's results for each cut from one pass, and the branches that counted it."""
    branches = Branches(view_decoder(live[0]), kept, 1 << 28)
    lm = BranchedModel(branches, live[1], store, None, False, lambda line: None)
    found = {}
    with built_once(ready):
        for one in kept:
            lm.branch = one
            found[one] = ask_harness(lm, ready, limit, seed)
    return found, branches


CUTS: list[tuple[int, ...]] = [(0, 1, 2, 3, 4), (0, 3, 4), (0, 1, 2, 4), (0, 4)]


def test_one_pass_scores_each_depth_as_lm_eval_scores_its_checkpoint(
    checkpoint: Path, task_folder: Path, live: tuple[Any, Any], ready: TaskSet, lm_evals_own: dict[str, Found], tmp_path: Path
) -> None:
    prune_checkpoint(checkpoint, layers="1:3", out=tmp_path / "cut")
    own = start_lm_eval(tmp_path / "cut", task_folder, tmp_path / "own", ALL, "--batch_size", "1")
    found, branches = asked_of_each(live, ready, CUTS, Answers())
    assert branches.shared and branches.applications % branches.tree(CUTS).applications == 0
    assert_equal(found[CUTS[0]], lm_evals_own["zero"])
    assert_equal(found[CUTS[1]], wait_for(own, tmp_path / "own"))
    for one in CUTS[2:]:
        with virtual_cut(view_decoder(live[0]), one):
            assert_equal(found[one], sorted_samples(run_harness(*live, ready)[0]))


def test_in_context_examples_limits_and_seeds_of_one_pass(
    live: tuple[Any, Any], task_folder: Path, lm_evals_own: dict[str, Found]
) -> None:
    ready = load_tasks(dict.fromkeys(FEW, 2), task_folder, seed=7)
    found, _ = asked_of_each(live, ready, CUTS, Answers(), limit=5, seed=7)
    assert_equal(found[CUTS[0]], lm_evals_own["few"])


def test_answers_are_asked_for_once(live: tuple[Any, Any], task_folder: Path, tmp_path: Path) -> None:
    """A resume computes nothing; more depths, more items and another task compute only what is new."""
    choice = load_tasks({"choice": None}, task_folder)
    first, branches = asked_of_each(live, choice, CUTS[:2], Answers(tmp_path), limit=6)
    assert branches.applications > 0
    store = Answers(tmp_path)  # nothing was saved yet: what a process that dies leaves
    assert len(store) == 0
    store = Answers(tmp_path / "kept")
    first, branches = asked_of_each(live, choice, CUTS[:2], store, limit=6)
    store.save()
    once = branches.applications
    again, branches = asked_of_each(live, choice, CUTS[:2], Answers(tmp_path / "kept"), limit=6)
    assert branches.applications == 0 and again == first
    deeper, branches = asked_of_each(live, choice, CUTS, Answers(tmp_path / "kept"), limit=6)
    assert branches.applications == once // CutTree(CUTS[:2], 5).applications * CutTree(CUTS[2:], 5).applications
    assert deeper[CUTS[0]] == first[CUTS[0]] and deeper[CUTS[1]] == first[CUTS[1]]
    both = load_tasks({"choice": None, "text": None}, task_folder)
    store = Answers(tmp_path / "kept")
    found, branches = asked_of_each(live, both, CUTS[:2], store, limit=6)
    assert branches.applications == 0  # text is generated, not scored
    store.save()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "kept_model", None)  # nothing is generated a second time
        again, _ = asked_of_each(live, both, CUTS[:2], Answers(tmp_path / "kept"), limit=6)
    assert again == found
    more, branches = asked_of_each(live, choice, CUTS[:2], Answers(tmp_path / "kept"), limit=12)
    assert 0 < branches.applications <= once
    assert more[CUTS[0]]["samples"]["choice"][:6] == first[CUTS[0]]["samples"]["choice"]


def test_damaged_answers_are_refused(tmp_path: Path) -> None:
    store = Answers(tmp_path)
    store.add([(0, 1)], [b"k" * 16], np.array([[1.5]]))
    store.save()
    (path,) = tmp_path.iterdir()
    assert Answers(tmp_path).values((0, 1), [b"k" * 16]).tolist() == [1.5]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(Refused, match="is damaged"):
        Answers(tmp_path)


def test_text_where_the_layers_alone_do_not_work(
    live: tuple[Any, Any], task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = load_tasks({"text": None}, task_folder)
    usual, _ = asked_of_each(live, ready, CUTS[:2], Answers())

    def refuse(*arguments: object) -> object:
        raise Refused("this family has no such cut")

    monkeypatch.setattr(sweep, "kept_model", refuse)
    slow, _ = asked_of_each(live, ready, CUTS[:2], Answers())
    assert slow == usual
    assert slow[CUTS[0]]["samples"]["text"] != slow[CUTS[1]]["samples"]["text"]
