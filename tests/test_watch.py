"""What is looked at while a healing trains: when it stops, what it saves, how often it measures the held-out loss."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from layerprune.heal import watch as watching
from layerprune.heal.checkpoints import mark, newest_checkpoint
from layerprune.heal.watch import DIVERGED, VALIDATION_SHARE, VALIDATIONS, Watch, duration
from layerprune.model.errors import Refused

torch.set_num_threads(1)

STEPS = 100
TOLD = SimpleNamespace(learning_rate=3e-4)
"""What a callback reads of the Trainer's arguments."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds that pass only when a test says so."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(watching.time, "perf_counter", lambda: clock.now)
    return clock


class Run:
    """A training by hand: `step(loss)` is one optimizer step that is logged, and whether a checkpoint was asked for."""

    def __init__(self, work: Path, validate: Callable[[], float] | None = None, every: int = 1, steps: int = STEPS) -> None:
        self.said: list[str] = []
        self.logged: list[tuple[int, float]] = []
        self.watch = Watch(work, every, 1000, self.said.append, False, validate, steps)
        self.watch.log = lambda numbers: self.logged.append((self.state.global_step, numbers["eval_normalised_loss"]))
        self.state = SimpleNamespace(global_step=0, max_steps=steps, log_history=[], is_world_process_zero=True)
        self.watch.on_train_begin(TOLD, self.state, None)

    def step(self, loss: float, **others: float) -> bool:
        self.state.global_step += 1
        control = SimpleNamespace(should_save=False, should_log=False)
        self.watch.on_step_end(TOLD, self.state, control)
        logs = {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-4, **others}
        self.watch.on_log(TOLD, self.state, control, logs=logs)
        return control.should_save


# Stops


def test_a_loss_that_stays_far_above_its_lowest_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for loss in (5.0, 3.0, 3.0 + DIVERGED - 0.01, 3.0 + DIVERGED + 0.1, 2.9, 2.9 + DIVERGED + 0.1):
        run.step(loss)  # one bad batch, or one that is high for long, is no divergence
    with pytest.raises(Refused) as refusal:
        run.step(4.75)
    told = str(refusal.value)
    assert "diverges: 4.75 nats a token at step 7 of 100, after 2.90 at its lowest" in told
    assert "smaller --learning-rate (it was 0.0003) or more warm-up steps" in told
    assert str(tmp_path) not in told, "nothing was saved"


