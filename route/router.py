"""The routers: one small network a layer that decides whether it is skipped, executed or repeated (arXiv 2510.12773, section 3.1).

Linear(d, 128), GELU, Linear(128, 3), with biases and without norm. A router reads the state that enters its layer along the
path so far, averaged over 8 windows of the prompt; the windows' logits are averaged. It runs once a prompt.

Shapes: B rows, T tokens, L layers, W windows, D features, H the hidden width, C = 3 classes.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from layerprune.model.errors import UsageError
from layerprune.route.paths import ACTIONS, EXECUTE, REPEAT, SKIP, Counts

HIDDEN, WINDOWS, CLASSES = 128, 8, len(ACTIONS)
DIALS = {"router": -0.5, "execute": 0.5}
"""The dial's settings that have a name: the routers' own choice, and every layer executed once."""


class Routers(nn.Module):
    """The routers of all L layers, their weights stacked. Float32.

    width: D, features of the states (all streams of a model that carries several). Weights are Xavier-uniform from `seed`,
    layer by layer, biases zero; the caller's random numbers are not moved. L (128 D + 128 + 387) parameters.
    """

    def __init__(self, layers: int, width: int, seed: int = 0) -> None:
        super().__init__()
        self.layers, self.width = layers, width
        self.up_LHD = nn.Parameter(torch.empty(layers, HIDDEN, width))
        self.up_bias_LH = nn.Parameter(torch.zeros(layers, HIDDEN))
        self.down_LCH = nn.Parameter(torch.empty(layers, CLASSES, HIDDEN))
        self.down_bias_LC = nn.Parameter(torch.zeros(layers, CLASSES))
        generator = torch.Generator().manual_seed(seed)
        for layer in range(layers):
            nn.init.xavier_uniform_(self.up_LHD.data[layer], generator=generator)
            nn.init.xavier_uniform_(self.down_LCH.data[layer], generator=generator)

    def forward(self, pooled_BLWD: torch.Tensor, real_BW: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, C) of all layers, from `pool_windows` of the states that enter them."""
        up_LHD, down_LCH = self.up_LHD, self.down_LCH
        hidden_BLWH = torch.einsum("blwd,lhd->blwh", pooled_BLWD.to(up_LHD.dtype), up_LHD) + self.up_bias_LH[:, None]
        hidden_BLWH = nn.functional.gelu(hidden_BLWH, approximate="tanh")
        logits_BLWC = torch.einsum("blwh,lch->blwc", hidden_BLWH, down_LCH) + self.down_bias_LC[:, None]
        share_BW = real_BW / real_BW.sum(dim=1, keepdim=True)
        return torch.einsum("blwc,bw->blc", logits_BLWC, share_BW.to(logits_BLWC.dtype))

    def one_layer(self, layer: int, pooled_BWD: torch.Tensor, real_BW: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of one layer. Raises UsageError for states of another width."""
        if pooled_BWD.shape[-1] != self.width:
            raise UsageError(f"a state of {pooled_BWD.shape[-1]} features was given to routers of {self.width} features")
        hidden_BWH = nn.functional.linear(pooled_BWD.to(self.up_LHD.dtype), self.up_LHD[layer], self.up_bias_LH[layer])
        hidden_BWH = nn.functional.gelu(hidden_BWH, approximate="tanh")
        logits_BWC = nn.functional.linear(hidden_BWH, self.down_LCH[layer], self.down_bias_LC[layer])
        share_BW = real_BW / real_BW.sum(dim=1, keepdim=True)
        return torch.einsum("bwc,bw->bc", logits_BWC, share_BW.to(logits_BWC.dtype))


def parameter_count(layers: int, width: int) -> int:
    """The parameters of L routers of width D."""
    return layers * (HIDDEN * width + HIDDEN + HIDDEN * CLASSES + CLASSES)


class Windows:
    """The 8 windows of each row's real tokens, over which states are averaged. real_BW: which of them a row has.

    mask_BT: 1 on the real tokens of the prompt, 0 on padding (on either side) and on what follows the prompt. A row of T real
    tokens has W = min(8, T) windows of T // W tokens each; the tokens after the last window do not count. Raises UsageError
    for a row without a real token.
    """

    def __init__(self, mask_BT: torch.Tensor) -> None:
        mask_BT = mask_BT.bool()
        count_B1 = mask_BT.sum(dim=1, keepdim=True)
        if not bool((count_B1 > 0).all()):
            raise UsageError("a prompt without a token cannot be routed")
        windows_B1 = count_B1.clamp(max=WINDOWS)
        self._size_B1 = count_B1 // windows_B1
        rank_BT = mask_BT.cumsum(dim=1) - 1
        window_BT = torch.where(mask_BT & (rank_BT < windows_B1 * self._size_B1), rank_BT // self._size_B1, WINDOWS)
        self._member_BWT = (window_BT[:, None] == torch.arange(WINDOWS, device=mask_BT.device)[None, :, None]).float()
        self._unreal_BT1 = None if bool(mask_BT.all()) else ~mask_BT[..., None]
        self.real_BW = torch.arange(WINDOWS, device=mask_BT.device)[None] < windows_B1

    def pool(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The means (B, 8, D) of the windows, in float32."""
        if self._member_BWT.device != hidden_BTD.device:
            self._to(hidden_BTD.device)
        clean_BTD = hidden_BTD.float()
        if self._unreal_BT1 is not None:
            # what a model computes at padding may be no number, and would spoil sums even at weight zero
            clean_BTD = clean_BTD.masked_fill(self._unreal_BT1, 0.0)
        return (self._member_BWT @ clean_BTD) / self._size_B1[..., None]

    def _to(self, device: torch.device) -> None:
        self._size_B1, self._member_BWT, self.real_BW = (
            tensor.to(device) for tensor in (self._size_B1, self._member_BWT, self.real_BW)
        )
        self._unreal_BT1 = None if self._unreal_BT1 is None else self._unreal_BT1.to(device)


def pool_windows(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The means (B, 8, D) of each row's `Windows`, and which of the 8 a row has (B, 8)."""
    windows = Windows(mask_BT)
    return windows.pool(hidden_BTD), windows.real_BW


def parse_dial(dial: str | float) -> float:
    """The dial as a number from -1 to 1, from a number or from `router` or `execute`. Raises UsageError for all else."""
    try:
        value = DIALS[dial] if isinstance(dial, str) and dial in DIALS else float(dial)
    except ValueError:
        value = math.nan
    if not -1 <= value <= 1:
        raise UsageError(
            f"the dial {dial} is none of `router` (the routers' own choice), `execute` (every layer once), or a number from -1 "
            "(skip) to 1 (repeat)"
        )
    return value


def turn_dial(logits: torch.Tensor, dial: float) -> torch.Tensor:
    """Probabilities (..., C) of skip, execute, repeat after the dial (arXiv 2510.12773, appendix C).

    From -1 to -0.5 a linear mix from always skip to the routers' own softmax; from -0.5 to 0.5 on to always execute; from
    0.5 to 1 on to always repeat. So -0.5, not 0, is the routers' own choice, and from 0.5 on no router is heard. At 0 half
    the weight is "execute": a router must be certain by more than one half to act.
    """
    own = logits.float().softmax(dim=-1)
    skip, execute, repeat = torch.eye(CLASSES, device=own.device)[[SKIP, EXECUTE, REPEAT]]
    if dial <= -0.5:
        return torch.lerp(skip.expand_as(own), own, (dial + 1) / 0.5)
    if dial <= 0.5:
        return torch.lerp(own, execute.expand_as(own), dial + 0.5)
    return torch.lerp(execute, repeat, (dial - 0.5) / 0.5).expand_as(own)


def choose(probability_LC: torch.Tensor) -> Counts:
    """The most probable action of each layer, the smaller count on ties.

    Where that skips every layer, the one most probably executed is executed after all: a path is never empty.
    """
    counts = probability_LC.argmax(dim=-1).tolist()
    if not any(counts):
        counts[int(probability_LC[:, EXECUTE].argmax())] = EXECUTE
    return tuple(counts)
