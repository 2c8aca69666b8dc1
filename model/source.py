"""From what the user calls a model (recipe name, Hub id, local folder) to a checked folder, and to a loaded model."""

from __future__ import annotations

import difflib
import gc
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused, UsageError, model_errors, network_errors
from layerprune.model.files import read_json
from layerprune.model.plan import unwelcome
from layerprune.model.recipes import Recipe, load_recipe, recipe_names
from layerprune.model.tensors import read_checkpoint

# What a checkpoint needs to be used and passed on; weights in other formats are never fetched.
_HUB_PATTERNS = [
    "*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py",
    "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
_HUB_IGNORED = ["consolidated*", "original/*", "*/consolidated*"]  # the same weights once more, in other layouts


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint in a local folder, and how the user named it."""

    name: str
    """What was asked for: a recipe name, a Hub id or a path."""
    folder: Path
    hub_id: str | None
    revision: str | None
    recipe: Recipe | None

    @property
    def label(self) -> str:
        """Short name for default output folders: the last part of the name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.name.rstrip("/")).name) or "model"


def find_model(name: str, revision: str | None = None) -> ModelSource:
    """Resolve a recipe name, a local folder or a Hub id (in that order) to a folder with a checkpoint.

    A Hub id is taken from the local cache when it is there, else downloaded (safetensors, config, tokenizer).
    Raises UsageError for a name that is nothing of the three, Refused where the Hub cannot give it.
    """
    recipe = load_recipe(name) if name in recipe_names() else None
    if recipe is not None:
        if recipe.local_folder is not None:
            return ModelSource(name, recipe.local_folder, None, None, recipe)
        return _from_hub(name, recipe.model, revision, recipe)
    try:
        folder = Path(name).expanduser()
        there, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home that is nobody's, a folder that is closed
        raise UsageError(f"--model {name} cannot be looked up: {one_line(error)}") from None
    if there:
        if not (folder / "config.json").exists():
            raise Refused(f"{name} is a folder without config.json: not a Hugging Face checkpoint")
        return ModelSource(name, folder.absolute(), None, None, recipe_of_checkpoint(folder))
    if is_file:
        raise UsageError(f"--model {name} is a file: give the folder that holds config.json")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        known = {r.model: r for r in map(load_recipe, recipe_names())}
        return _from_hub(name, name, revision, known.get(name))
    near = difflib.get_close_matches(name.lower(), recipe_names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`layerprune recipes` lists the recipes"
    raise UsageError(f"--model {name} is no recipe, no local folder and no Hub id (owner/name); {hint}")


def recipe_of_checkpoint(folder: Path) -> Recipe | None:
    """The recipe that a folder written by layerprune came from, so that healing it keeps the recipe's settings."""
    card = folder / "layerprune.json"
    if not card.exists():
        return None
    record = read_json(card)
    if not isinstance(record, dict):
        raise Refused(f"{card} is not a record that layerprune wrote: remove it, or give another --model")
    name = record.get("recipe")
    return load_recipe(name) if name in recipe_names() else None


def _from_hub(name: str, hub_id: str, revision: str | None, recipe: Recipe | None) -> ModelSource:
    folder = _fetch(hub_id, revision)
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return ModelSource(name, folder, hub_id, commit, recipe)


def _fetch(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED))
    except HFValidationError as error:
        raise UsageError(f"--model {hub_id} is no local folder and cannot be a Hub id: {one_line(error)}") from None
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise Refused(
            f"{hub_id}{at} is not in the local Hub cache and {why}: download it once where there is a network "
            "(hf download), or give --model a local folder"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise Refused(f"{hub_id}{at} is gated or private: accept its licence on the Hub and run `hf auth login`") from error
        if status == 404:
            raise Refused(f"{hub_id}{at} is not on the Hub: check the spelling") from error
        raise Refused(f"{hub_id}{at} could not be downloaded: {one_line(error)}") from error
    except network_errors() as error:
        raise Refused(f"{hub_id}{at} could not be downloaded: {one_line(error)}") from error


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's config object; refuses remote code unless trusted, and models that are no causal decoder."""
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_json(folder / "config.json")
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str):
        raise Refused(f"{folder / 'config.json'} has no model_type: not a Hugging Face model config")
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


