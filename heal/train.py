"""Heal a checkpoint: pack data, train QLoRA on the MLPs, merge the adapter, write a new checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerprune.heal.card import healed_card
from layerprune.heal.carry import carry_over
from layerprune.heal.checkpoints import newest_checkpoint
from layerprune.heal.memory import Memory
from layerprune.heal.packing import check_one_sequence
from layerprune.heal.prepare import adapter_range, process_device
from layerprune.heal.settings import Healing, heal_settings
from layerprune.heal.teacher import Teacher, find_teacher, kept_layers
from layerprune.heal.world import check_world, first_alone, rank, world_size
from layerprune.model.config import layer_count, load_config, vocab_size
from layerprune.model.cuts import Kept
from layerprune.model.data import check_data, check_token_id, data_fingerprint, document_hash
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
from layerprune.model.memory import byte_count
from layerprune.model.recipes import Recipe
from layerprune.model.source import ModelSource, find_model
from layerprune.model.tensors import StoredTensor, read_checkpoint

Say = Callable[[str], None]
_MEASURED = 32
"""Of the validation documents, all of which training leaves out, those that the loss is measured on while it runs."""


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
    tokens: int | None = None,
    packing: str | None = None,
    adapters: str | None = None,
    distil: float | None = None,
    teacher: str | Path | None = None,
    bridge: str | None = None,
    merge: str | None = None,
    validation: str | None = None,
    validation_samples: int | None = None,
    memory: str | int | None = None,
    report_to: Sequence[str] = (),
    origins: Mapping[str, str] | None = None,
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    work: str | Path | None = None,
    report: Say | None = None,
    recipe: Recipe | str | None = None,
    nf4_copy: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Train a (cut) checkpoint back with QLoRA on its MLPs, and write it with the adapter merged to the folder `out`.

    model: local folder, Hub id or recipe name. Settings that are None come from `recipe`, else from the recipe that
    the model came from, else from the paper's common ones (arXiv 2403.17887, App. A.1: 5000 steps of 16 sequences,
    peak learning rate 3e-4, LoRA rank 64 = alpha, dropout 0.05, 100 warm-up steps, cosine decay). data: `c4` or a
    file. batch_size: sequences a step; micro_batch: those in memory at once (a divisor of it; None: what fits).
    length: tokens of a packed sequence. targets: linear layers to train, by default all of the MLP's; `mlp`, `attention` or
    names. tokens: instead of steps. packing, adapters, distil, bridge, merge, validation: as in `Healing`.
    teacher: the unpruned model, for distil and bridge; by default the one that the cut's record names.
    memory: bytes of the GPU that may be taken, as a number or as text such as `16GiB`; None for most of what is free.
    report_to: what transformers' Trainer reports to besides: tensorboard, wandb, trackio, ... origins: where settings that a
    caller gives came from, if not from the user.
    adapter: folder for the LoRA adapter in peft's format, by default `out`/adapter; the record has its path from `out`.
    work: folder for the state that a killed run goes on from, by default the hidden sibling `.<name of out>.work`; it is
    removed at success.
    report: gets the cost line and what follows, by default on stderr. nf4_copy: write the result once more, in NF4, to the new
    folder `out`-nf4 (`layerprune.heal.copy4bit`).

    The base is held in NF4 with double quantisation, or decoded from it where memory allows; the merge is in float32, rounded
    once, and every tensor that was not trained is copied byte for byte (merge="weights"). On one CPU, the same seed gives the
    same weights to the last bit, also when the run was killed and started again.
    Under `accelerate launch` every process calls this; the first one packs and writes, all of them train.
    Returns what `out`/layerprune.json holds under "healing": settings, their origins, losses, seconds. Raises
    UsageError and Refused; nothing is left at `out` then.
    """
    say = (report or _stderr) if rank() == 0 else _nobody
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when it is imported it recommends another package
    # fewer bytes that the allocator holds and no tensor uses; read when the GPU is first touched
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    out = Path(out).absolute()
    work = out.parent / f".{out.name}.work" if work is None else Path(work).absolute()
    check_reports(report_to)

    copy = out.with_name(f"{out.name}-nf4") if nf4_copy else None

    def begin() -> bool:
        """Whether only the copy is missing."""
        healed = (out / "layerprune.json").exists() and (work / "trained.json").exists()
        if healed and copy is not None and not copy.exists():
            return True
        if healed:
            shutil.rmtree(work)  # of a healing that was killed after all but this was done
        must_not_exist(out)
        if copy is not None:
            must_not_exist(copy)
        return False

    if first_alone(begin, device or "auto"):
        _copy_4bit(out, copy, process_device(pick_device(device)), trust_remote_code, say, progress)
        if rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        return dict(read_json(out / "layerprune.json")["healing"])
    source = find_model(str(model))
    budget = byte_count(memory, "--memory")
    config = load_config(source.folder, trust_remote_code)
    settings = heal_settings(
        config, recipe or source.recipe, data=data, steps=steps, learning_rate=learning_rate, lora_rank=lora_rank,
        dropout=dropout, warmup_steps=warmup_steps, batch_size=batch_size, micro_batch=micro_batch, length=length,
        targets=targets, seed=seed, tokens=tokens, packing=packing, adapters=adapters, distil=distil, bridge=bridge, merge=merge,
        validation=validation, validation_samples=validation_samples, origins=origins,
    )  # fmt: skip
    chosen = process_device(pick_device(device))
    check_device(chosen)
    check_world(settings.batch_size, chosen)
    stored = read_checkpoint(source.folder)
    _refuse_quantised(source, config, stored)
    check_data(settings.data, "--heal-data", "train", seed)
    if settings.validation is not None:
        check_data(settings.validation, "--validation", "validation", seed)
    must_have_room(out, sum(t.nbytes for t in stored.values()) * (2 if settings.bridge else 1))
    pair = _teacher(source, settings, teacher, trust_remote_code)
    adapter_range(settings, _kept(source), layer_count(config))
    say(cost_line(settings))
    say(origin_lines(settings))
    if settings.steps:
        _refuse_fused(source, settings, trust_remote_code)
    job = Job(
        source, stored, settings, pair, work, out, None if adapter is None else Path(adapter).absolute(), chosen,
        device in (None, "auto") and world_size() == 1, budget, tuple(report_to), trust_remote_code, say, progress,
    )  # fmt: skip
    if settings.steps == 0:
        bridged = job.bridge_only()
        _copy_4bit(out, copy, chosen, trust_remote_code, say, progress)
        return bridged
    with _work_folder(work, _identity(source, settings, chosen, pair), out, chosen) as resumed:
        # an adapter beside the result that a killed run of ours had already put there is made again
        if job.outside is not None and job.outside.exists() and not (resumed and (work / "adapter").exists()):
            must_not_exist(job.outside)
        job = job.bridged()
        if not first_alone((work / "trained.json").exists, chosen):
            job.train()
        healing = first_alone(job.finish, chosen)
    _copy_4bit(out, copy, chosen, trust_remote_code, say, progress)
    if rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
    return healing


