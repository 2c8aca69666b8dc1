"""A checkpoint's config: read it, refuse what is no decoder, and what it says of layers, context and vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused, UsageError, model_errors, one_line
from layerprune.model.files import read_json

_MOST_LAYERS = 100_000


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's config object; refuses remote code unless trusted, and models that are no causal decoder."""
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_json(folder / "config.json")
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str):
        raise Refused(f"{folder / 'config.json'} has no model_type: not a Hugging Face model config")
    for part in (raw, raw.get("text_config")):
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if isinstance(part, dict) and isinstance(part.get(key), int) and part[key] > _MOST_LAYERS:
                raise Refused(f"{folder / 'config.json'} says {key} {part[key]:,}: no model has that many layers")
    if kind not in CONFIG_MAPPING:
        if "auto_map" not in raw:
            raise Refused(f"model type {kind!r} is unknown to this transformers; a newer release may know it")
        if not trust_remote_code:
            raise Refused(
                f"model type {kind!r} runs Python code that comes with the checkpoint: read that code, then pass "
                "--trust-remote-code"
            )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except model_errors() as error:
        raise Refused(f"{folder / 'config.json'} is not a valid {kind} config: {one_line(error)}") from error
    _must_decode(raw, config)
    return config


def _must_decode(raw: dict[str, Any], config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = raw["model_type"]
    if kind == "xlnet":
        raise Refused("xlnet predicts words in any order, from both sides: not a causal decoder")
    if getattr(config, "is_encoder_decoder", False):
        raise Refused(f"{kind} is an encoder-decoder: layerprune cuts decoder-only language models")
    names = raw.get("architectures") or []
    head = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "LMHead", "ForImageTextToText")
    masked = any("MaskedLM" in n or n.endswith(("Classification", "QuestionAnswering")) for n in names)
    causal_head = any(n.endswith(head) for n in names)
    listed = "auto_map" in raw or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or _image_text(kind)
    encoder = not causal_head and (masked or kind in ("bert", "roberta", "electra", "xlm-roberta", "camembert", "ernie"))
    if encoder or not listed:
        raise Refused(f"{kind} ({', '.join(names) or 'no architecture named'}) is not a causal decoder with a language-model head")


def _image_text(kind: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def auto_class(config: Any) -> Any:
    """AutoModelForCausalLM, or the image-text class for checkpoints of it and for models that have no causal entry."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = config.model_type
    # Llama-4 is in both tables, and its text class would leave the vision tower over
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind) in (getattr(config, "architectures", None) or [])
    if (kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not whole) or not _image_text(kind):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def text_config(config: Any) -> Any:
    """The part of the config that describes the decoder's layers."""
    return config.get_text_config(decoder=True)


def layer_count(config: Any) -> int:
    """L, the number of decoder layers that the config states."""
    count = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise Refused(f"the config of this {config.model_type} does not say how many layers it has (num_hidden_layers)")
    return count


def context_length(config: Any) -> int | None:
    """The longest sequence that the config promises, if it promises one."""
    inner = text_config(config)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(inner, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def pick_length(length: int | None, config: Any, default: int = 2048) -> int:
    """Tokens a document is truncated at: the one asked for, else `default` or the model's context if shorter."""
    context = context_length(config)
    if length is None:
        return min(default, context) if context else default
    if length < 2:
        raise UsageError(f"--length {length} leaves nothing to predict: use at least 2")
    if context and length > context:
        raise UsageError(f"--length {length} is beyond the model's context of {context}: use at most {context}")
    return length


def vocab_size(config: Any) -> int:
    """V of the config (not the tokenizer's length): ln V normalises the loss."""
    return int(text_config(config).vocab_size)
