"""Healing a sharded model: the adapter that is gathered from two processes is the one that peft would write."""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from layerprune.heal.merge import adapter_factors
from layerprune.heal.sharded import gather_adapter, restore_adapter, write_adapter
from layerprune.heal.world import check_world
from layerprune.model.errors import UsageError

RANK = 2


def adapted(model: Path) -> Any:
    """A model with an adapter whose weights are all unlike each other, on every process the same."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    live = get_peft_model(
        whole, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    some = torch.Generator().manual_seed(0)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=some))
    return live


def sharded(rank: int, model: Path, out: Path, port: int, recomputed: bool) -> None:
    """One of two processes: shard, write what is gathered, put twice as much in, gather again, and take a step."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    live = adapted(model)
    config = live.peft_config["default"]
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    wrapped = FullyShardedDataParallel(live, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    if recomputed:
        apply_activation_checkpointing(wrapped, auto_wrap_policy=policy)
    first = gather_adapter(wrapped)
    restore_adapter(wrapped, {name: 2 * tensor for name, tensor in first.items()})
    second = gather_adapter(wrapped)
    loss = wrapped(input_ids=torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss
    loss.backward()
    if rank == 0:
        (out / "gathered").mkdir()
        write_adapter(first, config, out / "gathered")
        save_file(second, out / "second.safetensors")
        (out / "loss.json").write_text(json.dumps(loss.item()))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_gathered_adapter_is_what_peft_writes(build_llama: Callable[..., Path], tmp_path: Path, recomputed: bool) -> None:
    model = build_llama(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(sharded, (model, tmp_path, port, recomputed), nprocs=2)

    live = adapted(model)
    live.save_pretrained(tmp_path / "plain")
    plain, gathered = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "gathered"))
    assert len(plain) == 4 * live.config.num_hidden_layers
    assert plain.keys() == gathered.keys()
    assert all(torch.equal(plain[name], gathered[name]) for name in plain)
    told = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("plain", "gathered")]
    assert told[0].keys() == told[1].keys()
    assert [(one["r"], one["inference_mode"]) for one in told] == [(RANK, True)] * 2
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in plain}
    assert adapter_factors(tmp_path / "gathered", modules)[1] == 1.0

    second = load_file(tmp_path / "second.safetensors")
    assert all(torch.equal(2 * plain[name.replace(".default.", ".")], tensor) for name, tensor in second.items())
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    ids = torch.arange(8).view(1, 8)
    assert live(input_ids=ids, labels=ids).loss.item() == pytest.approx(json.loads((tmp_path / "loss.json").read_text()), abs=1e-5)


def test_what_sharding_leaves_undone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world(4, "cuda", distilled=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_world(4, "cuda")
    with pytest.raises(UsageError, match="--distil needs the model whole on each GPU"):
        check_world(4, "cuda", distilled=True)
    with pytest.raises(UsageError, match="heal on the CPU with"):
        check_world(4, "cpu")
