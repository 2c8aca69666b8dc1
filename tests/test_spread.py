"""Healings in processes and jobs of their own: the same result as in one process, failures told, nothing left running."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from layerprune import spread
from layerprune.cli import main
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import locked
from layerprune.model.source import find_model
from layerprune.runplan import set_up
from layerprune.spread import Spread, check_spread, parse_launcher_args, settings_of, visible_gpus, work
from layerprune.sweeping import sweep

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
HEALED = ("angular-3", "last-3")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of floats depend on the number of threads, and bytes are compared here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def settings(inputs: Path) -> dict[str, Any]:
    return {
        "calibration": str(inputs / "calibration.jsonl"), "eval_data": str(inputs / "loss.jsonl"), "length": 32, "device": "cpu",
        "task_folder": inputs / "tasks", "tasks": ["tiny"], "heal_data": str(inputs / "heal.jsonl"), "heal_steps": 3,
        "drops": "0.375,0.5",
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(run_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both strategies healed at one depth, in this process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    lines: list[str] = []
    sweep(run_inputs / "model", heal=[0.375], out=out, say=lines.append, **settings(run_inputs))
    assert not any("at a time" in line for line in lines)
    return out


@pytest.fixture(scope="module")
def unhealed(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sweep as one that was killed before the first healing."""
    out = tmp_path_factory.mktemp("unhealed") / "out"
    shutil.copytree(alone, out, ignore=shutil.ignore_patterns("heal"))
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    return out


@pytest.fixture
def begun(unhealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unhealed, tmp_path / "out"))


def assert_same(out: Path, alone: Path) -> None:
    names = ["curve.json", "curve.csv", "collapse.json", "items.json"]
    for healed in HEALED:
        files = ("eval.json", "healed/model.safetensors", "adapter/adapter_model.safetensors")
        names += [f"heal/{healed}/{name}" for name in files]
    for name in names:
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    for healed in HEALED:
        found = {path.name for path in (out / "heal" / healed).iterdir()}
        assert found == {"healed", "adapter", "eval.json", "log.txt"}
        records = []
        for at in (out, alone):
            records.append(json.loads((at / "heal" / healed / "healed/layerprune.json").read_text()))
            del records[-1]["seconds"], records[-1]["healing"]["seconds"]
            assert records[-1]["healing"].pop("model") == str(at / "heal" / healed / "pruned")  # as the user gave the folder
        # where between its ends the held-out loss is measured is a matter of time; what it is there is not
        ours, theirs = (dict(record["healing"].pop("held_out")) for record in records)
        assert (min(ours), max(ours)) == (min(theirs), max(theirs)) and ours | theirs == theirs | ours
        assert records[0] == records[1]


