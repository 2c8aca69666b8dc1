"""`layerprune run`: rank, prune, heal, evaluate and draw, in one folder that can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerprune.curve import draw_curve, layer_parameters, read_rows, row, scores, write_curve
from layerprune.eval.collapse import check_keep
from layerprune.model.cuts import Block, Kept, last_block
from layerprune.model.errors import Refused
from layerprune.model.files import read_json
from layerprune.page import write_report
from layerprune.runfolder import RunFolder, open_run
from layerprune.runplan import Plan, check_batch_size, plan_run, run_cost
from layerprune.stages import Say, Stages, to_stderr


def run(
    model: str | Path,
    drop: float,
    *,
    out: str | Path | None = None,
    progress: bool = False,
    say: Say = to_stderr,
    verify: bool | None = None,
    batch_size: int | None = None,
    keep: float = 0.95,
    **settings: Any,
) -> dict[str, Any]:
    """Rank, prune, heal, evaluate and draw: everything for one fraction of layers, in one run folder.

    model: recipe name, Hub id or local folder. drop: fraction of layers in (0, 1). settings: those of `plan_run`.
    keep: the share of the accuracy above chance that the verdict keeps. out: the run folder, by default
    runs/<model>-<strategy>-<drop>; it gets manifest.json, rank.json, pruned/, healed/, adapter/, eval.json, the curve
    (curve.json, curve.csv, items.json, collapse.json), figures/ and report.html. A folder with a run of the same inputs
    is resumed; a finished one is only read. Returns the result that `layerprune.report.format_run` prints. Raises
    UsageError and Refused.
    """
    check_batch_size(batch_size)
    check_keep(keep)
    plan = plan_run(model, drop, **settings)
    folder = Path(out) if out is not None else Path("runs") / f"{plan.source.label}-{plan.strategy}-{drop:g}"
    with open_run(folder, plan.inputs(), plan.given()) as opened:
        if opened.other_versions():
            say(opened.other_versions())
        if opened.finished:
            for name in ("pruned", *(("healed", "adapter") if plan.heal is not None else ())):
                if not (folder / name).exists():
                    raise Refused(f"{folder} holds this run, finished, but its {name}/ is gone: choose another --out")
            say(f"{folder} holds this run, finished")
            if opened.manifest.get("keep") != keep:  # the same measurements, another question
                rank = read_json(folder / "rank.json")
                draw_curve(folder, write_curve(folder, plan.source.label, plan.layers, read_rows(folder), keep), rank)
                opened.note(keep=keep)
                (folder / "report.html").unlink(missing_ok=True)
            if not (folder / "report.html").exists():
                write_report(folder)
        else:
            opened.note(keep=keep)
            _Run(plan, opened, Stages(plan, say, progress, verify, batch_size), keep).all()
        where = {"folder": str(folder), "checkpoint": str(folder / ("pruned" if plan.heal is None else "healed"))}
        return {**opened.manifest["result"], "collapse": read_json(folder / "collapse.json"), **where}


class _Run:
    """The phases of one run, in order. Each leaves a file or a folder, and is skipped where that is there."""

    def __init__(self, plan: Plan, folder: RunFolder, stages: Stages, keep: float) -> None:
        self.plan, self.folder, self.path, self.stages, self.keep = plan, folder, folder.path, stages, keep
        self.say = stages.say

    def all(self) -> None:
        self.announce()
        to_rank = not (self.path / "rank.json").exists()
        if to_rank:
            self.stages.budget(self.plan.source.folder)  # what the weight files' headers show is refused before data is read
        self.stages.ready()  # an unknown task, or data that measures nothing, ends the run here, not hours later
        if self.plan.heal is not None and not (self.path / "healed").exists():
            self.stages.check_healing(self.plan.n)
        if to_rank:
            self.check_sweep()
        with self.folder.phase("rank"):
            ranking = self.rank()
        block = self.block(self.plan.n, ranking)
        distance = ranking["distance"][block.size - 1][block.start]
        self.say(f"the block of {block.size} layers to drop is {block} (angular distance {distance:.4f})")
        with self.folder.phase("curve"):
            self.folder.once(".work/sweep.json", lambda: self.sweep(ranking))
        with self.folder.phase("prune"):
            if not (self.path / "pruned").exists():
                self.say("cutting the block out")
                self.stages.prune(self.path / "pruned", self.plan.drop, self.plan.strategy, ranking)
        if self.plan.heal is not None:
            with self.folder.phase("heal"):
                if not (self.path / "healed").exists():
                    self.say("healing")
                    work = self.folder.work / "heal"
                    self.stages.heal(self.path / "pruned", self.path / "healed", self.path / "adapter", work)
        with self.folder.phase("eval"):
            evaluation = self.folder.once("eval.json", self.evaluate)
        with self.folder.phase("figures"):
            rows = self.rows(ranking, evaluation)
            curve = write_curve(self.path, self.plan.source.label, self.plan.layers, rows, self.keep)
            figures = draw_curve(self.path, curve, ranking)
        write_report(self.path)
        self.folder.finish(self.result(evaluation, block, distance, figures))

    def announce(self) -> None:
        plan = self.plan
        where = str(last_block(plan.n, plan.layers)) if plan.strategy == "last" else "chosen by ranking"
        self.say(
            f"{plan.source.name}: {plan.layers} layers; --drop {plan.drop:g} drops {plan.n} and keeps "
            f"{plan.layers - plan.n} ({plan.strategy}, block {where})"
        )
        self.say(f"run folder {self.path}, device {plan.device}, {run_cost(plan, self.path)}")

    def rank(self) -> dict[str, Any]:
        if not (self.path / "rank.json").exists():
            self.say("ranking all blocks")
        return dict(self.folder.once("rank.json", lambda: self.stages.rank(self.folder.work / ".rank-pass")))

    def block(self, n: int, ranking: Mapping[str, Any]) -> Block:
        return self.stages.block(n, self.plan.strategy, ranking)

    def kept(self, n: int, ranking: Mapping[str, Any]) -> Kept:
        layers = self.plan.layers
        return self.block(n, ranking).kept(layers) if n else tuple(range(layers))

    def depths(self) -> list[int]:
        """The whole model and every depth of the curve but this run's own, which is measured as it is written."""
        return [0, *(n for n in self.plan.curve if n != self.plan.n)]

    def check_sweep(self) -> None:
        whole, depths = tuple(range(self.plan.layers)), self.depths()
        if self.plan.strategy == "last":
            cuts = [last_block(n, self.plan.layers).kept(self.plan.layers) for n in depths[1:]]
            self.stages.check_sweep([whole, *cuts], 0, self.folder.work / "answers")
        else:
            self.stages.check_sweep([whole], len(depths) - 1, self.folder.work / "answers")

    def sweep(self, ranking: Mapping[str, Any]) -> dict[str, Any]:
        depths = self.depths()
        shown = ", ".join(map(str, depths[1:])) or "none"
        self.say(f"evaluating the whole model, and the curve in the same pass: {shown} layers dropped")
        found = self.stages.sweep([self.kept(n, ranking) for n in depths], self.folder.work / "answers")
        whole = found[self.kept(0, ranking)]
        assert whole is not None  # a whole model that does not run is refused
        whole["speed"] = self.stages.speed()
        return {str(n): found[self.kept(n, ranking)] for n in depths}

    def evaluate(self) -> dict[str, Any]:
        swept = read_json(self.folder.work / "sweep.json")["0"]
        found = {"whole": {**self.stages.sizes(self.plan.source.folder), **swept}}
        for name in ("pruned", *(["healed"] if self.plan.heal is not None else [])):

            def make(name: str = name) -> dict[str, Any]:
                self.say(f"evaluating {name}")
                return self.stages.measure(self.path / name, speed=True)

            found[name] = {**self.stages.sizes(self.path / name), **self.folder.once(f".work/{name}.json", make)}
        return found

    def rows(self, ranking: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
        plan = self.plan
        swept = read_json(self.folder.work / "sweep.json")
        total, each = layer_parameters(plan.source.folder, plan.layers)
        made = []

        def add(n: int, healed: bool, measured: Mapping[str, Any] | None) -> None:
            if measured is not None:
                kept = self.kept(n, ranking)
                left = total - sum(each) + sum(each[i] for i in kept)
                made.append(row(plan.layers, plan.strategy, kept, healed, measured, left))

        for n in sorted({0, *plan.curve}):
            add(n, False, evaluation["pruned"] if n == plan.n else swept[str(n)])
            if n == plan.n and "healed" in evaluation:
                add(n, True, evaluation["healed"])
        return made

    def result(self, evaluation: dict[str, Any], block: Block, distance: float, figures: list[str]) -> dict[str, Any]:
        plan = self.plan
        return {
            "model": plan.source.name,
            "layers": plan.layers,
            "strategy": plan.strategy,
            "drop": plan.drop,
            "dropped": str(block),
            "kept": list(block.kept(plan.layers)),
            "distance": distance,
            "rows": [{"model": name, **_summary(measured)} for name, measured in evaluation.items()],
            "figures": figures,
        }


def _summary(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: measured[key] for key in ("layers", "parameters", "bytes")},
        "loss": measured["loss"]["normalised"],
        "tasks": scores(measured),
        "tokens_per_second": None if measured["speed"] is None else measured["speed"]["tokens_per_second"],
    }
