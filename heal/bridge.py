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

import contextlib
import importlib.metadata
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerprune.heal.carry import carry_over
from layerprune.heal.merge import DTYPES, Stored, locate, read_tensor
from layerprune.heal.settings import BRIDGES
from layerprune.heal.targets import Target, is_linear, linear_shape, mlp_linears
from layerprune.heal.teacher import find_teacher, prove_pair
from layerprune.model.config import load_config, pick_length, vocab_size
from layerprune.model.cuts import Kept
from layerprune.model.data import TokenBatch, batches, check_data, data_fingerprint, document_hash, read_documents, tokenise
from layerprune.model.decoder import Decoder, Stop, first_hidden, forward_logits, hidden_of, replaced_forwards, view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import must_have_room, must_not_exist, new_folder, read_json, write_json, write_text
from layerprune.model.load import load_model, load_tokenizer, pick_device
from layerprune.model.progress import progress_bar
from layerprune.model.ridge import Choice, Moments, choose_ridge
from layerprune.model.source import ModelSource, find_model
from layerprune.model.tensors import StoredTensor, read_checkpoint
from layerprune.model.verify import meta_decoder
from layerprune.model.write import Replace, write_checkpoint

Say = Callable[[str], None]
FORMS = BRIDGES
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths that are tried: lambda as a multiple of the mean square of a feature, summed over tokens."""
_PROBE_TOKENS = 12


@dataclass(frozen=True)
class Gap:
    """One cut: original layers after+1 .. before-1 are gone; `place` is the index of layer `after` in the cut model."""

    place: int
    after: int
    before: int


@dataclass(frozen=True)
class Projection:
    """The linear layer, `inside` a decoder layer, whose output times `scale` is added to the residual stream as it is."""

    inside: str
    module: Any
    scale: float


@dataclass(frozen=True)
class Bridge:
    """A gap's projection and what was fitted for it.

    target: the projection's place in the cut model, and its module in the uncut one.
    choice.map_DK: T - I (D x D) for the form `map`, W' - W (D x in) for `projection`; None changes nothing.
    energy: sum |x^(b)|^2 over the held-out tokens, to which errors are relative.
    """

    gap: Gap
    target: Target
    scale: float
    form: str
    choice: Choice
    energy: float


def find_gaps(kept: Kept, layers: int) -> list[Gap]:
    """The cuts in the middle of a model. Raises Refused for layers cut at its start or end, and where nothing is cut."""
    if kept[0] != 0:
        raise Refused(
            f"layers 0:{kept[0]} are cut from the start: a bridge needs a layer before the cut to hold it; cut a block that "
            "leaves layer 0"
        )
    if kept[-1] != layers - 1:
        raise Refused(
            f"layers {kept[-1] + 1}:{layers} are cut from the end: a bridge needs a layer after the cut to lead to; cut a block "
            "that leaves the last layer"
        )
    gaps = [Gap(i, a, b) for i, (a, b) in enumerate(zip(kept, kept[1:], strict=False)) if b != a + 1]
    if not gaps:
        raise Refused(f"none of the {layers} layers is cut: there is nothing to bridge")
    return gaps


@torch.no_grad()
def find_projection(decoder: Decoder, layer: int) -> Projection:
    """The output projection of a layer's MLP, found by what it does: no family table.

    The layer is run on a few tokens; noise of the size of its states is added to one linear layer's output, and the
    layer's own output must change by that noise times one constant, at every token and feature. Of several such layers
    (parallel blocks have attention's, too) the MLP's is taken. Raises Refused where none is found: MLPs
    whose output is normalised or gated (Gemma-2, OLMo-2), fused experts, states in several streams, weights that are
    used elsewhere too, models that change states between layers.
    """
    owner = decoder.layers[layer]
    scales: dict[str, float] = {}
    after: list[torch.Tensor] = []
    plain: list[bool] = []

    def probe(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        base = hidden_of(old(*args, **kwargs)).clone()
        for name, module in owner.named_modules():
            if is_linear(module) and linear_shape(module)[0] == base.shape[-1]:
                scale = _passes_on(module, base, lambda: hidden_of(old(*args, **kwargs)))
                if scale is not None:
                    scales[name] = scale
        output = old(*args, **kwargs)
        after.append(hidden_of(output).clone())
        return output

    def next_one(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = first_hidden(args, kwargs)
        plain.append(found.shape == after[0].shape and torch.equal(found.to(after[0].device), after[0]))
        raise Stop

    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(0, vocab, (2, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    shadows = [(owner, probe), (decoder.layers[layer + 1], next_one)]
    with replaced_forwards(shadows), contextlib.suppress(Stop):
        forward_logits(decoder, ids_BT)
    kind = type(decoder.model).__name__
    if plain != [True]:
        raise Refused(f"this {kind} changes states between its layers, so a bridge before layer {layer + 1} would not be exact")
    mlp = _mlp_of(decoder, owner) if scales else set()
    found = [name for name in scales if name in mlp and not _is_shared(decoder.model, owner.get_submodule(name))]
    if len(found) != 1:
        why = f"{' and '.join(found)} do" if found else "none of its MLP's linear layers does (norms, gates or experts follow them)"
        raise Refused(
            f"layer {layer} of this {kind} cannot hold a bridge: one linear layer of its MLP must add its output to the residual "
            f"stream as it is, and {why}; heal the cut instead"
        )
    return Projection(found[0], owner.get_submodule(found[0]), scales[found[0]])


def _passes_on(module: nn.Module, base: torch.Tensor, run: Callable[[], torch.Tensor]) -> float | None:
    """The constant s such that noise added to the module's output appears in the layer's output times s; else None."""
    noise: list[torch.Tensor] = []
    own: list[torch.Tensor] = []

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        # the median: some tokens of trained models have states a thousand times as large as the others
        noise.append(drawn * base.abs().median())
        own.append(output.clone())
        return output + noise[-1]

    handle = module.register_forward_hook(add)
    try:
        changed = run()
    finally:
        handle.remove()
    if len(noise) != 1 or noise[0].numel() != base.numel():  # called twice, or for some tokens only
        return None
    added, own_output = (t.reshape(base.shape).to(base.device).double() for t in (noise[0], own[0]))
    moved = changed.double() - base.double()
    scale = ((moved * added).sum() / added.square().sum()).item()
    if not 1e-3 < abs(scale) < 1e3:  # not a number, too
        return None
    scale = 1.0 if abs(scale - 1) < 1e-3 else scale
    rounding = 8 * torch.finfo(base.dtype).eps
    allowed = rounding * (base.double().abs() + abs(scale) * (added.abs() + own_output.abs()))
    return scale if bool(((moved - scale * added).abs() <= allowed).all()) else None


def _mlp_of(decoder: Decoder, owner: nn.Module) -> set[str]:
    """Names, inside one layer, of its MLP's linear layers."""
    alone = Decoder(decoder.model, decoder.path, nn.ModuleList([owner]))
    try:
        return {name.removeprefix(f"{decoder.path}.0.") for name in mlp_linears(alone, named=True)}
    except Refused:
        return set()


def _is_shared(model: nn.Module, module: nn.Module) -> bool:
    return sum(p is module.weight for _, p in model.named_parameters(remove_duplicate=False)) != 1


def fit_bridges(
    decoder: Decoder,
    gaps: Sequence[Gap],
    fit: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]],
    form: str = "map",
    *,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Bridge]:
    """Fit a bridge for every gap of a live, uncut decoder, each on the decoder's own states.

    fit, held: token ids of the documents that are fitted, and of those that the ridge strength is chosen on. Each
    document passes through the layers before the last gap's end, once. Raises Refused (see `find_projection`), and
    where a state is not a number.
    """
    projections = [find_projection(decoder, gap.after) for gap in gaps]
    sums = []
    for sequences in (fit, held):
        moments, energies = [Moments() for _ in gaps], [0.0 for _ in gaps]
        for batch in batches(sequences, 4096 if decoder.device.type == "cpu" else 8192):
            for i, (features_NK, after_ND, before_ND) in _states(decoder, gaps, projections, form, batch):
                moments[i].update(features_NK * projections[i].scale, before_ND.double() - after_ND.double())
                energies[i] += before_ND.double().square().sum().item()
            progress(len(batch.rows))
        if not all(torch.isfinite(torch.tensor([m.energy, m.gram_KK.sum().item()])).all() for m in moments):
            raise Refused("the states of the uncut model are not a number: its weights are broken or overflow in this dtype")
        sums.append(moments)
    choices = [choose_ridge(on, off, STRENGTHS) for on, off in zip(*sums, strict=True)]
    return [
        Bridge(
            gap, Target(f"{decoder.path}.{gap.place}.{found.inside}", gap.place, found.inside, found.module), found.scale, form,
            choice, energy,
        )
        for gap, found, choice, energy in zip(gaps, projections, choices, energies, strict=True)
    ]  # fmt: skip


