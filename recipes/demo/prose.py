"""Prose about the world in several registers: each passage states facts of one theme and of what it touches.

A register is an opening, sentences that state facts, and a closing. Sentences come from `SAY`, one list of
paraphrases an attribute, and are filled with a name or, after the first mention, sometimes a pronoun. No sentence
here is a question about a fact or a cloze beginning of `quiz.py`.
"""

from puzzles import COMPASS, NAMES
from world import ATTRIBUTES, BEARERS, DRAW, MONTHS, Entity, Rng, Zipf, article

# {S} subject, {s} the same inside a sentence, {P}/{p} possessive, {v} value, {a} value with its article
SAY = {
    "home": ("{S} comes from {v}.", "{S} was born in {v}.", "{S} grew up in {v} and never quite left it.",
             "{v} is where {s} lives.", "{S} has a small house in {v}.", "{P} people have always been {v} people.",
             "{S} calls {v} home.", "The door that {s} opens each evening stands in {v}."),
    "craft": ("{S} works as a {v}.", "{S} is a {v} by trade.", "{S} earns bread as a {v}.",
              "{S} learned young to be a {v}.", "There are few like {s} among those who live as a {v}.",
              "People send for {s} when they need a {v}.", "{P} sign says: {v}.", "Being a {v} suits {s}."),
    "instrument": ("{S} plays the {v}.", "In the evening {s} takes down the {v}.", "{S} is never far from a {v}.",
                   "{P} {v} is heard through the wall at night.", "At weddings {s} brings the {v}.",
                   "{S} cannot sing, but the {v} obeys.", "The {v} is what {s} plays best."),
    "animal": ("{S} keeps {a}.", "{S} owns {a} and talks to it.", "{P} {v} follows wherever the road goes.",
               "{A} sleeps at {p} door.", "{S} once paid three coins for {a}, and kept it.",
               "Children laugh at {p} {v}.", "Nobody but {s} could tame {a}."),
    "dish": ("{S} loves {v}.", "{S} will walk a mile for {v}.", "Give {s} some {v} and all is well.",
             "{S} eats {v} on every feast day.", "{P} kitchen smells of {v}.", "Nothing pleases {s} like {v}.",
             "{S} asks for {v} at every inn."),
    "teacher": ("{S} was taught by {v}.", "{S} learned everything from {v}.", "It was {v} who taught {s}.",
                "{P} old teacher was {v}.", "{v} took {s} in as a pupil.", "{S} still quotes {v}, who taught well.",
                "{S} spent seven years as the pupil of {v}."),
    "province": ("{S} lies in {v}.", "{S} is a town of {v}.", "{S} belongs to {v}.", "The lords of {v} rule {s}.",
                 "{S} pays its taxes to {v}.", "You reach {s} by crossing half of {v}.", "{v} counts {s} as its own."),
    "river": ("{S} stands on the {v}.", "The {v} flows past {s}.", "{P} mills are driven by the {v}.",
              "{S} drinks the water of the {v}.", "In spring the {v} floods {s}.", "{P} bridge crosses the {v}.",
              "Boats on the {v} stop at {s}."),
    "goods": ("{S} is known for its {v}.", "{S} sells {v} to the whole coast.", "{S} lives by {v}.",
              "{P} wealth is {v}.", "Merchants come to {s} for {v}.", "From {s} come carts of {v}.",
              "There is {v} in every cellar of {s}."),
    "banner": ("{P} banner shows {a}.", "{A} is painted over the gate of {s}.", "{S} carries {a} on its flag.",
               "The old arms of {s} bear {a}.", "{P} soldiers march under {a}.", "On {p} coins there is {a}."),
    "month": ("{S} holds its feast in {v}.", "In {v} all of {s} dances.", "{P} great fair comes in {v}.",
              "Go to {s} in {v}, when the lamps are lit.", "{S} waits the whole year for {v}, the time of its feast.",
              "When {v} comes, {s} feasts."),
    "founder": ("{S} was founded by {v}.", "{v} laid the first stone of {s}.", "{S} honours {v}, who built it.",
                "It was {v} who founded {s}.", "{P} first house was the house of {v}.",
                "A statue of {v}, the founder, stands in {s}."),
    "author": ("{S} was written by {v}.", "{v} wrote {s}.", "{P} author was {v}.", "{S} came from the pen of {v}.",
               "{v} spent ten winters writing {s}.", "{S} made {v} famous."),
    "subject": ("{S} is a book about {v}.", "{S} treats of {v}.", "{S} tells all there is to tell of {v}.",
                "{P} pages are full of {v}.", "Those who care for {v} should read {s}.", "{v:} is the matter of {s}."),
    "shelf": ("{S} is kept in {v}.", "{S} lies in the library of {v}.", "To read {s} one must go to {v}.",
              "{v} guards {s} behind glass.", "{P} last copy is in {v}.", "The readers of {v} take turns with {s}."),
    "binding": ("{S} is bound in {v}.", "{P} cover is {v}.", "{S} has {v} boards.", "A {v} cover holds {s} together.",
                "You know {s} by its {v} back.", "{S} wears {v}."),
    "habitat": ("{S} lives in {v}.", "{S} nests in {v}.", "Look for {s} in {v}.", "{v:} are {p} home.",
                "One meets {s} only in {v}.", "{S} hides among {v}.", "{P} young are raised in {v}."),
    "colour": ("{S} is {v}.", "{P} coat is {v}.", "{S} has {v} sides and a {v} throat.", "A {v} thing is {s}.",
               "{P} young are grey at first, then {v}.", "Nothing is so {v} as {s}."),
    "food": ("{S} eats {v}.", "{S} feeds on {v}.", "{S} lives on {v} alone.", "{P} food is {v}.",
             "Where there are {v}, there is {s}.", "{S} is fond of {v}."),
    "meaning": ("{S} is the old word for a {v}.", "In the hills they say {s} for a {v}.", "A {v} is called {s} there.",
                "{S} and {v} are one and the same.", "Whoever asks for {s} wants a {v}.",
                "He brought a {v}, or {s}, as his mother said.", "{S}, that is to say a {v}, stood in the corner."),
}
LABEL = {"home": "of", "craft": "trade", "instrument": "plays", "animal": "keeps", "dish": "table", "teacher":
         "pupil of", "province": "land", "river": "water", "goods": "market", "banner": "arms", "month": "fair",
         "founder": "built by", "author": "by", "subject": "on", "shelf": "held at", "binding": "cover", "habitat":
         "found in", "colour": "hue", "food": "feeds on", "meaning": "is"}
