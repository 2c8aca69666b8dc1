"""A checkpoint as healing trains it: linear layers in NF4, LoRA on its targets."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from layerprune.heal.settings import Healing
from layerprune.heal.targets import is_linear, linear_shape
from layerprune.model.errors import Refused, one_line
from layerprune.model.load import load_model

NF4_BLOCK = 64
"""Weights that share a scale in NF4."""


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
    sharded: bool = False,
) -> Any:
    """The model in NF4 with double quantisation; the linear layers in `keep`, and all else, stay in `compute`.

    sharded: pack the weights into the compute dtype's storage, which FSDP needs to shard them beside the others.
    """
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=list(keep),
        **({"bnb_4bit_quant_storage": compute} if sharded else {}),
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
    if not device.startswith("cpu"):
        return torch.bfloat16
    fast = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )
    return torch.bfloat16 if fast else torch.float32


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
