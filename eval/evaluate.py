"""Measure a model: normalised loss and lm-eval tasks, of a live model or of a checkpoint."""

from __future__ import annotations

import importlib.metadata
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.eval.tasks import TaskSet, check_counts, load_tasks, score_tasks
from layerprune.model.data import batches, check_data, check_seed, read_documents, tokenise
from layerprune.model.errors import UsageError
from layerprune.model.files import made_folder, must_not_exist, read_json, write_json
from layerprune.model.recipes import EvalSettings, Recipe, section_of

Shots = dict[str, int | None]


def loss_sequences(
    tokenizer: Any,
    config: Any,
    data: str,
    samples: int | None,
    length: int | None,
    seed: int = 0,
    progress: bool = False,
) -> list[list[int]]:
    """Token ids of the validation documents: each truncated at `length`, those of fewer than 2 tokens left out."""
    from layerprune.model.config import pick_length, vocab_size

    documents = read_documents(data, "validation", samples, seed)
    return tokenise(tokenizer, documents, pick_length(length, config), at_least=2, vocab=vocab_size(config), progress=progress)


def measure_loss(
    decoder: Any,
    sequences: Sequence[Sequence[int]],
    vocab: int,
    *,
    max_tokens: int | None = None,
    pad_id: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Loss over all predicted tokens (every token of a document but its first).

    normalised is nats_per_token / ln V: 0 is certainty, 1 a uniform guess, more is worse than a guess. max_tokens:
    tokens a batch, padding included; by default what keeps the logits within 1 GiB (256 MiB on the CPU), but never
    less than a document. A batch that runs out of GPU memory is halved; Refused where one document does not fit.
    """
    from layerprune.eval.memory import logit_budget, token_budget
    from layerprune.model.loss import LossSum, total_loss
    from layerprune.model.memory import in_halves

    if max_tokens is None:
        kind = decoder.device.type
        max_tokens = max(1, min(token_budget(kind), logit_budget(kind) // (4 * vocab)))
    total = LossSum()

    def add(rows: Sequence[int]) -> None:
        part = [sequences[row] for row in rows]
        total.merge(total_loss(decoder, batches(part, len(part) * len(part[0]), pad_id)))

    for batch in batches(sequences, max_tokens):
        in_halves(batch.rows, add)
        progress(len(batch.rows))
    return total.summary(vocab, len(sequences))


def evaluate_live(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Mapping[str, int | None] | TaskSet | None = None,
    task_folder: Path | str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    sequences: Sequence[Sequence[int]] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    samples: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Loss (on `sequences`, where given) and tasks (where given) of a live model, which may be virtually cut.

    A TaskSet and ready sequences serve any number of models. Returns {"loss": .. or None, "tasks": .. or None}.
    num_fewshot: for those tasks that map to None.
    """
    from layerprune.model.config import vocab_size
    from layerprune.model.decoder import view_decoder
    from layerprune.model.progress import progress_bar

    loss = scores = None
    if sequences is not None:
        with progress_bar(len(sequences), "documents", "doc", progress) as bar:
            loss = measure_loss(view_decoder(model), sequences, vocab_size(model.config), progress=bar.update)
    if tasks:
        ready = tasks if isinstance(tasks, TaskSet) else load_tasks(_fill(tasks, num_fewshot), task_folder, seed)
        scores = score_tasks(
            model, tokenizer, ready, limit=limit, batch_size=batch_size, seed=seed, samples=samples, progress=progress
        )
    return {"loss": loss, "tasks": scores}


def _fill(tasks: Mapping[str, int | None], shots: int | None) -> Shots:
    return {name: shots if own is None else own for name, own in tasks.items()}


def parse_tasks(tasks: Sequence[str] | Mapping[str, int | None] | None, num_fewshot: int | None, recipe: Recipe | None) -> Shots:
    """Tasks and their in-context examples. `name:5` counts first, then num_fewshot, then the recipe's number for
    that task, then the task's own (None). Without tasks, the recipe's. Raises UsageError for what is no number."""
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"--num-fewshot {num_fewshot}: use 0 or more")
    known: Shots = dict(recipe.eval.tasks) if recipe else {}
    if tasks is None:
        return {name: shots if num_fewshot is None else num_fewshot for name, shots in known.items()}
    asked: Shots = {}
    pairs = tasks.items() if isinstance(tasks, Mapping) else [(text.strip(), None) for text in tasks]
    for text, given in pairs:
        name, colon, count = text.rpartition(":") if text.rpartition(":")[2].isdigit() else (text, "", "")
        if not name:
            raise UsageError(f"--tasks holds an empty name: {', '.join(map(str, tasks))!r}")
        if name in asked:
            raise UsageError(f"--tasks names {name} twice")
        if given is not None and given < 0:
            raise UsageError(f"{given} in-context examples for task {name}: use 0 or more")
        asked[name] = int(count) if colon else given if given is not None else num_fewshot
        if asked[name] is None:
            asked[name] = known.get(name)
    return asked


