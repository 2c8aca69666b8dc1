"""A tuned lens and its files: one affine map a layer (arXiv 2303.08112)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerprune.model.config import vocab_size
from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused, UsageError, one_line
from layerprune.model.files import new_folder, no_space_refusal, read_json, write_json

TAPS = ("input", "output")
WEIGHTS, CONFIG, LIBRARY_WEIGHTS = "lens.safetensors", "config.json", "params.pt"
KIND, LIBRARY_KIND = "layerprune_tuned_lens", "linear_tuned_lens"
_MOST = 1 << 20


class TunedLens(nn.Module):
    """For each layer l = 0..L-1 an affine map A_l(h) = h + (W_l h + b_l), after which the model's own end is read.

    tap: which state the map of index l takes. "input", as in the tuned-lens library: x^(l), the *input* of layer l, so index 0
    is the embedding and x^(L) has no map. "output": the output of layer l, x^(l+1), as published scripts that hook layers
    have it; a lens read at the other tap is off by one layer. Zero-initialised: a new lens is the logit lens. Float32.
    layers, width: L and D of the model. vocabulary: V, None where a file does not say it. model: the model's name.
    Raises UsageError for another tap.
    """

    def __init__(
        self, layers: int, width: int, *, vocabulary: int | None = None, model: str = "", tap: str = "input", device: Any = None
    ) -> None:
        super().__init__()
        if tap not in TAPS:
            raise UsageError(f"tap {tap!r} is neither 'input' (of a layer) nor 'output'")
        self.layers, self.width, self.vocabulary, self.model, self.tap = layers, width, vocabulary, model, tap
        # not initialised at random: that would move the caller's random numbers
        made = (nn.utils.skip_init(nn.Linear, width, width, device=device or "cpu", dtype=torch.float32) for _ in range(layers))
        self.translators = nn.ModuleList(made)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """A_l(h), a state before the final norm, of h (..., D) at this lens's tap of layer l; in the dtype of h.

        Raises UsageError for a layer or a width that the lens does not have.
        """
        if not 0 <= layer < self.layers:
            raise UsageError(f"layer {layer} is none of this lens: it has the layers 0 to {self.layers - 1}")
        if hidden.shape[-1] != self.width:
            raise UsageError(f"a state of {hidden.shape[-1]} features was given to a lens of {self.width} features")
        translator = self.translators[layer]
        # in the state's dtype, as under the library's autocast: the residual part keeps the state's own precision
        return hidden + nn.functional.linear(hidden, translator.weight.to(hidden), translator.bias.to(hidden))

    def state(self, layer: int) -> int:
        """The l of the x^(l) that the map of `layer` takes."""
        return layer + (self.tap == "output")

    def must_fit(self, decoder: Decoder, width: int) -> None:
        """Raise UsageError where this lens has another shape than the decoder, whose states have `width` features."""
        theirs = {"layers": len(decoder), "features": width, "tokens in the vocabulary": vocab_size(decoder.model.config)}
        ours = {"layers": self.layers, "features": self.width, "tokens in the vocabulary": self.vocabulary}
        for what, count in theirs.items():
            if ours[what] not in (count, None):
                of = f" (made for {self.model})" if self.model else ""
                raise UsageError(f"this lens{of} is for a model of {ours[what]} {what}; this one has {count}: train one for it")


def save_lens(lens: TunedLens, folder: str | Path) -> None:
    """Write config.json and lens.safetensors (`0.weight` (D, D), `0.bias` (D,), ..., float32) into a new folder.

    Raises UsageError where the folder holds something, Refused where it cannot be written.
    """
    config = {
        "lens_type": KIND, "model": lens.model, "layers": lens.layers, "width": lens.width, "vocabulary": lens.vocabulary,
        "tap": lens.tap,
    }  # fmt: skip
    with new_folder(Path(folder)) as temporary:
        write_json(temporary / CONFIG, config)
        write_tensors(temporary / WEIGHTS, _tensors(lens), {"format": "pt"})


def save_library_lens(lens: TunedLens, folder: str | Path, revision: str | None = None) -> None:
    """Write the lens as the tuned-lens library (0.2) reads it: config.json and params.pt, into a new folder.

    revision: of the model on the Hub. The hash of the unembedding is left out, so the library does not compare it. Raises
    UsageError for a lens of tap "output", which that format cannot say, and where the folder holds something.
    """
    if lens.tap != "input":
        raise UsageError("a lens of tap 'output' cannot be written for the tuned-lens library, whose map l takes layer l's input")
    config = {
        "base_model_name_or_path": lens.model, "d_model": lens.width, "num_hidden_layers": lens.layers, "bias": True,
        "base_model_revision": revision, "unembed_hash": None, "lens_type": LIBRARY_KIND,
    }  # fmt: skip
    with new_folder(Path(folder)) as temporary:
        write_json(temporary / CONFIG, config)
        torch.save(_tensors(lens), temporary / LIBRARY_WEIGHTS)


def load_lens(folder: str | Path) -> TunedLens:
    """A lens from a folder that `save_lens` or the tuned-lens library wrote, on the CPU, in float32.

    Nothing in the files is executed. Raises Refused for a folder that is neither, and for tensors that are missing, too many,
    of a wrong shape or not finite.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    kind = config.get("lens_type") if isinstance(config, dict) else None
    if kind == KIND:
        layers, width = _count(config, "layers", folder), _count(config, "width", folder)
        vocabulary = None if config.get("vocabulary") is None else _count(config, "vocabulary", folder)
        model, tap, bias, found = config.get("model"), config.get("tap"), True, _read_safetensors(folder / WEIGHTS)
    elif kind == LIBRARY_KIND:
        layers, width = _count(config, "num_hidden_layers", folder), _count(config, "d_model", folder)
        vocabulary, model, tap = None, config.get("base_model_name_or_path"), "input"
        bias, found = config.get("bias", True) is not False, _read_pickle(folder / LIBRARY_WEIGHTS)
    else:
        raise Refused(f"{folder / CONFIG} says lens_type {kind!r}: only {KIND} and {LIBRARY_KIND} can be read")
    if tap not in TAPS or not isinstance(model, str):
        raise Refused(f"{folder / CONFIG} does not name the model and the tap ('input' or 'output') of its lens")
    expected: dict[str, tuple[int, ...]] = {f"{i}.weight": (width, width) for i in range(layers)}
    expected |= {f"{i}.bias": (width,) for i in range(layers)} if bias else {}
    _must_hold(folder, expected, found)
    lens = TunedLens(layers, width, vocabulary=vocabulary, model=model, tap=tap)
    with torch.no_grad():
        for name, tensor in found.items():
            layer, part = name.split(".")
            getattr(lens.translators[int(layer)], part).copy_(tensor)
    return lens


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Replace a safetensors file in one step (temporary sibling, fsync, rename)."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with no_space_refusal(path):
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata=metadata)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _tensors(lens: TunedLens) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in lens.translators.state_dict().items()}


