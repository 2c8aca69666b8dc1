"""Heal a checkpoint: pack data, train QLoRA on the MLPs, merge the adapter, write a new checkpoint."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerprune.heal.card import healed_card
from layerprune.heal.packing import check_one_sequence
from layerprune.heal.settings import Healing, heal_settings
from layerprune.model.config import load_config, vocab_size
from layerprune.model.data import check_data, check_token_id, data_fingerprint
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import (
    locked,
    made_folder,
    must_have_room,
    must_not_exist,
    new_folder,
    no_space_refusal,
    read_json,
    write_json,
    write_text,
)  # fmt: skip
from layerprune.model.fingerprint import checkpoint_fingerprint, tokenizer_fingerprint
from layerprune.model.load import load_tokenizer, pick_device
from layerprune.model.recipes import Recipe
from layerprune.model.source import ModelSource, find_model
from layerprune.model.tensors import StoredTensor, read_checkpoint

Say = Callable[[str], None]
_NOT_CARRIED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_RESULTS = {"layerprune.json", "README.md", "eval.json", "rank.json", "curve.json", "manifest.json"}


def _stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def heal_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    data: str | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    lora_rank: int | None = None,
    dropout: float | None = None,
    warmup_steps: int | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    length: int | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    work: str | Path | None = None,
    report: Say | None = None,
    recipe: Recipe | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train a (cut) checkpoint back with QLoRA on its MLPs, and write it with the adapter merged to the folder `out`.

    model: local folder, Hub id or recipe name. Settings that are None come from `recipe`, else from the recipe that
    the model came from, else from the paper's common ones (arXiv 2403.17887, App. A.1: 5000 steps of 16 sequences,
    peak learning rate 3e-4, LoRA rank 64 = alpha, dropout 0.05, 100 warm-up steps, cosine decay). data: `c4` or a
    file. batch_size: sequences a step; micro_batch: those in memory at once (a divisor of it; None: what fits).
    length: tokens of a packed sequence. targets: linear layers to train, by default all of the MLP's.
    adapter: folder for the LoRA adapter in peft's format, by default `out`/adapter; the record has its path from `out`.
    work: folder for the state that a killed run goes on from, by default the hidden sibling `.<name of out>.work`; it is
    removed at success.
    report: gets the cost line and what follows, by default on stderr.

    The base is held in NF4 with double quantisation; the merge is into the checkpoint's own weights, in float32,
    rounded once to their type, and every other tensor is copied byte for byte. On one CPU, the same seed gives the same
    bytes, also when the run was killed and started again.
    Returns what `out`/layerprune.json holds under "healing": settings, their origins, losses, seconds. Raises
    UsageError and Refused; nothing is left at `out` then.
    """
    say = report or _stderr
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when it is imported it recommends another package
    out = Path(out).absolute()
    work = out.parent / f".{out.name}.work" if work is None else Path(work).absolute()
    must_not_exist(out)
    source = find_model(str(model))
    config = load_config(source.folder, trust_remote_code)
    settings = heal_settings(
        config, recipe or source.recipe, data=data, steps=steps, learning_rate=learning_rate, lora_rank=lora_rank,
        dropout=dropout, warmup_steps=warmup_steps, batch_size=batch_size, micro_batch=micro_batch, length=length,
        targets=targets, seed=seed,
    )  # fmt: skip
    chosen = pick_device(device)
    check_device(chosen)
    stored = read_checkpoint(source.folder)
    _refuse_quantised(source, config, stored)
    check_data(settings.data, "--heal-data", "train", seed)
    must_have_room(out, sum(t.nbytes for t in stored.values()))
    say(cost_line(settings))
    _refuse_fused(source, settings, trust_remote_code)
    with _work_folder(work, _identity(source, settings, chosen), out) as resumed:
        outside = None if adapter is None else Path(adapter).absolute()
        # an adapter beside the result that a killed run of ours had already put there is made again
        if outside is not None and outside.exists() and not (resumed and (work / "adapter").exists()):
            must_not_exist(outside)
        if not (work / "trained.json").exists():
            _train(source, settings, work, None if device in (None, "auto") else chosen, chosen, trust_remote_code, say, progress)
        trained = read_json(work / "trained.json")
        healing = _record(source, settings, chosen, trained, out, outside)
        healing["seconds"] = _write(source, stored, work, out, outside, healing, trained, trust_remote_code, say, progress)
    shutil.rmtree(work, ignore_errors=True)
    return healing


