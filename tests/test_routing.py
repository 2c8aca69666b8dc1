"""`layerprune route search` and `train`: items as lm-eval asks them, paths against all paths there are, processes, refusals."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from layerprune import route_jobs, routing
from layerprune.cli import main
from layerprune.model.errors import LayerpruneError, Refused, UsageError
from layerprune.model.load import load_model, load_tokenizer
from layerprune.model.source import find_model
from layerprune.route.items import load_items, prompt_key
from layerprune.route.router_file import load_routers
from layerprune.route_items import LONGEST, read_items, want_items
from layerprune.routing import search_routing, train_routing

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
WORDS = "river stone bird green walks over under old tall small king tower bread water night day".split()
METRIC = "metric_list:\n  - metric: {}\n    aggregation: mean\n    higher_is_better: true\n"


def silent(line: str) -> None:
    pass


def documents(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        options = rng.sample(WORDS, 3)
        made.append({"question": " ".join(rng.choices(WORDS, k=6)), "choices": options, "gold": rng.randrange(3)})
    return made


@pytest.fixture(scope="module")
def model(build_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("routing") / "tiny", layers=4, max_position_embeddings=256)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multiple choice with and without training documents, answers to be generated, and a kind that is not routed."""
    folder = tmp_path_factory.mktemp("tasks")
    written: list[dict[str, Any]] = [{"question": f"{w} {w}", "answer": w} for w in WORDS[:4]]
    written += [{"question": "", "answer": "stone"}, {"question": "river", "answer": "bread " * 40}]
    lists = [{"question": "old king", "answer": ["stone", "bread"]}]
    short = [{"question": "old king", "choices": ["the", "and", "bird"], "gold": 1}, documents(1, 4)[0]]
    kinds = {"train": documents(6, 1), "test": documents(5, 2), "written": written, "lists": lists, "short": short}
    for name, lines in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def task(name: str, kind: str, more: str, **files: str) -> None:
        data = "".join(f"    {split}: {folder / file}.jsonl\n" for split, file in files.items())
        splits = "".join(f"{'training' if s == 'train' else s}_split: {s}\n" for s in files)
        metric = METRIC.format("acc" if kind != "generate_until" else "exact_match")
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n{data}{splits}output_type: {kind}\n"
            f"doc_to_text: '{{{{question}}}}'\n{more}{metric}"
        )

    choice = "doc_to_choice: choices\ndoc_to_target: gold\n"
    task("chosen", "multiple_choice", choice, train="train", test="test")
    task("tested", "multiple_choice", choice, test="test")
    task("short", "multiple_choice", choice, test="short")
    task("written", "generate_until", "doc_to_target: answer\n", test="written")
    task("several", "generate_until", "doc_to_target: answer\n", test="lists")
    task("likely", "loglikelihood", "doc_to_target: answer\n", test="written")
    return folder


@pytest.fixture(scope="module")
def items_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 items of two tasks."""
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    lines = []
    for number, made in enumerate(documents(14, 3)):
        line = {"prompt": made["question"], "options": made["choices"], "gold": made["gold"]}
        lines.append(line if number % 3 else {**line, "task": "thirds"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def searched(model: Path, items_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search over the items, all paths of up to three edits within its reach."""
    folder = tmp_path_factory.mktemp("searched") / "paths"
    search_routing(model, items=items_file, simulations=60, stop_shorter=None, out=folder, device="cpu", say=silent)
    return folder


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wanted(model: Path, tasks: Path, *names: str, **options: Any) -> Any:
    return want_items(find_model(str(model)), tasks=names, task_folder=tasks, **options)


