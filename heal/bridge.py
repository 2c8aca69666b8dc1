"""Bridge a cut without training: least squares, folded into the last linear layer before it.

The layer before a cut hands on x = y + s m, where m = W h (+ bias) is what its MLP's output projection adds to the residual
stream (s is 1, or a family's constant residual scale). On calibration documents the uncut model shows which residual
e = x^(b) - x is missing there, x^(b) being the state that the layer after the cut was trained on. Two forms:
- `map`: T that minimises sum |s (T - I) m - e|^2 + lambda |T - I|^2; W becomes T W and the bias T bias.
- `projection`: W' that minimises sum |s (W' - W) h - e|^2 + lambda |W' - W|^2.
The sum is over all real tokens; lambda is chosen on a tenth of the documents, which the fit does not see. The idea of a
linear map in place of a block is that of ReplaceMe (arXiv 2505.02819). Nothing is added to the architecture.
"""

from __future__ import annotations

import gc
import importlib.metadata
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from layerprune.heal.carry import carry_over
from layerprune.heal.fit import Bridge, fit_bridges, split_documents
from layerprune.heal.gaps import find_gaps
from layerprune.heal.merge import DTYPES, Stored, locate
from layerprune.heal.settings import BRIDGES
from layerprune.heal.teacher import find_teacher, prove_pair
from layerprune.model.config import load_config, pick_length, vocab_size
from layerprune.model.data import batches, check_data, data_fingerprint, document_hash, read_documents, tokenise
from layerprune.model.decoder import view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.feed import read_tensor
from layerprune.model.files import must_have_room, must_not_exist, new_folder, read_json, write_json, write_text
from layerprune.model.load import load_model, load_tokenizer, pick_device
from layerprune.model.loss import total_loss
from layerprune.model.progress import progress_bar
from layerprune.model.source import ModelSource, find_model
from layerprune.model.tensors import StoredTensor, read_checkpoint
from layerprune.model.verify import meta_decoder
from layerprune.model.write import Replace, write_checkpoint

Say = Callable[[str], None]
FORMS = BRIDGES
_LOSS_TOKENS = 2048
"""Tokens a batch where the loss is measured: the logits of a large vocabulary stay within about 1 GB."""


