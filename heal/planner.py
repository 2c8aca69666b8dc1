"""What a healing keeps in memory: chosen for the fastest step within a budget, from a few layers that are measured.

Three things trade memory for time: sequences at once (more of them share a decoding of the weights), weights kept decoded
from NF4, and activations kept for the backward pass instead of computed again. Each costs and gains the same per layer, so
one layer of each kind is run forward and back, and every plan's peak and time follow by adding up.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from layerprune.heal.linear import four_bit_linears
from layerprune.heal.measure import Measured, Meter, autocast
from layerprune.heal.memory import GIB, Memory, apply_plan, context_bytes, trained_layers
from layerprune.heal.student import Student
from layerprune.model.errors import Refused

MOST_TOKENS = 32_768
"""Tokens of a micro-batch above which more of them gain nothing."""
COMPILED_TOKENS = 8192
"""Tokens at which compiled layers are measured; other sizes are scaled from there, since each costs a compilation."""
COMPILE_WORTH = 240.0
"""Seconds of training from which compiling layers pays for itself."""
MEASURE_WORTH = 1800.0
"""Seconds of training from which compiled layers are measured at every size."""
SLACK = 1.03
"""Bytes that an allocator holds for a byte that is asked of it, at the peak."""
HEADROOM = 0.97
"""Of the room for tensors, what a plan may take in its trial; the rest is for what training does differently."""
OWN_SHARE = 0.92
"""Of the memory that is free, what is taken where no budget is given."""


class Planner:
    """Plans for one student on one GPU."""

    def __init__(
        self, student: Student, length: int, steps: int, sequences: int, positions_T: torch.Tensor | None, world: int = 1,
        compiles: bool = True,
    ) -> None:  # fmt: skip
        """sequences: of one step on this device; positions_T: as documents restart them, None where they do not; compiles:
        whether layers may be compiled."""
        self.compiles = compiles
        self.student, self.length, self.steps, self.sequences = student, length, steps, sequences
        self.device = student.decoder.device
        self.meter = Meter(student, length, positions_T)
        self.trained = trained_layers(student)
        order = [*self.trained, *sorted(set(range(len(student.decoder))) - set(self.trained))]
        self.weights = [(i, four_bit_linears(student.decoder.layers[i])) for i in order]
        # counted once: weights that a trial has decoded are packed no more
        self.grows = [sum(part.decoded_bytes - part.packed_bytes for part in parts) for _, parts in self.weights]
        self.parameters = [p for p in student.decoder.model.parameters() if p.requires_grad]
        adapters = sum(p.numel() for p in self.parameters)
        # Adam's two moments; several processes also hold the gradients in the buckets that they exchange
        self.later = adapters * (8 if world == 1 else 12)
        self._pool: list[Measured] = []

    def choose(self, sizes: Sequence[int], budget: int | None, say: Callable[[str], None]) -> Memory:
        """The fastest plan within `budget` bytes of the device, None for most of what is free. Raises Refused for none."""
        most, context = self.room(budget)
        room = int(most * HEADROOM)
        self._allow(room)
        try:
            plan = self._choose(sizes, room, say)
        finally:
            self._allow(most)
        if plan is not None:
            return replace(plan, estimate=(plan.estimate or 0) + context)
        raise Refused(
            f"healing does not fit in {(most + context) / GIB:.1f} GiB with sequences of {self.length} tokens: use a smaller "
            "--length, a smaller --lora-rank or more --memory"
        )

    def _choose(self, sizes: Sequence[int], room: int, say: Callable[[str], None]) -> Memory | None:
        with self._gradients():
            static = torch.cuda.memory_allocated(self.device) + self.later
            decode_seconds = self.meter.decode_seconds([parts for _, parts in self.weights])
            measured = self._measure_sizes(sizes, static, room)
            best = self._best(measured, static, room, decode_seconds)
            if best is not None and self.compiles and (best.seconds or 0) * self.steps > COMPILE_WORTH:
                best = self._compiled(best, sizes, static, room, decode_seconds, say) or best
            eager = self._best(measured, static, room, decode_seconds)
            pool = self._pool if best is not None and best.compiled else measured
            while best is not None:
                try:
                    tried = self._try(best)
                except Exception as error:  # a compiler that trips over a whole pass: the layers run as they are
                    if not best.compiled:
                        raise
                    say(f"the layers are not compiled ({type(error).__name__})")
                    best, pool = eager, measured
                    continue
                if tried is not None:
                    return tried
                # weights that were decoded for the trial stay so
                room = int(room * 0.95)
                best = self._best(pool, static, room, decode_seconds, best.compiled, best.decoded)
        return None

    def _allow(self, room: int) -> None:
        """Let tensors take `room` bytes of the device and no more."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(room, 1) / total), self.device)

    def room(self, budget: int | None) -> tuple[int, int]:
        """(bytes that tensors may take, bytes of the device that are taken by other than tensors)."""
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        if budget is None:
            room = int((free + reserved) * OWN_SHARE)
            context = 0
        else:
            context = context_bytes(self.device)
            room = min(budget - context, free + reserved)
        return room, context

    def _best(
        self, measured: Sequence[Measured], static: int, room: int, decode_seconds: float, compiled: bool = False,
        floor: int = 0,
    ) -> Memory | None:  # fmt: skip
        found: list[Memory] = []
        for one in measured:
            for decoded in range(floor, len(self.weights) + 1):
                for recomputed in range(len(self.trained) + 1):
                    peak = self.peak(one, static, decoded, recomputed)
                    if peak <= room:
                        seconds = self.seconds(one, decoded, recomputed, decode_seconds)
                        found.append(Memory(one.micro_batch, recomputed, decoded, compiled, peak, seconds))
                        break  # more recomputing is slower
        # of plans that are as fast, the one that takes less
        fastest = min((plan.seconds or 0 for plan in found), default=0.0)
        return min((plan for plan in found if (plan.seconds or 0) <= 1.005 * fastest), key=lambda p: p.estimate or 0, default=None)

    def peak(self, one: Measured, static: int, decoded: int, recomputed: int) -> int:
        """Bytes of tensors at the peak of a step."""
        again, kept = self.trained[:recomputed], self.trained[recomputed:]
        more = sum(self.grows[:decoded])
        behind = sum(one.layers[i].again for i in again) + sum(one.layers[i].kept for i in kept)
        # in the backward pass a layer's own share is freed after it, so the first one back is at the peak
        back = max([one.layers[i].kept_back for i in kept] or [one.layers[i].again_back for i in again] or [0])
        late = sum(one.layers[i].again for i in again) + max([one.layers[i].again_back for i in again] or [0])
        shared = 2 * one.state if self.student.teaching else 0
        fixed = static + more + one.inputs + shared
        return int(SLACK * (fixed + max(behind + one.head, behind + one.state + back, late + one.state)))

    def seconds(self, one: Measured, decoded: int, recomputed: int, decode_seconds: float) -> float:
        """Of one optimizer step."""
        again, kept = self.trained[:recomputed], self.trained[recomputed:]
        rest = [i for i in self.student.kept if i < min(self.trained, default=0)]
        times = sum(one.layers[i].again_seconds for i in again) + sum(one.layers[i].kept_seconds for i in kept)
        times += sum(one.layers[i].forward_seconds for i in rest) + one.head_seconds
        teaching = self.student.teaching
        taught = set(range(teaching.shared, len(self.student.decoder))) if teaching else set()
        times += sum(one.layers[i].forward_seconds for i in taught)
        each = decode_seconds
        for i, _ in self.weights[:decoded]:
            passes = 3 if i in again else 2 if i in kept else 1 if i in rest else 0
            times -= each * (passes + (i in taught))
        return times * self.sequences / one.micro_batch

    def _compiled(
        self, eager: Memory, sizes: Sequence[int], static: int, room: int, decode_seconds: float, say: Callable[[str], None]
    ) -> Memory | None:
        """The best plan with compiled layers, None where they cannot be compiled or are no faster."""
        long = (eager.seconds or 0) * self.steps > MEASURE_WORTH
        fitting = [size for size in sizes if size * self.length <= (MOST_TOKENS if long else COMPILED_TOKENS)] or [min(sizes)]
        self.student.compiled = True
        say("compiling the layers")
        self._pool = []
        try:
            for size in sorted(fitting) if long else [max(fitting)]:
                self._pool.append(self.meter.measure(size))
        except torch.cuda.OutOfMemoryError:  # larger sizes do not fit
            torch.cuda.empty_cache()
        except Exception as error:  # whatever a compiler trips over: the layers run as they are
            say(f"the layers are not compiled ({type(error).__name__})")
            self._pool = []
        if not self._pool:
            self.student.compiled = False
            return None
        if not long:
            one = self._pool[0]
            self._pool = [one.scaled(size) for size in sizes if size * self.length <= MOST_TOKENS] or [one]
        best = self._best(self._pool, static, room, decode_seconds, True)
        if best is None or (best.seconds or 0) > 0.97 * (eager.seconds or 0):
            self.student.compiled = False
            return None
        return best

    def _measure_sizes(self, sizes: Sequence[int], static: int, room: int) -> list[Measured]:
        found: list[Measured] = []
        for size in sorted(sizes):
            if found and size * self.length > MOST_TOKENS:
                break
            try:
                one = self.meter.measure(size)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            found.append(one)
            if self.peak(one, static, 0, len(self.trained)) > room:
                break
        return found

    @contextlib.contextmanager
    def _gradients(self) -> Iterator[None]:
        """The adapters' gradients in place, so that a backward pass adds to them."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.grad = None
            gc.collect()
            torch.cuda.empty_cache()

    def _try(self, plan: Memory) -> Memory | None:
        """Two micro-batches under the plan: what they took, in bytes and seconds a step; None where it does not fit."""
        student = self.student
        apply_plan(student, plan, self.trained, [i for i, _ in self.weights])
        vocab = student.decoder.model.get_input_embeddings().weight.shape[0]
        ids_BT = torch.randint(0, vocab, (plan.micro_batch, self.length), device=self.device)
        held = torch.empty(self.later, dtype=torch.uint8, device=self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            for _ in range(2):
                torch.cuda.synchronize(self.device)
                started = time.perf_counter()
                with autocast(self.device):
                    loss = student.loss(ids_BT, ids_BT, **self.meter.inputs(plan.micro_batch))["loss"]
                loss.backward()
                torch.cuda.synchronize(self.device)
                seconds = time.perf_counter() - started
                del loss
            took = torch.cuda.max_memory_reserved(self.device)
            return replace(plan, estimate=took, seconds=seconds * self.sequences / plan.micro_batch)
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            del held
            torch.cuda.empty_cache()
