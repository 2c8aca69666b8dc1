"""Healing by two processes on one CPU: what one process at the same batch does, told once, and ended together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from safetensors.torch import load_file

from layerprune.heal.train import heal_checkpoint
from layerprune.model.errors import UsageError
from layerprune.model.files import locked

torch.set_num_threads(1)

STEPS = 6
OPTIONS = {
    "heal-steps": STEPS, "length": 16, "lora-rank": 4, "learning-rate": 1e-2, "batch-size": 4, "micro-batch": 2, "dropout": 0,
    "device": "cpu",
}  # fmt: skip
LIMIT = 100
"""Seconds after which processes count as hanging."""


@pytest.fixture(scope="module")
def source(build_llama: Callable[..., Path], prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 2 layers wide enough for NF4; its documents are beside it, in words.jsonl."""
    folder = build_llama(tmp_path_factory.mktemp("source") / "model", layers=2, hidden=64, intermediate_size=128)
    (folder.parent / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    return folder


def heal_alone(source: Path, out: Path) -> dict[str, Any]:
    return heal_checkpoint(
        source, out, data=str(source.parent / "words.jsonl"), steps=STEPS, length=16, lora_rank=4, learning_rate=1e-2, batch_size=4,
        micro_batch=2, dropout=0.0, device="cpu", report=lambda line: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(what one process makes of the same batches, its record)."""
    out = tmp_path_factory.mktemp("alone") / "model"
    return out, heal_alone(source, out)


def command(source: Path, out: Path, **changed: Any) -> list[str]:
    """The arguments of `layerprune` for a healing to `out`."""
    given = {**OPTIONS, "model": source, "heal-data": source.parent / "words.jsonl", "out": out}
    options = {**given, **{key.replace("_", "-"): value for key, value in changed.items()}}
    return ["heal", *(part for key, value in options.items() if value is not None for part in (f"--{key}", str(value)))]


def free_port() -> str:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return str(some.getsockname()[1])


def end(process: subprocess.Popen[str]) -> None:
    """End a process that this test started in a session of its own, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def launched(arguments: list[str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `accelerate launch -m layerprune ...` with two processes."""
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port(), "-m", "layerprune", *arguments,
    ]  # fmt: skip
    started = subprocess.Popen(
        launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        out, err = started.communicate(timeout=LIMIT)
    finally:
        end(started)
    return started.returncode, out, err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "adapter" / "adapter_model.safetensors")


def same(folder: Path, other: Path) -> bool:
    """Within 1e-5 in every weight and adapter."""
    a, b = weights(folder), weights(other)
    return a.keys() == b.keys() and all(float((a[name].double() - b[name].double()).abs().max()) <= 1e-5 for name in a)


def test_two_launched_processes_learn_what_one_does_and_speak_once(
    source: Path, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "model"
    status, stdout, stderr = launched([*command(source, out), "--json"])
    assert status == 0, stderr[-3000:]
    result = json.loads(stdout)  # one document, hence one process spoke
    assert same(out, alone[0]) and not same(out, source_with_adapter(source, alone[0], tmp_path))
    assert result["processes"] == 2 and alone[1]["processes"] == 1
    for key, other in (("losses", alone[1]["losses"]["curve"]), ("held_out", alone[1]["held_out"])):
        found = result["losses"]["curve"] if key == "losses" else result["held_out"]
        for (step, loss), (step_alone, loss_alone) in ((found[0], other[0]), (found[-1], other[-1])):
            assert step == step_alone and loss == pytest.approx(loss_alone, abs=1e-4), key
    spoken = ("healing: ", "plan: ", "step 0 of 6: ", "step 6 of 6: ", "merging the adapter", "bytes: proven")
    assert {line: stderr.count(line) for line in spoken} == dict.fromkeys(spoken, 1)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "untrained") == ["model"]


def source_with_adapter(source: Path, healed: Path, tmp_path: Path) -> Path:
    """The source's weights under the healed checkpoint's layout: what no training would give."""
    folder = tmp_path / "untrained"
    (folder / "adapter").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (folder / "adapter" / "adapter_model.safetensors").write_bytes((healed / "adapter" / "adapter_model.safetensors").read_bytes())
    return folder


# Without a launcher, whose own clean-up would end a process that hangs. One interpreter imports everything and forks.

_FORKS = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
import accelerate, bitsandbytes, peft, transformers.models.llama.modeling_llama
from layerprune.cli import main
from layerprune.heal import merge, prepare, proof, trainer, train, watch, world
from layerprune.model.errors import Refused, UsageError

watch.SAVE_SECONDS = 0.0
root, limit = Path(sys.argv[1]), float(sys.argv[2])

def meet(rank):  # what the processes tell one another; only the first one does the work, and fails at it
    def work(error=None):
        assert rank == 0
        if error is not None:
            raise error
        return {"a": [1]}
    print(world.first_alone(work, "cpu"), world.summed([rank + 1.0, 0.5], "cpu"), world.agreed(rank == 0))
    for error in (UsageError("no: use 1"), Refused("never"), ValueError("odd")):
        try:
            world.first_alone(lambda: work(error), "cpu")
        except Exception as told:
            print(type(told).__name__, told)
    world.leave()

def start(rank, port, arguments, log, hold):
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{rank}.{name}", os.O_CREAT | os.O_WRONLY, 0o600), number)
    if hold:  # stand still in the middle of step 5, with a checkpoint of step 4, until the end comes from outside
        step = trainer.Trainer.training_step
        def held(self, *args, **kwargs):
            if self.state.global_step == 4:
                Path(f"{log}.{rank}.holds").touch()
                time.sleep(limit)
            return step(self, *args, **kwargs)
        trainer.Trainer.training_step = held
    status = 70
    try:
        main(arguments) if arguments[0] == "heal" else meet(rank)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 71
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    name, port, arguments, hold = json.loads(line)
    log = root / f"{name}.log"
    children = [start(rank, port, arguments, log, hold) for rank in range(2)]
    until, found = time.monotonic() + limit, {}
    while len(found) < 2 and time.monotonic() < until:
        if hold and all(Path(f"{log}.{rank}.holds").exists() for rank in range(2)):
            for child in children:
                os.kill(child, signal.SIGKILL)
            hold = False
        for rank, child in enumerate(children):
            if rank not in found:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    found[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for rank, child in enumerate(children):
        if rank not in found:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found[rank] = "hangs"
    texts = {n: [Path(f"{log}.{rank}.{n}").read_text() for rank in range(2)] for n in ("out", "err")}
    print(json.dumps({"status": [found[0], found[1]], **texts}), flush=True)
"""


class Forks:
    """Pairs of processes, forked from one interpreter: `run` gives their exit statuses, stdout and stderr, by rank."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _FORKS, str(root), str(LIMIT / 2)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.count = 0

    def run(self, arguments: list[str], hold: bool = False) -> dict[str, list[Any]]:
        """hold: the two are killed in the middle of training."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.count += 1
        self.process.stdin.write(json.dumps([str(self.count), free_port(), arguments, hold]) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    end(made.process)


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder but the one that holds times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "layerprune.json"
    }


def test_two_killed_processes_go_on_and_end_with_the_same_bytes(
    source: Path, alone: tuple[Path, dict[str, Any]], forks: Forks, tmp_path: Path
) -> None:
    undisturbed = forks.run(command(source, tmp_path / "undisturbed" / "model"))
    assert undisturbed["status"] == [0, 0], undisturbed["err"]
    assert undisturbed["out"][0] and undisturbed["out"][1] == "", "the second process says nothing"
    assert "healing: " not in undisturbed["err"][1] and same(tmp_path / "undisturbed" / "model", alone[0])
    arguments = command(source, tmp_path / "killed" / "model")
    killed = forks.run(arguments, hold=True)
    assert killed["status"] == [-signal.SIGKILL, -signal.SIGKILL]
    work = tmp_path / "killed" / ".model.work"
    assert (work / "checkpoint-4" / "whole.json").exists() and not (tmp_path / "killed" / "model").exists()
    with pytest.raises(UsageError, match="begun with other settings .*processes was 2, now 1"):
        heal_alone(source, tmp_path / "killed" / "model")
    again = forks.run(arguments)
    assert again["status"] == [0, 0], again["err"]
    assert again["err"][0].count("going on from step 4 of 6") == 1
    expected = digest(tmp_path / "undisturbed" / "model")
    assert "adapter/adapter_model.safetensors" in expected and digest(tmp_path / "killed" / "model") == expected
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["model"], "one folder"


def test_what_the_first_process_finds_or_refuses_all_are_told(forks: Forks) -> None:
    found = forks.run(["meet"])
    assert found["status"] == [0, 0], found["err"]
    first, second = (out.splitlines() for out in found["out"])
    assert first == ["{'a': [1]} [3.0, 1.0] True", "UsageError no: use 1", "Refused never", "ValueError odd"]
    assert second == [*first[:3], "Refused the first process failed: ValueError('odd')"]


REFUSALS: dict[str, tuple[dict[str, Any], str, int]] = {
    "the output exists": ({}, "model exists already and is left as it is", 2),
    "too little data": ({"length": 64, "heal_data": "few.jsonl"}, "which do not fill one sequence of 64", 1),
    "a batch that two cannot share": (
        {"batch_size": 3, "micro_batch": None}, "--batch-size 3 cannot be shared by 2 processes: use a multiple of 2", 2,
    ),
    "a share that is not divided": ({"micro_batch": 4}, "does not divide the 2 sequences of a process: use one of 1, 2", 2),
    "another healing": ({}, "another process is healing in", 1),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSALS)
def test_a_refusal_ends_both_processes(why: str, source: Path, forks: Forks, tmp_path: Path, request: Any) -> None:
    """By themselves: nobody ends the one that would wait for the other."""
    changed, told, status = REFUSALS[why]
    out = tmp_path / "model"
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "river stone"}) + "\n")
    if "heal_data" in changed:
        changed = {**changed, "heal_data": tmp_path / changed["heal_data"]}
    if why == "the output exists":
        out.mkdir()
        (out / "mine").touch()
    with contextlib.ExitStack() as stack:
        if why == "another healing":
            (tmp_path / ".model.work").mkdir()
            stack.enter_context(locked(tmp_path / ".model.work", "healing"))
        found = forks.run(command(source, out, **changed))
    assert found["status"] == [status, status] and found["out"] == ["", ""], found
    errors = {line for err in found["err"] for line in err.splitlines() if line.startswith("Error: ")}
    assert len(errors) == 1 and told in errors.pop(), "one sentence"
    assert "Error: " in found["err"][0] and not any("Traceback" in err for err in found["err"])
    left = {path.name for path in tmp_path.iterdir()} - {"few.jsonl", ".model.work"}
    assert left == ({"model"} if why == "the output exists" else set()) and list(tmp_path.glob("*/*")) in ([], [out / "mine"])
