"""`layerprune find`: the deepest cut that, healed, keeps a share of the accuracy, with few healings."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerprune.curve import collapse, draw_curve, row, write_curve
from layerprune.eval.collapse import check_keep
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import must_have_room, read_json, write_json
from layerprune.page import write_report
from layerprune.runfolder import open_run
from layerprune.runplan import as_bytes, as_time, check_batch_size, costs, held_bytes, step_hours, unknown_tasks
from layerprune.stages import Say, Stages, to_stderr
from layerprune.sweeping import Sweeper, depth_measured, heal_depth, plan_sweep


@dataclass(frozen=True)
class Found:
    """What a search came to: n, the depths tested in order with what they showed, and why it stopped."""

    n: int
    tested: tuple[tuple[int, bool], ...]
    why: str


def most_tests(layers: int) -> int:
    """No search tests more depths than this: 3 log2(L) + 4, rounded up."""
    return math.ceil(3 * math.log2(max(2, layers))) + 4


def search(layers: int, first: int, second: int, passes: Callable[[int], bool]) -> Found:
    """The largest n before the first failure, by bracketing and bisection.

    It assumes that once a depth fails, all deeper ones do; the neighbour below the answer is tested too, and where that
    fails, the search goes on below it. first, second: where to look first (the last depth that probably passes and one that
    probably fails), each from 1 to L-1. passes: the test of one depth, called once a depth.
    """
    known: dict[int, bool] = {0: True, layers: False}
    order: list[tuple[int, bool]] = []
    budget = most_tests(layers)

    def test(n: int) -> bool:
        if n not in known:
            known[n] = passes(n)
            order.append((n, known[n]))
        return known[n]

    low, high = 0, layers
    if layers > 1:
        if test(max(1, min(first, layers - 1))):
            low = max(1, min(first, layers - 1))
            step = max(1, second - low)
            while low < layers - 1 and test(min(low + step, layers - 1)):
                low = min(low + step, layers - 1)
                step *= 2
        high = min(n for n, passed in known.items() if not passed)
    again = ""
    while True:
        while high - low > 1:
            if len(order) >= budget:
                return Found(low, tuple(order), f"stopped after {budget} depths: {low} passed, {high} did not{again}")
            middle = (low + high) // 2
            low, high = (middle, high) if test(middle) else (low, middle)
        if low < 2 or len(order) >= budget or test(low - 1):
            break
        again = f"; {low} passed although {low - 1} did not, so the curve is not monotone there"
        high = low - 1
        low = max(n for n, passed in known.items() if passed and n < high)
    below = f", its neighbour {low - 1} passed too" if low > 1 and known.get(low - 1) else ""
    if low == 0:
        why = "already 1 layer less does not pass"
    elif high == layers:
        why = f"{low} passed, which is all but one layer{below}"
    else:
        why = f"{low} passed, {high} did not{below}"
    return Found(low, tuple(order), why + again)


def find(
    model: str | Path,
    *,
    keep: float = 0.95,
    strategy: str = "angular",
    out: str | Path | None = None,
    progress: bool = False,
    say: Say = to_stderr,
    batch_size: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The largest n that, cut and healed, is shown to keep a share of the accuracy above chance on every task.

    The curve without healing (one pass over the data) says where to look; then at most `most_tests(L)` depths are healed and
    measured, usually about log2(L). A depth passes where the lower end of the paired 95 % interval of every task that is
    above chance is not below `keep` (`layerprune.eval.collapse.plateau`); too few items to tell count as not passed. It
    assumes a first failure: deeper than that nothing is tried.

    out: by default runs/<model>-find; it gets what a sweep's folder has, and heal/<strategy>-<n>/healed, the answer's
    checkpoint; those of the other depths are removed once they are measured. A killed search goes on. Returns what
    `layerprune.report.format_find` prints. Raises UsageError and Refused.
    """
    check_keep(keep)
    check_batch_size(batch_size)
    plan = replace(plan_sweep(model, [strategy], None, (0.5,), **settings), heal=())
    if not plan.setup.tasks:
        raise UsageError("--tasks is empty, and so is the recipe: which accuracy is to be kept?")
    folder = Path(out) if out is not None else Path("runs") / f"{plan.setup.source.label}-find"
    asked = {"strategy": strategy, "keep": keep, "tasks": plan.setup.tasks, "heal": plan.setup.heal_inputs()}
    with open_run(folder, {"kind": "find", **plan.setup.measured_inputs(), **asked}, plan.setup.given()) as opened:
        if opened.other_versions():
            say(opened.other_versions())
        checkpoint = (opened.manifest.get("result") or {}).get("checkpoint")
        if opened.finished and (folder / "report.html").exists() and (checkpoint is None or (folder / checkpoint).exists()):
            say(f"{folder} holds this search, finished")
        else:
            _Finder(plan, opened, Stages(plan.setup, say, progress, None, batch_size), keep).all()
        return {**opened.manifest["result"], "folder": str(folder)}


