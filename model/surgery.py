"""Cut what a config says about single layers, and refuse what it could no longer say.

A config speaks of layers in lists of length L, lists of indices, counts from one end, periods, maps keyed by
index, strings with one letter a layer, and module names. `cut_config` rewrites them; `prove_config` then builds
source and result on the meta device and compares every layer that stays with the layer it came from, so that
a family nobody thought of is refused rather than wrong.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from layerprune.model.cuts import Kept
from layerprune.model.errors import Refused
from layerprune.model.plan import split_name
from layerprune.model.source import layer_count, text_config

# Lists of layer indices, in any family.
_INDEX_LISTS = {
    "mlp_only_layers", "full_attn_idxs", "moe_layers", "cross_attention_layers", "attn_layer_indices",
    "local_layer_ids", "kv_source_layers", "ple_layer_ids", "global_attn_idx", "full_attention_layers",
    "sliding_window_layers", "hybrid_layer_ids", "rope_scaling_layers", "mtp_local_layer_ids",
}  # fmt: skip
# Counts of layers from the front and from the end.
_FRONT_COUNTS = {"first_k_dense_replace", "max_window_layers", "num_dense_layers", "n_dense_first_layers", "first_num_dense_layers"}
_END_COUNTS = {"num_kv_shared_layers"}
_NOT_PER_LAYER = re.compile(r"(token_ids?|architectures|languages|_limit|labels?|dims?|sizes_2d|stop_words)$")
_COUNT_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_STRING_PATTERNS = ("hybrid_override_pattern",)
_INDEX_KEYED = ("per_layer_config", "layer_overrides", "block_configs_by_layer")
_EXTRA_LAYERS = ("num_nextn_predict_layers",)


def text_part(raw: dict[str, Any], config: Any) -> dict[str, Any]:
    """The part of a config.json that describes the decoder's layers (`raw` itself for text-only models)."""
    if text_config(config) is config:
        return raw
    for key in ("text_config", "decoder", "generator", "llm_config", "language_config"):
        if isinstance(raw.get(key), dict) and (key != "decoder" or "text_config" not in raw):
            return raw[key]
    raise Refused("the config keeps its text part under an unknown name: its per-layer entries cannot be cut")


def extra_layers(config: Any) -> int:
    """Layers stored after the last under the same prefix (multi-token prediction)."""
    inner = text_config(config)
    return max(int(getattr(inner, key, 0) or 0) for key in _EXTRA_LAYERS)


def cut_config(raw: dict[str, Any], config: Any, kept: Kept) -> dict[str, Any]:
    """A copy of config.json that describes the model with the layers `kept` only.

    raw: the parsed config.json; config: the object that transformers makes of it (its derived lists, such as
    `layer_types` from a period, are written out, so that the period no longer matters).
    Raises Refused for what a cut cannot keep.
    """
    layers = layer_count(config)
    result = copy.deepcopy(raw)
    inner = text_part(result, config)
    derived = text_config(config).to_dict()
    if derived.get("scale_attn_by_inverse_layer_idx") and kept != tuple(range(len(kept))):
        raise Refused(
            "this config scales attention by 1 / (layer index + 1) (scale_attn_by_inverse_layer_idx): layers after a "
            "cut would get another index and another scale; only a cut that reaches the last layer keeps them right"
        )
    _cut_count(inner, config, layers, len(kept))
    for key, value in derived.items():
        if key in _INDEX_LISTS:
            if isinstance(value, list):
                inner[key] = [kept.index(i) for i in value if i in kept]
        elif isinstance(value, list | tuple) and len(value) == layers and _is_per_layer(key, value):
            inner[key] = [value[i] for i in kept]
        elif key in _FRONT_COUNTS and isinstance(value, int) and not isinstance(value, bool):
            inner[key] = sum(i < value for i in kept)
        elif key in _END_COUNTS and isinstance(value, int):
            inner[key] = sum(i >= layers - value for i in kept)
        elif key in _STRING_PATTERNS and isinstance(value, str) and len(value) == layers:
            inner[key] = "".join(value[i] for i in kept)
        elif key in _INDEX_KEYED and isinstance(value, dict):
            inner[key] = {str(kept.index(int(i))): v for i, v in value.items() if int(i) in kept}
    _spell_out_sparse_step(inner, derived, layers, kept)
    _spell_out_attention_types(inner, derived, layers, kept)
    for place in {id(result): result, id(inner): inner}.values():
        if isinstance(place.get("quantization_config"), dict):
            place["quantization_config"] = _cut_names(place["quantization_config"], layers, kept)
    return result


def _cut_count(inner: dict[str, Any], config: Any, layers: int, left: int) -> None:
    names = {key for key in _COUNT_NAMES if inner.get(key) == layers}
    stated = type(text_config(config)).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for key in names or {stated}:
        inner[key] = left


def _is_per_layer(key: str, value: Any) -> bool:
    if _NOT_PER_LAYER.search(key) or key.startswith(("mtp_", "vision_", "audio_")):
        return False
    return "layer" in key or all(isinstance(v, int | float | str | bool) or v is None for v in value)


