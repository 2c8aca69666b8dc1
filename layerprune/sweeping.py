"""`layerprune sweep`: the whole curve, both strategies, healed where asked, in one folder that can be extended."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerprune.curve import draw_curve, layer_parameters, row, write_curve
from layerprune.eval.collapse import check_keep
from layerprune.model.config import layer_count, load_config
from layerprune.model.cuts import Kept, drop_count, last_block
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import must_have_room, read_json, write_json
from layerprune.model.source import find_model
from layerprune.model.tensors import read_checkpoint
from layerprune.model.tree import CutTree
from layerprune.page import write_report
from layerprune.runfolder import RunFolder, open_run
from layerprune.runplan import Setup, as_time, check_batch_size, check_strategy, costs, held_bytes, set_up, unknown_tasks
from layerprune.spread import Piece, Spread, check_spread, heal_apart
from layerprune.stages import Say, Stages, to_stderr

STRATEGIES = ("angular", "last")


def sweep(
    model: str | Path,
    *,
    strategies: Sequence[str] = STRATEGIES,
    drops: str | Sequence[float] | None = None,
    heal: Sequence[float] = (),
    keep: float = 0.95,
    out: str | Path | None = None,
    progress: bool = False,
    say: Say = to_stderr,
    batch_size: int | None = None,
    workers: int | None = None,
    launcher: str | None = None,
    launcher_args: str | Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure every depth of a model: normalised loss and tasks against the layers dropped, and where they collapse.

    model: recipe name, Hub id or local folder. strategies: `angular`, `last` or both. drops: fractions, as numbers or as
    text such as `0:0.5` or `0.1,0.2:0.4`; None for every n from 1 to L-1. All cuts that are not healed come from one pass
    over the data. heal: fractions at which each strategy's cut is written and healed too. keep: the share of the accuracy
    above chance that the recommendation keeps. settings: those of `layerprune.runplan.set_up` (tasks, data, limits).

    workers: healings at a time, each in a process of its own that sees one GPU (more where one does not hold the model); None
    for the GPUs here, 1 on the CPU and where a device is named. launcher: `slurm` or `local` heals each cut in a job of its own
    through submitit, with launcher_args as its parameters (`timeout_min`, by default a day; `slurm_partition` ...); all
    machines must see the folder, the model and the data under the same paths (a shared file system). The result is that of
    one process. When one healing fails the others are still done, and Refused names it.

    out: the folder, by default runs/<model>-sweep; it gets rank.json (with `angular`), answers/ (each sample's answer at
    each depth), the curve (curve.json, curve.csv, items.json, collapse.json), figures/, report.html and
    heal/<strategy>-<n>/ with the healed checkpoints. A call for the same folder adds to what is there: more depths, tasks,
    strategies or healing; a killed one goes on. Returns what `layerprune.report.format_sweep` prints. Raises UsageError
    and Refused.
    """
    check_keep(keep)
    check_batch_size(batch_size)
    plan = plan_sweep(model, strategies, drops, heal, **settings)
    spread = check_spread(workers, launcher, launcher_args, plan.setup.device, plan.setup.asked_device)
    folder = Path(out) if out is not None else Path("runs") / f"{plan.setup.source.label}-sweep"
    with open_run(folder, {"kind": "sweep", **plan.setup.measured_inputs()}, plan.setup.given()) as opened:
        plan = plan.joined(opened)
        if opened.other_versions():
            say(opened.other_versions())
        asked = {**plan.asked(opened), "keep": keep}
        if opened.finished and opened.manifest.get("asked") == asked and _whole(folder, plan):
            say(f"{folder} holds this sweep, finished")
        else:
            Sweeper(plan, opened, Stages(plan.setup, say, progress, None, batch_size), keep, asked, spread).all()
        return {**opened.manifest["result"], "folder": str(folder)}


