"""Proof that a written checkpoint is the cut of its source: keys, bytes, layers, logits."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layerprune.model.config import auto_class, load_config
from layerprune.model.cuts import Kept, describe_dropped
from layerprune.model.decoder import Decoder, forward_logits, view_decoder, virtual_cut
from layerprune.model.errors import Refused, model_errors, one_line
from layerprune.model.likeness import prove_config
from layerprune.model.load import check_keys, load_model, quiet_transformers
from layerprune.model.memory import host_room
from layerprune.model.tensors import StoredTensor, read_checkpoint

_CHUNK = 8 << 20


class NotComputable(Refused):
    """The source itself does not run here, so nothing can be compared with it."""


def meta_decoder(folder: Path, trust_remote_code: bool = False) -> Decoder:
    """Load a checkpoint's keys, not its weights: transformers' own loader on the meta device.

    Raises Refused when a key is missing or left over, or a shape contradicts the config.
    """
    decoder, info = _load_meta(folder, trust_remote_code)
    check_keys(folder, info, len(decoder), len(read_checkpoint(folder)))
    return decoder


def _load_meta(folder: Path, trust_remote_code: bool) -> tuple[Decoder, dict[str, Any]]:
    """The decoder on the meta device, and what the loader says of its keys."""
    quiet_transformers()
    config = load_config(folder, trust_remote_code)
    read_checkpoint(folder)
    try:
        model, info = auto_class(config).from_pretrained(
            folder, device_map={"": "meta"}, trust_remote_code=trust_remote_code, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except ImportError as error:
        raise Refused(f"{folder} needs a package that is not installed to be read: {one_line(error)}") from error
    except model_errors() as error:
        raise Refused(f"transformers cannot read {folder}: {one_line(error)}") from error
    return view_decoder(model), info


def prove_structure(source: Path, result: Path, kept: Kept, trust_remote_code: bool = False) -> None:
    """Both load without a missing key, the result without one left over, and every kept layer is built as it was."""
    before = meta_decoder(source, trust_remote_code)
    try:
        after, info = _load_meta(result, trust_remote_code)
    except Refused as refusal:
        raise Refused(f"transformers cannot read what this cut would be: {one_line(refusal.__cause__ or refusal)}") from refusal
    prove_config(before, after, kept)  # first: it says why keys are missing
    if info["missing_keys"]:
        raise Refused(
            f"a layer that the cut takes away stores {min(info['missing_keys'])} for the layers that stay: this model shares "
            "weights between layers; choose another block"
        )
    check_keys(result, info, len(kept), len(read_checkpoint(result)))
    if info["unexpected_keys"]:
        raise Refused(f"the written checkpoint is wrong: its model has no place for {min(info['unexpected_keys'])}")


def prove_bytes(
    source: Mapping[str, StoredTensor],
    result: Path,
    renamed: Mapping[str, str],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Every tensor of `result` has dtype, shape and every byte of the tensor it came from."""
    written = read_checkpoint(result)
    if set(written) != set(renamed.values()):
        odd = min(set(written) ^ set(renamed.values()))
        raise Refused(f"the written checkpoint is wrong: {odd} is in the plan or in the file, not in both")
    for old, new in renamed.items():
        a, b = source[old], written[new]
        if (a.dtype, a.shape) != (b.dtype, b.shape) or not same_bytes(a, b):
            raise Refused(f"the written checkpoint is wrong: {new} is not {old} of the source")
        progress(b.nbytes)


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors of one size hold the same bytes."""
    with open(a.file, "rb") as left, open(b.file, "rb") as right:
        for at in range(0, a.nbytes, _CHUNK):
            size = min(_CHUNK, a.nbytes - at)
            if os.pread(left.fileno(), size, a.begin + at) != os.pread(right.fileno(), size, b.begin + at):
                return False
    return True


def logits_check_dtype(source: Mapping[str, StoredTensor], ram: int | None = None) -> str | None:
    """The dtype in which a checkpoint fits in 60 % of the memory that `host_room` gives: float32, else its own, else None."""
    free = 0.6 * host_room(ram)
    if 4 * sum(t.numel for t in source.values()) < free:
        return "float32"
    own = {t.dtype for t in source.values()}
    if sum(t.nbytes for t in source.values()) < free and own <= {"BF16"}:
        return "bfloat16"
    return None


def prove_logits(
    source: Path, result: Path, kept: Kept, dtype: str, trust_remote_code: bool = False, progress: bool = False
) -> None:
    """On the CPU, the result's logits on a few tokens equal those of the virtually cut source, bit for bit.

    And the result can take a step with its KV cache. Raises Refused where one of them does not hold.
    """
    import torch

    ids_BT = torch.randint(0, 1 << 30, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = _source_logits(source, kept, ids_BT, dtype, trust_remote_code, progress)
    if not torch.isfinite(expected).all():
        raise Refused(
            f"the logits of {source} are not a number ({dtype} on the CPU), so the cut cannot be proven: its weights are "
            "broken, or overflow; --no-verify writes it without this proof"
        )
    decoder = view_decoder(load_model(result, device="cpu", dtype=dtype, trust_remote_code=trust_remote_code, progress=progress))
    ids_BT = ids_BT % _vocabulary(decoder)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers has another name for past_key_values
        found = forward_logits(decoder, ids_BT)
        if not torch.equal(expected, found):
            worst = (expected.float() - found.float()).abs().max().item()
            raise Refused(
                f"the written checkpoint is wrong: its logits differ from the cut source by up to {worst:.3g} ({dtype} on "
                "the CPU); this model depends on layer positions in a way that its config does not show"
            )
        try:
            step_with_cache(decoder, ids_BT)
        except model_errors() as error:
            raise Refused(
                f"transformers cannot generate with a cache from what this cut would be ({type(error).__name__}: "
                f"{one_line(error)}); choose another block"
            ) from error


def step_with_cache(decoder: Decoder, ids_BT: Any) -> None:
    """Run all tokens but the last, then the last with the KV cache; what the model raises is let through."""
    cache = decoder.model(input_ids=ids_BT[:, :-1], use_cache=True)
    names = ("past_key_values", "cache_params", "state")  # attention, Mamba, RWKV
    # newer outputs give one cache under several names, and some models take it under one of them only
    taken = inspect.signature(decoder.model.forward).parameters
    given = {name: cache[name] for name in names if cache.get(name) is not None}
    held = {name: value for name, value in given.items() if name in taken} or given
    decoder.model(input_ids=ids_BT[:, -1:], use_cache=True, **held)


def _source_logits(source: Path, kept: Kept, ids_BT: Any, dtype: str, trust_remote_code: bool, progress: bool) -> Any:
    import torch

    try:
        live = load_model(source, device="cpu", dtype=dtype, trust_remote_code=trust_remote_code, progress=progress)
    except Refused as refusal:
        raise NotComputable(str(refusal)) from refusal
    decoder = view_decoder(live)
    try:
        with torch.no_grad(), virtual_cut(decoder, kept):
            return forward_logits(decoder, ids_BT % _vocabulary(decoder))
    except model_errors() as error:
        raise Refused(
            f"{source} does not run without layers {describe_dropped(kept, len(decoder))}: its layers pass on more than "
            f"their states ({type(error).__name__}: {one_line(error)}); choose another block"
        ) from error


def _vocabulary(decoder: Decoder) -> int:
    return int(decoder.model.get_input_embeddings().weight.shape[0])
