"""The routers' folder: routers.safetensors, and routers.json, which says for which checkpoint they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused, one_line
from layerprune.model.files import new_folder, read_json, write_json
from layerprune.model.fingerprint import checkpoint_fingerprint
from layerprune.route.paths import ACTIONS
from layerprune.route.router import HIDDEN, WINDOWS, Routers

CONFIG, WEIGHTS = "routers.json", "routers.safetensors"
_FIXED = {"kind": "layerprune_routers", "hidden": HIDDEN, "windows": WINDOWS, "classes": list(ACTIONS)}
_MOST = 1 << 20


def save_routers(routers: Routers, base: Path, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write routers for the checkpoint in `base` into a new folder; `about` (how they were trained) goes into the config.

    Raises UsageError where the folder holds something, Refused where it cannot be written.
    """
    from safetensors.torch import save_file

    config = {
        **_FIXED, "layers": routers.layers, "width": routers.width, "base": base.resolve().name,
        "base_fingerprint": checkpoint_fingerprint(base), "about": about or {},
    }  # fmt: skip
    with new_folder(folder) as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in routers.state_dict().items()}, temporary / WEIGHTS)
        write_json(temporary / CONFIG, config)


def load_routers(folder: Path, base: Path) -> Routers:
    """The routers in a folder, on the CPU, in eval mode, for the checkpoint in `base`.

    Raises Refused for routers of another checkpoint, for a folder that holds none, and for weights that are broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or any(config.get(key) != value for key, value in _FIXED.items()):
        expected = ", ".join(f"{key} {value}" for key, value in _FIXED.items())
        raise Refused(f"{folder / CONFIG} does not describe routers as they are read here ({expected})")
    layers, width = (_count(config, key, folder) for key in ("layers", "width"))
    if config.get("base_fingerprint") != checkpoint_fingerprint(base):
        raise Refused(f"the routers in {folder} were trained for another checkpoint ({config.get('base')}), not for {base}")
    try:
        found = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise Refused(f"{folder / WEIGHTS} does not exist") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise Refused(f"{folder / WEIGHTS} cannot be read as safetensors: {one_line(error)}") from error
    if {name: tuple(t.shape) for name, t in found.items()} != _shapes(layers, width):
        raise Refused(f"the weights in {folder / WEIGHTS} are not those of {layers} routers of {width} features")
    if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in found.values()):
        raise Refused(f"the weights in {folder / WEIGHTS} are not finite numbers: the routers are broken")
    routers = Routers(layers, width)
    routers.load_state_dict(found)
    return routers.eval()


def _shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        "up_LHD": (layers, HIDDEN, width), "up_bias_LH": (layers, HIDDEN),
        "down_LCH": (layers, len(ACTIONS), HIDDEN), "down_bias_LC": (layers, len(ACTIONS)),
    }  # fmt: skip


def _count(config: dict[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= _MOST:
        raise Refused(f"{folder / CONFIG} says {key} {value!r}: it must be a whole number from 1 to {_MOST}")
    return value
