"""lm-eval tasks: find them, load them, score a live model on them, and put `acc` into rows."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import math
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from layerprune.model.errors import Refused, UsageError, network_errors, one_line

ACCURACIES = ("acc", "exact_match", "em")


@dataclass(frozen=True)
class TaskSet:
    """Loaded lm-eval tasks, ready to score any number of models.

    names: what was asked for; members: the tasks (leaves) of each name; groups: those names that lm-eval aggregates.
    """

    names: tuple[str, ...]
    members: dict[str, tuple[str, ...]]
    loaded: dict[str, Any]

    @property
    def tasks(self) -> dict[str, Any]:
        return self.loaded["tasks"]


def load_tasks(
    tasks: Mapping[str, int | None], task_folder: Path | str | None = None, seed: int = 0
) -> TaskSet:
    """Load tasks, groups or tags by lm-eval name; each maps to its in-context examples, None being the task's own.

    A task that fixes 0 examples in its own file keeps them, as in lm-eval. When the local folder has all of the
    names, lm-eval's thousands of task files are not read. Raises UsageError for an unknown name and a folder without
    tasks, Refused where a data set cannot be had. `seed` 0 stands for the default seeds of lm-eval's command line.
    """
    manager = _manager(tuple(tasks), None if task_folder is None else Path(task_folder))
    unknown = [name for name in tasks if name not in manager.task_index]
    if unknown:
        names = manager.all_tasks
        near = [n for name in unknown for n in difflib.get_close_matches(name, names, n=3, cutoff=0.6)]
        few = f"there are {', '.join(names)}" if len(names) < 20 else "`lm-eval ls tasks` lists all tasks"
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else few
        broken = "" if task_folder is None else "".join(f"; {fault}" for fault in _broken_files(Path(task_folder)))
        raise UsageError(f"lm-eval knows no task {', '.join(unknown)}{broken}; {hint}")
    for name, shots in tasks.items():
        if shots is not None and shots < 0:
            raise UsageError(f"{shots} in-context examples for task {name}: use 0 or more")
    set_seeds(seed)
    members: dict[str, tuple[str, ...]] = {}
    merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, shots in tasks.items():
        found = _load_one(manager, name)
        twice = sorted(set(found["tasks"]) & set(merged["tasks"]))
        if twice:
            raise UsageError(f"task {twice[0]} is asked for twice: it is part of {name} and of another of the tasks")
        for key, task in found["tasks"].items():
            _check_task(key, task)
            own = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=(own or 0) if shots is None or own == 0 else shots)
        members[name] = tuple(found["tasks"])
        for part in merged:
            merged[part].update(found.get(part, {}))
    for key, task in merged["tasks"].items():
        _try_first_item(key, task, seed)
    return TaskSet(tuple(tasks), members, merged)


def _load_one(manager: Any, name: str) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError

    try:
        with quiet():
            return manager.load([name])
    except (DatasetsError, *network_errors()) as error:
        raise Refused(
            f"the data set of task {name} cannot be loaded: {one_line(error)}; it has to be in the local cache, "
            "a local file, or within reach of the network"
        ) from error
    except ModuleNotFoundError as error:
        raise Refused(f"task {name} needs the Python package {error.name}, which is not installed here") from error
    except Exception as error:  # a task is somebody's file, with code and templates: whatever it raises is its fault
        raise Refused(f"task {name} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error


def _try_first_item(name: str, task: Any, seed: int) -> None:
    """Build the first prompt, so that a task whose file does not fit its data is refused before a model is loaded."""
    try:
        with quiet():
            task.set_fewshot_seed(seed=lm_eval_seeds(seed)[3])
            task.build_all_requests(limit=1)
    except Exception as error:  # as above
        shots = f"{task.get_config('num_fewshot')} in-context examples"
        raise Refused(f"task {name} with {shots} makes no prompt: {type(error).__name__}: {one_line(error)}") from error


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise Refused(f"task {name} runs code that the model writes: run it with lm-eval itself, in a sandbox")
    if getattr(task, "MULTIMODAL", False):
        raise Refused(f"task {name} needs images or sound: layerprune evaluates text only")


def _manager(names: tuple[str, ...], folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if folder is None:
        return _all_tasks()
    if not folder.is_dir():
        raise UsageError(f"the task folder {folder} does not exist")
    with quiet():
        local = TaskManager(include_path=folder, include_defaults=False)
        if not local.all_tasks:
            why = "; ".join(_broken_files(folder)) or "no .yaml file in it has a `task:` or `group:` key"
            raise UsageError(f"the task folder {folder} has no tasks: {why}")
        if all(_is_complete(local.task_index, name) for name in names):
            return local
        return TaskManager(include_path=folder)


class _AnyTag(yaml.SafeLoader):
    """Reads lm-eval's `!function` as nothing: only the syntax is looked at."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


