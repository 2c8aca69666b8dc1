"""What is compiled for a GPU, by a stand-in of a compiler: used, given up where it fails, kept where memory is short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from layerprune.depth.fused import fused


def added(a: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return a + 1 if b is None else a + b


@pytest.fixture
def compile_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], Callable[..., torch.Tensor]]:
    def made(compiled: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        monkeypatch.setattr(torch, "compile", lambda plain: compiled)
        fused.cache_clear()
        return fused(added, "cuda")

    return made


def test_a_cpu_runs_the_plain_steps() -> None:
    assert fused(added, "cpu") is added


def test_rows_may_change_and_other_sizes_are_known(compile_to: Any) -> None:
    seen: list[Any] = []
    run = compile_to(lambda a, b: (seen.append(getattr(a, "_dynamo_weak_dynamic_indices", None)), added(a, b))[1])
    assert torch.equal(run(torch.ones(3, 2), None), torch.full((3, 2), 2.0)) and seen == [{0}]


def test_what_does_not_compile_is_tried_once(compile_to: Any) -> None:
    tried: list[int] = []

    def broken(*given: Any) -> Any:
        tried.append(1)
        raise RuntimeError("no compiler")

    run = compile_to(broken)
    for _ in range(3):
        assert torch.equal(run(torch.ones(2, 2), torch.ones(2, 2)), torch.full((2, 2), 2.0))
    assert tried == [1]


def test_a_full_gpu_is_no_broken_compiler(compile_to: Any) -> None:
    answers = iter([torch.cuda.OutOfMemoryError("full"), None])

    def full_once(*given: Any) -> Any:
        error = next(answers)
        if error is not None:
            raise error
        return "compiled"

    run = compile_to(full_once)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(torch.ones(2, 2), None)
    assert run(torch.ones(2, 2), None) == "compiled"
