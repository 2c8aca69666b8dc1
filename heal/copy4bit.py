"""A copy of a checkpoint in NF4, ready to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layerprune.heal.carry import carry_over
from layerprune.heal.quantise import load_quantised
from layerprune.model.decoder import forward_logits, view_decoder
from layerprune.model.errors import Refused, model_errors, one_line
from layerprune.model.files import new_folder, read_json, write_json
from layerprune.model.load import load_model
from layerprune.model.nf4 import compute_dtype, unquantised
from layerprune.model.verify import meta_decoder


def write_nf4_copy(source: Path, out: Path, device: str, trust_remote_code: bool = False, progress: bool = False) -> dict[str, Any]:
    """Write the checkpoint in the folder `source` to the new folder `out`, its linear layers in NF4 with double quantisation.

    As in QLoRA (arXiv 2305.14314) the head, the embedding, norms and very narrow layers stay as they are, in the compute dtype.
    `out` has the tokenizer and the record too, and loads like any other checkpoint where bitsandbytes is installed; it is proven
    that it does, with the same logits on a few tokens, to the bit. Returns bytes, quantised (how many layers) and the dtype of
    the rest. Raises Refused for a model that cannot be written so; nothing is left at `out` then.
    """
    from transformers.utils import logging

    compute = compute_dtype(device.partition(":")[0])
    keep = unquantised(meta_decoder(source, trust_remote_code).model, device.partition(":")[0])
    with new_folder(out) as made:
        model = load_quantised(source, device, compute, keep, trust_remote_code, progress)
        model.config.use_cache = True
        count = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
        if count == 0:
            raise Refused(f"no linear layer of {source} can be held in NF4: a quantised copy would be none")
        carry_over(source, made)
        logging.disable_progress_bar()
        try:
            model.save_pretrained(made)
        except model_errors() as error:
            raise Refused(f"transformers cannot write this model in NF4: {one_line(error)}") from error
        for path in made.glob("*.safetensors"):  # written for the owner alone
            path.chmod((made / "config.json").stat().st_mode)
        stored = sum(path.stat().st_size for path in made.glob("*.safetensors"))
        record = source / "layerprune.json"
        found = {"bytes": stored, "quantised": count, "compute": str(compute).removeprefix("torch.")}
        if record.exists():
            write_json(made / "layerprune.json", {**read_json(record), "nf4": found})
        _prove(model.eval(), made, device, trust_remote_code)
    return found


@torch.no_grad()
def _prove(model: Any, folder: Path, device: str, trust_remote_code: bool) -> None:
    """The copy loads, and computes what was quantised."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids_BT = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = forward_logits(view_decoder(model), ids_BT)
    copy = load_model(
        folder, device=device, dtype="auto" if device != "cpu" else str(model.dtype)[6:], trust_remote_code=trust_remote_code
    )
    if not torch.equal(expected, forward_logits(view_decoder(copy), ids_BT)):
        raise Refused("the copy in NF4 is wrong: loaded again, its logits are not those of what was quantised")
