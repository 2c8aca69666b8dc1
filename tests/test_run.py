"""`layerprune run` from end to end on a tiny model: its folder, its resume after SIGKILL, its refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from layerprune.model.errors import UsageError
from layerprune.runfolder import MANIFEST, open_run


@pytest.fixture(scope="module")
def inputs(run_inputs: Path) -> Path:
    return run_inputs


def command(inputs: Path, out: Path, *more: str) -> list[str]:
    options = {
        "--model": inputs / "model", "--drop": "0.375", "--calibration": inputs / "calibration.jsonl",
        "--heal-data": inputs / "heal.jsonl", "--eval-data": inputs / "loss.jsonl", "--task-folder": inputs / "tasks",
        "--tasks": "tiny", "--heal-steps": "8", "--length": "32", "--curve": "0.25,0.5", "--out": out, "--device": "cpu",
    }  # fmt: skip
    parts = [str(part) for pair in options.items() for part in pair]
    return [sys.executable, "-m", "layerprune", "run", *parts, *more]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run(inputs: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(inputs, out, *more), capture_output=True, text=True, env=ENVIRONMENT)


def kill_at(inputs: Path, out: Path, words: str) -> None:
    """Start the run, and kill it the moment that its progress shows `words`."""
    process = subprocess.Popen(command(inputs, out), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    assert process.stderr is not None
    seen = b""
    while words.encode() not in seen:
        byte = process.stderr.read1(4096)
        assert byte, f"the run ended before {words!r}: {seen.decode()}"
        seen += byte
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


TIMINGS = {"seconds", "speed", "tokens_per_second", "done", "losses_seconds", "tokens_per_second_training"}


def results(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, timings aside; between its ends the held-out curve has the points that time allowed."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json" and path.is_file():
            found[name] = without_timings(json.loads(path.read_text().replace(str(folder), "FOLDER")))
        elif path.suffix in (".safetensors", ".svg") and name != "figures/healing.svg":
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        ends = {k: v[:1] + v[-1:] for k, v in value.items() if k == "held_out" and isinstance(v, list)}
        return {k: without_timings(v) for k, v in {**value, **ends}.items() if k not in TIMINGS}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    found = run(inputs, out)
    assert found.returncode == 0, found.stderr
    assert "after healing" in found.stdout and str(out / "healed") in found.stdout
    return out


def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    promised = {"manifest.json", "rank.json", "pruned", "healed", "adapter", "eval.json", "curve.json", "figures"}
    promised |= {"curve.csv", "items.json", "collapse.json", "report.html"}
    assert names == promised
    result = json.loads((undisturbed / MANIFEST).read_text())["result"]
    assert [row["model"] for row in result["rows"]] == ["whole", "pruned", "healed"]
    assert [row["layers"] for row in result["rows"]] == [8, 5, 5]
    curve = json.loads((undisturbed / "curve.json").read_text())
    assert [(row["n"], row["healed"]) for row in curve["rows"]] == [(0, False), (2, False), (3, False), (3, True), (4, False)]
    for row in curve["rows"]:
        assert 0 < row["loss"] < 3 and 0 <= row["tasks"]["tiny/acc"]["value"] <= 1
        assert len(row["kept"]) == 8 - row["n"]


def test_the_checkpoint_is_served_by_plain_transformers(undisturbed: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(undisturbed / "healed")
    model, info = AutoModelForCausalLM.from_pretrained(undisturbed / "healed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = tokenizer("the salt mill", return_tensors="pt")
    cached = model.generate(**ids, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(**ids, max_new_tokens=8, do_sample=False, use_cache=False))


def test_the_same_command_again_does_nothing(inputs: Path, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    found = run(inputs, undisturbed)
    assert found.returncode == 0 and "after healing" in found.stdout
    after = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    before.pop(undisturbed, None), after.pop(undisturbed, None)
    assert before == after
    as_json = json.loads(run(inputs, undisturbed, "--json").stdout)
    assert as_json["checkpoint"] == str(undisturbed / "healed")


def test_another_share_to_keep_is_answered_from_what_was_measured(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    found = run(inputs, out, "--keep", "0.5")
    assert found.returncode == 0, found.stderr
    changed = {name for name, value in results(out).items() if value != results(undisturbed)[name]}
    assert {"collapse.json", "manifest.json"} <= changed and not changed & {"curve.json", "eval.json", "rank.json"}
    assert json.loads((out / "collapse.json").read_text())["keep"] == 0.5
    assert "50 %" in (out / "report.html").read_text()


def test_other_inputs_are_refused(inputs: Path, undisturbed: Path) -> None:
    found = run(inputs, undisturbed, "--seed", "1")
    assert found.returncode == 2
    assert "seed was 0, now 1" in found.stderr and "Traceback" not in found.stderr


def test_a_run_killed_in_every_phase_ends_with_the_same_results(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    for words in ("ranking all blocks", "evaluating the whole model", "cutting the block out", "healing", "evaluating pruned"):
        kill_at(inputs, out, words)
        assert not (out / "figures").exists()
    found = run(inputs, out)
    assert found.returncode == 0, found.stderr
    assert "ranking all blocks" not in found.stderr and "healing" not in found.stderr.replace("after healing", "")
    expected, ours = results(undisturbed), results(out)
    assert expected.keys() == ours.keys()
    different = [name for name in expected if expected[name] != ours[name]]
    assert not different


def test_one_process_at_a_time(tmp_path: Path) -> None:
    from layerprune.model.errors import Refused

    out = tmp_path / "run"
    with open_run(out, {"a": 1}), pytest.raises(Refused, match="another process"), open_run(out, {"a": 1}):
        pass
    with open_run(out, {"a": 1}) as again:
        assert not again.finished


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists already"), open_run(tmp_path, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_recipes_own_values_given_by_hand_are_the_same_run() -> None:
    from layerprune.runplan import plan_run

    plain = plan_run("demo", 0.4).inputs()
    assert plain["heal"]["steps"] == 80 and plan_run("demo", 0.4, heal_steps=80, limit=500).inputs() == plain
    assert plan_run("demo", 0.4, heal_steps=81).inputs() != plain
