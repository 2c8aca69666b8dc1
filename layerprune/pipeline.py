"""`layerprune run`: rank, prune, heal, evaluate and draw, in one folder that can be resumed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.model.config import layer_count, load_config
from layerprune.model.cuts import Block, last_block
from layerprune.model.errors import Refused, UsageError, model_errors, one_line
from layerprune.model.files import read_json
from layerprune.model.tensors import read_checkpoint
from layerprune.runfolder import RunFolder, open_run
from layerprune.runplan import Plan, plan_run, run_cost

Say = Callable[[str], None]


def _stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(
    model: str | Path,
    drop: float,
    *,
    out: str | Path | None = None,
    progress: bool = False,
    say: Say = _stderr,
    verify: bool | None = None,
    batch_size: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Rank, prune, heal, evaluate and draw: everything for one fraction of layers, in one run folder.

    model: recipe name, Hub id or local folder. drop: fraction of layers in (0, 1). settings: those of `plan_run`.
    out: the run folder, by default runs/<model>-<strategy>-<drop>; it gets manifest.json, rank.json, pruned/, healed/,
    adapter/, eval.json, curve.json and figures/. A folder with a run of the same inputs is resumed; a finished one is
    only read. Returns the result that `layerprune.report.format_run` prints. Raises UsageError and Refused.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is not a number above 0")
    plan = plan_run(model, drop, **settings)
    folder = Path(out) if out is not None else Path("runs") / f"{plan.source.label}-{plan.strategy}-{drop:g}"
    with open_run(folder, plan.inputs(), plan.given()) as opened:
        if opened.finished:
            for name in ("pruned", *(("healed", "adapter") if plan.heal is not None else ())):
                if not (folder / name).exists():
                    raise Refused(f"{folder} holds this run, finished, but its {name}/ is gone: choose another --out")
            say(f"{folder} holds this run, finished")
        else:
            _Run(plan, opened, say, progress, verify, batch_size).all()
        where = {"folder": str(folder), "checkpoint": str(folder / ("pruned" if plan.heal is None else "healed"))}
        return {**opened.manifest["result"], **where}


class _Run:
    """The phases of one run, in order. Each leaves a file or a folder, and is skipped where that is there."""

    def __init__(
        self, plan: Plan, folder: RunFolder, say: Say, progress: bool, verify: bool | None, batch_size: int | None
    ) -> None:
        self.plan, self.folder, self.path, self.say, self.progress = plan, folder, folder.path, say, progress
        self.verify, self.batch_size = verify, batch_size
        self._ready: tuple[Any, Any, Any] | None = None

    def all(self) -> None:
        self.announce()
        self.ready()  # an unknown task, or data that measures nothing, ends the run here, not hours later
        if self.plan.heal is not None and not (self.path / "healed").exists():
            self.check_healing()
        with self.folder.phase("rank"):
            ranking = self.rank()
        block = self.block(self.plan.n, ranking)
        distance = ranking["distance"][block.size - 1][block.start]
        self.say(f"the block of {block.size} layers to drop is {block} (angular distance {distance:.4f})")
        with self.folder.phase("prune"):
            self.prune(ranking)
        if self.plan.heal is not None:
            with self.folder.phase("heal"):
                self.heal()
        with self.folder.phase("eval"):
            evaluation, rows = self.evaluate(ranking)
        with self.folder.phase("figures"):
            curve = self.folder.once("curve.json", lambda: {"layers": self.plan.layers, "rows": rows})
            figures = self.draw(ranking, curve)
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
        return dict(self.folder.once("rank.json", self._rank))

    def _rank(self) -> dict[str, Any]:
        from layerprune.model.decoder import view_decoder
        from layerprune.prune.rank import rank_live

        live, tokenizer = self.load(self.plan.source.folder)
        return rank_live(
            view_decoder(live), tokenizer, self.plan.rank, self.plan.source, seed=self.plan.seed, progress=self.progress
        )

    def block(self, n: int, ranking: Mapping[str, Any]) -> Block:
        from layerprune.prune.cut import choose_block

        return choose_block(n / self.plan.layers, self.plan.layers, self.plan.strategy, ranking)

    def prune(self, ranking: Mapping[str, Any]) -> None:
        from layerprune.prune.cut import prune_checkpoint

        if (self.path / "pruned").exists():
            return
        self.say("cutting the block out")
        plan = self.plan
        angular = plan.strategy == "angular"
        found = prune_checkpoint(
            plan.source.name,
            self.path / "pruned",
            drop=plan.drop,
            strategy=plan.strategy,
            ranking=ranking if angular else None,
            seed=plan.seed,
            trust_remote_code=plan.trust_remote_code,
            verify=self.verify,
            progress=self.progress,
            say=self.say,
        )
        for what, how in found["verified"].items():
            self.say(f"  {what}: {how}")

    def check_healing(self) -> None:
        """What healing would refuse (the architecture, the targets, the data) is refused before anything is ranked."""
        from layerprune.heal.train import check_healing

        plan = self.plan
        assert plan.heal is not None
        check_healing(
            plan.source, data=plan.heal.data, seed=plan.seed, trust_remote_code=plan.trust_remote_code, **plan.heal_options
        )

    def heal(self) -> None:
        from layerprune.heal.train import heal_checkpoint

        if (self.path / "healed").exists():
            return
        plan = self.plan
        assert plan.heal is not None
        self.say("healing")
        heal_checkpoint(
            self.path / "pruned",
            self.path / "healed",
            data=plan.heal.data if plan.own_heal_data else None,
            seed=plan.seed,
            device=plan.asked_device,
            trust_remote_code=plan.trust_remote_code,
            adapter=self.path / "adapter",
            work=self.folder.work / "heal",
            report=self.say,
            progress=self.progress,
            **plan.heal_options,
        )

    def load(self, folder: Path) -> tuple[Any, Any]:
        from layerprune.model.load import load_model, load_tokenizer

        plan = self.plan
        live = load_model(
            folder,
            device=plan.asked_device,
            dtype=plan.dtype,
            trust_remote_code=plan.trust_remote_code,
            progress=self.progress,
        )
        return live, load_tokenizer(folder, plan.trust_remote_code)

    def ready(self) -> tuple[Any, Any, Any]:
        """The tasks, those of them that a virtually cut model can answer, and the loss sequences; loaded once."""
        from layerprune.eval.evaluate import loss_sequences
        from layerprune.eval.tasks import load_tasks
        from layerprune.model.load import load_tokenizer

        if self._ready is None:
            plan, chosen = self.plan, self.plan.evaluation
            tasks = curve_tasks = None
            if plan.tasks:
                tasks = curve_tasks = load_tasks(plan.tasks, plan.task_folder, plan.seed)
                makes_text = {
                    name for name in tasks.names
                    if any(tasks.tasks[member].OUTPUT_TYPE == "generate_until" for member in tasks.members[name])
                }  # fmt: skip
                if makes_text:
                    names = ", ".join(sorted(makes_text))
                    self.say(f"{names}: scored whole, cut and healed; left out of the curve, which has no KV cache")
                    left = {name: shots for name, shots in plan.tasks.items() if name not in makes_text}
                    curve_tasks = load_tasks(left, plan.task_folder, plan.seed) if left else None
            config = load_config(plan.source.folder, plan.trust_remote_code)
            tokenizer = load_tokenizer(plan.source.folder, plan.trust_remote_code)
            sequences = loss_sequences(
                tokenizer, config, chosen.data, chosen.samples, chosen.length, plan.seed, self.progress
            )
            self._ready = (tasks, curve_tasks, sequences)
        return self._ready

    def measure(self, live: Any, tokenizer: Any, curve: bool = False) -> dict[str, Any]:
        from layerprune.eval.evaluate import evaluate_live

        tasks, curve_tasks, sequences = self.ready()
        return evaluate_live(
            live,
            tokenizer,
            tasks=curve_tasks if curve else tasks,
            limit=self.plan.evaluation.limit,
            sequences=sequences,
            batch_size=self.batch_size,
            seed=self.plan.seed,
            samples=True,
            progress=self.progress,
        )

    def measured(self, name: str, folder: Path) -> dict[str, Any]:
        """Measure a written checkpoint (loss, tasks, speed), once."""

        def make() -> dict[str, Any]:
            from layerprune.eval.speed import generation_speed

            self.say(f"evaluating {name}")
            live, tokenizer = self.load(folder)
            return {**self.measure(live, tokenizer), "speed": generation_speed(live, tokenizer)}

        return {**_sizes(folder, self.plan.trust_remote_code), **self.folder.once(f".work/{name}.json", make)}

    def evaluate(self, ranking: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """eval.json, and the rows of the curve."""
        parts = {"whole": self.plan.source.folder, "pruned": self.path / "pruned", "healed": self.path / "healed"}
        if self.plan.heal is None:
            del parts["healed"]
        if (self.path / "eval.json").exists() and (self.path / "curve.json").exists():
            return read_json(self.path / "eval.json"), read_json(self.path / "curve.json")["rows"]
        found = {name: self.measured(name, folder) for name, folder in parts.items()}
        depths = self.depths(ranking)
        rows = [_row(self.plan, 0, range(self.plan.layers), False, found["whole"])]
        for n in self.plan.curve:
            block = self.block(n, ranking)
            measured = found["pruned"] if n == self.plan.n else depths[n]
            if measured is None:
                continue
            rows.append(_row(self.plan, n, block.kept(self.plan.layers), False, measured))
            if n == self.plan.n and "healed" in found:
                rows.append(_row(self.plan, n, block.kept(self.plan.layers), True, found["healed"]))
        return self.folder.once("eval.json", lambda: found), rows

    def depths(self, ranking: Mapping[str, Any]) -> dict[int, dict[str, Any] | None]:
        """The other depths of the curve: the source, loaded once, with each block cut virtually; None where it cannot run."""
        others = [n for n in self.plan.curve if n != self.plan.n]
        names = {n: f".work/curve-{n}.json" for n in others}
        if all((self.path / name).exists() for name in names.values()):
            return {n: read_json(self.path / name) for n, name in names.items()}
        from layerprune.model.decoder import view_decoder, virtual_cut

        live, tokenizer = self.load(self.plan.source.folder)
        decoder = view_decoder(live)
        found = {}
        for n in others:
            block = self.block(n, ranking)

            def make(block: Block = block) -> dict[str, Any] | None:
                self.say(f"curve: {block.size} of {self.plan.layers} layers dropped ({block})")
                try:
                    with virtual_cut(decoder, block.kept(self.plan.layers)):
                        return self.measure(live, tokenizer, curve=True)
                except model_errors() as error:
                    self.say(f"left out of the curve: without layers {block} this model does not run ({one_line(error)})")
                    return None

            found[n] = self.folder.once(names[n], make)
        return found

    def draw(self, ranking: dict[str, Any], curve: dict[str, Any]) -> list[str]:
        from layerprune.plots import plot_curves, plot_distances

        label = self.plan.source.label
        files = plot_curves(curve, self.path / "figures", label) + plot_distances(ranking, self.path / "figures", label)
        return [str(file.relative_to(self.path)) for file in files]

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


def _sizes(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    stored = read_checkpoint(folder)
    layers = layer_count(load_config(folder, trust_remote_code))
    parameters = sum(tensor.numel for tensor in stored.values())
    return {"layers": layers, "parameters": parameters, "bytes": sum(t.nbytes for t in stored.values())}


def _scores(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Accuracies as `task/metric`: value, stderr, chance."""
    table = measured["tasks"]["table"] if measured["tasks"] else []
    return {f"{r['task']}/{r['metric']}": {k: r[k] for k in ("value", "stderr", "chance")} for r in table}


def _summary(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: measured[key] for key in ("layers", "parameters", "bytes")},
        "loss": measured["loss"]["normalised"],
        "tasks": _scores(measured),
        "tokens_per_second": measured["speed"]["tokens_per_second"],
    }


def _row(plan: Plan, n: int, kept: Sequence[int], healed: bool, measured: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "strategy": plan.strategy,
        "n": n,
        "fraction": n / plan.layers,
        "healed": healed,
        "kept": list(kept),
        "loss": measured["loss"]["normalised"],
        "tasks": _scores(measured),
    }