def pick_device(device: str | None = None) -> str:
    """The device asked for, else `cuda` where there is one, else `cpu`. Raises UsageError for one that is missing."""
    import torch

    if device in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(str(device)).type
        if kind == "cpu":
            return kind
    except RuntimeError:
        raise UsageError(f"--device {device} is no torch device: use cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no GPU here; use --device cpu")
    if kind == "cuda" and (torch.device(str(device)).index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here, counted from cuda:0")
    here = torch.accelerator.current_accelerator()
    if here is None or kind != here.type:
        raise UsageError(f"--device {device} is not on this machine: use cpu, cuda or cuda:N")
    return str(device)


def pick_dtype(dtype: str, device: str) -> Any:
    """`auto` is the checkpoint's own dtype on a GPU and float32 on the CPU; else the dtype named."""
    import torch

    if dtype == "auto":
        return torch.float32 if device == "cpu" else "auto"
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    if found is None:
        raise UsageError(f"--dtype {dtype} is none of auto, float32, bfloat16, float16")
    return found


def load_model(
    folder: Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    progress: bool = False,
) -> Any:
    """Load a checkpoint for inference, and refuse one whose config contradicts its weights.

    On a machine with several GPUs and `device` left open the layers are spread by accelerate
    (`device_map="auto"`); else the whole model goes to one device. progress: transformers' bar, for a checkpoint of over
    1 GiB. Returns the model in eval mode.
    """
    import torch

    quiet_transformers()
    config = load_config(folder, trust_remote_code)
    stored = read_checkpoint(folder)
    chosen = pick_device(device)
    spread = device in (None, "auto") and chosen == "cuda" and torch.cuda.device_count() > 1
    if chosen.startswith("cuda"):
        # a model that accelerate prepared refers to itself: what was loaded before goes only when it is collected
        gc.collect()
        torch.cuda.empty_cache()
    if progress and sum(t.nbytes for t in stored.values()) > 1 << 30:
        show_loading()
    try:
        model, info = auto_class(config).from_pretrained(
            folder,
            dtype=pick_dtype(dtype, chosen),
            device_map="auto" if spread else {"": chosen},
            trust_remote_code=trust_remote_code,
            quantization_config=quantization_config,
            ignore_mismatched_sizes=True,  # they are listed then, and refused by name below
            output_loading_info=True,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise Refused(f"{folder} does not fit on {chosen}: {one_line(error)}") from error
    except ImportError as error:
        raise Refused(f"{folder} needs a package that is not installed to be loaded: {one_line(error)}") from error
    except model_errors() as error:
        raise Refused(f"transformers cannot load {folder}: {one_line(error)}") from error
    check_keys(folder, info, layer_count(config), len(stored))
    return model.eval()


def check_keys(folder: Path, info: dict[str, Any], layers: int, stored: int) -> None:
    """Raise Refused when transformers found a key missing, of another shape, or left over."""
    if info["mismatched_keys"]:
        name, here, wanted = min(info["mismatched_keys"])
        raise Refused(
            f"the weights in {folder} contradict its config: {name} has the shape {tuple(here)}, and the config makes it "
            f"{tuple(wanted)}"
        )
    for what, keys in (("missing", info["missing_keys"]), ("left over", unwelcome(info["unexpected_keys"], layers))):
        if keys:
            raise Refused(
                f"the weights in {folder} contradict its config ({layers} layers): {len(keys)} of {stored} tensors "
                f"{what}, such as {min(keys)}"
            )


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer; one without a pad token pads with eos (or token 0), which masks hide."""
    from transformers import AutoTokenizer

    quiet_transformers()
    load_config(folder, trust_remote_code)  # refuses what is no model, or not trusted, in the right words
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain Exception for a file that it cannot read
        raise Refused(f"no tokenizer can be loaded from {folder}: {one_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        else:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


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


def one_line(error: BaseException) -> str:
    """An exception's message on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def show_loading() -> None:
    """Let transformers draw its bar for the next checkpoint; `quiet_transformers` ends it."""
    from transformers.utils import logging

    logging.enable_progress_bar()


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice off the terminal; errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
