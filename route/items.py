"""Prompts with known answers, from JSONL: a short answer, or options of which one is right.

One object a line: `prompt` with `answer`, or `prompt` with `options` and `gold` (0-based). `task` may name what the item
belongs to, in tables. Other keys are not looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from layerprune.model.data import check_token_id
from layerprune.model.errors import Refused


@dataclass(frozen=True)
class Item:
    """One prompt as token ids, and what may follow it.

    line: where it stands, from 1 in a file, from 0 in a task. endings: the answer alone, or all options. gold: which option is
    right, None for an answer, which counts as given where greedy generation gives it token for token and does not go on with
    the word. task: the name under which it is counted.
    """

    line: int
    prompt: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    gold: int | None
    task: str = "items"


def prompt_key(prompt: Sequence[int]) -> str:
    """16 hexadecimal digits that tell a prompt by its token ids.

    `about` in routers.json lists under `prompts` those of all items of the search that the routers come from, so that they
    are not measured on what they have learnt.
    """
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()[:16]


def load_items(path: Path, tokenizer: Any, vocab: int, context: int | None = None) -> list[Item]:
    """The items of a file, in its order; empty lines do not count.

    An ending that does not begin with white space is put after a space, where the prompt does not end with white space.
    vocab: the tokens that the model knows; context: the longest sequence that it takes, if it says so. Raises Refused for a
    file that cannot be read or holds no item, and for a line that is no item or too long, by its number.
    """
    items: list[Item] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    items.append(_item(line, number, path, tokenizer))
                    tokens = max(len(items[-1].prompt) + len(ending) for ending in items[-1].endings)
                    if context is not None and tokens > context:
                        raise Refused(f"line {number} of {path} takes {tokens} tokens, and the model's context is {context}")
    except FileNotFoundError:
        raise Refused(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise Refused(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from None
    if not items:
        raise Refused(f"{path} holds no item: give one JSON object a line, with `prompt` and `answer` or `options` and `gold`")
    check_token_id(max(max(max(item.prompt), *map(max, item.endings)) for item in items), vocab)
    return items


def _item(line: str, number: int, path: Path, tokenizer: Any) -> Item:
    def wrong(why: str) -> Refused:
        return Refused(f"line {number} of {path} {why}")

    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        raise wrong("is not valid JSON") from None
    if not isinstance(raw, dict):
        raise wrong("is not a JSON object")
    prompt, answer, options, gold = (raw.get(key) for key in ("prompt", "answer", "options", "gold"))
    if not _is_text(prompt):
        raise wrong("has no `prompt` with text in it")
    if (answer is None) == (options is None):
        raise wrong("needs either an `answer` or `options`" + (", not both" if answer is not None else ""))
    if options is None:
        if not _is_text(answer):
            raise wrong("has an `answer` that is no text")
        options, gold = [answer], None
    else:
        if not isinstance(options, list) or len(options) < 2 or not all(map(_is_text, options)):
            raise wrong("has `options` that are not two texts or more")
        if len(set(options)) < len(options):
            raise wrong("has the same option twice")
        if type(gold) is not int or not 0 <= gold < len(options):
            raise wrong(f"has the `gold` {gold!r}, which is none of its options 0 to {len(options) - 1}")
    task = raw.get("task", "items")
    if not _is_text(task):
        raise wrong("has a `task` that is no text")
    context, endings = _tokens(tokenizer, prompt, options)
    if not context or not all(endings):
        raise wrong("has a prompt or an answer without tokens")
    return Item(number, context, endings, gold, task)


def _is_text(value: Any) -> TypeGuard[str]:
    try:  # half of a surrogate pair is valid JSON and no text
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _tokens(tokenizer: Any, prompt: str, endings: Sequence[str]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The prompt's ids and those of each ending after it."""
    # white space at the end of a prompt belongs to the first word after it, as tokenizers see it
    bare = prompt.rstrip()
    space = prompt[len(bare) :] or " "
    context = tuple(tokenizer(bare)["input_ids"])
    found = []
    for ending in endings:
        text = ending if ending[0].isspace() and space == " " else space + ending
        together = tuple(tokenizer(bare + text)["input_ids"])
        if together[: len(context)] == context:
            found.append(together[len(context) :])
        else:  # the two share a token, or the tokenizer ends texts with one of its own
            found.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return context, tuple(found)
