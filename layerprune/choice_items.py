"""The multiple-choice items of lm-eval tasks, for the probe that looks at their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerprune.depth.choices import Item
from layerprune.model.errors import Refused


def choice_items(
    live: Any, tokenizer: Any, tasks: Mapping[str, int | None], folder: str | None, limit: int | None, seed: int
) -> dict[str, list[Item]]:
    """By task: the items that lm-eval itself makes (templates, in-context examples), whose options are one token each.

    live: the model, whose context bounds them; nothing is scored. Raises Refused for a task without such items: letters
    as options (` A`, ` B`) are of one token, sentences are not.
    """
    from layerprune.eval.harness import LiveModel
    from layerprune.eval.tasks import ask_harness, load_tasks

    class Recorder(LiveModel):
        """Answers nothing: every request is as likely as every other."""

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            return [(0.0, False) for _ in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return ["" for _ in requests]

    ready = load_tasks(tasks, folder, seed)
    lm = Recorder(live, tokenizer)
    found: dict[str, list[Item]] = {}
    for name, samples in ask_harness(lm, ready, limit, seed)["samples"].items():
        items = [item for sample in samples if (item := _item(lm, sample)) is not None]
        if not items:
            raise Refused(
                f"--tasks {name} has no items whose options are single tokens: take a task with letters as options (MMLU, ARC in "
                "letter form), or leave the probe `choices` out"
            )
        found[name] = items
    return found


def _item(lm: Any, sample: Mapping[str, Any]) -> Item | None:
    """One item, None where an option has more than one token or the options have several contexts."""
    arguments = sample["arguments"]
    pairs = list(arguments.values()) if isinstance(arguments, Mapping) else arguments
    try:
        texts = [(p["arg_0"], p["arg_1"]) if isinstance(p, Mapping) else (p[0], p[1]) for p in pairs]
    except (KeyError, IndexError, TypeError):
        return None
    encoded = [lm._encode_pair(context, option) for context, option in texts if isinstance(option, str)]
    if len(encoded) < 2 or any(len(option) != 1 for _, option in encoded) or len({tuple(c) for c, _ in encoded}) != 1:
        return None
    context, options = tuple(encoded[0][0]), tuple(option[0] for _, option in encoded)
    if not context or len(context) > lm.max_length or len(set(options)) < len(options):
        return None
    gold = sample.get("target")
    gold = int(gold) if isinstance(gold, int | str) and str(gold).isdigit() and int(gold) < len(options) else None
    return Item(context, options, gold)