def _broken_files(folder: Path) -> list[str]:
    """What is wrong with the YAML files of a folder; lm-eval passes over such files in silence."""
    faults = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _AnyTag)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            faults.append(f"{path} is not valid YAML: {one_line(error)}")
            continue
        includes = content.get("include", []) if isinstance(content, dict) else []
        for name in [includes] if isinstance(includes, str) else includes:
            if not (path.parent / name).exists():
                faults.append(f"{path} includes {name}, which does not exist")
    return faults


@functools.cache
def _all_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()  # reads every task file that lm-eval has: 7 s


def _is_complete(index: Mapping[str, Any], name: str) -> bool:
    """Whether a name, and for a group all of its members, are in the index."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    inner = [m if isinstance(m, str) else m.get("group") or m.get("task") for m in members]
    return all(isinstance(m, str) and m != name and _is_complete(index, m) for m in inner)


def lm_eval_seeds(seed: int) -> tuple[int, int, int, int]:
    """Seeds of random, numpy, torch and the choice of examples: 0 is the default of lm-eval's command line, any other
    number is its `--seed N`."""
    return (0, 1234, 1234, 1234) if seed == 0 else (seed,) * 4


def set_seeds(seed: int) -> None:
    import numpy
    import torch

    python, numbers, tensors, _ = lm_eval_seeds(seed)
    random.seed(python)
    numpy.random.seed(numbers)
    torch.manual_seed(tensors)


def seed_tasks(tasks: TaskSet, seed: int) -> None:
    """Seed everything, the choice of in-context examples too, as lm-eval's command line does before it builds requests."""
    set_seeds(seed)
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=lm_eval_seeds(seed)[3])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's log below errors is dropped, as are its bars (one a subject); what it prints goes to stderr."""
    from lm_eval.api import task as building

    log = logging.getLogger("lm_eval")
    before, bar = log.level, building.tqdm
    log.setLevel(logging.ERROR)
    building.tqdm = _no_bar
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(before)
        building.tqdm = bar


def _no_bar(items: Iterable[Any], **settings: Any) -> Iterable[Any]:
    return items


def check_counts(**options: int | None) -> None:
    """Raise UsageError where an option that counts something (limit, batch_size ...) is below 1."""
    for name, number in options.items():
        if number is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} {number} measures nothing: use at least 1")


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: TaskSet,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, Any], int]:
    """lm-eval's own result dictionary, samples included, and the number of prompts cut to the model's context."""
    from layerprune.eval.harness import LiveModel

    training = model.training
    try:
        with quiet():
            lm = LiveModel(model, tokenizer, batch_size, progress)
        found = ask_harness(lm, tasks, limit, seed)
    finally:
        model.train(training)
    return found, lm.truncated


def ask_harness(lm: Any, tasks: TaskSet, limit: int | None, seed: int) -> dict[str, Any]:
    """Let lm-eval score one of its models; its own result dictionary, samples included."""
    from lm_eval.evaluator import evaluate

    seed_tasks(tasks, seed)
    with quiet():
        return dict(evaluate(lm=lm, task_dict=tasks.loaded, limit=limit, log_samples=True))


