"""`layerprune route eval`: routed models beside the whole model and static cuts, on the same items."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from layerprune.model.config import layer_count, load_config
from layerprune.model.cuts import Block, Kept, last_block
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import read_json, write_json
from layerprune.model.fingerprint import checkpoint_fingerprint, folder_fingerprint, tokenizer_fingerprint
from layerprune.model.source import ModelSource, find_model
from layerprune.route_compare import depths_around
from layerprune.route_summary import Plan, left, mean_layers, routed_file, static_file, summarise
from layerprune.runfolder import RunFolder, open_run
from layerprune.stages import Say, to_stderr

DIALS: tuple[str | float, ...] = (-0.6, "router", -0.25, 0.0)
"""From more skipping than the routers ask for to less: a curve of accuracy against depth."""
STATIC = {"both": ("angular", "last"), "angular": ("angular",), "last": ("last",), "none": ()}
_ALSO = {"last-n": "last"}
"""Another name that is understood for one of STATIC."""
_KIND = "route eval"


def evaluate_routing(
    model: str | Path,
    routers: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    items: str | Path | None = None,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    dials: Sequence[str | float] | None = None,
    static: str = "both",
    rank: str | Path | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    progress: bool = False,
    say: Say = to_stderr,
) -> dict[str, Any]:
    """Measure a routed model at some dials, the whole model, and static cuts of the same mean depths.

    routers: the folder of `route train`, or its routers/. tasks: lm-eval tasks, scored by lm-eval itself; items: instead of
    them, a file (`layerprune.route.items`), whose items are right by the reward of the search. split: documents of the tasks,
    by default those for testing. Items whose prompts were in the search of the routers are left out, and counted. dials: see
    `turn_dial`; by default DIALS; the whole model (`execute`) is always measured. static: angular, last, both or none: cuts
    by these strategies that keep the whole numbers of layers around each mean depth; angular takes its blocks from `rank`
    (a rank.json), else ranks on the recipe's calibration data.

    out: the folder, by default runs/<model>-routed; it gets eval.json and figures/. A killed call goes on, dial by dial, and the
    same folder again adds dials and cuts. Returns eval.json's content with `folder`: of `base`, each of `routed` and each cut
    of `static` the accuracy and `layers`, the mean over items of the layers that each token passes through (the routers'
    own pass over a prompt, where there is one, not counted), by task and on average over tasks; `seconds` of deciding, passes
    and generating; `usage`, by task, how often each layer runs on average; and `against`, by strategy, the paired comparison
    at equal depth (`Difference`; by task at the task's own mean depth). Raises UsageError and Refused.
    """
    from layerprune.model.load import pick_device, pick_dtype
    from layerprune.route_items import want_items

    static = _ALSO.get(static, static)
    if static not in STATIC:
        raise UsageError(f"--static {static} is none of {', '.join(STATIC)}")
    if rank is not None and "angular" not in STATIC[static]:
        raise UsageError(f"--rank is for angular cuts, and --static {static} has none: leave it out")
    pick_dtype(dtype, pick_device(device))
    source = find_model(str(model))
    wanted = want_items(
        source, tasks=tasks, items=items, task_folder=task_folder, limit=limit, split=split, default=("test", "validation"),
        seed=seed, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    plan = _plan(source, Path(routers), wanted, dials, STATIC[static], rank, seed, dtype, device, trust_remote_code)
    folder = Path(out) if out is not None else Path("runs") / f"{source.label}-routed"
    with open_run(folder, plan.inputs, {"model": source.name, "routers": str(routers), **wanted.told()}) as opened:
        if opened.other_versions():
            say(opened.other_versions())
        Evaluation(plan, opened, progress, say).measure()
        result = summarise(plan, opened)
        write_json(folder / "eval.json", result)
        _draw(folder, result, source.label)
        opened.finish({key: value for key, value in result.items() if key != "static"})
        return {**result, "folder": str(folder)}


def _plan(
    source: ModelSource, routers: Path, wanted: Any, dials: Sequence[str | float] | None, strategies: tuple[str, ...],
    rank: str | Path | None, seed: int, dtype: str, device: str | None, trust: bool,
) -> Plan:  # fmt: skip
    from layerprune.model.load import pick_device
    from layerprune.prune.rank import read_ranking
    from layerprune.route.router import parse_dial

    named = {dial_name(value): value for value in map(parse_dial, ("execute", *(DIALS if dials is None else dials)))}
    place, searched = find_routers(routers, source)
    layers = layer_count(load_config(source.folder, trust))
    ranking = None if rank is None else read_ranking(rank, source, layers)
    if "angular" in strategies and ranking is None:
        _check_calibration(source, seed)
    inputs = {
        "kind": _KIND, "model": checkpoint_fingerprint(source.folder), "tokenizer": tokenizer_fingerprint(source.folder),
        "routers": folder_fingerprint(place), "items": wanted.inputs(), "seed": seed, "dtype": dtype, "device": pick_device(device),
        "rank": None if ranking is None else hashlib.sha256(json.dumps(ranking["best"]).encode()).hexdigest(),
    }  # fmt: skip
    return Plan(source, place, wanted, named, strategies, ranking, layers, searched, seed, dtype, device, trust, inputs)


def dial_name(value: float) -> str:
    from layerprune.route.router import DIALS as NAMED

    return next((name for name, own in NAMED.items() if own == value), f"{value + 0.0:g}")


def find_routers(given: Path, source: ModelSource) -> tuple[Path, frozenset[str] | None]:
    """The folder with the routers of a model, and the prompts (`prompt_key`) of their search; None where it does not say."""
    from layerprune.route.router_file import CONFIG, load_routers

    inner = given / "routers"
    place = inner if not (given / CONFIG).exists() and (inner / CONFIG).exists() else given
    if not (place / CONFIG).exists():
        raise Refused(f"{given} holds no routers ({CONFIG} is missing): give the --out of `layerprune route train`")
    load_routers(place, source.folder)
    about = read_json(place / CONFIG).get("about")
    prompts = about.get("prompts") if isinstance(about, dict) else None
    return place, frozenset(map(str, prompts)) if isinstance(prompts, list) else None


def _check_calibration(source: ModelSource, seed: int) -> None:
    from layerprune.model.data import check_data
    from layerprune.prune.rank import rank_settings

    data = rank_settings(source, None, None, None)["data"]
    try:
        check_data(data, "calibration data", "validation", seed)
    except (Refused, UsageError) as error:
        raise type(error)(
            f"angular cuts need a ranking ({error}): give --rank FILE of `layerprune rank`, or --static last"
        ) from None


class Evaluation:
    """One evaluation under way; each part is a JSON file in the folder and is not measured twice."""

    def __init__(self, plan: Plan, opened: RunFolder, progress: bool, say: Say) -> None:
        self.plan, self.opened, self.progress, self.say = plan, opened, progress, say
        self._measure: Any = None

    def measure(self) -> None:
        plan = self.plan
        with contextlib.ExitStack() as stack:
            self._stack = stack
            for name in plan.dials:
                if not (self.opened.path / routed_file(name)).exists():
                    self._ready()
                    self.say(f"measuring the dial {name}")
                    with self.opened.phase(f"dial {name}"):
                        self.opened.once(routed_file(name), partial(self._routed, plan.dials[name]))
            missing = self._missing_cuts()
            if missing:
                self.say(f"measuring {len(set(missing.values()))} static cuts")
                with self.opened.phase("static cuts"):
                    found = self._ready().static(list(dict.fromkeys(missing.values())), self.opened.path / "answers")
                    for file, kept in missing.items():
                        self.opened.once(file, partial(dict, kept=list(kept), right=found[kept]))

    def _ready(self) -> Any:
        """The loaded model behind what measures it."""
        from layerprune.model.load import load_model, load_tokenizer
        from layerprune.route_measure import measure_of

        if self._measure is None:
            plan, source = self.plan, self.plan.source
            self._tokenizer = load_tokenizer(source.folder, plan.trust)
            measure = measure_of(plan.wanted, self._tokenizer, plan.seed, self.progress, self.say)
            if plan.searched and not (self.opened.path / routed_file("execute")).exists():
                measure.must_leave_some(plan.searched)
            self._live = load_model(
                source.folder, device=plan.device, dtype=plan.dtype, trust_remote_code=plan.trust, progress=self.progress
            )
            self._stack.enter_context(measure.opened(self._live))
            self._measure = measure
        return self._measure

    def _routed(self, dial: float) -> dict[str, Any]:
        from layerprune.model.decoder import view_decoder
        from layerprune.route.routed import RoutedModel
        from layerprune.route.router_file import load_routers

        ready = self._ready()
        made = RoutedModel(view_decoder(self._live), load_routers(self.plan.routers, self.plan.source.folder), dial)
        found: dict[str, Any] = ready.routed(made)
        return {"dial": dial, **found}

    def _missing_cuts(self) -> dict[str, Kept]:
        """The cuts around all mean depths that are not measured yet, by their file."""
        plan = self.plan
        stays: set[int] = set()
        for name in plan.dials:
            mean, by_task = mean_layers(left(plan, read_json(self.opened.path / routed_file(name))))
            stays |= depths_around(mean, plan.layers, margin=1).union(*(depths_around(m, plan.layers) for m in by_task.values()))
        found: dict[str, Kept] = {}
        for strategy in plan.strategies:
            for stay in sorted(stays):
                if not (self.opened.path / static_file(strategy, stay)).exists():
                    found[static_file(strategy, stay)] = self._kept(strategy, stay)
        return found

    def _kept(self, strategy: str, stay: int) -> Kept:
        n, layers = self.plan.layers - stay, self.plan.layers
        if n == 0:
            return tuple(range(layers))
        if strategy == "last":
            return last_block(n, layers).kept(layers)
        ranking = self.plan.ranking or self.opened.once("rank.json", self._rank)
        return Block(int(ranking["best"][str(n)]), n).kept(layers)

    def _rank(self) -> dict[str, Any]:
        from layerprune.model.decoder import view_decoder
        from layerprune.prune.rank import rank_live, rank_settings

        self._ready()
        self.say("ranking all blocks for the angular cuts")
        settings = rank_settings(self.plan.source, None, None, None)
        decoder = view_decoder(self._live)
        return rank_live(decoder, self._tokenizer, settings, self.plan.source, seed=self.plan.seed, progress=self.progress)


def _draw(folder: Path, result: Mapping[str, Any], label: str) -> None:
    from layerprune.route_plots import plot_routing, plot_usage

    plot_routing(result, folder / "figures", label)
    plot_usage(result, folder / "figures", label)
