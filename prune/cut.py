"""Cut a block of layers out of a checkpoint: plan, copy byte ranges, prove, publish."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.model.config import layer_count, load_config
from layerprune.model.cuts import Block, Kept, describe_dropped, drop_count, last_block, parse_layers
from layerprune.model.errors import UsageError
from layerprune.model.files import must_have_room, must_not_exist, new_folder, read_json, write_json, write_text
from layerprune.model.plan import CutPlan, plan_cut
from layerprune.model.source import ModelSource, find_model
from layerprune.model.tensors import StoredTensor, read_checkpoint
from layerprune.prune.card import model_card, serving_note

STRATEGIES = ("angular", "last")
_CARRIED = {".json", ".model", ".txt", ".jinja", ".py", ".tiktoken"}
_NOT_CARRIED = {
    "config.json", "layerprune.json", "README.md", "eval.json", "rank.json", "curve.json", "manifest.json",
    "hf_quant_config.json", "quantize_config.json",  # they name layers by their old indices; config.json has it all
}  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cut:
    """A cut that is planned and not yet written."""

    source: ModelSource
    stored: Mapping[str, StoredTensor]
    layers: int
    block: Block
    kept: Kept
    plan: CutPlan
    config: dict[str, Any]
    strategy: str
    distances: list[float] | None
    """Angular distance of every block of this size, by its start; None where nothing was ranked."""
    serving: str

    @property
    def distance(self) -> float | None:
        return None if self.distances is None else float(self.distances[self.block.start])

    @property
    def bytes(self) -> int:
        return sum(self.stored[name].nbytes for name in self.plan.renamed)

    @property
    def parameters(self) -> int:
        return sum(self.stored[name].numel for name in self.plan.renamed)


def choose_block(drop: float, layers: int, strategy: str, ranking: Mapping[str, Any] | None) -> Block:
    """The block that a fraction drops: the ranking's best start for n layers, or the last-n heuristic's."""
    n = drop_count(drop, layers)
    if strategy == "last":
        return last_block(n, layers)
    if ranking is None:
        raise UsageError("the angular strategy needs a ranking")
    return Block(int(ranking["best"][str(n)]), n)


def prune_checkpoint(
    model: str | Path,
    out: str | Path | None,
    *,
    drop: float | None = None,
    layers: str | None = None,
    strategy: str = "angular",
    ranking: str | Path | Mapping[str, Any] | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    verify: bool | None = None,
    too_large_for: str | None = None,
    dry_run: bool = False,
    progress: bool = False,
    say: Say = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """Write `model` without a block of its layers to the folder `out`.

    Give `drop` (fraction of layers; n = drop * L rounded half up) or `layers` ("8:16": 0-based, half-open). With
    `drop`, `strategy` "angular" takes the block of n with the smallest angular distance from `ranking` (a rank.json or
    its content; without one it ranks first, with calibration, samples, length, dtype and device), and "last" takes
    layers L-1-n .. L-2 (the last layer stays). With "last" and `layers` the model is never loaded for the choice.

    Bytes are copied, never decoded. Before the folder appears, structure (transformers' own loader on the meta
    device) and bytes are always proven, and logits against the virtually cut source where both fit in memory;
    verify=True proves logits in any case, verify=False never. too_large_for: the memory, in words, that the caller found too
    small for the source, so that its logits are not proven unless verify=True. dry_run: only plan (`out` may be None).
    Returns the content of layerprune.json and the plan ("renamed", "dropped_tensors"); `verified` says what was
    proven. Raises UsageError and Refused; nothing is left at `out` then.
    """
    from layerprune.prune.rank import rank_blocks, read_ranking

    if (drop is None) == (layers is None):
        raise UsageError("give either --drop (a fraction) or --layers A:B, not " + ("both" if drop is not None else "neither"))
    if strategy not in STRATEGIES:
        raise UsageError(f"--strategy {strategy} is none of {', '.join(STRATEGIES)}")
    if ranking is not None and (layers is not None or strategy != "angular"):
        raise UsageError("--ranking is for --drop with the angular strategy: leave it out")
    if out is None and not dry_run:
        raise UsageError("--out is missing: the folder for the cut checkpoint")
    if out is not None and not dry_run:
        must_not_exist(Path(out))
    source = find_model(str(model))
    count = layer_count(load_config(source.folder, trust_remote_code))
    if layers is not None:
        strategy, block = "layers", parse_layers(layers, count)
    else:
        assert drop is not None
        drop_count(drop, count)
        if strategy == "angular" and ranking is None:
            say("no --ranking given: ranking the blocks first")
            ranking = rank_blocks(
                model, data=calibration, samples=samples, length=length, seed=seed, dtype=dtype, device=device,
                trust_remote_code=trust_remote_code, progress=progress,
            )  # fmt: skip
        elif ranking is not None:
            ranking = read_ranking(ranking, source, count)
        block = choose_block(drop, count, strategy, ranking)
    distances = ranking["distance"][block.size - 1] if isinstance(ranking, Mapping) else None
    cut = plan_block(source, block, strategy, distances, trust_remote_code)
    if block.stop == count:
        say(
            f"warning: layers {block} include the last layer, which the head was trained on: expect a much worse model "
            "than with the last layer kept"
        )
    record = {**cut_record(cut), "seed": seed, "versions": versions()}
    if dry_run:
        verified: dict[str, str] = {}
    else:
        assert out is not None
        verified = write_cut(cut, Path(out), record, verify, trust_remote_code, progress, too_large_for)
        if verify is None and verified["logits"].startswith("skipped"):
            say(f"warning: the logits of the cut are not proven: {verified['logits']}")
    return {
        **record,
        "verified": verified,
        "renamed": dict(cut.plan.renamed),
        "dropped_tensors": list(cut.plan.dropped),
    }


def plan_block(
    source: ModelSource, block: Block, strategy: str, distances: list[float] | None, trust_remote_code: bool = False
) -> Cut:
    """Plan the cut of one block from config.json and the safetensors headers alone."""
    from layerprune.model.surgery import cut_config

    config = load_config(source.folder, trust_remote_code)
    count = layer_count(config)
    kept = block.kept(count)
    raw = read_json(source.folder / "config.json")
    stored = read_checkpoint(source.folder)
    plan = plan_cut(stored, count, kept)
    new = cut_config(raw, config, kept, plan.extra, plan.renamed)
    return Cut(source, stored, count, block, kept, plan, new, strategy, distances, serving_note(raw, new, config))


def cut_record(cut: Cut) -> dict[str, Any]:
    """What layerprune.json says of a cut (versions, seed and proofs are added when it is written)."""
    record: dict[str, Any] = {
        "source": cut.source.name,
        "hub_id": cut.source.hub_id,
        "revision": cut.source.revision,
        "recipe": cut.source.recipe.name if cut.source.recipe else None,
        "strategy": cut.strategy,
        "layers": cut.layers,
        "block": [cut.block.start, cut.block.stop],
        "dropped": describe_dropped(cut.kept, cut.layers),
        "kept": list(cut.kept),
        "distance": cut.distance,
        "distances": cut.distances,
        "parameters": cut.parameters,
        "bytes": cut.bytes,
        "serving": cut.serving,
    }
    before = cut.source.folder / "layerprune.json"
    if before.exists():
        earlier = read_json(before)
        record["previous"] = earlier
        record["hub_id"] = record["hub_id"] or earlier.get("hub_id")
    return record


def write_cut(
    cut: Cut, out: Path, record: dict[str, Any], verify: bool | None, trust_remote_code: bool, progress: bool,
    too_large_for: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write, prove and publish a planned cut; returns what was proven and how."""
    from layerprune.model.progress import progress_bar
    from layerprune.model.verify import prove_bytes, prove_structure
    from layerprune.model.write import write_checkpoint

    source = cut.source.folder
    must_have_room(out, cut.bytes + (64 << 20 if cut.bytes > 1 << 30 else 1 << 20))
    with new_folder(out) as folder:
        write_json(folder / "config.json", cut.config)
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        with progress_bar(cut.bytes, "copy", "B", progress) as bar:
            tensors = {new: cut.stored[old] for old, new in cut.plan.renamed.items()}
            write_checkpoint(tensors, folder, progress=bar.update)
        seconds["copy"] = round(time.perf_counter() - started, 3)
        copy_companions(source, folder)
        with _timed(seconds, "structure"):
            prove_structure(source, folder, cut.kept, trust_remote_code)
        with _timed(seconds, "bytes"), progress_bar(cut.bytes, "compare", "B", progress) as bar:
            prove_bytes(cut.stored, folder, cut.plan.renamed, bar.update)
        with _timed(seconds, "logits"):
            logits = _prove_logits(cut, folder, verify, trust_remote_code, progress, too_large_for)
        verified = {
            "structure": "proven: transformers finds every key, and every layer is built as in the source",
            "bytes": "proven: every tensor that stays is the source's",
            "logits": logits,
        }
        record |= {"verified": verified, "seconds": seconds}
        write_json(folder / "layerprune.json", record)
        write_text(folder / "README.md", model_card(record, out.name, source))
    return verified


