"""What lm-eval asks a model about the documents of its tasks, before anything is scored: prompts, options, targets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from layerprune.model.errors import Refused, UsageError, one_line

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Asked:
    """One document of a task. number: its place in the split (0-based); pairs: context and continuation of each request, as
    texts; of a task that generates the one pair has the continuation ''. target: as the task has it; choices: its options."""

    number: int
    pairs: tuple[tuple[str, str], ...]
    target: Any
    choices: tuple[str, ...] | None


def task_requests(ready: Any, limit: int | None, seed: int, splits: dict[str, str] | None = None) -> dict[str, list[Asked]]:
    """By task: the first `limit` documents with their templates and in-context examples, all of lm-eval's own making.

    ready: a `TaskSet`. splits: of each task the split that is asked about (train, validation or test); None for lm-eval's own
    choice. An item is never its own in-context example. Raises Refused for a task whose requests cannot be built.
    """
    from layerprune.eval.tasks import quiet, seed_tasks

    seed_tasks(ready, seed)
    found: dict[str, list[Asked]] = {}
    for name, task in ready.tasks.items():
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet())
            if splits is not None:
                stack.enter_context(documents_of(task, splits[name]))
            try:
                task.build_all_requests(limit=limit, rank=0, world_size=1)
                found[name] = _asked(task)
            except Exception as error:  # a task is somebody's file, with code and templates: whatever it raises is its fault
                raise Refused(f"task {name} makes no prompts: {type(error).__name__}: {one_line(error)}") from error
    return found


def pick_splits(ready: Any, split: str | None, default: Sequence[str]) -> dict[str, str]:
    """The split of each task: `split`, or the first of `default` that it has. Raises UsageError where a task has it not."""
    found = {}
    for name, task in ready.tasks.items():
        has = {"train": task.has_training_docs, "validation": task.has_validation_docs, "test": task.has_test_docs}
        there = [s for s in SPLITS if has[s]()]
        picked = split if split is not None else next((s for s in default if s in there), None)
        if picked not in there:
            missing = "training" if (split or default[0]) == "train" else split or default[0]
            use = " or ".join(f"--split {s}" for s in there)
            apart = ", and measure on other items" if missing == "training" else ""
            raise UsageError(f"task {name} has no {missing} documents: use {use}{apart}, or give items of your own with --items")
        found[name] = str(picked)
    return found


@contextlib.contextmanager
def documents_of(task: Any, split: str) -> Iterator[None]:
    """Inside the block lm-eval takes the documents of this split for those that it evaluates."""
    if split == ("test" if task.has_test_docs() else "validation"):
        yield  # as they are
        return
    docs = {"train": task.training_docs, "validation": task.validation_docs, "test": task.test_docs}[split]
    own = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    config, shots = task.config, getattr(task, "fewshot_cfg", None)
    before = config.test_split, None if shots is None else shots.split
    # lm-eval leaves a document out of its own examples only where these are named as the split that is evaluated
    if shots is not None and shots.split is None and not getattr(shots, "samples", None):
        rule = next((s for s in SPLITS if getattr(config, own[s]) is not None), None)
        shots.split = None if rule is None else getattr(config, own[rule])
    named = getattr(config, own[split])
    task.has_test_docs, task.test_docs = (lambda: True), docs
    config.test_split = named
    try:
        yield
    finally:
        config.test_split = before[0]
        if shots is not None:
            shots.split = before[1]
        del task.has_test_docs, task.test_docs


def _asked(task: Any) -> list[Asked]:
    documents: dict[int, list[Any]] = {}
    for instance in task.instances:
        documents.setdefault(instance.doc_id, []).append(instance)
    found = []
    for number, instances in documents.items():
        instances.sort(key=lambda instance: instance.idx)
        pairs = []
        for instance in instances:
            context, *rest = instance.args
            pairs.append((context, rest[0] if rest and isinstance(rest[0], str) else ""))
        doc = instances[0].doc
        choices = tuple(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == "multiple_choice" else None
        found.append(Asked(number, tuple(pairs), task.doc_to_target(doc), choices))
    return found