def _spell_out_sparse_step(inner: dict[str, Any], derived: dict[str, Any], layers: int, kept: Kept) -> None:
    """Qwen-MoE: layer i is sparse if (i+1) % step == 0 and not in mlp_only_layers; the step goes into the list."""
    step = derived.get("decoder_sparse_step")
    if not isinstance(step, int) or "mlp_only_layers" not in derived or step < 1:
        return
    only = set(derived["mlp_only_layers"] or [])
    dense = {i for i in range(layers) if i in only or (i + 1) % step != 0}
    inner["decoder_sparse_step"] = 1
    inner["mlp_only_layers"] = [new for new, old in enumerate(kept) if old in dense]


def _spell_out_attention_types(inner: dict[str, Any], derived: dict[str, Any], layers: int, kept: Kept) -> None:
    """GPT-Neo: attention_types is [[pattern, repeats], ...]; written out once, it needs no period."""
    kinds = derived.get("attention_layers")
    if "attention_types" in derived and isinstance(kinds, list) and len(kinds) == layers:
        inner["attention_types"] = [[[kinds[i] for i in kept], 1]]


def _cut_names(value: Any, layers: int, kept: Kept) -> Any:
    """Renumber module names such as `model.layers.7.mlp` inside a quantisation config; names of cut layers go."""
    if isinstance(value, dict):
        return {k: _cut_names(v, layers, kept) for k, v in value.items()}
    if not isinstance(value, list):
        return value
    result = []
    for item in value:
        parts = split_name(item + ".") if isinstance(item, str) else None
        parts = parts or (split_name(item) if isinstance(item, str) else None)
        if parts is None or parts[1] >= layers or not parts[0].endswith(("layers.", "h.", "blocks.")):
            result.append(item)
        elif parts[1] in kept:
            result.append(f"{parts[0]}{kept.index(parts[1])}.{parts[2]}".rstrip("."))
    return result


def prove_config(source: Any, result: Any, kept: Kept) -> None:
    """Compare a decoder of the source with one of the cut config (both may be on the meta device).

    source, result: `Decoder`s. Every kept layer must have the modules, parameter shapes and plain attributes of
    the layer it came from (its own index aside), every per-layer list of the config must be the source's cut,
    and nothing outside the stack may change its shape. Raises Refused with the first difference.
    """
    before, after = text_config(source.model.config).to_dict(), text_config(result.model.config).to_dict()
    layers = len(source)
    if len(result) != len(kept):
        raise Refused(f"the cut config makes {len(result)} layers instead of {len(kept)}")
    for new, old in enumerate(kept):
        difference = _difference(source.layers[old], result.layers[new], kept)
        if difference:
            raise Refused(
                f"this {source.model.config.model_type} config cannot say what the cut needs: old layer {old} would become "
                f"layer {new} with another {difference}; choose another block"
            )
    for key, value in before.items():
        if isinstance(value, list) and len(value) == layers and key not in _INDEX_LISTS and _is_per_layer(key, value):
            cut = [value[i] for i in kept]
            if key in after and after[key] != cut:
                raise Refused(f"the config entry {key} cannot be cut: {after[key]} is not {cut}")
    shapes = [
        {n: tuple(p.shape) for n, p in d.model.named_parameters() if not n.startswith(d.path + ".")} for d in (source, result)
    ]
    for name in shapes[0]:
        if shapes[1].get(name) != shapes[0][name]:
            raise Refused(
                f"{name} holds something for every layer ({shapes[0][name]} would have to become {shapes[1].get(name)}): "
                "cutting layers of this model means cutting inside tensors, which is not supported"
            )


_OWN_INDEX = re.compile(r"(layer_?(idx|id|index|number)|block_idx)$")


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _difference(old: Any, new: Any, kept: Kept) -> str | None:
    """The first thing in which two layers differ, other than their index; None when they are alike."""
    old_modules, new_modules = dict(old.named_modules()), dict(new.named_modules())
    if old_modules.keys() != new_modules.keys():
        return f"set of modules ({min(old_modules.keys() ^ new_modules.keys())})"
    for name, a in old_modules.items():
        b = new_modules[name]
        where = f" of {name}" if name else ""
        if type(a) is not type(b):
            return f"module class{where}: {type(a).__name__} became {type(b).__name__}"
        for key, shape in ((k, tuple(p.shape)) for k, p in a.named_parameters(recurse=False)):
            if key not in b._parameters or tuple(b._parameters[key].shape) != shape:
                return f"shape of {key}{where}"
        for key, value in vars(a).items():
            if key.startswith("_") or not _plain(value):
                continue
            other = vars(b).get(key)
            if other == value or (isinstance(value, float) and value != value):
                continue
            if "layer" in key and isinstance(value, int) and not isinstance(value, bool) and value in kept:
                if other == kept.index(value):
                    continue
            if _OWN_INDEX.search(key) and not key.startswith("kv_"):
                continue
            return f"{key}{where} ({value} became {other})"
    return None