def _count(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= _MOST:
        raise Refused(f"{folder / CONFIG} says {key} {value!r}: it must be a whole number from 1 to {_MOST}")
    return value


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise Refused(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise Refused(f"{path} cannot be read as safetensors: {one_line(error)}") from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Refused(f"{path} does not exist") from None
    except Exception as error:  # whatever a broken archive raises; what is no tensor is refused by the unpickler
        raise Refused(f"{path} cannot be read as tensors alone ({type(error).__name__}): it is broken, or holds code") from error


def _must_hold(folder: Path, expected: Mapping[str, tuple[int, ...]], found: Any) -> None:
    if not isinstance(found, Mapping):
        raise Refused(f"the weights in {folder} are no mapping of names to tensors")
    for name in [*expected, *map(str, found)]:
        tensor = found.get(name)
        if name not in expected or not isinstance(tensor, torch.Tensor):
            what = "too many" if name not in expected else "no tensor" if name in found else "missing"
            raise Refused(f"the weights in {folder} do not belong to its {CONFIG}: {name} is {what}")
        if tuple(tensor.shape) != expected[name] or not tensor.is_floating_point():
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            raise Refused(f"{name} in {folder} is {kind}, and {CONFIG} says that it is a float of {expected[name]}")
        if not bool(torch.isfinite(tensor).all()):
            raise Refused(f"{name} in {folder} holds values that are not finite: the lens is broken")
