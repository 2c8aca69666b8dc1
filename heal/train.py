"""Heal a checkpoint: pack data, train QLoRA on the MLPs, merge the adapter, write a new checkpoint."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.heal.checks import check_device, check_ram, check_reports, pick_teacher, refuse_fused, refuse_quantised
from layerprune.heal.job import Job
from layerprune.heal.kernels import check_kernels
from layerprune.heal.prepare import adapter_range, process_device
from layerprune.heal.publish import publish
from layerprune.heal.settings import heal_settings
from layerprune.heal.teacher import recorded_cut
from layerprune.heal.telling import cost_line, origin_lines
from layerprune.heal.workfolder import identity_of, work_folder
from layerprune.heal.world import check_world, first_alone, rank, world_size
from layerprune.model.config import layer_count, load_config
from layerprune.model.data import check_data
from layerprune.model.files import must_have_room, must_not_exist, read_json
from layerprune.model.load import pick_device
from layerprune.model.memory import byte_count
from layerprune.model.recipes import Recipe
from layerprune.model.source import find_model
from layerprune.model.tensors import read_checkpoint

Say = Callable[[str], None]


def _stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def heal_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    data: str | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    lora_rank: int | None = None,
    dropout: float | None = None,
    warmup_steps: int | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    length: int | None = None,
    targets: Sequence[str] | None = None,
    tokens: int | None = None,
    packing: str | None = None,
    adapters: str | None = None,
    distil: float | None = None,
    teacher: str | Path | None = None,
    bridge: str | None = None,
    merge: str | None = None,
    validation: str | None = None,
    validation_samples: int | None = None,
    kernels: str | None = None,
    memory: str | int | None = None,
    ram: str | int | None = None,
    report_to: Sequence[str] = (),
    origins: Mapping[str, str] | None = None,
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    work: str | Path | None = None,
    report: Say | None = None,
    recipe: Recipe | str | None = None,
    nf4_copy: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Train a (cut) checkpoint back with QLoRA on its MLPs, and write it with the adapter merged to the folder `out`.

    model: local folder, Hub id or recipe name. Settings that are None come from `recipe`, else from the recipe that
    the model came from, else from the paper's common ones (arXiv 2403.17887, App. A.1: 5000 steps of 16 sequences,
    peak learning rate 3e-4, LoRA rank 64 = alpha, dropout 0.05, 100 warm-up steps, cosine decay). data: `c4` or a
    file. batch_size: sequences a step; micro_batch: those in memory at once (a divisor of it; None: what fits).
    length: tokens of a packed sequence. targets: linear layers to train, by default all of the MLP's; `mlp`, `attention` or
    names. tokens: instead of steps. packing, adapters, distil, bridge, merge, validation, kernels: as in `Healing`.
    teacher: the unpruned model, for distil and bridge; by default the one that the cut's record names.
    memory: bytes of the GPU that may be taken, as a number or as text such as `16GiB`; None for most of what is free. ram: of the
    host; on the CPU the plan keeps within it, and the proof of the logits does without them where the model does not fit.
    report_to: what transformers' Trainer reports to besides: tensorboard, wandb, trackio, ... origins: where settings that a
    caller gives came from, if not from the user.
    adapter: folder for the LoRA adapter in peft's format, by default `out`/adapter; the record has its path from `out`.
    work: folder for the state that a killed run goes on from, by default the hidden sibling `.<name of out>.work`; it is
    removed at success.
    report: gets the cost line and what follows, by default on stderr. nf4_copy: write the result once more, in NF4, to the new
    folder `out`-nf4 (`layerprune.heal.copy4bit`).

    The base is held in NF4 with double quantisation, or decoded from it where memory allows; the merge is in float32, rounded
    once, and every tensor that was not trained is copied byte for byte (merge="weights"). On one CPU, the same seed gives the
    same weights to the last bit, also when the run was killed and started again.
    Under `accelerate launch` every process calls this; the first one packs and writes, all of them train.
    Returns what `out`/layerprune.json holds under "healing": settings, their origins, losses, seconds. Raises
    UsageError and Refused; nothing is left at `out` then.
    """
    say = (report or _stderr) if rank() == 0 else _nobody
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when it is imported it recommends another package
    # fewer bytes that the allocator holds and no tensor uses; read when the GPU is first touched
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    out = Path(out).absolute()
    work = out.parent / f".{out.name}.work" if work is None else Path(work).absolute()
    check_reports(report_to)

    copy = out.with_name(f"{out.name}-nf4") if nf4_copy else None

    def begin() -> bool:
        """Whether only the copy is missing."""
        healed = (out / "layerprune.json").exists() and (work / "trained.json").exists()
        if healed and copy is not None and not copy.exists():
            return True
        if healed:
            shutil.rmtree(work)  # of a healing that was killed after all but this was done
        must_not_exist(out)
        if copy is not None:
            must_not_exist(copy)
        return False

    if first_alone(begin, device or "auto"):
        _copy_4bit(out, copy, process_device(pick_device(device)), trust_remote_code, say, progress)
        if rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        return dict(read_json(out / "layerprune.json")["healing"])
    source = find_model(str(model))
    budget, host = byte_count(memory, "--memory"), byte_count(ram, "--ram")
    config = load_config(source.folder, trust_remote_code)
    settings = heal_settings(
        config, recipe or source.recipe, data=data, steps=steps, learning_rate=learning_rate, lora_rank=lora_rank,
        dropout=dropout, warmup_steps=warmup_steps, batch_size=batch_size, micro_batch=micro_batch, length=length,
        targets=targets, seed=seed, tokens=tokens, packing=packing, adapters=adapters, distil=distil, bridge=bridge, merge=merge,
        validation=validation, validation_samples=validation_samples, kernels=kernels, origins=origins,
    )  # fmt: skip
    chosen = process_device(pick_device(device))
    check_device(chosen, budget)
    check_world(settings.batch_size, chosen, bool(settings.distil))
    if settings.kernels is not None:
        check_kernels(config, chosen)
    stored = read_checkpoint(source.folder)
    if chosen == "cpu":
        check_ram(host, sum(t.numel for t in stored.values()))
    refuse_quantised(source, config, stored)
    check_data(settings.data, "--heal-data", "train", seed)
    if settings.validation is not None:
        check_data(settings.validation, "--validation", "validation", seed)
    must_have_room(out, sum(t.nbytes for t in stored.values()) * (2 if settings.bridge else 1))
    pair = pick_teacher(source, settings, teacher, trust_remote_code)
    adapter_range(settings, recorded_cut(source), layer_count(config))
    say(cost_line(settings))
    say(origin_lines(settings))
    if settings.steps:
        refuse_fused(source, settings, trust_remote_code)
    job = Job(
        source, stored, settings, pair, work, out, None if adapter is None else Path(adapter).absolute(), chosen,
        device in (None, "auto") and world_size() == 1, budget, host, tuple(report_to), trust_remote_code, say, progress,
    )  # fmt: skip
    if settings.steps == 0:
        from layerprune.heal.bridge import format_bridges

        bridged = job.bridge_only()
        if copy is not None:  # it takes its time, and may be refused
            for line in format_bridges(bridged):
                say(line)
        _copy_4bit(out, copy, chosen, trust_remote_code, say, progress)
        return bridged
    with work_folder(work, identity_of(source, settings, chosen, pair), out, chosen) as resumed:
        # an adapter beside the result that a killed run of ours had already put there is made again
        if job.outside is not None and job.outside.exists() and not (resumed and (work / "adapter").exists()):
            must_not_exist(job.outside)
        job = job.bridged()
        if not first_alone((work / "trained.json").exists, chosen):
            job.train()
        healing = first_alone(lambda: publish(job), chosen)
    _copy_4bit(out, copy, chosen, trust_remote_code, say, progress)
    if rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
    return healing


def _copy_4bit(out: Path, copy: Path | None, device: str, trust: bool, say: Say, progress: bool) -> None:
    """The result once more in NF4, where that was asked for; by the first process."""
    if copy is None:
        return
    from layerprune.heal.copy4bit import write_nf4_copy

    say("quantising a copy")
    found = first_alone(lambda: write_nf4_copy(out, copy, device, trust, progress), device)
    say(f"  NF4: {found['quantised']} layers in {copy}, {found['bytes'] / 1e6:,.0f} MB")


def _nobody(line: str) -> None:
    """What processes other than the first one say."""