def _copy_4bit(out: Path, copy: Path | None, device: str, trust: bool, say: Say, progress: bool) -> None:
    """The result once more in NF4, where that was asked for; by the first process."""
    if copy is None:
        return
    from layerprune.heal.copy4bit import write_nf4_copy

    say("quantising a copy")
    found = first_alone(lambda: write_nf4_copy(out, copy, device, trust, progress), device)
    say(f"  NF4: {found['quantised']} layers in {copy}, {found['bytes'] / 1e6:,.0f} MB")


def _nobody(line: str) -> None:
    """What processes other than the first one say."""


def _kept(source: ModelSource) -> Kept | None:
    """The layers that were kept, by the checkpoint's own record; None where it is no cut."""
    path = source.folder / "layerprune.json"
    record = read_json(path) if path.exists() else {}
    return kept_layers(source) if isinstance(record, Mapping) and "kept" in record else None


def _teacher(source: ModelSource, settings: Healing, given: str | Path | None, trust: bool) -> Teacher | None:
    if settings.distil and settings.bridge:
        raise UsageError(
            "--distil and --bridge cannot be combined: a bridged checkpoint no longer shares its weights with its teacher"
        )
    if not (settings.distil or settings.bridge):
        if given is not None:
            raise UsageError(f"--teacher {given} is for --distil or --bridge: give one of them, or leave it out")
        return None
    return find_teacher(source, None if given is None else str(given), trust)


