"""Which items a model answers: along the paths of routers, and under static cuts; of lm-eval tasks, or of a file of items."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.model.cuts import Kept
from layerprune.model.decoder import view_decoder
from layerprune.model.errors import Refused
from layerprune.model.layerwise import Layerwise
from layerprune.model.progress import progress_bar
from layerprune.route.items import Item, prompt_key
from layerprune.route.paths import Counts, whole_path
from layerprune.route.routed import RoutedModel
from layerprune.route_summary import all_searched
from layerprune.stages import Say

Right = dict[str, list[int]]
"""By task: 1 or 0 an item, in the order of the data."""


class OfTasks:
    """lm-eval tasks, scored by lm-eval itself. Raises Refused for a task whose accuracy is not one of single items."""

    def __init__(self, wanted: Any, tokenizer: Any, seed: int, progress: bool, say: Say) -> None:
        from layerprune.eval.tasks import ACCURACIES, load_tasks
        from layerprune.task_requests import pick_splits

        self.tokenizer, self.limit, self.seed, self.progress, self.say = tokenizer, wanted.limit, seed, progress, say
        self.source, self.trust = wanted.source, wanted.trust
        self.ready = load_tasks(wanted.tasks, wanted.task_folder, wanted.seed)
        for name, task in self.ready.tasks.items():  # most show it before anything is measured
            metrics = {metric["metric"] for metric in getattr(task.config, "metric_list", None) or ()}
            if metrics and not metrics & set(ACCURACIES):
                raise _without_items(name)
        self.splits = pick_splits(self.ready, wanted.split, ("test", "validation"))

    def must_leave_some(self, searched: frozenset[str]) -> None:
        """Before a model is loaded. Raises Refused for a task all of whose items have prompts (`prompt_key`) of the search."""
        from layerprune.eval.harness import LiveModel
        from layerprune.eval.tasks import quiet
        from layerprune.model.verify import meta_decoder
        from layerprune.task_requests import task_requests

        documents = task_requests(self.ready, self.limit, self.seed, self.splits)
        with quiet():  # lm-eval's tokenisation asks a model for its config only
            lm = LiveModel(meta_decoder(self.source.folder, self.trust).model, self.tokenizer)

        def was_searched(texts: Sequence[str]) -> bool:
            return any(prompt_key(lm._encode_pair(text, "")[0]) in searched for text in texts)

        for name in self.ready.names:
            items = [_texts(pairs.pairs) for leaf in self._leaves(name) for pairs in documents[leaf]]
            if items and all(map(was_searched, items)):
                raise all_searched(name, len(items))

    @contextlib.contextmanager
    def opened(self, live: Any) -> Iterator[None]:
        """Inside the block a loaded model can be measured, and requests are built once."""
        from layerprune.eval.tasks import built_once
        from layerprune.task_requests import documents_of

        self.live = live
        with contextlib.ExitStack() as stack:
            for name, task in self.ready.tasks.items():
                stack.enter_context(documents_of(task, self.splits[name]))
            stack.enter_context(built_once(self.ready))
            yield

    def routed(self, routed: RoutedModel) -> dict[str, Any]:
        """Of each task the items that are right, the path of each (several where an item has several contexts), and the
        identities of its prompts."""
        from layerprune.eval.tasks import ask_harness, quiet, summarise
        from layerprune.route_lm import RoutedLM

        with quiet():
            lm = RoutedLM(routed, self.tokenizer, progress=self.progress)
        lm.warm_up()
        found = ask_harness(lm, self.ready, self.limit, self.seed)
        scores = summarise(self.ready, found, lm.truncated, samples=True)
        right, chances = self._by_name(scores["correct"]), {row["task"]: row["chance"] for row in scores["table"]}
        whole = [_digits(lm.whole)]
        tasks: dict[str, Any] = {}
        for name in right:
            made = tasks[name] = {"right": right[name], "paths": [], "keys": [], "chance": chances.get(name)}
            for leaf in self._leaves(name):
                for texts in _contexts(found["samples"][leaf]):
                    made["paths"].append([_digits(lm.taken[text]) for text in texts] or whole)
                    made["keys"].append([prompt_key(lm._encode_pair(text, "")[0]) for text in texts])
        return {"seconds": lm.seconds, "building_seconds": routed.built_seconds, "truncated": lm.truncated, "tasks": tasks}

    def static(self, kept: Sequence[Kept], answers: Path) -> dict[Kept, Right | None]:
        """Of each cut the items that are right, all cuts from one pass; None for a cut that the model cannot run."""
        from layerprune.eval.answers import Answers
        from layerprune.eval.sweep import sweep_live

        found = sweep_live(
            self.live, self.tokenizer, kept, tasks=self.ready, answers=Answers(answers), limit=self.limit, seed=self.seed,
            progress=self.progress, say=self.say,
        )  # fmt: skip
        return {one: None if got is None else self._by_name(got["tasks"]["correct"]) for one, got in found.items()}

    def _leaves(self, name: str) -> tuple[str, ...]:
        return self.ready.members[name] or (name,)

    def _by_name(self, correct: Mapping[str, list[int]]) -> Right:
        """The members of a group count together."""
        for name in self.ready.names:
            for leaf in self._leaves(name):
                if leaf not in correct:
                    raise _without_items(leaf)
        return {name: [value for leaf in self._leaves(name) for value in correct[leaf]] for name in self.ready.names}


class OfItems:
    """A file's items, by the reward of the search: the right option is the most probable, or the answer is generated."""

    def __init__(self, items: Sequence[Item], tokenizer: Any, progress: bool) -> None:
        from layerprune.route.reward import goes_on_with

        self.items, self.progress, self.goes_on = items, progress, goes_on_with(tokenizer)

    def must_leave_some(self, searched: frozenset[str]) -> None:
        """As `OfTasks.must_leave_some`."""
        for task in dict.fromkeys(item.task for item in self.items):
            prompts = [item.prompt for item in self.items if item.task == task]
            if all(prompt_key(prompt) in searched for prompt in prompts):
                raise all_searched(task, len(prompts))

    @contextlib.contextmanager
    def opened(self, live: Any) -> Iterator[None]:
        self.layerwise = Layerwise(view_decoder(live))
        yield

    def routed(self, routed: RoutedModel) -> dict[str, Any]:
        routed.decide([self.items[0].prompt])
        self._right(self.items[0], [whole_path(len(self.layerwise))])  # warm
        started = time.perf_counter()
        decided = routed.decide([item.prompt for item in self.items])
        values = []
        with progress_bar(len(self.items), "routed", "item", self.progress) as bar:
            for item, counts in zip(self.items, decided, strict=True):
                values += self._right(item, [counts])
                bar.update(1)
        seconds = time.perf_counter() - started
        tasks: dict[str, Any] = {}
        for item, counts, value in zip(self.items, decided, values, strict=True):
            made = tasks.setdefault(item.task, {"right": [], "paths": [], "keys": [], "chance": self._chance(item.task)})
            made["right"].append(value)
            made["paths"].append([_digits(counts)])
            made["keys"].append([prompt_key(item.prompt)])
        return {"seconds": seconds, "building_seconds": 0.0, "truncated": 0, "tasks": tasks}

    def static(self, kept: Sequence[Kept], answers: Path) -> dict[Kept, Right | None]:
        layers = len(self.layerwise)
        paths = [tuple(int(layer in set(one)) for layer in range(layers)) for one in kept]
        found: dict[Kept, Right | None] = {one: {} for one in kept}
        with progress_bar(len(self.items), f"{len(kept)} cuts", "item", self.progress) as bar:
            for item in self.items:
                for right, value in zip(found.values(), self._right(item, paths), strict=True):
                    assert right is not None
                    right.setdefault(item.task, []).append(value)
                bar.update(1)
        return found

    def _chance(self, task: str) -> float | None:
        """The mean of 1 / options; None where answers are generated."""
        shares = [1 / len(item.endings) for item in self.items if item.task == task and item.gold is not None]
        return sum(shares) / len(shares) if len(shares) == sum(item.task == task for item in self.items) else None

    def _right(self, item: Item, paths: Sequence[Counts]) -> list[int]:
        """Whether each path answers an item; their common beginnings are run once."""
        from layerprune.route.reward import PathReward

        reward = PathReward(self.layerwise, item, self.goes_on)
        return [int(reward(counts)) for counts in paths]


