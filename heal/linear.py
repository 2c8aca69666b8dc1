"""The linear layers of a model in training: NF4 weights packed or decoded, LoRA beside them.

bitsandbytes quantises and peft places, names and saves the adapters; while training runs, these modules stand in for
theirs. They compute the same, and differ in what a compiler and a memory plan need: decoding is opaque to torch.compile (which
would keep every decoded weight for the backward pass), a weight can be kept decoded, and LoRA takes its input as it comes
instead of a float32 copy of it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def is_packed(module: Any) -> bool:
    """Whether a module is bitsandbytes' 4-bit linear layer with weights that are quantised."""
    if not isinstance(module, nn.Linear):  # peft's wrapper shows its base layer's weight as its own
        return False
    return type(module.weight).__name__ == "Params4bit" and module.weight.quant_state is not None


class FourBitLinear(nn.Module):
    """A frozen linear layer whose weight is held in NF4 and decoded at each use, or decoded once for all.

    Takes over the packed weight of a bitsandbytes layer and lets that layer go. `decode` trades memory (four bits and an
    eighth a weight for the whole compute dtype) for the time of decoding.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        _register()
        state = layer.weight.quant_state
        self.out_features, self.in_features = (int(size) for size in state.shape)
        self.dtype: torch.dtype = state.dtype
        self.kind, self.blocksize = state.quant_type, state.blocksize
        nested = state.nested
        self.scale_blocksize = state.state2.blocksize if nested else 0
        parts = {
            "packed": layer.weight.data,
            "absmax": state.absmax,
            "offset": state.offset if nested else None,
            "scale_absmax": state.state2.absmax if nested else None,
            "scale_code": state.state2.code if nested else None,
        }
        for name, value in parts.items():
            self.register_buffer(name, value, persistent=False)
        self.decoded: torch.Tensor | None
        self.register_buffer("decoded", None, persistent=False)
        self.bias = layer.bias

    def decoded_weight(self) -> torch.Tensor:
        """The weight (out, in) in the compute dtype; what the layer computes with."""
        if self.decoded is not None:
            return self.decoded
        return _decode(*self._packed(), *self._meta())

    @property
    def weight(self) -> torch.Tensor:
        """For models that look at a layer's weight, as Mamba does on its way to a fused kernel."""
        return self.decoded_weight()

    def decode(self) -> None:
        """Keep the weight decoded from here on; the packed one goes."""
        if self.decoded is None:
            self.decoded = self.decoded_weight()
            self.packed = self.absmax = self.offset = self.scale_absmax = self.scale_code = None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weight in NF4, 0 where it is decoded."""
        return sum(part.numel() * part.element_size() for part in self._packed() if part is not None)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the weight in the compute dtype."""
        return self.out_features * self.in_features * self.dtype.itemsize

    def _packed(self) -> tuple[Any, ...]:
        return self.packed, self.absmax, self.offset, self.scale_absmax, self.scale_code

    def _meta(self) -> tuple[Any, ...]:
        return self.blocksize, self.scale_blocksize, self.kind, self.out_features, self.in_features, self.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x.dtype
        x = x.to(self.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if self.decoded is not None:
            return F.linear(x, self.decoded, bias).to(given)
        return torch.ops.layerprune.four_bit_linear(x, bias, *self._packed(), *self._meta()).to(given)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {'packed' if self.decoded is None else 'decoded'} {self.kind}"


class LoraLinear(nn.Module):
    """y = base(x) + scale * B A dropout(x): what a peft LoRA layer computes, in the place of its own `forward`.

    `active` switches the adapter off, for the teacher's pass.
    """

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    base_layer: nn.Module
    adapter: str
    scale: float
    rate: float
    active: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if not self.active:
            return y
        a: Any = self.lora_A[self.adapter].weight
        b: Any = self.lora_B[self.adapter].weight
        if not torch.is_autocast_enabled(x.device.type):
            a, b = a.to(x.dtype), b.to(x.dtype)
        dropped = F.dropout(x, self.rate, self.training) if self.rate else x
        return y + (self.scale * F.linear(F.linear(dropped, a), b)).to(y.dtype)


def stand_in(model: nn.Module) -> None:
    """Put `FourBitLinear` in the place of bitsandbytes' layers, and `LoraLinear.forward` into peft's, for good.

    For a model that is only trained from here on: its packed weights belong to the new modules. peft's layers stay peft's, in
    all that it saves and loads.
    """
    from peft.tuners.lora import LoraLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_packed(child):
                setattr(parent, name, FourBitLinear(child).train(child.training))
    for layer in list(model.modules()):
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            (name,) = layer.active_adapters
            layer.adapter, layer.scale, layer.active = name, float(layer.scaling[name]), True
            layer.rate = float(getattr(layer.lora_dropout[name], "p", 0.0))
            kind: Any = type(layer)
            layer.__class__ = _with_own_forward(kind)


@functools.cache
def _with_own_forward(kind: type) -> type:
    return type(f"Own{kind.__name__}", (LoraLinear, kind), {})


def _is_plain(layer: Any) -> bool:
    """Whether a peft layer is LoRA on a linear layer and nothing more."""
    return len(layer.active_adapters) == 1 and layer.active_adapters[0] in layer.lora_A and not layer.lora_variant


def four_bit_linears(module: nn.Module) -> list[FourBitLinear]:
    """The 4-bit layers inside a module, in order."""
    return [child for child in module.modules() if isinstance(child, FourBitLinear)]


def lora_linears(module: nn.Module) -> list[LoraLinear]:
    """The layers with an adapter inside a module, in order."""
    return [child for child in module.modules() if isinstance(child, LoraLinear)]


def _decode(
    packed: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor | None, scale_absmax: torch.Tensor | None,
    scale_code: torch.Tensor | None, blocksize: int, scale_blocksize: int, kind: str, rows: int, columns: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The weight (rows, columns), through bitsandbytes' operators, as its own `dequantize_4bit` does it."""
    ops = torch.ops.bitsandbytes
    if scale_absmax is not None:
        absmax = ops.dequantize_blockwise(absmax, scale_absmax, scale_code, scale_blocksize, torch.float32) + offset
    return ops.dequantize_4bit(packed, absmax, blocksize, kind, [rows, columns], dtype)


@functools.cache
def _register() -> None:
    """x W^T + bias as an operator, forward and back; registered when it is first needed, as bitsandbytes is loaded late."""
    import bitsandbytes  # noqa: F401 (registers its operators)

    weight = (
        "Tensor packed, Tensor absmax, Tensor? offset, Tensor? scale_absmax, Tensor? scale_code, int blocksize, "
        "int scale_blocksize, str kind, int rows, int columns, ScalarType dtype"
    )

    def forward(x: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        return F.linear(x, _decode(*rest), bias)  # rounded once, with the bias

    def backward(grad: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.matmul(grad, _decode(*rest))

    made = {}
    for name, run, given, width in (
        ("four_bit_linear", forward, "Tensor x, Tensor? bias", -3),
        ("four_bit_linear_back", backward, "Tensor grad", -2),
    ):
        op = torch.library.custom_op(f"layerprune::{name}", run, mutates_args=(), schema=f"({given}, {weight}) -> Tensor")
        op.register_fake(lambda x, *rest, _width=width: x.new_empty((*x.shape[:-1], rest[_width])))
        made[name] = op

    def remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[2:7])
        ctx.rest = inputs[7:]

    def differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return made["four_bit_linear_back"](grad.contiguous(), *ctx.saved_tensors, *ctx.rest), *[None] * 12

    made["four_bit_linear"].register_autograd(differentiate, setup_context=remember)
