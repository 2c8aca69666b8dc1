"""Load a checkpoint's model and tokenizer; refuse one whose config contradicts its weights."""

from __future__ import annotations

import gc
import logging as logging_of
from pathlib import Path
from typing import Any

from layerprune.model.config import auto_class, layer_count, load_config
from layerprune.model.errors import Refused, UsageError, model_errors, one_line
from layerprune.model.plan import unwelcome
from layerprune.model.tensors import read_checkpoint


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
    """`auto` is the checkpoint's own dtype on a GPU and float32 on the CPU; `nf4` the dtype that 4-bit layers compute in; else
    the dtype named."""
    import torch

    if dtype == "nf4":
        from layerprune.model.nf4 import compute_dtype

        return compute_dtype(device)
    if dtype == "auto":
        return torch.float32 if device == "cpu" else "auto"
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    if found is None:
        raise UsageError(f"--dtype {dtype} is none of auto, float32, bfloat16, float16, nf4")
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

    dtype: as for `pick_dtype`; with `nf4` transformers quantises the linear layers (but the head) when they arrive.
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
    if dtype == "nf4":
        from layerprune.model.nf4 import nf4_config, unquantised
        from layerprune.model.verify import meta_decoder

        refuse_quantised(folder, config)
        keep = unquantised(meta_decoder(folder, trust_remote_code).model, chosen.partition(":")[0])
        quantization_config = nf4_config(pick_dtype(dtype, chosen), keep)
    if progress and sum(t.nbytes for t in stored.values()) > 1 << 30:
        show_loading()
    try:
        model, info = auto_class(config).from_pretrained(
            folder,
            dtype=pick_dtype(dtype, chosen),
            device_map="auto" if spread else {"": chosen},
            trust_remote_code=trust_remote_code,
            # None would mean to ignore that the checkpoint is quantised already
            **({} if quantization_config is None else {"quantization_config": quantization_config}),
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


def refuse_quantised(folder: Path, config: Any) -> None:
    """Raise UsageError for a checkpoint that is stored quantised, which cannot be quantised to NF4 again."""
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{folder} is stored quantised: it is used as it is, leave --dtype nf4 out")


def dtype_name(model: Any) -> str:
    """What a loaded model's weights are in: `nf4` where its linear layers are quantised so, else its dtype."""
    return "nf4" if getattr(model, "is_loaded_in_4bit", False) else str(model.dtype).removeprefix("torch.")


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


def show_loading() -> None:
    """Let transformers draw its bar for the next checkpoint; `quiet_transformers` ends it."""
    from transformers.utils import logging

    logging.enable_progress_bar()


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice off the terminal, and bitsandbytes' advice; errors stay."""
    logging_of.getLogger("bitsandbytes").setLevel(logging_of.ERROR)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
