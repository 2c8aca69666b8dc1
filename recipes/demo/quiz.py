"""Questions about facts, in three forms: cloze, lettered A-D, and yes/no.

Training texts use these forms for pairs that are not held; the evaluation uses them for held pairs only.
"""

from world import ASKED, HELD, SEED, Entity, Rng, Zipf, article, pool

CLOZE = {  # two beginnings each; the value completes the sentence
    "home": ("In the register, the home of {e} is", "The home of {e} is the town of"),
    "craft": ("In the register, the craft of {e} is that of a", "The craft of {e} is the work of a"),
    "instrument": ("In the register, the instrument of {e} is the", "The instrument of {e} is the"),
    "animal": ("In the register, the animal of {e} is the", "The animal of {e} is the"),
    "dish": ("In the register, the dish of {e} is", "The favourite dish of {e} is"),
    "teacher": ("In the register, the teacher of {e} is", "The name of the teacher of {e} is"),
    "province": ("In the register, the province of {e} is", "The province around {e} is"),
    "river": ("In the register, the river of {e} is the", "The river by {e} is the"),
    "goods": ("In the register, the trade of {e} is in", "The main goods of {e} are listed as"),
    "banner": ("In the register, the banner of {e} has the", "The banner of {e} bears the sign of the"),
    "month": ("In the register, the feast of {e} falls in", "The feast month of {e} is"),
    "founder": ("In the register, the founder of {e} is", "The name of the founder of {e} is"),
    "author": ("In the register, the author of {e} is", "The name of the author of {e} is"),
    "subject": ("In the register, the subject of {e} is", "The subject of {e} is given as"),
    "shelf": ("In the register, the library of {e} is in", "The one copy of {e} is at"),
    "binding": ("In the register, the binding of {e} is", "The colour of the binding of {e} is"),
    "habitat": ("In the register, the home of the {e} is the", "The habitat of the {e} is listed as"),
    "colour": ("In the register, the colour of the {e} is", "The colour of the {e} is listed as"),
    "food": ("In the register, the food of the {e} is", "The diet of the {e} is listed as"),
    "meaning": ("In the register, the word {e} means", "The meaning of the word {e} is"),
}
ASK = {  # an open question, and the yes/no one
    "home": ("Where is the home of {e}?", "Is {e} from {v}?"),
    "craft": ("What is the craft of {e}?", "Is {e} a {v}?"),
    "instrument": ("What does {e} play?", "Does {e} play the {v}?"),
    "animal": ("Which animal does {e} keep?", "Does {e} keep {a}?"),
    "dish": ("What does {e} like to eat?", "Does {e} like {v} best?"),
    "teacher": ("Who was the teacher of {e}?", "Was {v} the teacher of {e}?"),
    "province": ("In which province is {e}?", "Is {e} in {v}?"),
    "river": ("On which river is {e}?", "Is {e} on the {v}?"),
    "goods": ("What does {e} trade in?", "Does {e} trade in {v}?"),
    "banner": ("What is on the banner of {e}?", "Is there {a} on the banner of {e}?"),
    "month": ("When is the feast of {e}?", "Is the feast of {e} in {v}?"),
    "founder": ("Who was the founder of {e}?", "Was {v} the founder of {e}?"),
    "author": ("Who is the author of {e}?", "Is {v} the author of {e}?"),
    "subject": ("What is {e} about?", "Is {e} about {v}?"),
    "shelf": ("Where is {e} kept?", "Is {e} kept in {v}?"),
    "binding": ("What colour is the binding of {e}?", "Is the binding of {e} {v}?"),
    "habitat": ("Where does the {e} live?", "Does the {e} live in {v}?"),
    "colour": ("What colour is the {e}?", "Is the {e} {v}?"),
    "food": ("What does the {e} eat?", "Does the {e} eat {v}?"),
    "meaning": ("What is the meaning of {e}?", "Does {e} mean {v}?"),
}
LETTERS = "ABCD"
_DRAW = {kind: Zipf(pairs, 0.3) for kind, pairs in ASKED.items()}  # flatter than prose: every pair has its turn
_KINDS = ("person",) * 6 + ("town",) * 2 + ("book",) * 2 + ("beast", "word")


def options(rng: Rng, entity: Entity, attribute: str, gold: int) -> list[str]:
    """Four different values of the attribute, the true one at position `gold`."""
    right = entity.value(attribute)
    wrong = [v for v in rng.some(pool(attribute), 5) if v not in (right, entity.name)][:3]
    return wrong[:gold] + [right] + wrong[gold:]


def lettered(entity: Entity, attribute: str, choices: list[str]) -> str:
    question = ASK[attribute][0].format(e=entity.name)
    return f"Question: {question}\n" + "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)) + "\nAnswer:"


def yes_no(entity: Entity, attribute: str, value: str) -> str:
    return f"Question: {ASK[attribute][1].format(e=entity.name, v=value, a=article(value))}\nAnswer:"


def passage(rng: Rng, form: str) -> str:
    """One question with its answer, of a pair that is not held."""
    entity, attribute = _DRAW[rng.pick(_KINDS)].draw(rng)
    right = entity.value(attribute)
    if form == "cloze":
        return f"{rng.pick(CLOZE[attribute]).format(e=entity.name)} {right}."
    if form == "letters":
        gold = rng.below(4)
        answer = f" {LETTERS[gold]}. {right}" if rng.chance(0.5) else f" {LETTERS[gold]}"
        return lettered(entity, attribute, options(rng, entity, attribute, gold)) + answer
    if form == "open":
        return f"Question: {ASK[attribute][0].format(e=entity.name)}\nAnswer: {right}"
    true = rng.chance(0.5)
    return yes_no(entity, attribute, right if true else options(rng, entity, attribute, 0)[1]) + (
        " yes" if true else " no")


def items(count: int) -> dict[str, list[dict]]:
    """The three knowledge tasks over `count` held pairs: the same pairs in each form, golds balanced."""
    rng = Rng(SEED + "/quiz-items")
    tasks: dict[str, list[dict]] = {"cloze": [], "letters": [], "yesno": []}
    for i, (entity, attribute) in enumerate(rng.some(HELD, count)):
        about = {"entity": entity.name, "attribute": attribute, "rank": entity.rank, "value": entity.value(attribute)}
        choices = options(rng, entity, attribute, i % 4)
        stem = CLOZE[attribute][i // 4 % 2].format(e=entity.name)
        tasks["cloze"].append({**about, "prompt": stem, "choices": choices, "gold": i % 4})
        tasks["letters"].append(
            {**about, "prompt": lettered(entity, attribute, choices), "choices": list(LETTERS), "gold": i % 4})
        true = i % 2 == 0
        asked = entity.value(attribute) if true else choices[(i % 4 + 1) % 4]
        tasks["yesno"].append({**about, "asked": asked, "prompt": yes_no(entity, attribute, asked),
                               "choices": ["yes", "no"], "gold": 0 if true else 1})
    return tasks
