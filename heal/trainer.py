"""QLoRA training: transformers' Trainer on a `Student`, checkpoints that a killed run goes on from."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from layerprune.heal.checkpoints import MARK, newest_checkpoint
from layerprune.heal.fused import IGNORED
from layerprune.heal.interrupt import first_interrupt
from layerprune.heal.memory import Memory
from layerprune.heal.packing import Packed
from layerprune.heal.quantise import quiet_warnings
from layerprune.heal.settings import Healing
from layerprune.heal.sharded import gather_adapter, write_adapter
from layerprune.heal.student import Student
from layerprune.heal.watch import Watch
from layerprune.heal.world import is_sharded, local_device, rank, summed, world_size
from layerprune.model.data import batches
from layerprune.model.decoder import view_decoder
from layerprune.model.errors import Refused, Stopped, UsageError
from layerprune.model.files import new_folder, read_json
from layerprune.model.nf4 import compute_dtype

Say = Callable[[str], None]
_VALIDATION_TOKENS = {"cpu": 2048, "cuda": 8192}


class Sequences(torch.utils.data.Dataset):
    """Packed sequences as a causal model's training items. separate: with positions that restart at each document.

    extra: constant inputs, such as token_type_ids, where the model itself is trained and not a `Student`.
    """

    def __init__(self, packed: Packed, separate: bool, extra: Mapping[str, int]) -> None:
        self.packed, self.separate, self.extra = packed, separate, extra

    def __len__(self) -> int:
        return len(self.packed.ids_NT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids_T = torch.from_numpy(self.packed.ids_NT[index].astype("int64"))
        item = {"input_ids": ids_T, "labels": torch.from_numpy(self.packed.labels(index))}
        item |= {key: torch.full_like(ids_T, value) for key, value in self.extra.items()}
        return {**item, "position_ids": torch.from_numpy(self.packed.positions(index))} if self.separate else item


def train(
    model: Any,
    student: Student,
    packed: Packed,
    settings: Healing,
    *,
    work: Path,
    device: str,
    memory: Memory,
    separate: bool,
    finish: Callable[[Any], None],
    validation: Sequence[Sequence[int]] = (),
    vocab: int,
    say: Say,
    progress: bool = False,
    report_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Train the LoRA weights of `model`, which holds `student`'s decoder, in place; returns losses and seconds.

    work: folder for Trainer's checkpoints; training goes on from the newest whole one there. validation: token ids of the
    held-out documents, vocab: the V of their normalised loss. finish: saves, given the Trainer. report_to: what
    transformers' Trainer reports to (tensorboard, wandb, trackio, ...).
    Losses are nats per token of the training data, with dropout: the curve holds (step, mean since the entry before);
    `first` and `last` are the ends of it. `held_out` holds (step, normalised loss without dropout).
    Raises Refused when the loss is no longer a number or climbs, and where the GPU's memory runs out; Stopped after the step in
    which the first Ctrl-C came.
    """
    world, sharded, micro_batch = world_size(), is_sharded(), memory.micro_batch
    every = max(1, settings.steps // 100)
    validate = (lambda: _normalised(student, validation, vocab, device)) if validation and not sharded else None
    watch = Watch(work, every, settings.batch_size * settings.length, say, progress, validate, settings.steps)
    arguments = _arguments(settings, work, device, micro_batch, every, report_to)
    items = Sequences(packed, separate, student.extra if sharded else {})
    with nullcontext() if sharded else student.installed(model):
        trainer = Trainer(model=model, args=arguments, train_dataset=items, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        # the loss is over all tokens of a step, on every device: `Student.loss` takes their number
        trainer.model_accepts_loss_kwargs = True
        watch.log = trainer.log
        watch.wrapped = lambda: trainer.model_wrapped
        last = newest_checkpoint(work, remove=rank() == 0)
        if last is not None:
            mark = read_json(last / MARK)
            watch.spent = mark["seconds"]
            say(f"going on from step {mark['step']} of {settings.steps}")
        try:
            with quiet_warnings(), first_interrupt(watch.stop):
                trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
        except torch.cuda.OutOfMemoryError as error:
            raise Refused(_ran_out(work, micro_batch, settings.length)) from error
        finally:
            if watch.bar is not None:
                watch.bar.close()
        if trainer.state.global_step < settings.steps:
            raise Stopped(_goes_on(work, settings.steps))
        finish(trainer)
    history = trainer.state.log_history
    curve = [[entry["step"], round(entry["loss"], 5)] for entry in history if "loss" in entry]
    held_out = [[e["step"], e["eval_normalised_loss"]] for e in history if "eval_normalised_loss" in e]
    return {
        "first": curve[0][1],
        "last": curve[-1][1],
        "curve": curve,
        "held_out": held_out,
        "seconds": round(watch.seconds, 1),
        "processes": world,
        "peak": watch.peak,
    }


def _goes_on(work: Path, steps: int) -> str:
    saved = newest_checkpoint(work)
    if saved is None:
        return "no step was saved, and the same command begins with the first one"
    return f"the same command goes on from step {read_json(saved / MARK)['step']} of {steps} (saved in {work})"


def _ran_out(work: Path, micro_batch: int, length: int) -> str:
    """What to do when the GPU's memory ran out; a started healing goes on with the same --length only."""
    told = f"the GPU's memory ran out with {micro_batch} sequences of {length} tokens at once"
    saved = newest_checkpoint(work, remove=False)
    if saved is None:
        return f"{told}: use a smaller --micro-batch, --memory or --length; no step was saved yet"
    step = saved.name.rpartition("-")[2]
    return f"{told}: give the same command with a smaller --micro-batch or --memory, it goes on from step {step} in {work}"


def _arguments(
    settings: Healing, work: Path, device: str, micro_batch: int, every: int, report_to: Sequence[str]
) -> TrainingArguments:
    share = settings.batch_size // world_size()
    try:
        return TrainingArguments(
            output_dir=str(work),
            max_steps=settings.steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=share // micro_batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_steps,
            seed=settings.seed,
            data_seed=settings.seed,
            train_sampling_strategy="sequential",  # the packed sequences are in random order already
            bf16=compute_dtype(device) == torch.bfloat16,
            use_cpu=device == "cpu",
            logging_steps=every,
            logging_nan_inf_filter=False,
            save_strategy="no",  # the callback asks for checkpoints
            # two: the older one is whole while the newer one is being marked
            save_total_limit=2,
            report_to=list(report_to) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu",
            ddp_find_unused_parameters=False if world_size() > 1 else None,
        )
    except (ValueError, ImportError) as error:
        if report_to:
            raise UsageError(f"--report-to {','.join(report_to)} cannot be used: {error}") from error
        raise


def _normalised(student: Student, sequences: Sequence[Sequence[int]], vocab: int, device: str) -> float:
    """Loss / ln V of held-out documents, without dropout; every process takes its share of them."""
    kind = device.partition(":")[0]
    model = student.decoder.model
    training, compiled = model.training, student.compiled
    nats, tokens = 0.0, 0.0
    mine = sequences[rank() :: world_size()]
    model.eval()
    student.compiled = False  # documents have many lengths, and each would be compiled
    try:
        for batch in batches(mine, _VALIDATION_TOKENS.get(kind, 2048)):
            ids_BT = batch.ids_BT.to(student.decoder.device)
            labels_BT = ids_BT if batch.mask_BT is None else ids_BT.masked_fill(batch.mask_BT.to(ids_BT.device) == 0, IGNORED)
            with torch.autocast(kind, torch.bfloat16, enabled=compute_dtype(device) == torch.bfloat16):
                nats += float(student.nats(ids_BT, labels_BT))
            tokens += float((labels_BT[:, 1:] != IGNORED).sum())
    finally:
        model.train(training)
        student.compiled = compiled
    nats, tokens = summed([nats, tokens], local_device(kind))
    return nats / tokens / math.log(vocab)


def save_adapter(trainer: Any, live: Any, folder: Path, renamed: Mapping[int, int], pattern: str, base: str) -> None:
    """Save the adapter in peft's format, by the layer numbers of the checkpoint that was healed.

    renamed: the live model's layer numbers to those, empty where they are the same. pattern: what the adapter's config says of
    its modules; base: of its model.
    """
    gathered = gather_adapter(trainer.model_wrapped) if is_sharded() else None
    if rank() != 0:
        return
    config = live.peft_config["default"]
    # peft would write the folder of this machine into the adapter; what the user calls the model means more
    config.base_model_name_or_path, config.target_modules = base, pattern
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as made, quiet_warnings():
        if gathered is None:
            live.save_pretrained(made)
            (made / "README.md").unlink(missing_ok=True)
        else:
            write_adapter(gathered, config, made)
        if renamed:
            _rename_layers(made / "adapter_model.safetensors", view_decoder(live.get_base_model()).path, renamed)


def _rename_layers(file: Path, path: str, renamed: Mapping[int, int]) -> None:
    from safetensors.torch import load_file, save_file

    start = f"base_model.model.{path}."
    tensors = {}
    for name, tensor in load_file(file).items():
        number, _, inside = name.removeprefix(start).partition(".")
        tensors[f"{start}{renamed[int(number)]}.{inside}"] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