@dataclass(frozen=True)
class SweepPlan:
    """A sweep: a setup, the depths n of the curve, and those that are healed."""

    setup: Setup
    strategies: tuple[str, ...]
    drops: tuple[int, ...]
    heal: tuple[int, ...]

    def asked(self, opened: RunFolder) -> dict[str, Any]:
        """What a later call for the same folder adds to. Settings of healing stay those that something was healed with."""
        before = opened.manifest.get("asked") or {}
        return {
            "strategies": list(self.strategies),
            "drops": list(self.drops),
            "heal": list(self.heal),
            "heal_settings": self.setup.heal_inputs() or before.get("heal_settings"),
            "tasks": self.setup.tasks,
        }

    def joined(self, opened: RunFolder) -> SweepPlan:
        """This plan with what the folder was asked for before. Raises UsageError where they contradict each other."""
        before = opened.manifest.get("asked")
        if before is None:
            return self
        if not (isinstance(before, dict) and {"strategies", "drops", "heal", "heal_settings", "tasks"} <= set(before)):
            raise Refused(f"{opened.path}/manifest.json is damaged: choose another --out")
        for task, shots in before["tasks"].items():
            if self.setup.tasks.get(task, shots) != shots:
                raise UsageError(
                    f"{opened.path} holds a sweep of {task} with {shots} in-context examples, now {self.setup.tasks[task]}: choose "
                    "another --out"
                )
        if self.heal and before["heal"] and before["heal_settings"] != self.setup.heal_inputs():
            raise UsageError(f"{opened.path} holds cuts that were healed with other settings: choose another --out")
        return replace(
            self,
            setup=replace(self.setup, tasks={**before["tasks"], **self.setup.tasks}),
            strategies=tuple(s for s in STRATEGIES if s in before["strategies"] or s in self.strategies),
            drops=tuple(sorted({*before["drops"], *self.drops})),
            heal=tuple(sorted({*before["heal"], *self.heal})),
        )


def plan_sweep(
    model: str | Path, strategies: Sequence[str], drops: str | Sequence[float] | None, heal: Sequence[float], **settings: Any
) -> SweepPlan:
    """Resolve and check a sweep; nothing is loaded. Raises UsageError and Refused."""
    for strategy in strategies:
        check_strategy(strategy)
    if not strategies:
        raise UsageError("--strategy is empty: give angular, last or both")
    source = find_model(str(model))
    layers = layer_count(load_config(source.folder, settings.get("trust_remote_code", False)))
    depths = parse_drops(drops, layers)
    try:
        healed = tuple(sorted({drop_count(fraction, layers) for fraction in heal}))
    except UsageError as error:
        raise UsageError(str(error).replace("--drop", "--heal")) from None
    setup = set_up(source, heal=bool(heal), **settings)
    ordered = tuple(s for s in STRATEGIES if s in strategies)
    return SweepPlan(setup, ordered, tuple(sorted({*depths, *healed})), healed)


def parse_drops(drops: str | Sequence[float] | None, layers: int) -> tuple[int, ...]:
    """Depths n from fractions: numbers, or text of fractions and ranges such as `0.1,0.2:0.4`; None for 1..L-1.

    A range takes every n with a L <= n <= b L, both ends included. Raises UsageError, also where no depth is left.
    """
    if layers == 1:
        raise UsageError("this model has one layer, and one must stay: there is nothing to drop")
    if drops is None:
        return tuple(range(1, layers))
    if isinstance(drops, str):
        parts: list[str] = [part.strip() for part in drops.split(",")]
    else:
        parts = [repr(float(fraction)) for fraction in drops]
    found: set[int] = set()
    for part in parts:
        low, colon, high = part.partition(":")
        try:
            first, last = float(low), float(high if colon else low)
        except ValueError:
            raise UsageError(f"--drops {part} is no fraction and no range of fractions, such as 0.1,0.2:0.5") from None
        if not (0 <= first <= last <= 1):
            raise UsageError(f"--drops {part}: use fractions from 0 to 1, the smaller one first, such as 0:0.5")
        if colon:
            found |= {n for n in range(1, layers) if first * layers - 1e-9 <= n <= last * layers + 1e-9}
        elif first > 0:
            found.add(drop_count(first, layers))
    if not found:
        raise UsageError(f"--drops {','.join(parts)} holds no depth of {layers} layers: one layer is {1 / layers:.3g} of them")
    return tuple(sorted(found))


