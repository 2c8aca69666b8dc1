"""Other kernels in a model in training: put in by a package that changes globals, proven, taken out again.

The package is a stand-in for liger-kernel, which needs Triton: it changes the same places in the same manner, with an autograd
function of its own for the norm that writes its gradient over the one it is given, as liger's does.
"""

# ruff: noqa: F811 (fixtures of another file)
from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from click.testing import CliRunner
from test_student import built, in_float32, made_ready  # noqa: F401
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

from layerprune.cli import main
from layerprune.heal import kernels
from layerprune.heal.kernels import check_kernels, kernels_in_use, one_step, patched
from layerprune.heal.train import heal_checkpoint
from layerprune.model.errors import Refused, UsageError

torch.set_num_threads(1)


class Norm(torch.autograd.Function):
    """RMS norm with its gradient worked out by hand."""

    fault = ""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale * (1.5 if Norm.fault == "forward" else 1.0)).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        m = (grad * weight).float()
        inner = 0.0 if Norm.fault == "backward" else (m * x).mean(-1, keepdim=True)
        grad.copy_(scale * (m - scale.square() * inner * x))  # in place, as liger does it
        return (-grad if Norm.fault == "backward" else grad), None, None


def norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return Norm.apply(hidden_states, self.weight, self.variance_epsilon)


def mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate = self.gate_proj(x)
    return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    calls.append("rotate")
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    half = q.shape[-1] // 2
    turned = [torch.cat((-x[..., half:], x[..., :half]), -1) for x in (q, k)]
    return q * cos + turned[0] * sin, k * cos + turned[1] * sin


calls: list[str] = []


class OnlyOnAGpu(torch.nn.Module):
    """What liger leaves in transformers' module for models that are loaded later."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was made while the kernels were left in")


def apply_to_llama(
    rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, rms_norm: bool = True,
    swiglu: bool = True, model: Any = None,
) -> None:  # fmt: skip
    assert rope and rms_norm and swiglu and not cross_entropy and not fused_linear_cross_entropy
    modeling_llama.apply_rotary_pos_emb = rotate
    modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = OnlyOnAGpu
    inner = getattr(model, model.base_model_prefix)
    norms = [inner.norm, *(n for layer in inner.layers for n in (layer.input_layernorm, layer.post_attention_layernorm))]
    for norm in norms:
        norm.in_place = True
        norm.__dict__["forward"] = norm_forward.__get__(norm)
    for layer in inner.layers:
        layer.mlp.__dict__["forward"] = mlp_forward.__get__(layer.mlp)


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel, as far as it is used."""
    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    served = {"llama": apply_to_llama, "nemotron": lambda relu_squared=True, model=None: None}

    def instance(model: Any, **kwargs: Any) -> None:
        served[model.config.model_type](model=model, **kwargs)

    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = served  # type: ignore[attr-defined]
    patch._apply_liger_kernel_to_instance = instance  # type: ignore[attr-defined]
    for name, module in (
        ("triton", ModuleType("triton")), ("liger_kernel", ModuleType("liger_kernel")),
        ("liger_kernel.transformers", ModuleType("liger_kernel.transformers")), (patch.__name__, patch),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Norm, "fault", "")
    calls.clear()


def row_of(tokens: int = 24) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids_T = torch.randint(0, 50, (tokens,), generator=generator)
    labels_T = ids_T.clone()
    labels_T[[0, 10]] = -100
    return {"input_ids": ids_T, "labels": labels_T, "position_ids": torch.arange(tokens) % 10}


def spaces(model: Any) -> list[dict[str, Any]]:
    """Everything that may be changed: the modules' attributes and transformers' globals."""
    return [dict(vars(module)) for module in model.modules()] + [dict(vars(modeling_llama))]


def same(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    return all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(before, after, strict=True))


def test_all_that_the_package_changes_is_put_back(built: Callable[[str], Path]) -> None:
    made = made_ready(built("llama"))
    model = made.student.decoder.model
    before = spaces(model)
    with patched(model):
        assert not same(before, spaces(model)) and modeling_llama.apply_rotary_pos_emb is rotate
        with made.student.installed():  # what others change meanwhile is theirs
            pass
        model.later = "stays"
    del model.later
    assert same(before, spaces(model))
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert same(before, spaces(model))


def test_what_it_changed_before_it_failed_is_put_back_too(
    built: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = made_ready(built("llama"))
    model = made.student.decoder.model
    before = spaces(model)

    def half_way(model: Any, **kwargs: Any) -> None:
        modeling_llama.LlamaMLP = OnlyOnAGpu
        raise TypeError("the model must be another")

    monkeypatch.setattr(sys.modules["liger_kernel.transformers.monkey_patch"], "_apply_liger_kernel_to_instance", half_way)
    with pytest.raises(Refused, match="do not run in this LlamaForCausalLM .the model must be another"), \
            kernels_in_use("liger", made.student, row_of(), torch.float32, calls.append):  # fmt: skip
        raise AssertionError
    assert same(before, spaces(model))


def test_one_step_is_the_models_own_loss_and_gradients(built: Callable[[str], Path]) -> None:
    made, row = made_ready(built("llama")), row_of()
    model = made.student.decoder.model.eval()
    logits_TV = model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False).logits[0]
    loss = F.cross_entropy(logits_TV[:-1].float(), row["labels"][1:])
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, parameters)
    model.train()
    for rows in (1, 3):
        found, gradients = one_step(made.student, row, rows, torch.float32)
        assert found == pytest.approx(loss.item(), rel=1e-5)
        for a, b in zip(expected, gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in parameters) and model.training