def evaluate_checkpoint(
    model: str | Path,
    *,
    tasks: Sequence[str] | Mapping[str, int | None] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_folder: str | Path | None = None,
    data: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    loss: bool = True,
    items: bool = False,
    out: str | Path | None = None,
    revision: str | None = None,
    memory: str | int | None = None,
    ram: str | int | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a checkpoint (recipe name, Hub id or folder), and write the result to `out` (an eval.json).

    A model that does not fit in memory (or in `memory` of the GPU and `ram` of the host: bytes or text such as `8GiB`) is
    not loaded: its layers come from its files one at a time, and `say` is told the plan first.

    What is None comes from the model's recipe, else: C4, 256 documents, no tasks. tasks: lm-eval names, `name:5` for
    5 in-context examples. items: keep each item's correctness. loss: False leaves the loss out. The tasks and the
    data are loaded before the model, so that what is missing shows at once. Raises UsageError and Refused.
    """
    from layerprune.model.budget import streaming_budget
    from layerprune.model.config import load_config, pick_length
    from layerprune.model.decoder import view_decoder
    from layerprune.model.load import dtype_name, load_model, load_tokenizer, pick_device
    from layerprune.model.source import find_model
    from layerprune.model.stream import StreamedModel

    start = time.monotonic()
    if out is not None:
        must_not_exist(Path(out))
    check_counts(limit=limit, samples=samples, batch_size=batch_size)
    check_seed(seed)
    pick_device(device)
    source = find_model(str(model), revision)
    recipe = source.recipe
    chosen = section_of(recipe, EvalSettings)
    data = chosen.data if data is None else data
    folder = task_folder if task_folder is not None else recipe.tasks_path if recipe else None
    limit = chosen.limit if limit is None else limit
    samples = chosen.samples if samples is None else samples
    length = chosen.length if length is None else length
    asked = parse_tasks(tasks, num_fewshot, recipe)
    if not asked and not loss:
        raise UsageError("nothing to measure: give --tasks, or leave the loss on")
    if loss:
        check_data(data, "--eval-data", "validation", seed)
    ready = load_tasks(asked, folder, seed) if asked else None
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    budget = streaming_budget(
        source.folder, device=device, dtype=dtype, memory=memory, ram=ram, trust_remote_code=trust_remote_code
    )
    # beside the result's folder, which is there only when the result is
    folder_of = None if out is None else Path(out).absolute().parent
    keep = None if folder_of is None else folder_of.parent / f".{folder_of.name}.pass"
    config = load_config(source.folder, trust_remote_code)
    sequences = loss_sequences(tokenizer, config, data, samples, length, seed, progress) if loss else None
    if budget is not None:
        say(f"{source.name}: {budget.why}")
        streamed = StreamedModel(source.folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        decoder, live = streamed.decoder, streamed.decoder.model
        measured = _from_disk(streamed, tokenizer, budget, ready, sequences, limit, batch_size, seed, items, progress, say, keep)
    else:
        live = load_model(source.folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress)
        decoder = view_decoder(live)
        measured = evaluate_live(
            live,
            tokenizer,
            tasks=ready,
            limit=limit,
            sequences=sequences,
            batch_size=batch_size,
            seed=seed,
            samples=items,
            progress=progress,
        )
    card = source.folder / "layerprune.json"
    result = {
        "model": str(model),
        "layers": len(decoder),
        "kept": read_json(card).get("kept") if card.exists() else None,
        "parameters": live.num_parameters(),
        **measured,
        "settings": {
            "tasks": asked,
            "task_folder": None if folder is None else str(folder),
            "limit": limit,
            "loss": None if sequences is None else {"data": data, "samples": samples, "length": pick_length(length, live.config)},
            "seed": seed,
            "dtype": dtype_name(live) if budget is None else streamed.dtype,
            "device": str(decoder.device),
            "recipe": recipe.name if recipe else None,
        },
        "versions": versions(),
        "seconds": round(time.monotonic() - start, 3),
    }
    if out is not None:
        with made_folder(Path(out).parent):
            write_json(Path(out), result)
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
    return result


def _from_disk(
    streamed: Any, tokenizer: Any, budget: Any, tasks: TaskSet | None, sequences: Any, limit: int | None,
    batch_size: int | None, seed: int, items: bool, progress: bool, say: Callable[[str], None], keep: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """What `evaluate_live` gives, of a model whose layers come from its files."""
    from layerprune.eval.streamed import kept_answers, sweep_streamed

    whole = tuple(range(len(streamed)))
    found = sweep_streamed(
        streamed, tokenizer, [whole], budget, tasks=tasks, sequences=sequences, limit=limit, batch_size=batch_size, seed=seed,
        progress=progress, say=say, keep=keep, answers=kept_answers(keep, streamed),
    )[whole]  # fmt: skip
    assert found is not None  # a whole model that does not run is refused
    if found["tasks"] is not None and not items:
        found["tasks"] = {key: value for key, value in found["tasks"].items() if key not in ("correct", "items")}
    return found


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("layerprune", "torch", "transformers", "lm_eval")}


def format_table(result: Mapping[str, Any]) -> str:
    """The result as plain text: the model, its loss, and a row for each task."""
    lines = [f"{result['model']}: {result['layers']} layers, {result['parameters'] / 1e6:,.1f} M parameters"]
    loss = result["loss"]
    if loss:
        lines.append(
            f"loss {loss['normalised']:.4f} normalised, {loss['nats_per_token']:.4f} nats a token "
            f"({loss['documents']:,} documents, {loss['tokens']:,} tokens)"
        )
    if result["tasks"]:
        head = ("task", "shots", "metric", "value", "stderr", "n", "chance", "majority")
        rows = [head, *(tuple(_cell(row[key]) for key in head) for row in result["tasks"]["table"])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        text = (0, 2)  # columns of words go left, numbers right
        lines.append("")
        for row in rows:
            cells = (c.ljust(w) if i in text else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            lines.append("  ".join(cells).rstrip())
        if result["tasks"]["truncated"]:
            lines.append(f"{result['tasks']['truncated']:,} prompts were cut on the left to the model's context")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
