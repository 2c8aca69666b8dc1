"""Which prompts with known answers are routed: of lm-eval tasks, or of a file of one's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.model.config import load_config, pick_length, vocab_size
from layerprune.model.data import check_token_id, data_fingerprint
from layerprune.model.errors import Refused, UsageError
from layerprune.model.fingerprint import folder_fingerprint
from layerprune.model.source import ModelSource
from layerprune.task_requests import Asked, pick_splits, task_requests

LONGEST = 16
"""Tokens of a generated answer, at most: greedy generation must give it token for token."""


@dataclass(frozen=True)
class Wanted:
    """What was asked for, checked as far as that goes without a model; see `want_items`."""

    source: ModelSource
    tasks: dict[str, int | None] | None
    file: Path | None
    task_folder: Path | None
    limit: int | None
    split: str | None
    default: tuple[str, ...]
    seed: int
    trust: bool

    def inputs(self) -> dict[str, Any]:
        """What decides the items, for a run folder's manifest."""
        if self.file is not None:
            return {"items": data_fingerprint(str(self.file)), "limit": self.limit}
        folder = None if self.task_folder is None else folder_fingerprint(self.task_folder)
        split = self.split or f"{self.default[0]} by default"
        return {"tasks": self.tasks, "limit": self.limit, "split": split, "task_folder": folder}

    def told(self) -> dict[str, Any]:
        """Where the items are from, in the user's words."""
        return {"items": str(self.file)} if self.file is not None else {"tasks": list(self.tasks or ())}


@dataclass(frozen=True)
class RouteItems:
    """items: all of them, those of one task together. left_out: by task, why and how many cannot be routed."""

    items: list[Any]
    left_out: dict[str, dict[str, int]]


def want_items(
    source: ModelSource,
    *,
    tasks: Sequence[str] | None = None,
    items: str | Path | None = None,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    default: Sequence[str] = ("train",),
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Wanted:
    """Check what the user asked for: tasks or a file of items, one of the two.

    split: of the tasks' documents; None for the first of `default` that a task has. Raises UsageError, and Refused for a file
    that does not exist.
    """
    from layerprune.eval.evaluate import parse_tasks

    if (not tasks) == (items is None):
        both = "both are given: leave one out" if tasks else "neither is given"
        raise UsageError(f"give either --tasks A,B (of lm-eval) or --items FILE (JSON lines): {both}")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} is not a number above 0")
    if items is not None:
        for option, value in (("--split", split), ("--task-folder", task_folder)):
            if value is not None:
                raise UsageError(f"{option} is for --tasks: leave it out with --items")
        if not Path(items).is_file():
            raise Refused(f"{items} does not exist" if not Path(items).exists() else f"--items {items} is not a file")
        return Wanted(source, None, Path(items), None, limit, None, tuple(default), seed, trust_remote_code)
    folder = task_folder or (source.recipe.tasks_path if source.recipe else None)
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"the task folder {folder} does not exist")
    asked = parse_tasks(list(tasks or ()), None, source.recipe)
    return Wanted(
        source, asked, None, None if folder is None else Path(folder), limit, split, tuple(default), seed, trust_remote_code
    )


def read_items(wanted: Wanted, tokenizer: Any) -> RouteItems:
    """The items, as token ids of this tokenizer; the model's weights are not read.

    Multiple choice keeps its options, a task that generates its target as the answer. Raises UsageError for an unknown task,
    one without documents of the split, and one of another kind, Refused for tasks and files without an item that can be routed.
    """
    from layerprune.route.items import load_items

    config = load_config(wanted.source.folder, wanted.trust)
    vocab, context = vocab_size(config), pick_length(None, config)
    if wanted.file is not None:
        found, counts = [], Counter[str]()
        for item in load_items(wanted.file, tokenizer, vocab, context):
            counts[item.task] += 1
            if wanted.limit is None or counts[item.task] <= wanted.limit:
                found.append(item)
        return RouteItems(found, {})
    return _of_tasks(wanted, tokenizer, vocab)


def _of_tasks(wanted: Wanted, tokenizer: Any, vocab: int) -> RouteItems:
    from layerprune.eval.harness import LiveModel
    from layerprune.eval.tasks import load_tasks, quiet
    from layerprune.model.verify import meta_decoder

    assert wanted.tasks is not None
    ready = load_tasks(wanted.tasks, wanted.task_folder, wanted.seed)
    for name, task in ready.tasks.items():
        if task.OUTPUT_TYPE not in ("multiple_choice", "generate_until"):
            raise UsageError(
                f"task {name} is of the kind {task.OUTPUT_TYPE}: take one with multiple choice or with answers to be generated"
            )
    splits = pick_splits(ready, wanted.split, wanted.default)
    live = meta_decoder(wanted.source.folder, wanted.trust).model  # lm-eval's tokenisation asks a model for its config only
    with quiet():
        lm = LiveModel(live, tokenizer)
    items: list[Any] = []
    left_out: dict[str, dict[str, int]] = {}
    for name, documents in task_requests(ready, wanted.limit, wanted.seed, splits).items():
        delimiter = ready.tasks[name].config.target_delimiter
        before = len(items)
        for asked in documents:
            found = _item(lm, name, asked, delimiter)
            if isinstance(found, str):
                left_out.setdefault(name, {}).setdefault(found, 0)
                left_out[name][found] += 1
            else:
                items.append(found)
        if len(items) == before:
            why = ", ".join(f"{count} with {what}" for what, count in left_out[name].items())
            raise Refused(f"task {name} has no item that can be routed ({why}): leave it out")
    check_token_id(max(max(max(item.prompt), *map(max, item.endings)) for item in items), vocab)
    return RouteItems(items, left_out)


def _item(lm: Any, task: str, asked: Asked, delimiter: str) -> Any:
    """An item, or why this document gives none."""
    from layerprune.route.items import Item

    if asked.choices is None:
        if isinstance(asked.target, list):
            return "several right answers"
        pairs, gold = [(asked.pairs[0][0], f"{delimiter}{asked.target}")], None
    else:
        pairs = list(asked.pairs[: len(asked.choices)])  # what may follow are the options without a context
        gold = asked.choices.index(asked.target) if asked.target in asked.choices else asked.target
        if type(gold) is not int or not 0 <= gold < len(pairs):
            return "no single right option"
    if not all(isinstance(context, str) and context.strip() for context, _ in pairs):
        return "no context"
    encoded = [lm._encode_pair(context, ending) for context, ending in pairs]
    contexts, endings = {tuple(context) for context, _ in encoded}, tuple(tuple(ending) for _, ending in encoded)
    if len(contexts) > 1:
        return "a context for each option"
    (prompt,) = contexts
    if not prompt or not all(endings):
        return "no tokens"
    if len(set(endings)) < len(endings):
        return "the same option twice"
    if gold is None and len(endings[0]) > LONGEST:
        return f"an answer of over {LONGEST} tokens"
    if len(prompt) + max(map(len, endings)) > lm.max_length:
        return "more tokens than the model's context"
    return Item(asked.number, prompt, endings, gold, task)