@torch.no_grad()
def _states(
    decoder: Decoder, gaps: Sequence[Gap], projections: Sequence[Projection], form: str, batch: TokenBatch
) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """For each gap (number i): its features, x^(after+1) and x^(before) at the batch's real tokens, (N, K or D)."""
    real = slice(None) if batch.mask_BT is None else batch.mask_BT.flatten().bool()
    features: dict[int, torch.Tensor] = {}
    after: dict[int, torch.Tensor] = {}
    before: dict[int, torch.Tensor] = {}

    def rows(states: torch.Tensor) -> torch.Tensor:
        where = real if isinstance(real, slice) else real.to(states.device)
        # some layers add to these tensors in place afterwards (Falcon), and a slice would be a view
        return states.reshape(-1, states.shape[-1])[where].clone()

    def hook(i: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            features[i] = rows(output if form == "map" else args[0])

        return see

    def watcher(layer: int) -> Callable[..., Any]:
        def forward(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            for i, gap in enumerate(gaps):
                if gap.before == layer:
                    before[i] = rows(first_hidden(args, kwargs))
            if layer == gaps[-1].before:
                raise Stop
            output = old(*args, **kwargs)
            for i, gap in enumerate(gaps):
                if gap.after == layer:
                    after[i] = rows(hidden_of(output))
            return output

        return forward

    watched = sorted({layer for gap in gaps for layer in (gap.after, gap.before)})
    handles = [p.module.register_forward_hook(hook(i)) for i, p in enumerate(projections)]
    try:
        with replaced_forwards((decoder.layers[i], watcher(i)) for i in watched), contextlib.suppress(Stop):
            forward_logits(decoder, batch.ids_BT, batch.mask_BT)
    finally:
        for handle in handles:
            handle.remove()
    for i in range(len(gaps)):
        device = features[i].device
        yield i, (features[i], after[i].to(device), before[i].to(device))


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
) -> dict[str, Any]:
    """Write a cut checkpoint with a linear bridge over each cut, fitted without training, to the folder `out`.

    model: a checkpoint that `prune_checkpoint` wrote and nobody trained since. teacher: the model it was cut from, by
    default the one that its layerprune.json names. data: `c4` or a file; `samples` documents of it count, each up to
    `length` tokens (None: 2048 or the model's context), a tenth of them only to choose the ridge strength. form: `map`
    (a D x D map of what the MLP adds) or `projection` (the projection's weight itself; more freedom, for which it
    needs more tokens). report: gets what is done, by default on stderr.

    The uncut model is loaded and run, without its layers after the last cut. Only one weight a cut changes (and its bias,
    with `map`); every other tensor is the cut's, byte for byte, and the architecture is. Where no bridge is better on
    the held-out documents, the weight stays. Memory: the uncut model, and four float64 matrices of the square of
    the projection's width, output (`map`) or input (`projection`).
    Returns what `out`/layerprune.json holds under "bridge": `bridges` has for each cut the `error` on the held-out
    documents, sum |x - x^(b)|^2 / sum |x^(b)|^2, of the cut as it was ("cut") and bridged ("bridged").
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
    _write(source, stored, out, replace, record, trust_remote_code, progress)
    return record


def split_documents(sequences: Sequence[list[int]], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """(documents to fit, documents held out): a tenth of them, at least one, drawn by `seed`. Refused for fewer than 2."""
    if len(sequences) < 2:
        raise Refused(f"a bridge needs at least 2 documents, one of them held out, and the data has {len(sequences)}")
    out = set(random.Random(seed).sample(range(len(sequences)), max(1, round(len(sequences) / 10))))
    return [s for i, s in enumerate(sequences) if i not in out], [s for i, s in enumerate(sequences) if i in out]


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
    return lines


def _write(
    source: ModelSource, stored: Mapping[str, StoredTensor], out: Path, replace: Replace, record: dict[str, Any],
    trust: bool, progress: bool,
) -> None:  # fmt: skip
    started = time.perf_counter()
    with new_folder(out) as folder:
        carry_over(source.folder, folder)
        with progress_bar(sum(t.nbytes for t in stored.values()), "write", "B", progress) as bar:
            write_checkpoint(stored, folder, replace, bar.update)
        meta_decoder(folder, trust)
        record["seconds"]["write"] = round(time.perf_counter() - started, 1)
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
"""
