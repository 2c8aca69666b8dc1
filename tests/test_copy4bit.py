"""A healed checkpoint's copy in NF4 loads, and is what quantising the checkpoint gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from layerprune.heal import copy4bit
from layerprune.heal.copy4bit import write_nf4_copy
from layerprune.heal.train import heal_checkpoint
from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import read_json
from layerprune.model.tensors import read_checkpoint
from layerprune.prune.cut import prune_checkpoint

torch.set_num_threads(1)


@pytest.fixture
def cut(run_inputs: Path, tmp_path: Path) -> Path:
    prune_checkpoint(run_inputs / "model", tmp_path / "cut", layers="3:5", say=lambda line: None)
    return tmp_path / "cut"


def heal(cut: Path, run_inputs: Path, out: Path, **given: Any) -> dict[str, Any]:
    return heal_checkpoint(
        cut, out, data=str(run_inputs / "heal.jsonl"), steps=1, batch_size=2, length=32, device="cpu", nf4_copy=True,
        report=lambda line: None, **given,
    )  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found = model.eval()(torch.arange(2, 22)[None]).logits
    assert isinstance(found, torch.Tensor)
    return found


def test_the_copy_is_what_transformers_quantises(cut: Path, run_inputs: Path, tmp_path: Path) -> None:
    record = heal(cut, run_inputs, tmp_path / "healed")
    copy = tmp_path / "healed-nf4"
    loaded = AutoModelForCausalLM.from_pretrained(copy)
    compute = copy4bit.compute_dtype("cpu")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "healed", quantization_config=settings, dtype=compute)
    assert torch.equal(logits(loaded), logits(expected))
    assert AutoTokenizer.from_pretrained(copy)("one two").input_ids
    told = read_json(copy / "layerprune.json")
    assert told["healing"]["steps"] == record["steps"] and told["nf4"]["quantised"] == 6 * 7
    assert sum(t.nbytes for t in read_checkpoint(copy).values()) < 0.6 * sum(
        t.nbytes for t in read_checkpoint(tmp_path / "healed").values()
    )
    ids = loaded.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    assert ids.shape == (1, 7)
    modes = {path.stat().st_mode for path in copy.iterdir()}
    assert len(modes) == 1, "every file can be read by whom the others can"


def test_a_kill_while_the_copy_is_made_leaves_none_and_the_same_call_makes_it(
    cut: Path, run_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(copy4bit, "_prove", killed)
        with pytest.raises(Killed):
            heal(cut, run_inputs, tmp_path / "healed")
    assert (tmp_path / "healed").exists() and not (tmp_path / "healed-nf4").exists()
    before = (tmp_path / "healed" / "model.safetensors").read_bytes()
    record = heal(cut, run_inputs, tmp_path / "healed")
    assert record["steps"] == 1 and (tmp_path / "healed-nf4" / "config.json").exists()
    assert (tmp_path / "healed" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "healed", "healed-nf4"]
    with pytest.raises(UsageError, match="healed"):
        heal(cut, run_inputs, tmp_path / "healed")


def test_nothing_that_exists_is_written_over(cut: Path, run_inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "healed-nf4").mkdir()
    (tmp_path / "healed-nf4" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="healed-nf4"):
        heal(cut, run_inputs, tmp_path / "healed")
    assert not (tmp_path / "healed").exists() and (tmp_path / "healed-nf4" / "mine.txt").read_text() == "mine"


def test_a_copy_that_computes_something_else_is_refused(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load: Callable[..., Any] = copy4bit.load_model

    def other(folder: Path, **given: Any) -> Any:
        model = load(folder, **given)
        with torch.no_grad():
            model.get_input_embeddings().weight[:] += 1
        return model

    monkeypatch.setattr(copy4bit, "load_model", other)
    with pytest.raises(Refused, match="is wrong"):
        write_nf4_copy(cut, tmp_path / "copy", "cpu")
    assert not (tmp_path / "copy").exists()


def test_a_model_without_layers_to_quantise_is_refused(build_llama: Callable[..., Path], tmp_path: Path) -> None:
    narrow = build_llama(tmp_path / "narrow", layers=2, hidden=16)
    with pytest.raises(Refused, match="no linear layer"):
        write_nf4_copy(narrow, tmp_path / "copy", "cpu")