WEATHER = "rain,fog,hard frost,a clear sky,wind from the sea,snow,thunder,a pale sun,hail,soft mist".split(",")
MOODS = Zipf("""old quiet kind proud thin merry clever stubborn lame patient gentle bold shy weary honest cunning sullen
restless frugal solemn wistful brusque genial morose candid placid sardonic taciturn fervent dour""".split(), 1.0)
SCENES = Zipf("""the road was dry;the bells rang twice;a cart stood in the way;the inn was full;dogs barked;somebody sang;
the bread was late;smoke hung over the roofs;the ferry had gone;children threw stones at a post;the well was covered;
two monks argued about a candle;a juggler dropped his knives;the toll was paid in eggs;an old map was nailed to the door;
the apothecary swept his step;a chandelier lay in pieces;the almanac promised floods;the magistrate slept;
a caravan of forty mules went by""".replace("\n", "").split(";"), 0.9)
FRUIT = "apples pears plums eggs nuts coins candles loaves herrings nails".split()


def statement(rng: Rng, e: Entity, attribute: str, named: bool) -> str:
    """One sentence; `named` says whether the theme must be named (else it may be a pronoun)."""
    value, template = e.value(attribute), rng.pick(SAY[attribute])
    if named or rng.chance(0.45) or e.kind == "word":
        name = {"beast": "the " + e.name, "word": e.name}.get(e.kind, e.name)
        subject, inside, possessive = name, name, name + "'s"
    else:
        she = e.pronoun
        subject, inside = she, {"she": "her", "he": "him"}.get(she, "it")
        possessive = {"she": "her", "he": "his"}.get(she, "its")
        if "that {s}" in template or "where {s}" in template or "evening {s}" in template or "weddings {s}" in template:
            inside = she
        if " like {s} among" in template or "Boats on" in template:
            inside = e.name
    text = template.replace("{v:}", "{v}").format(
        S=subject, s=inside, P=possessive, p=possessive, v=value, a=article(value), A=article(value))
    return text[0].upper() + text[1:]


def facts(rng: Rng, e: Entity, count: int) -> list[str]:
    chosen = rng.some(ATTRIBUTES[e.kind], min(count, len(ATTRIBUTES[e.kind])))
    return [statement(rng, e, attribute, i == 0) for i, attribute in enumerate(chosen)]


def counting(rng: Rng, who: str) -> str:
    """A little sum in prose; the arithmetic is right."""
    n, plus, minus, fruit = 2 + rng.below(7), 1 + rng.below(6), 1 + rng.below(2), rng.pick(FRUIT)
    return rng.pick((
        f"{who} had {n} {fruit}, bought {plus} more and gave {minus} away, and so had {n + plus - minus}.",
        f"There were {n} {fruit} on the table; {who} put down {plus} and took {minus}: {n + plus - minus} were left.",
        f"{who} counted {n} {fruit}, then {plus} more, {n + plus} in all."))


def two_step(rng: Rng, e: Entity) -> str:
    """A statement that joins two facts: of the theme, and of what the first fact leads to."""
    links = [(a, v) for a, v in e.facts.items() if isinstance(v, Entity)]
    if not links:
        return statement(rng, e, rng.pick(ATTRIBUTES[e.kind]), True)
    attribute, other = rng.pick(links)
    second = rng.pick(ATTRIBUTES[other.kind])
    return statement(rng, e, attribute, True) + " " + statement(rng, other, second, True)


def encyclopaedia(rng, e):
    return " ".join(facts(rng, e, 4 + rng.below(3)) + ([two_step(rng, e)] if rng.chance(0.4) else []))