def _whole(folder: Path, plan: SweepPlan) -> bool:
    names = ["curve.json", "curve.csv", "items.json", "collapse.json", "report.html"]
    names += [f"heal/{strategy}-{n}/healed" for strategy in plan.strategies for n in plan.heal]
    return all((folder / name).exists() for name in names)


class Sweeper:
    """The phases of one sweep, each skipped where its results lie in the folder."""

    def __init__(
        self,
        plan: SweepPlan,
        folder: RunFolder,
        stages: Stages,
        keep: float,
        asked: dict[str, Any] | None = None,
        spread: Spread | None = None,
    ) -> None:
        self.plan, self.folder, self.path, self.stages, self.keep = plan, folder, folder.path, stages, keep
        self.setup, self.layers, self.say, self.asked = plan.setup, plan.setup.layers, stages.say, asked
        self.spread = spread or Spread(workers=1)
        self.not_written: set[tuple[str, int]] = set()

    def all(self) -> None:
        self.announce()
        self.check_headers()
        self.stages.ready()
        if self.setup.heal is not None:
            self.stages.check_healing(self.shallowest())
            self.check_room()
        self.check_sweep()
        self.folder.note(asked=self.asked, finished=False)  # not before what can be refused at once is refused
        (self.path / "report.html").unlink(missing_ok=True)  # it would speak of less than what is asked for now
        ranking = self.rank() if "angular" in self.plan.strategies else None
        kept = self.kept(ranking)
        with self.folder.phase("sweep"):
            found = self.stages.sweep(kept.values(), self.path / "answers")
        self.heal_apart(kept, found)
        healed: dict[tuple[str, int], dict[str, Any]] = {}
        for n in self.plan.heal:  # what was healed apart is only read
            write_curve(self.path, self.setup.source.label, self.layers, self.rows(kept, found, healed), self.keep)
            for strategy in self.plan.strategies:
                if (strategy, n) in self.not_written:
                    self.say(f"left out: the cut of n = {n} ({strategy}) cannot be healed, since it cannot be written")
                elif self.setup.heal is not None or (self.path / "heal" / f"{strategy}-{n}" / "healed").exists():
                    healed[strategy, n] = heal_depth(self.stages, self.path, strategy, n, ranking)
                elif (measured := depth_measured(self.stages, self.path, strategy, n)) is not None:
                    healed[strategy, n] = measured
                else:
                    self.say(f"the cut of n = {n} ({strategy}) is not healed: give --heal {n / self.layers:.4g} again for that")
        with self.folder.phase("figures"):
            curve = write_curve(self.path, self.setup.source.label, self.layers, self.rows(kept, found, healed), self.keep)
            figures = draw_curve(self.path, curve, ranking)
        write_report(self.path)
        self.folder.finish(
            {
                "model": self.setup.source.name,
                "layers": self.layers,
                "rows": curve["rows"],
                "collapse": read_json(self.path / "collapse.json"),
                "figures": figures,
            }
        )

    def unhealed(self) -> list[Piece]:
        """The strategies and depths that are still to be healed or measured, in the order in which that is done."""
        may_heal = self.setup.heal is not None
        return [
            (strategy, n)
            for n in self.plan.heal
            for strategy in self.plan.strategies
            if (strategy, n) not in self.not_written
            and (may_heal or (self.path / "heal" / f"{strategy}-{n}" / "healed").exists())
            and not self.is_healed((strategy, n))
        ]

    def shallowest(self) -> int | None:
        """The fewest layers that a cut will lack which is still to be healed here; None where there is none."""
        if self.spread.launcher is not None:  # on other machines, of which this one knows nothing
            return None
        ahead = [n for strategy, n in self.unhealed() if not (self.path / "heal" / f"{strategy}-{n}" / "healed").exists()]
        return min(ahead, default=None)

    def is_healed(self, piece: Piece) -> bool:
        """Whether `heal_depth` would find everything done."""
        there = (self.path / "heal" / f"{piece[0]}-{piece[1]}" / "healed").exists()
        return there and depth_measured(self.stages, self.path, *piece) is not None

    def heal_apart(self, kept: Mapping[tuple[str, int], Kept], found: Mapping[Kept, dict[str, Any] | None]) -> None:
        """Heal in other processes, where that was asked for or several GPUs are there; the curve grows with each that arrives."""
        pieces = self.unhealed()
        slots = self.slots(pieces)
        if not self.plan.heal and (self.spread.workers or self.spread.launcher):
            self.say("nothing is to be healed, so --workers and --launcher have nothing to do: give --heal too")
        if not pieces or (self.spread.launcher is None and len(slots) < 2):
            return
        healed: dict[Piece, dict[str, Any]] = {}

        def arrived(piece: Piece) -> None:
            healed[piece] = depth_measured(self.stages, self.path, *piece) or {}
            write_curve(self.path, self.setup.source.label, self.layers, self.rows(kept, found, healed), self.keep)

        write_curve(self.path, self.setup.source.label, self.layers, self.rows(kept, found, healed), self.keep)
        self.stages.release()
        heal_apart(
            pieces, slots, self.spread, self.setup, self.path,
            batch_size=self.stages.batch_size, done=self.is_healed, arrived=arrived, say=self.say,
        )  # fmt: skip

    def slots(self, pieces: Sequence[Piece]) -> list[dict[str, str]]:
        if not pieces:
            return []
        return self.spread.slots(len(pieces), self.setup, 1 - min(n for _, n in pieces) / self.layers)

    def refused(self, kept: Mapping[tuple[str, int], Kept], ranking: Mapping[str, Any] | None) -> set[tuple[str, int]]:
        """The cuts that cannot be written as a checkpoint of this architecture; they are measured, and not recommended."""
        from layerprune.prune.cut import plan_block

        reasons: dict[str, list[tuple[str, int]]] = {}
        for strategy, n in kept:
            try:
                if n:
                    block = self.stages.block(n, strategy, ranking)
                    plan_block(self.setup.source, block, strategy, None, self.setup.trust_remote_code)
            except Refused as refusal:
                reasons.setdefault(str(refusal), []).append((strategy, n))
        for reason, cuts in reasons.items():
            which = ", ".join(f"{n} ({strategy})" for strategy, n in cuts)
            self.say(f"measured, but not to be had as a checkpoint: n = {which}, since {reason}")
        return {cut for cuts in reasons.values() for cut in cuts}

    def check_room(self) -> None:
        """Refuse a disk that cannot hold the healed checkpoints."""
        each = sum(t.nbytes for t in read_checkpoint(self.setup.source.folder).values())
        parts = sorted((1 - n / self.layers for n in self.plan.heal for _ in self.plan.strategies), reverse=True)
        if parts:  # each healing under way has its cut beside it
            cuts = sum(parts[: max(1, len(self.slots(self.unhealed())))])
            must_have_room(self.path, each * (sum(parts) + cuts), held_bytes(self.path))

    def announce(self) -> None:
        setup, plan = self.setup, self.plan
        shown = f"n = {plan.drops[0]} to {plan.drops[-1]}" if len(plan.drops) > 1 else f"n = {plan.drops[0]}"
        self.say(
            f"{setup.source.name}: {self.layers} layers; {len(plan.drops)} depths ({shown}) by {' and '.join(plan.strategies)}"
            + (f"; healed at n = {', '.join(map(str, plan.heal))}" if plan.heal else "")
        )
        self.say(f"sweep folder {self.path}, device {setup.device}")

    def will_rank(self) -> bool:
        return "angular" in self.plan.strategies and not (self.path / "rank.json").exists()

    def check_headers(self) -> None:
        """Where the source is too large to be streamed, its files' headers show it before data is read."""
        if self.will_rank():
            self.stages.budget(self.setup.source.folder)

    def check_sweep(self) -> None:
        """Refuse before the ranking what the evaluation after it would refuse; without a ranking that comes next anyway."""
        if self.will_rank():
            known = [tuple(range(self.layers))]
            if "last" in self.plan.strategies:
                known += [last_block(n, self.layers).kept(self.layers) for n in self.plan.drops]
            self.stages.check_sweep(known, len(self.plan.drops), self.path / "answers")

    def rank(self) -> dict[str, Any]:
        if not (self.path / "rank.json").exists():
            self.say("ranking all blocks")
        with self.folder.phase("rank"):
            return dict(self.folder.once("rank.json", lambda: self.stages.rank(self.path / ".rank-pass")))

    def kept(self, ranking: Mapping[str, Any] | None) -> dict[tuple[str, int], Kept]:
        """The layers that stay, by strategy and n; (first strategy, 0) is the whole model."""
        found = {(self.plan.strategies[0], 0): tuple(range(self.layers))}
        for strategy in self.plan.strategies:
            for n in self.plan.drops:
                found[strategy, n] = self.stages.block(n, strategy, ranking).kept(self.layers)
        tree = CutTree(dict.fromkeys(found.values()), self.layers)
        self.say(
            f"{len(tree.branches)} models in one pass: {tree.applications:,} layer applications a batch instead of {tree.alone:,} "
            f"({tree.alone / tree.applications:.1f} times fewer), at most {tree.alive} hidden states at once{self.time(tree)}"
        )
        self.not_written = self.refused(found, ranking)
        return found

    def time(self, tree: CutTree) -> str:
        """The hours of the pass, estimated from those of one evaluation of nearly the whole model."""
        try:
            found, kind = costs(self.setup, 1)
        except (Refused, UsageError):  # sizes that cannot be told, one layer
            return ""
        one = sum(step.hours for step in found.steps if step.name not in ("rank", "heal"))
        hours = one * tree.applications / (self.layers - 1)
        return f"; estimate: {as_time(hours)} on one {kind.name}{unknown_tasks(found)}"

    def rows(
        self,
        kept: Mapping[tuple[str, int], Kept],
        found: Mapping[Kept, dict[str, Any] | None],
        healed: Mapping[tuple[str, int], dict[str, Any]],
    ) -> list[dict[str, Any]]:
        total, each = layer_parameters(self.setup.source.folder, self.layers)
        made = []
        for (strategy, n), stay in kept.items():
            left = total - sum(each) + sum(each[i] for i in stay)
            measured = found[stay]
            if measured is not None:
                one = row(self.layers, strategy, stay, False, measured, left)
                made.append({**one, "writable": False} if (strategy, n) in self.not_written else one)
            if (strategy, n) in healed:
                made.append(row(self.layers, strategy, stay, True, healed[strategy, n], left))
        return made


