"""From a checkpoint to a model that can be trained: loaded in NF4, adapters placed, its loss checked, its memory planned."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerprune.heal.linear import is_packed, stand_in
from layerprune.heal.measure import saved_on_cpu
from layerprune.heal.memory import Memory, apply_plan, plan_on_cpu, trained_layers
from layerprune.heal.merge import Stored, locate, quantised_linears
from layerprune.heal.planner import Planner
from layerprune.heal.quantise import add_lora, load_quantised, quiet_warnings
from layerprune.heal.settings import Healing, divisors
from layerprune.heal.student import Student, Teaching, still
from layerprune.heal.targets import Target, choose_targets, probe_forward, target_pattern
from layerprune.heal.teacher import Teacher, prove_pair, seam
from layerprune.heal.world import first_alone, is_sharded, local_device, local_processes, world_size
from layerprune.model.cuts import Kept
from layerprune.model.decoder import Decoder, view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import read_json, write_json
from layerprune.model.memory import host_room
from layerprune.model.nf4 import compute_dtype, unquantised
from layerprune.model.passplan import PROCESS_BYTES
from layerprune.model.progress import progress_bar
from layerprune.model.source import ModelSource
from layerprune.model.tensors import read_checkpoint
from layerprune.model.verify import meta_decoder

Say = Callable[[str], None]
_CPU_MICRO_BATCH = 4
SHARDED_TOKENS = 4096
"""Tokens at once on a GPU of a sharded model, whose plan is FSDP's own; `--micro-batch` says otherwise."""


@dataclass(frozen=True)
class Prepared:
    """A model ready to train. live: peft's model; student: its training forward.

    where, quantised: from a module's name in the checkpoint's own model to its stored tensor, for the targets and for all
    4-bit layers. renamed: the live model's layer numbers to the checkpoint's, where the live model is the teacher.
    separate: whether documents of a sequence are kept from seeing one another.
    """

    live: Any
    student: Student
    where: dict[str, Stored]
    quantised: dict[str, Stored]
    renamed: dict[int, int]
    pattern: str
    leaves: list[str]
    compute: torch.dtype
    separate: bool

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.live.parameters() if p.requires_grad)


def prepare(
    source: ModelSource, settings: Healing, kept: Kept | None, teacher: Teacher | None, device: str, spread: bool, trust: bool,
    say: Say, progress: bool,
) -> Prepared:  # fmt: skip
    """Load and set up. kept: what the checkpoint's record says of its cut, None for none; spread: over the GPUs of one process."""
    folder, sharded = source.folder, is_sharded()
    renamed: dict[int, int] = {}
    if teacher is not None:
        total = sum(t.nbytes for t in read_checkpoint(folder).values())
        with progress_bar(total, "compare with the teacher", "B", progress) as bar:
            first_alone(lambda: prove_pair(source, teacher, bar.update) and None, device)
        folder, renamed = teacher.source.folder, {old: new for new, old in enumerate(teacher.kept)}
    compute = compute_dtype(device)
    with quiet_warnings():
        keep = unquantised(meta_decoder(folder, trust).model, device.partition(":")[0])
        wide = spread and not _fits_one(folder, len(keep))
        live = load_quantised(folder, None if wide else device, compute, keep, trust, progress, sharded)
        decoder = view_decoder(live)
        extra = probe_forward(decoder)
        chosen = choose_targets(decoder, settings.targets)
    first, last = adapter_range(settings, kept, len(renamed or decoder))
    cut = [_in_cut(target, renamed, decoder.path) for target in chosen if not renamed or target.layer in renamed]
    places = [(target, own) for target, own in zip([t for t in chosen if not renamed or t.layer in renamed], cut, strict=True)
              if first <= own.layer < last]  # fmt: skip
    if not places:
        raise UsageError(f"--adapters {settings.adapters} leaves no layer with an adapter")
    stored = read_checkpoint(source.folder)
    layers = len(renamed) or len(decoder)
    every = quantised_linears(decoder) if settings.merge == "nf4" else []
    packed = [_in_cut(t, renamed, decoder.path) for t in every if t.layer < 0 or not renamed or t.layer in renamed]
    with progress_bar(len(places) + len(packed), "find weights", "layer", progress) as bar:
        where = locate([own for _, own in places], stored, layers, bar.update)
        quantised = locate(packed, stored, layers, bar.update)
    exempt = sum(not is_packed(target.module) for target, _ in places)
    if exempt:
        say(
            f"{exempt} of the {len(places)} linear layers stay unquantised: their widths do not fit NF4's blocks of 64, or "
            "transformers does not know their kind"
        )
    pattern = target_pattern(decoder, [target for target, _ in places])
    own_pattern = "|".join(map(re.escape, sorted(where))) if renamed else pattern
    live = add_lora(live, pattern, settings, compute if sharded else None, {target.name for target, _ in places})
    if not sharded:
        stand_in(live)
    teaching = None
    if teacher is not None:
        shared = min(seam(teacher.kept), first)
        teaching = Teaching(teacher.kept, settings.distil, shared)
    student = Student(decoder, teaching, extra)
    live.train()
    with student.installed():
        if not sharded:
            _check_end(student, decoder, extra, device)
        separate = settings.packing == "documents" and (sharded or keeps_apart(student, decoder))
    if settings.packing == "documents" and not separate:
        say("this model's attention does not keep the documents of a sequence apart: they see one another")
    leaves = sorted({own.inside for _, own in places})
    return Prepared(live, student, where, quantised, renamed, own_pattern, leaves, compute, separate)


