"""Puzzles that are solved in context, in several steps: swaps, gifts, turns, a dial, an order, roads.

A puzzle's *core* is its bare structure (who does what, in which order; no wording). One core in eight is held: its
hash keeps it out of every training text, and the evaluation draws only such cores.
"""

from dataclasses import dataclass

from world import SEED, Rng, digest

NAMES = """Ann Bo Cy Dot Eve Finn Gus Hal Ida Jem Kit Lee Max Nan Oz Pip Ray Sue Tom Una Val Wes Zoe Abe""".split()
OBJECTS = "ring key cup coin hat map pen rope bag ball lamp book".split()
PLACES = "mill inn well tower barn bridge shrine quay market forge park hall".split()
COMPASS = ("north", "east", "south", "west")


@dataclass
class Puzzle:
    family: str
    core: str
    steps: int
    premise: str
    questions: list[tuple[str, str, list[str]]]  # question, answer, the four choices

    def held(self) -> bool:
        return digest(f"{SEED}/core/{self.core}") % 8 == 0


def swap(rng: Rng, steps: int, told: bool) -> Puzzle:
    who, what = rng.some(NAMES, 4), rng.some(OBJECTS, 4)
    has = dict(zip(who, what, strict=True))
    core = f"swap {has}"
    text = ", ".join(f"{w} has the {o}" for w, o in has.items()) + "."
    for _ in range(steps):
        a, b = rng.some(who, 2)
        has[a], has[b] = has[b], has[a]
        core += f" {a}{b}"
        text += f" {a} and {b} swap."
        if told:
            text += f" Now {a} has the {has[a]} and {b} has the {has[b]}."
    questions = [(f"What does {w} have?", has[w], what) for w in who]
    questions += [(f"Who has the {has[w]}?", w, who) for w in who]
    return Puzzle("swap", core, steps, text, rng.shuffled(questions))


def gifts(rng: Rng, steps: int, told: bool) -> Puzzle:
    who, what = rng.some(NAMES, 4), rng.some(OBJECTS, 2)
    owner = dict(zip(what, rng.some(who, 2), strict=True))
    core = f"gifts {who} {owner}"
    text = " ".join(f"{w} has the {o}." for o, w in owner.items())
    text = f"{', '.join(who[:3])} and {who[3]} sit at a table. {text}"
    for _ in range(steps):
        giver = owner[rng.pick(what)] if rng.chance(0.75) else rng.pick(who)
        taker = rng.pick([w for w in who if w != giver])
        for thing, current in owner.items():
            if current == giver:
                owner[thing] = taker
        core += f" {giver}{taker}"
        text += f" {giver} gives all to {taker}."
        if told:
            text += " " + " ".join(f"Now {w} has the {o}." for o, w in owner.items())
    return Puzzle("gifts", core, steps, text, [(f"Who has the {o}?", owner[o], who) for o in what])


def turns(rng: Rng, steps: int, told: bool) -> Puzzle:
    name, facing = rng.pick(NAMES), rng.below(4)
    core, text = f"turns {facing}", f"{name} faces {COMPASS[facing]}."
    for _ in range(steps):
        word, by = rng.pick((("left", 3), ("right", 1), ("around", 2)))
        facing = (facing + by) % 4
        core += f" {word}"
        text += f" {name} turns {word}."
        if told:
            text += f" Now {name} faces {COMPASS[facing]}."
    return Puzzle("turns", core, steps, text, [(f"Where does {name} face?", COMPASS[facing], list(COMPASS))])


def dial(rng: Rng, steps: int, told: bool) -> Puzzle:
    size = 10
    shown = rng.below(size)
    core, text = f"dial {shown}", f"The dial shows {shown}."
    for _ in range(steps):
        by = 1 + rng.below(5)
        up = rng.chance(0.6)
        shown = (shown + (by if up else -by)) % size
        core += f" {by if up else -by:+d}"
        text += f" It goes {'up' if up else 'down'} {by}."
        if told:
            text += f" Now it shows {shown}."
    others = rng.some([str(n) for n in range(size) if n != shown], 3)
    return Puzzle("dial", core, steps, text, [("What does the dial show?", str(shown), [str(shown), *others])])