@pytest.mark.parametrize("broken", [{"loss": float("nan")}, {"loss": float("inf")}, {"loss": 3.0, "grad_norm": float("nan")}])
def test_a_loss_that_is_no_number_is_refused_at_once(broken: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    mark(tmp_path / "checkpoint-2", 2, 1.0)
    run = Run(tmp_path)
    run.step(3.0)
    with pytest.raises(Refused) as refusal:
        run.step(**broken)
    told = str(refusal.value)
    assert "not a number at step 2 of 100" in told and "smaller --learning-rate (it was 0.0003)" in told
    assert f"the last good state stays in {tmp_path}, remove that folder to begin anew" in told
    assert re.fullmatch(r"[^.]*(\.\d[^.]*)*", told.replace(str(tmp_path), "")), "one sentence"


def test_a_climb_names_the_folder_only_where_a_whole_checkpoint_is(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").mkdir()  # cut short: without its mark
    run = Run(tmp_path)
    run.step(1.0)
    run.step(9.0)
    with pytest.raises(Refused) as refusal:
        run.step(9.0)
    assert "last good state" not in str(refusal.value)


def test_a_run_that_goes_on_knows_its_lowest_loss(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.state.log_history = [{"loss": 2.0, "step": 1}, {"eval_normalised_loss": 0.5, "step": 1}, {"loss": 2.5, "step": 2}]
    run.state.global_step = 2
    run.watch.on_train_begin(TOLD, run.state, None)
    assert run.watch.lowest == 2.0 and run.watch.first_held_out == 0.5
    run.step(9.0)
    with pytest.raises(Refused, match="after 2.00 at its lowest"):
        run.step(9.0)


def test_logs_of_other_things_are_passed_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.watch.on_log(TOLD, run.state, None, logs={"eval_normalised_loss": float("nan")})
    run.watch.on_log(TOLD, run.state, None, logs=None)


# What is saved


def test_a_checkpoint_is_asked_for_by_the_clock(tmp_path: Path, clock: SimpleNamespace) -> None:
    run, saved = Run(tmp_path), []
    for _ in range(9):
        clock.now += watching.SAVE_SECONDS / 3
        if run.step(2.0):
            saved.append(run.state.global_step)
            (tmp_path / f"checkpoint-{run.state.global_step}").mkdir()
            run.watch.on_save(TOLD, run.state, None)
    assert saved == [3, 6, 9]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "checkpoint-9"
    assert run.watch.seconds == pytest.approx(3 * watching.SAVE_SECONDS)


def test_nothing_is_saved_during_a_climb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SAVE_SECONDS", 0.0)
    run = Run(tmp_path)
    third = DIVERGED / 3
    asked = [run.step(loss) for loss in (3.0, 2.0, 2.0 + third, 2.0 + third + 0.01, 2.0 + 2 * third, 2.1)]
    assert asked == [True, True, True, False, False, True]


def test_nothing_is_saved_between_logs_or_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SAVE_SECONDS", 0.0)
    run = Run(tmp_path, every=2, steps=6)
    assert [run.step(2.0) for _ in range(6)] == [False, True, False, True, False, False]


def test_only_the_first_process_marks_a_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.state.is_world_process_zero = False
    (tmp_path / "checkpoint-0").mkdir()
    run.watch.on_save(TOLD, run.state, None)
    assert newest_checkpoint(tmp_path, remove=False) is None


# The held-out loss


def held_out(run: Run, clock: SimpleNamespace, seconds_a_step: float) -> list[int]:
    for _ in range(run.state.max_steps):
        clock.now += seconds_a_step
        run.step(2.0)
    return [step for step, _ in run.logged]


def test_the_held_out_loss_is_measured_at_both_ends_and_in_between_by_steps(tmp_path: Path, clock: SimpleNamespace) -> None:
    run = Run(tmp_path, lambda: 0.5)  # which takes no time
    every = STEPS // VALIDATIONS
    assert held_out(run, clock, 1.0) == list(range(0, STEPS + 1, every))


def test_measuring_takes_no_more_than_its_share_of_the_time(tmp_path: Path, clock: SimpleNamespace) -> None:
    def slow() -> float:
        clock.now += 2.0
        return 0.5

    run = Run(tmp_path, slow)
    measured = held_out(run, clock, 1.0)
    assert measured[0] == 0 and measured[-1] == STEPS and len(measured) >= 3
    for before, after in zip(measured, measured[1:-1], strict=False):
        assert VALIDATION_SHARE * ((after - before) * 1.0 + 2.0) >= 2.0 - 1e-9
    assert measured == [0, 38, 76, 100], "2 seconds of measuring for 38 of training: a twentieth"


def test_very_slow_measuring_happens_at_the_ends_alone(tmp_path: Path, clock: SimpleNamespace) -> None:
    def slow() -> float:
        clock.now += 1000.0
        return 0.5

    assert held_out(Run(tmp_path, slow), clock, 1.0) == [0, STEPS]


def test_the_held_out_loss_is_said_with_a_bar_of_where_it_began(tmp_path: Path, clock: SimpleNamespace) -> None:
    found = iter([0.5, 0.25, 2.0])
    run = Run(tmp_path, lambda: next(found), steps=2)
    run.step(2.0)
    run.step(2.0)
    assert [line.partition(":")[0] for line in run.said] == ["step 0 of 2", "step 1 of 2", "step 2 of 2"]
    assert [line.count("#") for line in run.said] == [40, 20, 60]
    assert "held-out loss 0.2500 (normalised)" in run.said[1] and run.logged == [(0, 0.5), (1, 0.25), (2, 2.0)]


def test_without_held_out_documents_nothing_is_measured(tmp_path: Path, clock: SimpleNamespace) -> None:
    assert held_out(Run(tmp_path, None), clock, 1.0) == []


# Pace


def test_the_time_left_is_told_once_from_the_fourth_step(tmp_path: Path, clock: SimpleNamespace) -> None:
    run = Run(tmp_path)
    for seconds in (50.0, 2.0, 2.0, 2.0, 9.0, 9.0):  # the first one pays for warming up
        clock.now += seconds
        run.step(2.0)
    assert run.said == ["2 s a step (500 tokens/s): about 3 minutes left"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 seconds"), (89.4, "89 seconds"), (90, "2 minutes"), (720, "12 minutes"), (5399, "90 minutes"),
        (5400, "1.5 hours"), (12_600, "3.5 hours"),
    ],
)  # fmt: skip
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# Under transformers' own Trainer


class Line(nn.Module):
    """y = w x, whose loss is a number that a test can break."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.calls = 0
        self.broken_from = 10**9

    def forward(self, x: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        loss = (self.w * x).square().mean()
        return {"loss": loss * float("nan") if self.calls > self.broken_from else loss}


def trained(work: Path, steps: int, every: int, broken_from: int = 10**9) -> tuple[Trainer, list[str]]:
    said: list[str] = []
    watch = Watch(work, every, 1000, said.append, False, lambda: 0.5, steps)
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=steps, per_device_train_batch_size=1, logging_steps=every, logging_nan_inf_filter=False,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    model = Line()
    model.broken_from = broken_from
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"x": torch.ones(1)}] * 4, callbacks=[watch])  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    watch.log = trainer.log
    trainer.train()
    return trainer, said


@pytest.mark.parametrize(("steps", "every"), [(6, 2), (7, 2), (7, 3), (3, 5)])
def test_the_last_step_is_logged_whatever_the_number_of_steps(steps: int, every: int, tmp_path: Path) -> None:
    trainer, said = trained(tmp_path, steps, every)
    history = trainer.state.log_history
    assert [e["step"] for e in history if "loss" in e] == sorted({*range(every, steps + 1, every), steps})
    measured = [e["step"] for e in history if "eval_normalised_loss" in e]
    assert measured[0] == 0 and measured[-1] == steps and len(measured) == len(set(measured))
    assert said[-1].startswith(f"step {steps} of {steps}: held-out loss 0.5000")


def test_a_loss_that_breaks_in_the_last_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not a number at step 7 of 7"):
        trained(tmp_path, 7, 3, broken_from=6)


def test_a_checkpoint_of_a_trainer_is_marked_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SAVE_SECONDS", 0.0)
    trained(tmp_path, 6, 2)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "checkpoint-4" and (newest / "trainer_state.json").exists()


def test_a_stop_between_two_entries_of_the_loss_is_saved_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Watch.on_step_begin

    def on_step_begin(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step == 4:
            self.stop()

    monkeypatch.setattr(Watch, "on_step_begin", on_step_begin)
    trainer, said = trained(tmp_path, 9, 3)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "checkpoint-5" and trainer.state.global_step == 5
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [3, 5]
    assert said[-1] == "stopping after this step, which is saved; once more stops at once"


def test_a_stop_where_the_loss_climbs_saves_nothing(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 1, 16, lambda line: None, False, None, 10)
    state, args = SimpleNamespace(global_step=0, max_steps=10, log_history=[]), SimpleNamespace(learning_rate=1.0)
    watch.on_train_begin(None, state, None)
    watch.stop()
    found = []
    for state.global_step, loss in ((1, 1.0), (2, 1.0 + watching.DIVERGED / 2)):
        control = SimpleNamespace(should_save=False)
        watch.on_log(args, state, control, logs={"loss": loss})
        found.append(control.should_save)
    assert found == [True, False]


def test_a_held_out_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 1, 16, lambda line: None, False, lambda: float("nan"), 10)
    state = SimpleNamespace(global_step=0, max_steps=10, log_history=[])
    with pytest.raises(Refused, match="held-out loss is not a number at step 0 of 10: look at the weights"):
        watch.on_train_begin(None, state, None)


def test_a_checkpoint_that_lost_a_file_gives_way_to_the_one_before(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors").write_bytes(b"weights")
        mark(tmp_path / f"checkpoint-{step}", step, 1.0)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"weig")
    assert newest_checkpoint(tmp_path, remove=False) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / "adapter_model.safetensors").unlink()
    assert newest_checkpoint(tmp_path) is None and not list(tmp_path.glob("checkpoint-*"))
