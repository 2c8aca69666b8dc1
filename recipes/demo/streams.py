"""Four streams of documents, disjoint by construction.

A document is a few passages (paragraphs) about one theme, or questions, or puzzles. Every passage belongs to exactly
one stream, by the hash of its text: a stream redraws a passage until it is one of its own. So that no passage, hence
no document, of the calibration, healing or validation data is ever part of training needs no bookkeeping, and a
test checks it on stored and on fresh documents alike. Documents are numbered: `document("train", i)` is always the
same text.
"""

import prose
import puzzles
import quiz
from world import SEED, Rng, digest

BUCKETS = 64
STREAMS = {"valid": range(0, 2), "calibration": range(2, 4), "heal": range(4, 10), "train": range(10, BUCKETS)}
MAX_CHARS = 1150  # about 400 tokens


def bucket(passage: str) -> int:
    return digest(f"{SEED}/passage/{passage}") % BUCKETS


def stream_of(passage: str) -> str:
    b = bucket(passage)
    return next(name for name, buckets in STREAMS.items() if b in buckets)


def _own(rng: Rng, draw, mine: range) -> str:
    while bucket(text := draw(rng)) not in mine:
        pass
    return text


def document(stream: str, index: int) -> str:
    """Document `index` of a stream: passages joined by blank lines."""
    rng = Rng(f"{SEED}/{stream}/{index}")
    mine = STREAMS[stream]
    kind = rng.random()
    target = MAX_CHARS * (0.25 if rng.chance(0.15) else 0.6 + 0.4 * rng.random())
    parts: list[str] = []
    size = 0
    if kind < 0.5:
        first = prose.theme(rng)
        draw = lambda r: prose.passage(r, first if r.chance(0.5) else prose.related(r, first))  # noqa: E731
    elif kind < 0.75:
        forms = rng.pick((("cloze",), ("letters",), ("letters",), ("yesno",), ("cloze", "letters", "yesno", "open")))
        draw = lambda r: quiz.passage(r, r.pick(forms))  # noqa: E731
    else:
        family = rng.pick((None, *puzzles.FAMILIES))
        draw = lambda r: puzzles.passage(r, family)  # noqa: E731
    while True:
        text = _own(rng, draw, mine)
        if parts and size + len(text) + 2 > target:
            return "\n\n".join(parts)
        parts.append(text)
        size += len(text) + 2


def documents(stream: str, count: int, start: int = 0):
    """Yields `count` documents, from number `start` on."""
    for index in range(start, start + count):
        yield document(stream, index)