Measure = OfTasks | OfItems


def measure_of(wanted: Any, tokenizer: Any, seed: int, progress: bool, say: Say) -> Measure:
    """What measures the items that were asked for (`route_items.want_items`), which are read. Raises UsageError and Refused."""
    from layerprune.route_items import read_items

    if wanted.file is None:
        return OfTasks(wanted, tokenizer, seed, progress, say)
    return OfItems(read_items(wanted, tokenizer).items, tokenizer, progress)


def _without_items(task: str) -> Refused:
    return Refused(f"task {task} has no accuracy item by item, so routing and cuts cannot be compared on it: leave it out")


def _digits(counts: Counts) -> str:
    return "".join(map(str, counts))


def _contexts(samples: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The contexts of each item, in the order of `correct`; what is asked without a context beside others does not count."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    found = []
    for sample in sorted(first, key=lambda s: s["doc_id"]):
        arguments = sample["arguments"]
        pairs = list(arguments.values()) if isinstance(arguments, Mapping) else list(arguments)
        found.append(_texts([(pair["arg_0"],) if isinstance(pair, Mapping) else pair for pair in pairs]))
    return found


def _texts(pairs: Sequence[Sequence[str]]) -> list[str]:
    """The contexts of an item's requests, which come first in each, every one once."""
    return list(dict.fromkeys(pair[0] for pair in pairs if pair[0].strip()))
