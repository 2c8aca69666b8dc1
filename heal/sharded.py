"""The adapter of a model that FSDP has sharded: gathered and put back a unit at a time, and written in peft's format.

peft looks an adapter's weights up by the names of modules, to which FSDP adds its own, and finds none: what Trainer keeps of it in
a checkpoint is empty. So it is kept here, beside Trainer's optimizer, and the base model is never gathered for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

ADAPTER = "adapter.safetensors"
"""The adapter in a Trainer checkpoint, by the names of the model without wrappers."""
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def gather_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA weights on the CPU, by parameter name; every process must call this, and each gets all of them."""
    return {name: parameter.detach().cpu().clone() for name, parameter in _whole(model, False)}


def restore_adapter(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put LoRA weights into every process's shards; KeyError where one of the model's is missing."""
    with torch.no_grad():
        for name, parameter in _whole(model, True):
            parameter.copy_(tensors[name])


def write_adapter(tensors: Mapping[str, torch.Tensor], config: Any, folder: Path) -> None:
    """Write gathered weights and the LoraConfig `config` to `folder`, as peft's own `save_pretrained` does it."""
    from safetensors.torch import save_file

    named = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    replace(config, inference_mode=True).save_pretrained(folder)


def _whole(model: nn.Module, write: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Each LoRA parameter while its unit is gathered; what is written into it stays where `write`."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    units = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDP)]
    for prefix, unit in units:
        inner = [name for name, _ in units if name != prefix and name.startswith(f"{prefix}." if prefix else "")]
        with FSDP.summon_full_params(unit, recurse=False, writeback=write):
            for name, parameter in unit.named_parameters(prefix):
                # named_parameters leaves FSDP's own names out while a unit is gathered, or not: all of them go
                if ".lora_" in name and not any(_plain(name).startswith(_plain(one) + ".") for one in inner):
                    yield _plain(name), parameter


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
