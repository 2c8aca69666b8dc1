"""A checkpoint as healing trains it: linear layers in NF4, LoRA on its targets."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from layerprune.heal.settings import Healing
from layerprune.model.errors import Refused, one_line
from layerprune.model.load import load_model
from layerprune.model.nf4 import nf4_config


def load_quantised(
    folder: Path,
    device: str | None,
    compute: torch.dtype,
    keep: Sequence[str],
    trust_remote_code: bool = False,
    progress: bool = False,
    sharded: bool = False,
) -> Any:
    """The model in NF4 with double quantisation; the linear layers in `keep`, and all else, stay in `compute`.

    sharded: pack the weights into the compute dtype's storage, which FSDP needs to shard them beside the others.
    """
    model = load_model(
        folder,
        device=device,
        dtype=str(compute).removeprefix("torch."),
        trust_remote_code=trust_remote_code,
        quantization_config=nf4_config(compute, list(keep), compute if sharded else None),
        progress=progress,
    )
    # Training mode from here on: in eval mode, on some CPUs, 4-bit layers repack their weights and cannot train.
    model.train()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def add_lora(
    model: Any, pattern: str, settings: Healing, dtype: torch.dtype | None = None, wanted: Set[str] | None = None
) -> Any:
    """Wrap the modules whose whole name matches `pattern` with LoRA; alpha equals the rank.

    dtype: of the adapters, float32 where None. wanted: the modules that must be wrapped, and no other. Raises Refused where
    peft does otherwise.
    """
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
        try:
            made = get_peft_model(model, config)
        except ValueError as error:
            raise Refused(f"peft cannot put adapters on this {type(model).__name__}: {one_line(error)}") from error
    found = set(made.targeted_module_names)
    if wanted is not None and found != wanted:
        raise Refused(
            f"peft puts adapters on {len(found)} linear layers of this {type(model).__name__}, and not on the {len(wanted)} "
            f"asked for (such as {min(found ^ set(wanted))}): leave --adapters, --targets and --distil out"
        )
    if dtype is not None:
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return made


@contextlib.contextmanager
def quiet_warnings() -> Iterator[None]:
    """Keep the libraries' advice about kernels and checkpoints off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
