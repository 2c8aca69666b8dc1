"""Heal several depths at once, each in a process of its own: over the GPUs of a machine, or as jobs of a cluster.

The sweep writes what a worker needs to know into heal/<strategy>-<n>/worker.json; the worker (`python -m layerprune.spread FILE`)
heals and measures that depth with `heal_depth` and leaves its files there. Nothing else passes between them.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused, UsageError, one_line
from layerprune.model.files import locked, read_json, write_json
from layerprune.model.source import find_model
from layerprune.model.tensors import read_checkpoint
from layerprune.runplan import Setup, as_time, set_up
from layerprune.stages import Say, Stages
from layerprune.workers import LOG, SILENCE, SPEC, Worker, as_worker, cores, error_in, sigterm_is_an_exit, visible_gpus

Piece = tuple[str, int]
"""A strategy and the n that it drops."""
LAUNCHERS = ("slurm", "local")
_LATE = 90.0
"""Seconds until a file that another machine wrote must be seen here: network file systems keep what they saw for a while."""
_OPEN = (None, "auto")
_SEVERAL = ("nodes", "tasks_per_node", "ntasks_per_node")
_LISTS = ("setup", "teardown", "srun_args")


@dataclass(frozen=True)
class Spread:
    """How healings are spread, as the user asked; None for what fits. See `check_spread`."""

    workers: int | None = None
    launcher: str | None = None
    launcher_args: Mapping[str, Any] = field(default_factory=dict)

    def slots(self, pieces: int, setup: Setup, kept: float) -> list[dict[str, str]]:
        """The environment of each worker that is at work at the same time, at most one a piece.

        A worker gets one GPU, or as many as the largest cut (`kept`: its share of the model) needs to be measured. Without
        `workers` the GPUs decide; where the user named a device, and on the CPU, it is one.
        """
        if self.launcher == "slurm":
            return [{}] * min(pieces, self.workers or pieces)
        gpus = visible_gpus() if setup.device.startswith("cuda") else []
        need = gpus_for(setup, kept) if gpus and setup.asked_device in _OPEN else 1
        most = self.workers or (len(gpus) // need if setup.asked_device in _OPEN else 1)
        count = max(1, min(most, pieces))
        each = max(1, min(need, len(gpus) // count))
        found: list[dict[str, str]] = [{} for _ in range(count)]
        for i, environment in enumerate(found):
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i * each : (i + 1) * each])
            if count > 1 and "OMP_NUM_THREADS" not in os.environ:
                environment["OMP_NUM_THREADS"] = str(max(1, cores() // count))
        return found


def check_spread(
    workers: int | None, launcher: str | None, launcher_args: str | Mapping[str, Any] | None, device: str, asked_device: str | None
) -> Spread:
    """Resolve and check how healings are to be spread.

    workers: healings at the same time. launcher: `slurm` or `local` (jobs of submitit's executors of these names), None for
    processes of this machine. launcher_args: submitit's parameters, as a mapping or as text such as
    `timeout_min=600,slurm_partition=gpu`. device: where the sweep runs, and asked_device as the user gave it.
    Raises UsageError, and Refused where the launcher cannot be used here.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} is not a number above 0")
    if launcher is not None and launcher not in LAUNCHERS:
        raise UsageError(f"--launcher {launcher} is none of {', '.join(LAUNCHERS)}")
    found = Spread(workers, launcher, parse_launcher_args(launcher_args))
    if launcher is None and found.launcher_args:
        raise UsageError("--launcher-args are of no use without --launcher: give --launcher slurm too, or leave them out")
    if workers is not None and workers > 1 and launcher != "slurm" and device.startswith("cuda"):
        if ":" in (asked_device or ""):
            raise UsageError(f"--device {asked_device} is one GPU, and --workers {workers} takes {workers}: leave --device out")
        if workers > len(visible_gpus()):
            count = len(visible_gpus())
            raise UsageError(f"--workers {workers} takes a GPU each, and torch sees {count} here: use at most {count}")
    if launcher is not None:
        with tempfile.TemporaryDirectory() as folder:
            _executor(found, Path(folder), device)
    return found