def order(rng: Rng, steps: int, told: bool) -> Puzzle:
    """A chain of steps + 1 names (never fewer than four choices: strangers fill up), told in random order."""
    who = rng.some(NAMES, max(4, steps + 1))
    chain, more, less = who[: steps + 1], *rng.pick((("taller", "shorter"), ("older", "younger"), ("faster", "slower")))
    links = []
    for a, b in zip(chain, chain[1:], strict=False):
        links.append(f"{a} is {more} than {b}." if rng.chance(0.7) else f"{b} is {less} than {a}.")
    core = f"order {more} {chain}"
    text = " ".join(links if told else rng.shuffled(links))
    ends = {"taller": ("tallest", "shortest"), "older": ("oldest", "youngest"), "faster": ("fastest", "slowest")}[more]
    choices = [[end, *rng.some([w for w in who if w != end], 3)] for end in (chain[0], chain[-1])]
    return Puzzle("order", core, steps, text, rng.shuffled([
        (f"Who is the {ends[0]}?", chain[0], choices[0]), (f"Who is the {ends[1]}?", chain[-1], choices[1])]))


def roads(rng: Rng, steps: int, told: bool) -> Puzzle:
    """A ring of roads told in random order; walk `steps` of them."""
    ring = rng.some(PLACES, 5 + (steps > 4))
    links = [f"{a} to {b}" for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
    order_told = rng.shuffled(range(len(ring)))
    name = rng.pick(NAMES)
    core = f"roads {ring} {steps}"
    text = "Roads lead from " + ", ".join(links[i] for i in order_told) + f". {name} starts at the {ring[0]}"
    text += f" and walks {steps} road{'s' if steps > 1 else ''}."
    if told:
        text += "".join(f" Now {name} is at the {place}." for place in (ring * 2)[1 : steps + 1])
    end = ring[steps % len(ring)]
    others = rng.some([place for place in ring if place != end], 3)
    return Puzzle("roads", core, steps, text, [(f"Where is {name}?", end, [end, *others])])


FAMILIES = (swap, gifts, turns, dial, order, roads)
EVAL_STEPS = (2, 3, 4)


def passage(rng: Rng, family=None) -> str:
    """One training puzzle: a premise with one to six steps (a quarter of them told along the way), then questions."""
    family = family or rng.pick(FAMILIES)
    while True:
        puzzle = family(rng, rng.pick((1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6)), rng.chance(0.25))
        if not puzzle.held():
            break
    count = 1 if rng.chance(0.4) else 3
    asked = "".join(f"\nQuestion: {q}\nAnswer: {a}" for q, a, _ in puzzle.questions[:count])
    return puzzle.premise + asked


def items(rng: Rng, count: int) -> list[dict]:
    """Evaluation items of held cores, the families and the numbers of steps in turn, gold positions balanced."""
    out: list[dict] = []
    cores: set[str] = set()
    while len(out) < count:
        i = len(out)
        family, steps = FAMILIES[i % len(FAMILIES)], EVAL_STEPS[i // len(FAMILIES) % len(EVAL_STEPS)]
        if family is turns:  # two turns have too few cores for enough of them to be held
            steps += 1
        puzzle = family(rng, steps, False)
        question, answer, choices = puzzle.questions[0]
        key = puzzle.premise if family in (turns, dial) else puzzle.core  # those two have few cores
        if not puzzle.held() or key in cores:
            continue
        cores.add(key)
        wrong = rng.shuffled([c for c in choices if c != answer])
        gold = len(out) // len(FAMILIES) % 4
        out.append({"family": puzzle.family, "steps": steps, "core": puzzle.core,
                    "prompt": f"{puzzle.premise}\nQuestion: {question}\nAnswer:",
                    "choices": wrong[:gold] + [answer] + wrong[gold:], "gold": gold})
    return out
