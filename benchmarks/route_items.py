"""Items for measuring routing: prompts with four options, as train.jsonl and test.jsonl.

    python benchmarks/route_items.py cloze DOCUMENTS.jsonl OUT
    python benchmarks/route_items.py demo OUT

cloze: from documents ({"text": ...} a line) sentences without their last word, after those that stand before them; the
options are the last word and three others that end sentences of these documents, stand there after the same word too, and are
about as frequent. A document gives items for training or for testing, by its hash. demo: questions about the demo's world and
puzzles; those for testing are the first of the demo's own tasks, those for training about other facts and with other cores.
Both are deterministic, and no prompt stands in both files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent.parent / "recipes" / "demo"
CONTEXT, LEAST, MOST = 45, 25, 90
"""Words of a prompt: sentences are put before the one that is cut until there are CONTEXT; those outside the range go."""
A_DOCUMENT = 9
NEAR = 4
"""Neighbours in frequency, on either side, among which the wrong options are drawn."""

Item = dict[str, Any]


def cloze(documents: list[str]) -> tuple[list[Item], list[Item]]:
    """Items for training and for testing."""
    counts: Counter[str] = Counter()
    after: dict[str, set[str]] = {}
    for text in documents:
        words = re.findall(r"[a-z]+", text.lower())
        counts.update(words)
        for first, second in zip(words, words[1:], strict=False):
            after.setdefault(first, set()).add(second)
    sentences = [sentences_of(text) for text in documents]
    endings = {last_word(s) for own in sentences for s in own} - {""}
    found: tuple[list[Item], list[Item]] = [], []
    for text, own in zip(documents, sentences, strict=True):
        digest = hashlib.sha256(text.encode()).hexdigest()
        rng = random.Random(digest)
        made = [item for at in range(len(own)) if (item := one_cloze(own, at, endings, after, counts, rng)) is not None]
        found[int(digest[:4], 16) % 5 >= 3].extend(rng.sample(made, min(A_DOCUMENT, len(made))))
    return found


def sentences_of(text: str) -> list[str]:
    return [s for line in text.split("\n") for s in re.split(r"(?<=[a-z]{2}[.!?]) (?=[A-Z])", line.strip()) if s]


def last_word(sentence: str) -> str:
    """The word that a sentence ends with, '' for one with a capital, a hyphen or anything else than letters."""
    found = re.search(r" ([a-z]{4,})\.$", sentence)
    return found[1] if found else ""


def one_cloze(
    own: list[str], at: int, endings: set[str], after: dict[str, set[str]], counts: Counter[str], rng: random.Random
) -> Item | None:
    word = last_word(own[at])
    if not word:
        return None
    prompt = own[at][: -len(word) - 2]
    for before in reversed(own[:at]):
        if len(prompt.split()) >= CONTEXT:
            break
        prompt = f"{before} {prompt}"
    if at == 0 or not LEAST <= len(prompt.split()) <= MOST:
        return None
    last = re.findall(r"[a-z]+", prompt.lower())[-1]
    pool = sorted(endings & after.get(last, set()) | {word}, key=lambda w: (counts[w], w))
    i = pool.index(word)
    near = [w for w in pool[max(0, i - NEAR) : i + NEAR + 1] if w != word]
    if len(near) < 3:
        return None
    options = rng.sample(near, 3)
    gold = rng.randrange(4)
    options.insert(gold, word)
    return {"task": "cloze", "prompt": prompt, "options": options, "gold": gold}


def demo(training: int, testing: int) -> tuple[list[Item], list[Item]]:
    """training, testing: items of each of the four tasks."""
    sys.path.insert(0, str(DEMO))
    import puzzles
    import quiz
    from world import HELD, SEED, Rng

    test: list[Item] = []
    taken = set()
    for name in ("cloze", "letters", "yesno", "reasoning"):
        lines = [json.loads(line) for line in (DEMO / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        taken |= {(line["entity"], line["attribute"]) for line in lines if "entity" in line}
        taken |= {line["prompt"] for line in lines}
        test += [item_of(name, line) for line in lines[:testing]]
    rng = Rng(SEED + "/route-items")
    pairs = [(e, a) for e, a in rng.shuffled(HELD) if (e.name, a) not in taken][:training]
    train: list[Item] = []
    for i, (entity, attribute) in enumerate(pairs):
        choices = quiz.options(rng, entity, attribute, i % 4)
        asked, true = (entity.value(attribute), 0) if i % 2 == 0 else (choices[(i % 4 + 1) % 4], 1)
        made: dict[str, Item] = {
            "cloze": {"prompt": quiz.CLOZE[attribute][i // 4 % 2].format(e=entity.name), "choices": choices, "gold": i % 4},
            "letters": {"prompt": quiz.lettered(entity, attribute, choices), "choices": list(quiz.LETTERS), "gold": i % 4},
            "yesno": {"prompt": quiz.yes_no(entity, attribute, asked), "choices": ["yes", "no"], "gold": true},
        }
        train += [item_of(name, item) for name, item in made.items()]
    solved = (item for item in puzzles.items(rng, 2 * training) if item["prompt"] not in taken)
    train += [item_of("reasoning", item) for item, _ in zip(solved, range(training), strict=False)]
    return sorted(train, key=lambda item: item["task"]), test


def item_of(task: str, item: Item) -> Item:
    return {"task": f"demo_{task}", "prompt": item["prompt"], "options": item["choices"], "gold": item["gold"]}


def write(folder: Path, train: list[Item], test: list[Item]) -> None:
    assert not {item["prompt"] for item in train} & {item["prompt"] for item in test}, "a prompt stands in both files"
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in (("train", train), ("test", test)):
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(items)} items")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    of_text = kinds.add_parser("cloze")
    of_text.add_argument("documents", type=Path)
    of_text.add_argument("out", type=Path)
    of_demo = kinds.add_parser("demo")
    of_demo.add_argument("out", type=Path)
    of_demo.add_argument("--training", type=int, default=150)
    of_demo.add_argument("--testing", type=int, default=100)
    asked = parser.parse_args()
    if asked.kind == "cloze":
        texts = [json.loads(line)["text"] for line in asked.documents.read_text(encoding="utf-8").splitlines()]
        write(asked.out, *cloze(texts))
    else:
        write(asked.out, *demo(asked.training, asked.testing))


if __name__ == "__main__":
    main()
