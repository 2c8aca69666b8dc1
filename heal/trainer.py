"""QLoRA training: a 4-bit base, LoRA on its targets, transformers' Trainer, checkpoints that a killed run goes on from."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from layerprune.heal.packing import Packed
from layerprune.heal.settings import Healing, divisors
from layerprune.heal.targets import is_linear, linear_shape
from layerprune.model.errors import Refused
from layerprune.model.files import read_json, write_json
from layerprune.model.load import load_model

Say = Callable[[str], None]
NF4_BLOCK = 64
"""Weights that share a scale in NF4."""
MARK = "whole.json"
"""Written into a Trainer checkpoint after everything else: one without it was cut short."""
SAVE_SECONDS = 120.0
"""Training time between two checkpoints; it does not touch the results."""
_CPU_MICRO_BATCH = 4
_GPU_MOST_TOKENS = 32_768
_GPU_ENOUGH_TOKENS = 4096
"""Tokens of a micro-batch above which more of them are no faster, and below which decoding NF4 costs too much."""
_GPU_ROOM = 0.92


def unquantised(model: Any, device: str) -> list[str]:
    """Names of the linear layers that stay in full precision (the model may be on the meta device).

    These are the head; layers narrower than one quantisation block, which save nothing and which some models use by
    their weight; and on the CPU layers whose input width is no multiple of a block: bitsandbytes 0.50 decodes those
    wrongly there (it takes the scale of another block).
    """
    head = model.get_output_embeddings()
    names = []
    for name, module in model.named_modules():
        if is_linear(module):
            out, width = linear_shape(module)
            if module is head or min(out, width) < NF4_BLOCK or (device == "cpu" and width % NF4_BLOCK):
                names.append(name)
    return names


def load_quantised(
    folder: Path,
    device: str | None,
    compute: torch.dtype,
    keep: Sequence[str],
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Any:
    """The model in NF4 with double quantisation; the linear layers in `keep`, and all else, stay in `compute`."""
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=list(keep),
    )
    model = load_model(
        folder,
        device=device,
        dtype=str(compute).removeprefix("torch."),
        trust_remote_code=trust_remote_code,
        quantization_config=quantisation,
        progress=progress,
    )
    # Training mode from here on: in eval mode, on some CPUs, 4-bit layers repack their weights and cannot train.
    model.train()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16, but float32 on a CPU without bfloat16 instructions, where emulating them is slower.

    The result hardly depends on it: 0.4470 in both for the cut 32-layer model of benchmarks/heal_quality.py.
    """
    if device != "cpu":
        return torch.bfloat16
    fast = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )
    return torch.bfloat16 if fast else torch.float32


def add_lora(model: Any, pattern: str, settings: Healing) -> Any:
    """Wrap the modules whose whole name matches `pattern` with LoRA in float32; alpha equals the rank."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_rank,
        lora_dropout=settings.dropout,
        target_modules=pattern,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


@dataclass(frozen=True)
class Memory:
    """Sequences in memory at once, and whether activations are computed again in the backward pass."""

    micro_batch: int
    checkpointing: bool


class Sequences(torch.utils.data.Dataset):
    """Packed sequences as a causal model's training items; `extra` are constant inputs such as token_type_ids."""

    def __init__(self, packed: Packed, extra: Mapping[str, int]) -> None:
        self.ids_NT, self.extra = packed.ids_NT, extra

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids_T = torch.from_numpy(self.ids_NT[index].astype("int64"))
        return {"input_ids": ids_T, "labels": ids_T, **{k: torch.full_like(ids_T, v) for k, v in self.extra.items()}}


class _Watch(TrainerCallback):
    """Progress, the time that is left, checkpoints by the clock, and a stop when the loss is no number."""

    def __init__(self, work: Path, every: int, length: int, say: Say, progress: bool) -> None:
        self.work, self.every, self.length, self.say, self.progress = work, every, length, say, progress
        self.bar: Any = None
        self.spent = 0.0
        self.timed: list[float] = []

    @property
    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        self.started = self.saved = time.perf_counter()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="heal", unit="step", disable=not self.progress)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)
        now = time.perf_counter()
        self.timed.append(now)
        left = state.max_steps - state.global_step
        # The first steps pay for warming up; the fourth is the first honest one.
        if len(self.timed) == 4 and left:
            step = (now - self.timed[0]) / 3
            rate = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.length / step
            self.say(f"{step:.2g} s a step ({rate:,.0f} tokens/s): about {duration(step * left)} left")
        # A log comes before a save, so what is saved was finite.
        if state.global_step % self.every == 0 and left and now - self.saved >= SAVE_SECONDS:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        if not all(math.isfinite(logs.get(key, 0.0)) for key in ("loss", "grad_norm")):
            left = "" if newest_checkpoint(self.work) is None else f"; the last good state stays in {self.work}"
            raise Refused(
                f"the training loss is not a number at step {state.global_step} of {state.max_steps}: heal with a smaller "
                f"--learning-rate (it was {args.learning_rate:g}), or, at the first step, look at the weights{left}"
            )
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.perf_counter()
        folder = self.work / f"checkpoint-{state.global_step}"
        write_json(folder / MARK, {"step": state.global_step, "seconds": self.seconds})


