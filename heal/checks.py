"""What healing refuses before anything is loaded: settings, devices and checkpoints that cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.heal.kernels import check_kernels
from layerprune.heal.packing import check_one_sequence
from layerprune.heal.settings import Healing, heal_settings
from layerprune.heal.teacher import Teacher, find_teacher
from layerprune.heal.world import local_processes, world_size
from layerprune.model.config import layer_count, load_config
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_tokenizer, pick_device
from layerprune.model.memory import byte_count
from layerprune.model.plan import least_left
from layerprune.model.source import ModelSource
from layerprune.model.tensors import StoredTensor, read_checkpoint


def check_healing(
    source: ModelSource,
    *,
    data: str,
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    dropped: int | None = None,
    **settings: Any,
) -> None:
    """Refuse what healing `source`, or a cut of it, would refuse; nothing is loaded but the tokenizer and the data.

    dropped: how many layers in a row the cut lacks, at most; None asks nothing of the memory. settings: those of
    `heal_checkpoint`. A local file is read to its end and must fill one sequence.
    """
    config = load_config(source.folder, trust_remote_code)
    budget = byte_count(settings.pop("memory", None), "--memory")
    host = byte_count(settings.pop("ram", None), "--ram")
    check_device(pick_device(device), budget)
    check_reports(settings.get("report_to") or ())
    elsewhere = {key: settings.pop(key) for key in ("report_to", "teacher") if key in settings}
    chosen = heal_settings(config, source.recipe, data=data, seed=seed, **settings)
    if chosen.kernels is not None:
        check_kernels(config, pick_device(device))
    if "teacher" in elsewhere and not (chosen.distil or chosen.bridge):
        raise UsageError(f"--teacher {elsewhere['teacher']} is for --distil or --bridge: give one of them, or leave it out")
    stored = read_checkpoint(source.folder)
    refuse_quantised(source, config, stored)
    if dropped is not None and pick_device(device) == "cpu":
        check_ram(host, least_left(stored, layer_count(config), dropped))
    refuse_fused(source, chosen, trust_remote_code)
    if data != "c4":
        check_one_sequence(load_tokenizer(source.folder, trust_remote_code), data, chosen.length, seed)


def check_reports(report_to: Sequence[str]) -> None:
    """Refuse what transformers' Trainer cannot report to here, before anything expensive starts."""
    if not report_to:
        return
    from transformers.integrations import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    odd = [name for name in report_to if name not in (*there, "all", "none")]
    if odd:
        known = odd[0] in ("tensorboard", "wandb", "trackio")
        raise UsageError(
            f"--report-to {odd[0]} is not to be had here: "
            + (f"pip install {odd[0]}" if known else "install its package")
            + (f", or take one of {', '.join(there)}" if there else "")
        )


def check_device(device: str, memory: int | None = None) -> None:
    """Refuse a GPU other than the first, as accelerate trains a 4-bit model there only, and a GPU's memory on the CPU."""
    if memory is not None and device == "cpu":
        raise UsageError("--memory is the GPU's, and this healing runs on the CPU: use --ram for the host's memory")
    kind, _, index = device.partition(":")
    if kind == "cuda" and index not in ("", "0") and world_size() == 1:
        raise UsageError(f"--device {device} cannot heal: set CUDA_VISIBLE_DEVICES={index} and leave --device out")


def check_ram(ram: int | None, numbers: int) -> None:
    """Refuse host memory that not even the process and a model of so many `numbers` in NF4 fit in."""
    from layerprune.heal.memory import refuse_ram

    refuse_ram(ram, numbers, local_processes())


def pick_teacher(source: ModelSource, settings: Healing, given: str | Path | None, trust: bool) -> Teacher | None:
    if settings.distil and settings.bridge:
        raise UsageError(
            "--distil and --bridge cannot be combined: a bridged checkpoint no longer shares its weights with its teacher"
        )
    if not (settings.distil or settings.bridge):
        if given is not None:
            raise UsageError(f"--teacher {given} is for --distil or --bridge: give one of them, or leave it out")
        return None
    return find_teacher(source, None if given is None else str(given), trust)


def refuse_quantised(source: ModelSource, config: Any, stored: Mapping[str, StoredTensor]) -> None:
    from layerprune.heal.merge import DTYPES

    if getattr(config, "quantization_config", None) is not None:
        raise Refused(f"{source.name} is quantised already: heal its unquantised checkpoint, then quantise the result")
    odd = next((t for t in stored.values() if t.dtype not in DTYPES and t.dtype.startswith(("F", "C"))), None)
    if odd is not None:
        raise Refused(f"{source.name} stores {odd.name} as {odd.dtype}: heal a bf16, fp16 or fp32 checkpoint")


def refuse_fused(source: ModelSource, settings: Healing, trust: bool) -> None:
    from layerprune.heal.targets import refuse_fused_experts
    from layerprune.model.verify import meta_decoder

    if not settings.targets:
        refuse_fused_experts(meta_decoder(source.folder, trust))