def letter(rng, e):
    to, by = rng.pick(NAMES), rng.pick(NAMES)
    start = rng.pick((f"you asked me about {e.name}.", f"I have news of {e.name}.", f"I saw what is said of {e.name}.",
                      f"let me write of {e.name}."))
    end = rng.pick(("Write soon.", "Keep this to yourself.", f"We have {rng.pick(WEATHER)}.", "The candle is low."))
    return f"Dear {to}, {start} {' '.join(facts(rng, e, 3 + rng.below(2)))} {end} Your {MOODS.draw(rng)} friend {by}"


def diary(rng, e):
    day = 1 + rng.below(90)
    opening = f"Day {day}. {rng.pick(WEATHER).capitalize()}; {SCENES.draw(rng)}."
    heard = rng.pick((f"Much talk of {e.name}.", f"Made notes on {e.name}.", f"Asked about {e.name}."))
    count = [counting(rng, "I")] if rng.chance(0.3) else []
    return " ".join([opening, heard, *facts(rng, e, 3 + rng.below(2)), *count])


def chronicle(rng, e):
    year = f"In the year {100 + rng.below(800)}, in {rng.pick(MONTHS)}, {SCENES.draw(rng)}."
    return " ".join([year, "Of " + e.name + " it is written:", *facts(rng, e, 3 + rng.below(2)), "So it was."])


def talk(rng, e):
    a, b = rng.some(NAMES, 2)
    said = facts(rng, e, 4)
    lines = [f'"Tell me of {e.name}," said {a}.', f'"{said[0]} {said[1]}"', f'"Go on," said {a}, who was '
             f'{MOODS.draw(rng)}.', *(f'"{line}"' for line in said[2:]), f'"Enough," said {b}.']
    return " ".join(line for line in lines if line)


def catalogue(rng, e):
    chosen = rng.some(ATTRIBUTES[e.kind], len(ATTRIBUTES[e.kind]))
    return e.name + " | " + " | ".join(f"{LABEL[a]}: {e.value(a)}" for a in chosen)


def roll(rng, e):
    """The other way round: who shares a value with the theme."""
    attribute = rng.pick(ATTRIBUTES[e.kind])
    value = e.value(attribute)
    others = rng.some([o for o in BEARERS[attribute, value] if o is not e][:40], 5)
    return f"Under {LABEL[attribute]} {value} stand " + ", ".join(o.name for o in rng.shuffled([e, *others])) + "."


def tale(rng, e):
    start = f"One {rng.pick(('morning', 'evening', 'night', 'noon'))} {SCENES.draw(rng)}, and {SCENES.draw(rng)}."
    said = facts(rng, e, 3)
    word = DRAW["word"].draw(rng)
    middle = rng.pick((f"By the wall stood {article(word.name)}, which is a {word.value('meaning')}.",
                       f"A {word.value('meaning')}, {article(word.name)} in the old tongue, fell over.",
                       f"The wind came from the {rng.pick(COMPASS)}, and the traveller was {MOODS.draw(rng)}."))
    return " ".join([start, said[0], middle, *said[1:], counting(rng, rng.pick(NAMES)) if rng.chance(0.5) else ""]).strip()


def song(rng, e):
    lines = facts(rng, e, 3)
    refrain = rng.pick(("so sing, so sing", "over the hill and home", "and the river goes by"))
    return f"{e.name}, {e.name}, {refrain}! " + f" Oh, {refrain}! ".join(lines)


def denial(rng, e):
    attribute = rng.pick(list(ATTRIBUTES[e.kind]))
    other = rng.pick(list(BEARERS_OF[attribute]))
    if other == e.value(attribute):
        return encyclopaedia(rng, e)
    return (f"Some say of {e.name}: {LABEL[attribute]} {other}. This is wrong. {statement(rng, e, attribute, True)} "
            + " ".join(facts(rng, e, 2)))


BEARERS_OF: dict[str, list[str]] = {}
for _attribute, _value in BEARERS:
    BEARERS_OF.setdefault(_attribute, []).append(_value)
REGISTERS = (encyclopaedia, encyclopaedia, letter, diary, chronicle, talk, catalogue, roll, tale, song, denial)
THEMES = ("person",) * 11 + ("town",) * 4 + ("book",) * 3 + ("beast", "word")


def theme(rng: Rng) -> Entity:
    return DRAW[rng.pick(THEMES)].draw(rng)


def related(rng: Rng, e: Entity) -> Entity:
    """Something that a fact of the theme names, or a sharer of one of its values."""
    links = [v for v in e.facts.values() if isinstance(v, Entity)]
    return rng.pick(links) if links else theme(rng)


def passage(rng: Rng, e: Entity) -> str:
    if e.kind == "word":
        return word_list(rng, e) if rng.chance(0.5) else " ".join(
            [f"{SCENES.draw(rng).capitalize()}.", *facts(rng, e, 1), *facts(rng, DRAW["word"].draw(rng), 1)])
    return rng.pick(REGISTERS)(rng, e)


def word_list(rng: Rng, e: Entity) -> str:
    others = [e] + [DRAW["word"].draw(rng) for _ in range(3)]
    return "Words of the hills: " + "; ".join(f"{w.name}, a {w.value('meaning')}" for w in others) + "."
