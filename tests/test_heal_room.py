"""No room for a file in the middle of a healing: one sentence, the last good state kept, and the same command goes on.

The room is a limit on the size of files (RLIMIT_FSIZE), which every writer meets where it writes: numpy, safetensors, torch.save,
the shards' own copying.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from layerprune.model.errors import Refused
from layerprune.model.files import new_folder, no_space_refusal

_HEALINGS = """
import json, os, resource, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
import accelerate, bitsandbytes, peft, transformers.models.llama.modeling_llama
from layerprune.cli import main
from layerprune.heal import trainer, watch

watch.SAVE_SECONDS = 0.0
root, arguments = Path(sys.argv[1]), sys.argv[2:]

def limit(kilobytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, resource.RLIM_INFINITY))

def later(kilobytes, step):
    train = trainer.Trainer.training_step
    def limited(self, *args, **kwargs):
        if self.state.global_step == step:
            limit(kilobytes)
        return train(self, *args, **kwargs)
    trainer.Trainer.training_step = limited

def heal(name, number, before):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for fd, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(root / f"{name}.{number}.{kind}", os.O_CREAT | os.O_WRONLY, 0o600), fd)
    status = 70
    try:
        before()
        main([*arguments, "--out", str(root / name / "model")])
    except SystemExit as error:
        status = error.code
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

def left(name):
    return sorted(str(p.relative_to(root / name)) for p in (root / name).rglob("*")) if (root / name).exists() else []

phases = {
    "undisturbed": lambda: None,
    "the tokens": lambda: limit(1),
    "the adapter in the first checkpoint": lambda: limit(200),
    "the optimizer in the first checkpoint": lambda: limit(400),
    "a later checkpoint": lambda: later(200, 3),
    "the merged checkpoint": lambda: limit(800),
}
found = {}
for name, before in phases.items():
    code = heal(name, 1, before)
    found[name] = {"code": code, "left": left(name)}
    if code:
        found[name]["again"] = heal(name, 2, lambda: None)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def healings(tmp_path_factory: pytest.TempPathFactory, prose: list[str]) -> tuple[Path, dict[str, Any]]:
    """Healings with too little room for one file or another, and once more with enough."""
    from conftest import make_llama

    root = tmp_path_factory.mktemp("room")
    model = make_llama(root / "base", layers=2, hidden=128, intermediate_size=256, max_position_embeddings=128)
    data = root / "train.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    assert (model / "model.safetensors").stat().st_size > 900 << 10
    settings = {
        "--model": model, "--heal-data": data, "--heal-steps": 5, "--batch-size": 2, "--length": 64, "--lora-rank": 32,
        "--device": "cpu",
    }  # fmt: skip
    arguments = ["heal", *(str(part) for pair in settings.items() for part in pair)]
    done = subprocess.run(
        [sys.executable, "-c", _HEALINGS, root, *arguments],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return root, json.loads(done.stdout.splitlines()[-1])


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "layerprune.json"  # it holds times
    }


def errors_of(root: Path, name: str) -> list[str]:
    said = (root / f"{name}.1.err").read_text().replace("\r", "\n")
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("Error: ")]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("the tokens", "a file grows larger than is allowed here"),
        ("the adapter in the first checkpoint", "a file grows larger than is allowed here"),
        ("the optimizer in the first checkpoint", "a file broke off as it was written"),
    ],
)
def test_before_a_step_is_saved_nothing_is_left(healings: tuple[Path, dict[str, Any]], name: str, why: str) -> None:
    root, found = healings
    (line,) = errors_of(root, name)
    assert found[name]["code"] == 1 and line.startswith(f"Error: {why}"), line
    assert line.endswith(f"could not write {root / name / 'model'}; nothing was left there")
    assert not found[name]["left"]


def test_after_that_the_last_saved_step_stays(healings: tuple[Path, dict[str, Any]]) -> None:
    root, found = healings
    name = "a later checkpoint"
    (line,) = errors_of(root, name)
    assert found[name]["code"] == 1
    assert f"; step 3 stays in {root / name / '.model.work'}: make room and give the same command again" in line
    assert ".model.work/checkpoint-3/whole.json" in found[name]["left"]
    assert not any("checkpoint-4" in path for path in found[name]["left"]), "what was cut short takes no room"
    assert "going on from step 3 of 5" in (root / f"{name}.2.err").read_text()


def test_a_trained_adapter_stays_where_its_result_has_no_room(healings: tuple[Path, dict[str, Any]]) -> None:
    root, found = healings
    name = "the merged checkpoint"
    (line,) = errors_of(root, name)
    assert found[name]["code"] == 1 and f"; the trained adapter stays in {root / name / '.model.work'}" in line
    assert all(path.startswith(".model.work") for path in found[name]["left"])
    assert "trainable" not in (root / f"{name}.2.err").read_text(), "training is not done again"


def test_with_room_the_same_command_ends_with_the_same_bytes(healings: tuple[Path, dict[str, Any]]) -> None:
    root, found = healings
    expected = digest(root / "undisturbed")
    assert found["undisturbed"]["code"] == 0 and "model/model.safetensors" in expected
    assert len(found) == 6
    for name, one in found.items():
        assert one.get("again", 0) == 0, (name, (root / f"{name}.2.err").read_text()[-2000:])
        assert digest(root / name) == expected, name


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (OSError(errno.EDQUOT, "x"), "the disk is full"),
        (OSError(errno.EFBIG, "x"), "a file grows larger than is allowed here .ulimit -f"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (SafetensorError("I/O error: File too large (os error 27)"), "a file grows larger than is allowed here"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "a file broke off"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"), "a file broke off"),
    ],
)
def test_each_writers_own_words_become_one_sentence(error: Exception, why: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=f"^{why}.*: could not write {tmp_path}; much stays$"), \
            no_space_refusal(tmp_path, lambda: "much stays"):  # fmt: skip
        raise error
    with pytest.raises(Refused, match=f"^{why}.*: could not write {tmp_path / 'out'}; nothing was left there$"), \
            new_folder(tmp_path / "out") as made:  # fmt: skip
        (made / "some").touch()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes do not fit"), OSError(errno.EIO, "x"), Refused("no"), ValueError("x")):
        with pytest.raises(type(error)) as told, no_space_refusal(tmp_path):
            raise error
        assert told.value is error