def _fits_one(folder: Path, kept: int) -> bool:
    """Whether the model in NF4 leaves a third of the first GPU to what is trained and computed; true without several GPUs."""
    if torch.cuda.device_count() < 2:
        return True
    numbers = [t.numel for t in read_checkpoint(folder).values()]
    # the largest tensors outside the layers, embedding and head, stay in two bytes
    outside = sum(sorted(numbers)[-2:]) if kept else 0
    need = 0.52 * (sum(numbers) - outside) + 2 * outside
    return bool(need < 0.66 * torch.cuda.get_device_properties(0).total_memory)


def adapter_range(settings: Healing, kept: Kept | None, layers: int) -> tuple[int, int]:
    """Layers of the checkpoint that get adapters, half-open. UsageError for a place by the cut where there is none."""
    if settings.adapters == "all":
        return 0, layers
    at = seam(kept) if kept is not None else layers
    if kept is None or at == layers:
        raise UsageError(
            f"--adapters {settings.adapters} counts from the cut, and this checkpoint has none on record that layers come after"
        )
    window = settings.window
    return (at, layers) if window is None else (max(0, at - window), min(layers, at + window))


def _in_cut(target: Target, renamed: dict[int, int], path: str) -> Target:
    """The same target by its place in the cut checkpoint's own model."""
    if not renamed or target.layer < 0:
        return target
    layer = renamed[target.layer]
    return Target(f"{path}.{layer}.{target.inside}", layer, target.inside, target.module)


@torch.no_grad()
def _check_end(student: Student, decoder: Decoder, extra: dict[str, Any], device: str) -> None:
    """Compare the loss in slices with that of the model's own logits; models that differ get the latter."""
    ids_BT = _some_ids(decoder, 2, 12)
    with still(decoder.model), _autocast(device):
        student.whole = True
        expected = float(student.nats(ids_BT, ids_BT))
        student.whole = False
        try:
            found = float(student.nats(ids_BT, ids_BT))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception:  # whatever a model does with states of another shape: its own logits are right
            found = float("nan")
    student.whole = not abs(found - expected) <= 0.01 * abs(expected)
    if student.whole and student.teaching is not None:
        raise Refused(
            f"this {type(decoder.model).__name__} cannot be distilled: its end does more than read the last layer's state; leave "
            "--distil out"
        )


