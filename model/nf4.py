"""Linear layers in NF4 (4 bits, double quantisation, arXiv 2305.14314): which ones, in which compute dtype, and packing one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

NF4_BLOCK = 64
"""Weights that share a scale in NF4."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight's bytes: its 4 bits, its share of a block's scale, and of what the scales of 256 blocks are quantised by."""

_SLICE = 1 << 18
"""Weights that are packed at once on a CPU (a row at least): bitsandbytes takes 14 bytes for each of them meanwhile."""

CPU_PACKING_BYTES = 9
"""What packing takes on the CPU for a weight of a linear layer, beside the weight itself: 0.9 while one is packed in slices, and
7.5 at the first use of another, which bitsandbytes 0.50 lays out anew for instructions of the CPU (measured; rounded up)."""


def is_linear(module: Any) -> bool:
    """nn.Linear and its subclasses (quantised ones too), and GPT-2's Conv1D, a linear stored transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: Any) -> tuple[int, int]:
    """(out, in) features of a linear layer, also where its weight is packed to four bits."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    width, out = module.weight.shape
    return int(out), int(width)


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


def nf4_config(compute: torch.dtype, keep: list[str], storage: torch.dtype | None = None) -> Any:
    """What transformers is told to load a model so; the linear layers in `keep` stay in the compute dtype."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=keep,
        **({} if storage is None else {"bnb_4bit_quant_storage": storage}),
    )


def is_packable(module: Any) -> bool:
    """Whether transformers quantises a layer of this kind: no subclasses of nn.Linear, which may use their weight otherwise."""
    return type(module) is nn.Linear or is_linear(module) and not isinstance(module, nn.Linear)


def pack(linear: Any, compute: torch.dtype) -> Any:
    """The linear layer in NF4, on the device where its weight lies; it keeps the bias itself.

    On the CPU a slice of rows at a time, to the bit what bitsandbytes makes of the whole weight.
    """
    from bitsandbytes.nn import Linear4bit

    out, width = linear_shape(linear)
    with torch.device("meta"):
        layer = Linear4bit(
            width, out, bias=linear.bias is not None, compute_dtype=compute, compress_statistics=True, quant_type="nf4"
        )
    weight_OI = linear.weight.data if isinstance(linear, nn.Linear) else linear.weight.data.T
    layer.weight = _packed_in_slices(weight_OI, layer) if weight_OI.device.type == "cpu" else _packed(weight_OI, layer)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return layer.train(linear.training)


def _packed(weight_OI: torch.Tensor, layer: Any) -> Any:
    from bitsandbytes.nn import Params4bit

    weight = Params4bit(weight_OI.contiguous(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    return weight.to(weight_OI.device)


def _packed_in_slices(weight_OI: torch.Tensor, layer: Any) -> Any:
    """What `_packed` gives, without the several copies of the whole weight in float32 that bitsandbytes takes on a CPU.

    Blocks are 64 numbers of the flattened weight, so slices that are whole blocks can be packed by themselves; the scales are
    quantised together, less their mean, in blocks of 256 (bitsandbytes 0.50, `quantize_4bit` with compress_statistics).
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    out, width = weight_OI.shape
    step = NF4_BLOCK // math.gcd(width, NF4_BLOCK)  # rows that are whole blocks
    rows = max(step, _SLICE // width // step * step)
    packed = torch.empty((-(-out * width // 2), 1), dtype=torch.uint8)
    scales = torch.empty(-(-out * width // NF4_BLOCK), dtype=torch.float32)
    for first in range(0, out, rows):
        part, state = quantize_4bit(weight_OI[first : first + rows].contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        packed[first * width // 2 :][: len(part)] = part
        scales[first * width // NF4_BLOCK :][: len(state.absmax)] = state.absmax
    mean = scales.mean()
    quantised, second = quantize_blockwise(scales - mean, blocksize=256)
    layer.quant_state = QuantState(
        absmax=quantised, shape=weight_OI.shape, dtype=weight_OI.dtype, blocksize=NF4_BLOCK,
        code=get_4bit_type("nf4", device=weight_OI.device), quant_type="nf4", offset=mean, state2=second,
    )  # fmt: skip
    return Params4bit(
        packed, requires_grad=False, quant_state=layer.quant_state, blocksize=NF4_BLOCK, compress_statistics=True,
        quant_type="nf4", module=layer, bnb_quantized=True,
    )  # fmt: skip
