"""Ctrl-C while a healing trains: the step is finished and saved, and the same command goes on from it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from layerprune.cli import main
from layerprune.heal import trainer
from layerprune.heal.interrupt import first_interrupt
from layerprune.heal.train import heal_checkpoint
from layerprune.model.errors import Stopped

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    """What raises KeyboardInterrupt, also where the tests run in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def base(build_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "cut"
    return build_llama(folder, layers=2, hidden=64, dtype=torch.bfloat16, intermediate_size=128, max_position_embeddings=128)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, prose: list[str]) -> str:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    return str(path)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Send SIGINT in the middle of a step, counted from 1."""
    work = trainer.Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return work(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "training_step", training_step)


def arguments(base: Path, data: str, out: Path) -> list[str]:
    given = ["--heal-steps", "6", "--batch-size", "4", "--length", "32", "--lora-rank", "4", "--learning-rate", "2e-2"]
    return ["heal", "--model", str(base), "--heal-data", data, "--out", str(out), "--device", "cpu", *given]


def test_a_stopped_healing_goes_on_from_the_step_that_it_was_stopped_in(
    base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    assert CliRunner().invoke(main, arguments(base, data, whole)).exit_code == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        found = CliRunner().invoke(main, arguments(base, data, out))
    assert found.exit_code == 130 and "stopping after this step" in found.stderr and not out.exists()
    work = tmp_path / ".stopped.work"
    told = f"Stopped: the same command goes on from step 3 of 6 (saved in {work})"
    assert found.stderr.splitlines()[-1] == told and "Aborted" not in found.output
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "it is put back"
    again = CliRunner().invoke(main, arguments(base, data, out))
    assert again.exit_code == 0 and "going on from step 3 of 6" in again.stderr and not work.exists()
    losses = [json.loads((folder / "layerprune.json").read_text())["healing"]["losses"] for folder in (whole, out)]
    assert losses[0] == losses[1] and len(losses[0]["curve"]) == 6
    one, other = (sorted(folder.rglob("*.safetensors")) for folder in (whole, out))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other] and len(one) >= 2


def test_a_second_interrupt_stops_at_once(base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 3, times=2)
    small: dict[str, Any] = {"steps": 6, "batch_size": 4, "length": 32, "lora_rank": 4, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt) as raised:
        heal_checkpoint(base, tmp_path / "out", data=data, report=lambda line: None, **small)
    assert not isinstance(raised.value, Stopped)
    assert not list((tmp_path / ".out.work").glob("checkpoint-*")) and not (tmp_path / "out").exists()


def test_an_interrupt_in_the_last_step_lets_the_healing_end(
    base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 6)
    small: dict[str, Any] = {"steps": 6, "batch_size": 4, "length": 32, "lora_rank": 4, "device": "cpu"}
    said: list[str] = []
    result = heal_checkpoint(base, tmp_path / "out", data=data, report=said.append, **small)
    assert "that was the last step: the adapter is merged" in said
    assert [step for step, _ in result["losses"]["curve"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("other", [signal.SIG_IGN, lambda number, frame: None])
def test_a_handler_of_somebody_else_stays(other: Any) -> None:
    signal.signal(signal.SIGINT, other)
    with first_interrupt(lambda: pytest.fail("heard")):
        assert signal.getsignal(signal.SIGINT) is other
        os.kill(os.getpid(), signal.SIGINT)
