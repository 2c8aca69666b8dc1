"""What is looked at while a healing trains: its pace, its loss, the held-out loss, and when it must stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from layerprune.heal.checkpoints import mark, newest_checkpoint
from layerprune.heal.memory import context_bytes
from layerprune.heal.sharded import ADAPTER, gather_adapter, restore_adapter
from layerprune.heal.world import agreed, is_sharded
from layerprune.model.errors import Refused

Say = Callable[[str], None]
SAVE_SECONDS = 120.0
"""Training time between two checkpoints; it does not touch the results."""
DIVERGED = 1.5
"""Nats a token above its lowest from which a training loss counts as diverging, and as one third of which it is not saved."""
VALIDATIONS = 20
"""How often the held-out loss is measured in a run, at most, and once at each end."""
VALIDATION_SHARE = 0.05
"""Of the time of training that measuring it may take."""


class Watch(TrainerCallback):
    """Progress, the time that is left, checkpoints by the clock, and a stop when the loss is no number or climbs.

    validate: gives the held-out loss, normalised (None: there is none). log: hands numbers to the Trainer's own reports.
    wrapped: gives the model that the Trainer runs.
    """

    def __init__(
        self, work: Path, every: int, tokens: int, say: Say, progress: bool, validate: Callable[[], float] | None = None,
        steps: int = 0,
    ) -> None:  # fmt: skip
        self.work, self.every, self.tokens, self.say, self.progress = work, every, tokens, say, progress
        self.validate = validate
        self.validate_every = max(1, -(-steps // VALIDATIONS))
        self.log: Callable[[dict[str, float]], None] = lambda numbers: None
        self.wrapped: Callable[[], Any] = lambda: None
        self.bar: Any = None
        self.spent = 0.0
        self.timed: list[float] = []
        self.lowest = math.inf
        self.above = 0
        self.latest = math.inf
        self.first_held_out: float | None = None
        self.peak: int | None = None
        self.stopping = False
        self.measured = self.next_step = 0.0

    @property
    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self.started

    def stop(self) -> None:
        """End training after the step that is going on, saved; safe to call from a signal handler."""
        self.stopping = True
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another line
            (self.say if self.bar is None else self._tell)("stopping after this step, which is saved; once more stops at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        self.started = self.saved = time.perf_counter()
        if is_sharded():
            if state.global_step:
                restore_adapter(self.wrapped(), load_file(self.work / f"checkpoint-{state.global_step}" / ADAPTER))
        else:  # FSDP steps on shards, which have moments of their own
            _make_moments(kwargs.get("optimizer"))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="heal", unit="step", disable=not self.progress)
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.lowest = min(losses, default=math.inf)
        self.first_held_out = next((e["eval_normalised_loss"] for e in state.log_history if "eval_normalised_loss" in e), None)
        if state.global_step == 0:
            self._held_out(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            # all of the device that this process took: tensors at their most, and what is there besides
            self.peak = torch.cuda.max_memory_reserved() + context_bytes(torch.device("cuda", torch.cuda.current_device()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)
        now = time.perf_counter()
        self.timed.append(now)
        left = state.max_steps - state.global_step
        if not left or self.stopping:
            # the last steps are looked at too, where their number is no multiple of `every`
            control.should_log = True
            control.should_training_stop = True
        if self.stopping and not left:
            self._tell("that was the last step: the adapter is merged")
        # The first steps pay for warming up; the fourth is the first honest one.
        if len(self.timed) == 4 and left:
            step = (now - self.timed[0]) / 3
            self._tell(f"{step:.2g} s a step ({self.tokens / step:,.0f} tokens/s): about {duration(step * left)} left")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss = logs["loss"]
        if not all(math.isfinite(logs.get(key, 0.0)) for key in ("loss", "grad_norm")):
            raise Refused(
                f"the training loss is not a number at step {state.global_step} of {state.max_steps}: heal with a smaller "
                f"--learning-rate (it was {args.learning_rate:g}), or, at the first step, look at the weights{self._left()}"
            )
        self.lowest, self.latest = min(self.lowest, loss), loss
        self.above = self.above + 1 if loss > self.lowest + DIVERGED else 0
        if self.above >= 2:
            raise Refused(
                f"the training loss diverges: {loss:.2f} nats a token at step {state.global_step} of {state.max_steps}, after "
                f"{self.lowest:.2f} at its lowest; heal with a smaller --learning-rate (it was {args.learning_rate:g}) or more "
                f"warm-up steps{self._left()}"
            )
        self.bar.set_postfix(loss=f"{loss:.3f}")
        step, now = state.global_step, time.perf_counter()
        due = step >= self.next_step and now >= self.measured
        if step == state.max_steps or agreed(due and not self.stopping):
            self._held_out(state)
        # What is saved was finite and no climb.
        good = loss <= self.lowest + DIVERGED / 3 and step < state.max_steps
        timed = step % self.every == 0 and now - self.saved >= SAVE_SECONDS
        if agreed(good and (timed or self.stopping)):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.perf_counter()
        gathered = gather_adapter(self.wrapped()) if is_sharded() else None
        if state.is_world_process_zero:
            if gathered is not None:
                save_file(gathered, self.work / f"checkpoint-{state.global_step}" / ADAPTER)
            mark(self.work / f"checkpoint-{state.global_step}", state.global_step, self.seconds)

    def _held_out(self, state: Any) -> None:
        if self.validate is None:
            return
        started = time.perf_counter()
        found = self.validate()
        if not math.isfinite(found):
            told = "look at the weights" if state.global_step == 0 else "heal with a smaller --learning-rate"
            at = f"at step {state.global_step} of {state.max_steps}"
            raise Refused(f"the held-out loss is not a number {at}: {told}{self._left()}")
        spent = time.perf_counter() - started
        self.measured, self.next_step = started + spent / VALIDATION_SHARE, state.global_step + self.validate_every
        if self.first_held_out is None:
            self.first_held_out = found
        self.log({"eval_normalised_loss": round(found, 6)})
        self._tell(f"step {state.global_step:,} of {state.max_steps:,}: held-out loss {found:.4f} (normalised) {self._bar(found)}")

    def _tell(self, line: str) -> None:
        """A line of its own, which the bar makes room for."""
        self.bar.clear()
        self.say(line)
        self.bar.refresh()

    def _bar(self, found: float) -> str:
        """The held-out loss as a line whose whole length is where it began."""
        assert self.first_held_out is not None
        return "#" * max(0, min(60, round(40 * found / self.first_held_out)))

    def _left(self) -> str:
        if newest_checkpoint(self.work) is None:
            return ""
        return f"; the last good state stays in {self.work}, remove that folder to begin anew with other settings"


def _make_moments(optimizer: Any) -> None:
    """Adam's moments before the first activations: made after them, they would lie scattered in the room that those leave."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.AdamW):
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            if parameter.device.type == "cuda" and not inner.state[parameter] and group["fused"] and not group["amsgrad"]:
                inner.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }


def duration(seconds: float) -> str:
    """Seconds in words: `40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
