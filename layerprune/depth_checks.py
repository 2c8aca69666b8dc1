"""What `layerprune depth` can be asked for, and what is said to a wish that it cannot fulfil, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerprune.model.errors import UsageError

PROBES = {
    "residual": "what attention, MLP and layer add to the stream: its direction and its size; 1 pass over the documents",
    "lens": "what the model would say if it ended at each layer, beside what it says in the end; 1 pass, and the head L times",
    "tokens": "frequent and rare tokens: which of them the lens says first, and when a token is decided; as lens",
    "choices": "multiple choice: when options are listed and when one is chosen; with --tasks",
    "skip": "what skipping a layer does to later layers and to the output; about 2.5 L passes",
    "prunability": "angle, skip effect, lens and the loss of cuts beside one another; about 0.7 L passes",
    "erasure": "until which layer each token of a prompt matters to its answer; half a pass of it for each layer and token",
    "gradients": "at which layer and token an answer's probability arises; 16 L passes of a prompt and back, or more",
    "words": "when words are decided, by part of speech; needs spaCy, pip install 'layerprune[words]'",
    "answers": "when each token of short answers is decided, by its place; with --answers",
    "tuned": "a tuned lens beside the logit lens; with --lens or --train-lens",
}
DEFAULT = ("residual", "lens", "tokens")


def check_probes(probes: Sequence[str] | None, tasks: Sequence[str] | None) -> list[str]:
    default = [*DEFAULT, *(["choices"] if tasks else [])]
    chosen = default if probes is None else list(dict.fromkeys(probes))
    if "choices" in chosen and not tasks:
        raise UsageError("--probe choices looks at the options of tasks: give --tasks, such as mmlu")
    odd = [p for p in chosen if p not in PROBES]
    if odd or not chosen:
        raise UsageError(f"--probe {odd[0] if odd else ''!r} is none of {', '.join(PROBES)}")
    return [p for p in PROBES if p in chosen]


def check_tasks(chosen: Sequence[str], tasks: Sequence[str] | None, limit: int | None, task_folder: str | Path | None) -> None:
    if tasks is not None and not tasks:
        raise UsageError("--tasks names no task")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} is not a number above 0")
    if "choices" not in chosen:
        for option, value in (("--tasks", tasks), ("--limit", limit), ("--task-folder", task_folder)):
            if value is not None:
                raise UsageError(f"{option} is for the probe choices: add {'--probe choices' if tasks else '--tasks'}")
    if task_folder is not None and not Path(task_folder).is_dir():
        raise UsageError(f"the task folder {task_folder} does not exist")


def check_texts(chosen: Sequence[str], prompt: str | None, answer: str | None) -> None:
    if (prompt is None) != (answer is None):
        there, missing = ("--answer", "--prompt") if prompt is None else ("--prompt", "--answer")
        raise UsageError(f"{there} is given without {missing}: give both, or none for the start of the first document")
    for option, value in (("--prompt", prompt), ("--answer", answer)):
        if value is not None and not value.strip():
            raise UsageError(f"{option} {value!r} is empty")
        try:
            (value or "").encode()
        except UnicodeEncodeError:
            raise UsageError(f"{option} {value!r} is no text: it holds bytes that are not UTF-8") from None
    if prompt is not None and not {"erasure", "gradients"} & set(chosen):
        raise UsageError("--prompt is for the probes erasure and gradients: add --probe erasure,gradients")


def check_lens(chosen: Sequence[str], lens: str | Path | None, steps: int | None, models: int) -> Path | None:
    """The folder of --lens, which is read once, so that a broken lens is refused before a model is loaded."""
    if "tuned" not in chosen:
        if lens is not None or steps is not None:
            raise UsageError(f"--{'lens' if lens is not None else 'train-lens'} is for the probe tuned: add --probe tuned")
        return None
    if (lens is None) == (steps is None):
        raise UsageError("--probe tuned needs a lens: give either --lens DIR or --train-lens STEPS")
    if steps is not None:
        if steps < 1:
            raise UsageError(f"--train-lens {steps} is not a number of steps above 0")
        return None
    if models > 1:
        raise UsageError(f"--lens is of one model, and {models} are given: give one --model, or --train-lens STEPS")
    from layerprune.depth.tuned_file import load_lens
    from layerprune.depth_lens import lens_folder

    assert lens is not None
    folder = lens_folder(lens)
    load_lens(folder)
    return folder


def check_words(chosen: Sequence[str], answers: str | Path | None) -> tuple[Path | None, Any]:
    """The file of --answers and the tagger, each where its probe is chosen: both are tried before a model is loaded."""
    if ("answers" in chosen) != (answers is not None):
        missing = "--probe answers" if answers is not None else "--answers FILE"
        raise UsageError(f"--probe answers and --answers FILE (JSON lines with `prompt` and `answer`) go together: add {missing}")
    tagger = None
    if answers is not None:
        from layerprune.depth.answers import read_answers

        read_answers(answers)
    if "words" in chosen:
        from layerprune.depth.words import spacy_tagger

        tagger = spacy_tagger()
    return None if answers is None else Path(answers), tagger
