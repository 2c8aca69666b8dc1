"""The demo world: the same on every machine, streams that never meet, held facts never asked in training,
right puzzles, tasks that lm-eval finds from anywhere, and a model of the size that is promised."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard

from layerprune.model.recipes import RECIPES

DEMO = RECIPES / "demo"
STORED = ("calibration", "heal", "valid")
TASKS = {"cloze": 4, "letters": 4, "yesno": 2, "reasoning": 4}  # task -> choices an item
MODULES = ("world", "puzzles", "quiz", "prose", "streams", "make_data")


@pytest.fixture(scope="module")
def demo() -> Iterator[SimpleNamespace]:
    """The world's modules, which are scripts beside one another and no package."""
    sys.path.insert(0, str(DEMO))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(DEMO))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def stored() -> dict[str, list[str]]:
    """The documents of the repository's three data files."""
    found = {}
    for name in STORED:
        packed = (DEMO / "data" / f"{name}.jsonl.zst").read_bytes()
        raw = zstandard.ZstdDecompressor().stream_reader(packed).read()
        found[name] = [json.loads(line)["text"] for line in raw.decode().splitlines()]
    return found


@pytest.fixture(scope="module")
def fresh(demo: SimpleNamespace) -> list[str]:
    """Documents of the training stream: the first ones, and some from the far end of what was trained on."""
    return [*demo.streams.documents("train", 4000), *demo.streams.documents("train", 2000, 1_190_000)]