def check_device(device: str) -> None:
    """Refuse a GPU other than the first: accelerate trains a 4-bit model there only."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and index not in ("", "0"):
        raise UsageError(f"--device {device} cannot heal: set CUDA_VISIBLE_DEVICES={index} and leave --device out")


def check_healing(
    source: ModelSource, *, data: str, seed: int = 0, trust_remote_code: bool = False, **settings: Any
) -> None:
    """Refuse what healing `source`, or a cut of it, would refuse; nothing is loaded but the tokenizer and the data.

    settings: those of `heal_settings`. A local file is read to its end and must fill one sequence.
    """
    config = load_config(source.folder, trust_remote_code)
    chosen = heal_settings(config, source.recipe, data=data, seed=seed, **settings)
    _refuse_quantised(source, config, read_checkpoint(source.folder))
    _refuse_fused(source, chosen, trust_remote_code)
    if data != "c4":
        check_one_sequence(load_tokenizer(source.folder, trust_remote_code), data, chosen.length, seed)


def cost_line(settings: Healing) -> str:
    """What a healing will cost in steps and tokens, for people."""
    where = {"paper": "the paper's settings", "ours": "our settings"}
    others = sorted({where[o] for key, o in settings.origin.items() if o in where and key not in ("seed", "micro_batch")})
    return (
        f"healing: {settings.steps:,} steps of {settings.batch_size} x {settings.length} = {settings.tokens:,} tokens of "
        f"{settings.data}, LoRA rank {settings.lora_rank}, peak learning rate {settings.learning_rate:g}"
        + (f" ({', '.join(others)} where you gave none)" if others else "")
    )


def _refuse_quantised(source: ModelSource, config: Any, stored: Mapping[str, StoredTensor]) -> None:
    from layerprune.heal.merge import DTYPES

    if getattr(config, "quantization_config", None) is not None:
        raise Refused(f"{source.name} is quantised already: heal its unquantised checkpoint, then quantise the result")
    odd = next((t for t in stored.values() if t.dtype not in DTYPES and t.dtype.startswith(("F", "C"))), None)
    if odd is not None:
        raise Refused(f"{source.name} stores {odd.name} as {odd.dtype}: heal a bf16, fp16 or fp32 checkpoint")


def _refuse_fused(source: ModelSource, settings: Healing, trust: bool) -> None:
    from layerprune.heal.targets import refuse_fused_experts
    from layerprune.model.verify import meta_decoder

    if not settings.targets:
        refuse_fused_experts(meta_decoder(source.folder, trust))


def _identity(source: ModelSource, settings: Healing, device: str) -> dict[str, Any]:
    """What decides the trained weights: a started healing is gone on with only if all of it is the same."""
    chosen = settings.record()
    del chosen["micro_batch"]  # a run that ran out of memory may go on with a smaller one
    return {
        **chosen,
        "data": data_fingerprint(settings.data),
        "model": checkpoint_fingerprint(source.folder),
        "tokenizer": tokenizer_fingerprint(source.folder),
        "device": device.partition(":")[0],
    }


@contextlib.contextmanager
def _work_folder(work: Path, identity: dict[str, Any], out: Path) -> Iterator[bool]:
    """Open `work` for one process; yields whether it holds a healing that was begun. UsageError for another one's."""
    from layerprune.heal.trainer import newest_checkpoint

    state = work / "heal.json"
    with no_space_refusal(out), made_folder(work), locked(work, "healing"):
        resumed = state.exists()
        if resumed:
            before = read_json(state)
            changed = sorted(key for key in identity if before.get(key) != identity[key])
            if changed:
                told = "; ".join(f"{key} was {before.get(key)}, now {identity[key]}" for key in changed[:3])
                raise UsageError(
                    f"{work} holds a healing for {out} that was begun with other settings ({told}): give the same settings "
                    "to go on with it, or remove that folder"
                )
        try:
            if not resumed:
                write_json(state, identity)
            yield resumed
        except Exception:
            # a refusal before the first saved step leaves nothing worth going on from
            if not resumed and newest_checkpoint(work) is None and not (work / "trained.json").exists():
                for path in work.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise


def _train(
    source: ModelSource, settings: Healing, work: Path, device: str | None, chosen: str, trust: bool, say: Say, progress: bool
) -> None:
    """Pack, load, train; leaves work/adapter and work/trained.json."""
    from layerprune.heal import trainer
    from layerprune.heal.merge import locate
    from layerprune.heal.packing import pack
    from layerprune.heal.targets import choose_targets, probe_forward, target_pattern
    from layerprune.model.decoder import view_decoder
    from layerprune.model.progress import progress_bar
    from layerprune.model.verify import meta_decoder

    tokenizer = load_tokenizer(source.folder, trust)
    sequences = settings.steps * settings.batch_size
    packed = pack(tokenizer, settings.data, sequences, settings.length, settings.seed, work, progress)
    check_token_id(int(packed.ids_NT.max()), vocab_size(load_config(source.folder, trust)))
    if packed.epochs > 1:
        say(f"the data is shorter than {settings.tokens:,} tokens: it is gone through {packed.epochs} times")
    compute = trainer.compute_dtype(chosen)
    with trainer.quiet_warnings():
        keep = trainer.unquantised(meta_decoder(source.folder, trust).model, chosen)
        live = trainer.load_quantised(source.folder, device, compute, keep, trust, progress)
        decoder = view_decoder(live)
        extra = probe_forward(decoder)
        targets = choose_targets(decoder, settings.targets)
    with progress_bar(len(targets), "find weights", "layer", progress) as bar:
        where = locate(targets, read_checkpoint(source.folder), len(decoder), bar.update)
    pattern = target_pattern(decoder, targets)
    live = trainer.add_lora(live, pattern, settings)
    trainable = sum(p.numel() for p in live.parameters() if p.requires_grad)
    leaves = sorted({target.inside for target in targets})
    memory = _memory(live, settings, chosen, extra, work)
    exempt = sum(target.name in keep for target in targets)
    if exempt:
        say(f"{exempt} of the {len(targets)} linear layers stay unquantised: their widths do not fit NF4's blocks of 64")
    say(
        f"{trainable:,} trainable parameters in {len(targets)} linear layers ({', '.join(leaves)}); NF4 base, "
        f"{str(compute).removeprefix('torch.')} on {chosen}, {memory.micro_batch} of {settings.batch_size} sequences at once"
        f"{', gradient checkpointing' if memory.checkpointing else ''}"
    )
    losses = trainer.train(live, packed, settings, work=work, device=chosen, memory=memory, extra=extra, say=say, progress=progress)
    # peft would write the folder of this machine into the adapter; what the user calls the model means more
    live.peft_config["default"].base_model_name_or_path = source.hub_id or source.name
    shutil.rmtree(work / "adapter", ignore_errors=True)
    with new_folder(work / "adapter") as folder, trainer.quiet_warnings():
        live.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    about = {
        "losses": {key: losses[key] for key in ("first", "last", "curve")},
        "seconds": losses["seconds"],
        "documents": packed.documents,
        "epochs": packed.epochs,
        "trainable": trainable,
        "modules": leaves,
        "micro_batch": memory.micro_batch,
        "checkpointing": memory.checkpointing,
        "compute": str(compute).removeprefix("torch."),
        "where": {module: [place.name, place.transposed] for module, place in where.items()},
    }
    write_json(work / "trained.json", about)


def _memory(live: Any, settings: Healing, device: str, extra: Mapping[str, int], work: Path) -> Any:
    """What the user gave, else what this healing was begun with, else what fits."""
    from layerprune.heal.trainer import Memory, choose_memory

    begun = work / "memory.json"
    if settings.micro_batch is None and begun.exists():
        return Memory(**read_json(begun))
    memory = choose_memory(live, settings, device, extra)
    write_json(begun, asdict(memory))
    return memory