def bridge_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    teacher: str | Path | None = None,
    data: str,
    samples: int = 128,
    length: int | None = None,
    form: str = "map",
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
    report: Say | None = None,
    exclude: Set[bytes] = frozenset(),
    validation: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a cut checkpoint with a linear bridge over each cut, fitted without training, to the folder `out`.

    model: a checkpoint that `prune_checkpoint` wrote and nobody trained since. teacher: the model it was cut from, by
    default the one that its layerprune.json names. data: `c4` or a file; `samples` documents of it count, each up to
    `length` tokens (None: 2048 or the model's context), a tenth of them only to choose the ridge strength. form: `map`
    (a D x D map of what the MLP adds) or `projection` (the projection's weight itself; more freedom, for which it
    needs more tokens). report: gets what is done, by default on stderr. exclude: the `document_hash` of documents that are not
    fitted on. validation: documents, excluded too, on which the losses of the cut and of the bridged checkpoint are measured.

    The uncut model is loaded and run, without its layers after the last cut. Only one weight a cut changes (and its bias,
    with `map`); every other tensor is the cut's, byte for byte, and the architecture is. Where no bridge is better on
    the held-out documents, the weight stays. Memory: the uncut model, and four float64 matrices of the square of
    the projection's width, output (`map`) or input (`projection`).
    Returns what `out`/layerprune.json holds under "bridge": `bridges` has for each cut the `error` on the held-out
    documents, sum |x - x^(b)|^2 / sum |x^(b)|^2, of the cut as it was ("cut") and bridged ("bridged"). `loss`, where
    there is validation: the normalised losses "cut" and "bridged", and the number of "documents".
    Raises UsageError and Refused; nothing is left at `out` then.
    """
    say = report or (lambda line: print(line, file=sys.stderr, flush=True))
    out = Path(out).absolute()
    must_not_exist(out)
    if form not in FORMS:
        raise UsageError(f"--form {form} is none of {', '.join(FORMS)}")
    if samples < 2:
        raise UsageError(f"--samples {samples} leaves no document to choose the ridge strength on: use at least 2")
    source = find_model(str(model))
    original = find_teacher(source, None if teacher is None else str(teacher), trust_remote_code)
    gaps = find_gaps(original.kept, original.layers)
    config = load_config(original.source.folder, trust_remote_code)
    length = pick_length(length, config)
    stored = read_checkpoint(source.folder)
    if getattr(config, "quantization_config", None) is not None:
        raise Refused(f"{source.name} is quantised: bridge its unquantised checkpoint, then quantise the result")
    chosen = pick_device(device)
    check_data(data, "--data", "train", seed)
    total = sum(t.nbytes for t in stored.values())
    must_have_room(out, total)
    with progress_bar(total, "compare", "B", progress) as bar:
        prove_pair(source, original, bar.update)

    started = time.perf_counter()
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    drawn = read_documents(data, "train", samples + len(exclude), seed)
    documents = [text for text in drawn if document_hash(text) not in exclude][:samples]
    if exclude and len(documents) < 2:
        raise Refused(f"{data} leaves {len(documents)} documents beside the held-out ones: a bridge is fitted on two at least")
    sequences = tokenise(tokenizer, documents, length, vocab=vocab_size(config), progress=progress)
    fit, held = split_documents(sequences, seed)
    live = load_model(original.source.folder, device=device, trust_remote_code=trust_remote_code, progress=progress)
    decoder = view_decoder(live)
    with progress_bar(len(sequences), "bridge", "doc", progress) as bar:
        bridges = fit_bridges(decoder, gaps, fit, held, form, progress=bar.update)
    where = locate([bridge.target for bridge in bridges], stored, len(original.kept))
    replace: dict[str, Callable[[StoredTensor], bytes]] = {}
    for bridge in bridges:
        replace |= fold(bridge, where[bridge.target.name], stored)
    record: dict[str, Any] = {
        "form": form,
        "teacher": original.source.name,
        "bridges": [_told(bridge, where[bridge.target.name]) for bridge in bridges],
        "documents": len(sequences),
        "held_out": len(held),
        "tokens": sum(map(len, sequences)),
        "samples": samples,
        "length": length,
        "data": Path(data).name,
        "data_fingerprint": data_fingerprint(data),
        "seed": seed,
        "device": chosen,
        "dtype": str(live.dtype).removeprefix("torch."),
        "versions": {name: importlib.metadata.version(name) for name in ("layerprune", "torch", "transformers")},
        "seconds": {"fit": round(time.perf_counter() - started, 1)},
    }
    for line in format_bridges(record):
        say(line)
    del live, decoder
    gc.collect()  # the uncut model would lie beside those that are measured

    held_out = tokenise(tokenizer, validation, length, vocab=vocab_size(config)) if validation else []
    held_out = [ids for ids in held_out if len(ids) > 1]

    def measure(folder: Path) -> float:
        model = load_model(folder, device=device, trust_remote_code=trust_remote_code, progress=progress)
        with progress_bar(len(held_out), "held-out", "doc", progress) as bar:
            return total_loss(view_decoder(model), batches(held_out, _LOSS_TOKENS), bar.update).normalised(vocab_size(config))

    if held_out:
        record["loss"] = {"cut": measure(source.folder), "bridged": None, "documents": len(held_out)}
    _write(source, stored, out, replace, record, trust_remote_code, progress, measure)
    if held_out:
        say(_loss_line(record["loss"]))
    return record


def fold(bridge: Bridge, place: Stored, stored: Mapping[str, StoredTensor]) -> Replace:
    """What replaces the stored weight (and, with `map`, the bias): computed in float64, rounded once to its type.

    Empty where nothing is to change. Raises Refused where the bias is not stored beside the weight.
    """
    change = bridge.choice.map_DK
    if change is None:
        return {}
    change_DK = change.cpu()

    def weight(tensor: StoredTensor) -> bytes:
        old = read_tensor(tensor)
        w_DK = (old.T if place.transposed else old).double()
        new_DK = w_DK + (change_DK @ w_DK if bridge.form == "map" else change_DK)
        return _bytes(new_DK.T if place.transposed else new_DK, old.dtype)

    def bias(tensor: StoredTensor) -> bytes:
        b_D = read_tensor(tensor)
        return _bytes(b_D.double() + change_DK @ b_D.double(), b_D.dtype)

    replace: dict[str, Callable[[StoredTensor], bytes]] = {place.name: weight}
    module = bridge.target.module
    if bridge.form == "map" and module.bias is not None:
        name = place.name.removesuffix("weight") + "bias"
        there = stored.get(name)
        live = module.bias.detach().cpu()
        if there is None or there.dtype not in DTYPES or not torch.equal(read_tensor(there).to(live.dtype), live):
            raise Refused(
                f"the bias of {bridge.target.name} is not stored as {name}: the bridge could not be folded into it; "
                "use the form `projection`, or resave the model with save_pretrained"
            )
        replace[name] = bias
    return replace


def _bytes(values: torch.Tensor, dtype: torch.dtype) -> bytes:
    rounded = values.to(dtype).contiguous()
    if not torch.isfinite(rounded).all():
        raise Refused(f"the bridged weights are not finite in {dtype}: use more documents (--samples)")
    return rounded.view(torch.uint8).numpy().tobytes()


def _told(bridge: Bridge, place: Stored) -> dict[str, Any]:
    return {
        "dropped": [bridge.gap.after + 1, bridge.gap.before],
        "module": bridge.target.name,
        "tensor": place.name,
        "scale": bridge.scale,
        "ridge": bridge.choice.strength,
        "error": {"cut": bridge.choice.before / bridge.energy, "bridged": bridge.choice.error / bridge.energy},
    }


def format_bridges(record: Mapping[str, Any]) -> list[str]:
    """The record of `bridge_checkpoint` for people, one line for each cut."""
    lines = []
    for bridge in record["bridges"]:
        a, b = bridge["dropped"]
        kind = "left as it was: no ridge strength helps" if bridge["ridge"] is None else f"ridge {bridge['ridge']:g}"
        lines.append(
            f"bridge over layers {a}:{b} in {bridge['tensor']} ({record['form']}, {kind}): squared error on "
            f"{record['held_out']} held-out documents {bridge['error']['cut']:.4f} -> {bridge['error']['bridged']:.4f} of the "
            "states' energy"
        )
    return [*lines, _loss_line(record["loss"])] if record.get("loss") else lines


def _loss_line(loss: Mapping[str, Any]) -> str:
    told = f"held-out loss {loss['cut']:.4f} -> {loss['bridged']:.4f} (normalised, {loss['documents']} documents)"
    return told + (": worse than the cut without the bridge" if loss["bridged"] > loss["cut"] else "")


def _write(
    source: ModelSource, stored: Mapping[str, StoredTensor], out: Path, replace: Replace, record: dict[str, Any],
    trust: bool, progress: bool, measure: Callable[[Path], float],
) -> None:  # fmt: skip
    started = time.perf_counter()
    with new_folder(out) as folder:
        carry_over(source.folder, folder)
        with progress_bar(sum(t.nbytes for t in stored.values()), "write", "B", progress) as bar:
            write_checkpoint(stored, folder, replace, bar.update)
        meta_decoder(folder, trust)
        record["seconds"]["write"] = round(time.perf_counter() - started, 1)
        if "loss" in record:
            record["loss"]["bridged"] = measure(folder)
        write_json(folder / "layerprune.json", {**read_json(source.folder / "layerprune.json"), "bridge": record})
        card = source.folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {out.name}\n"
        write_text(folder / "README.md", text + "\n" + _section(record))


def _section(record: Mapping[str, Any]) -> str:
    """What README.md says beside the cut's own card."""
    tensors = ", ".join(f"`{bridge['tensor']}`" for bridge in record["bridges"])
    return f"""## Bridge

A linear map over each cut is folded into {tensors}: fitted by least squares, without training, on
{record["tokens"]:,} tokens of {record["documents"]:,} documents (form `{record["form"]}`; the idea is that of
[arXiv 2505.02819](https://arxiv.org/abs/2505.02819)). Only that differs from the cut described above; `layerprune.json` has
the errors with and without it under `bridge`.
{_loss_sentence(record.get("loss"))}"""


def _loss_sentence(loss: Mapping[str, Any] | None) -> str:
    if loss is None:
        return ""
    return (
        f"Normalised loss on {loss['documents']} documents that it was not fitted on: {loss['cut']:.4f} without it, "
        f"{loss['bridged']:.4f} with it.\n"
    )
