"""docs/routing.md says what the records in benchmarks/ say, and the items of its measurement are apart."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_the_tables_are_those_of_the_records() -> None:
    maker = load_script("docs/make_routing.py")
    page = (DOCS / "routing.md").read_text(encoding="utf-8")
    assert maker.filled(page) == page, "run python docs/make_routing.py"
    changed = re.sub(r"(\| whole model, \d+ items \| \d+ \| 0\.)\d+", r"\g<1>000", page)
    assert changed != page and maker.filled(changed) == page, "a changed number is seen"


def test_the_figure_is_drawn_from_them(tmp_path: Path) -> None:
    load_script("docs/make_routing.py").draw(tmp_path / "routing.png")
    assert (tmp_path / "routing.png").stat().st_size > 20_000


def test_the_overhead_is_said_once_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = load_script("docs/make_routing.py")
    monkeypatch.setattr(maker, "BENCHMARKS", tmp_path)
    assert "has not been measured yet" in maker.overhead()
    record = {
        "device": "a GPU", "shape": {"layers": 32, "hidden": 4096, "dtype": "torch.bfloat16", "prompt": 256, "new": 128},
        "runs": [
            {"rows": rows, "ratio": ratio, "ratios": [0.9, ratio, 1.2], "same_tokens": 0.25,
             "share_of_bare": {"routers": 0.004 / rows, "decide": 0.014, "prefill": 0.01}}
            for rows, ratio in ((1, 1.0234), (8, 1.01))
        ],
    }  # fmt: skip
    (tmp_path / "route_overhead.json").write_text(json.dumps(record))
    told = maker.overhead()
    assert "+2.3% (-10% to +20%) at 1 row, +1.0% (-10% to +20%) at 8 rows" in told
    assert "arithmetic is 0.4% at 1 row, 0.1% at 8 rows" in told and "takes 0.4% at 1 row" in told and "25% at 1 row" in told


def test_clozes_are_apart_and_the_same_again(tmp_path: Path) -> None:
    maker = load_script("benchmarks/route_items.py")
    sentence = "The old mill by the river {} was built by a man who came from the north and who never said more than a {}."
    words = ["word", "tale", "prayer", "name", "song", "lie", "story", "thing"]
    texts = [" ".join(sentence.format(d * 100 + i, words[(d + i) % 8]) for i in range(12)) for d in range(20)]
    train, test = maker.cloze(texts)
    assert maker.cloze(texts) == (train, test) and len(train) > 20 < len(test)
    for item in train + test:
        assert len(item["options"]) == 4 == len(set(item["options"]))
        (text,) = [text for text in texts if f"{item['prompt']} {item['options'][item['gold']]}." in text]

    def documents_of(items: list[dict[str, Any]]) -> set[str]:
        return {text for text in texts for item in items if item["prompt"] in text}

    assert not documents_of(train) & documents_of(test)
    maker.write(tmp_path, train, test)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == len(train)
    with pytest.raises(AssertionError, match="stands in both files"):
        maker.write(tmp_path, train, train[:1])


def test_the_demo_is_searched_on_other_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    try:
        train, test = load_script("benchmarks/route_items.py").demo(24, 10)
    finally:
        for name in ("world", "quiz", "puzzles", "prose", "streams"):
            if name not in before:
                sys.modules.pop(name, None)
    assert [len([i for i in own if i["task"] == "demo_reasoning"]) for own in (train, test)] == [24, 10]
    assert len(train) == 96 and len(test) == 40
    asked = {line for name in ("cloze", "letters", "yesno", "reasoning") for line in prompts_of(name)}
    assert not asked & {item["prompt"] for item in train}
    assert {item["prompt"] for item in test} <= asked


def prompts_of(name: str) -> list[str]:
    lines = (ROOT / "recipes" / "demo" / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]
