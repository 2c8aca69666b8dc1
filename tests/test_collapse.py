"""Where does it collapse: planted curves, error rates by enumeration and simulation, degenerate and bad inputs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from layerprune.eval.collapse import (
    Plateau,
    accuracy_interval,
    analyse,
    loss_rise,
    plateau,
    recommend,
    retained_interval,
    transition,
)
from layerprune.model.errors import UsageError

DROPS = list(range(0, 24, 2))
CLIFF = [0.8] * 6 + [0.26] * 6  # the first low depth is 12
FLAT = [0.8] * 12
SLOPE = [0.25 + 0.55 / (1 + math.exp((n / 2 - 5.3) / 0.7)) for n in DROPS]  # half-way between 10 and 12


def answers(accuracies: list[float], items: int, seed: int, shared: float = 0.7) -> np.ndarray:
    """Answers (D, N) with these accuracies; `shared` of them follow from how hard the item is, the rest are luck."""
    rng = np.random.default_rng(seed)
    luck = rng.random((len(accuracies), items))
    level = np.where(rng.random(luck.shape) < shared, rng.random(items), luck)
    return (level < np.array(accuracies)[:, None]).astype(int)


def exact(*right: int, items: int = 100) -> list[list[int]]:
    """Rows with these numbers of right answers, always the first items."""
    return [[1] * count + [0] * (items - count) for count in right]


def test_a_cliff_is_found_where_it_was_planted() -> None:
    for seed in range(5):
        correct = answers(CLIFF, 3000, seed, shared=0.95)
        found, step = plateau(DROPS, correct, 0.25, share=0.9), transition(DROPS, correct, 0.25)
        assert (found.status, found.end, found.first_not_kept, found.first_verdict, found.first_failed) == (
            "collapses",
            10,
            12,
            "failed",
            12,
        )
        assert (step.status, step.before, step.first, step.low, step.high) == ("collapses", 10, 12, 12, 12)
        assert found.items == 3000
        assert [depth.verdict for depth in found.depths] == ["kept"] * 6 + ["failed"] * 6


def test_without_a_fall_there_is_no_collapse() -> None:
    correct = answers(FLAT, 3000, 0, shared=0.95)
    found, step = plateau(DROPS, correct, 0.25, share=0.9), transition(DROPS, correct, 0.25)
    assert (found.status, found.end, found.first_not_kept, found.first_verdict) == ("no collapse in range", 22, None, None)
    assert (step.status, step.before, step.first, step.low, step.high) == ("no collapse in range", None, None, None, None)


def test_a_collapse_at_the_first_depth() -> None:
    correct = answers([0.8] + [0.25] * 11, 500, 0)
    found, step = plateau(DROPS, correct, 0.25), transition(DROPS, correct, 0.25)
    assert (found.status, found.end, found.first_not_kept, found.first_verdict) == ("collapses", 0, 2, "failed")
    assert (step.before, step.first, step.low, step.high) == (0, 2, 2, 2)


def test_a_dip_ends_the_plateau_but_is_no_transition() -> None:
    correct = exact(90, 90, 30, 90, 90, 90)
    found, step = plateau(range(6), correct, 0.25, share=0.8), transition(range(6), correct, 0.25)
    assert (found.status, found.end, found.first_not_kept, found.first_failed) == ("collapses", 1, 2, 2)
    assert found.depths[3].verdict == "kept"
    assert (step.status, step.first, step.low, step.high) == ("no collapse in range", None, None, None)


@pytest.mark.parametrize(
    ("right", "first"),
    [
        ((90, 90, 30, 90, 90, 25, 25), 5),  # the recovery outweighs the dip before it
        ((90, 90, 25, 25, 25, 65, 25), 2),  # the dip outweighs the recovery after it
        ((90, 90, 25, 25, 90), 2),  # it ends with a recovery, two votes against one
        ((80, 60, 50, 40), 3),  # exactly half-way (chance 0.2) counts as the upper level
        ((80, 80, 52), None),  # above half-way
        ((80, 80, 50), None),  # exactly half-way
        ((40, 40, 30, 10), 3),  # exactly half-way, where (0.4 + 0.2) / 2 is not 0.3 in floating point
        ((80, 80, 10, 5), 2),  # below chance
    ],
)
def test_the_change_point_minimises_the_squares(right: tuple[int, ...], first: int | None) -> None:
    chance = 0.2
    found = transition(range(len(right)), exact(*right), chance)
    accuracy = np.array(right) / 100
    fits = [sum((accuracy[:k] - accuracy[0]) ** 2) + sum((accuracy[k:] - chance) ** 2) for k in range(1, len(right) + 1)]
    best = max(k for k, fit in enumerate(fits, 1) if fit <= min(fits) + 1e-12)
    assert (found.first or len(right)) == best
    assert found.first == first


def test_a_whole_model_at_chance_says_nothing() -> None:
    for correct, chance in [(answers([0.26] * 12, 400, 0), 0.25), (answers(FLAT, 50, 0), 0.9), (answers(FLAT, 50, 0), 1.0)]:
        found, step = plateau(DROPS, correct, chance), transition(DROPS, correct, chance)
        assert (found.status, found.end, found.first_not_kept, found.first_failed) == ("at chance", 0, None, None)
        assert all(depth.retained is None and depth.verdict == "not decided" for depth in found.depths)
        assert (step.status, step.first, step.low) == ("at chance", None, None)


@pytest.mark.parametrize("items", [5, 10, 20, 50])
def test_too_few_items_are_not_decided(items: int) -> None:
    """The same answers at every depth: with so few items an unseen loss of 5 % cannot be ruled out."""
    found = plateau(DROPS, [[1] * items] * 12, 0.25)
    assert (found.status, found.end, found.first_not_kept, found.first_verdict) == ("not decided", 0, 2, "not decided")
    enough = plateau(DROPS, [[1] * 150] * 12, 0.25)
    assert enough.status == "no collapse in range"


def test_more_items_only_sharpen() -> None:
    _, low, high = retained_interval([[n, 0, 0, 9] for n in (50, 500, 5000)], 0.2)
    widths = (high - low).tolist()
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.01


@pytest.mark.parametrize("items", [12, 100])
def test_the_plateau_is_seldom_deeper_than_the_truth(items: int) -> None:
    """Whole curves: a small real decline, then depths that keep just too little. The rate is 2.5 %, over all depths."""
    chance, share = 0.25, 0.9
    curve = [0.85, 0.85, 0.85] + [chance + share * 0.6 - 1e-9] * 3
    trials = 250
    deeper = sum(plateau(range(6), answers(curve, items, seed), chance, share).end > 2 for seed in range(trials))
    assert deeper <= trials * 0.025 + 3 * math.sqrt(trials * 0.025 * 0.975)


def outcomes(items: int) -> np.ndarray:
    """All counts of four outcomes that sum to `items`."""
    grid = range(items + 1)
    return np.array([(a, b, c, items - a - b - c) for a in grid for b in grid for c in grid if a + b + c <= items])


def at_the_margin(chance: float, share: float) -> list[np.ndarray]:
    """Probabilities of the four outcomes with a retained share of exactly `share`."""
    found = []
    for whole in np.linspace(chance + 0.05, 0.999, 12):
        cut = chance + share * (whole - chance)
        for both in np.linspace(max(0.0, whole + cut - 1), min(whole, cut), 7):
            found.append(np.clip([both, cut - both, whole - both, 1 - whole - cut + both], 1e-12, 1))
    return found


@pytest.mark.parametrize("items", [10, 20])
@pytest.mark.parametrize("chance", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("share", [0.8, 0.95])
def test_error_rates_by_enumeration(items: int, chance: float, share: float) -> None:
    """Of all samples there can be: how probable a wrong "kept" or "failed" is for a depth just at the margin."""
    counts = outcomes(items)
    _, low, high = retained_interval(counts, chance)
    logs = np.array([math.lgamma(k + 1) for k in range(items + 1)])
    ways = logs[items] - logs[counts].sum(1)
    chances = np.exp(ways[:, None] + counts @ np.log(np.array(at_the_margin(chance, share)).T))
    for wrong in (low > share, high < share):
        rate = chances[wrong].sum(0)
        assert rate.mean() < 0.025
        assert rate.max() < 0.05


@pytest.mark.parametrize("items", [100, 1000])
def test_the_interval_holds_the_truth(items: int) -> None:
    rng = np.random.default_rng(0)
    for p in ([0.7, 0.02, 0.06, 0.22], [0.3, 0.15, 0.3, 0.25], [0.97, 0.001, 0.01, 0.019]):
        _, low, high = retained_interval(rng.multinomial(items, p, size=2000), 0.25)
        truth = (p[0] + p[1] - 0.25) / (p[0] + p[2] - 0.25)
        inside = np.mean((low <= truth) & (truth <= high))
        assert 0.94 < inside < (0.97 if items * min(p) > 1 else 0.999)  # wider where an outcome is too rare to be seen


def test_the_interval_agrees_with_known_ones() -> None:
    """r = 1 is Tango's test, which without an outcome in one discordant cell is (b - c) / sqrt(b + c), McNemar's."""
    z = 1.959963984540054
    for gained, lost in [(3, 14), (1, 4), (0, 4), (0, 3), (2, 9)]:
        high = retained_interval([[40, gained, lost, 10]], 0.25)[2][0]
        assert (high < 1) == ((lost - gained) / math.sqrt(lost + gained) > z)
    low, high = (ends[0] for ends in retained_interval([[20, 0, 80, 0]], 0.0)[1:])
    wilson = accuracy_interval([1] * 20 + [0] * 80)
    assert (low, high) == pytest.approx(wilson, abs=2e-3)  # a whole model that is always right, whose accuracy is nearly known
    assert np.isnan(retained_interval([[1, 1, 1, 9]], 0.25)).all()


def test_wilson() -> None:
    """11 of 20 by the formula, in other words: the roots of (11/20 - p)^2 = z^2 p (1 - p) / 20."""
    z2, n, share = 1.959963984540054**2, 20, 11 / 20
    roots = sorted(np.roots([1 + z2 / n, -2 * share - z2 / n, share**2]))
    assert accuracy_interval([1] * 11 + [0] * 9) == pytest.approx(roots)
    assert accuracy_interval([1] * 7)[1] == 1
    assert accuracy_interval([0] * 7)[0] == 0
    assert accuracy_interval([True, False], 0.5) > accuracy_interval([True, False], 0.9)


@pytest.mark.parametrize(("curve", "first"), [(CLIFF, 12), (SLOPE, 12), ([0.8, *[0.25] * 11], 2), ([0.8] * 11 + [0.26], 22)])
@pytest.mark.parametrize("items", [20, 100])
def test_the_transition_interval_holds_the_truth(curve: list[float], first: int, items: int) -> None:
    found = [transition(DROPS, answers(curve, items, seed), 0.25, resamples=200, seed=seed) for seed in range(150)]
    measured = [step for step in found if step.status != "at chance"]
    inside = [(step.low or 99) <= first <= (step.high or 99) for step in measured]
    assert len(measured) >= 149
    assert np.mean(inside) >= 0.95
    if items == 100:
        assert np.mean([(step.high or 99) - (step.low or 99) for step in measured]) < 5


def test_the_bootstrap_draws_items_jointly() -> None:
    """Two depths that share every item between them: their votes always sum to 2 x 0.51 - 1 > 0, so each draw of whole
    items has a lower level. Depths drawn apart would often have none."""
    half, other = [1] * 50 + [0] * 50, [0] * 50 + [1] * 50
    found = transition([0, 1, 2], [[1] * 100, half, other], 0.02)
    assert (found.status, found.low, found.high) == ("collapses", 1, 2)


def test_the_same_inputs_give_the_same_results() -> None:
    correct = answers(SLOPE, 60, 3)
    order = np.random.default_rng(1).permutation(60)
    first = transition(DROPS, correct, 0.25)
    assert first.low != first.high  # random, so that the next lines can fail
    assert transition(DROPS, correct, 0.25) == first
    for seed in range(10):  # few draws, whose ends move with any change
        few = [transition(DROPS, items, 0.25, 0.5, 5, seed) for items in (correct, correct[:, order], correct[:, ::-1])]
        assert few[0] == few[1] == few[2]
    assert plateau(DROPS, correct[:, order], 0.25) == plateau(DROPS, correct, 0.25)
    assert plateau(DROPS, correct.tolist(), 0.25) == plateau(DROPS, correct.astype(bool), 0.25)
    ends = {(step.low, step.high) for seed in range(30) if (step := transition(DROPS, correct, 0.25, resamples=20, seed=seed))}
    assert len(ends) > 1


@pytest.mark.parametrize("items", [1, 2, 40])
@pytest.mark.parametrize("depths", [1, 2, 5])
@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.5])
def test_degenerate_answers(items: int, depths: int, value: int, chance: float) -> None:
    correct = np.full((depths, items), value)
    found, step = plateau(range(depths), correct, chance), transition(range(depths), correct, chance)
    assert found.end == 0
    json.dumps([dataclasses.asdict(found), dataclasses.asdict(step)], allow_nan=False)
    if value == 0 or accuracy_interval(correct[0])[0] <= chance:
        assert found.status == step.status == "at chance"
    else:
        assert step.status == "no collapse in range"
        assert found.status == ("no collapse in range" if depths == 1 else "not decided")
        assert all(depth.low <= 1 <= depth.high for depth in found.depths if depth.low is not None and depth.high is not None)


def test_all_wrong_after_all_right() -> None:
    found = plateau([0, 3], [[1] * 30, [0] * 30], 0.0).depths[1]
    assert (found.retained, found.verdict) == (0, "failed")
    assert found.low == pytest.approx(0, abs=1e-9)
    assert transition([0, 3], [[1] * 30, [0] * 30], 0.0).first == 3


def test_loss() -> None:
    rise = loss_rise([0, 1, 3, 6], [0.3, 0.4, 0.9, 1.5], 8)
    assert (rise.from_n, rise.to_n, rise.from_fraction, rise.to_fraction) == (1, 3, 0.125, 0.375)
    assert (rise.increase, rise.per_layer) == pytest.approx((0.5, 0.25))
    assert (rise.above_one, rise.above_one_fraction) == (6, 0.75)
    assert rise.used == pytest.approx(0.1 / 0.7)
    assert loss_rise([0, 1, 2, 3], [0.3, 0.4, 1.1, 9.0], 8).to_n == 2  # what is broken already breaks no more
    gap = loss_rise([0, 1, 2, 4], [0.3, None, math.nan, 1.0], 8)
    assert (gap.from_n, gap.to_n, gap.per_layer, gap.above_one) == (0, 4, pytest.approx(0.175), None)
    broken = loss_rise([0, 1, 2], [0.3, 0.31, math.inf], 4)
    assert (broken.to_n, broken.above_one) == (1, 2)
    for losses in ([0.5, 0.4, 0.3], [None, None, 0.3], [None, math.nan, None]):
        assert set(dataclasses.asdict(loss_rise([0, 1, 2], losses, 4)).values()) == {None}


def three_tasks(items: int = 4000) -> dict[str, Plateau]:
    curves = {"easy": [0.9] * 8, "hard": [0.7] * 4 + [0.4] * 4, "mid": [0.8] * 6 + [0.5] * 2, "luck": [0.25] * 8}
    return {
        name: plateau(range(8), answers(curve, items, seed, shared=0.95), 0.25, 0.9)
        for seed, (name, curve) in enumerate(curves.items())
    }


def test_the_recommendation_is_that_of_the_weakest_task() -> None:
    found = recommend(three_tasks())
    assert (found.status, found.n, found.limiting_task) == ("cut", 3, "hard")
    assert (found.likely, found.likely_limited_by) == (3, "hard")
    assert (found.tasks, found.left_out) == (("easy", "hard", "mid"), ("luck",))
    assert found.low is not None and found.low >= 0.9
    assert found.why.startswith("All 3 tasks above chance keep 90 % of the accuracy above chance at 3 dropped (hard:")
    assert "hard falls below that at 4" in found.why


def test_the_gap_to_likely_is_what_more_items_could_prove() -> None:
    curves = {"a": exact(80, 80, 79, 40), "b": exact(80, 80, 80, 80)}
    few = recommend({name: plateau(range(4), correct, 0.25) for name, correct in curves.items()})
    assert (few.status, few.n, few.likely, few.likely_limited_by) == ("not decided", 0, 2, "a")
    assert (few.retained, few.low, few.high) == (1, 1, 1)
    assert few.why.startswith("No cut is shown to keep 95 %")
    many = recommend({name: plateau(range(4), np.tile(correct, 40), 0.25) for name, correct in curves.items()})
    assert (many.status, many.n, many.likely) == ("cut", 2, 2)


def test_recommendations_at_the_ends() -> None:
    kept = plateau([0, 2, 4], exact(900, 900, 900, items=1000), 0.25)
    dead = plateau([0, 2, 4], exact(900, 500, 500, items=1000), 0.25)
    luck = plateau([0, 2, 4], exact(250, 250, 250, items=1000), 0.25)
    full = recommend({"a": kept, "b": kept})
    assert (full.status, full.n, full.likely, full.likely_limited_by) == ("cut", 4, 4, None)
    assert recommend({"a": kept, "d": dead}).status == "no cut"
    open_ = plateau([0, 2, 4], exact(9, 6, 6, items=10), 0.25)  # its interval reaches lower than that of the failed task
    assert open_.first_verdict == "not decided"
    assert (recommend({"o": open_, "d": dead}).limiting_task, recommend({"o": open_, "a": kept}).status) == ("d", "not decided")
    none = recommend({"luck": luck})
    assert (none.status, none.n, none.likely, none.left_out) == ("no task above chance", 0, 0, ("luck",))
    assert recommend({}).status == "no task above chance"
    other = plateau([0, 3, 4], exact(900, 900, 900, items=1000), 0.25)
    early = plateau([0, 3, 4], exact(900, 900, 250, items=1000), 0.25)
    assert recommend({"a": kept, "o": other}).n == 4
    assert recommend({"a": kept, "e": early}).n == 0  # 3 was measured for one of them only
    assert recommend({"a": plateau([0], exact(900, items=1000), 0.25)}).n == 0


def one_series(**changes: Any) -> dict[str, Any]:
    task = {"correct": answers(CLIFF, 300, 0).tolist(), "chance": 0.25, "chance_from": "1 / 4 choices"}
    luck = {"correct": answers([0.5] * 12, 300, 0).tolist(), "chance": 0.5, "chance_from": "1 / 2 choices"}
    return {"drops": DROPS, "losses": [0.3 + n / 40 for n in DROPS], "tasks": {"arc/acc": task, "boolq/acc": luck}} | changes


def test_analyse_gives_plain_json() -> None:
    series = {"angular": one_series(), "last": one_series(losses=None, tasks={})}
    found = analyse(24, series, keep=0.8)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["series"].keys() == series.keys()
    assert found["series"]["last"]["loss"] is None
    one = found["series"]["angular"]
    assert one["loss"]["to_n"] is not None
    arc = one["tasks"]["arc/acc"]
    assert (arc["chance"], arc["chance_from"], arc["plateau"]["share"]) == (0.25, "1 / 4 choices", 0.8)
    correct = series["angular"]["tasks"]["arc/acc"]["correct"]
    assert arc["transition"] == dataclasses.asdict(transition(DROPS, correct, 0.25))
    assert arc["plateau"]["end"] == plateau(DROPS, correct, 0.25, 0.8).end == one["recommendation"]["n"]
    assert one["recommendation"]["left_out"] == ["boolq/acc"]
    assert analyse(24, series, keep=0.8) == found


OK = exact(80, 70)


@pytest.mark.parametrize("function", [plateau, transition])
@pytest.mark.parametrize(
    ("drops", "correct", "chance", "says"),
    [
        ([0, 1, 2], OK, 0.25, "give 3 rows"),
        ([0, 1], [[1, 0], [1]], 0.25, "different lengths"),
        ([0, 1], [[], []], 0.25, "at least one item"),
        ([0, 1], [[1, 2], [0, 1]], 0.25, "other than 0 and 1"),
        ([0, 1], [[1, math.nan], [0, 1]], 0.25, "other than 0 and 1"),
        ([1, 2], OK, 0.25, "start at 0"),
        ([0, 1.5], OK, 0.25, "whole numbers"),
        ([], OK, 0.25, "start at 0"),
        ([0, 0], OK, 0.25, "ascending"),
        ([0, -1], OK, 0.25, "ascending"),
        ([0, 1], OK, -0.1, "chance -0.1"),
        ([0, 1], OK, 1.1, "chance 1.1"),
        ([0, 1], OK, math.nan, "chance nan"),
    ],
)
def test_bad_curves(function: Callable[..., Any], drops: list[int], correct: Any, chance: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        function(drops, correct, chance)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plateau([0, 1], OK, 0.25, share=0), "share 0"),
        (lambda: plateau([0, 1], OK, 0.25, share=1.01), "share 1.01"),
        (lambda: plateau([0, 1], OK, 0.25, confidence=1), "confidence 1"),
        (lambda: transition([0, 1], OK, 0.25, resamples=0), "0 resamples"),
        (lambda: retained_interval([[1, 2, 3]], 0.25), "four counts"),
        (lambda: retained_interval([[0, 0, 0, 0]], 0.25), "at least one item"),
        (lambda: accuracy_interval([]), "at least one item"),
        (lambda: accuracy_interval([0, 3]), "other than 0 and 1"),
        (lambda: loss_rise([0, 1], [0.1], 4), "1 losses for 2 depths"),
        (lambda: loss_rise([0, 4], [0.1, 0.2], 4), "4 dropped of 4 layers"),
        (lambda: recommend({"a": plateau([0, 1], OK, 0.25), "b": plateau([0, 1], OK, 0.25, 0.9)}), "different share"),
        (lambda: analyse(24, {"last": one_series(drops=[0, 1])}), "series last"),
        (lambda: analyse(20, {"last": one_series()}), "22 dropped of 20"),
        (lambda: analyse(24, {}, confidence=0), "confidence 0"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("keep", [0, -1, 1.2, math.nan])
def test_a_bad_keep_is_the_users(keep: float) -> None:
    with pytest.raises(UsageError, match="--keep .* at most 1"):
        analyse(24, {"last": one_series()}, keep=keep)


def test_a_fault_names_the_task() -> None:
    broken = one_series()
    broken["tasks"]["arc/acc"]["chance"] = 2
    with pytest.raises(ValueError, match="series last, task arc/acc: chance 2"):
        analyse(24, {"last": broken})


@pytest.mark.parametrize(
    ("right", "chance", "changed", "items", "shown"),
    [(0.8, 0.25, 0.01, 200, True), (0.8, 0.25, 0.1, 1000, True), (0.8, 0.25, 0.1, 200, False), (0.75, 0.5, 0.1, 2000, False)],
)
def test_the_items_that_the_docs_say_are_needed(right: float, chance: float, changed: float, items: int, shown: bool) -> None:
    """docs/collapse.md: a cut as good as the whole model, where a share of the answers changes, half of them for the better."""
    gained = round(items * changed / 2)
    both = round(items * right) - gained
    _, low, _ = retained_interval([[both, gained, gained, items - both - 2 * gained]], chance)
    assert (low[0] >= 0.95) == shown
