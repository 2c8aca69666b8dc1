"""What `layerprune depth` is asked for, and a model in memory with the texts on which it is probed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.model.data import data_fingerprint
from layerprune.model.fingerprint import folder_fingerprint
from layerprune.model.recipes import HealSettings, section_of
from layerprune.model.source import ModelSource
from layerprune.runfolder import RunFolder
from layerprune.stages import Say


@dataclass(frozen=True)
class Subject:
    """One model to be probed. label: its folder's name, unlike those of the others."""

    source: ModelSource
    label: str
    layers: int
    data: str
    length: int

    @property
    def lens_data(self) -> str:
        """What a lens is trained on: the recipe's data for healing, else the data that is probed."""
        recipe = self.source.recipe
        return self.data if recipe is None else section_of(recipe, HealSettings).data


@dataclass(frozen=True)
class Wanted:
    """The tasks of the probe `choices`."""

    tasks: tuple[str, ...]
    limit: int | None
    folder: str | Path | None

    def inputs(self) -> dict[str, Any]:
        """What decides their items."""
        folder = None if self.folder is None else folder_fingerprint(Path(self.folder))
        return {"tasks": list(self.tasks), "limit": self.limit, "task_folder": folder}


@dataclass(frozen=True)
class Ask:
    """What one call asks for, of every model. tasks: for `choices`; prompt, answer: for `erasure` and `gradients`, None for
    some of the data; lens (a folder), lens_steps: for `tuned`, one of the two; answers (a file), tagger: for `answers`, `words`."""

    samples: int
    seed: int
    dtype: str
    device: str | None
    trust: bool
    progress: bool
    say: Say
    tasks: Wanted | None = None
    prompt: str | None = None
    answer: str | None = None
    lens: Path | None = None
    lens_steps: int | None = None
    answers: Path | None = None
    tagger: Callable[[str], Any] | None = None

    def settings(self, probe: str, subject: Subject) -> dict[str, Any] | None:
        """What decides the result of one probe beside the folder's inputs; it is stored with the result as `asked`."""
        if probe == "choices" and self.tasks is not None:
            return self.tasks.inputs()
        if probe in ("erasure", "gradients"):
            return {"prompt": self.prompt, "answer": self.answer}
        if probe == "answers":
            return {"items": data_fingerprint(str(self.answers))}
        if probe == "tuned" and self.lens is not None:
            return {"lens": folder_fingerprint(self.lens), "steps": None, "data": None}
        if probe == "tuned":
            return {"lens": None, "steps": self.lens_steps, "data": data_fingerprint(subject.lens_data)}
        return None


@dataclass(frozen=True)
class Prompt:
    """ids: the prompt and its answer, the last `answer` tokens. texts: each token's text. given: whether the user gave it."""

    ids: list[int]
    answer: int
    texts: list[str]
    given: bool


@dataclass(frozen=True)
class Loaded:
    """A model in memory, and the documents on which it is probed. prompt: None where no probe needs one."""

    opened: RunFolder
    subject: Subject
    ask: Ask
    decoder: Any
    tokenizer: Any
    documents: list[str]
    sequences: list[list[int]]
    prompt: Prompt | None
