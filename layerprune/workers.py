"""Worker processes: started on a file that says what to do, stopped with the process that started them.

A worker is `python -m MODULE FOLDER/worker.json`. What it says goes to FOLDER/log.txt; why it failed is its last line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from layerprune.model.errors import LayerpruneError, one_line
from layerprune.model.files import read_json

SPEC, LOG = "worker.json", "log.txt"
SILENCE = 600.0
"""Seconds without a sign of whoever started it after which a worker on another machine gives up."""


def visible_gpus() -> list[str]:
    """The GPUs that torch sees here, as CUDA_VISIBLE_DEVICES names them: indices or UUIDs."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def sigterm_is_an_exit() -> Iterator[None]:
    """Inside the block a terminated process unwinds, so that its workers are stopped and its jobs cancelled."""

    def leave(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Worker:
    """A worker that is a process of this machine."""

    told = ""

    def __init__(self, place: Path, module: str) -> None:
        self.place = place
        # the worker finds the modules that this process would find, in the same order, and none beside its working folder
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with open(place / LOG, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(place / SPEC)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
            )

    def ended(self) -> str | None:
        """None while it runs, '' when it ended well, else why it failed."""
        code = self.process.poll()
        if code is None or code == 0:
            return None if code is None else ""
        if code < 0:
            return f"its process was killed ({signal.Signals(-code).name})" + ", perhaps for its memory" * (code == -9)
        return error_in(self.place / LOG) or f"its process ended with exit code {code}"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def error_in(log: Path) -> str:
    """The last error that a worker told its log, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return (told or lines or [""])[-1]


def as_worker(spec: Path, work: Callable[[dict[str, Any]], None], what: str, silence: float = SILENCE) -> None:
    """Do what a worker's file says, in its environment and folder; ends this process when `what` (the sweep ...) is gone.

    An error is told as the last line that begins with `Error: `, and raised.
    """
    try:
        asked = read_json(spec)
        os.environ.update(asked["environment"])  # before torch is imported
        os.chdir(asked["cwd"])
        given = asked["parent"], asked.get("alive"), what, silence
        threading.Thread(target=_leave_with, args=given, daemon=True).start()
        work(asked)
    except Exception as error:
        traceback.print_exc()
        told = str(error) if isinstance(error, LayerpruneError) else f"{type(error).__name__}: {one_line(error)}"
        print(f"Error: {' '.join(told.split())}", file=sys.stderr, flush=True)
        raise


def _leave_with(parent: int | None, alive: str | None, what: str, silence: float) -> None:
    """End this process when `parent` is no longer its parent, or the file `alive` is gone or no longer touched."""
    mark, since, gone = 0, time.monotonic(), False
    while not gone:
        time.sleep(1.0)
        gone = parent is not None and os.getppid() != parent
        if alive is not None:
            try:
                touched = os.stat(alive).st_mtime_ns
            except OSError as error:
                touched, gone = mark, isinstance(error, FileNotFoundError)
            if touched != mark:  # the clocks of two machines are not compared
                mark, since = touched, time.monotonic()
            gone = gone or time.monotonic() - since > silence
    print(f"Error: {what} that this belongs to is gone; the same command goes on with it", file=sys.stderr, flush=True)
    os._exit(1)