def train(
    model: Any,
    packed: Packed,
    settings: Healing,
    *,
    work: Path,
    device: str,
    memory: Memory,
    extra: Mapping[str, int],
    say: Say,
    progress: bool = False,
) -> dict[str, Any]:
    """Train the LoRA weights of `model` in place; returns losses and seconds.

    work: folder for Trainer's checkpoints; training goes on from the newest whole one there. Losses are nats per
    token of the training data, with dropout: the curve holds (step, mean since the entry before); `first` and
    `last` are the ends of it.
    Raises Refused when the loss is no longer a number, and where the GPU's memory runs out.
    """
    set_memory(model, memory)
    micro_batch = memory.micro_batch
    every = max(1, settings.steps // 100)
    watch = _Watch(work, every, settings.length, say, progress)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings.batch_size // micro_batch,
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
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sequences(packed, extra), callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    last = newest_checkpoint(work)
    if last is not None:
        mark = read_json(last / MARK)
        watch.spent = mark["seconds"]
        say(f"going on from step {mark['step']} of {settings.steps}")
    try:
        with quiet_warnings():
            trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    except torch.cuda.OutOfMemoryError as error:
        raise Refused(
            f"the GPU's memory ran out with {micro_batch} sequences of {settings.length} tokens at once: use a smaller "
            "--micro-batch or --length"
        ) from error
    finally:
        if watch.bar is not None:
            watch.bar.close()
    curve = [[entry["step"], round(entry["loss"], 5)] for entry in trainer.state.log_history if "loss" in entry]
    return {"first": curve[0][1], "last": curve[-1][1], "curve": curve, "seconds": round(watch.seconds, 1)}


def newest_checkpoint(work: Path) -> Path | None:
    """The newest Trainer checkpoint in `work` that was written to its end; the others are removed."""
    found = []
    for folder in work.glob("checkpoint-*"):
        if (folder / MARK).exists():
            found.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def choose_memory(model: Any, settings: Healing, device: str, extra: Mapping[str, int]) -> Memory:
    """How many sequences are in memory at once, and whether activations are kept; the model is set accordingly.

    On a GPU it is found by trying one pass forward and back. Keeping activations is faster than computing
    them twice as long as the weights are decoded for enough tokens at a time; where it
    does not fit, the largest micro-batch with gradient checkpointing is taken.
    """
    sizes = list(reversed(divisors(settings.batch_size))) if settings.micro_batch is None else [settings.micro_batch]
    if device == "cpu":
        return Memory(next(size for size in sizes if size <= _CPU_MICRO_BATCH or settings.micro_batch), False)
    some = [size for size in sizes if size * settings.length <= _GPU_MOST_TOKENS] or sizes[-1:]
    enough = [size for size in some if size * settings.length >= _GPU_ENOUGH_TOKENS] or some[:1]
    tries = [Memory(size, False) for size in enough] + [Memory(size, True) for size in some]
    # the last is taken untried: if it does not fit, training says so
    return next((memory for memory in tries[:-1] if _fits(model, memory, settings.length, extra)), tries[-1])


def set_memory(model: Any, memory: Memory) -> None:
    """Turn gradient checkpointing on or off."""
    with quiet_warnings():  # newer transformers has another name for it, older has not
        if memory.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        elif getattr(model, "is_gradient_checkpointing", False):
            model.gradient_checkpointing_disable()


def _fits(model: Any, memory: Memory, length: int, extra: Mapping[str, int]) -> bool:
    set_memory(model, memory)
    device = model.get_input_embeddings().weight.device
    ids_BT = torch.ones((memory.micro_batch, length), dtype=torch.long, device=device)
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(gpu)
    try:
        with torch.autocast("cuda", torch.bfloat16):
            more = {key: torch.full_like(ids_BT, value) for key, value in extra.items()}
            model(input_ids=ids_BT, labels=ids_BT, use_cache=False, **more).loss.backward()
        return all(
            torch.cuda.max_memory_reserved(gpu) <= _GPU_ROOM * torch.cuda.get_device_properties(gpu).total_memory
            for gpu in range(torch.cuda.device_count())
        )
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Keep the libraries' advice about kernels and checkpoints off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def duration(seconds: float) -> str:
    """Seconds in words: `40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
