"""What a run will need, by arithmetic on a model's sizes: memory, disk, tokens, steps, hours.

Nothing is loaded and torch is not imported. The numbers are estimates for planning; 1 GB is 1e9 bytes. A
mixture of experts counts with all of its experts, so its operations and hours are upper bounds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.model.cuts import drop_count
from layerprune.model.errors import Refused
from layerprune.model.files import read_json
from layerprune.model.recipes import EvalSettings, HealSettings, Recipe, Shape
from layerprune.model.tensors import StoredTensor, read_checkpoint

C4_MEAN_TOKENS = 430
"""C4 `en` has 156 billion tokens in 365 million documents (arXiv 2104.08758); most are far below 2,048
tokens."""
_C4_DOCUMENTS = {"train": 356_317, "validation": 45_576}  # in one shard
_C4_BYTES = {"train": 300e6, "validation": 40e6}  # of one shard, compressed

_TASKS = {"mmlu": (14_042, 57), "boolq": (3_270, 1)}
"""Test items and subtasks of the tasks that the recipes use."""
_TASK_TOKENS = 130
"""Tokens of one question or in-context example: a rough mean of MMLU and BoolQ."""

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a weight: 4, an 8-bit scale for 64 weights, a float32 for 256 scales (double quantisation): 4.127."""


@dataclass(frozen=True)
class Device:
    """Where a run is imagined. Rates are sustained FLOP/s; ranking and evaluating hold a weight in
    `weight_bytes`."""

    name: str
    forward_rate: float
    training_rate: float
    weight_bytes: int
    batch_tokens: int


DEVICES = {
    # 40 % and 45 % of 989 TFLOP/s. An H200 (same peak) reached 47 % forward and 50 % healing at Llama-2-7B's
    # shape where memory let activations stay; 35 % within 16 GiB (benchmarks/heal_speed.json).
    "h100": Device("H100 (40 % of 989 TFLOP/s forward, 45 % healing)", 0.4 * 989e12, 0.45 * 989e12, 2, 16384),
    "cpu": Device("CPU (100 GFLOP/s)", 100e9, 100e9, 4, 2048),
}