def heal_depth(stages: Stages, folder: Path, strategy: str, n: int, ranking: Mapping[str, Any] | None) -> dict[str, Any]:
    """Cut n layers, heal, and measure what comes out, in heal/<strategy>-<n>/: healed/, adapter/ and eval.json.

    Resumes in the middle of each step, and measures again what was measured on fewer tasks. The cut checkpoint is removed when
    it is healed; `layerprune prune` makes it again.
    """
    place = folder / "heal" / f"{strategy}-{n}"
    pruned, healed, tasks = place / "pruned", place / "healed", stages.setup.tasks
    if not healed.exists():
        stages.say(f"healing the cut of n = {n} ({strategy})")
        place.mkdir(parents=True, exist_ok=True)
        if not pruned.exists():
            stages.prune(pruned, n / stages.setup.layers, strategy, ranking)
        (place / "eval.json").unlink(missing_ok=True)
        shutil.rmtree(place / "adapter", ignore_errors=True)  # of a healed checkpoint that was removed
        stages.heal(pruned, healed, place / "adapter", place / ".work")
    for over in (pruned, place / ".work"):  # a kill may have left them beside the result
        shutil.rmtree(over, ignore_errors=True)
    if depth_measured(stages, folder, strategy, n) is None:
        stages.say(f"evaluating the healed cut of n = {n} ({strategy})")
        write_json(place / "eval.json", {"asked": tasks, **stages.measure(healed)})
    return dict(read_json(place / "eval.json"))


def depth_measured(stages: Stages, folder: Path, strategy: str, n: int) -> dict[str, Any] | None:
    """What a healed depth measured; None where it did not, or on fewer tasks than are asked for now."""
    path = folder / "heal" / f"{strategy}-{n}" / "eval.json"
    found = read_json(path) if path.exists() else {"asked": {}}
    return dict(found) if "loss" in found and found["asked"].items() >= stages.setup.tasks.items() else None