@contextlib.contextmanager
def built_once(tasks: TaskSet) -> Iterator[None]:
    """Inside the block lm-eval builds a task's requests (templates, in-context examples) once, for any number of models.

    One limit and one seed must serve all of them.
    """

    def shadow(task: Any) -> None:
        build = task.build_all_requests
        made: list[bool] = []

        def build_or_reuse(**settings: Any) -> None:
            if not made:
                build(**settings)
                made.append(True)
            for request in task.instances:
                request.resps, request.filtered_resps = [], {}

        task.build_all_requests = build_or_reuse

    try:
        for task in tasks.tasks.values():
            shadow(task)
        yield
    finally:
        for task in tasks.tasks.values():
            task.__dict__.pop("build_all_requests", None)


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, int | None] | TaskSet,
    *,
    task_folder: Path | str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    samples: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a live model (it may be virtually cut) on lm-eval tasks; the numbers are those of lm-eval's command line.

    tasks: names to in-context examples (None: the task's own), or a TaskSet, which saves loading for the next model.
    limit: the first items of each task only. batch_size: rows a batch; None lets tokens and memory decide; the
    results do not depend on it beyond rounding. progress: a bar on stderr.

    Returns results (every metric of lm-eval, for tasks and groups), versions, n_samples, num_fewshot, truncated
    (prompts cut on the left to the model's context) and table: a row for each name and metric shown, with value,
    stderr, n, shots, chance (the mean of 1 / choices) and majority (share of the most frequent answer; two choices only),
    None where unknown. With `samples`, also correct: for each task 1 or 0 an item, in the order of the data set; and
    items: the same behind each task/metric of the table, a group's members one after another.
    """
    check_counts(limit=limit, batch_size=batch_size)
    ready = tasks if isinstance(tasks, TaskSet) else load_tasks(tasks, task_folder, seed)
    found, truncated = run_harness(
        model, tokenizer, ready, limit=limit, batch_size=batch_size, seed=seed, progress=progress
    )
    return summarise(ready, found, truncated, samples)


def summarise(ready: TaskSet, found: Mapping[str, Any], truncated: int, samples: bool) -> dict[str, Any]:
    """What `score_tasks` returns, from lm-eval's result dictionary."""
    made = {
        "results": {name: _plain(metrics) for name, metrics in found["results"].items()},
        "versions": found["versions"],
        "n_samples": {name: dict(n) for name, n in found["n-samples"].items()},
        "num_fewshot": found["n-shot"],
        "truncated": truncated,
        "table": [row for name in ready.names for row in _rows(name, ready, found)],
    }
    if samples:
        made["correct"] = {name: c for name, s in found["samples"].items() if (c := _correct(s)) is not None}
        made["items"] = _items(ready, made["table"], made["correct"])
    return made


def _items(ready: TaskSet, table: Sequence[Mapping[str, Any]], correct: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The items behind the first row of each name in the table, a group's members one after another."""
    found: dict[str, list[int]] = {}
    named = set()
    for row in table:
        members = ready.members.get(row["task"], ()) or (row["task"],)
        if row["task"] not in ready.loaded["groups"] and len(members) > 1:
            members = (row["task"],)
        if row["task"] not in named and all(member in correct for member in members):
            items = [c for member in members for c in correct[member]]
            if abs(sum(items) / len(items) - row["value"]) < 1e-6:  # not where subjects count alike, whatever their size
                found[f"{row['task']}/{row['metric']}"] = items
        named.add(row["task"])
    return found


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON: numpy numbers become Python's, "N/A" and what is no finite number become None."""
    plain: dict[str, Any] = {}
    for key, value in metrics.items():
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, Mapping):
            plain[key] = _plain(value)
        elif value == "N/A" or isinstance(value, float) and not math.isfinite(value):
            plain[key] = None
        else:
            plain[key] = value if isinstance(value, int | float | str | None) else str(value)
    return plain


def _rows(name: str, tasks: TaskSet, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table rows of one name asked for: a task; a group (lm-eval's aggregate if it has one, and the plain mean);
    or the tasks of a tag, and of a group without either."""
    members = tasks.members[name]
    rows = _metric_rows(name, members, found, tasks) if name in found["results"] else []
    each = [_metric_rows(member, (member,), found, tasks) for member in members]
    if name in tasks.loaded["groups"]:
        single = [row for member in each for row in member if row["metric"] == "acc"]
        if len(single) == len(members):
            rows.append(_plain_mean(name, single))
    return rows or [row for member in each for row in member]


def _plain_mean(name: str, single: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over subjects, all of them with the same weight, as papers report MMLU."""
    errors = [row["stderr"] for row in single]
    chances, shots = [row["chance"] for row in single], {row["shots"] for row in single}
    return {
        "task": name,
        "metric": "acc (mean of subjects)",
        "value": sum(row["value"] for row in single) / len(single),
        "stderr": None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(errors),
        "n": sum(row["n"] for row in single),
        "shots": shots.pop() if len(shots) == 1 else None,
        "chance": None if None in chances else sum(chances) / len(chances),
        "majority": None,
    }


def _metric_rows(
    name: str, members: tuple[str, ...], found: Mapping[str, Any], tasks: TaskSet
) -> list[dict[str, Any]]:
    """One row for each filter of the metric shown: the first of ACCURACIES that there is, else the first metric."""
    metrics = _plain(found["results"][name])
    keys = [k for k in metrics if "," in k and "_stderr," not in k and isinstance(metrics[k], int | float)]
    bases = [key.split(",")[0] for key in keys]
    shown = next((m for m in ACCURACIES if m in bases), bases[0] if bases else None)
    facts = [_choices(tasks.tasks[m], found["samples"][m]) for m in members]
    counts = [found["n-samples"][m]["effective"] for m in members]
    known = shown == "acc" and all(chance is not None for chance, _ in facts)
    chance = sum(c * n for (c, _), n in zip(facts, counts, strict=True)) / sum(counts) if known else None
    rows = []
    for key, base in zip(keys, bases, strict=True):
        if base == shown:
            kind = key.split(",", 1)[1]
            rows.append(
                {
                    "task": name,
                    "metric": base if kind == "none" else f"{base} ({kind})",
                    "value": metrics[key],
                    "stderr": metrics.get(f"{base}_stderr,{kind}"),
                    "n": sum(counts),
                    "shots": found["n-shot"].get(name),
                    "chance": chance,
                    "majority": facts[0][1] if len(members) == 1 and shown == "acc" else None,
                }
            )
    return rows


def _choices(task: Any, samples: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Chance (the mean of 1 / choices) and, where all items have two, the share of the most frequent answer."""
    if task.OUTPUT_TYPE != "multiple_choice" or not samples:
        return None, None
    items = {s["doc_id"]: s for s in samples}.values()
    counts = [len(task.doc_to_choice(s["doc"])) for s in items]
    answers = [str(s["target"]) for s in items]
    two = set(counts) == {2}
    return sum(1 / c for c in counts) / len(counts), max(map(answers.count, set(answers))) / len(answers) if two else None


def _correct(samples: list[dict[str, Any]]) -> list[int] | None:
    """1 or 0 an item, by doc_id, of the first filter; None where no accuracy is measured item by item."""
    metric = next((m for m in ACCURACIES if samples and m in samples[0]), None)
    first = [s for s in samples if s["filter"] == samples[0]["filter"]]
    if metric is None or not all(s.get(metric) in (0, 1) for s in first):
        return None
    return [int(s[metric]) for s in sorted(first, key=lambda s: s["doc_id"])]
