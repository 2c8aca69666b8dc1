"""`layerprune depth --probe words,answers`: wired to the functions, with faults told before a model is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from layerprune.depth.answers import answers_probe, read_answers
from layerprune.depths import probe_depth
from layerprune.model.decoder import view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model, load_tokenizer

torch.set_num_threads(1)


def probe(run_inputs: Path, out: Path, **given: Any) -> dict[str, Any]:
    return probe_depth(
        run_inputs / "model", eval_data=str(run_inputs / "loss.jsonl"), samples=4, length=32, device="cpu", out=out,
        say=lambda line: None, **given,
    )  # fmt: skip


@pytest.fixture
def answers(run_inputs: Path, tmp_path: Path) -> Path:
    """What the model itself says next, where that is a piece of text: answers that it gives."""
    live, tokenizer = load_model(run_inputs / "model", device="cpu", dtype="float32"), load_tokenizer(run_inputs / "model")
    lines = []
    for line in (run_inputs / "loss.jsonl").read_text().splitlines():
        words = json.loads(line)["text"].split()
        for count in range(3, 9):
            prompt = " ".join(words[:count])
            ids = tokenizer(prompt).input_ids
            with torch.no_grad():
                token = int(live(torch.tensor([ids])).logits[0, -1].argmax())
            answer = tokenizer.decode([token])
            if answer.strip() and tokenizer(prompt + answer).input_ids == [*ids, token]:
                lines.append(json.dumps({"prompt": prompt, "answer": answer}))
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "answers.jsonl"


def test_the_answers_of_a_file(run_inputs: Path, answers: Path, tmp_path: Path) -> None:
    result = probe(run_inputs, tmp_path / "out", probes=["answers"], answers=str(answers))
    found = json.loads((tmp_path / "out" / "model" / "answers.json").read_text())
    live, tokenizer = load_model(run_inputs / "model", device="cpu", dtype="float32"), load_tokenizer(run_inputs / "model")
    expected = answers_probe(view_decoder(live), tokenizer, read_answers(answers)).result()
    assert {key: found[key] for key in expected} == json.loads(json.dumps(expected))
    assert any(expected["predicted"]) and any("answers" in name for name in result["figures"])
    assert "answers" in (tmp_path / "out" / "report.html").read_text()
    (note,) = result["models"][0]["notes"]
    told = f"answers: the model predicts {sum(expected['predicted'])} of the {sum(expected['marked'])} tokens looked at"
    assert note.startswith(told)


def test_faults_are_told_before_a_model_is_loaded(
    run_inputs: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--answers"):
        probe(run_inputs, tmp_path / "out", probes=["answers"])
    answers.write_text('{"prompt": "one"}\n')
    with pytest.raises((Refused, UsageError), match="answer"):
        probe(run_inputs, tmp_path / "out", probes=["answers"], answers=str(answers))
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(Refused, match=r"layerprune\[words\]"):
        probe(run_inputs, tmp_path / "out", probes=["words"])
    assert not (tmp_path / "out" / "model").exists()
