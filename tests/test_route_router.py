"""Routers: their windows, their dial, their loss and their files, against formulas written out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from layerprune.model.errors import Refused, UsageError
from layerprune.route.loss import class_weights, focal_loss
from layerprune.route.router import Routers, choose, parameter_count, parse_dial, pool_windows, turn_dial
from layerprune.route.router_file import load_routers, save_routers

torch.set_num_threads(1)


def plain_router(routers: Routers, layer: int) -> nn.Sequential:
    """The network of one layer as it is written in the paper."""
    made = nn.Sequential(nn.Linear(routers.width, 128), nn.GELU(approximate="tanh"), nn.Linear(128, 3))
    first, _, last = made
    for linear, weight, bias in ((first, routers.up_LHD, routers.up_bias_LH), (last, routers.down_LCH, routers.down_bias_LC)):
        linear.weight.data, linear.bias.data = weight[layer].data, bias[layer].data
    return made


def random_routers(layers: int, width: int) -> Routers:
    routers = Routers(layers, width, seed=3)
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return routers


@pytest.mark.parametrize(("layers", "width"), [(1, 1), (5, 64), (28, 96)])
def test_the_number_of_parameters(layers: int, width: int) -> None:
    routers = Routers(layers, width)
    assert sum(p.numel() for p in routers.parameters()) == layers * (128 * width + 128 + 387) == parameter_count(layers, width)
    assert sum(p.numel() for p in routers.parameters()) == layers * sum(p.numel() for p in plain_router(routers, 0).parameters())


def test_the_published_sizes() -> None:
    assert parameter_count(28, 3072) == 11_024_468
    assert parameter_count(32, 4096) == 16_793_696


def test_the_start_is_xavier_uniform_with_zero_biases_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    routers = Routers(4, 200, seed=1)
    assert torch.equal(torch.rand(3), expected)
    for weight, bias, fans in (
        (routers.up_LHD, routers.up_bias_LH, 328), (routers.down_LCH, routers.down_bias_LC, 131),
    ):  # fmt: skip
        bound = math.sqrt(6 / fans)
        for one in weight:
            assert bound * 0.9 < float(one.detach().abs().max()) <= bound
        assert not bool(bias.any())
    assert torch.equal(Routers(4, 200, seed=1).up_LHD, routers.up_LHD)
    assert not torch.equal(Routers(4, 200, seed=2).up_LHD, routers.up_LHD)


@torch.no_grad()
def test_logits_are_the_mean_of_the_windows_logits() -> None:
    routers = random_routers(3, 16)
    pooled_BLWD = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    real_BW = torch.arange(8) < torch.tensor([[8], [3]])
    found_BLC = routers(pooled_BLWD, real_BW)
    for row, windows in ((0, 8), (1, 3)):
        for layer in range(3):
            router = plain_router(routers, layer)
            expected_C = torch.stack([router(pooled_BLWD[row, layer, w]) for w in range(windows)]).mean(0)
            torch.testing.assert_close(found_BLC[row, layer], expected_C)
            torch.testing.assert_close(routers.one_layer(layer, pooled_BLWD[:, layer], real_BW)[row], expected_C)
    with pytest.raises(UsageError, match="a state of 8 features was given to routers of 16"):
        routers.one_layer(0, torch.zeros(1, 8, 8), torch.ones(1, 8, dtype=torch.bool))


@pytest.mark.parametrize("side", ["left", "right"])
def test_windows_are_of_real_tokens_alone(side: str) -> None:
    lengths = [1, 3, 7, 8, 9, 15, 16, 19, 30]
    hidden_BTD = torch.randn(len(lengths), 30, 5, generator=torch.Generator().manual_seed(0))
    mask_BT = torch.arange(30)[None] < torch.tensor(lengths)[:, None]
    if side == "left":
        mask_BT = mask_BT.flip(1)
    hidden_BTD[~mask_BT] = torch.nan
    pooled_BWD, real_BW = pool_windows(hidden_BTD, mask_BT.long())
    for row, length in enumerate(lengths):
        states_TD = hidden_BTD[row][mask_BT[row]]
        windows = min(8, length)
        size = length // windows
        expected_WD = torch.stack([states_TD[w * size : (w + 1) * size].mean(0) for w in range(windows)])
        assert real_BW[row].tolist() == [w < windows for w in range(8)]
        torch.testing.assert_close(pooled_BWD[row, :windows], expected_WD)
    assert bool(pooled_BWD.isfinite().all())


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="without a token"):
        pool_windows(torch.zeros(2, 3, 4), torch.tensor([[1, 0, 0], [0, 0, 0]]))


OWN = torch.tensor([0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    ("dial", "expected"),
    [
        (-1.0, [1.0, 0.0, 0.0]),
        (-0.75, [0.75, 0.15, 0.1]),
        (-0.5, [0.5, 0.3, 0.2]),
        (0.0, [0.25, 0.65, 0.1]),
        (0.25, [0.125, 0.825, 0.05]),
        (0.5, [0.0, 1.0, 0.0]),
        (0.75, [0.0, 0.5, 0.5]),
        (1.0, [0.0, 0.0, 1.0]),
    ],
)
def test_the_dial(dial: float, expected: list[float]) -> None:
    logits = OWN.log().expand(2, 4, 3) + 7.0
    torch.testing.assert_close(turn_dial(logits, dial), torch.tensor(expected).expand(2, 4, 3))


def test_the_dials_names_and_limits() -> None:
    assert (parse_dial("router"), parse_dial("execute"), parse_dial("-0.2"), parse_dial(1)) == (-0.5, 0.5, -0.2, 1.0)
    for wrong in ("skip", "", "nan", 1.1, -2, math.inf):
        with pytest.raises(UsageError, match=f"the dial {wrong} is none of `router`"):
            parse_dial(wrong)


def test_the_choice_is_the_most_probable_action() -> None:
    assert choose(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.2, 0.6, 0.2]])) == (0, 2, 1)
    assert choose(turn_dial(torch.randn(6, 3), 0.5)) == (1,) * 6
    assert choose(turn_dial(torch.randn(6, 3), 1.0)) == (2,) * 6


def test_a_choice_is_never_empty() -> None:
    assert choose(torch.tensor([[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4]])) == (0, 1, 0)


def test_the_class_weights_of_the_papers_counts() -> None:
    """They are almost flat: at these counts only the rarest class is lifted at all."""
    alpha_C = class_weights((4399, 120956, 1457))
    assert [round(a, 3) for a in alpha_C.tolist()] == [0.916, 0.905, 1.179]
    assert float(alpha_C.sum()) == pytest.approx(3)


def test_class_weights_by_hand() -> None:
    raw = [0.5 / (1 - 0.5**n) for n in (1, 2, 3)]
    assert class_weights((1, 2, 3), beta=0.5).tolist() == pytest.approx([3 * r / sum(raw) for r in raw])
    assert class_weights((10, 10, 10)).tolist() == pytest.approx([1, 1, 1])


def test_a_class_without_examples_takes_no_weight() -> None:
    assert class_weights((0, 5, 5)).tolist() == pytest.approx([0, 1.5, 1.5])
    assert bool(class_weights((0, 5, 0)).isfinite().all())


def test_the_focal_loss_by_hand() -> None:
    probability = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]])
    labels = torch.tensor([[0, 2]])
    alpha_C = torch.tensor([0.5, 1.0, 1.5])
    expected = (0.5 * 0.3**2 * -math.log(0.7) + 1.5 * 0.7**2 * -math.log(0.3)) / 2
    assert float(focal_loss(probability.log(), labels, alpha_C)) == pytest.approx(expected, rel=1e-5)


def test_the_focal_loss_is_the_cross_entropy_without_its_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 6, 3, generator=generator), torch.randint(0, 3, (4, 6), generator=generator)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(focal_loss(logits, labels, torch.ones(3), gamma=0.0), expected)


def test_certain_and_right_costs_nothing_and_has_a_gradient_that_is_a_number() -> None:
    logits = torch.tensor([[0.0, 200.0, 0.0], [-200.0, 0.0, 0.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([1, 0]), torch.ones(3))
    loss.backward()
    assert float(loss.detach()) == pytest.approx((200 + math.log(2)) / 2, rel=1e-4)
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def test_routers_come_back_as_they_were(tiny_llama: Path, tmp_path: Path) -> None:
    routers = random_routers(5, 64)
    save_routers(routers, tiny_llama, tmp_path / "made" / "routers", {"items": 7})
    found = load_routers(tmp_path / "made" / "routers", tiny_llama)
    assert {n: t.tolist() for n, t in found.state_dict().items()} == {n: t.tolist() for n, t in routers.state_dict().items()}
    assert not found.training
    config = json.loads((tmp_path / "made/routers/routers.json").read_text())
    assert (config["layers"], config["width"], config["about"], config["base"]) == (5, 64, {"items": 7}, "tiny")
    assert sorted(p.name for p in (tmp_path / "made").rglob("*")) == ["routers", "routers.json", "routers.safetensors"]
    with pytest.raises(UsageError, match="exists already and is left as it is"):
        save_routers(routers, tiny_llama, tmp_path / "made" / "routers")


def test_a_failed_write_leaves_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise KeyError

    monkeypatch.setattr("layerprune.route.router_file.write_json", failing)
    with pytest.raises(KeyError):
        save_routers(Routers(5, 64), tiny_llama, tmp_path / "routers")
    assert not list(tmp_path.iterdir())


def test_routers_of_another_checkpoint_are_refused(tiny_llama: Path, own_llama: Path, tmp_path: Path) -> None:
    save_routers(Routers(5, 64), tiny_llama, tmp_path / "routers")
    load_routers(tmp_path / "routers", own_llama)  # the same checkpoint in another place
    weights = load_file(own_llama / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] += 1e-3
    save_file(weights, own_llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"were trained for another checkpoint \(tiny\), not for .*model"):
        load_routers(tmp_path / "routers", own_llama)


def test_broken_routers_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "routers"
    with pytest.raises(Refused, match="routers.json does not exist"):
        load_routers(folder, tiny_llama)
    save_routers(Routers(5, 64), tiny_llama, folder)
    config, weights = json.loads((folder / "routers.json").read_text()), load_file(folder / "routers.safetensors")

    def refused(match: str, changes: dict[str, Any], tensors: dict[str, torch.Tensor] | None) -> None:
        (folder / "routers.json").write_text(json.dumps(config | changes))
        (folder / "routers.safetensors").unlink(missing_ok=True)
        if tensors is not None:
            save_file(tensors, folder / "routers.safetensors")
        with pytest.raises(Refused, match=match):
            load_routers(folder, tiny_llama)

    refused("does not describe routers as they are read here", {"windows": 4}, weights)
    refused("says layers 0: it must be a whole number", {"layers": 0}, weights)
    refused("are not those of 6 routers of 64 features", {"layers": 6}, weights)
    refused("are not those of 5 routers", {}, {k: v for k, v in weights.items() if k != "up_bias_LH"})
    refused("are not finite numbers", {}, weights | {"up_bias_LH": torch.full((5, 128), torch.nan)})
    refused("routers.safetensors does not exist", {}, None)
    (folder / "routers.safetensors").write_bytes(b"no tensors")
    with pytest.raises(Refused, match="cannot be read as safetensors"):
        load_routers(folder, tiny_llama)