@pytest.mark.parametrize("recomputed", [0, 2, 4])
def test_right_kernels_are_proven_whatever_is_computed_again(built: Callable[[str], Path], recomputed: int) -> None:
    made, said = made_ready(built("llama")), list[str]()
    made.student.recomputed = before = frozenset(range(recomputed))
    with kernels_in_use("liger", made.student, row_of(), torch.float32, said.append) as prove:
        assert "rotate" in calls and made.student.recomputed == before
        prove(3)
    assert len(said) == 2 and said[0].startswith("liger's kernels: the loss of a sequence is that of the model's own within")
    assert all(float(word) < 1e-4 for line in said for word in line.split() if word[0].isdigit())


def test_the_models_own_need_no_proof(built: Callable[[str], Path]) -> None:
    made, said = made_ready(built("llama")), list[str]()
    with kernels_in_use(None, made.student, row_of(), torch.float32, said.append) as prove:
        prove(3)
    assert said == calls == []


@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_wrong_kernels_are_refused(built: Callable[[str], Path], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_ready(built("llama"))
    before = spaces(made.student.decoder.model)
    monkeypatch.setattr(Norm, "fault", fault)
    with pytest.raises(Refused, match="do not compute what this LlamaForCausalLM does.*leave --kernels out"), \
            kernels_in_use("liger", made.student, row_of(), torch.float32, lambda line: None):  # fmt: skip
        raise AssertionError
    assert same(before, spaces(made.student.decoder.model))


def test_kernels_that_are_wrong_only_as_planned_are_refused(
    built: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = made_ready(built("llama"))
    with kernels_in_use("liger", made.student, row_of(), torch.float32, lambda line: None) as prove:
        prove(2)
        monkeypatch.setattr(Norm, "fault", "backward")
        with pytest.raises(Refused, match="the adapters' gradients by"):
            prove(2)


def test_where_they_cannot_run_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = SimpleNamespace(model_type="llama")
    check_kernels(llama, "cuda")
    with pytest.raises(UsageError, match="--kernels liger needs a CUDA GPU, and this healing runs on cpu"):
        check_kernels(llama, "cpu")
    for kind in ("mamba", "nemotron"):  # of nemotron it replaces no norm
        with pytest.raises(Refused, match=f"no kernels for the layers of {kind} models .it has for llama, ...."):
            check_kernels(SimpleNamespace(model_type=kind), "cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_kernels(llama, "cuda")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="not for FSDP"):
        check_kernels(llama, "cuda")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(UsageError, match=r"needs the packages liger-kernel and triton .*pip install 'layerprune\[liger\]'"):
        check_kernels(llama, "cuda")


def test_a_healing_trains_with_them_and_is_proven_without(
    build_llama: Any, prose: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_llama(tmp_path / "plain", layers=2, hidden=64, intermediate_size=128, max_position_embeddings=128)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    settings: dict[str, Any] = {
        "data": str(data), "steps": 2, "batch_size": 2, "length": 32, "lora_rank": 4, "device": "cpu", "learning_rate": 1e-3,
    }  # fmt: skip
    with pytest.raises(UsageError, match="needs a CUDA GPU"):
        heal_checkpoint(folder, tmp_path / "no", kernels="liger", report=lambda line: None, **settings)
    arguments = ["heal", "--model", str(folder), "--heal-data", str(data), "--device", "cpu", "--out", str(tmp_path / "no")]
    told = CliRunner().invoke(main, [*arguments, "--kernels", "liger"])
    assert told.exit_code == 2 and "Error: --kernels liger needs a CUDA GPU" in told.stderr
    assert not (tmp_path / "no").exists()

    monkeypatch.setattr("layerprune.heal.train.check_kernels", lambda config, device: None)
    said: list[str] = []
    record = heal_checkpoint(folder, tmp_path / "with", kernels="liger", report=said.append, **settings)
    assert calls and sum(line.startswith("liger's kernels") for line in said) == 2
    assert record["settings"]["kernels"] == "liger" and record["verified"]["logits"].startswith("proven")
    assert modeling_llama.LlamaRMSNorm is not OnlyOnAGpu
    calls.clear()
    plain = heal_checkpoint(folder, tmp_path / "without", kernels="none", report=said.append, **settings)
    assert not calls and plain["settings"]["kernels"] is None
    assert record["losses"]["last"] == pytest.approx(plain["losses"]["last"], abs=1e-3)


def test_the_limits_are_between_rounding_and_a_wrong_kernel() -> None:
    assert 1e-3 < kernels.LOSS_APART < 0.1 and 0.05 < kernels.GRADIENTS_APART < 0.5
