"""Search for a shorter path that still answers one prompt: Monte Carlo tree search (arXiv 2510.12773, section 4, algorithm 1).

A node is a path, its children are the paths one edit away. A simulation goes down by
    UCB = Q/v + c sqrt(ln V / v) - lambda |path| / L,
v and Q being a node's visits and summed rewards, V the visits of the parent that is being left; with probability p_rand a
child is taken at random. Only rewards go back up: length is paid for where a child is chosen. A path that several edits
reach is one node, evaluated once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from layerprune.model.errors import UsageError
from layerprune.route.paths import Counts, edits, path_length, unique_layers, whole_path

Reward = Callable[[Counts], float]
"""How good the answer along a path is, 0 to 1; 0 is wrong."""


@dataclass(frozen=True)
class SearchSettings:
    """simulations: descents at most. exploration: c. length_penalty: lambda. random_share: p_rand.

    longest_skip: neighbours that may be skipped together over several edits, None for any number. stop_shorter: the search
    ends at a path that answers better than the model, or as well with so many layers fewer; None to run all simulations.
    Raises UsageError for values out of range.
    """

    simulations: int = 50
    exploration: float = 1.8
    length_penalty: float = 3.0
    random_share: float = 0.1
    longest_skip: int | None = 2
    stop_shorter: int | None = 2

    def __post_init__(self) -> None:
        if self.simulations < 1:
            raise UsageError(f"{self.simulations} simulations find nothing: use at least 1")
        if not (0 <= self.exploration < math.inf and 0 <= self.length_penalty < math.inf and 0 <= self.random_share <= 1):
            raise UsageError(
                f"exploration {self.exploration:g} and length penalty {self.length_penalty:g} must be 0 or more, and the random "
                f"share {self.random_share:g} from 0 to 1"
            )
        if any(value is not None and value < 1 for value in (self.longest_skip, self.stop_shorter)):
            raise UsageError("the longest skip and the layers fewer at which the search stops must be 1 or more, or None")


@dataclass(frozen=True)
class Found:
    """What a search found for one prompt.

    best: the shortest path that answers (reward above 0) no worse than the whole model; of equally short ones the one with
    fewer different layers, then with the higher reward. It may be the whole model itself; None where nothing answers.
    base, reward: of the whole model, and of `best` (0 where there is none). visited: different paths evaluated beside the
    whole model. improved, kept: how many of them answer better than it, and no worse. simulations: descents made.
    """

    best: Counts | None
    base: float
    reward: float
    visited: int
    improved: int
    kept: int
    simulations: int

    @property
    def saved(self) -> int:
        """Layer applications that `best` saves; negative where it repeats more than it skips."""
        return 0 if self.best is None else len(self.best) - path_length(self.best)

    @property
    def useful(self) -> bool:
        """Whether there is something to learn: a better answer, or as good a one with fewer layers."""
        return self.best is not None and (self.reward > self.base or self.saved > 0)


@dataclass
class Node:
    visits: int = 0
    total: float = 0.0
    children: tuple[Counts, ...] | None = None
    """None where they have not been asked for."""


def ucb(node: Node, parent_visits: int, length: int, layers: int, settings: SearchSettings) -> float:
    """The value by which a visited child is chosen; length is that of its path, layers is L."""
    bonus = settings.exploration * math.sqrt(math.log(parent_visits) / node.visits)
    return node.total / node.visits + bonus - settings.length_penalty * length / layers


def search_path(reward: Reward, layers: int, settings: SearchSettings | None = None, seed: int = 0) -> Found:
    """Search the paths of a model of L layers. `reward` is called once a path; the same seed finds the same.

    Raises UsageError for a reward outside 0 .. 1.
    """
    search = Search(reward, layers, settings or SearchSettings(), seed)
    made = 0
    while made < search.settings.simulations and not search.ended and search.nodes[search.root].children != ():
        search.simulate()
        made += 1
    return search.found(made)


class Search:
    """One search under way. nodes: the paths visited so far; rewards: theirs."""

    def __init__(self, reward: Reward, layers: int, settings: SearchSettings, seed: int) -> None:
        self._reward, self._layers, self.settings = reward, layers, settings
        self._rng = random.Random(seed)
        self.root = whole_path(layers)
        self.rewards: dict[Counts, float] = {}
        self.nodes: dict[Counts, Node] = {}
        self.ended = False
        self._evaluate(self.root)
        self.back_up([self.root])
        self._children(self.root)

    def simulate(self) -> None:
        """Go down to a path that is new, or that has no edits left, and carry its reward up the way that led there."""
        way = [self.root]
        while children := self._children(way[-1]):
            way.append(self._choose(way[-1], children))
            if way[-1] not in self.nodes:
                self._evaluate(way[-1])
                break
        self.back_up(way)

    def back_up(self, way: list[Counts]) -> None:
        """Add the reward of the last path of a way, and of it alone, to every node of the way."""
        for counts in way:
            node = self.nodes.setdefault(counts, Node())
            node.visits += 1
            node.total += self.rewards[way[-1]]

    def _children(self, counts: Counts) -> tuple[Counts, ...]:
        node = self.nodes[counts]
        if node.children is None:
            node.children = tuple(edits(counts, self.settings.longest_skip))
        return node.children

    def _choose(self, parent: Counts, children: tuple[Counts, ...]) -> Counts:
        if self._rng.random() < self.settings.random_share:
            return self._rng.choice(children)
        above = self.nodes[parent]
        # A path not yet seen counts as one visit with its parent's mean. An infinite value, as is usual, would keep 50
        # simulations among the children of the root, of which a model of 28 layers has 83.
        unseen = Node(1, above.total / above.visits)
        values = [
            ucb(self.nodes.get(child, unseen), above.visits, path_length(child), self._layers, self.settings) for child in children
        ]
        best = max(values)
        return self._rng.choice([child for child, value in zip(children, values, strict=True) if value == best])

    def _evaluate(self, counts: Counts) -> None:
        value = float(self._reward(counts))
        if not 0 <= value <= 1:
            raise UsageError(f"a path has the reward {value:g}: rewards go from 0 (wrong) to 1")
        self.rewards[counts] = value
        shorter = self.settings.stop_shorter
        better = value > self.rewards[self.root]
        enough = shorter is not None and self._is_kept(counts) and path_length(counts) <= self._layers - shorter
        self.ended |= shorter is not None and (better or enough)

    def _is_kept(self, counts: Counts) -> bool:
        return 0 < self.rewards[counts] >= self.rewards[self.root]

    def found(self, simulations: int) -> Found:
        base = self.rewards[self.root]
        kept = [counts for counts in self.rewards if self._is_kept(counts)]
        best = min(kept, key=lambda c: (path_length(c), unique_layers(c), -self.rewards[c], c), default=None)
        return Found(
            best, base, 0.0 if best is None else self.rewards[best], len(self.rewards) - 1,
            sum(value > base for value in self.rewards.values()), len(kept) - (self.root in kept), simulations,
        )  # fmt: skip