@torch.no_grad()
def keeps_apart(student: Student, decoder: Decoder) -> bool:
    """Whether positions that restart keep a sequence's documents from seeing one another, tried on two documents."""
    ids_BT = _some_ids(decoder, 1, 16)
    other_BT = ids_BT.clone()
    other_BT[:, :8] = _some_ids(decoder, 1, 24)[:, 16:]
    positions = {"position_ids": torch.arange(16, device=ids_BT.device).remainder(8).unsqueeze(0)}
    with still(decoder.model):
        try:
            first, second = (student.states(ids, positions)[..., 8:, :].float() for ids in (ids_BT, other_BT))
            alone = student.states(ids_BT[:, 8:], {}).float()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception:  # no position ids, or not of this form: then there is nothing to keep them apart with
            return False
    # masked tokens weigh exactly nothing, to the last bit
    if not float((first - second).abs().max()) <= 1e-5 * float(alone.std()):
        return False
    # another number of tokens is another order of sums, and half precision rounds each of them: 2 % of a state in 8 layers of
    # random weights, where positions that go on make 38 % and more. The median: single tokens may go to another expert
    near = 1e-3 if alone.dtype == decoder.model.dtype == torch.float32 else 0.1
    return float(((first - alone).norm(dim=-1) / alone.norm(dim=-1)).median()) <= near


def _some_ids(decoder: Decoder, rows: int, tokens: int) -> torch.Tensor:
    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocab, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(decoder.device)


def _autocast(device: str) -> Any:
    return torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=compute_dtype(device) == torch.bfloat16)


def plan_memory(
    made: Prepared, settings: Healing, device: str, budget: int | None, ram: int | None, positions: Any, work: Path, say: Say
) -> Memory:
    """What the user gave, else what this healing was begun with, else the fastest that fits; the student is set up so."""
    world, begun = world_size(), work / "memory.json"
    share = settings.batch_size // world
    if settings.micro_batch is not None and share % settings.micro_batch:
        fits = ", ".join(map(str, divisors(share)))
        told = f"--micro-batch {settings.micro_batch} does not divide the {share} sequences of a process"
        raise UsageError(f"{told}: use one of {fits}")
    sizes = divisors(share) if settings.micro_batch is None else [settings.micro_batch]
    student = made.student
    asked = {"budget": budget, "ram": ram, "kernels": settings.kernels}
    if is_sharded():
        return Memory(max([size for size in sizes if size * settings.length <= SHARDED_TOKENS] or [min(sizes)]))

    def choose() -> Memory:
        if begun.exists():
            before = read_json(begun)
            same = all(before.get(key) == value for key, value in asked.items())
            if same and settings.micro_batch in (None, before["micro_batch"]):
                return Memory(**{key: value for key, value in before.items() if key not in asked})
        if len({p.device for p in student.decoder.model.parameters()}) > 1:
            # spread over GPUs as it does not fit on one: the least that it can take
            fitting = [size for size in sizes if size * settings.length <= SHARDED_TOKENS] or [min(sizes)]
            plan = Memory(max(fitting), len(trained_layers(student)))
        elif device.startswith("cpu"):
            most = _CPU_MICRO_BATCH if settings.micro_batch is None else settings.micro_batch
            saved = None if ram is None else saved_on_cpu(student, settings.length, positions, made.compute)
            model = student.decoder.model
            held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            room = host_room(None if ram is None else ram // local_processes(), held)
            plan = plan_on_cpu(student, sizes, most, room, saved, PROCESS_BYTES + held, ram, local_processes())
        else:
            # liger's kernels are no code that torch's compiler can follow
            planner = Planner(student, settings.length, settings.steps, share, positions, world, settings.kernels is None)
            plan = planner.choose(sizes, budget, say)
        write_json(begun, {**asdict(plan), **asked})
        return plan

    with student.installed():
        plan = first_alone(choose, device)
    trained = trained_layers(student)
    others = sorted(set(range(len(student.decoder))) - set(trained))
    apply_plan(student, plan, trained, [*trained, *others])
    return plan


def process_device(device: str) -> str:
    """The device of this process among those that `accelerate launch` started."""
    return local_device("cuda") if device == "cuda" and world_size() > 1 else device
