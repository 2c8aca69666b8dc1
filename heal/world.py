"""Several processes that heal together: who is the first, and what the others wait for."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from layerprune.model.errors import LayerpruneError, Refused, UsageError

Value = TypeVar("Value")


def world_size() -> int:
    """Processes of this healing, as `accelerate launch` or torchrun started them; 1 alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """Processes of this healing on this machine, which share its memory."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if world_size() > 1 else 1


def rank() -> int:
    """The number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def check_world(batch_size: int, device: str, distilled: bool = False) -> None:
    """Refuse a batch that the processes cannot share, and sharding where it is left undone: on a CPU, and with a teacher."""
    world = world_size()
    if batch_size % world:
        raise UsageError(f"--batch-size {batch_size} cannot be shared by {world} processes: use a multiple of {world}")
    if is_sharded() and device == "cpu":
        raise UsageError("FSDP shards a model over GPUs, and --device is cpu: heal on the CPU with recipes/accelerate/ddp.yaml")
    if is_sharded() and distilled:
        raise UsageError(
            "--distil needs the model whole on each GPU, which FSDP shards: leave it out, or use recipes/accelerate/ddp.yaml"
        )


def is_echo(error: BaseException) -> bool:
    """Whether another process says the same of this refusal: of its settings, or of what the first one alone did."""
    if rank() == 0:
        return False
    import torch.distributed

    return bool(getattr(error, "from_the_first", False)) or not torch.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def local_device(kind: str) -> str:
    """The device of this process: each has a GPU of its own."""
    if world_size() > 1 and kind == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return kind


def is_sharded() -> bool:
    """Whether `accelerate launch` was asked for FSDP, which shards the model over the processes."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def join(device: str) -> None:
    """Meet the other processes; the first call connects them."""
    if world_size() > 1:
        from accelerate import PartialState

        # the first process may tokenise for hours while the others wait
        PartialState(cpu=device == "cpu", timeout=timedelta(days=1)).wait_for_everyone()


def first_alone(work: Callable[[], Value], device: str) -> Value:
    """Let the first process do `work` while the others wait, and give all of them its result.

    What the first process refuses, the others refuse as well. The result travels by pickle.
    """
    if world_size() == 1:
        return work()
    import torch.distributed

    join(device)
    told: list[Any] = [None, None]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            told[1] = work()
        except BaseException as error:  # the others must not wait for a process that is gone
            failure = error
            known = isinstance(error, LayerpruneError)
            told[0] = (type(error) if known else Refused, str(error) if known else f"the first process failed: {error!r}")
    torch.distributed.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        kind, message = told[0]
        refusal: Any = kind(message)
        refusal.from_the_first = True
        raise refusal
    return told[1]  # type: ignore[no-any-return]


def leave() -> None:
    """Disconnect from the other processes, at the end."""
    if world_size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def agreed(choice: bool) -> bool:
    """What the first process chooses, where each would go by its own clock."""
    if world_size() == 1:
        return choice
    import torch.distributed

    told = [choice]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def summed(values: list[float], device: Any) -> list[float]:
    """The sum of each value over all processes."""
    if world_size() == 1:
        return values
    import torch

    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return [float(v) for v in total.tolist()]