def parse_launcher_args(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters from text such as `timeout_min=600,slurm_partition=gpu`; numbers, true and false become what they say."""
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    found: dict[str, Any] = {}
    for part in (p.strip() for p in given.split(",")):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not (key and equals and value):
            raise UsageError(f"--launcher-args {part!r} is not key=value, as in timeout_min=600,slurm_partition=gpu")
        if key in found:
            raise UsageError(f"--launcher-args names {key} twice")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def gpus_for(setup: Setup, kept: float) -> int:
    """GPUs that a cut needs while it is measured; a fifth of each is left for what is computed."""
    import torch

    size = {"float32": 4, "bfloat16": 2, "float16": 2, "nf4": 0.75}.get(setup.dtype)
    stored = read_checkpoint(setup.source.folder).values()
    need = kept * sum(tensor.nbytes if size is None else size * tensor.numel for tensor in stored)
    room = 0.8 * min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return max(1, math.ceil(need / room))


def settings_of(setup: Setup) -> dict[str, Any]:
    """The arguments with which `set_up` makes a worker's setup, in types that JSON has. Its ranking is of no use: it is there."""
    chosen, heal = setup.evaluation, setup.heal
    return {
        "tasks": setup.tasks,
        "limit": chosen.limit,
        "task_folder": setup.task_folder,
        "calibration": chosen.data,  # it is only looked for, and this one the worker needs anyway
        "eval_data": chosen.data,
        "samples": chosen.samples,
        "heal": heal is not None,
        "heal_data": heal.data if heal is not None and setup.own_heal_data else None,
        "heal_steps": setup.heal_options["steps"],
        "heal_with": {key: value for key, value in setup.heal_options.items() if key not in ("steps", "length")},
        "length": setup.heal_options["length"],
        "seed": setup.seed,
        "dtype": setup.dtype,
        # a sweep on the CPU is healed on the CPU, whatever the worker's machine has
        "device": "cpu" if setup.device == "cpu" else setup.asked_device,
        "trust_remote_code": setup.trust_remote_code,
        "memory": setup.memory,
        "ram": setup.ram,
    }


def heal_apart(
    pieces: Sequence[Piece],
    slots: Sequence[Mapping[str, str]],
    spread: Spread,
    setup: Setup,
    folder: Path,
    *,
    batch_size: int | None,
    done: Callable[[Piece], bool],
    arrived: Callable[[Piece], None],
    say: Say,
) -> None:
    """Heal and measure the pieces of a sweep folder, as many at a time as there are slots; a worker's own words go to log.txt.

    slots: the environment of each worker. done: whether a piece's files are there; arrived: called when they have come.
    When one fails the others are still done; then Refused is raised. Workers do not outlive this call.
    """
    jobs = folder.absolute() / "heal" / "jobs"
    alive = jobs / f"alive-{uuid.uuid4().hex}" if spread.launcher else None
    if alive is not None:
        jobs.mkdir(parents=True, exist_ok=True)
        alive.touch()
    executor = _executor(spread, jobs, setup.device) if spread.launcher else None
    fixed = {
        "cwd": os.getcwd(),
        "folder": str(folder),  # as it was given: healing records it
        "model": setup.source.name,
        "revision": setup.source.revision,
        "device": setup.device,
        "settings": settings_of(setup),
        "batch_size": batch_size,
        "parent": None if spread.launcher else os.getpid(),
        "alive": None if alive is None else str(alive),
    }
    waiting, free, failed = list(pieces), list(range(len(slots))), dict[Piece, str]()
    running: dict[int, tuple[Piece, Worker | _Job, float]] = {}
    say(f"{len(pieces)} healings, {len(slots)} at a time; what each says goes to {folder}/heal/<strategy>-<n>/{LOG}")
    with sigterm_is_an_exit():
        try:
            while waiting or running:
                while waiting and free:
                    piece, slot = waiting.pop(0), free.pop(0)
                    place = folder.absolute() / "heal" / f"{piece[0]}-{piece[1]}"
                    place.mkdir(parents=True, exist_ok=True)
                    (place / LOG).write_text("")
                    own = {"strategy": piece[0], "n": piece[1], "environment": dict(slots[slot])}
                    write_json(place / SPEC, {**fixed, **own})
                    one = Worker(place, "layerprune.spread") if executor is None else _Job(place, executor)
                    gpus = slots[slot].get("CUDA_VISIBLE_DEVICES")
                    say(f"{_name(piece)}: healing begins{one.told}" + (f", GPU {gpus}" if gpus else ""))
                    running[slot] = (piece, one, time.monotonic())
                if alive is not None:
                    alive.touch()
                time.sleep(0.2 if alive is None else 1.0)
                for slot, (piece, one, since) in list(running.items()):
                    fault = one.ended()
                    if fault is None:
                        continue
                    del running[slot]
                    free.append(slot)
                    if not fault and not _seen(done, piece, 0 if alive is None else _LATE):
                        fault = "it ended well, but its files are not here: do all machines share this file system?"
                    if fault:
                        failed[piece] = f"{_name(piece)}: {fault} (log: {one.place / LOG})"
                        say(f"{_name(piece)}: failed: {fault}")
                        continue
                    (one.place / SPEC).unlink(missing_ok=True)
                    say(f"{_name(piece)}: healed and measured in {as_time((time.monotonic() - since) / 3600)}")
                    arrived(piece)
        finally:
            if alive is not None:
                alive.unlink(missing_ok=True)
            for _, one, _ in running.values():
                one.stop()
    if failed:
        raise Refused(
            f"{len(failed)} of {len(pieces)} healings failed: {'; '.join(failed.values())}; what is done stays, and the same "
            "command goes on with the rest"
        )


def _name(piece: Piece) -> str:
    return f"n = {piece[1]} ({piece[0]})"


def _seen(done: Callable[[Piece], bool], piece: Piece, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not done(piece):
        if time.monotonic() >= until:
            return False
        time.sleep(0.5)
    return True


class _Job:
    """A worker that is a job of submitit's."""

    def __init__(self, place: Path, executor: Any) -> None:
        from submitit.helpers import clean_env

        self.place = place
        # a job submitted from within a job would inherit its shape
        with clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext():
            self.job = executor.submit(Healing(), str(place / SPEC))
        self.told = f" as job {self.job.job_id}"

    def ended(self) -> str | None:
        """None while it waits or runs, '' when it ended well, else why it failed."""
        if not self.job.done():
            return None
        if self.job.exception() is None:
            return ""
        return error_in(self.place / LOG) or f"job {self.job.job_id} ended as {self.job.state}, see {self.job.paths.stderr}"

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.job.cancel(check=False)


class Healing:
    """`work` as submitit calls it; a job that was preempted, or ran out of its time, is sent again and goes on."""

    def __call__(self, spec: str) -> None:
        with open(Path(spec).parent / LOG, "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        work(spec)

    def checkpoint(self, spec: str) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, spec)


def _executor(spread: Spread, folder: Path, device: str) -> Any:
    """submitit's executor with its parameters. Raises UsageError and Refused."""
    try:
        import submitit
    except ImportError:
        raise UsageError('--launcher needs submitit: pip install "layerprune[slurm]"') from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=spread.launcher)
    except RuntimeError as error:
        raise Refused(
            f"--launcher {spread.launcher} cannot be used here: {one_line(error)} Start the sweep on a machine that can submit "
            "jobs, or use --workers"
        ) from None
    defaults: dict[str, Any] = {"name": "layerprune", "timeout_min": 24 * 60}
    if device != "cpu" and not any("gpu" in key or "gres" in key for key in spread.launcher_args):
        defaults["gpus_per_node"] = 1
    executor.update_parameters(**defaults)
    for key, value in spread.launcher_args.items():
        bare = key.removeprefix(f"{spread.launcher}_")
        if bare in _SEVERAL:
            raise UsageError(f"--launcher-args {key}={value}: a healing is one process on one machine: leave it out")
        try:
            executor.update_parameters(**{key: [value] if bare in _LISTS and isinstance(value, str) else value})
        except NameError:
            raise UsageError(
                f"--launcher-args {key}={value}: submitit has no such parameter; it has timeout_min, mem_gb, cpus_per_task, "
                "gpus_per_node, and sbatch's options as slurm_partition, slurm_account and so on"
            ) from None
        except (AssertionError, TypeError, ValueError) as error:
            raise UsageError(f"--launcher-args {key}={value} is not taken by submitit: {one_line(error)}") from None
    return executor


def work(spec: str | Path) -> None:
    """Do the piece of a sweep that worker.json names, in its folder; ends this process when the sweep is gone.

    An error is told as the last line that begins with `Error: `, and raised.
    """

    def heal(asked: dict[str, Any]) -> None:
        with _held(Path(spec).parent):
            _heal(asked)

    as_worker(Path(spec), heal, "the sweep", SILENCE)


def _heal(asked: Mapping[str, Any]) -> None:
    from layerprune.sweeping import heal_depth

    setup = set_up(find_model(asked["model"], asked["revision"]), **asked["settings"])
    if setup.device.partition(":")[0] != asked["device"].partition(":")[0]:
        raise Refused(
            f"the sweep runs on {asked['device']} and this worker would on {setup.device}: ask for a GPU for each job, as in "
            "--launcher-args slurm_gpus_per_node=1"
        )
    folder, strategy = Path(asked["folder"]), asked["strategy"]
    ranking = read_json(folder / "rank.json") if strategy == "angular" else None
    stages = _InTurn(setup, lambda line: print(line, flush=True), False, None, asked["batch_size"])
    heal_depth(stages, folder, strategy, asked["n"], ranking)


class _InTurn(Stages):
    """Cuts are written one after another: each is proven in as much memory as is free, which workers must not count twice."""

    def prune(self, out: Path, *more: Any) -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ImportError, OSError):  # no locks on this system, or none on folders
                import fcntl

                above = os.open(out.parent.parent, os.O_RDONLY)
                stack.callback(os.close, above)
                fcntl.flock(above, fcntl.LOCK_EX)
            super().prune(out, *more)


@contextlib.contextmanager
def _held(place: Path) -> Iterator[None]:
    """Hold a depth's folder; a worker of a sweep that was killed is waited for, since it ends soon."""
    until = time.monotonic() + SILENCE + 60
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(place, "healing"))
                break
            except Refused:
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)
        yield


if __name__ == "__main__":
    try:
        work(sys.argv[1])
    except Exception:  # it is told in the log
        sys.exit(1)
