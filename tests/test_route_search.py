"""The search for paths: its value and backup by hand, known optima, and its stops."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from layerprune.model.errors import UsageError
from layerprune.route.paths import Counts, edits, path_length, unique_layers, whole_path
from layerprune.route.search import Node, Search, SearchSettings, search_path, ucb

LONG = SearchSettings(simulations=600, stop_shorter=None)


def test_the_value_of_a_child_by_hand() -> None:
    node = Node(visits=4, total=3.0)
    expected = 0.75 + 1.8 * math.sqrt(math.log(9) / 4) - 3.0 * 26 / 28
    assert ucb(node, 9, 26, 28, SearchSettings()) == pytest.approx(expected)
    assert ucb(node, 9, 26, 28, SearchSettings(exploration=0, length_penalty=0)) == 0.75
    assert ucb(Node(1, 1.0), 1, 14, 28, SearchSettings()) == pytest.approx(1 - 1.5)


def test_rewards_alone_go_up_the_way_that_was_taken() -> None:
    values = {(1, 1, 1): 1.0, (0, 1, 1): 0.5, (0, 2, 1): 0.25, (1, 2, 1): 0.0}
    search = Search(values.__getitem__, 3, SearchSettings(), seed=0)
    for counts in values:
        search.rewards[counts] = values[counts]
    search.back_up([(1, 1, 1), (0, 1, 1)])
    search.back_up([(1, 1, 1), (0, 1, 1), (0, 2, 1)])
    search.back_up([(1, 1, 1), (1, 2, 1), (0, 2, 1)])
    held = {counts: (node.visits, node.total) for counts, node in search.nodes.items()}
    # the length of no path is in the sums, and a node that two ways reach is one
    assert held == {
        (1, 1, 1): (4, 2.0), (0, 1, 1): (2, 0.75), (0, 2, 1): (2, 0.5), (1, 2, 1): (1, 0.25),
    }  # fmt: skip


def test_a_child_is_chosen_by_the_visits_of_its_parent() -> None:
    """Two ways with the same children's sums: which child is taken hangs on V of the node that is left, not on the number of
    simulations so far, which is the same for both."""

    def chosen(parent_visits: int) -> Counts:
        settings = SearchSettings(random_share=0, exploration=1.0, length_penalty=0, stop_shorter=None)
        search = Search(lambda counts: 0.0, 2, settings, seed=0)
        search.nodes = {
            (1, 1): Node(100, 0.0), (2, 1): Node(parent_visits, 0.0), (2, 2): Node(2, 0.2), (0, 1): Node(20, 14.0),
            (2, 0): Node(20, 0.0),
        }  # fmt: skip
        return search._choose((2, 1), ((2, 2), (0, 1)))

    # 0.1 + sqrt(ln V / 2) against 0.7 + sqrt(ln V / 20): they meet at ln V = 1.54, V = 4.66
    assert chosen(4) == (0, 1)
    assert chosen(5) == (2, 2)


def best_of(values: dict[Counts, float], root: Counts) -> Counts | None:
    kept = [c for c, v in values.items() if v > 0 and v >= values[root]]
    return min(kept, key=lambda c: (path_length(c), unique_layers(c), -values[c], c), default=None)


@pytest.mark.parametrize("base", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_the_optimum_of_a_small_tree(base: float, seed: int) -> None:
    """All 76 paths of 4 layers that edits reach, a few of them right: the one found is the best of all."""
    rng = random.Random(seed)
    every, edge = {whole_path(4)}, [whole_path(4)]
    while edge:
        new = set(edits(edge.pop())) - every
        every |= new
        edge += new
    assert len(every) == 76
    values = {counts: float(rng.random() < 0.2) for counts in sorted(every)} | {whole_path(4): base}
    asked: list[Counts] = []

    def reward(counts: Counts) -> float:
        asked.append(counts)
        return values[counts]

    found = search_path(reward, 4, LONG, seed)
    assert found.best == best_of(values, whole_path(4))
    assert len(asked) == len(set(asked)) == found.visited + 1
    seen = {counts: values[counts] for counts in asked}
    assert found.improved == sum(v > base for v in seen.values())
    assert found.kept == sum(v > 0 and v >= base for c, v in seen.items() if c != whole_path(4))
    assert (found.base, found.simulations) == (base, 600)


def test_ties_go_to_fewer_different_layers() -> None:
    values = {(0, 1, 1): 1.0, (2, 0, 0): 1.0}
    found = search_path(lambda counts: values.get(counts, 0.0), 3, LONG)
    assert (found.best, found.reward, found.saved, found.useful) == ((2, 0, 0), 1.0, 1, True)


def test_layers_that_do_nothing_are_skipped() -> None:
    """Of 12 layers 3, 4 and 8 may go, the others may not: the default of 50 simulations finds two of them or all."""
    idle = {3, 4, 8}

    def reward(counts: Counts) -> float:
        return float(all(counts[layer] for layer in range(12) if layer not in idle))

    settings = SearchSettings(stop_shorter=None)
    saved = [search_path(reward, 12, settings, seed).saved for seed in range(20)]
    assert min(saved) >= 2 and 3 in saved
    one = search_path(reward, 12, SearchSettings(simulations=300, stop_shorter=None))
    assert one.best == tuple(0 if layer in idle else 1 for layer in range(12))


def test_it_stops_at_a_path_two_layers_shorter_that_answers() -> None:
    asked: list[Counts] = []
    found = search_path(lambda counts: [asked.append(counts), 1.0][1], 8)  # type: ignore[func-returns-value]
    assert found.saved == 2 and path_length(asked[-1]) == 6
    assert all(path_length(counts) > 6 for counts in asked[:-1])
    assert found.simulations == found.visited == len(asked) - 1


def test_it_stops_at_the_first_improvement() -> None:
    asked: list[Counts] = []

    def reward(counts: Counts) -> float:
        asked.append(counts)
        return float(counts[2] == 2)

    found = search_path(reward, 6, SearchSettings(simulations=2000))
    assert found.best == asked[-1] and found.improved == 1
    assert not any(counts[2] == 2 for counts in asked[:-1])
    assert (found.base, found.reward, found.useful) == (0.0, 1.0, True)


def test_a_shorter_path_that_is_wrong_does_not_preserve_a_wrong_answer() -> None:
    found = search_path(lambda counts: 0.0, 6)
    assert (found.best, found.kept, found.improved, found.saved, found.useful) == (None, 0, 0, 0, False)
    assert found.simulations == 50 and found.visited <= 50


def test_a_model_that_needs_every_layer_keeps_them() -> None:
    found = search_path(lambda counts: float(counts == whole_path(6)), 6)
    assert (found.best, found.saved, found.useful) == (whole_path(6), 0, False)


def test_the_same_seed_finds_the_same() -> None:
    def asked(seed: int) -> list[Counts]:
        seen: list[Counts] = []
        search_path(lambda counts: [seen.append(counts), 0.0][1], 10, SearchSettings(), seed)  # type: ignore[func-returns-value]
        return seen

    assert asked(1) == asked(1) != asked(2)


def test_random_children_are_taken_as_often_as_asked() -> None:
    """With share 1 the first path is any of the root's children; with share 0 one of the shortest."""
    firsts: dict[float, set[Counts]] = {0.0: set(), 1.0: set()}
    for share, seed in itertools.product(firsts, range(300)):
        search = Search(lambda counts: 0.0, 6, SearchSettings(random_share=share), seed)
        search.simulate()
        firsts[share] |= set(search.nodes) - {search.root}
    assert firsts[1.0] == set(edits(whole_path(6)))
    assert firsts[0.0] == {counts for counts in edits(whole_path(6)) if path_length(counts) == 4}


def test_a_model_of_one_layer() -> None:
    found = search_path(lambda counts: float(counts == (2,)), 1, LONG)
    assert (found.best, found.saved, found.useful) == ((2,), -1, True)


@pytest.mark.parametrize(
    "wrong",
    [{"simulations": 0}, {"exploration": -1.0}, {"length_penalty": math.inf}, {"random_share": 1.5}, {"longest_skip": 0},
     {"stop_shorter": -1}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SearchSettings(**wrong)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_rewards_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match="rewards go from 0"):
        search_path(lambda counts: value, 3)
