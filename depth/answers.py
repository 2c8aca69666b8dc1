"""Are later tokens of an answer decided earlier? Answers of one to three tokens (arXiv 2510.18871, case study 2)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layerprune.depth.decided import DecidedSum, Marked, decided_probe
from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused

LONGEST = 3
"""Tokens of an answer, at most."""
LINES = tuple(f"len{length}-pos{place}" for length in range(1, LONGEST + 1) for place in range(1, length + 1))
"""Groups of tokens: by the length of their answer and their place in it."""


def read_answers(path: str | Path) -> list[tuple[str, str]]:
    """Pairs of prompt and answer, from JSON lines with the strings `prompt` and `answer`.

    Raises Refused for a file that is missing, empty or something else, with the line.
    """
    found, number = [], 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (the number is for the message below)
                if line.strip():
                    item = json.loads(line)
                    prompt, answer = item["prompt"], item["answer"]
                    if not (isinstance(prompt, str) and isinstance(answer, str) and prompt.strip() and answer.strip()):
                        raise TypeError
                    (prompt + answer).encode()  # half of a surrogate pair is valid JSON and no text
                    found.append((prompt, answer))
    except (KeyError, TypeError, RecursionError, UnicodeEncodeError, json.JSONDecodeError):
        raise Refused(
            f"line {number} of {path} is not a JSON object with the strings `prompt` and `answer`, both with text"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read as JSON lines: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise Refused(f"{path} holds no items: each line is a JSON object with the strings `prompt` and `answer`")
    return found


def answers_probe(
    decoder: Decoder,
    tokenizer: Any,
    items: Sequence[tuple[str, str]],
    *,
    length: int | None = None,
    max_tokens: int | None = None,
    pad_id: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> DecidedSum:
    """When the tokens of answers are decided, by the answer's length and the token's place in it (`LINES`).

    items: (prompt, answer); a blank is put between the two, and counts to the answer's first token. Each token follows the
    gold ones before it, whether or not the model predicts those; it counts where the model predicts it. Items whose answers
    have more than three tokens, or do not begin with a token of their own, or that are longer than `length` tokens, are left
    out. Raises Refused where none remains.
    """
    texts = [text for prompt, answer in items if (text := mark_answer(tokenizer, prompt, answer, length)) is not None]
    if not texts:
        limit = "" if length is None else f" within {length} tokens"
        raise Refused(f"none of the {len(items)} items has an answer of 1 to {LONGEST} tokens{limit}: nothing can be probed")
    total = decided_probe(decoder, texts, LINES, max_tokens=max_tokens, pad_id=pad_id, progress=progress)
    total.left_out = len(items) - len(texts)
    return total


def mark_answer(tokenizer: Any, prompt: str, answer: str, length: int | None = None) -> Marked | None:
    """The ids of prompt and answer, those of the answer marked; None for an item that is left out."""
    before = _ids(tokenizer, prompt.rstrip())
    ids = _ids(tokenizer, f"{prompt.rstrip()} {answer.strip()}")
    count = len(ids) - len(before)
    if not before or not 1 <= count <= LONGEST or ids[: len(before)] != before or len(ids) > (length or len(ids)):
        return None
    first = LINES.index(f"len{count}-pos1")
    return Marked(ids, [(len(before) + place, first + place) for place in range(count)])


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Without the end of the text, which some tokenizers put there: the prompt goes on."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
