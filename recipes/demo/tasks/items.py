"""Items of the demo's tasks: JSONL files beside this one, wherever the package is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _load(name: str) -> Any:
    import datasets

    file = Path(__file__).parent / f"{name}.jsonl"
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(_read(file))})


def _read(file: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def cloze(**kwargs: Any) -> Any:
    return _load("cloze")


def letters(**kwargs: Any) -> Any:
    return _load("letters")


def yesno(**kwargs: Any) -> Any:
    return _load("yesno")


def reasoning(**kwargs: Any) -> Any:
    return _load("reasoning")
