"""Packing a linear layer to NF4 in slices: to the bit what bitsandbytes makes of the whole, in a fraction of the memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layerprune.model import nf4
from layerprune.model.nf4 import CPU_PACKING_BYTES, compute_dtype, pack


def linear(kind: str, out: int, width: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(out * width)
    made = nn.Linear(width, out, dtype=dtype) if kind == "linear" else Conv1D(out, width).to(dtype)
    with torch.no_grad():
        made.weight.mul_(torch.rand(made.weight.shape) * 3)
        made.weight.view(-1)[:70] = 0  # a block of zeros
    return made.eval()


def whole(layer: Any) -> tuple[torch.Tensor, Any]:
    """By bitsandbytes, all at once."""
    from bitsandbytes.functional import quantize_4bit

    weight_OI = layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.T.contiguous()
    packed, state = quantize_4bit(weight_OI, blocksize=64, compress_statistics=True, quant_type="nf4")
    return packed, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(
    ("out", "width", "at_once"),
    [(96, 128, 1 << 18), (96, 128, 640), (33, 192, 1), (257, 64, 64 * 20), (130, 320, 8192), (48, 96, 500), (35, 72, 1)],
)
def test_slices_are_the_whole_to_the_bit(
    out: int, width: int, at_once: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "_SLICE", at_once)
    layer = linear(kind, out, width, dtype)
    expected, state = whole(layer)
    made = pack(layer, torch.float32)
    found = made.weight.quant_state
    assert found is made.quant_state and made.weight.bnb_quantized and made.weight.module is made
    assert made.weight.dtype == torch.uint8 and torch.equal(made.weight.data, expected)
    pairs = [(found, state), (found.state2, state.state2)]
    for ours, theirs in pairs:
        assert torch.equal(ours.absmax, theirs.absmax) and torch.equal(ours.code, theirs.code)
        assert (ours.shape, ours.dtype, ours.blocksize, ours.quant_type) == (
            theirs.shape, theirs.dtype, theirs.blocksize, theirs.quant_type,
        )  # fmt: skip
    assert torch.equal(found.offset, state.offset) and found.nested
    assert set(vars(found)) == set(vars(state))
    assert torch.equal(made.bias, layer.bias)


def test_a_slice_is_never_larger_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as functional

    seen: list[int] = []
    real = functional.quantize_4bit

    def counted(weight: torch.Tensor, **given: Any) -> Any:
        seen.append(weight.numel())
        return real(weight, **given)

    monkeypatch.setattr(functional, "quantize_4bit", counted)
    pack(linear("linear", 1000, 1024, torch.bfloat16), torch.float32)
    assert sum(seen) == 1000 * 1024 and max(seen) == 1 << 18 and len(seen) == 4


MEASURE = """
import sys, torch
from torch import nn
from layerprune.model.nf4 import compute_dtype, pack
torch.set_num_threads(1)

def resident(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def peak(work):
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    return work(), resident("VmHWM") - before

def use(layer, width):
    with torch.no_grad():
        layer(torch.ones(2, width, dtype=compute_dtype("cpu")))

use(pack(nn.Linear(256, 256), compute_dtype("cpu")).eval(), 256)
out, width = 6144, 4096
layer = nn.Linear(width, out, bias=False, dtype=torch.bfloat16)
packed, packing = peak(lambda: pack(layer, compute_dtype("cpu")).eval())
_, using = peak(lambda: use(packed, width))
print(packing / (out * width), using / (out * width))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read as Linux tells it")
def test_what_packing_takes_is_what_is_planned() -> None:
    root = Path(__file__).parent.parent
    told = subprocess.run([sys.executable, "-c", MEASURE], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    packing, using = map(float, told[-2:])
    assert packing < 1.5  # 14 in one go
    assert packing + using < CPU_PACKING_BYTES
    assert compute_dtype("cpu") != torch.bfloat16 or using > 2  # else the figure has become too careful