@contextlib.contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[what] = round(time.perf_counter() - started, 3)


def _prove_logits(
    cut: Cut, folder: Path, verify: bool | None, trust_remote_code: bool, progress: bool, too_large_for: str | None
) -> str:
    from layerprune.model.verify import NotComputable, logits_check_dtype, prove_logits

    if verify is False:
        return "skipped (asked for)"
    if verify is None and too_large_for is not None:
        return f"skipped (the model does not fit in {too_large_for})"
    dtype = logits_check_dtype(cut.stored)
    if dtype is None:
        if not verify:
            return "skipped (the model does not fit in the free memory; --verify forces it)"
        dtype = "bfloat16"
    try:
        prove_logits(cut.source.folder, folder, cut.kept, dtype, trust_remote_code, progress)
    except NotComputable as refusal:
        if verify or not cut.config.get("quantization_config"):
            raise
        return f"skipped (the source is quantised and does not run here: {refusal})"
    return f"proven: bit for bit those of the virtually cut source ({dtype} on the CPU)"


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what belongs to a checkpoint beside its weights: tokenizer, generation config, chat template, code, licence."""
    for path in sorted(source.iterdir()):
        if path.name in _NOT_CARRIED or not path.is_file() or path.name.endswith(".index.json"):
            continue
        if path.suffix in _CARRIED or path.name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY")):
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    names = ("layerprune", "torch", "transformers", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def format_cut(result: Mapping[str, Any], out: str | None, plan: bool = False) -> str:
    """The result of `prune_checkpoint` for people; `plan` adds where every tensor goes."""
    kept, layers = result["kept"], result["layers"]
    near = "" if result["distance"] is None else f", angular distance {result['distance']:.4f}"
    lines = [
        f"{result['source']}: {layers} layers, {result['dropped']} dropped ({result['strategy']}{near}), {len(kept)} kept",
        f"{result['parameters']:,} parameters, {result['bytes'] / 1e9:.3g} GB; serving: {result['serving']}",
    ]
    if plan:
        lines += [f"  {old} -> {new}" for old, new in result["renamed"].items() if old != new]
        same = sum(old == new for old, new in result["renamed"].items())
        lines += [f"  {name} dropped" for name in result["dropped_tensors"]]
        lines.append(f"{same} tensors keep their name; nothing was written")
    else:
        lines += [f"{what}: {how}" for what, how in result["verified"].items()]
        lines.append(f"checkpoint: {out}")
    return "\n".join(lines)
