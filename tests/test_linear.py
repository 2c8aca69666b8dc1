"""The linear layers of a model in training, against bitsandbytes' and peft's own."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from layerprune.heal.linear import FourBitLinear, four_bit_linears, is_packed, lora_linears, stand_in

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16]
RANK = 4


def packed_linear(rows: int, columns: int, bias: bool, dtype: torch.dtype, nested: bool = True) -> Any:
    """bitsandbytes' own layer over random weights, as transformers makes it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(rows + columns)
    layer = Linear4bit(columns, rows, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4")
    weight = torch.randn(rows, columns, dtype=dtype)
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=nested, quant_type="nf4")
    if bias:
        layer.bias = nn.Parameter(torch.randn(rows, dtype=dtype), requires_grad=False)
    return layer.to("cpu").train()


def there_and_back(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's output, and the gradient of a weighted sum of it by x."""
    x = x.clone().requires_grad_(True)
    y = layer(x)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    (grad,) = torch.autograd.grad(y, x, slope)
    return y.detach(), grad


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# NF4


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_layer_computes_what_bitsandbytes_does(dtype: torch.dtype, bias: bool, nested: bool) -> None:
    theirs = packed_linear(192, 128, bias, dtype, nested)
    ours = FourBitLinear(theirs)
    for x in (some(2, 5, 128, dtype=dtype), some(7, 128, dtype=dtype), some(2, 5, 128)):
        (y, dx), (y_ours, dx_ours) = there_and_back(theirs, x), there_and_back(ours, x)
        assert y_ours.dtype == y.dtype == x.dtype and dx_ours.dtype == x.dtype
        assert torch.equal(y_ours, y) and torch.equal(dx_ours, dx)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoded_layer_computes_what_the_packed_one_does(dtype: torch.dtype, bias: bool) -> None:
    ours = FourBitLinear(packed_linear(192, 128, bias, dtype))
    before = there_and_back(ours, some(2, 5, 128, dtype=dtype))
    weight = ours.decoded_weight()
    ours.decode()
    assert torch.equal(ours.decoded_weight(), weight) and weight.dtype == dtype and weight.shape == (192, 128)
    for a, b in zip(before, there_and_back(ours, some(2, 5, 128, dtype=dtype)), strict=True):
        assert torch.equal(a, b)


def test_the_bytes_of_a_layer_are_those_of_its_tensors() -> None:
    ours = FourBitLinear(packed_linear(192, 128, True, torch.bfloat16))
    numbers = 192 * 128
    # half a byte a weight, a byte a block of 64; a float32 every 256 blocks, 256 levels and one offset
    assert ours.packed_bytes == numbers // 2 + numbers // 64 + 4 * -(-numbers // 64 // 256) + 4 * 256 + 4
    assert ours.decoded_bytes == 2 * numbers
    ours.decode()
    assert ours.packed_bytes == 0 and ours.decoded_weight().nbytes == ours.decoded_bytes
    held = sum(buffer.nbytes for buffer in ours.buffers())
    assert held == ours.decoded_bytes, "nothing packed is left beside it"


def test_frozen_weights_are_in_no_state() -> None:
    ours = FourBitLinear(packed_linear(128, 64, True, torch.float32))
    assert set(ours.state_dict()) == {"bias"}
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_compiles_as_one_graph(bias: bool, decoded: bool) -> None:
    ours = FourBitLinear(packed_linear(128, 64, bias, torch.float32))
    if decoded:
        ours.decode()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for a, b in zip(there_and_back(ours, some(2, 5, 64)), there_and_back(compiled, some(2, 5, 64)), strict=True):
        assert torch.equal(a, b)


# LoRA


class Net(nn.Module):
    """Two linear layers to adapt and one to leave."""

    def __init__(self, dtype: torch.dtype, conv: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = Conv1D(128, 64).to(dtype) if conv else packed_linear(128, 64, True, dtype)
        self.down = packed_linear(64, 128, False, dtype)
        self.head = packed_linear(64, 64, False, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def adapted(dropout: float = 0.0, dtype: torch.dtype = torch.float32, conv: bool = False) -> Any:
    """peft's model of `Net`, its adapters away from zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=["up", "down"], fan_in_fan_out=conv)
    torch.manual_seed(0)
    made: Any = get_peft_model(Net(dtype, conv).requires_grad_(False), config)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return made.train()


def run(model: Any, x: torch.Tensor, seed: int = 5) -> dict[str, torch.Tensor]:
    """Output, gradient of the input and of every adapter."""
    torch.manual_seed(seed)
    dx = x.clone().requires_grad_(True)
    y = model(dx)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y.float().square().sum(), [dx, *adapters.values()])
    return {"y": y.detach(), "dx": grads[0], **dict(zip(adapters, grads[1:], strict=True))}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("conv", [False, True])
def test_lora_computes_what_peft_does(conv: bool, dropout: float) -> None:
    model = adapted(dropout, conv=conv)
    x = some(3, 7, 64)
    theirs = run(model, x)
    stand_in(model)
    ours = run(model, x)
    assert len(lora_linears(model)) == 2 and theirs.keys() == ours.keys() and len(ours) == 6
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    other = run(model, x, seed=6)["y"]
    assert torch.equal(other, ours["y"]) is (dropout == 0), "dropout is drawn anew"


def test_lora_under_autocast_is_peft_s_to_bf16_rounding() -> None:
    model = adapted(dtype=torch.bfloat16)
    x = some(3, 7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, x)
        stand_in(model)
        ours = run(model, x)
    for name, value in theirs.items():
        assert torch.linalg.norm(ours[name].float() - value.float()) <= 2**-7 * torch.linalg.norm(value.float()), name


def test_dropout_is_torch_s_under_one_seed_and_off_in_evaluation() -> None:
    model = adapted(0.5)
    stand_in(model)
    layer, x = lora_linears(model)[0], some(3, 64)
    a, b = (p[layer.adapter].weight for p in (layer.lora_A, layer.lora_B))
    torch.manual_seed(9)
    found = layer(x)
    torch.manual_seed(9)
    expected = layer.base_layer(x) + 2.0 * F.linear(F.linear(F.dropout(x, 0.5, True), a), b)
    assert torch.equal(found, expected)
    model.eval()
    assert torch.equal(layer(x), layer.base_layer(x) + 2.0 * F.linear(F.linear(x, a), b))


def test_an_inactive_adapter_leaves_the_base_alone() -> None:
    model = adapted(0.5)
    stand_in(model)
    x = some(3, 64)
    on = model(x)
    for layer in lora_linears(model):
        layer.active = False
        assert torch.equal(layer(some(3, layer.base_layer.in_features)), layer.base_layer(some(3, layer.base_layer.in_features)))
    base = model.get_base_model()
    plain = base.head(base.down.base_layer(torch.tanh(base.up.base_layer(x))))
    assert torch.equal(model(x), plain) and not torch.equal(on, plain)


def test_every_packed_layer_is_replaced_and_the_mode_stays() -> None:
    model = adapted().eval()
    model.get_base_model().head.train()
    stand_in(model)
    assert not any(is_packed(m) for m in model.modules()) and len(four_bit_linears(model)) == 3
    assert {name.rpartition(".")[2]: m.training for name, m in model.named_modules() if isinstance(m, FourBitLinear)} == {
        "base_layer": False, "head": True,
    }  # fmt: skip


def test_peft_saves_and_loads_the_same_adapter(tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    model = adapted()
    before = get_peft_model_state_dict(copy.deepcopy(model))
    stand_in(model)
    assert all(isinstance(layer, LoraLayer) for layer in lora_linears(model))
    after = get_peft_model_state_dict(model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.replace(".default", "") for k in before} == saved.keys() and len(saved) == 4
    fresh = PeftModel.from_pretrained(Net(torch.float32), tmp_path).train()
    x = some(3, 64)
    assert torch.equal(fresh(x), model(x)), "peft's own layers with the saved adapter"
    # and into a model whose layers stand in already, as Trainer does when it goes on
    other = adapted()
    stand_in(other)
    for p in other.parameters():
        if p.requires_grad:
            nn.init.zeros_(p)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapted_layer_compiles_as_one_graph(dropout: float) -> None:
    model = adapted(dropout)
    stand_in(model)
    model.train(dropout == 0)  # a compiler draws its own random numbers
    layer = lora_linears(model)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    theirs, ours = run(layer, some(3, 64)), run(compiled, some(3, 64))
    for a, b in zip(theirs.values(), ours.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    layer.active = False
    assert torch.equal(compiled(some(3, 64)), layer.base_layer(some(3, 64))), "the switch is seen by what was compiled"


def test_two_adapters_at_once_are_left_to_peft() -> None:
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    expected = model(some(3, 64))
    stand_in(model)
    assert not lora_linears(model) and len(four_bit_linears(model)) == 3
    assert torch.equal(model(some(3, 64)), expected)


def test_gpt2_s_transposed_layers_compute_what_bitsandbytes_does(tmp_path: Path) -> None:
    """transformers packs Conv1D's weights transposed, into (out, in)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from layerprune.heal.quantise import load_quantised

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=160, n_embd=64, n_layer=1, n_head=4, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_quantised(tmp_path, "cpu", torch.float32, ["lm_head"])
    found = {name: module for name, module in model.named_modules() if is_packed(module)}
    assert {name.rpartition("h.0.")[2] for name in found} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    for name, theirs in found.items():
        x = some(2, 5, theirs.in_features)
        (y, dx), (y_ours, dx_ours) = there_and_back(theirs, x), there_and_back(FourBitLinear(theirs), x)
        assert y.shape[-1] == theirs.out_features and torch.equal(y_ours, y) and torch.equal(dx_ours, dx), name


def test_an_unpacked_layer_is_not_taken_for_a_packed_one() -> None:
    from bitsandbytes.nn import Linear4bit

    assert not is_packed(nn.Linear(64, 64)) and not is_packed(Linear4bit(64, 64)), "the second has no weights yet"
    assert is_packed(packed_linear(64, 64, False, torch.float32))
    model = adapted()
    assert not is_packed(model.get_base_model().up), "peft's wrapper shows its base layer's weight as its own"


def test_a_model_that_looks_at_a_weight_sees_the_one_that_is_computed_with() -> None:
    ours = FourBitLinear(packed_linear(128, 64, False, torch.float32))
    x = some(3, 64)
    assert torch.equal(F.linear(x, ours.weight), ours(x)) and "weight" not in dict(ours.named_parameters())
    ours.decode()
    assert torch.equal(F.linear(x, ours.weight), ours(x))
