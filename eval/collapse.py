"""Where does it collapse? Statistics on the answers of a model to the same items, one row for each depth of cut.

Shapes: D depths, N items, R rows of counts. A depth is n, the layers dropped; row 0 is the whole model (n = 0). Items
are taken as independent draws, and answers as paired: column i is the same item at every depth. Nothing here reads a
file or needs torch. Only the bootstrap is random; it is seeded, and the order of the items changes no result.

`confidence` is that of two-sided intervals. A claim in one direction ("keeps", "above chance") uses one end of such
an interval, so that its error rate is (1 - confidence) / 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from layerprune.model.errors import UsageError

_BISECTIONS = 45  # halvings of an angle or of a multiplier: about 1e-13
_DRAWN = 1 << 20  # items drawn at a time by the bootstrap: 8 MiB
_STEEP = 1.5  # times the mean rise up to there and over it: less is no cliff
_WORN = 0.5  # of the way to a uniform guess: a loss beyond it before its sharpest rise has no cliff
_ROUNDING = 1e-12  # two equal shares may differ by this much in floating point


@dataclass(frozen=True)
class DepthVerdict:
    """One depth on the plateau test.

    retained: (accuracy - chance) / (whole model's accuracy - chance): 1 is as good as the whole model, 0 is chance;
    low, high: its interval. All None where the whole model is at chance. verdict: "kept", "failed", "not decided".
    """

    n: int
    accuracy: float
    retained: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class Plateau:
    """Up to which depth a task keeps `share` of the whole model's accuracy above chance; see plateau().

    status: "collapses" (some depth failed), "no collapse in range" (every depth is kept), "not decided" (some depth
    is not kept, none failed), "at chance". end: the last depth of the plateau. first_not_kept and its verdict: what
    ended it; first_failed: the first depth shown to be below. None where there is none.
    """

    status: str
    share: float
    confidence: float
    chance: float
    items: int
    end: int
    first_not_kept: int | None
    first_verdict: str | None
    first_failed: int | None
    depths: tuple[DepthVerdict, ...]


@dataclass(frozen=True)
class Transition:
    """Where accuracy steps from the whole model's level down to chance; see transition().

    status: "collapses", "no collapse in range", "at chance". first: the first depth of the lower level; before: the
    measured depth before it. low, high: interval of `first`; None with a status other than "at chance" means deeper
    than what was measured. level: the whole model's accuracy.
    """

    status: str
    level: float
    before: int | None
    first: int | None
    low: int | None
    high: int | None


@dataclass(frozen=True)
class LossRise:
    """The sharpest rise of normalised loss, from depth from_n to to_n, the next one with a finite loss.

    increase: of the loss; per_layer: increase / (to_n - from_n), the largest there is. used: the share of the way from the
    loss at the first depth to 1 that is behind at from_n; below 0 where the loss fell. mean_per_layer: the mean rise of a
    layer from the first depth to the last that is counted. All None where the loss never rises.
    above_one, with its fraction of the layers: the first depth worse than a uniform guess, None if never; from_n is below.
    """

    from_n: int | None
    to_n: int | None
    from_fraction: float | None
    to_fraction: float | None
    increase: float | None
    per_layer: float | None
    used: float | None
    mean_per_layer: float | None
    above_one: int | None
    above_one_fraction: float | None


@dataclass(frozen=True)
class Recommendation:
    """How many layers can go; see recommend().

    status: "cut" (n > 0), "no cut" (a task fails at the first depth), "not decided" (no depth is shown to be kept, and
    the limiting task's first depth is open), "no task above chance". limiting_task: the one with the shortest plateau;
    retained, low, high: its values at n. likely: the depth by the point estimates alone; likely_limited_by: the task
    whose estimate ends it, None where none does. tasks: those counted; left_out: those at chance.
    """

    status: str
    n: int
    limiting_task: str | None
    retained: float | None
    low: float | None
    high: float | None
    likely: int
    likely_limited_by: str | None
    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    why: str


def accuracy_interval(correct: Sequence[int] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of one accuracy (Wilson 1927); correct: N values of 0 or 1. Raises ValueError.

    Within 0 and 1, and of positive width even where every answer is right.
    """
    correct_N = np.asarray(correct)
    if correct_N.ndim != 1 or correct_N.size == 0:
        raise ValueError(f"correct has shape {correct_N.shape}: give one value for each item, and at least one item")
    _check_binary(correct_N)
    low, high = _wilson(np.count_nonzero(correct_N), correct_N.size, _quantile(confidence))
    return float(low), float(high)


def retained_interval(
    pairs_R4: Sequence[Sequence[int]] | np.ndarray, chance: float, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate, low and high (R values each) of the retained share (p_n - chance) / (p_0 - chance).

    pairs_R4: the items of each comparison by outcome: right in both models, right in the cut one only, right in the
    whole one only, wrong in both. nan where the whole model is not above chance (lower end of Wilson's interval).

    The interval holds the shares r that a score test does not reject. With angle a = atan(r) the hypothesis is that
    the mean of cos(a) (c_n - chance) - sin(a) (c_0 - chance) is 0; its standard error is that of the multinomial with
    the highest likelihood under it, in which an outcome that was not seen may have a probability. r = 1 gives Tango's
    interval of a paired difference (Statistics in Medicine 17, 1998), r without bound Wilson's of the whole model;
    the whole is a Fieller interval with the score test in place of t. Unlike t it needs no variance in the sample: 20
    items with the same answers in both models leave room for a loss on some other item. By enumeration over 5 to 60
    items, a share at the margin is taken for kept in 1 to 2 % of samples on average, nominal being 2.5 %; in the worst
    corners in 3 %, up to 4.5 % at 10 items of which the models agree on almost none.
    """
    _check_chance(chance)
    pairs = np.asarray(pairs_R4, dtype=float)
    if pairs.ndim != 2 or pairs.shape[1] != 4 or (pairs < 0).any() or (pairs.sum(1) == 0).any():
        raise ValueError("pairs: give four counts a row, none negative, and at least one item a row")
    z = _quantile(confidence)
    items_R = pairs.sum(1)
    found = np.full((3, len(pairs)), np.nan)
    above_R = _wilson(pairs[:, 0] + pairs[:, 2], items_R, z)[0] > chance
    pairs, items_R = pairs[above_R], items_R[above_R]
    whole_R, cut_R = (pairs[:, 0] + pairs[:, 2]) / items_R - chance, (pairs[:, 0] + pairs[:, 1]) / items_R - chance
    estimate_R = np.arctan2(cut_R, whole_R)
    # Both ends at once. At +-90 degrees the test is Wilson's of the whole model, which has just rejected.
    twice, sign = np.concatenate([pairs, pairs]), np.repeat([1.0, -1.0], len(pairs))
    inner, outer = np.concatenate([estimate_R, estimate_R]), -sign * math.pi / 2
    for _ in range(_BISECTIONS):
        middle = (inner + outer) / 2
        rejected = sign * _score(twice, middle, chance) >= z
        inner, outer = np.where(rejected, inner, middle), np.where(rejected, middle, outer)
    found[:, above_R] = [cut_R / whole_R, *np.tan(outer).reshape(2, -1)]
    return found[0], found[1], found[2]


def _score(pairs_R4: np.ndarray, angle_R: np.ndarray, chance: float) -> np.ndarray:
    """Score statistic of the hypothesis in retained_interval(): positive where the cut model is better than it says.

    The restricted maximum of the likelihood is p_j = n_j / (N (1 + m d_j)), with d_j the value of outcome j and m a
    multiplier such that the mean of d is 0. At the end of m's range an unseen extreme outcome takes what is left.
    """
    up, down = np.cos(angle_R), np.sin(angle_R)
    d_R4 = np.stack([up - down, up, -down, np.zeros_like(up)], 1) - ((up - down) * chance)[:, None]
    items_R = pairs_R4.sum(1)
    share_R4 = pairs_R4 / items_R[:, None]
    mean_R = (share_R4 * d_R4).sum(1)
    better_R = mean_R > 0
    extreme_R = np.where(better_R, np.minimum(d_R4.min(1), -_ROUNDING), np.maximum(d_R4.max(1), _ROUNDING))
    slope_R4 = d_R4 / extreme_R[:, None]
    low_R, high_R = np.zeros_like(mean_R), np.ones_like(mean_R)
    weighted_R4 = share_R4 * np.where(better_R, 1.0, -1.0)[:, None] * d_R4
    for _ in range(_BISECTIONS):
        middle_R = (low_R + high_R) / 2
        short_R = (weighted_R4 / (1 - middle_R[:, None] * slope_R4)).sum(1) > 0
        low_R, high_R = np.where(short_R, middle_R, low_R), np.where(short_R, high_R, middle_R)
    p_R4 = share_R4 / (1 - low_R[:, None] * slope_R4)
    left_R = np.maximum(0.0, 1 - p_R4.sum(1))
    variance_R = (p_R4 * d_R4**2).sum(1) + left_R * extreme_R**2
    result: np.ndarray = mean_R / np.sqrt(np.maximum(variance_R, 1e-300) / items_R)
    return result


def plateau(
    drops: Sequence[int],
    correct_DN: Sequence[Sequence[int]] | np.ndarray,
    chance: float,
    share: float = 0.95,
    confidence: float = 0.95,
) -> Plateau:
    """The accuracy plateau by non-inferiority: up to which depth `share` of the accuracy above chance is kept.

    drops: D depths, ascending from 0; correct_DN: 0 or 1. A depth is kept where the whole interval of its retained
    share (retained_interval()) is at or above `share`, fails where it is below, else it is not decided: too few items
    never make a cut deeper. The plateau ends before the first depth that is not kept, also where a deeper one recovers.
    A share of 1 is only shown by a model that has become better.

    Depths are tested in fixed order and the first one not kept stops it, so no correction for many depths is needed:
    an end at or beyond the first depth that is truly below `share` needs the error of that one test, and has its rate.
    This does not hold for "failed": with D depths, one of them is wrongly called so at up to D times that rate.

    At chance: the whole model's Wilson interval reaches down to chance; a share of nothing says nothing. Raises
    ValueError.
    """
    depths, correct = _check_curve(drops, correct_DN)
    _check_chance(chance)
    if not 0 < share <= 1:
        raise ValueError(f"share {share} of the accuracy above chance: use more than 0 and at most 1")
    z = _quantile(confidence)
    items = correct.shape[1]
    accuracy_D = correct.sum(1) / items
    if _wilson(correct[0].sum(), items, z)[0] <= chance:
        open_ = [DepthVerdict(n, float(acc), None, None, None, "not decided") for n, acc in zip(depths, accuracy_D, strict=True)]
        return Plateau("at chance", share, confidence, chance, items, 0, None, None, None, tuple(open_))
    both_D = (correct & correct[0]).sum(1)
    gained_D, lost_D = correct.sum(1) - both_D, correct[0].sum() - both_D
    pairs_D4 = np.stack([both_D, gained_D, lost_D, items - both_D - gained_D - lost_D], 1)
    # Row 0 is not tested: the whole model keeps all of itself by definition.
    verdicts = [DepthVerdict(0, float(accuracy_D[0]), 1.0, 1.0, 1.0, "kept")]
    for n, acc, kept, low, high in zip(
        depths[1:], accuracy_D[1:], *retained_interval(pairs_D4[1:], chance, confidence), strict=True
    ):
        verdict = "kept" if low >= share else "failed" if high < share else "not decided"
        verdicts.append(DepthVerdict(n, float(acc), float(kept), float(low), float(high), verdict))
    stop = next((at for at, depth in enumerate(verdicts) if depth.verdict != "kept"), None)
    failed = next((depth.n for depth in verdicts if depth.verdict == "failed"), None)
    status = "collapses" if failed is not None else "no collapse in range" if stop is None else "not decided"
    return Plateau(
        status=status,
        share=share,
        confidence=confidence,
        chance=chance,
        items=items,
        end=depths[-1] if stop is None else depths[stop - 1],
        first_not_kept=None if stop is None else depths[stop],
        first_verdict=None if stop is None else verdicts[stop].verdict,
        first_failed=failed,
        depths=tuple(verdicts),
    )


def transition(
    drops: Sequence[int],
    correct_DN: Sequence[Sequence[int]] | np.ndarray,
    chance: float,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Transition:
    """The least-squares change point between two known levels: the whole model's accuracy, then chance.

    The first depth k of the lower level minimises sum_{n < k} (acc_n - acc_0)^2 + sum_{n >= k} (acc_n - chance)^2.
    That is the k with the largest sum_{n >= k} (middle - acc_n), middle half-way between the levels: every depth votes
    by how far it is below or above the middle. Of equal sums the deepest k counts, and without a positive sum there is
    no lower level. The mean of the depths before k is not used as the upper level: it would depend on which depths
    were measured, a slow decline would drag it down, and a curve that ends half-way would fit best without a fall.

    A dip that recovers is no collapse unless the depths from the dip on are, in sum, below the middle; of two falls
    with a recovery between, the votes decide. Depths count the same however far apart they are.

    Interval: percentiles of k when whole items are drawn again, jointly for all depths, widened outwards to a measured
    depth. A draw without a lower level counts as deeper than what was measured. The interval says how items, not
    depths, move k: accuracy leaves its upper level somewhere between `before` and `first`. By simulation of cliffs,
    slopes and dips with 10 to 400 items it holds the true k in 95 % of samples or more. A bootstrap knows no item that
    it has not seen: where a handful of items all agree, the interval has no width and means nothing. Time: as
    D x N x resamples, below 1 s for 64 x 14,000 x 1000. Raises ValueError.
    """
    depths, correct = _check_curve(drops, correct_DN)
    _check_chance(chance)
    if resamples < 1:
        raise ValueError(f"{resamples} resamples: use at least 1")
    z = _quantile(confidence)
    items = correct.shape[1]
    level = float(correct[0].mean())
    if _wilson(correct[0].sum(), items, z)[0] <= chance:
        return Transition("at chance", level, None, None, None, None)
    best = int(_change_points(correct.sum(1)[None, :] / items, chance)[0])
    # Sorted, so that the draws meet the same items in whatever order they came.
    answers_ND = correct[:, np.lexsort(correct)].T.astype(np.float32)
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWN // items)
    drawn = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        picks = rng.integers(items, size=(rows, items)) + items * np.arange(rows)[:, None]
        weights_RN = np.bincount(picks.ravel(), minlength=rows * items).reshape(rows, items).astype(np.float32)
        drawn.append(_change_points((weights_RN @ answers_ND).astype(float) / items, chance))
    found = np.sort(np.concatenate(drawn))
    tail = (1 - confidence) / 2 * (resamples - 1)
    low, high = int(found[math.floor(tail)]), int(found[resamples - 1 - math.floor(tail)])
    at = [*depths, None]  # position D: deeper than measured
    collapses = best < len(depths)
    return Transition(
        status="collapses" if collapses else "no collapse in range",
        level=level,
        before=depths[best - 1] if collapses else None,
        first=at[best],
        low=at[min(low, best)],
        high=at[max(high, best)],
    )


def _change_points(accuracy_RD: np.ndarray, chance: float) -> np.ndarray:
    """The position of the first depth of the lower level in each row; D where there is none.

    Position 0 never wins: the whole model votes against itself. In a draw where it is not above chance none wins.
    """
    count = accuracy_RD.shape[1]
    level_R1 = accuracy_RD[:, :1]
    votes_RD = (level_R1 + chance) / 2 - accuracy_RD
    # The deepest first, so that argmax takes the deepest of equals; rounded, so that equals are equal.
    sums_RD = np.round(np.cumsum(votes_RD[:, ::-1], 1), 12)
    found = (sums_RD.max(1) > 0) & (level_R1[:, 0] > chance)
    result: np.ndarray = np.where(found, count - 1 - sums_RD.argmax(1), count)
    return result


def loss_rise(drops: Sequence[int], losses: Sequence[float | None], layers: int) -> LossRise:
    """Where normalised loss (0 certainty, 1 a uniform guess) rises most a layer, and where it first is above 1.

    losses: one for each of the D depths. None and nan count as not measured, and the rise is then taken over the gap;
    of equal rises the first counts. A rise that starts where the model is broken already, from the first depth above 1 on,
    does not count. Infinity is above 1 but has no finite rise. Raises ValueError.
    """
    depths = _check_drops(drops)
    _check_layers(depths, layers)
    if len(losses) != len(depths):
        raise ValueError(f"{len(losses)} losses for {len(depths)} depths: give one for each depth, None where there is none")
    measured = [(n, loss) for n, loss in zip(depths, losses, strict=True) if loss is not None and not math.isnan(loss)]
    above = next((n for n, loss in measured if loss > 1), None)
    finite = [(n, float(loss)) for n, loss in measured if math.isfinite(loss)]
    sound = [pair for pair in zip(finite, finite[1:], strict=False) if above is None or pair[0][0] < above]
    steps = [((b - a) / (m - n), n, m, b - a) for (n, a), (m, b) in sound]
    per_layer, start, stop, increase = max(steps, key=lambda step: step[0], default=(0.0, 0, 0, 0.0))
    rises = per_layer > 0
    mean = (sound[-1][1][1] - sound[0][0][1]) / (sound[-1][1][0] - sound[0][0][0]) if sound else 0.0
    used = (dict(finite)[start] - finite[0][1]) / (1 - finite[0][1]) if rises and finite[0][1] < 1 else None
    return LossRise(
        from_n=start if rises else None,
        to_n=stop if rises else None,
        from_fraction=start / layers if rises else None,
        to_fraction=stop / layers if rises else None,
        increase=increase if rises else None,
        per_layer=per_layer if rises else None,
        used=used,
        mean_per_layer=mean if rises else None,
        above_one=above,
        above_one_fraction=None if above is None else above / layers,
    )


def deepest_cliff(series: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The series whose loss stays low for the most layers and then rises sharply; None where no series has such a cliff.

    series: as `analyse` returns them. A loss that has gone more than half of its way to 1 before its sharpest rise wears
    out evenly, and where it happens to rise most says nothing of a depth to stop at; nor does a rise that is hardly above the mean.
    """
    steep = {name: one["loss"]["from_n"] for name, one in series.items() if one["loss"] and _is_cliff(one["loss"])}
    return max(steep, key=lambda name: steep[name], default=None)


def _is_cliff(loss: Mapping[str, Any]) -> bool:
    if loss["from_n"] is None or (loss["above_one"] is not None and loss["from_n"] >= loss["above_one"]):
        return False
    mean = loss.get("mean_per_layer")
    steep = mean is None or loss["per_layer"] >= _STEEP * mean
    return steep and (loss.get("used") or 0) <= _WORN


def recommend(plateaus: Mapping[str, Plateau]) -> Recommendation:
    """The deepest cut at which every task above chance keeps the share that its plateau was asked for.

    plateaus: of the tasks of one series, by name, all with the same share and confidence. n is the deepest depth that
    was measured for every task and lies on every plateau. It needs no correction for many tasks: to go beyond what is
    truly kept, the one test of the task that truly falls there first has to err. Tasks at chance are left out, so the
    promise does not cover them.

    likely: the same with the estimates in place of their lower ends. The gap between n and likely is what more items
    could prove; likely itself promises nothing. Raises ValueError.
    """
    if len({(found.share, found.confidence) for found in plateaus.values()}) > 1:
        raise ValueError("plateaus of different share or confidence: ask all tasks of a series for the same")
    left_out = tuple(name for name, found in plateaus.items() if found.status == "at chance")
    counted = {name: found for name, found in plateaus.items() if name not in left_out}
    if not counted:
        why = "no task was measured" if not plateaus else f"the whole model is not above chance on {_listed(left_out)}"
        return Recommendation("no task above chance", 0, None, None, None, None, 0, None, (), left_out, _sentence(why))
    common = set.intersection(*({depth.n for depth in found.depths} for found in counted.values()))
    limit = min(counted, key=lambda name: _strength(counted[name]))
    task = counted[limit]
    n = max(depth for depth in common if depth <= task.end)
    here = next(depth for depth in task.depths if depth.n == n)
    ends = {name: _likely_end(found) for name, found in counted.items()}
    likely_limit = min(ends, key=lambda name: ends[name][0])
    likely = max(depth for depth in common if depth <= ends[likely_limit][0])
    status = "cut" if n > 0 else "no cut" if task.first_verdict == "failed" else "not decided"
    return Recommendation(
        status=status,
        n=n,
        limiting_task=limit,
        retained=here.retained,
        low=here.low,
        high=here.high,
        likely=likely,
        likely_limited_by=likely_limit if ends[likely_limit][1] else None,
        tasks=tuple(counted),
        left_out=left_out,
        why=_reason(n, limit, task, here, len(counted)),
    )


def _strength(task: Plateau) -> tuple[int, bool, float]:
    """The least is the limiting task: the shortest plateau; of equals one that fails rather than one that is open, then
    the lowest interval at the depth that stopped it."""
    n = task.end if task.first_not_kept is None else task.first_not_kept
    low = next(depth.low for depth in task.depths if depth.n == n)
    return task.end, task.first_verdict != "failed", math.nan if low is None else low


def _likely_end(task: Plateau) -> tuple[int, bool]:
    """The last depth before an estimate below the share, and whether there is such an estimate."""
    end = 0
    for depth in task.depths:
        if depth.retained is None or depth.retained < task.share - _ROUNDING:
            return end, True
        end = depth.n
    return end, False


def _reason(n: int, name: str, task: Plateau, here: DepthVerdict, tasks: int) -> str:
    keep = f"{100 * task.share:g} % of the accuracy above chance"
    who = f"all {tasks} tasks above chance keep" if tasks > 1 else f"the one task above chance, {name}, keeps"
    interval = f"{here.retained:.3f}, interval {here.low:.3f} to {here.high:.3f}"
    if task.first_not_kept is None:
        if n == 0:
            return _sentence("no cut was measured for every task above chance")
        return _sentence(f"{who} {keep} at every depth measured; at {n} dropped {name} has the lowest interval ({interval})")
    stop = next(depth for depth in task.depths if depth.n == task.first_not_kept)
    seen = f"{stop.retained:.3f}, interval {stop.low:.3f} to {stop.high:.3f}, {task.items:,} items"
    fate = "falls below that at" if stop.verdict == "failed" else "is not shown to keep that at"
    if n > 0:
        return _sentence(f"{who} {keep} at {n} dropped ({name}: {interval}), but {name} {fate} {stop.n} ({seen})")
    return _sentence(f"no cut is shown to keep {keep}: {name} {fate} {stop.n} dropped ({seen})")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def analyse(layers: int, series: Mapping[str, Mapping[str, Any]], keep: float = 0.95, confidence: float = 0.95) -> dict[str, Any]:
    """Everything above for the series of one model, as plain JSON.

    layers: of the whole model. series: name ("angular", "last", "angular healed") to {"drops": D depths, "losses": D
    values or None, "tasks": {"task/metric": {"correct": D rows of N values 0 or 1, "chance", "chance_from"}}}. keep:
    the share of plateau(). Returns keep, confidence, layers and series: for each name loss (LossRise, or None), tasks
    (for each chance, chance_from, plateau, transition) and recommendation.

    Raises UsageError for keep, ValueError naming series and task for data that do not fit.
    """
    check_keep(keep)
    _quantile(confidence)
    found = {}
    for name, curve in series.items():
        drops, losses = curve["drops"], curve["losses"]
        with_name = f"series {name}"
        plateaus: dict[str, Plateau] = {}
        tasks: dict[str, Any] = {}
        try:
            _check_layers(_check_drops(drops), layers)
            loss = None if losses is None else loss_rise(drops, losses, layers)
            for task, data in curve["tasks"].items():
                with_name = f"series {name}, task {task}"
                correct, chance = _check_curve(drops, data["correct"])[1], data["chance"]
                plateaus[task] = plateau(drops, correct, chance, keep, confidence)
                step = transition(drops, correct, chance, confidence)
                tasks[task] = {"chance": chance, "chance_from": data["chance_from"], "plateau": plateaus[task], "transition": step}
        except ValueError as error:
            raise ValueError(f"{with_name}: {error}") from error
        found[name] = {"loss": loss, "tasks": tasks, "recommendation": recommend(plateaus)}
    result: dict[str, Any] = _plain({"keep": keep, "confidence": confidence, "layers": layers, "series": found})
    return result


def check_keep(keep: float) -> None:
    """Raise UsageError for a share to keep that is none."""
    if not 0 < keep <= 1:
        raise UsageError(f"--keep {keep} of the accuracy above chance: use more than 0 and at most 1, such as 0.95")


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries and tuples as lists, as they come back from a JSON file."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _wilson(right: Any, items: Any, z: float) -> tuple[Any, Any]:
    """Ends of Wilson's interval; numbers or arrays. Exactly 0 and 1 at none and all right, in spite of rounding."""
    share, spread = right / items, z * z / items
    middle, half = (share + spread / 2) / (1 + spread), np.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return np.where(right == 0, 0.0, middle - half), np.where(right == items, 1.0, middle + half)


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: use more than 0 and less than 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check_chance(chance: float) -> None:
    if not 0 <= chance <= 1:  # 1 is possible: a few yes-or-no items with one answer; nothing is above it
        raise ValueError(f"chance {chance}: use an accuracy from 0 to 1")


def _check_layers(depths: Sequence[int], layers: int) -> None:
    if depths[-1] >= layers:
        raise ValueError(f"{depths[-1]} dropped of {layers} layers: at least one layer stays")


def _check_drops(drops: Sequence[int]) -> list[int]:
    depths = [int(n) for n in drops]
    if depths != list(drops) or not depths or depths[0] != 0:
        raise ValueError(f"drops {list(drops)}: give whole numbers that start at 0, the whole model")
    if any(b <= a for a, b in zip(depths, depths[1:], strict=False)):
        raise ValueError(f"drops {depths}: give each depth once, in ascending order")
    return depths


def _check_curve(drops: Sequence[int], correct: Sequence[Sequence[int]] | np.ndarray) -> tuple[list[int], np.ndarray]:
    """The depths, and the answers as a boolean array (D, N) with N > 0."""
    depths = _check_drops(drops)
    try:
        correct_DN = np.asarray(correct)
    except ValueError as error:
        raise ValueError("the rows of correct have different lengths: every depth needs the same items") from error
    if correct_DN.ndim != 2 or correct_DN.shape[0] != len(depths) or correct_DN.shape[1] == 0:
        raise ValueError(f"correct has shape {correct_DN.shape}: give {len(depths)} rows, one for each depth, of at least one item")
    _check_binary(correct_DN)
    return depths, correct_DN.astype(bool)


def _check_binary(correct: np.ndarray) -> None:
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError("correct holds something other than 0 and 1: give 1 for a right answer, 0 for a wrong one")
