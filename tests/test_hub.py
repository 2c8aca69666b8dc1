"""The user's own command, against a local Hub cache and without a network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LAYERS = 80
COMMIT = "a" * 40
HUB_ID = "meta-llama/Llama-2-70b-hf"
ARTEFACTS = (
    "manifest.json", "rank.json", "pruned/config.json", "pruned/layerprune.json", "pruned/model.safetensors.index.json",
    "healed/config.json", "healed/layerprune.json", "healed/tokenizer.json", "adapter/adapter_model.safetensors",
    "eval.json", "curve.json", "figures/curve.png", "figures/loss.png",
)  # fmt: skip


def fill_cache(home: Path, hub_id: str, checkpoint: Path) -> None:
    """Put a checkpoint into a Hub cache as a download does: blobs by their hash, links to them, a ref to the commit."""
    folder = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot, blobs = folder / "snapshots" / COMMIT, folder / "blobs"
    for path in (snapshot, blobs, folder / "refs"):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for file in checkpoint.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path], prose: list[str]) -> Path:
    """A folder with `hf`, a filled HF_HOME, data files and a folder with one task."""
    root = tmp_path_factory.mktemp("hub")
    checkpoint = build_llama(root / "checkpoint", layers=LAYERS, shard="3MB", initializer_range=0.05)
    assert len(list(checkpoint.glob("model-*.safetensors"))) >= 3
    fill_cache(root / "hf", HUB_ID, checkpoint)
    shutil.rmtree(checkpoint)
    for number, name in enumerate(("calibration", "healing", "evaluation")):
        texts = prose[20 * number : 20 * number + 20]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    items = [{"query": f"The tower {i} is", "choices": ["tall", "lost"], "gold": i % 2} for i in range(8)]
    (root / "tasks").mkdir()
    (root / "tasks" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (root / "tasks" / "towers.yaml").write_text(
        "task: towers\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {root / 'tasks' / 'items.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    return root


def offline(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, without a network, with the cache of `place` as the only one."""
    hidden = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "LAYERPRUNE_", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    environment |= {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=300)


THE_COMMAND = (
    "run", "--model", "llama-2-70b", "--drop", "0.4",
    "--calibration", "calibration.jsonl", "--heal-data", "healing.jsonl", "--eval-data", "evaluation.jsonl",
    "--task-folder", "tasks", "--tasks", "towers", "--limit", "4", "--samples", "4", "--length", "16", "--heal-steps", "2",
    "--curve", "0.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def first(place: Path) -> subprocess.CompletedProcess[str]:
    return offline(place, "-m", "layerprune", *THE_COMMAND)


def run_folder(place: Path) -> Path:
    return place / "runs" / "llama-2-70b-angular-0.4"


def test_the_command_ends_well_and_leaves_what_it_promises(place: Path, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stderr
    folder = run_folder(place)
    assert [name for name in ARTEFACTS if not (folder / name).is_file()] == []
    assert not [path for path in place.rglob("*") if "partial" in path.name or path.name in (".work", ".lock")]
    assert "32 of 80 layers dropped" in first.stdout and "towers" in first.stdout


def test_the_block_has_32_layers_and_is_the_closest(place: Path, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stderr
    ranking = json.loads((run_folder(place) / "rank.json").read_text())
    card = json.loads((run_folder(place) / "healed" / "layerprune.json").read_text())
    start, stop = card["block"]
    row = ranking["distance"][31]
    assert stop - start == 32 and row[start] == min(row) and len(row) == LAYERS - 32 + 1
    assert card["kept"] == [*range(start), *range(stop, LAYERS)]
    assert (card["hub_id"], card["recipe"], card["strategy"]) == (HUB_ID, "llama-2-70b", "angular")
    adapter = json.loads((run_folder(place) / "adapter" / "adapter_config.json").read_text())
    # the recipe's own setting for this model, from the paper
    assert adapter["r"] == 8 and json.loads((run_folder(place) / "manifest.json").read_text())["finished"] is True


@pytest.mark.parametrize("name", ["pruned", "healed"])
def test_the_written_checkpoint_loads_and_is_shallower(
    name: str, place: Path, first: subprocess.CompletedProcess[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert first.returncode == 0, first.stderr
    folder = run_folder(place) / name
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.num_hidden_layers == len(model.model.layers) == LAYERS - 32
    ids = AutoTokenizer.from_pretrained(folder)("the river", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


def test_the_same_command_prints_the_same_and_changes_nothing(place: Path, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stderr

    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in run_folder(place).rglob("*") if p.is_file()}

    before = state()
    again = offline(place, "-m", "layerprune", *THE_COMMAND)
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert state() == before
    assert "finished" in again.stderr


REFUSED = {
    "a recipe's model that was never downloaded": (
        ["run", "--model", "llama-2-13b", "--drop", "0.4"],
        ["meta-llama/Llama-2-13b-hf is not in the local Hub cache", "HF_HUB_OFFLINE", "hf download"],
    ),
    "an unknown Hub id": (
        ["rank", "--model", "nobody/nothing"],
        ["nobody/nothing is not in the local Hub cache", "HF_HUB_OFFLINE", "local folder"],
    ),
    "c4 for healing": (
        ["run", "--model", "llama-2-70b", "--drop", "0.4", "--length", "16"],
        ["--heal-data c4: en/c4-train.", "HF_HUB_OFFLINE", "--heal-data FILE"],
    ),
    "c4 for ranking": (
        ["run", "--model", HUB_ID, "--drop", "0.4", "--length", "16", "--no-heal"],
        ["--calibration c4: en/c4-validation.", "HF_HUB_OFFLINE", "--calibration FILE"],
    ),
    "c4 for ranking alone": (["rank", "--model", HUB_ID, "--length", "16"], ["--calibration c4", "HF_HUB_OFFLINE"]),
    "c4 for the loss": (["eval", "--model", HUB_ID, "--length", "16"], ["--eval-data c4", "HF_HUB_OFFLINE"]),
    "c4 for healing alone": (["heal", "--model", HUB_ID, "--length", "16"], ["--heal-data c4", "HF_HUB_OFFLINE"]),
}
ALL_REFUSED = """
import json, sys
from click.testing import CliRunner
from layerprune.cli import main
made = {name: CliRunner().invoke(main, line) for name, line in json.loads(sys.argv[1]).items()}
print(json.dumps({name: [m.exit_code, m.stdout, m.stderr, repr(m.exception)] for name, m in made.items()}))
"""


@pytest.fixture(scope="module")
def refusals(place: Path) -> dict[str, tuple[int, str, str, str]]:
    lines = {name: [*line, "--out", "refused"] for name, (line, _) in REFUSED.items()}
    done = offline(place, "-c", ALL_REFUSED, json.dumps(lines))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_in_the_cache_is_refused_in_one_sentence(
    what: str, place: Path, refusals: dict[str, tuple[int, str, str, str]]
) -> None:
    code, stdout, stderr, exception = refusals[what]
    assert (code, stdout, exception) == (1, "", "SystemExit(1)"), stderr
    assert stderr.startswith("Error: ") and stderr.count("\n") == 1, stderr
    assert [word for word in REFUSED[what][1] if word not in stderr] == [], stderr
    assert not (place / "refused").exists()
