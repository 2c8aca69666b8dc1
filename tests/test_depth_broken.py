"""`layerprune depth` where something is broken: files of a finished folder, options, weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from layerprune.depth.choices import Item, choices_probe
from layerprune.depth.tokens import tokens_probe
from layerprune.depths import probe_depth
from layerprune.model.decoder import view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model

torch.set_num_threads(1)

MADE = ("residual", "lens", "tokens", "choices", "skip", "prunability", "erasure", "gradients", "answers", "tuned")


def probe(run_inputs: Path, out: Path, **given: Any) -> dict[str, Any]:
    return probe_depth(
        run_inputs / "model", eval_data=str(run_inputs / "loss.jsonl"), samples=3, length=24, device="cpu", out=out,
        say=lambda line: None, **given,
    )  # fmt: skip


@pytest.fixture(scope="module")
def asked(run_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all probes are asked for, answers being what the model says."""
    from layerprune.model.load import load_tokenizer

    live, tokenizer = load_model(run_inputs / "model", device="cpu", dtype="float32"), load_tokenizer(run_inputs / "model")
    lines = []
    for prompt in ("the mill", "a river goes", "stone and salt", "the bird sings over", "a lamp", "the town walks by"):
        ids = tokenizer(prompt).input_ids
        with torch.no_grad():
            token = int(live(torch.tensor([ids])).logits[0, -1].argmax())
        lines += [json.dumps({"prompt": prompt, "answer": text}) for text in (tokenizer.decode([token]), "mill", "river")]
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    file.write_text("\n".join(line for line in lines if json.loads(line)["answer"].strip()) + "\n")
    folder = tmp_path_factory.mktemp("tasks")
    words = [line.split()[0] for line in ("a", "s", "t")]
    (folder / "items.jsonl").write_text("".join(json.dumps({"question": f"which {i}", "gold": i % 3}) + "\n" for i in range(4)))
    (folder / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'items.jsonl'}\ntest_split: test\n"
        f"output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\ndoc_to_choice: {json.dumps(words)}\ndoc_to_target: gold\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return {"answers": str(file), "train_lens": 1, "tasks": ["letters"], "task_folder": folder}


def test_a_file_that_is_no_result_is_refused_by_name(
    run_inputs: Path, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerprune import depths

    out = tmp_path / "out"
    known = {"prompt": "the mill", "answer": " river"}
    monkeypatch.setattr("layerprune.depth_prompt.MOST", 100_000)
    first = probe(run_inputs, out, probes=MADE, **asked, **known)
    assert first["probes"] == depths.check_probes(MADE, asked["tasks"])

    def none(*args: Any) -> None:
        raise AssertionError("something was made again")

    monkeypatch.setattr(depths, "run_probes", none)
    assert probe(run_inputs, out, probes=MADE, **asked, **known) == first
    for name in MADE:
        path = out / "model" / f"{name}.json"
        good = path.read_text()
        for bad in ("{", "[]", "null", "3", '{"asked": 5}', *([] if name == "choices" else ["{}"])):
            path.write_text(bad)
            with pytest.raises(
                (Refused, UsageError), match=f"{name}.json (is no result of the probe|is not valid JSON|was made with)"
            ):
                probe(run_inputs, out, probes=MADE, **asked, **known)
        path.write_text(good)
    assert probe(run_inputs, out, probes=MADE, **asked, **known) == first


def test_another_task_is_another_file_and_not_another_folder(run_inputs: Path, asked: dict[str, Any], tmp_path: Path) -> None:
    """A task that is misspelt costs nothing of what was found."""
    out, given = tmp_path / "out", {"task_folder": asked["task_folder"], "probes": ["residual", "choices"]}
    with pytest.raises((Refused, UsageError), match="no task leters"):
        probe(run_inputs, out, tasks=["leters"], **given)
    assert (out / "model" / "residual.json").exists() and not (out / "model" / "choices.json").exists()
    probe(run_inputs, out, tasks=["letters"], **given)
    found = json.loads((out / "model" / "choices.json").read_text())
    assert found["letters"]["items"] == 4 and found["asked"]["tasks"] == ["letters"]
    with pytest.raises(UsageError, match=r"choices.json was made with other settings \(limit was None, now 2\)"):
        probe(run_inputs, out, tasks=["letters"], limit=2, **given)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"limit": 3}, "--limit is for the probe choices: add --tasks"),
        ({"task_folder": "."}, "--task-folder is for the probe choices: add --tasks"),
        ({"tasks": []}, "--tasks names no task"),
        ({"tasks": ["x"], "probes": ["lens"]}, "--tasks is for the probe choices: add --probe choices"),
        ({"prompt": "the", "answer": " \udcff", "probes": ["erasure"]}, r"--answer ' \\udcff' is no text"),
    ],
)
def test_options_that_nothing_reads_are_refused(run_inputs: Path, tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        probe(run_inputs, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()


def test_logits_that_are_no_numbers_are_no_choices(own_llama: Path) -> None:
    live = load_model(own_llama, device="cpu", dtype="float32")
    with torch.no_grad():
        live.model.layers[2].mlp.down_proj.weight[:] = torch.nan
    decoder = view_decoder(live)
    with pytest.raises(Refused, match="logits are not a number"):
        tokens_probe(decoder, [[1, 50, 3], [4, 5]])
    with pytest.raises(Refused, match="logits are not a number"):
        choices_probe(decoder, [Item((1, 50, 3), (7, 8), 0)])