def _record(
    source: ModelSource, settings: Healing, device: str, trained: Mapping[str, Any], out: Path, outside: Path | None
) -> dict[str, Any]:
    names = ("layerprune", "torch", "transformers", "peft", "bitsandbytes", "accelerate")
    return {
        "model": source.name,
        "recipe": source.recipe.name if source.recipe else None,
        # the file's name is enough beside its fingerprint: this record goes where the checkpoint goes
        "settings": {**settings.record(), "data": Path(settings.data).name, "micro_batch": trained["micro_batch"]},
        "origin": settings.origin,
        "quantisation": f"NF4, double quantisation, {trained['compute']} compute",
        "device": device,
        "gradient_checkpointing": trained["checkpointing"],
        "steps": settings.steps,
        "tokens": settings.tokens,
        "documents": trained["documents"],
        "epochs": trained["epochs"],
        "data_fingerprint": data_fingerprint(settings.data),
        "trainable": trained["trainable"],
        "modules": trained["modules"],
        "losses": trained["losses"],
        "adapter": os.path.relpath(outside, out) if outside is not None else "adapter",
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def _write(
    source: ModelSource, stored: Mapping[str, StoredTensor], work: Path, out: Path, outside: Path | None,
    healing: dict[str, Any], trained: Mapping[str, Any], trust: bool, say: Say, progress: bool,
) -> dict[str, float]:  # fmt: skip
    """Merge, prove that the result loads, and publish: first the adapter, then the checkpoint."""
    from layerprune.heal.merge import Stored, merge_adapter
    from layerprune.model.progress import progress_bar
    from layerprune.model.verify import meta_decoder

    say("merging the adapter")
    started = time.perf_counter()
    total = sum(t.nbytes for t in stored.values())
    with new_folder(out) as folder:
        for path in sorted(source.folder.iterdir()):
            if path.is_file() and path.name not in _RESULTS and not path.name.endswith(_NOT_CARRIED):
                shutil.copyfile(path, folder / path.name)
        templates = source.folder / "additional_chat_templates"
        if templates.is_dir():
            shutil.copytree(templates, folder / templates.name)
        where = {module: Stored(name, transposed) for module, (name, transposed) in trained["where"].items()}
        with progress_bar(total, "merge", "B", progress) as bar:
            merge_adapter(source.folder, work / "adapter", folder, where, bar.update)
        meta_decoder(folder, trust)
        seconds = {"train": trained["seconds"], "merge": round(time.perf_counter() - started, 1)}
        before = source.folder / "layerprune.json"
        record = read_json(before) if before.exists() else {"source": source.name, "hub_id": source.hub_id}
        record["healing"] = {**healing, "seconds": seconds}
        write_json(folder / "layerprune.json", record)
        write_text(folder / "README.md", healed_card(record, out.name, source.folder))
        if outside is None:
            shutil.copytree(work / "adapter", folder / "adapter")
        else:
            shutil.rmtree(outside, ignore_errors=True)
            with new_folder(outside) as beside:
                shutil.copytree(work / "adapter", beside, dirs_exist_ok=True)
    return seconds


def format_healing(result: Mapping[str, Any], out: str | None) -> str:
    """The result of `heal_checkpoint` for people."""
    losses, seconds = result["losses"], result["seconds"]
    chosen = ", ".join(f"{key} {value}" for key, value in _told(result).items())
    lines = [
        f"{result['model']}: {result['steps']:,} steps, {result['tokens']:,} tokens of {result['documents']:,} documents",
        f"settings: {chosen}",
        f"trained: {result['trainable']:,} parameters in {', '.join(result['modules'])} ({result['quantisation']})",
        f"training loss {losses['first']:.4f} -> {losses['last']:.4f} nats a token in {seconds['train']:,.0f} s; merged in "
        f"{seconds['merge']:,.0f} s",
        f"adapter: {result['adapter'] if out is None else Path(out) / result['adapter']}",
    ]
    return "\n".join(lines + ([f"checkpoint: {out}"] if out is not None else []))


def _told(result: Mapping[str, Any]) -> dict[str, str]:
    settings, origin = result["settings"], result["origin"]
    wanted = ("lora_rank", "learning_rate", "batch_size", "length", "warmup_steps", "dropout")
    return {key: f"{settings[key]:g} ({origin[key]})" for key in wanted}
