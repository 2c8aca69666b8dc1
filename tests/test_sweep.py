"""`layerprune sweep` and `layerprune find` from end to end on a tiny model: their folders, what they reuse, their refusals."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from layerprune import curve as curve_of
from layerprune import sweeping
from layerprune.eval.evaluate import evaluate_checkpoint
from layerprune.model.errors import Refused, UsageError
from layerprune.model.fingerprint import folder_fingerprint
from layerprune.prune.cut import prune_checkpoint
from layerprune.search import find, most_tests, search
from layerprune.sweeping import parse_drops, sweep

torch.set_num_threads(1)


def settings(inputs: Path) -> dict[str, Any]:
    return {
        "calibration": str(inputs / "calibration.jsonl"), "eval_data": str(inputs / "loss.jsonl"), "length": 32, "device": "cpu",
        "task_folder": inputs / "tasks", "tasks": ["tiny"], "heal_data": str(inputs / "heal.jsonl"), "heal_steps": 3,
        "say": lambda line: None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def swept(run_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "whole"
    sweep(run_inputs / "model", heal=[0.375], out=out, **settings(run_inputs))
    return out


def rows_of(folder: Path) -> dict[tuple[str, int, bool], dict[str, Any]]:
    rows = json.loads((folder / "curve.json").read_text())["rows"]
    return {(row["strategy"], row["n"], row["healed"]): row for row in rows}


def test_a_sweep_leaves_what_it_promises(swept: Path) -> None:
    names = {path.name for path in swept.iterdir()}
    files = {"manifest.json", "rank.json", "curve.json", "curve.csv", "items.json", "collapse.json", "report.html"}
    assert names == files | {"answers", "heal", "figures"}
    rows = rows_of(swept)
    depths = [(s, n, False) for s in ("angular", "last") for n in range(1, 8)]
    assert set(rows) == {("angular", 0, False), *depths, ("angular", 3, True), ("last", 3, True)}
    for (_, n, _), row in rows.items():
        assert row["fraction"] == n / 8 and len(row["kept"]) == 8 - n and 0 < row["loss"] < 3
        assert 0 <= row["tasks"]["tiny/acc"]["low"] <= row["tasks"]["tiny/acc"]["value"] <= row["tasks"]["tiny/acc"]["high"] <= 1
        assert row["tasks"]["tiny/acc"]["chance"] == pytest.approx(1 / 3)
    assert rows["last", 3, False]["kept"] == [0, 1, 2, 3, 7]
    for name in ("angular-3", "last-3"):
        assert {path.name for path in (swept / "heal" / name).iterdir()} == {"healed", "adapter", "eval.json"}


def test_the_table_for_other_programs(swept: Path) -> None:
    with open(swept / "curve.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["strategy", "n", "healed", "kept", "fraction", "loss", "tiny/acc"]
    rows = rows_of(swept)
    assert len(table) == len(rows)
    for line in table:
        row = rows[line["strategy"], int(line["n"]), line["healed"] == "1"]
        assert float(line["loss"]) == pytest.approx(row["loss"], rel=1e-7)
        assert float(line["tiny/acc"]) == pytest.approx(row["tasks"]["tiny/acc"]["value"])
        ends = [tuple(map(int, (part + "-" + part).split("-")[:2])) for part in line["kept"].split()]
        assert [i for a, b in ends for i in range(a, b + 1)] == row["kept"]


@pytest.mark.parametrize(("strategy", "n"), [("last", 2), ("angular", 5)])
def test_a_depth_is_what_the_written_checkpoint_measures(
    strategy: str, n: int, swept: Path, run_inputs: Path, tmp_path: Path
) -> None:
    ranking = json.loads((swept / "rank.json").read_text())
    given = {"drop": n / 8, "strategy": strategy, "ranking": ranking if strategy == "angular" else None}
    prune_checkpoint(run_inputs / "model", tmp_path / "cut", say=lambda line: None, **given)
    alone = evaluate_checkpoint(
        tmp_path / "cut", tasks=["tiny"], task_folder=run_inputs / "tasks", data=str(run_inputs / "loss.jsonl"), length=32,
        device="cpu", items=True,
    )  # fmt: skip
    row = rows_of(swept)[strategy, n, False]
    assert row["loss"] == pytest.approx(alone["loss"]["normalised"], abs=1e-6)
    items = {(r["strategy"], r["n"], r["healed"]): r["items"] for r in json.loads((swept / "items.json").read_text())}
    assert items[strategy, n, False]["tiny/acc"] == "".join(map(str, alone["tasks"]["correct"]["tiny"]))


def test_a_longer_sweep_reuses_what_is_there(swept: Path, run_inputs: Path, tmp_path: Path) -> None:
    """In steps: a few depths of one strategy, the other strategy, the rest, the healing. The result is that of one call."""
    out = tmp_path / "steps"
    more = settings(run_inputs)
    sweep(run_inputs / "model", strategies=["last"], drops="0.25,0.5", out=out, **more)
    assert set(rows_of(out)) == {("last", 0, False), ("last", 2, False), ("last", 4, False)}
    sweep(run_inputs / "model", strategies=["angular"], drops=[0.5], out=out, **more)
    assert {(s, n) for s, n, _ in rows_of(out)} == {("angular", 0), *((s, n) for s in ("angular", "last") for n in (2, 4))}
    shutil.copytree(swept / "heal", out / "heal")  # healed as this sweep would
    lines: list[str] = []
    found = sweep(run_inputs / "model", heal=[0.375], out=out, **{**more, "say": lines.append})
    assert rows_of(out) == rows_of(swept)
    assert (out / "collapse.json").read_bytes() == (swept / "collapse.json").read_bytes()
    assert not any("healing the cut" in line for line in lines)
    again = sweep(run_inputs / "model", strategies=["last"], drops="0.25", heal=[0.375], out=out, **{**more, "say": lines.append})
    assert "finished" in lines[-1] and again == found
    with pytest.raises(UsageError, match="healed with other settings"):
        sweep(run_inputs / "model", heal=[0.5], out=out, **{**more, "heal_steps": 4})
    with pytest.raises(UsageError, match="other inputs.*seed was 0, now 1"):
        sweep(run_inputs / "model", out=out, seed=1, **more)


def test_what_is_refused_at_once_leaves_the_folder_as_it_was(swept: Path, run_inputs: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(swept, tmp_path / "copy"))
    before = (out / "manifest.json").read_bytes()
    none = str(tmp_path / "none.jsonl")
    for wrong in ({"tasks": ["tinyy"]}, {"heal": [0.5], "heal_steps": 0}, {"heal": [0.5], "heal_data": none}):
        with pytest.raises((UsageError, Refused)):
            sweep(run_inputs / "model", out=out, **{**settings(run_inputs), **wrong})
        assert (out / "manifest.json").read_bytes() == before
    lines: list[str] = []
    sweep(run_inputs / "model", out=out, **{**settings(run_inputs), "say": lines.append})  # without --heal: what is healed stays
    assert "finished" in lines[-1]


def test_a_task_that_comes_later_reaches_the_healed_cuts(swept: Path, run_inputs: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(swept, tmp_path / "copy"))
    tasks = tmp_path / "tasks"
    shutil.copytree(run_inputs / "tasks", tasks)
    task = (tasks / "tiny.yaml").read_text()
    more = {**settings(run_inputs), "task_folder": tasks}
    task = task.replace("task: tiny", "task: second").replace("doc_to_target: gold", "doc_to_target: 0")
    (tasks / "second.yaml").write_text(task)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["inputs"]["task_folder"] = folder_fingerprint(tasks)  # as if the folder had held both from the start
    (out / "manifest.json").write_text(json.dumps(manifest))
    sweep(run_inputs / "model", out=out, **{**more, "tasks": ["second"]})
    rows = rows_of(out)
    assert all(set(row["tasks"]) == {"tiny/acc", "second/acc"} for row in rows.values())
    old = rows_of(swept)
    assert all(row["tasks"]["tiny/acc"] == old[key]["tasks"]["tiny/acc"] for key, row in rows.items())


def test_a_killed_extension_leaves_no_page_of_less(
    swept: Path, run_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, more = tmp_path / "out", settings(run_inputs)
    sweep(run_inputs / "model", drops="0.5", out=out, **more)

    def killed(folder: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweeping, "write_report", killed)
        sweep(run_inputs / "model", out=out, **more)
    assert not (out / "report.html").exists()
    sweep(run_inputs / "model", heal=[], out=out, **more)
    unhealed = {key: row for key, row in rows_of(swept).items() if not key[2]}
    assert rows_of(out) == unhealed and (out / "report.html").exists()


def test_a_cut_that_cannot_be_written_is_not_recommended(swept: Path) -> None:
    rows = curve_of.read_rows(swept)
    for row in rows:  # as good as the whole model, at every depth
        row["items"] = {"tiny/acc": "1" * 200}
    assert curve_of.collapse(8, rows, 0.9)["verdict"]["n"] == 7
    some = [{**row, "writable": row["n"] not in (6, 7) and not row["healed"]} for row in rows]
    found = curve_of.collapse(8, some, 0.9)
    assert found["verdict"]["n"] == found["verdict"]["likely"] == 5 and "cannot be had" in found["verdict"]["why"]


def test_a_model_of_one_layer(build_llama: Any, run_inputs: Path, tmp_path: Path) -> None:
    build_llama(tmp_path / "one", layers=1)
    with pytest.raises(UsageError, match="one layer"):
        sweep(tmp_path / "one", out=tmp_path / "out", **settings(run_inputs))
    assert not (tmp_path / "out").exists()


def test_a_healed_checkpoint_that_is_gone_is_made_again(swept: Path, run_inputs: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(swept, tmp_path / "copy"))
    weights = "heal/last-3/healed/model.safetensors"
    before = (out / weights).read_bytes()
    shutil.rmtree(out / "heal/last-3/healed")
    sweep(run_inputs / "model", out=out, **settings(run_inputs))  # without --heal its measurement counts
    assert rows_of(out) == rows_of(swept) and not (out / weights).exists()
    sweep(run_inputs / "model", heal=[0.375], out=out, **settings(run_inputs))
    assert (out / weights).read_bytes() == before and rows_of(out) == rows_of(swept)
    page = (out / "report.html").read_text()
    assert "heal/angular-3/healed" in page or "layerprune prune" in page


@pytest.mark.parametrize(
    ("text", "depths"),
    [
        (None, [1, 2, 3, 4, 5, 6, 7]), ("0:1", [1, 2, 3, 4, 5, 6, 7]), ("0:0.5", [1, 2, 3, 4]), ("0.5", [4]),
        ("0.1, 0.75:0.9", [1, 6, 7]), ([0.25, 0.3], [2]),
    ],
)  # fmt: skip
def test_depths(text: Any, depths: list[int]) -> None:
    assert list(parse_drops(text, 8)) == depths


@pytest.mark.parametrize("text", ["", "x", "0.5:0.1", "-0.1:0.5", "0.1:1.5", "0.01", "0.01:0.02", "1", "nan", "0:nan"])
def test_depths_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--drop"):
        parse_drops(text, 8)


def test_a_verdict_looks_at_all_series() -> None:
    def advice(n: int, likely: int) -> dict[str, Any]:
        return {"recommendation": {"n": n, "likely": likely, "status": "cut"}}

    found = {"layers": 10, "series": {"angular": advice(0, 1), "last": advice(0, 3), "last healed": advice(0, 3)}}
    assert curve_of.verdict(found)["series"] == "last"  # type: ignore
    found["series"]["angular healed"] = advice(2, 2)  # type: ignore
    assert curve_of.verdict(found)["series"] == "angular healed"  # type: ignore


def monotone(cliff: int) -> Any:
    return lambda n: n <= cliff


@pytest.mark.parametrize("layers", [2, 3, 8, 24, 32, 80, 126])
def test_the_search_finds_the_first_failure_with_few_tests(layers: int) -> None:
    rng = random.Random(layers)
    for cliff in range(layers):
        asked: list[int] = []

        def passes(n: int, cliff: int = cliff, asked: list[int] = asked) -> bool:
            asked.append(n)
            return n <= cliff

        found = search(layers, rng.randint(1, layers), rng.randint(1, layers), passes)
        assert found.n == cliff, found
        assert len(asked) == len(set(asked)) <= most_tests(layers)
        assert [n for n, _ in found.tested] == asked and all(1 <= n < layers for n in asked)
        assert cliff < 2 or (cliff - 1, True) in found.tested  # the neighbour below


def test_a_good_guess_needs_few_tests() -> None:
    found = search(80, 30, 33, monotone(31))
    assert found.n == 31 and len(found.tested) <= 5
    assert math.log2(80) < most_tests(80) < 25


def test_a_curve_that_recovers_is_not_believed() -> None:
    bad = {10, 11}
    found = search(32, 12, 20, lambda n: n <= 14 and n not in bad)
    assert found.n in range(1, 15) and found.n not in bad
    found = search(32, 12, 14, lambda n: n <= 12 and n != 11)
    assert found.n < 11 and "not monotone" in found.why


def test_finding_a_cut(run_inputs: Path, tmp_path: Path) -> None:
    """A model that knows nothing has nothing to keep; one that is made to know its answers is searched, and resumed."""
    teach(run_inputs, tmp_path)
    lines: list[str] = []
    held: list[int] = []

    def say(line: str) -> None:
        lines.append(line)
        if "healed: " in line:  # a depth was measured
            held.append(len(list((tmp_path / "found" / "heal").glob("*/healed"))))

    more = {**settings(run_inputs), "task_folder": tmp_path / "tasks", "say": say}
    found = find(tmp_path / "model", keep=0.5, strategy="last", out=tmp_path / "found", **more)
    text = "\n".join(lines)
    assert "cuts will be healed, at most" in text and "look at n =" in text
    assert found["why"] and found["tested"]
    assert found["n"] > 0 and {n: passed for n, passed, _ in found["tested"]}[found["n"]]
    healed = {path.name for path in (tmp_path / "found" / "heal").iterdir() if (path / "healed").exists()}
    assert healed == {f"last-{found['n']}"} and max(held) <= 2
    page = (tmp_path / "found" / "report.html").read_text()
    assert "layerprune find --model" in page and f"Drop {found['n']} of 8 layers" in page and f"last-{found['n']}/healed" in page
    assert json.loads((tmp_path / "found" / "collapse.json").read_text())["verdict"]["series"] == "last healed"
    (tmp_path / "found" / "manifest.json").write_text(
        json.dumps({**json.loads((tmp_path / "found" / "manifest.json").read_text()), "finished": False})
    )
    lines.clear()
    resumed = find(tmp_path / "model", keep=0.5, strategy="last", out=tmp_path / "found", **more)
    assert resumed == found and not any(line.startswith("healing the cut") for line in lines)
    lines.clear()
    again = find(tmp_path / "model", keep=0.5, strategy="last", out=tmp_path / "found", **more)
    assert again == found and "finished" in lines[-1]
    with pytest.raises(UsageError, match="keep was 0.5, now 0.9"):
        find(tmp_path / "model", keep=0.9, strategy="last", out=tmp_path / "found", **more)
    with pytest.raises(UsageError, match="--keep 0 "):
        find(tmp_path / "model", keep=0, out=tmp_path / "other", **more)


def teach(inputs: Path, place: Path) -> None:
    """The tiny model, and its own task with the answers that the model prefers as gold, so that it is far above chance."""
    shutil.copytree(inputs / "model", place / "model")
    shutil.copytree(inputs / "tasks", place / "tasks")
    rng = random.Random(3)
    words = "the a salt mill river goes to by over and stone town lamp bird low high walks sings sees under".split()
    many = [{"question": " ".join(rng.choices(words, k=5)), "choices": rng.sample(words, 3), "gold": 0} for _ in range(60)]
    items = place / "tasks" / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in many))
    task = place / "tasks" / "tiny.yaml"
    task.write_text(task.read_text().replace(str(inputs / "tasks" / "items.jsonl"), str(items)))
    found = {}
    for gold in range(3):
        items.write_text("".join(json.dumps({**item, "gold": gold}) + "\n" for item in many))
        found[gold] = evaluate_checkpoint(
            place / "model", tasks=["tiny"], task_folder=place / "tasks", loss=False, device="cpu", items=True
        )["tasks"]["correct"]["tiny"]
    golds = [next(g for g in range(3) if found[g][i]) for i in range(60)]
    items.write_text("".join(json.dumps({**item, "gold": g}) + "\n" for item, g in zip(many, golds, strict=True)))
