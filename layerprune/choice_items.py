"""The multiple-choice items of lm-eval tasks, for the probe that looks at their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerprune.depth.choices import Item
from layerprune.model.errors import Refused
from layerprune.task_requests import Asked, task_requests


def choice_items(
    live: Any, tokenizer: Any, tasks: Mapping[str, int | None], folder: str | None, limit: int | None, seed: int
) -> dict[str, list[Item]]:
    """By task: the items that lm-eval itself makes (templates, in-context examples), whose options are one token each.

    live: the model, whose context bounds them; nothing is scored. Raises Refused for a task without such items: letters
    as options (` A`, ` B`) are of one token, sentences are not.
    """
    from layerprune.eval.harness import LiveModel
    from layerprune.eval.tasks import load_tasks, quiet

    ready = load_tasks(tasks, folder, seed)
    with quiet():
        lm = LiveModel(live, tokenizer)
    found: dict[str, list[Item]] = {}
    for name, documents in task_requests(ready, limit, seed).items():
        items = [item for asked in documents if (item := _item(lm, asked)) is not None]
        if not items:
            raise Refused(
                f"--tasks {name} has no items whose options are single tokens: take a task with letters as options (MMLU, ARC in "
                "letter form), or leave the probe `choices` out"
            )
        found[name] = items
    return found


def _item(lm: Any, asked: Asked) -> Item | None:
    """One item, None where an option has more than one token or the options have several contexts."""
    if not all(context and option for context, option in asked.pairs):
        return None
    encoded = [lm._encode_pair(context, option) for context, option in asked.pairs]
    if len(encoded) < 2 or any(len(option) != 1 for _, option in encoded) or len({tuple(c) for c, _ in encoded}) != 1:
        return None
    context, options = tuple(encoded[0][0]), tuple(option[0] for _, option in encoded)
    if not context or len(context) > lm.max_length or len(set(options)) < len(options):
        return None
    gold = asked.target
    gold = int(gold) if isinstance(gold, int | str) and str(gold).isdigit() and int(gold) < len(options) else None
    return Item(context, options, gold)
