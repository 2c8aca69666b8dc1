"""Liger's kernels in a model that trains: norms, rotary embeddings and gated MLPs, put in, proven, and taken out again.

The package (liger-kernel) changes some modules of the live model, and names in transformers' own modules: its rotary embedding is
there only. Left so, every model that is loaded later would run on Triton, the CPU's proof of the result too; so all that it
changed is put back. Its loss is not taken: ours is in slices already, and keeps no gradient of the frozen head.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from layerprune.heal.memory import trained_layers
from layerprune.heal.student import Student, still
from layerprune.heal.world import is_sharded
from layerprune.model.errors import Refused, UsageError, one_line

Say = Callable[[str], None]
LOSS_APART, GRADIENTS_APART = 0.01, 0.2
"""What may lie between the losses, and between the gradients (Frobenius norm), with and without other kernels, of their size.
Rounding to bfloat16 makes thousandths of the one and hundredths of the other; a wrong kernel makes the size itself."""
_ABSENT = object()
_TOKENS = 512
"""Tokens on which the kernels are tried before a plan is made."""


def check_kernels(config: Any, device: str) -> None:
    """Refuse liger's kernels where they cannot run: before anything is loaded, and in one sentence."""
    if not device.startswith("cuda"):
        raise UsageError(f"--kernels liger needs a CUDA GPU, and this healing runs on {device}: leave it out")
    if is_sharded():
        raise UsageError("--kernels liger is for a model that trains whole on each GPU, not for FSDP: leave it out")
    kind = str(getattr(config, "model_type", None))
    served = _families()
    if kind not in served:
        some = ", ".join(name for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3") if name in served)
        raise Refused(f"liger has no kernels for the layers of {kind} models (it has for {some}, ...): leave --kernels out")


def _families() -> Mapping[str, Callable[..., None]]:
    """liger's functions by model type, of those whose norms it replaces."""
    # it tells of backends that are not installed, one line each
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    try:
        import triton  # noqa: F401 (liger's own error would name a module of its inside)
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as found
    except ImportError as error:
        raise UsageError(
            f"--kernels liger needs the packages liger-kernel and triton ({one_line(error)}): pip install 'layerprune[liger]'"
        ) from error
    return {kind: apply for kind, apply in found.items() if "rms_norm" in inspect.signature(apply).parameters}


@contextlib.contextmanager
def patched(model: Any) -> Iterator[None]:
    """Run `model` with liger's kernels; in the end every attribute and every module's global that it changed is as it was."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    spaces = [module.__dict__ for module in model.modules()]
    spaces += [m.__dict__ for name, m in list(sys.modules.items()) if name.startswith("transformers.models.") and m is not None]
    before = [dict(space) for space in spaces]
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        try:
            _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        finally:
            for space, old in zip(spaces, before, strict=True):
                changed += [(space, key, old.get(key, _ABSENT)) for key in space if space[key] is not old.get(key, _ABSENT)]
            before.clear()
        yield
    finally:
        for space, key, value in changed:
            if value is _ABSENT:
                space.pop(key, None)
            else:
                space[key] = value


@contextlib.contextmanager
def kernels_in_use(
    kernels: str | None, student: Student, row: Mapping[str, torch.Tensor], compute: torch.dtype, say: Say
) -> Iterator[Callable[[int], None]]:
    """Train with other kernels inside the block, proven on one sequence to give the loss and gradients that the model's own give.

    kernels: None for the model's own. row: input_ids, labels and maybe position_ids of a sequence, (tokens,). Yields a
    function that proves it once more as the student is set up by then, with that many copies of the row. Raises Refused where
    the two differ, or the kernels do not run.
    """
    if kernels is None:
        yield lambda rows: None
        return
    layers = trained_layers(student)
    short = {key: value[:_TOKENS] for key, value in row.items()}
    with _again(student, layers):  # computed again, which takes least
        plain, plain_short = (one_step(student, one, 1, compute) for one in (row, short))
    with contextlib.ExitStack() as stack:
        with _told(student):
            stack.enter_context(patched(student.decoder.model))
        with _again(student, layers[::2]), _told(student):
            found = one_step(student, short, 1, compute)
        say(f"liger's kernels: {_apart(plain_short, found, student)}")

        def prove(rows: int) -> None:
            with _told(student):
                found = one_step(student, row, rows, compute)
            say(f"liger's kernels as planned: {_apart(plain, found, student)}")

        yield prove


@contextlib.contextmanager
def _again(student: Student, layers: Sequence[int]) -> Iterator[None]:
    """These layers are computed again in the backward pass, and none is compiled."""
    before = student.recomputed, student.compiled
    student.recomputed, student.compiled = frozenset(layers), False
    try:
        yield
    finally:
        student.recomputed, student.compiled = before


def one_step(
    student: Student, row: Mapping[str, torch.Tensor], rows: int, compute: torch.dtype
) -> tuple[float, list[torch.Tensor]]:
    """Loss a token and the adapters' gradients (float32, on the CPU) of `rows` copies of a row, without dropout."""
    decoder = student.decoder
    batch: Any = {key: value.to(decoder.device).expand(rows, -1).contiguous() for key, value in row.items()}
    parameters = [p for p in decoder.model.parameters() if p.requires_grad]
    with student.installed(), still(decoder.model):
        with torch.autocast(decoder.device.type, torch.bfloat16, enabled=compute == torch.bfloat16):
            loss = student.loss(**batch)["loss"]
        loss.backward()
    gradients = [torch.zeros(p.shape) if p.grad is None else p.grad.float().cpu() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return float(loss.detach()), gradients


@contextlib.contextmanager
def _told(student: Student) -> Iterator[None]:
    """Refuse what a kernel, or putting it in, trips over: it is not what the model needs."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        kind = type(student.decoder.model).__name__
        raise Refused(f"liger's kernels do not run in this {kind} ({one_line(error)}): leave --kernels out") from error


def _apart(plain: tuple[float, list[torch.Tensor]], found: tuple[float, list[torch.Tensor]], student: Student) -> str:
    """How far a step with the kernels is from one without, for people; Refused where it is another step."""
    loss = abs(found[0] - plain[0]) / abs(plain[0])
    size = sum(float(g.square().sum()) for g in plain[1]) ** 0.5
    gradients = sum(float((a - b).square().sum()) for a, b in zip(plain[1], found[1], strict=True)) ** 0.5 / max(size, 1e-30)
    told = (
        f"the loss of a sequence is that of the model's own within {loss:.1e} of it, the adapters' gradients within {gradients:.1e}"
    )
    if not (loss <= LOSS_APART and gradients <= GRADIENTS_APART):
        raise Refused(
            f"liger's kernels do not compute what this {type(student.decoder.model).__name__} does: the loss of a sequence differs "
            f"by {loss:.1e} of it, the adapters' gradients by {gradients:.1e}; leave --kernels out"
        )
    return told