@dataclass(frozen=True)
class StepCost:
    """One step of a run. `steps` are optimizer steps (healing) or batches; `memory` is the peak in bytes."""

    name: str
    documents: int
    tokens: int
    steps: int
    flops: float
    hours: float
    memory: float


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes. `exact` says whether `kept_parameters` is a count or an approximation."""

    dropped: int
    kept: int
    kept_parameters: int
    exact: bool
    steps: tuple[StepCost, ...]
    disk: dict[str, float]
    unknown_tasks: tuple[str, ...]


def estimate(
    recipe: Recipe, drop: float, device: Device = DEVICES["h100"], stored_bytes: float = 2.0
) -> Estimate:
    """Estimate ranking, healing and one evaluation of `recipe`'s model with the fraction `drop` of its layers
    cut.

    stored_bytes: bytes a parameter on disk (2 for bf16). Raises UsageError for a fraction that drops no or
    all layers.
    """
    shape = recipe.shape
    dropped = drop_count(drop, shape.layers)
    kept = shape.layers - dropped
    kept_parameters, exact = parameters_of(shape, kept)
    rank_tokens = document_tokens(recipe.rank.data, recipe.rank.samples, recipe.rank.length)
    steps = [
        _forward(
            "rank", recipe.rank.samples, rank_tokens, shape.parameters, rank_memory(shape, device), device
        ),
        _healing(recipe, kept, kept_parameters, device),
    ]
    memory = evaluate_memory(shape, kept_parameters, device)
    tokens = document_tokens(recipe.eval.data, recipe.eval.samples, recipe.eval.length)
    steps.append(_forward("loss", recipe.eval.samples, tokens, kept_parameters, memory, device))
    for task in recipe.eval.tasks:
        if task in _TASKS:
            items, tokens = task_size(task, recipe.eval)
            steps.append(_forward(task, items, tokens, kept_parameters, memory, device))
    lora = lora_parameters(shape, recipe.heal, kept)
    disk = {
        "source": shape.parameters * stored_bytes,
        "pruned": kept_parameters * stored_bytes,
        "healed": kept_parameters * stored_bytes,
        # The adapter and Adam's two moments, float32, so that a killed run can go on.
        "work": lora * 12.0,
        "C4": c4_bytes(recipe),
    }
    unknown = tuple(task for task in recipe.eval.tasks if task not in _TASKS)
    return Estimate(dropped, kept, kept_parameters, exact, tuple(steps), disk, unknown)


def _forward(
    name: str, documents: int, tokens: int, parameters: int, memory: float, device: Device
) -> StepCost:
    flops = 2.0 * parameters * tokens
    batches = math.ceil(tokens / device.batch_tokens)
    return StepCost(name, documents, tokens, batches, flops, flops / device.forward_rate / 3600, memory)


def _healing(recipe: Recipe, kept: int, kept_parameters: int, device: Device) -> StepCost:
    heal = recipe.heal
    sequences = heal.steps * heal.batch_size
    tokens = sequences * (heal.length or 2048)
    # Forward, and gradients of activations; frozen weights get no gradient. Computing activations again, where
    # memory is short, is in the rate.
    flops = 4.0 * kept_parameters * tokens
    memory = heal_memory(recipe.shape, heal, kept)
    return StepCost("heal", sequences, tokens, heal.steps, flops, flops / device.training_rate / 3600, memory)


def document_tokens(data: str, samples: int, length: int | None) -> int:
    """Tokens of `samples` documents truncated at `length`: C4's mean, and for other files the most it can
    be."""
    most = length or 2048
    return samples * (min(most, C4_MEAN_TOKENS) if data == "c4" else most)


def task_size(task: str, settings: EvalSettings) -> tuple[int, int]:
    """(items, tokens) of one task; the context of a question is read once for all of its one-token
    answers."""
    items, subtasks = _TASKS[task]
    if settings.limit is not None:
        items = min(items, subtasks * settings.limit)
    return items, items * _TASK_TOKENS * (settings.tasks[task] + 1)


def parameters_of(shape: Shape, kept: int) -> tuple[int, bool]:
    """(parameters of the model with `kept` layers, whether that is exact).

    Dropping layers spares embeddings, head, final norm and other towers. Where the shape does not say how
    large a layer is, everything but an untied embedding and head counts as layers: right to a few per cent.
    """
    dropped = shape.layers - kept
    if shape.layer_parameters is not None:
        return shape.parameters - dropped * shape.layer_parameters, True
    layer = max(0, shape.parameters - 2 * shape.vocab * shape.hidden) // shape.layers
    return shape.parameters - dropped * layer, False


def mlp_width(shape: Shape) -> int:
    """Width inside the MLP; four times the hidden size where it is not known (most models have less)."""
    return shape.mlp or 4 * shape.hidden


def lora_parameters(shape: Shape, heal: HealSettings, kept: int) -> int:
    """Trainable parameters: rank * (in + out) of every target in every kept layer.

    No targets means the MLP's linears, taken as three (gate, up, down). Every target counts as a linear
    between the hidden size and the MLP's width, `gate_up_proj` as one to twice that width.
    """
    hidden, width = shape.hidden, mlp_width(shape)
    targets = heal.targets or ("gate_proj", "up_proj", "down_proj")
    ends = sum(hidden + (2 * width if target == "gate_up_proj" else width) for target in targets)
    return kept * heal.lora_rank * ends


def rank_memory(shape: Shape, device: Device) -> float:
    """Peak bytes of ranking: the weights, and in one layer 4 hidden and 3 MLP vectors for every token of a
    batch.

    Llama-2-7B's shape in bf16 with 8 x 2,048 tokens: 15.1 GB by this, 15.1 GB measured on one H200.
    """
    vectors = 4 * shape.hidden + 3 * mlp_width(shape)
    return device.weight_bytes * (shape.parameters + device.batch_tokens * vectors)


def evaluate_memory(shape: Shape, kept_parameters: int, device: Device) -> float:
    """Peak bytes of evaluating: the pruned weights, one layer's activations or the logits of a batch."""
    vectors = max(4 * shape.hidden + 3 * mlp_width(shape), shape.vocab)
    return device.weight_bytes * (kept_parameters + device.batch_tokens * vectors)