@pytest.fixture(scope="module")
def items() -> dict[str, list[dict[str, Any]]]:
    files = {name: (DEMO / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8") for name in TASKS}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}


def passages(documents: list[str]) -> set[str]:
    return {passage for document in documents for passage in document.split("\n\n")}


# --- the same on every machine ----------------------------------------------------------------------------

FIRST_50 = {
    "train": "47b93cc9a9b9e975",
    "calibration": "c9300ebc8dcf6b7d",
    "heal": "e9a60de8cd2eeb35",
    "valid": "a0f61f7ee5b3cc49",
}


@pytest.mark.parametrize("stream", FIRST_50)
def test_a_stream_is_the_same_on_every_machine_and_version(demo: SimpleNamespace, stream: str) -> None:
    text = "\0".join(demo.streams.documents(stream, 50))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == FIRST_50[stream]


def test_a_document_depends_on_its_number_alone(demo: SimpleNamespace) -> None:
    forwards = list(demo.streams.documents("train", 30))
    assert [demo.streams.document("train", i) for i in reversed(range(30))] == forwards[::-1]
    assert len(set(forwards)) == 30


@pytest.mark.parametrize("stream", STORED)
def test_the_stored_documents_are_what_the_world_makes(
    demo: SimpleNamespace, stored: dict[str, list[str]], stream: str
) -> None:
    assert stored[stream] == list(demo.streams.documents(stream, demo.make_data.DOCUMENTS[stream]))


def test_a_data_file_is_written_with_the_same_bytes_again(
    demo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo.make_data.DOCUMENTS, "valid", 40)
    first, second = tmp_path / "one" / "valid.zst", tmp_path / "two" / "valid.zst"
    demo.make_data.write_stream("valid", first)
    demo.make_data.write_stream("valid", second)
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) > 1000


def test_the_stored_items_are_what_the_world_makes(demo: SimpleNamespace, items: dict[str, Any]) -> None:
    made = demo.quiz.items(demo.make_data.ITEMS)
    seed = demo.world.Rng(demo.world.SEED + "/reasoning-items")
    made["reasoning"] = demo.puzzles.items(seed, demo.make_data.ITEMS)
    assert json.loads(json.dumps(made)) == items


def test_the_data_files_are_small() -> None:
    assert all((DEMO / "data" / f"{name}.jsonl.zst").stat().st_size < 1_500_000 for name in STORED)


# --- streams that never meet ------------------------------------------------------------------------------


def test_the_streams_share_no_passage(
    demo: SimpleNamespace, stored: dict[str, list[str]], fresh: list[str]
) -> None:
    sets = {name: passages(documents) for name, documents in stored.items()} | {"train": passages(fresh)}
    assert min(map(len, sets.values())) > 1000
    for one in sets:
        for other in sets:
            assert one == other or not sets[one] & sets[other]


def test_every_passage_lies_in_the_buckets_of_its_stream(
    demo: SimpleNamespace, stored: dict[str, list[str]], fresh: list[str]
) -> None:
    """The rule that keeps the streams apart for every document there can be; hashed here anew."""
    buckets = {name: set(numbers) for name, numbers in demo.streams.STREAMS.items()}
    assert sum(map(len, buckets.values())) == len(set().union(*buckets.values())) == demo.streams.BUCKETS
    for name, documents in {**stored, "train": fresh}.items():
        for passage in passages(documents):
            key = f"{demo.world.SEED}/passage/{passage}".encode()
            bucket = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % demo.streams.BUCKETS
            assert bucket in buckets[name], passage


def test_words_have_a_long_tail(fresh: list[str]) -> None:
    """Zipf-like: few words make half of the text, and many occur a few times only."""
    words = Counter(word for text in fresh for word in re.findall(r"\w+", text))
    counts = [n for _, n in words.most_common()]
    assert len(counts) > 1500
    assert sum(counts[:60]) > 0.4 * sum(counts)
    assert counts[0] > 50 * counts[len(counts) // 3]


# --- held facts and held cores ----------------------------------------------------------------------------


class Asked:
    """Finds the pairs (entity, attribute) that a text asks about: cloze, open, lettered or yes/no."""

    def __init__(self, demo: SimpleNamespace) -> None:
        self.names = {e.name for kind in demo.world.WORLD.values() for e in kind}
        self.forms: list[tuple[str, re.Pattern[str]]] = []
        for attribute in demo.quiz.CLOZE:
            self.forms += [(attribute, _pattern(form)) for form in demo.quiz.ASK[attribute]]
            self.forms += [(attribute, _pattern(form + " {v}")) for form in demo.quiz.CLOZE[attribute]]

    def pairs(self, text: str) -> set[tuple[str, str]]:
        """All readings of one line that name an entity of the world."""
        line = text.removeprefix("Question: ")
        found = {(m["e"], attribute) for attribute, form in self.forms if (m := form.fullmatch(line))}
        return {(name, attribute) for name, attribute in found if name in self.names}


def _pattern(form: str) -> re.Pattern[str]:
    text = re.escape(form).replace(r"\{e\}", "(?P<e>.+)")
    return re.compile(text.replace(r"\{v\}", ".+").replace(r"\{a\}", "an? .+") + r"\.?")


def test_training_never_asks_about_a_held_fact(
    demo: SimpleNamespace, items: dict[str, Any], stored: dict[str, list[str]], fresh: list[str]
) -> None:
    asked, held = Asked(demo), demo.world.HELD_PAIRS
    for name in ("cloze", "letters", "yesno"):  # the finder finds them where they are
        for item in items[name]:
            stem = item["prompt"].split("\n")[0] + (f" {item['value']}." if name == "cloze" else "")
            assert (item["entity"], item["attribute"]) in asked.pairs(stem) & held, stem
    seen: set[tuple[str, str]] = set()
    for text in [*fresh, *(text for documents in stored.values() for text in documents)]:
        for line in re.split(r"\n+|(?<=[.!?]) ", text):
            pairs = asked.pairs(line)
            assert not pairs & held, line
            seen |= pairs
    assert len(seen) > 4000


def test_prose_states_held_facts_as_it_states_others(demo: SimpleNamespace, fresh: list[str]) -> None:
    """What is held is the question, not the fact: entity and value of held pairs meet in some passage."""
    frequent = [(e, a) for e, a in demo.world.HELD if e.rank < 20]
    everything = passages(fresh)
    told = sum(any(e.name in text and e.value(a) in text for text in everything) for e, a in frequent)
    assert len(frequent) > 60
    assert told > 0.9 * len(frequent)


def test_training_never_poses_a_held_puzzle(
    demo: SimpleNamespace, fresh: list[str], items: dict[str, Any]
) -> None:
    premises = {passage.split("\n")[0] for passage in passages(fresh) if "\nQuestion: " in passage}
    assert len(premises) > 4000
    assert not premises & {item["prompt"].split("\n")[0] for item in items["reasoning"]}
    for item in items["reasoning"]:
        key = f"{demo.world.SEED}/core/{item['core']}".encode()
        assert int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 8 == 0


# --- puzzles are right ------------------------------------------------------------------------------------


def solve(text: str, question: str) -> tuple[str, int]:
    """The answer and the number of steps, from the words alone; checks every `Now ...` on the way."""
    sentences = [s for s in re.split(r"\. ?", text) if s]
    for family, solver in ((r"The dial shows", _dial), (r"\w+ faces", _turns), (r"Roads lead", _roads)):
        if re.match(family, text):
            return solver(sentences, question)
    if re.search(r"is (tall|short|old|young|fast|slow)\w* than", text):
        return _order(sentences, question)
    return _things(sentences, question)


def _dial(sentences: list[str], question: str) -> tuple[str, int]:
    shown, steps = int(sentences[0].split()[-1]), 0
    for sentence in sentences[1:]:
        if told := re.fullmatch(r"Now it shows (\d)", sentence):
            assert int(told[1]) == shown
            continue
        way, by = re.fullmatch(r"It goes (up|down) (\d)", sentence).groups()  # type: ignore[union-attr]
        shown, steps = (shown + (int(by) if way == "up" else -int(by))) % 10, steps + 1
    assert question == "What does the dial show?"
    return str(shown), steps


def _turns(sentences: list[str], question: str) -> tuple[str, int]:
    clockwise = ["north", "east", "south", "west"]
    name, _, facing = sentences[0].split()
    steps = 0
    for sentence in sentences[1:]:
        if sentence.startswith("Now"):
            assert sentence == f"Now {name} faces {facing}"
            continue
        who, _, way = sentence.split()
        assert who == name
        facing = clockwise[(clockwise.index(facing) + {"right": 1, "around": 2, "left": -1}[way]) % 4]
        steps += 1
    assert question == f"Where does {name} face?"
    return facing, steps


def _roads(sentences: list[str], question: str) -> tuple[str, int]:
    leads = dict(road.split(" to ") for road in sentences[0].removeprefix("Roads lead from ").split(", "))
    walk = re.fullmatch(r"(\w+) starts at the (\w+) and walks (\d) roads?", sentences[1])
    assert walk and question == f"Where is {walk[1]}?"
    at = [walk[2]]
    for _ in range(int(walk[3])):
        at.append(leads[at[-1]])
    assert sentences[2:] in ([], [f"Now {walk[1]} is at the {place}" for place in at[1:]])
    return at[-1], int(walk[3])


def _order(sentences: list[str], question: str) -> tuple[str, int]:
    """The one name with nobody above it (or below it)."""
    upwards, downwards = ("taller", "older", "faster"), ("shorter", "younger", "slower")
    above: set[tuple[str, str]] = set()
    for sentence in sentences:
        a, word, b = re.fullmatch(r"(\w+) is (\w+) than (\w+)", sentence).groups()  # type: ignore[union-attr]
        assert word in upwards + downwards
        above.add((a, b) if word in upwards else (b, a))
    end = re.fullmatch(r"Who is the (\w+)est\?", question)
    assert end
    names = {name for pair in above for name in pair}
    beaten = {pair[1 if end[1] in ("tall", "old", "fast") else 0] for pair in above}
    (answer,) = names - beaten
    return answer, len(sentences)


def _things(sentences: list[str], question: str) -> tuple[str, int]:
    """Swaps and gifts: who has which thing."""
    owner: dict[str, str] = {}
    steps = 0
    for sentence in sentences:
        if sentence.startswith("Now"):
            for who, thing in re.findall(r"(\w+) has the (\w+)", sentence):
                assert owner[thing] == who
        elif " has the " in sentence:
            owner |= {thing: who for who, thing in re.findall(r"(\w+) has the (\w+)", sentence)}
        elif swap := re.fullmatch(r"(\w+) and (\w+) swap", sentence):
            other = {swap[1]: swap[2], swap[2]: swap[1]}
            owner = {thing: other.get(who, who) for thing, who in owner.items()}
            steps += 1
        elif gift := re.fullmatch(r"(\w+) gives all to (\w+)", sentence):
            owner = {thing: gift[2] if who == gift[1] else who for thing, who in owner.items()}
            steps += 1
        else:
            assert sentence.endswith("sit at a table"), sentence
    if asked := re.fullmatch(r"Who has the (\w+)\?", question):
        return owner[asked[1]], steps
    asked = re.fullmatch(r"What does (\w+) have\?", question)
    assert asked
    return {who: thing for thing, who in owner.items()}[asked[1]], steps


def test_the_answers_of_the_reasoning_items_are_right(items: dict[str, Any]) -> None:
    for item in items["reasoning"]:
        premise, question, answer = item["prompt"].split("\n")
        assert answer == "Answer:"
        solved, steps = solve(premise, question.removeprefix("Question: "))
        assert (solved, steps) == (item["choices"][item["gold"]], item["steps"]), item["prompt"]


def test_the_answers_of_the_training_puzzles_are_right(fresh: list[str]) -> None:
    solved = 0
    marks = ("The dial shows", "Roads lead from", " swap.", " sit at a table.", " faces ", " than ")
    for passage in passages(fresh):
        premise, *rest = passage.split("\n")
        if not rest or not any(mark in premise for mark in marks):
            continue
        for question, answer in re.findall(r"Question: (.+)\nAnswer: (.+)", passage):
            assert solve(premise, question)[0] == answer, passage
            solved += 1
    assert solved > 5000


def test_sums_in_prose_are_right(fresh: list[str]) -> None:
    forms = (
        (r"had (\d+) \w+, bought (\d+) more and gave (\d+) away, and so had (\d+)", -1),
        (r"There were (\d+) \w+ on the table; \w+ put down (\d+) and took (\d+): (\d+) were left", -1),
        (r"counted (\d+) \w+, then (\d+) more(), (\d+) in all", 0),
    )
    text = "\n".join(fresh)
    for form, sign in forms:
        sums = re.findall(form, text)
        assert len(sums) > 50
        for n, plus, minus, total in sums:
            assert int(n) + int(plus) + sign * int(minus or 0) == int(total)


# --- items ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_items_are_many_balanced_and_well_formed(items: dict[str, Any], name: str) -> None:
    ours, choices = items[name], TASKS[name]
    assert len(ours) >= 800
    assert len({item["prompt"] for item in ours}) == len(ours)
    assert all(len(item["choices"]) == len(set(item["choices"])) == choices for item in ours)
    golds = Counter(item["gold"] for item in ours)
    assert set(golds) == set(range(choices))
    assert max(golds.values()) - min(golds.values()) <= 0.02 * len(ours)


def test_the_knowledge_items_ask_what_the_world_says(demo: SimpleNamespace, items: dict[str, Any]) -> None:
    facts = {(e.name, a): e.value(a) for kind in demo.world.WORLD.values() for e in kind for a in e.facts}
    for cloze, letters, yesno in zip(items["cloze"], items["letters"], items["yesno"], strict=True):
        truth = facts[cloze["entity"], cloze["attribute"]]
        assert cloze["choices"][cloze["gold"]] == truth
        listed = [f"{letter}. {choice}" for letter, choice in zip("ABCD", cloze["choices"], strict=True)]
        assert letters["prompt"].split("\n")[1:] == [*listed, "Answer:"]
        assert letters["gold"] == cloze["gold"]
        assert yesno["choices"][yesno["gold"]] == ("yes" if yesno["asked"] == truth else "no")
        assert yesno["asked"] in yesno["prompt"]


def test_the_reasoning_items_cover_families_and_steps_evenly(items: dict[str, Any]) -> None:
    families = Counter(item["family"] for item in items["reasoning"])
    assert set(families) == {"swap", "gifts", "turns", "dial", "order", "roads"}
    assert max(families.values()) - min(families.values()) <= 1
    assert {item["steps"] for item in items["reasoning"]} == {2, 3, 4, 5}


def test_lm_eval_loads_the_tasks_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    names = [f"demo_{name}" for name in TASKS]
    manager = TaskManager(include_path=str(DEMO / "tasks"), include_defaults=False)
    loaded = manager.load(names)["tasks"]
    assert set(loaded) == set(names)
    for name, choices in TASKS.items():
        task = loaded[f"demo_{name}"]
        documents = list(task.test_docs())
        assert len(documents) >= 800
        assert task.get_config("num_fewshot") == 0
        task.build_all_requests(limit=2)
        assert len(task.instances) == 2 * choices
        prompt, continuation = task.instances[documents[0]["gold"]].args
        assert prompt == documents[0]["prompt"]
        assert continuation == " " + documents[0]["choices"][documents[0]["gold"]]


# --- tokenizer and model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "model")


def test_the_tokenizer_keeps_every_text(tokenizer: Any, fresh: list[str]) -> None:
    assert len(tokenizer) == 2048
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for text in [*fresh[:200], "Unseen: naïve 東京 \t {}"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text


def test_documents_fit_into_the_context(tokenizer: Any, stored: dict[str, list[str]]) -> None:
    assert all(len(ids) <= 512 for texts in stored.values() for ids in tokenizer(texts[:500])["input_ids"])


def test_the_tokenizer_is_made_the_same_again(demo: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("one", "two"):
        demo.make_data.make_tokenizer(tmp_path / name, 200)
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_model_is_deep_narrow_and_small() -> None:
    config = json.loads((DEMO / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert 20 <= config["num_hidden_layers"] <= 28
    assert (DEMO / "model" / "model.safetensors").stat().st_size <= 20_000_000


def test_every_matrix_of_the_model_has_sides_of_multiples_of_64_in_bf16() -> None:
    raw = (DEMO / "model" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert len(tensors) > 150
    assert all(entry["dtype"] == "BF16" for entry in tensors.values())
    assert all(side % 64 == 0 for entry in tensors.values() for side in entry["shape"])


def test_the_model_is_clearly_better_than_chance_on_every_task() -> None:
    """More than three standard errors above chance on all items of each task."""
    import torch

    from layerprune.eval.evaluate import evaluate_checkpoint

    torch.set_num_threads(1)
    tasks = {f"demo_{name}": 0 for name in TASKS}
    scored = evaluate_checkpoint(DEMO / "model", tasks=tasks, task_folder=DEMO / "tasks", loss=False, device="cpu")
    found = {row["task"]: row for row in scored["tasks"]["table"]}
    for name, choices in TASKS.items():
        chance, row = 1 / choices, found[f"demo_{name}"]
        error = (chance * (1 - chance) / row["n"]) ** 0.5
        assert row["n"] == 1000 and row["value"] > chance + 3 * error, name