class _Finder(Sweeper):
    """The sweep without healing, then the search."""

    def all(self) -> None:
        strategy = self.plan.strategies[0]
        self.announce()
        self.say(self.cost())
        self.check_headers()
        self.stages.ready()
        self.stages.check_healing(self.layers - 1)  # which depths are healed the search will say
        self.check_sweep()
        ranking = self.rank() if strategy == "angular" else None
        kept = self.kept(ranking)
        with self.folder.phase("sweep"):
            swept = self.stages.sweep(kept.values(), self.path / "answers")
        unhealed = self.rows(kept, swept, {})
        whole = unhealed[0]
        first, second = self.bracket(unhealed, strategy)
        self.say(f"without healing the curve says: look at n = {first}, then at {second}")
        healed: dict[tuple[str, int], dict[str, Any]] = {}
        reasons: dict[int, str] = {}

        def passes(n: int) -> bool:
            if swept[kept[strategy, n]] is None or (strategy, n) in self.not_written:
                reasons[n] = "It cannot be had as a checkpoint."
                return False
            done = depth_measured(self.stages, self.path, strategy, n)  # its weights may be gone
            healed[strategy, n] = done or heal_depth(self.stages, self.path, strategy, n, ranking)
            one = row(self.layers, strategy, kept[strategy, n], True, healed[strategy, n], 0)
            advice = collapse(self.layers, [whole, one], self.keep)["series"][f"{strategy} healed"]["recommendation"]
            passed, reasons[n] = bool(advice["n"] == n), advice["why"]
            self.say(f"n = {n}, healed: {'passes' if passed else 'does not pass'}. {advice['why']}")
            best = max(passing, default=0)
            if passed:
                passing.append(n)
            self.forget(strategy, n if not passed or n < best else best)
            return passed

        passing: list[int] = []
        with self.folder.phase("search"):
            found = search(self.layers, first, second, passes)
            if found.n:  # where a curve is not monotone, the answer's checkpoint may have been removed
                healed[strategy, found.n] = heal_depth(self.stages, self.path, strategy, found.n, ranking)
            for n in passing:
                if n != found.n:
                    self.forget(strategy, n)
        rows = self.rows(kept, swept, healed)
        curve = write_curve(self.path, self.setup.source.label, self.layers, rows, self.keep)
        advice = read_json(self.path / "collapse.json")
        if found.n:  # of all series this one is the answer
            name = f"{strategy} healed"
            best = advice["series"][name]["recommendation"]
            advice["verdict"] = {"series": name, **best, "n": found.n, "fraction": found.n / self.layers}
            write_json(self.path / "collapse.json", advice)
        figures = draw_curve(self.path, curve, ranking)
        checkpoint = f"heal/{strategy}-{found.n}/healed" if found.n else None
        self.folder.note(answer={"series": f"{strategy} healed", "n": found.n})
        write_report(self.path)
        self.folder.finish(
            {
                "model": self.setup.source.name,
                "layers": self.layers,
                "strategy": strategy,
                "keep": self.keep,
                "n": found.n,
                "kept": list(kept[strategy, found.n]) if found.n else list(range(self.layers)),
                "tested": [[n, passed, reasons[n]] for n, passed in found.tested],
                "why": found.why,
                "rows": [r for r in curve["rows"] if r["n"] == 0 or (r["healed"] and r["n"] == found.n)],
                "checkpoint": checkpoint,
                "figures": figures,
                "collapse": advice,
            }
        )

    def forget(self, strategy: str, n: int) -> None:
        """Remove the weights of a depth that is measured; its eval.json stays."""
        place = self.path / "heal" / f"{strategy}-{n}"
        for name in ("healed", "adapter"):
            shutil.rmtree(place / name, ignore_errors=True)

    def bracket(self, rows: list[dict[str, Any]], strategy: str) -> tuple[int, int]:
        """Where the curve without healing holds by its estimates, and where its first task has collapsed."""
        one = collapse(self.layers, rows, self.keep)["series"].get(strategy)
        if one is not None and not one["tasks"]:
            raise Refused(f"no item of {', '.join(self.setup.tasks)} is right or wrong: there is no accuracy to keep")
        if one is None or one["recommendation"]["status"] == "no task above chance":
            raise Refused(f"no task is above chance with the whole {self.setup.source.name}: there is no accuracy to keep")
        first = min(max(1, one["recommendation"]["likely"]), self.layers - 1)
        steps = [task["transition"]["first"] for task in one["tasks"].values() if task["transition"]["first"] is not None]
        return first, max(first + 1, min(steps, default=self.layers - 1))

    def cost(self) -> str:
        """What is ahead, estimated; refuses a disk that cannot hold it."""
        usual, most = math.ceil(math.log2(self.layers)) + 2, most_tests(self.layers)
        heals = f"about {usual} cuts will be healed, at most {most}"
        assert self.setup.heal is not None
        each = f"{self.setup.heal.steps:,} steps of {self.setup.heal.batch_size} sequences"
        try:
            found, kind = costs(self.setup, max(1, self.layers // 4))
        except Refused as refusal:
            return f"{heals}, {each} each; the time cannot be estimated ({refusal})"
        need = sum(found.disk[name] for name in ("pruned", "healed", "work")) + found.disk["healed"]
        must_have_room(self.path, need, held_bytes(self.path))
        others = sum(step.hours for step in found.steps if step.name not in ("rank", "heal"))
        one = step_hours(found, "heal") + others
        hours = step_hours(found, "rank") + 4 * others + usual * one
        return (
            f"{heals}, {each} each; estimate: {as_bytes(need)} of disk, {as_time(hours)} on one {kind.name}, {as_time(one)} of it "
            f"for each healing{unknown_tasks(found)}"
        )