def heal_memory(shape: Shape, heal: HealSettings, kept: int, micro_batch: int = 1) -> float:
    """Peak bytes of healing with `micro_batch` sequences at a time and gradient checkpointing.

    - the kept layers in NF4 (4.127 bits a weight), everything else in bf16;
    - LoRA in float32: weight, gradient and Adam's two moments, 16 bytes a trainable parameter;
    - for every token: each kept layer's input (2D bytes), the layer in recomputation with LoRA's float32
      copies (26D + 13F), the logits with their float32 copy and both gradients (12V).
    Llama-2-7B's shape, unpruned, LoRA rank 64 on the MLP, 16 x 2,048 tokens: 34.7 GB by this, 36.2 GB
    measured on one H200.
    """
    kept_parameters, _ = parameters_of(shape, kept)
    outside, _ = parameters_of(shape, 0)
    weights = (kept_parameters - outside) * NF4_BITS / 8 + outside * 2
    adapter = lora_parameters(shape, heal, kept) * 16
    token = 2 * shape.hidden * kept + 26 * shape.hidden + 13 * mlp_width(shape) + 12 * shape.vocab
    return weights + adapter + micro_batch * (heal.length or 2048) * token


def c4_bytes(recipe: Recipe) -> float:
    """Bytes of the C4 shards that the recipe's steps download; 0 where it uses only local files."""
    validation = max(s.samples if s.data == "c4" else 0 for s in (recipe.rank, recipe.eval))
    heal = recipe.heal
    # A sequence filled with whole documents needs several; a truncated document is one.
    documents = heal.steps * heal.batch_size * max(1.0, (heal.length or 2048) / C4_MEAN_TOKENS)
    wanted = {"validation": validation, "train": documents if heal.data == "c4" else 0}
    return sum(math.ceil(n / _C4_DOCUMENTS[split]) * _C4_BYTES[split] for split, n in wanted.items())


def shape_of_checkpoint(folder: Path) -> tuple[Shape, float]:
    """(Shape, bytes a parameter) of a local checkpoint, from config.json and the headers of its weight files.

    Parameters are counted as stored. Raises Refused for a config without sizes, for weights that cannot be
    read, and for a checkpoint that is quantised already.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise Refused(f"{folder / 'config.json'} is not a model config")
    if "quantization_config" in config:
        raise Refused(
            f"{folder} is quantised already: its tensors do not show how many parameters they stand for"
        )
    inner = config.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else config
    tensors = read_checkpoint(folder)
    parameters = sum(tensor.numel for tensor in tensors.values())
    layers = _size(folder, text, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    shape = Shape(
        layers=layers,
        hidden=_size(folder, text, "hidden_size", "n_embd", "d_model"),
        vocab=_size(folder, text, "vocab_size"),
        parameters=parameters,
        layer_parameters=_layer_parameters(tensors, layers),
        mlp=next(
            (text[k] for k in ("intermediate_size", "n_inner", "ffn_dim") if isinstance(text.get(k), int)),
            None,
        ),
    )
    return shape, sum(tensor.nbytes for tensor in tensors.values()) / parameters


def _size(folder: Path, config: dict[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    raise Refused(f"{folder / 'config.json'} does not say {names[0]}: the sizes of this model cannot be read")


def _layer_parameters(tensors: dict[str, StoredTensor], layers: int) -> int | None:
    """Mean parameters of a layer: the largest group of tensors whose names count 0 .. L-1 after one
    prefix."""
    groups: dict[str, dict[int, int]] = {}
    for name, tensor in tensors.items():
        match = re.match(r"(.*?)\.?(\d+)\.", name)
        if match:
            group = groups.setdefault(match[1], {})
            group[int(match[2])] = group.get(int(match[2]), 0) + tensor.numel
    stacks = [sum(group.values()) for group in groups.values() if set(group) == set(range(layers))]
    return max(stacks) // layers if stacks else None