def test_multiple_choice_has_the_tokens_that_the_harness_scores(model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerprune.eval.harness import LiveModel
    from layerprune.eval.tasks import load_tasks, run_harness

    asked: list[Any] = []
    real = LiveModel._loglikelihood_tokens

    def record(self: Any, requests: Any, *rest: Any, **named: Any) -> Any:
        asked.extend((tuple(context), tuple(ending)) for _, context, ending in requests)
        return real(self, requests, *rest, **named)

    monkeypatch.setattr(LiveModel, "_loglikelihood_tokens", record)
    tokenizer = load_tokenizer(model)
    run_harness(load_model(model, device="cpu"), tokenizer, load_tasks({"tested": 0, "chosen": 2}, tasks))
    monkeypatch.undo()
    read = read_items(wanted(model, tasks, "tested:0", "chosen:2", split="test"), tokenizer)
    assert [(item.prompt, ending) for item in read.items for ending in item.endings] == asked
    assert [item.gold for item in read.items] == 2 * [made["gold"] for made in documents(5, 2)]
    assert [item.task for item in read.items] == ["tested"] * 5 + ["chosen"] * 5
    assert [item.line for item in read.items] == 2 * list(range(5))
    assert read.left_out == {}


def test_training_documents_come_first_and_are_never_their_own_example(model: Path, tasks: Path) -> None:
    tokenizer = load_tokenizer(model)
    read = read_items(wanted(model, tasks, "chosen:0"), tokenizer)
    texts = [tokenizer.decode(item.prompt, skip_special_tokens=True) for item in read.items]
    assert texts == [made["question"] for made in documents(6, 1)]
    shown = read_items(wanted(model, tasks, "chosen:4", limit=4), tokenizer)
    assert len(shown.items) == 4
    for item, question in zip(shown.items, texts, strict=False):
        prompt = tokenizer.decode(item.prompt, skip_special_tokens=True)
        assert prompt.count(question) == 1 and prompt.endswith(question)
        assert sum(prompt.count(other) for other in texts) == 5, "four examples of the same split, and the question"


def test_answers_to_generate(model: Path, tasks: Path) -> None:
    tokenizer = load_tokenizer(model)
    read = read_items(wanted(model, tasks, "written", split="test"), tokenizer)
    for item, word in zip(read.items, WORDS[:4], strict=True):
        assert tokenizer.decode(item.prompt + item.endings[0], skip_special_tokens=True) == f"{word} {word} {word}"
        assert item.gold is None and len(item.endings) == 1
    assert read.left_out == {"written": {"no context": 1, f"an answer of over {LONGEST} tokens": 1}}
    with pytest.raises(Refused, match=r"task several has no item that can be routed \(1 with several right answers\)"):
        read_items(wanted(model, tasks, "several", split="test"), tokenizer)
    with pytest.raises(UsageError, match="task likely is of the kind loglikelihood"):
        read_items(wanted(model, tasks, "likely", split="test"), tokenizer)


def test_the_choices_probe_gets_the_same_items(model: Path, tasks: Path) -> None:
    from layerprune.choice_items import choice_items

    live, tokenizer = load_model(model, device="cpu"), load_tokenizer(model)
    first, second = read_items(wanted(model, tasks, "short:0", split="test"), tokenizer).items
    assert {len(ending) for ending in first.endings} == {1} != {len(ending) for ending in second.endings}
    (found,) = choice_items(live, tokenizer, {"short": 0}, str(tasks), None, 0)["short"]
    assert (found.context, found.options, found.gold) == (first.prompt, tuple(ending[0] for ending in first.endings), 1)


@torch.no_grad()
def reward_by_hand(model: Any, item: Any, counts: tuple[int, ...]) -> float:
    """Log-likelihoods of the options, each run by itself, by a plain loop over the modules of a Llama."""
    inner, values = model.model, []
    for ending in item.endings:
        ids = torch.tensor([item.prompt + ending])
        x, tokens = inner.embed_tokens(ids), ids.shape[1]
        positions = torch.arange(tokens)[None]
        rotary, mask = inner.rotary_emb(x, positions), torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
        for layer, count in zip(inner.layers, counts, strict=True):
            for _ in range(count):
                x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        logp = model.lm_head(inner.norm(x))[0].log_softmax(-1)
        first = len(item.prompt) - 1
        values.append(sum(float(logp[first + i, token]) for i, token in enumerate(ending)))
    return float(all(values[item.gold] > value for i, value in enumerate(values) if i != item.gold))


def test_the_paths_are_the_best_of_all_paths(model: Path, items_file: Path, tmp_path: Path) -> None:
    arguments = [
        "route",
        "search",
        "--model",
        str(model),
        "--items",
        str(items_file),
        "--out",
        str(tmp_path / "out"),
        "--limit",
        "2",
    ]
    arguments += ["--simulations", "1500", "--no-stop", "--longest-skip", "4", "--length-penalty", "0", "--random-share", "0.5"]
    found = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert found.exit_code == 0, found.output
    head, *records = lines_of(tmp_path / "out" / "paths.jsonl")
    assert head["layers"] == 4 and [r["number"] for r in records] == list(range(4))
    live, tokenizer = load_model(model, device="cpu"), load_tokenizer(model)
    items = load_items(items_file, tokenizer, 320)[:4]  # two of each task
    every = [c for c in itertools.product((0, 1, 2), repeat=4) if any(c)]
    improved = useful = 0
    for record, item in zip(records, items, strict=True):
        reward = {counts: reward_by_hand(live, item, counts) for counts in every}
        assert record["visited"] == len(every) - 1, "the search has seen them all"
        base = reward[1, 1, 1, 1]
        good = [c for c in every if reward[c] > 0 and reward[c] >= base]
        best = min(good, key=lambda c: (sum(c), sum(count > 0 for count in c), c), default=None)
        assert record["best"] == (None if best is None else list(best))
        assert (record["base"], record["task"]) == (base, item.task)
        assert record["improved"] == sum(reward[c] > base for c in every)
        improved += best is not None and base == 0
        useful += record["useful"]
    whole = json.loads((tmp_path / "out" / "search.json").read_text())["all"]
    assert (whole["items"], whole["improved"], whole["useful"]) == (4, improved, useful)
    assert whole["passes"] == 4 * len(every) == whole["visited"] + 4
    assert whole["alone"] == 4 * sum(map(sum, every))
    assert whole["run_share"] == whole["applications"] / whole["alone"] < 1


def test_it_prints_a_table_once_more_and_refuses_other_inputs(
    model: Path, items_file: Path, searched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **named: Any) -> Any:
        raise AssertionError("it works again")

    monkeypatch.setattr(route_jobs, "label_part", never)
    line = ["route", "search", "--model", str(model), "--items", str(items_file), "--simulations", "60", "--no-stop"]
    line += ["--out", str(searched), "--device", "cpu"]
    before = {path: path.read_bytes() for path in searched.iterdir()}
    found = CliRunner().invoke(main, line)
    assert found.exit_code == 0, found.output
    rows = {row.split()[0]: row.split() for row in found.stdout.splitlines() if row.startswith(("thirds", "items ", "all"))}
    records = lines_of(searched / "paths.jsonl")[1:]
    for task, row in rows.items():
        own = [r for r in records if task in ("all", r["task"])]
        assert row[1] == str(len(own)) and row[4] == str(sum(r["useful"] for r in own))
        assert row[2] == f"{100 * sum(r['base'] for r in own) / len(own):.1f}"
    assert set(rows) == {"thirds", "items", "all"}
    assert CliRunner().invoke(main, line).stdout == found.stdout
    told = json.loads(CliRunner().invoke(main, [*line, "--json"]).stdout)
    assert told["folder"] == str(searched) and told["tasks"]["thirds"]["items"] == 5
    other = CliRunner().invoke(main, [*line, "--seed", "1"])
    assert other.exit_code == 2 and "seed was 0, now 1" in other.stderr
    assert {path: path.read_bytes() for path in searched.iterdir()} == before


def test_processes_find_the_same(
    model: Path, items_file: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_processes = route_jobs._in_processes
    options: dict[str, Any] = {"items": items_file, "simulations": 60, "stop_shorter": None, "device": "cpu", "say": silent}
    told: list[int] = []
    monkeypatch.setattr(route_jobs, "_in_processes", lambda *args: in_processes(*args[:-1], told.append))
    search_routing(model, out=tmp_path / "two", jobs=2, **options)
    assert (tmp_path / "two" / "paths.jsonl").read_bytes() == (searched / "paths.jsonl").read_bytes()
    assert sum(told) == 14 and 0 not in told, "a bar is drawn again only when something has been found"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["manifest.json", "paths.jsonl", "search.json"]


def processes_of(folder: Path) -> list[str]:
    """Workers of a search in this folder that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "layerprune.route_jobs" in line and str(folder) in line:
            found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_killed_search_leaves_no_worker_and_is_gone_on_with(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, items = tmp_path / "paths", tmp_path / "items.jsonl"
    lines = ({"prompt": made["question"], "options": made["choices"], "gold": made["gold"]} for made in documents(40, 5))
    items.write_text("".join(json.dumps(made) + "\n" for made in lines))
    # enough simulations that it is not done before it is killed
    options: dict[str, Any] = {"items": items, "simulations": 200, "stop_shorter": None, "device": "cpu", "say": silent}
    line = [sys.executable, "-m", "layerprune", "route", "search", "--model", str(model), "--items", str(items)]
    line += ["--simulations", "200", "--no-stop", "--jobs", "2", "--device", "cpu", "--out", str(folder)]
    started = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while sum(path.read_bytes().count(b"\n") for path in folder.glob(".work/part-*.jsonl")) < 4:
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.02)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    until = time.monotonic() + 30
    while processes_of(folder):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert not (folder / "paths.jsonl").exists()
    part = next(path for path in folder.glob(".work/part-*.jsonl") if path.read_bytes().count(b"\n") > 1)
    with open(part, "ab") as file:
        file.write(b'{"number": 3, "li')  # a line that it did not finish
    done = {r["number"] for p in folder.glob(".work/part-*.jsonl") for r in map(json.loads, p.read_text().splitlines()[1:-1])}
    seen: list[int] = []
    real = route_jobs.label_part

    def record(search: Any, numbers: Any, path: Path, progress: Any) -> None:
        seen.extend(numbers)
        real(search, numbers, path, progress)

    monkeypatch.setattr(route_jobs, "label_part", record)
    with pytest.raises(Refused, match="is not finished"):
        train_routing(folder, out=tmp_path / "routers")
    search_routing(model, out=folder, **options)
    assert seen and not done & set(seen), "what was found is not searched again"
    search_routing(model, out=tmp_path / "whole", **options)
    assert (folder / "paths.jsonl").read_bytes() == (tmp_path / "whole" / "paths.jsonl").read_bytes()


def test_a_worker_that_fails_says_why(model: Path, items_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_jobs, "_slots", lambda device, jobs: [{"LAYERPRUNE_NO_SUCH": "1"}] * jobs)
    real = route_jobs.asdict

    def broken(value: Any) -> Any:
        found = real(value)
        return {**found, "dtype": "float7"} if "dtype" in found else found

    monkeypatch.setattr(route_jobs, "asdict", broken)
    with pytest.raises(Refused, match="--dtype float7 is none of auto, float32"):
        search_routing(model, items=items_file, jobs=2, out=tmp_path / "out", device="cpu", say=silent)
    assert not (tmp_path / "out").exists(), "nothing is left of a search that has found nothing"


def test_routers_are_trained_and_judged(model: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerprune.model.decoder import view_decoder
    from layerprune.model.layerwise import Layerwise
    from layerprune.route.features import Labelled, pooled_states
    from layerprune.route.train import TrainSettings

    line = ["route", "train", "--search", str(searched), "--epochs", "3", "--held-out", "0.4", "--batch-size", "4"]
    line += ["--out", str(tmp_path / "routers"), "--device", "cpu"]
    found = CliRunner().invoke(main, line)
    assert found.exit_code == 0, found.output
    folder = tmp_path / "routers"
    assert sorted(path.name for path in folder.iterdir()) == ["figures", "manifest.json", "routers", "train.json"]
    names = ["layers.png", "layers.svg", "learning.png", "learning.svg"]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == names
    told = json.loads((folder / "train.json").read_text())
    records = [r for r in lines_of(searched / "paths.jsonl")[1:] if r["useful"]]
    routers = load_routers(folder / "routers", model)
    layerwise = Layerwise(view_decoder(load_model(model, device="cpu")))
    _, held = TrainSettings(held_out=round(0.4 * len(records))).split(len(records))
    confusion, chosen = [[0] * 3 for _ in range(3)], []
    for number in held.tolist():
        item = Labelled(tuple(records[number]["prompt"]), tuple(records[number]["best"]))
        real = torch.arange(8)[None] < len(item.prompt)
        with torch.no_grad():
            chosen.append(routers(pooled_states(layerwise, item)[None], real)[0].argmax(-1).tolist())
        for true, said in zip(item.counts, chosen[-1], strict=True):
            confusion[true][said] += 1
    assert told["held_out"]["confusion"] == confusion
    assert told["by_layer"]["routers"]["skip"] == [sum(c[i] == 0 for c in chosen) / len(chosen) for i in range(4)]
    repeats = [sum(r["best"][i] == 2 for r in records) / len(records) for i in range(4)]
    assert told["by_layer"]["labels"]["repeat"] == pytest.approx(repeats)
    assert len(told["losses"]) == len(told["held_out_losses"]) == 3
    about = json.loads((folder / "routers" / "routers.json").read_text())["about"]
    every = lines_of(searched / "paths.jsonl")[1:]
    assert about["prompts"] == sorted({prompt_key(r["prompt"]) for r in every}), "also those that taught nothing"
    accuracy = sum(confusion[i][i] for i in range(3)) / (4 * len(held))
    executed = sum(confusion[1]) / (4 * len(held))
    assert f"accuracy {accuracy:.3f} (executing every layer: {executed:.3f})" in found.stdout
    assert f"on {len(held)} other items" in found.stdout

    # killed when the routers are written and the report is not: the same again
    weights = (folder / "routers" / "routers.safetensors").read_bytes()
    (folder / "train.json").unlink()
    (folder / "manifest.json").write_text(json.dumps({**json.loads((folder / "manifest.json").read_text()), "finished": False}))
    assert CliRunner().invoke(main, line).stdout == found.stdout
    assert (folder / "routers" / "routers.safetensors").read_bytes() == weights
    monkeypatch.setattr(routing, "_train", None)
    assert CliRunner().invoke(main, line).stdout == found.stdout
    assert CliRunner().invoke(main, [*line, "--epochs", "4"]).exit_code == 2


def test_a_training_that_is_killed_goes_on(model: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerprune.route import train as training

    options: dict[str, Any] = {"epochs": 4, "held_out": 0.3, "device": "cpu", "say": silent}
    train_routing(searched, out=tmp_path / "whole", **options)
    real, left = training._save, [2]

    def killed(*args: Any) -> None:
        real(*args)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        train_routing(searched, out=tmp_path / "killed", **options)
    train_routing(searched, out=tmp_path / "killed", **options)
    assert left[0] == -2, "two epochs before, two after"
    for name in ("train.json", "routers/routers.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "tested"], "task tested has no training documents: use --split test, and measure on other items, or give"),
        (["--tasks", "chosen", "--split", "validation"], "task chosen has no validation documents: use --split train or --split"),
        (["--tasks", "choosen"], "lm-eval knows no task choosen"),
        (["--tasks", "chosen", "--items", "x.jsonl"], "both are given"),
        ([], "neither is given"),
        (["--items", "no-such.jsonl"], "no-such.jsonl does not exist"),
        (["--items", "ITEMS", "--split", "train"], "--split is for --tasks"),
        (["--items", "BARE"], "line 1 of"),
        (["--tasks", "chosen", "--jobs", "0"], "--jobs 0"),
        (["--tasks", "chosen", "--limit", "0"], "--limit 0"),
        (["--tasks", "chosen", "--simulations", "0"], "0 simulations"),
        (["--tasks", "chosen", "--dtype", "int3"], "--dtype int3"),
    ],
)
def test_what_cannot_be_searched(
    options: list[str], words: str, model: Path, tasks: Path, items_file: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "no answer and no options"}\n')
    named = {"ITEMS": str(items_file), "BARE": str(bare)}
    line = ["route", "search", "--model", str(model), *(named.get(option, option) for option in options)]
    if "--tasks" in options:
        line += ["--task-folder", str(tasks)]
    found = CliRunner().invoke(main, [*line, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert found.exit_code in (1, 2) and found.stdout == ""
    assert words in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_on(
    model: Path, searched: Path, items_file: Path, build_llama: Callable[..., Path], tmp_path: Path
) -> None:
    def said(folder: Path, **options: Any) -> str:
        with pytest.raises(LayerpruneError) as error:
            train_routing(folder, out=tmp_path / "out", device="cpu", say=silent, **options)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "is not the folder of a search" in said(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({"inputs": {"kind": "depth"}, "finished": True}))
    assert "is not the folder of a search" in said(tmp_path / "other")
    assert "--held-out 1.5 is not a share" in said(searched, held_out=1.5)
    other = build_llama(tmp_path / "model", layers=4, hidden=32)
    assert "was made on another checkpoint" in said(searched, model=other)
    assert "epochs" in said(searched, epochs=0)
    search_routing(
        model, items=items_file, limit=1, simulations=1, stop_shorter=None, out=tmp_path / "one", device="cpu", say=silent
    )
    assert "items with something to learn" in said(tmp_path / "one")
    routers = tmp_path / "routers"
    train_routing(searched, out=routers, epochs=1, device="cpu", say=silent)
    with pytest.raises(Refused, match="trained for another checkpoint"):
        load_routers(routers / "routers", other)


def test_records_are_counted_as_they_come(tmp_path: Path) -> None:
    part = tmp_path / "part.jsonl"
    read = {part: 0}
    assert route_jobs._new_records(part, read) == 0
    told = []
    for text in ('{"head"', ": 1}\n", '{"a": 1}\n{"a": 2}\n{"a"', "", ": 3}\n"):
        with open(part, "a") as file:
            file.write(text)
        told.append(route_jobs._new_records(part, read))
    assert told == [0, 0, 2, 0, 1]


def test_a_gpu_is_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    from layerprune.model import load

    monkeypatch.setattr(load, "pick_device", lambda device: "cuda")
    monkeypatch.setattr(route_jobs, "visible_gpus", lambda: ["3", "5"])
    monkeypatch.setattr(route_jobs, "cores", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    slots = route_jobs._slots(None, 3)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["3", "5", "3"]
    assert {slot["OMP_NUM_THREADS"] for slot in slots} == {"3"}
    assert "OMP_NUM_THREADS" not in os.environ