def test_two_workers_leave_what_one_process_does(
    run_inputs: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    found = sweep(run_inputs / "model", heal=[0.375], out="out", workers=5, say=lines.append, **settings(run_inputs))
    assert_same(Path("out"), alone)
    assert found["rows"] == json.loads((alone / "curve.json").read_text())["rows"]
    assert any("2 healings, 2 at a time" in line for line in lines)
    for name in ("n = 3 (angular)", "n = 3 (last)"):
        told = [line.removeprefix(name) for line in lines if line.startswith(name)]
        assert [line.split(" in ")[0] for line in told] == [": healing begins", ": healed and measured"]
    assert not any(line.startswith("healing the cut") for line in lines)  # that is in the worker's log
    log = (tmp_path / "out/heal/last-3/log.txt").read_text()
    assert "healing the cut of n = 3 (last)" in log and "evaluating the healed cut" in log
    lines.clear()
    sweep(run_inputs / "model", heal=[0.375], out=tmp_path / "out", workers=2, say=lines.append, **settings(run_inputs))
    assert "finished" in lines[-1]


def test_what_is_done_is_not_done_again(run_inputs: Path, alone: Path, begun: Path) -> None:
    shutil.copytree(alone / "heal/angular-3", begun / "heal/angular-3")
    shutil.copytree(alone / "heal/last-3", begun / "heal/last-3")
    (begun / "heal/last-3/eval.json").unlink()  # killed while it was measured
    before = (begun / "heal/last-3/healed/layerprune.json").read_bytes()
    lines: list[str] = []
    options = {"launcher": "local", "launcher_args": "timeout_min=5", "say": lines.append}
    sweep(run_inputs / "model", heal=[0.375], out=begun, **options, **settings(run_inputs))
    assert [line for line in lines if "begins" in line] and not [line for line in lines if "(angular): healing begins" in line]
    assert "healing the cut" not in (begun / "heal/last-3/log.txt").read_text()
    assert (begun / "heal/last-3/healed/layerprune.json").read_bytes() == before
    assert (begun / "curve.json").read_bytes() == (alone / "curve.json").read_bytes()


def test_jobs_of_submitit_leave_what_one_process_does(run_inputs: Path, alone: Path, begun: Path) -> None:
    lines: list[str] = []
    options = {"launcher": "local", "workers": 2, "launcher_args": {"timeout_min": 5, "slurm_partition": "gpu"}}
    sweep(run_inputs / "model", heal=[0.375], out=begun, say=lines.append, **options, **settings(run_inputs))
    assert_same(begun, alone)
    assert sum("healing begins as job" in line for line in lines) == 2
    assert (begun / "heal/jobs").is_dir() and not list((begun / "heal/jobs").glob("alive-*"))


@pytest.mark.parametrize("options", [{"workers": 2}, {"launcher": "local", "launcher_args": "timeout_min=5"}])
def test_a_failing_worker_is_told_when_the_others_are_done(
    options: dict[str, Any], run_inputs: Path, alone: Path, begun: Path
) -> None:
    (begun / "heal/angular-3").mkdir(parents=True)
    (begun / "heal/angular-3/pruned").write_text("no checkpoint")
    lines: list[str] = []
    with pytest.raises(Refused) as told:
        sweep(run_inputs / "model", heal=[0.375], out=begun, say=lines.append, **options, **settings(run_inputs))
    log = begun / "heal/angular-3/log.txt"
    assert "1 of 2 healings failed: n = 3 (angular): " in str(told.value) and f"(log: {log})" in str(told.value)
    assert f"{begun}/heal/angular-3/pruned is a file" in str(told.value) and "\n" not in str(told.value)
    assert "Traceback" in log.read_text()
    assert (begun / "heal/last-3/healed").is_dir() and (begun / "heal/last-3/eval.json").exists()
    rows = json.loads((begun / "curve.json").read_text())["rows"]  # what arrived is in the curve already
    assert [row["strategy"] for row in rows if row["healed"]] == ["last"]
    assert not json.loads((begun / "manifest.json").read_text())["finished"]
    (begun / "heal/angular-3/pruned").unlink()
    sweep(run_inputs / "model", heal=[0.375], out=begun, workers=2, say=lines.append, **settings(run_inputs))
    assert (begun / "curve.json").read_bytes() == (alone / "curve.json").read_bytes()


def command(inputs: Path, out: Path, *more: str) -> list[str]:
    given = {
        "model": inputs / "model", "calibration": inputs / "calibration.jsonl", "eval-data": inputs / "loss.jsonl", "length": 32,
        "task-folder": inputs / "tasks", "tasks": "tiny", "heal-data": inputs / "heal.jsonl", "drops": "0.375,0.5", "heal": 0.375,
        "device": "cpu", "out": out,
    }  # fmt: skip
    return [sys.executable, "-m", "layerprune", "sweep", *(str(x) for k, v in given.items() for x in (f"--{k}", v)), *more]


def processes_of(out: Path) -> dict[int, str]:
    """Command lines that name a worker's file of this sweep."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and str(out) in line and ("layerprune.spread" in line or "submitit" in line):
            found[int(entry.name)] = line
    return found


@pytest.fixture
def sweeps(begun: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of a test; whatever a failing test leaves of its own is ended."""
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for process in found:
        if process.poll() is None:
            process.kill()
        process.wait()
    for pid in processes_of(begun):
        os.kill(pid, signal.SIGKILL)


def wait_for(what: Any, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_sweep_leaves_no_worker_and_is_gone_on_with(
    how: signal.Signals, run_inputs: Path, begun: Path, sweeps: list[subprocess.Popen[bytes]]
) -> None:
    steps = ["--heal-steps", "120"]  # long enough to be killed on a busy machine
    asked = json.loads((begun / "manifest.json").read_text())
    (begun / "manifest.json").write_text(json.dumps({**asked, "asked": {**asked["asked"], "heal": [], "heal_settings": None}}))
    line = command(run_inputs, begun, "--workers", "2", *steps)
    sweeps.append(subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
    logs = [begun / "heal" / name / "log.txt" for name in HEALED]
    training = wait_for(lambda: all(log.exists() and "trainable parameters" in log.read_text() for log in logs), 120)
    assert training, [log.read_text() for log in logs if log.exists()]
    assert len(processes_of(begun)) == 2
    sweeps[0].send_signal(how)
    sweeps[0].wait(30)
    assert wait_for(lambda: not processes_of(begun), 10), processes_of(begun)
    assert not any((begun / "heal" / name / "healed").exists() for name in HEALED)
    if how == signal.SIGKILL:
        assert all("the sweep that this belongs to is gone" in log.read_text() for log in logs)
        found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stderr
        assert all((begun / "heal" / name / "healed").is_dir() for name in HEALED)


def test_a_job_whose_sweep_is_gone_ends(run_inputs: Path, begun: Path, tmp_path: Path) -> None:
    """It looks at a file that the sweep touches, since the sweep may be on another machine."""
    place, alive = begun / "heal/last-3", tmp_path / "alive"
    place.mkdir(parents=True)
    setup = set_up(find_model(str(run_inputs / "model")), **{k: v for k, v in settings(run_inputs).items() if k != "drops"})
    asked = {
        "cwd": str(tmp_path), "folder": str(begun), "model": str(run_inputs / "model"), "revision": None, "device": "cpu",
        "settings": {**settings_of(setup), "heal_steps": 100000}, "batch_size": None, "parent": None, "alive": str(alive),
        "strategy": "last", "n": 3, "environment": {},
    }  # fmt: skip
    (place / "worker.json").write_text(json.dumps(asked))
    alive.touch()
    line = "import sys; from layerprune import spread; spread.SILENCE = float(sys.argv[2]); spread.work(sys.argv[1])"
    for silence, remove in ((600, True), (3, False)):
        worker = subprocess.Popen(
            [sys.executable, "-c", line, str(place / "worker.json"), str(silence)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        if remove:
            time.sleep(2)
            assert worker.poll() is None
            alive.unlink()
        assert "the sweep that this belongs to is gone" in worker.communicate(timeout=60)[1].splitlines()[-1]
        assert worker.returncode == 1
        alive.touch()


def test_a_depth_that_another_worker_holds_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path, "healing"):
        monkeypatch.setattr(spread, "SILENCE", -60.0)
        with pytest.raises(Refused, match="another process is healing in"), spread._held(tmp_path):
            pass
    with spread._held(tmp_path):
        pass


def test_a_worker_on_another_device_refuses(
    run_inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = set_up(find_model(str(run_inputs / "model")), **{k: v for k, v in settings(run_inputs).items() if k != "drops"})
    asked = {
        "cwd": str(tmp_path), "folder": str(tmp_path), "model": str(run_inputs / "model"), "revision": None, "device": "cuda",
        "settings": settings_of(setup), "batch_size": None, "parent": os.getppid(), "alive": None, "strategy": "last", "n": 3,
        "environment": {},
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worker.json").write_text(json.dumps(asked))
    with pytest.raises(Refused, match="the sweep runs on cuda and this worker would on cpu"):
        work(tmp_path / "worker.json")
    assert capsys.readouterr().err.splitlines()[-1].startswith("Error: the sweep runs on cuda")


def test_the_worker_makes_the_setup_of_the_sweep(run_inputs: Path) -> None:
    """All of it but the ranking's data; also where tasks and their examples come in another form."""
    given = {k: v for k, v in settings(run_inputs).items() if k != "drops"}
    many = {"num_fewshot": 2, "limit": 5, "samples": 7, "seed": 3, "dtype": "float32"}
    healed = {"heal_with": ["learning_rate=1e-4", "lora_rank=4", "targets=mlp+attention"], "heal_steps": None, "heal_tokens": 5000}
    for more in ({}, many, healed, {"tasks": {"tiny": 1}, "heal": False}):
        for name in (str(run_inputs / "model"), "demo"):
            setup = set_up(find_model(name), **{**given, **more})
            again = set_up(find_model(name), **json.loads(json.dumps(settings_of(setup))))
            unused = {"rank"} if setup.heal else {"rank", "own_heal_data"}
            assert {k: v for k, v in vars(again).items() if k not in unused} == {
                k: v for k, v in vars(setup).items() if k not in unused
            }


def test_every_setting_reaches_the_worker(run_inputs: Path) -> None:
    """One that is new in `set_up` must be handed on; these two are resolved into others."""
    setup = set_up(find_model(str(run_inputs / "model")), **{k: v for k, v in settings(run_inputs).items() if k != "drops"})
    assert set(settings_of(setup)) == set(inspect.signature(set_up).parameters) - {"source", "num_fewshot", "heal_tokens"}


def test_the_module_does_not_import_torch() -> None:
    """CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS are set after it is imported, and count only before torch is."""
    code = "import sys, layerprune.spread; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=1_000_000))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def gpus_of(asked: Spread, pieces: int, setup: Any, kept: float = 1.0) -> list[str]:
    return [environment["CUDA_VISIBLE_DEVICES"] for environment in asked.slots(pieces, setup, kept)]


def as_setup(folder: Path, device: str = "cuda", asked: str | None = None, dtype: str = "auto") -> Any:
    return SimpleNamespace(device=device, asked_device=asked, dtype=dtype, source=SimpleNamespace(folder=folder))


@pytest.mark.usefixtures("four_gpus")
def test_each_worker_gets_its_gpus(run_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = as_setup(run_inputs / "model")
    monkeypatch.setattr(spread, "gpus_for", lambda setup, kept: 1)
    assert gpus_of(Spread(), 9, setup) == ["0", "1", "2", "3"]
    assert gpus_of(Spread(), 3, setup) == ["0", "1", "2"]
    assert gpus_of(Spread(2), 9, setup) == ["0", "1"]
    assert len(Spread().slots(9, as_setup(run_inputs / "model", asked="cuda"), 1.0)) == 1  # one was named
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, GPU-8932f937-d72c,2,MIG-3")
    assert gpus_of(Spread(), 9, setup) == ["7", "GPU-8932f937-d72c", "2", "MIG-3"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # CUDA stops at the first that it does not know
    assert gpus_of(Spread(), 9, setup) == ["7", "GPU-8932f937-d72c"] == visible_gpus()


@pytest.mark.usefixtures("four_gpus")
def test_a_cut_too_large_for_a_gpu_gets_several(run_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_inputs / "model"
    size = (folder / "model.safetensors").stat().st_size  # bfloat16
    room = SimpleNamespace(total_memory=size)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: room)
    assert gpus_of(Spread(), 9, as_setup(folder)) == ["0,1", "2,3"]
    assert gpus_of(Spread(), 9, as_setup(folder), 0.5) == ["0", "1", "2", "3"]
    assert gpus_of(Spread(), 9, as_setup(folder, dtype="float32")) == ["0,1,2"]
    assert gpus_of(Spread(4), 9, as_setup(folder)) == ["0", "1", "2", "3"]  # as asked, though it may not fit
    room.total_memory = 1000
    assert len(Spread().slots(9, as_setup(folder), 1.0)) == 1


def test_cores_are_shared(run_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "cores", lambda: 9)
    setup = as_setup(run_inputs / "model", "cpu", "cpu")
    assert Spread(4).slots(9, setup, 1.0) == [{}] * 4  # the user's number stays
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert Spread(4).slots(9, setup, 1.0) == [{"OMP_NUM_THREADS": "2"}] * 4
    assert Spread(20).slots(20, setup, 1.0) == [{"OMP_NUM_THREADS": "1"}] * 20
    assert Spread().slots(9, setup, 1.0) == [{}]
    assert Spread(None, "slurm").slots(3, setup, 1.0) == [{}] * 3 and Spread(2, "slurm").slots(3, setup, 1.0) == [{}] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "0"], "--workers 0 is not a number above 0"),
        (["--workers", "-1"], "--workers -1 is not a number above 0"),
        (["--workers", "x"], "--workers"),
        (["--launcher", "pbs"], "--launcher"),
        (["--launcher-args", "timeout_min=5"], "without --launcher"),
        (["--launcher", "local", "--launcher-args", "timeout"], "--launcher-args 'timeout' is not key=value"),
        (["--launcher", "local", "--launcher-args", "timeout_min=5,timeout_min=6"], "timeout_min twice"),
        (["--launcher", "local", "--launcher-args", "timeout_min=soon"], "timeout_min=soon is not taken by submitit"),
        (["--launcher", "local", "--launcher-args", "slurm_partitoin=gpu"], "slurm_partitoin=gpu: submitit has no such"),
        (["--launcher", "local", "--launcher-args", "partitoin=gpu"], "partitoin=gpu: submitit has no such"),
        (["--launcher", "local", "--launcher-args", "nodes=2"], "nodes=2: a healing is one process"),
    ],
)
def test_what_is_wrong_is_said_at_once(options: list[str], words: str, run_inputs: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(main, [*command(run_inputs, tmp_path / "out")[3:], *options])
    assert found.exit_code == 2 and words in found.stderr and found.stderr.count("Error: ") == 1
    assert not (tmp_path / "out").exists()


def test_a_launcher_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("srun") is None:
        with pytest.raises(Refused, match=r"--launcher slurm cannot be used here: .*srun.* or use --workers"):
            check_spread(None, "slurm", None, "cpu", None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError) as told:
        check_spread(None, "local", None, "cpu", None)
    assert str(told.value) == '--launcher needs submitit: pip install "layerprune[slurm]"'


@pytest.mark.usefixtures("four_gpus")
def test_more_workers_than_gpus() -> None:
    with pytest.raises(UsageError, match="--workers 5 takes a GPU each, and torch sees 4 here"):
        check_spread(5, None, None, "cuda", None)
    with pytest.raises(UsageError, match="--device cuda:0 is one GPU, and --workers 2"):
        check_spread(2, None, None, "cuda:0", "cuda:0")
    assert check_spread(4, None, None, "cuda", None) == Spread(4)


def test_slurm_gets_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With commands that only look like Slurm's: what would be submitted."""
    for name in ("srun", "sbatch", "sacct", "scancel"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    asked = "timeout_min=600,slurm_partition=gpu,slurm_setup=module load cuda,slurm_mem=64GB"
    made = spread._executor(check_spread(None, "slurm", asked, "cuda", None), tmp_path / "jobs", "cuda")
    lines = made._executor._make_submission_file_text("true", "id").splitlines()
    assert {"#SBATCH --time=600", "#SBATCH --partition=gpu", "#SBATCH --gpus-per-node=1", "#SBATCH --mem=64GB"} <= set(lines)
    assert "#SBATCH --job-name=layerprune" in lines and "module load cuda" in lines
    plain = spread._executor(Spread(None, "slurm", {"slurm_gres": "gpu:h100:1"}), tmp_path / "jobs", "cuda")
    text = plain._executor._make_submission_file_text("true", "id")
    assert "gpus-per-node" not in text and "--gres=gpu:h100:1" in text and "--time=1440" in text
    again = spread.Healing().checkpoint("worker.json")
    assert isinstance(again.function, spread.Healing) and again.args == ("worker.json",)


def test_parameters_from_text() -> None:
    text = "timeout_min=600, mem_gb=1.5,slurm_exclusive=true,slurm_constraint=a|b,name=x=y"
    found = {"timeout_min": 600, "mem_gb": 1.5, "slurm_exclusive": True, "slurm_constraint": "a|b", "name": "x=y"}
    assert parse_launcher_args(text) == found == parse_launcher_args(found)
    assert parse_launcher_args(None) == {}


def test_workers_without_anything_to_heal(run_inputs: Path, unhealed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(unhealed, tmp_path / "out"))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["asked"] |= {"heal": [], "heal_settings": None}
    (out / "manifest.json").write_text(json.dumps(manifest))
    lines: list[str] = []
    sweep(run_inputs / "model", out=out, workers=2, say=lines.append, **settings(run_inputs))
    assert any("nothing is to be healed" in line for line in lines) and not (out / "heal").exists()
