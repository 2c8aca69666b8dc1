"""Cut what a config says about single layers, and refuse what it could no longer say.

A config speaks of layers in lists of length L, lists of indices, counts from one end, periods, maps keyed by
index, strings with one letter a layer, and module names. `cut_config` rewrites them; `likeness.prove_config` then
compares every layer that stays with the layer it came from, so that a family nobody thought of is refused rather
than wrong.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from layerprune.model.config import layer_count, text_config
from layerprune.model.cuts import Kept
from layerprune.model.errors import Refused
from layerprune.model.plan import in_other_part, split_name

# Lists of layer indices: these names, and any list of indices that is called so.
_INDEX_LISTS = {"mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices", "rope_scaling_layers"}
_INDEX_LIST = re.compile(r"layer_(ids|idxs|indices|indexes)$|_attn_idxs?$")
# Counts of layers from the front and from the end.
_FRONT_COUNTS = {"first_k_dense_replace", "max_window_layers", "num_dense_layers", "n_dense_first_layers"}
_END_COUNTS = {"num_kv_shared_layers"}
_NOT_PER_LAYER = re.compile(r"(token_ids?|architectures|languages|_limit|labels?|dims?|sizes_2d|stop_words|multipliers)$")
_OTHER_STACK = ("mtp_", "vision_", "audio_")
_COUNT_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_INDEX_KEYED = ("per_layer_config", "layer_overrides", "block_configs_by_layer")
_EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")


def text_part(raw: dict[str, Any], config: Any) -> dict[str, Any]:
    """The part of a config.json that describes the decoder's layers.

    `raw` itself for text-only models, and for older files that hold the text part of a multimodal model flat.
    """
    if text_config(config) is config:
        return raw
    for key in ("text_config", "llm_config", "language_config", "decoder", "generator"):
        if isinstance(raw.get(key), dict):
            return raw[key]
    if any(raw.get(key) == layer_count(config) for key in _COUNT_NAMES):
        return raw
    raise Refused("the config keeps its text part under an unknown name: its per-layer entries cannot be cut")


def cut_config(
    raw: dict[str, Any], config: Any, kept: Kept, extra: int, renamed: Mapping[str, str]
) -> dict[str, Any]:
    """A copy of config.json that describes the model with the layers `kept` only; a layer may stand there more than once.

    raw: the parsed config.json; config: the object that transformers makes of it (its derived lists, such as
    `layer_types` from a period, are written out, so that the period no longer matters). extra: layers for multi-token
    prediction that the cut leaves out (CutPlan.extra). renamed: stored names before and after, against which patterns for
    names are held. Raises Refused for what a cut cannot keep.
    """
    layers = layer_count(config)
    result = copy.deepcopy(raw)
    inner = text_part(result, config)
    derived = text_config(config).to_dict()
    _refuse_arithmetic(derived, config, kept)
    _refuse_lost_sources(derived, config, layers, kept)
    _cut_count(inner, config, layers, len(kept))
    for key, value in ({**inner, **derived} if inner is not result or text_config(config) is config else derived).items():
        if key.startswith(_OTHER_STACK):
            continue
        if key == "kv_source_layers" and isinstance(value, list):
            inner[key] = [kept.index(value[i]) for i in kept]
        elif key == "ple_layer_ids" and isinstance(value, list):  # counted from 1
            inner[key] = [kept.index(i - 1) + 1 for i in value if i - 1 in kept]
        elif _is_index_list(key, value, layers):
            inner[key] = [new for i in value for new, old in enumerate(kept) if old == i]
        elif isinstance(value, list | tuple) and len(value) == layers and is_per_layer(key, value):
            inner[key] = [value[i] for i in kept]
        elif key in _FRONT_COUNTS and type(value) is int:
            inner[key] = sum(i < value for i in kept)
        elif key in _END_COUNTS and type(value) is int:
            inner[key] = sum(i >= layers - value for i in kept)
        elif key.endswith("_pattern") and isinstance(value, str) and len(value) == layers:
            inner[key] = "".join(value[i] for i in kept)
        elif key in _INDEX_KEYED and isinstance(value, dict):
            inner[key] = {str(new): v for i, v in value.items() for new, old in enumerate(kept) if old == int(i)}
    if extra:
        inner |= {key: 0 for key in _EXTRA_LAYERS if key in inner or key in derived}
    _spell_out(inner, derived, layers, kept)
    _refit_periods(inner, derived, layers, kept)
    for place in {id(result): result, id(inner): inner}.values():
        if isinstance(place.get("quantization_config"), dict):
            place["quantization_config"] = _cut_names(place["quantization_config"], kept, renamed)
    return result


def _is_index_list(key: str, value: Any, layers: int) -> bool:
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < layers for i in value):
        return False
    return (key in _INDEX_LISTS or bool(_INDEX_LIST.search(key))) and len(set(value)) == len(value)


def is_per_layer(key: str, value: Any) -> bool:
    """Whether a list with as many entries as there are layers has one for each of them."""
    if _NOT_PER_LAYER.search(key) or key.startswith(_OTHER_STACK) or _is_index_list(key, value, len(value)):
        return False
    return "layer" in key or all(isinstance(v, int | float | str | bool) or v is None for v in value)


def _cut_count(inner: dict[str, Any], config: Any, layers: int, left: int) -> None:
    names = {key for key in _COUNT_NAMES if inner.get(key) == layers}
    stated = type(text_config(config)).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for key in names or {stated}:
        inner[key] = left


def _refuse_arithmetic(derived: dict[str, Any], config: Any, kept: Kept) -> None:
    """Refuse what a layer computes from its own index, where the cut changes the index."""
    if derived.get("scale_attn_by_inverse_layer_idx") and kept != tuple(range(len(kept))):
        raise Refused(
            "this config scales attention by 1 / (layer index + 1) (scale_attn_by_inverse_layer_idx): layers after a "
            "cut would get another index and another scale; only a cut that reaches the last layer keeps them right"
        )
    every = derived.get("rescale_every")
    if type(every) is int and every > 0 and any(old // every != new // every for new, old in enumerate(kept)):
        raise Refused(
            f"this config halves the states after every {every} layers (rescale_every): layers after the cut would be "
            "rescaled at another place, and the results would not be the same; set rescale_every to 0 in the source"
        )
    gone = [i for i in derived.get("ple_layer_ids") or [] if i - 1 not in kept]
    if gone:
        raise Refused(
            f"layer {gone[0] - 1} has an embedding of its own in a common table (ple_layer_ids): cutting it would shift the "
            "others' places; choose a block without such layers"
        )
    inner_config = text_config(config)
    kinds: list[str] = getattr(inner_config, "layer_types", None) or getattr(inner_config, "layers_block_type", None) or []
    attending = [i for i, kind in enumerate(kinds) if str(kind).endswith(("attention", "hybrid")) and "linear" not in str(kind)]
    if attending and not set(attending) & set(kept):
        raise Refused(
            f"the cut would take away every layer with attention ({', '.join(map(str, attending))}; layer_types): "
            "transformers could not generate with what is left; choose another block"
        )
    deep = _deepstack(config)
    if kept[: len(deep)] != deep:
        raise Refused(
            f"image features enter the layers {', '.join(map(str, deep))} of this model (deepstack): cut a block after them"
        )


def _deepstack(config: Any) -> Kept:
    """The first layers, up to the last one into which deepstack adds image features."""
    for part in (config, getattr(config, "vision_config", None)):
        taken = getattr(part, "deepstack_visual_indexes", None)
        if taken:
            return tuple(range(len(taken)))  # the n-th is added after decoder layer n
    pairs = getattr(config, "deepstack_layer_map", None) or []
    return tuple(range(1 + max((int(layer) for _, layer in pairs), default=-1)))


def _refuse_lost_sources(derived: dict[str, Any], config: Any, layers: int, kept: Kept) -> None:
    """Refuse to cut a layer whose keys, values or selection a later layer that stays goes on using."""
    for entry, consumer, source in _sources(derived, layers):
        if consumer in kept and source not in kept:
            raise Refused(
                f"layer {consumer} of this {config.model_type} uses what layer {source} computes ({entry}), and the cut takes "
                f"layer {source} away; choose a block without it, or one that holds all its users"
            )


def _sources(derived: dict[str, Any], layers: int) -> Iterator[tuple[str, int, int]]:
    """(config entry, layer, earlier layer that it takes something from) of all layers that share."""
    for layer, source in enumerate(derived.get("kv_source_layers") or []):
        if source != layer:
            yield "kv_source_layers", layer, source
    last_full = None
    for layer, kind in enumerate(derived.get("indexer_types") or []):
        if kind != "shared":
            last_full = layer
        elif last_full is not None:
            yield "indexer_types", layer, last_full
    shared, kinds = derived.get("num_kv_shared_layers") or 0, derived.get("layer_types") or []
    if shared and len(kinds) == layers:
        first = layers - shared
        for layer in range(first, layers):
            before = [i for i in range(first) if kinds[i] == kinds[layer]]
            if before:
                yield "num_kv_shared_layers", layer, before[-1]


def _spell_out(inner: dict[str, Any], derived: dict[str, Any], layers: int, kept: Kept) -> None:
    """Write out what a config says by a period, where a list can say it."""
    step = derived.get("decoder_sparse_step")  # Qwen: layer i is sparse if (i+1) % step == 0 and not in mlp_only_layers
    if type(step) is int and step >= 1 and "mlp_only_layers" in derived:
        only = set(derived["mlp_only_layers"] or [])
        inner["decoder_sparse_step"] = 1
        inner["mlp_only_layers"] = [new for new, old in enumerate(kept) if old in only or (old + 1) % step != 0]
    kinds = derived.get("attention_layers")  # GPT-Neo: attention_types is [[pattern, repeats], ...]
    if "attention_types" in derived and isinstance(kinds, list) and len(kinds) == layers:
        inner["attention_types"] = [[[kinds[i] for i in kept], 1]]
    cycle = derived.get("block_types")  # RecurrentGemma: repeated until there are L
    if isinstance(cycle, list | tuple) and 0 < len(cycle) < layers:
        inner["block_types"] = [cycle[i % len(cycle)] for i in kept]


Picks = Callable[..., bool]
# Periods that no list replaces: entries, and whether layer i is picked by their values.
_PERIODS: dict[tuple[str, ...], Picks] = {
    ("attn_layer_period", "attn_layer_offset"): lambda i, period, offset: i % period == offset,
    ("expert_layer_period", "expert_layer_offset"): lambda i, period, offset: i % period == offset,
    ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"): lambda i, step, first, last: (
        (i + 1) % step == 0 and first <= i <= last
    ),
}


def _refit_periods(inner: dict[str, Any], derived: dict[str, Any], layers: int, kept: Kept) -> None:
    """Find period, offset and ends that pick the same layers after the cut. Raises Refused where none do."""
    for keys, picks in _PERIODS.items():
        values = [v for v in map(derived.get, keys) if isinstance(v, int)]
        if len(values) < len(keys) or isinstance(derived.get("layers_block_type"), list):
            continue
        wanted = [picks(old, *values) for old in kept]
        tries = [*([values] if max(values) < len(kept) or len(keys) == 2 else []), *_candidates(len(keys), wanted)]
        found = next((t for t in tries if [picks(new, *t) for new in range(len(kept))] == wanted), None)
        if found is None:
            places = ", ".join(str(new) for new, picked in enumerate(wanted) if picked)
            raise Refused(
                f"{' and '.join(keys)} can only say that every n-th layer is of another kind, and after this cut those would be "
                f"the layers {places} of {len(kept)}; cut a multiple of {values[0]} layers"
            )
        inner |= dict(zip(keys, found, strict=True))


def _candidates(count: int, wanted: list[bool]) -> Iterator[list[int]]:
    places = [i for i, picked in enumerate(wanted) if picked] or [len(wanted)]
    for step in range(places[0] + 1 if count == 2 else 1, len(wanted) + 2):  # an offset is less than its period
        yield [step, places[0]] if count == 2 else [step, places[0], places[-1]]


def _cut_names(value: Any, kept: Kept, renamed: Mapping[str, str], where: str = "quantization_config") -> Any:
    """Renumber module names such as `model.layers.7.mlp` inside a quantisation config; names of cut layers go."""
    if isinstance(value, dict):
        named = {key: _cut_name(str(key), kept, renamed, where) for key in value}
        return {named[k]: _cut_names(v, kept, renamed, f"{where}.{k}") for k, v in value.items() if named[k] is not None}
    if isinstance(value, list):
        return [n for n in (_cut_names(item, kept, renamed, where) for item in value) if n is not None]
    return _cut_name(value, kept, renamed, where) if isinstance(value, str) else value


def _cut_name(name: str, kept: Kept, renamed: Mapping[str, str], where: str) -> str | None:
    if re.fullmatch(r"[\w.*-]+", name):
        parts = split_name(f"{name.rstrip('.')}.x")  # a name may end with the number: `model.layers.7`
        if parts is None or in_other_part(parts[0]) or not parts[0].endswith(("layers.", "h.", "blocks.", "layer.")):
            return name
        rest = parts[2].removesuffix("x").rstrip(".")
        return f"{parts[0]}{kept.index(parts[1])}{'.' if rest else ''}{rest}" if parts[1] in kept else None
    if _picks_alike(name.removeprefix("re:"), renamed):
        return name
    raise Refused(f"{where} names layers in a way that cannot be renumbered: {name!r}")


def _picks_alike(pattern: str, renamed: Mapping[str, str]) -> bool:
    """Whether a pattern matches each module and tensor that stays by its new name just as by its old one."""
    try:
        found = re.compile(pattern)
    except re.error:  # no pattern: a plain text with odd letters
        return not re.search(r"\d", pattern)
    for old, new in renamed.items():
        for before, after in ((old, new), (old.rpartition(".")[0], new.rpartition(".")[0])):
            if any(bool(test(before)) != bool(test(after)) for test in (found.match, found.search)):
                return False
    return True
