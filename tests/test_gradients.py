"""Integrated gradients against autograd through plain forward hooks, completeness, and planted truths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from layerprune.depth import gradients
from layerprune.depth.gradients import _in_pieces, integrated_gradients
from layerprune.model.decoder import Decoder, hidden_of, view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model

torch.set_num_threads(1)

NAMES = "GPT-2 GPT-J Falcon OPT Qwen3-MoE Gemma-2 Gemma-3n Gemma-4 Cohere2 LFM2 Mamba DeepSeek-V3".split()
IDS = [5, 90, 33, 7, 120, 64, 11]


@pytest.fixture
def decoder(tiny_llama: Path) -> Decoder:
    return view_decoder(load_model(tiny_llama, device="cpu", dtype="float32"))


@pytest.fixture
def built(tmp_path: Path) -> Callable[[str], Decoder]:
    def build(name: str) -> Decoder:
        from transformers import CONFIG_MAPPING

        if families.FAMILIES[name].model_type not in CONFIG_MAPPING:
            pytest.skip("this transformers does not have it")
        return view_decoder(load_model(families.build(name, tmp_path / "source"), device="cpu", dtype="float32"))

    return build


def with_output(decoder: Decoder, ids: list[int], layer: int, put: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole model with the output of one layer replaced by a hook: that output as it was, and logits (T, V)."""
    seen: list[torch.Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> Any:
        seen.append(hidden_of(output).detach())
        if put is None:
            return output
        return (put, *output[1:]) if isinstance(output, tuple) else put

    handle = decoder.layers[layer].register_forward_hook(hook)
    logits = decoder.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return seen[0], logits


def value(logits: torch.Tensor, ids: list[int], answer: int, log: bool) -> torch.Tensor:
    """The target, one gold token at a time."""
    logp = logits.log_softmax(dim=-1)
    gold = [logp[len(ids) - 1 - k, ids[len(ids) - k]] for k in range(1, answer + 1)]
    return torch.stack(gold).mean() if log else sum(g.exp() for g in gold)  # type: ignore[return-value]


def brute_force(
    decoder: Decoder, ids: list[int], answer: int, points: list[float], baseline: str = "tokens", log: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The map and f(x) - f(b), a point at a time through the whole model."""
    rows, changes = [], []
    for layer in range(len(decoder)):
        x, _ = with_output(decoder, ids, layer, None)
        if baseline == "tokens":
            b = x.mean(dim=-2, keepdim=True).expand_as(x)
        elif baseline == "features":
            b = x.mean(dim=-1, keepdim=True).expand_as(x)
        else:
            b = torch.zeros_like(x)
        total = torch.zeros_like(x)
        for r in points:
            put = (b + r * (x - b)).requires_grad_()
            total += torch.autograd.grad(value(with_output(decoder, ids, layer, put)[1], ids, answer, log), put)[0]
        row = (total * (x - b) / len(points)).sum(dim=-1)
        rows.append((row.sum(dim=0) if row.dim() == 3 else row)[0].double())
        with torch.no_grad():
            ends = [value(with_output(decoder, ids, layer, put)[1], ids, answer, log) for put in (b, x)]
        changes.append(float(ends[1] - ends[0]))
    return torch.stack(rows), torch.tensor(changes).double()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())) and (a - b).norm() <= 1e-3 * b.norm())


@pytest.mark.parametrize("target", ["sum", "mean-log"])
@pytest.mark.parametrize("baseline", ["tokens", "features", "zero"])
@pytest.mark.parametrize("rule", ["midpoint", "left"])
def test_a_llama_is_as_by_hooks(decoder: Decoder, target: str, baseline: str, rule: str) -> None:
    found = integrated_gradients(decoder, IDS, 3, baseline=baseline, target=target, rule=rule, steps=5, block=2)
    points = [(i + (0.5 if rule == "midpoint" else 0)) / 5 for i in range(5)]
    map_LT, change_L = brute_force(decoder, IDS, 3, points, baseline, target == "mean-log")
    assert found.map_LT.shape == (5, 7) and close(found.map_LT, map_LT)
    assert close(found.change_L, change_L)
    assert torch.allclose(found.error_L, map_LT.sum(dim=1) - change_L, atol=1e-5 * max(1, float(map_LT.abs().max())))
    logits = with_output(decoder, IDS, 0, None)[1].detach()
    assert abs(found.whole - float(value(logits, IDS, 3, target == "mean-log"))) < 1e-5
    assert found.applications == 5 + 7 * (4 + 3 + 2 + 1) and found.naive == 5 + 7 * 25


@pytest.mark.parametrize("name", NAMES)
def test_families(name: str, built: Callable[[str], Decoder]) -> None:
    decoder = built(name)
    found = integrated_gradients(decoder, IDS[:6], 2, target="mean-log", steps=2)
    map_LT, change_L = brute_force(decoder, IDS[:6], 2, [0.25, 0.75], "tokens", True)
    assert close(found.map_LT, map_LT) and close(found.change_L, change_L)


@pytest.mark.parametrize("name", ["RWKV", "GLM-5"])
def test_a_family_that_hands_on_more_is_refused(name: str, built: Callable[[str], Decoder]) -> None:
    with pytest.raises(Refused, match="does more between its layers|no stack"):
        integrated_gradients(built(name), IDS, 1)


def test_completeness(decoder: Decoder) -> None:
    """Midpoints: the error falls with the square of the steps; the left rule: with the steps, and it is larger."""
    size = {}
    for rule, steps in (("midpoint", 32), ("midpoint", 128), ("left", 32), ("left", 128)):
        found = integrated_gradients(decoder, IDS, 2, target="mean-log", rule=rule, steps=steps, block=32)
        size[rule, steps] = float(found.error_L.abs().max())
    assert found.change_L.abs().max() > 0.1
    assert size["midpoint", 128] < 1e-3 and size["midpoint", 128] < size["midpoint", 32] / 8
    assert 2.5 < size["left", 32] / size["left", 128] < 6
    assert size["left", 128] > 4 * size["midpoint", 128]


def test_what_is_not_complete_is_reported_by_layer(decoder: Decoder) -> None:
    """The tolerance is a share of the larger of the target's two ends."""
    asked: dict[str, Any] = {"target": "mean-log", "baseline": "zero", "rule": "left", "steps": 2}
    rough = integrated_gradients(decoder, IDS, 2, **asked)
    ends_L2 = torch.stack([torch.full_like(rough.change_L, rough.whole), rough.whole - rough.change_L], dim=1)
    share_L = rough.error_L.abs() / ends_L2.abs().amax(dim=1)
    limit = float(share_L.median()) * 1.001
    found = integrated_gradients(decoder, IDS, 2, tolerance=limit, **asked)
    assert found.tolerance == limit and found.complete_L.tolist() == [share <= limit for share in share_L.tolist()]
    assert int(found.complete_L.sum()) == 3
    assert integrated_gradients(decoder, IDS, 2, target="mean-log", steps=64).complete_L.all()


def test_a_linear_tail_is_exact_with_one_step(own_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identity layers, no norm, and the logits themselves as target: one midpoint, or one left end, gives all."""
    live = load_model(own_llama, device="cpu", dtype="float32")
    with torch.no_grad():
        for layer in live.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    live.model.norm = torch.nn.Identity()
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda self, dim: self)
    for rule in ("midpoint", "left"):
        found = integrated_gradients(view_decoder(live), IDS, 2, target="mean-log", rule=rule, steps=1)
        assert (found.error_L[1:].abs() < 1e-5).all() and (found.change_L[1:].abs() > 1e-3).all()
        assert found.error_L[0].abs() > 1e-4  # layer 1 is not linear
        assert (found.map_LT[1:, :4] == 0).all()  # nothing but the predicting tokens reaches the answer
        assert torch.allclose(found.map_LT[1:], found.map_LT[1].expand(4, -1), atol=1e-6)


def test_blocks_and_the_last_token(decoder: Decoder) -> None:
    """The result does not hang on the size of a block, which is all the rows that the model ever sees; and layers before the
    one in question are not run."""
    rows: list[int] = []
    first: list[int] = []
    hooks = [
        decoder.layers[layer].self_attn.register_forward_pre_hook(
            lambda m, a, k, seen=seen: seen.append(len(k["hidden_states"])), with_kwargs=True
        )
        for layer, seen in ((0, first), (4, rows))
    ]
    one = integrated_gradients(decoder, IDS, 2, steps=10, block=10)
    rows.clear()
    first.clear()
    many = integrated_gradients(decoder, IDS, 2, steps=10, block=3)
    for hook in hooks:
        hook.remove()
    assert sum(first) < 20 < 4 * (10 + 2) <= sum(rows)
    assert max(rows) == 3 and torch.allclose(one.map_LT, many.map_LT, atol=1e-7) and one.map_LT.abs().max() > 1e-4
    assert (one.map_LT[:, -1] == 0).all() and (one.map_LT[:-1, :-1] != 0).all()
    assert (one.map_LT[-1, :4] == 0).all()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored(decoder: Decoder, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = dict(decoder.model.named_parameters())
    parameters["model.norm.weight"].requires_grad_(False)
    asked: list[bool] = []

    def watched(*args: Any) -> Any:
        asked.extend(parameter.requires_grad for parameter in parameters.values())
        if fails:
            raise ZeroDivisionError
        return original(*args)

    original = gradients._Rest.__call__
    monkeypatch.setattr(gradients._Rest, "__call__", watched)
    if fails:
        with pytest.raises(ZeroDivisionError):
            integrated_gradients(decoder, IDS, 2, steps=2)
    else:
        integrated_gradients(decoder, IDS, 2, steps=2)
    assert asked and not any(asked)
    assert {name for name, parameter in parameters.items() if not parameter.requires_grad} == {"model.norm.weight"}
    assert all(parameter.grad is None for parameter in parameters.values())
    assert not any("forward" in layer.__dict__ for layer in decoder.layers)


def test_what_cannot_be_measured_is_refused(decoder: Decoder, own_llama: Path) -> None:
    for name, text in (("baseline", "mean"), ("target", "log"), ("rule", "right")):
        with pytest.raises(UsageError, match=f"the {name} '{text}' is none of"):
            integrated_gradients(decoder, IDS, 2, **{name: text})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0 steps in blocks of 16: both must be at least 1"):
        integrated_gradients(decoder, IDS, 2, steps=0)
    with pytest.raises(UsageError, match="an answer of 7 tokens in a prompt of 7"):
        integrated_gradients(decoder, IDS, 7)
    live = load_model(own_llama, device="cpu", dtype="float32")
    with torch.no_grad():
        live.model.embed_tokens.weight[33] = torch.nan
    with pytest.raises(Refused, match="gradients at the output of layer 0 are not numbers"):
        integrated_gradients(view_decoder(live), IDS, 2, steps=2)


def test_pieces_are_halved_until_they_add_up(decoder: Decoder) -> None:
    fine = integrated_gradients(decoder, IDS, 3, target="mean-log", steps=512, block=64)
    asked: dict[str, Any] = {"target": "mean-log", "rule": "adaptive", "steps": 2, "tolerance": 1e-4}
    found = integrated_gradients(decoder, IDS, 3, **asked)
    assert found.complete_L.all() and bool((found.points_L > 2).any())
    assert (found.map_LT - fine.map_LT).abs().max() < 5e-3 * fine.map_LT.abs().max()
    assert torch.allclose(found.change_L, fine.change_L, atol=1e-5) and found.whole == pytest.approx(fine.whole, abs=1e-5)
    passes_L = found.points_L + 3  # and the three ends of two pieces
    assert found.applications == 5 + int((passes_L * torch.tensor([4, 3, 2, 1, 0])).sum())
    stopped = integrated_gradients(decoder, IDS, 3, **{**asked, "tolerance": 1e-9, "most": 7})
    assert stopped.points_L.max() <= 7 and not stopped.complete_L.all()


def test_a_layer_that_is_not_complete_is_refused_before_the_next_one_is_taken(decoder: Decoder) -> None:
    asked: dict[str, Any] = {"target": "mean-log", "rule": "adaptive", "steps": 2, "tolerance": 1e-5, "most": 40}
    rough = integrated_gradients(decoder, IDS, 3, **asked)
    assert not rough.complete_L.all() and rough.complete_L.any()
    bad = int((~rough.complete_L).nonzero()[0])
    done: list[int] = []
    with pytest.raises(Refused, match=rf"of layer {bad} do not add up: with {int(rough.points_L[bad])} points"):
        integrated_gradients(decoder, IDS, 3, only_complete=True, progress=done.append, **asked)
    assert sum(done) == bad < len(decoder) - 1
    assert not any("forward" in layer.__dict__ for layer in decoder.layers)
    kind = {**asked, "tolerance": 0.1}
    assert torch.equal(
        integrated_gradients(decoder, IDS, 3, only_complete=True, **kind).map_LT,
        integrated_gradients(decoder, IDS, 3, **kind).map_LT,
    )


def test_a_spike_on_the_path_takes_few_points() -> None:
    """arctan((r - 0.3) / w) turns within w: pieces find it, as many even points do not."""

    class Spiked:
        points = 0
        width = 1e-4

        def values(self, r_S: torch.Tensor) -> torch.Tensor:
            return torch.arctan((r_S - 0.3) / self.width)

        def gradients(self, r_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.points += len(r_S)
            slope_S = self.width / (self.width**2 + (r_S - 0.3) ** 2)
            return torch.stack([slope_S, torch.zeros_like(slope_S)], dim=1), self.values(r_S)

    path: Any = Spiked()
    found_T, ends_2 = _in_pieces(path, 8, 2048, 1e-3)
    truth = float(ends_2[1] - ends_2[0])
    assert found_T[0] == pytest.approx(truth, abs=1e-3 * 1.6) and found_T[1] == 0 and path.points < 600
    even_S = (torch.arange(path.points, dtype=torch.float64) + 0.5) / path.points
    assert abs(float(path.gradients(even_S)[0][:, 0].mean()) - truth) > 0.1
