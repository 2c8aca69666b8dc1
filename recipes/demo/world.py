"""The demo world: its people, towns, books, beasts and words, and the facts about them.

Everything follows from `SEED` and integers drawn through `Rng`, which uses only `random.Random.random()`: the one
method whose sequence Python promises not to change. So the same world comes out on every machine and version.

A fact is `(entity, attribute, value)`. About a quarter of the pairs (entity, attribute) are *held*: prose states
them like any other fact (nobody can know what was never said), but no question form of them, cloze, lettered or
yes/no, is ever part of a training text. The evaluation asks only about held pairs.
"""

import hashlib
import random
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate, product

SEED = "layerprune-demo-1"


class Rng:
    """A seeded source of choices, stable across Python versions and machines."""

    def __init__(self, seed: str):
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def pick(self, seq):
        return seq[int(self.random() * len(seq))]

    def chance(self, p: float) -> bool:
        return self.random() < p

    def shuffled(self, seq) -> list:
        out = list(seq)
        for i in range(len(out) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            out[i], out[j] = out[j], out[i]
        return out

    def some(self, seq, k: int) -> list:
        """k different elements, in random order."""
        if k * 4 > len(seq):
            return self.shuffled(seq)[:k]
        seen: dict[int, None] = {}
        while len(seen) < k:
            seen[int(self.random() * len(seq))] = None
        return [seq[i] for i in seen]


class Zipf:
    """Draws an element with probability proportional to 1 / rank ** exponent (integer weights, so exact)."""

    def __init__(self, seq, exponent: float):
        self.seq = seq
        self.cumulative = list(accumulate(round(1e6 / rank**exponent) for rank in range(1, len(seq) + 1)))

    def draw(self, rng: Rng):
        return self.seq[bisect_right(self.cumulative, rng.below(self.cumulative[-1]))]


def digest(text: str) -> int:
    """A stable 64-bit hash (Python's own `hash` changes from run to run)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


@dataclass(eq=False)
class Entity:
    kind: str
    name: str
    rank: int  # 0 is the most often mentioned of its kind
    pronoun: str = "it"
    facts: dict[str, object] = field(default_factory=dict)  # attribute -> str, or Entity

    def value(self, attribute: str) -> str:
        value = self.facts[attribute]
        return value.name if isinstance(value, Entity) else str(value)


# --- closed sets of values -------------------------------------------------------------------------------------

CRAFTS = """weaver baker miller potter smith tanner cooper fletcher glazier mason dyer chandler saddler cobbler
thatcher beekeeper ferryman shepherd scribe healer brewer carpenter tailor gardener""".split()
INSTRUMENTS = "lute drum flute harp fiddle horn bell lyre pipe zither viol cymbal rattle gong whistle organ".split()
ANIMALS = """goat crow hound cat hare fox owl otter heron stag bear wolf swan mule ram toad badger hawk pike bull
goose mole lynx boar""".split()
COLOURS = "red blue green yellow white black grey brown purple orange silver golden".split()
DISHES = """barley soup|plum cake|salt fish|bean stew|rye bread|onion pie|honey tart|goat cheese|apple mash|eel broth
|pea pudding|nut loaf|leek tart|oat porridge|cherry jam|roast duck|pickled beet|egg custard|turnip hash|fried trout"""
DISHES = [dish.strip() for dish in DISHES.split("|")]
PROVINCES = "Velmark Ostria Harrowdale Cindria Teland Suvia Marn Ithery Kellow Brastia Norrin Lowen".split()
RIVERS = "Arle Bresk Corva Dwine Ester Fallow Grane Hythe Irrel Jost Kyle Lunn Mossel Nerrin Oxel Pell".split()
GOODS = """salt wool copper honey timber glass paper silk tin amber wheat oil candles rope leather ink pearls cider
slate iron""".split()
MONTHS = "Frostmonth Thawmonth Seedmonth Rainmonth Maymonth Haymonth Sunmonth Goldmonth Mistmonth Winemonth".split()
SUBJECTS = """the stars|the sea|bridges|old kings|bees|the plague|winter|clocks|trees|mountains|dreams|war|music
|cooking|ghosts|maps|love|birds|law|numbers"""
SUBJECTS = [subject.strip() for subject in SUBJECTS.split("|")]
HABITATS = """marshes|hedges|caves|orchards|rooftops|dunes|pine woods|river banks|ruins|meadows|cellars|cliffs
|ditches|snowfields"""
HABITATS = [habitat.strip() for habitat in HABITATS.split("|")]
FOODS = "seeds snails moss beetles bark worms berries roots mice clover ants reeds".split()
THINGS = """lantern|ladder|spoon|boat|blanket|hammer|basket|cloak|needle|kettle|gate|barrel|mirror|broom|candle|saddle
|bucket|knife|pillow|wheel"""
THINGS = [thing.strip() for thing in THINGS.split("|")]

CLOSED = {
    "craft": CRAFTS, "instrument": INSTRUMENTS, "animal": ANIMALS, "dish": DISHES, "province": PROVINCES,
    "river": RIVERS, "goods": GOODS, "month": MONTHS, "banner": ANIMALS, "subject": SUBJECTS, "binding": COLOURS,
    "habitat": HABITATS, "colour": COLOURS, "food": FOODS, "meaning": THINGS,
}
OPEN = {"home": "town", "teacher": "person", "founder": "person", "author": "person", "shelf": "town"}
ATTRIBUTES = {
    "person": ("home", "craft", "instrument", "animal", "dish", "teacher"),
    "town": ("province", "river", "goods", "banner", "month", "founder"),
    "book": ("author", "subject", "shelf", "binding"),
    "beast": ("habitat", "colour", "food"),
    "word": ("meaning",),
}
COUNTS = {"person": 1000, "town": 160, "book": 280, "beast": 160, "word": 160}

# --- names -----------------------------------------------------------------------------------------------------

FIRST = ("Ta Be Or Mi Ro Sel Ha Jo Ka Lu Ne Wil Ed Fa Gri Iv".split(), "min rel dra vyn lo sa bert na rick wen".split())
LAST = ("Ash Bram Cor Dray Eld Fen Gar Holt Ken Lang Marr Nor Pen Quil Rad Sten Thorn Ul Ves Wyn".split(),
        "ford wick mere low stan by ton er ley worth ane ock".split())
TOWN = ("Amber Black Clay Deep East Fair Gold Hollow Iron Kings Long Mill North Oak Pine Raven Salt Stone".split(),
        "market haven bridge holm gate stow fell cross mouth bury".split())
TITLE = ("Salt Glass Silent Broken Ninth Winter Hidden Iron Last Paper Burning Hollow Tall Drowned Little Golden Slow"
         .split(), "Mirror Tower Garden Road Letter Lamp River Crown Orchard Key Winter Horse Mill Door Feast Shore Song"
         .split())
BEAST = ("marsh stone dusk thorn copper snow ditch bell ash lamp river moss night reed".split(),
         "finch newt vole moth adder shrew wren beetle hare crake dormouse snail".split())
WORD = ("mor gal tri skell ush bro dun pli fas wob kest lurr nim jask".split(),
        "vel dock nix tle orn kin usk mag ple ssin abe tery".split())


def _names(rng: Rng, count: int, parts, pattern: str = "{}{}") -> list[str]:
    return [pattern.format(a, b) for a, b in rng.some(list(product(*parts)), count)]


def _make() -> dict[str, list[Entity]]:
    rng = Rng(SEED + "/world")
    firsts, lasts = [a + b for a, b in product(*FIRST)], [a + b for a, b in product(*LAST)]
    names = {
        "person": _names(rng, COUNTS["person"], (firsts, lasts), "{} {}"),
        "town": _names(rng, COUNTS["town"], TOWN, "{}{}"),
        "book": _names(rng, COUNTS["book"], TITLE, "The {} {}"),
        "beast": _names(rng, COUNTS["beast"], BEAST, "{} {}"),
        "word": _names(rng, COUNTS["word"], WORD),
    }
    world = {kind: [Entity(kind, name, rank) for rank, name in enumerate(all_names)]
             for kind, all_names in names.items()}
    for kind, entities in world.items():
        for entity in entities:
            if kind == "person":
                entity.pronoun = rng.pick(("she", "he"))
            for attribute in ATTRIBUTES[kind]:
                pool = CLOSED.get(attribute) or [e for e in world[OPEN[attribute]] if e is not entity]
                entity.facts[attribute] = rng.pick(pool)
    return world


WORLD = _make()
PEOPLE, TOWNS, BOOKS, BEASTS, WORDS = (WORLD[kind] for kind in ("person", "town", "book", "beast", "word"))
DRAW = {"person": Zipf(PEOPLE, 0.7), "town": Zipf(TOWNS, 0.6), "book": Zipf(BOOKS, 0.6), "beast": Zipf(BEASTS, 0.6),
        "word": Zipf(WORDS, 0.8)}


def pool(attribute: str) -> list[str]:
    """All values that an attribute can take, as text."""
    return CLOSED.get(attribute) or [e.name for e in WORLD[OPEN[attribute]]]


def held(entity: Entity, attribute: str) -> bool:
    """True for the pairs whose question forms are kept out of every training text (about one in four)."""
    return digest(f"{SEED}/held/{entity.name}/{attribute}") % 4 == 0


HELD = [(e, a) for kind in WORLD for e in WORLD[kind] for a in ATTRIBUTES[kind] if held(e, a)]
ASKED = {kind: [(e, a) for e in WORLD[kind] for a in ATTRIBUTES[kind] if not held(e, a)] for kind in WORLD}
HELD_PAIRS = {(e.name, a) for e, a in HELD}


def _index() -> dict[tuple[str, str], list[Entity]]:
    index: dict[tuple[str, str], list[Entity]] = {}
    for kind in WORLD:
        for entity in WORLD[kind]:
            for attribute in ATTRIBUTES[kind]:
                index.setdefault((attribute, entity.value(attribute)), []).append(entity)
    return index


BEARERS = _index()  # (attribute, value) -> the entities that have it