def check_reports(report_to: Sequence[str]) -> None:
    """Refuse what transformers' Trainer cannot report to here, before anything expensive starts."""
    if not report_to:
        return
    from transformers.integrations import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    odd = [name for name in report_to if name not in (*there, "all", "none")]
    if odd:
        raise UsageError(
            f"--report-to {odd[0]} is not to be had here: install its package"
            + (f", or take one of {', '.join(there)}" if there else "")
        )


def check_device(device: str) -> None:
    """Refuse a GPU other than the first: accelerate trains a 4-bit model there only."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and index not in ("", "0") and world_size() == 1:
        raise UsageError(f"--device {device} cannot heal: set CUDA_VISIBLE_DEVICES={index} and leave --device out")


def check_healing(source: ModelSource, *, data: str, seed: int = 0, trust_remote_code: bool = False, **settings: Any) -> None:
    """Refuse what healing `source`, or a cut of it, would refuse; nothing is loaded but the tokenizer and the data.

    settings: those of `heal_checkpoint`. A local file is read to its end and must fill one sequence.
    """
    config = load_config(source.folder, trust_remote_code)
    byte_count(settings.pop("memory", None), "--memory")
    check_reports(settings.get("report_to") or ())
    elsewhere = {key: settings.pop(key) for key in ("report_to", "teacher") if key in settings}
    chosen = heal_settings(config, source.recipe, data=data, seed=seed, **settings)
    if "teacher" in elsewhere and not (chosen.distil or chosen.bridge):
        raise UsageError(f"--teacher {elsewhere['teacher']} is for --distil or --bridge: give one of them, or leave it out")
    _refuse_quantised(source, config, read_checkpoint(source.folder))
    _refuse_fused(source, chosen, trust_remote_code)
    if data != "c4":
        check_one_sequence(load_tokenizer(source.folder, trust_remote_code), data, chosen.length, seed)


def origin_lines(settings: Healing) -> str:
    """Every setting with where it came from, for people."""
    shown = {**settings.record(), "lora_alpha": settings.lora_rank, "targets": ", ".join(settings.targets) or "the MLP's"}
    by: dict[str, list[str]] = {}
    for key, value in shown.items():
        if value is not None and value != 0.0:
            by.setdefault(settings.origin.get(key, settings.origin["lora_rank"]), []).append(f"{key} {value}")
    return "\n".join(f"  {who}: {', '.join(by[who])}" for who in ("user", "paper", "ours") if who in by)


def plan_line(memory: Memory, student: Any, settings: Healing) -> str:
    """What the memory plan keeps, and the hours that the measured step makes, for people."""
    from layerprune.heal.memory import GIB, trained_layers
    from layerprune.heal.watch import duration

    trained, layers = len(trained_layers(student)), len(student.decoder)
    share = settings.batch_size // world_size()
    told = [f"{memory.micro_batch} of {share} sequences at once"]
    told.append(f"weights decoded in {memory.decoded} of {layers} layers")
    kept = f"activations of {trained - memory.recomputed} of {trained} trained layers kept"
    told.append(kept + (", the others computed again" if memory.recomputed else ""))
    if memory.compiled:
        told.append("layers compiled")
    line = "plan: " + "; ".join(told)
    if memory.estimate is not None:
        line += f"; at most {memory.estimate / GIB:.1f} GiB"
    if memory.seconds:
        rate = settings.batch_size * settings.length / memory.seconds
        line += f"\nmeasured: {memory.seconds:.3g} s a step, {rate:,.0f} tokens/s: {settings.steps:,} steps take about "
        line += duration(memory.seconds * settings.steps)
    return line


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


def _identity(source: ModelSource, settings: Healing, device: str, teacher: Teacher | None) -> dict[str, Any]:
    """What decides the trained weights: a started healing is gone on with only if all of it is the same."""
    chosen = settings.record()
    del chosen["micro_batch"]  # a run that ran out of memory may go on with a smaller one
    return {
        **chosen,
        "data": data_fingerprint(settings.data),
        "validation": None if settings.validation is None else data_fingerprint(settings.validation),
        "model": checkpoint_fingerprint(source.folder),
        "tokenizer": tokenizer_fingerprint(source.folder),
        "teacher": None if teacher is None else checkpoint_fingerprint(teacher.source.folder),
        "device": device.partition(":")[0],
        "processes": world_size(),
    }


@contextlib.contextmanager
def _work_folder(work: Path, identity: dict[str, Any], out: Path, device: str) -> Iterator[bool]:
    """Open `work` for one process, or the first of several; yields whether it holds a healing that was begun.

    UsageError for another one's.
    """
    state = work / "heal.json"

    def begin() -> bool:
        stack.enter_context(made_folder(work))
        stack.enter_context(locked(work, "healing"))
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
        else:
            write_json(state, identity)
        return resumed

    with contextlib.ExitStack() as stack:
        stack.enter_context(no_space_refusal(out))
        resumed = first_alone(begin, device)
        try:
            yield resumed
        except Exception:
            # a refusal before the first saved step leaves nothing worth going on from
            kept = newest_checkpoint(work, remove=False) is not None or (work / "trained.json").exists()
            if rank() == 0 and not resumed and not kept:
                for path in work.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise


@dataclass(frozen=True)
class Job:
    """One healing, resolved and checked. source: what is trained; teacher: the unpruned model, for distil and bridge."""

    source: ModelSource
    stored: Mapping[str, StoredTensor]
    settings: Healing
    teacher: Teacher | None
    work: Path
    out: Path
    outside: Path | None
    """Folder for the adapter where it does not lie in `out`."""
    device: str
    spread: bool
    budget: int | None
    report_to: tuple[str, ...]
    trust: bool
    say: Say
    progress: bool

    def bridge_only(self) -> dict[str, Any]:
        """The bridged checkpoint as the result, without any training."""
        return first_alone(lambda: self._bridge(self.out), self.device)

    def bridged(self) -> Job:
        """This job on the bridged checkpoint, which is made first; itself where no bridge is asked for."""
        if self.settings.bridge is None:
            return self
        folder = self.work / "bridged"

        def make() -> None:
            if not folder.exists():
                self._bridge(folder)

        first_alone(make, self.device)
        source = replace(self.source, folder=folder)
        return replace(self, source=source, stored=read_checkpoint(folder), teacher=None)

    def _bridge(self, out: Path) -> dict[str, Any]:
        from layerprune.heal.bridge import bridge_checkpoint

        assert self.settings.bridge is not None and self.teacher is not None
        self.say("solving for the bridge over the cut")
        return dict(bridge_checkpoint(
            self.source.folder, out, teacher=self.teacher.source.folder, data=self.settings.data, length=self.settings.length,
            form=self.settings.bridge, seed=self.settings.seed, device=self.device, trust_remote_code=self.trust,
            progress=self.progress, report=self.say, exclude=frozenset(map(document_hash, self._held_out())),
        ))  # fmt: skip

    def train(self) -> None:
        """Pack, load, train; leaves work/adapter and work/trained.json."""
        from layerprune.heal.prepare import plan_memory, prepare
        from layerprune.heal.trainer import save_adapter, train

        settings, work, say = self.settings, self.work, self.say
        tokenizer = load_tokenizer(self.source.folder, self.trust)
        vocab = vocab_size(load_config(self.source.folder, self.trust))
        held = first_alone(self._held_out, self.device)
        packed = self._packed(tokenizer, held)
        check_token_id(int(packed.ids_NT.max()), vocab)
        if packed.epochs > 1:
            say(f"the data is shorter than {settings.tokens:,} tokens: it is gone through {packed.epochs} times")
        validation = [tokenizer(text, verbose=False)["input_ids"][: settings.length] for text in held[:_MEASURED]]
        validation = [ids for ids in validation if len(ids) > 1]
        made = prepare(
            self.source, settings, _kept(self.source), self.teacher, self.device, self.spread, self.trust, say, self.progress
        )
        several = int(packed.starts_NT[:64].sum(axis=1).argmax())
        positions = torch.from_numpy(packed.positions(several)) if made.separate else None
        memory = plan_memory(made, settings, self.device, self.budget, positions, work, say)
        say(
            f"{made.trainable:,} trainable parameters in {len(made.where)} linear layers ({', '.join(made.leaves)}); NF4 base, "
            f"{str(made.compute).removeprefix('torch.')} on {self.device}"
        )
        say(plan_line(memory, made.student, settings))
        losses = train(
            made.live, made.student, packed, settings, work=work, device=self.device, memory=memory, separate=made.separate,
            validation=validation, vocab=vocab, say=say, progress=self.progress, report_to=self.report_to,
            finish=lambda trainer: save_adapter(
                trainer, made.live, work / "adapter", made.renamed, made.pattern, self.source.hub_id or self.source.name
            ),
        )  # fmt: skip
        about = {
            "losses": {key: losses[key] for key in ("first", "last", "curve")},
            "held_out": losses["held_out"],
            "seconds": losses["seconds"],
            "processes": losses["processes"],
            "documents": packed.documents,
            "epochs": packed.epochs,
            "tokens": packed.tokens,
            "order": packed.order,
            "validation": {
                "documents": len(held),
                "measured": len(validation),
                "hash": hashlib.sha256(b"".join(sorted(map(document_hash, held)))).hexdigest(),
                "left_out": packed.excluded,
            },
            "trainable": made.trainable,
            "modules": made.leaves,
            "separate": made.separate,
            "memory": {**memory.record(), "peak": losses["peak"]},
            "compute": str(made.compute).removeprefix("torch."),
            "where": {module: [place.name, place.transposed] for module, place in made.where.items()},
            "quantised": {module: [place.name, place.transposed] for module, place in made.quantised.items()},
        }
        first_alone(lambda: write_json(work / "trained.json", about), self.device)

    def _held_out(self) -> list[str]:
        from layerprune.heal.packing import validation_documents

        chosen = self.settings
        if chosen.validation_samples == 0:
            return []
        return validation_documents(chosen.validation, chosen.data, chosen.validation_samples, chosen.seed)

    def _packed(self, tokenizer: Any, held: Sequence[str]) -> Any:
        from layerprune.heal.packing import pack

        chosen = self.settings

        def make() -> Any:
            return pack(
                tokenizer, chosen.data, chosen.steps * chosen.batch_size, chosen.length, chosen.seed, self.work, self.progress,
                packing="truncate" if chosen.packing == "truncate" else "documents", exclude=frozenset(map(document_hash, held)),
            )  # fmt: skip

        first_alone(lambda: make() and None, self.device)
        return make()  # reads what the first process wrote

    def finish(self) -> dict[str, Any]:
        """Merge, prove, publish; returns the record."""
        trained = read_json(self.work / "trained.json")
        healing = self._record(trained)
        healing["seconds"] = self._write(healing, trained)
        return healing

    def _keep_bridge(self) -> None:
        """The bridged tensors beside the adapter, which was trained on them: with these in the cut it fits."""
        from safetensors.torch import save_file

        from layerprune.heal.merge import read_tensor

        bridges = read_json(self.source.folder / "layerprune.json")["bridge"]["bridges"]
        tensors = {bridge["tensor"]: read_tensor(self.stored[bridge["tensor"]]) for bridge in bridges}
        save_file(tensors, self.work / "adapter" / "bridge.safetensors", metadata={"format": "pt"})

    def _record(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        names = ("layerprune", "torch", "transformers", "peft", "bitsandbytes", "accelerate")
        chosen, source, settings = self.settings.record(), self.source, self.settings
        # the file's name is enough beside its fingerprint: this record goes where the checkpoint goes
        chosen |= {"data": Path(settings.data).name, "micro_batch": trained["memory"]["micro_batch"]}
        chosen["validation"] = None if settings.validation is None else Path(settings.validation).name
        return {
            "model": source.name,
            "recipe": source.recipe.name if source.recipe else None,
            "settings": {**chosen, "lora_alpha": settings.lora_rank},
            "origin": settings.origin,
            "teacher": None if self.teacher is None else self.teacher.source.name,
            "quantisation": f"NF4, double quantisation, {trained['compute']} compute",
            "device": self.device,
            "processes": trained["processes"],
            "memory": trained["memory"],
            "documents_apart": trained["separate"],
            "steps": settings.steps,
            "tokens": trained["tokens"],
            "documents": trained["documents"],
            "epochs": trained["epochs"],
            "order": trained["order"],
            "validation": trained["validation"],
            "data_fingerprint": data_fingerprint(settings.data),
            "trainable": trained["trainable"],
            "modules": trained["modules"],
            "losses": trained["losses"],
            "held_out": trained["held_out"],
            "adapter": os.path.relpath(self.outside, self.out) if self.outside is not None else "adapter",
            "versions": {name: importlib.metadata.version(name) for name in names},
        }

    def _write(self, healing: dict[str, Any], trained: Mapping[str, Any]) -> dict[str, float]:
        """Merge, prove that the result is the adapter over the source, and publish: first the adapter, then the checkpoint."""
        from layerprune.heal.merge import Stored, merge_adapter
        from layerprune.heal.proof import prove_healed
        from layerprune.model.progress import progress_bar

        source, work, out = self.source, self.work, self.out
        self.say("merging the adapter")
        started = time.perf_counter()
        total = sum(t.nbytes for t in self.stored.values())
        where, quantised = (
            {module: Stored(name, transposed) for module, (name, transposed) in trained[key].items()}
            for key in ("where", "quantised")
        )
        compute = getattr(torch, trained["compute"])
        if self.settings.bridge is not None:
            self._keep_bridge()
        with new_folder(out) as folder:
            carry_over(source.folder, folder)
            with progress_bar(total, "merge", "B", self.progress) as bar:
                merge_adapter(
                    source.folder, work / "adapter", folder, where, bar.update, base=self.settings.merge, quantised=quantised,
                    compute=compute,
                )  # fmt: skip
            seconds = {"train": trained["seconds"], "merge": round(time.perf_counter() - started, 1)}
            healing["verified"] = prove_healed(
                source.folder, folder, work / "adapter", where, self.settings.merge, quantised, self.trust, self.progress,
                compute=compute,
            )  # fmt: skip
            for what, how in healing["verified"].items():
                self.say(f"  {what}: {how}")
            before = source.folder / "layerprune.json"
            record = read_json(before) if before.exists() else {"source": source.name, "hub_id": source.hub_id}
            earlier = {"previous": record["healing"]} if "healing" in record else {}
            record["healing"] = {**healing, "seconds": seconds, **earlier}
            write_json(folder / "layerprune.json", record)
            write_text(folder / "README.md", healed_card(record, out.name, source.folder))
            if self.outside is None:
                shutil.copytree(work / "adapter", folder / "adapter")
            else:
                shutil.rmtree(self.outside, ignore_errors=True)
                with new_folder(self.outside) as beside:
                    shutil.copytree(work / "adapter", beside, dirs_exist_ok=True)
        return seconds


def format_healing(result: Mapping[str, Any], out: str | None) -> str:
    """The result of `heal_checkpoint` for people."""
    from layerprune.heal.bridge import format_bridges

    if "losses" not in result:  # bridged, and not trained
        return "\n".join([*format_bridges(result), *([f"checkpoint: {out}"] if out is not None else [])])
    losses, seconds = result["losses"], result["seconds"]
    taught = ", distillation's part included," if result["settings"].get("distil") else ""
    chosen = ", ".join(f"{key} {value}" for key, value in _told(result).items())
    lines = [
        f"{result['model']}: {result['steps']:,} steps, {result['tokens']:,} tokens of {result['documents']:,} documents",
        f"settings: {chosen}",
        f"trained: {result['trainable']:,} parameters in {', '.join(result['modules'])} ({result['quantisation']})",
        f"training loss {losses['first']:.4f} -> {losses['last']:.4f} nats a token{taught} in {seconds['train']:,.0f} s; merged in "
        f"{seconds['merge']:,.0f} s",
        f"adapter: {result['adapter'] if out is None else Path(out) / result['adapter']}",
    ]
    return "\n".join(lines + ([f"checkpoint: {out}"] if out is not None else []))


def _told(result: Mapping[str, Any]) -> dict[str, str]:
    settings, origin = result["settings"], result["origin"]
    wanted = ("lora_rank", "learning_rate", "batch_size", "length", "warmup_steps", "dropout")
    return {key: f"{settings[key]:g} ({origin[key]})" for key in wanted}
