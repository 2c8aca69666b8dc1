"""What cannot be used is refused: one sentence, exit code 1 or 2, no traceback, nothing lost, nothing left."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from layerprune.cli import main

torch.set_num_threads(1)

COMMANDS = ("rank", "prune", "run", "eval", "heal")
LOADING = ("rank", "prune-angular", "run", "eval", "heal")
"""Commands that read the data and run the model before they write anything."""


@dataclass
class World:
    """A folder with a model, data, and whatever a test puts there; every command writes to `out`."""

    root: Path
    model: Path
    data: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def arguments(self, command: str, **changes: Any) -> list[str]:
        """A command line that works as it is (the tests of success below say so), with options changed or (None) left out."""
        sizes = {"samples": 8, "length": 16}
        options: dict[str, Any] = {
            "rank": {"calibration": self.data, **sizes},
            "prune": {"drop": 0.4, "strategy": "last"},
            "prune-angular": {"drop": 0.4, "calibration": self.data, **sizes},
            "run": {"drop": 0.4, "calibration": self.data, "eval-data": self.data, "curve": "", "no-heal": True, **sizes},
            "eval": {"eval-data": self.data, **sizes},
            "heal": {"heal-data": self.data, "heal-steps": 1, "batch-size": 1, "length": 16},
        }[command]
        options = {"model": self.model, **options, "out": self.out, **changes}
        line = [command.removesuffix("-angular")]
        for name, value in options.items():
            if value is True:
                line.append(f"--{name}")
            elif value is not None:
                line += [f"--{name}", str(value)]
        return line

    def refused(self, arguments: list[str], code: int, *words: str, early: bool = False) -> str:
        """Run, check everything that holds for a refusal, and return its sentence.

        early: nothing but the sentence is printed, for what is found before any work starts.
        """
        before = snapshot(self.root)
        result = CliRunner().invoke(main, arguments)
        told = f"{arguments}\n{result.output}\n{result.exc_info}"
        assert isinstance(result.exception, SystemExit), told
        assert result.exit_code == code, told
        assert result.stdout == "", told
        lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line]
        assert [line.startswith("Error: ") for line in lines].count(True) == 1 and lines[-1].startswith("Error: "), told
        assert "Traceback" not in result.stderr, told
        assert not early or len(lines) == 1, told
        for word in words:
            assert word in lines[-1], told
        assert snapshot(self.root) == before, told
        return lines[-1]


def snapshot(root: Path) -> dict[str, str]:
    """Every path under a folder, with what identifies its content."""
    found = {}
    for path in root.rglob("*"):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


@pytest.fixture
def world(tmp_path: Path, own_llama: Path, documents_file: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LAYERPRUNE_VERBOSE", raising=False)
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, own_llama, documents_file)


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw |= changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}), encoding="utf-8")


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def shard_weights(model: Path, place: str = "model-00001-of-00002.safetensors") -> None:
    """Split the weights in two shards; the index calls the first one `place`."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for file, part in (("model-00001-of-00002.safetensors", names[::2]), ("model-00002-of-00002.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, place if file.startswith("model-00001") else file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("command", [*COMMANDS, "prune-angular"])
def test_the_arguments_that_these_tests_change_work_unchanged(command: str, world: World) -> None:
    result = CliRunner().invoke(main, world.arguments(command))
    assert result.exit_code == 0, result.output
    assert any(world.out.iterdir()) and result.stdout


# The model


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_nothing(command: str, world: World) -> None:
    world.refused(world.arguments(command, model="llama-2-70"), 2, "llama-2-70 ", "llama-2-70b", early=True)
    missing = world.root / "missing"
    world.refused(world.arguments(command, model=missing), 2, str(missing), early=True)
    file = world.model / "config.json"
    world.refused(world.arguments(command, model=file), 2, str(file), "folder", early=True)
    for odd in ("owner/na..me", "owner/-name", "owner/name.git"):
        assert odd in world.refused(world.arguments(command, model=odd), 2, early=True)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("text", "word"),
    [(None, "config.json"), ("{", "JSON"), ("[]", "model_type"), ("{}", "model_type"), ('{"model_type": "zorp"}', "zorp"),
     ('{"model_type": 7}', "model_type"), ('{"model_type": ["llama"]}', "model_type"), ("\udcff", "JSON"),
     ("[" * 100_000, "JSON"), ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "1,000,000,000"),
     ('{"model_type": "llama", "num_attention_heads": 0}', "not a valid llama config"),
     ('{"model_type": "llama", "hidden_size": "64"}', "hidden_size"),
     ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 3}', "not a valid llama config"),
     ('{"model_type": "qwen3", "num_hidden_layers": 5, "layer_types": ["full_attention"]}', "not a valid qwen3 config")],
)  # fmt: skip
def test_a_folder_without_a_usable_config(command: str, text: str | None, word: str, world: World) -> None:
    (world.model / "config.json").unlink()
    if text is not None:
        (world.model / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    world.refused(world.arguments(command), 1, word, early=True)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("kind", "architecture", "word"),
    [("bert", "BertForMaskedLM", "not a causal decoder"), ("vit", "ViTModel", "not a causal decoder"),
     ("xlnet", "XLNetLMHeadModel", "not a causal decoder"),
     ("t5", "T5ForConditionalGeneration", "encoder-decoder"), ("roberta", "RobertaModel", "not a causal decoder")],
)  # fmt: skip
def test_models_that_are_no_decoders(command: str, kind: str, architecture: str, word: str, world: World) -> None:
    (world.model / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
    world.refused(world.arguments(command), 1, kind, word, early=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_remote_code_runs_only_when_it_is_trusted(command: str, world: World) -> None:
    ran = world.root / "it-ran"
    (world.model / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    edit_config(world.model, model_type="homemade", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    world.refused(world.arguments(command), 1, "homemade", "--trust-remote-code", early=True)
    # code beside a model that transformers knows itself is never needed, and never run
    edit_config(world.model, model_type="llama")
    assert CliRunner().invoke(main, world.arguments(command)).exit_code == 0
    assert not ran.exists()


@pytest.mark.parametrize("command", ["rank", "prune", "run", "eval", "heal"])
def test_a_config_that_asks_for_what_transformers_does_not_have(command: str, world: World) -> None:
    edit_config(world.model, hidden_act="zorp")
    world.refused(world.arguments(command), 1, "zorp", str(world.model))


def truncate(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


BROKEN_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated in the data": (lambda m: truncate(m / "model.safetensors", 100_000), "truncated"),
    "truncated in the header": (lambda m: truncate(m / "model.safetensors", 500), "truncated"),
    "empty": (lambda m: truncate(m / "model.safetensors", 0), "truncated"),
    "longer than the header says": (lambda m: truncate(m / "model.safetensors", 999_999), "longer"),
    "header is no JSON": (lambda m: overwrite(m / "model.safetensors", 8, b"!!!!"), "not JSON"),
    "header is a list": (lambda m: (m / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"[]"), "not a JSON object"),
    "no tensors": (lambda m: (m / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}"), "no tensors"),
    "offsets are no whole numbers": (
        lambda m: (m / "model.safetensors").write_bytes(
            b"\x3d" + b"\0" * 7 + b'{"model.a":{"dtype":"F32","shape":[1],"data_offsets":[0.0,4]}}'[:61] + b"\0" * 4
        ),
        "m",
    ),
    "a dtype that nobody has": (
        lambda m: overwrite(m / "model.safetensors", (m / "model.safetensors").read_bytes().index(b'"F32"'), b'"F99"'),
        "F99",
    ),
    "header length is absurd": (lambda m: overwrite(m / "model.safetensors", 0, b"\xff" * 8), "corrupt"),
    "a dtype that the bytes contradict": (
        lambda m: overwrite(m / "model.safetensors", (m / "model.safetensors").read_bytes().index(b'"F32"'), b'"F64"'),
        "corrupt",
    ),
    "index names a missing shard": (
        lambda m: (shard_weights(m), (m / "model-00002-of-00002.safetensors").unlink()),
        "model-00002-of-00002.safetensors",
    ),
    "index names a path outside the folder": (lambda m: shard_weights(m, "../stolen.safetensors"), "outside the folder"),
    "index names an absolute path": (lambda m: shard_weights(m, "/etc/passwd"), "outside the folder"),
    "index names a wrong shard": (lambda m: shard_weights(m, "model-00002-of-00002.safetensors"), "but it is not"),
    "index without a map": (
        lambda m: (shard_weights(m), (m / "model.safetensors.index.json").write_text("{}")),
        "no weight_map",
    ),
    "index names a number": (
        lambda m: (
            shard_weights(m),
            (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": "model-00001-of-00002.safetensors"}}'),
        ),
        "outside the folder",
    ),
    "index names nothing": (lambda m: shard_weights(m, ""), "outside the folder"),
    "index is a list": (lambda m: (shard_weights(m), (m / "model.safetensors.index.json").write_text("[]")), "no weight_map"),
    "pickle only": (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "pickled"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no weights"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", BROKEN_WEIGHTS)
def test_broken_weights(command: str, what: str, world: World) -> None:
    spoil, word = BROKEN_WEIGHTS[what]
    spoil(world.model)
    world.refused(world.arguments(command), 1, str(world.model), word)


@pytest.mark.parametrize("command", [*COMMANDS, "prune-angular"])
@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 6}, {"num_hidden_layers": 4}, {"hidden_size": 32}, {"vocab_size": 300}, {"intermediate_size": 32},
     {"num_key_value_heads": 1}, {"attention_bias": True}],
    ids=str,
)  # fmt: skip
def test_a_config_that_contradicts_the_weights(command: str, changes: dict[str, Any], world: World) -> None:
    edit_config(world.model, **changes)
    world.refused(world.arguments(command), 1, "contradict")


@pytest.mark.parametrize("command", LOADING)
def test_a_folder_without_tokenizer(command: str, world: World) -> None:
    for file in world.model.glob("tokenizer*"):
        file.unlink()
    world.refused(world.arguments(command), 1, "tokenizer", str(world.model))


@pytest.mark.parametrize("command", LOADING)
@pytest.mark.parametrize("text", ["{", '{"version": "9", "model": {"type": "new"}}'])
def test_a_tokenizer_that_cannot_be_read(command: str, text: str, world: World) -> None:
    (world.model / "tokenizer.json").write_text(text)
    world.refused(world.arguments(command), 1, "tokenizer", str(world.model))


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_beside_the_model(command: str, world: World) -> None:
    """Transformers would load it with the model, so that what is ranked is not what is cut."""
    (world.model / "adapter_config.json").write_text("{}")
    world.refused(world.arguments(command), 1, "adapter_config.json", "merge it", early=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_record_that_is_none(command: str, world: World) -> None:
    (world.model / "layerprune.json").write_text("[]")
    world.refused(world.arguments(command), 1, "layerprune.json", early=True)


@pytest.mark.parametrize("command", LOADING)
def test_a_tokenizer_of_another_model(command: str, world: World) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:64].clone()

    edit_weights(world.model, shrink)
    edit_config(world.model, vocab_size=64)
    world.refused(world.arguments(command), 1, "tokenizer", "64")


BROKEN_NUMBERS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "NaN in layer 3": lambda t: t["model.layers.3.mlp.up_proj.weight"].fill_(float("nan")),
    "infinity in layer 0": lambda t: t["model.layers.0.mlp.down_proj.weight"].fill_(float("inf")),
    "an embedding of zeros": lambda t: t["model.embed_tokens.weight"].zero_(),
}


@pytest.mark.parametrize("command", ["rank", "prune-angular", "run"])
@pytest.mark.parametrize(
    ("what", "words"),
    [("NaN in layer 3", ("after layer 3", "not a number")), ("infinity in layer 0", ("after layer 0", "not a number")),
     ("an embedding of zeros", ("after the embedding", "zero"))],
)  # fmt: skip
def test_activations_that_have_no_angle(command: str, what: str, words: tuple[str, ...], world: World) -> None:
    edit_weights(world.model, BROKEN_NUMBERS[what])
    world.refused(world.arguments(command), 1, *words)


@pytest.mark.parametrize("command", ["eval", "heal"])
def test_a_loss_that_is_not_a_number(command: str, world: World) -> None:
    edit_weights(world.model, BROKEN_NUMBERS["NaN in layer 3"])
    world.refused(world.arguments(command), 1, "not a number")


def test_a_cut_of_weights_that_are_not_numbers_is_not_called_proven(world: World) -> None:
    edit_weights(world.model, BROKEN_NUMBERS["NaN in layer 3"])
    world.refused(world.arguments("prune", layers="0:1", drop=None, strategy=None), 1, "not a number", "--no-verify")


# Fractions, ranges, numbers


@pytest.mark.parametrize("command", ["prune", "prune-angular", "run"])
@pytest.mark.parametrize("drop", ["0", "1", "-0.1", "1.5", "nan", "inf", "0.05", "0.95"])
def test_fractions_outside_what_the_layers_allow(command: str, drop: str, world: World) -> None:
    world.refused(world.arguments(command, drop=drop), 2, f"--drop {drop}", early=True)


@pytest.mark.parametrize("layers", ["１:２", "5:5", "9:3", "a:b", "0:5", "3:6", "3", "-1:2", "1.0:2", ""])
def test_ranges_outside_what_the_layers_allow(layers: str, world: World) -> None:
    world.refused(world.arguments("prune", drop=None, strategy=None, layers=layers), 2, f"{layers}", early=True)


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("prune", {"layers": "1:2"}, ("--drop", "--layers", "both")),
        ("prune", {"drop": None}, ("--drop", "--layers", "neither")),
        ("prune", {"ranking": "rank.json"}, ("--ranking",)),
        ("run", {"curve": "2.0"}, ("--curve 2",)),
        ("run", {"curve": "0.2,-0.1"}, ("--curve -0.1",)),
        ("run", {"curve": "nan"}, ("--curve nan",)),
        ("run", {"limit": 0}, ("--limit 0",)),
        ("run", {"heal-steps": 0}, ("--heal-steps 0",)),
        ("run", {"batch-size": 0}, ("--batch-size 0",)),
        ("eval", {"limit": 0}, ("--limit 0",)),
        ("eval", {"batch-size": -1}, ("--batch-size -1",)),
        ("eval", {"num-fewshot": -1}, ("--num-fewshot -1",)),
        ("eval", {"no-loss": True}, ("--tasks",)),
        ("eval", {"tasks": "zorp", "task-folder": "missing"}, ("missing",)),
        ("heal", {"heal-steps": 0}, ("--heal-steps 0",)),
        ("heal", {"batch-size": 0}, ("--batch-size 0",)),
        ("heal", {"lora-rank": 0}, ("--lora-rank 0",)),
        ("heal", {"learning-rate": -1}, ("--learning-rate -1",)),
        ("heal", {"micro-batch": 0}, ("--micro-batch 0",)),
    ],
)
def test_options_that_contradict_or_measure_nothing(
    command: str, changes: dict[str, Any], words: tuple[str, ...], world: World
) -> None:
    world.refused(world.arguments(command, **changes), 2, *words, early=True)


@pytest.mark.parametrize("command", ["rank", "prune-angular", "run", "eval"])
@pytest.mark.parametrize("samples", [0, -3])
def test_no_samples(command: str, samples: int, world: World) -> None:
    world.refused(world.arguments(command, samples=samples), 2, f"--samples {samples}")


@pytest.mark.parametrize("command", LOADING)
@pytest.mark.parametrize("length", [0, 1, 65])
def test_lengths_that_no_document_can_have(command: str, length: int, world: World) -> None:
    world.refused(world.arguments(command, length=length), 2, f"--length {length}", *(["64"] if length > 64 else []))


@pytest.mark.parametrize("command", LOADING)
@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_seeds_that_a_generator_does_not_take(command: str, seed: int, world: World) -> None:
    world.refused(world.arguments(command, seed=seed), 2, f"--seed {seed}")


@pytest.mark.parametrize("command", COMMANDS)
def test_names_that_no_file_can_have(command: str, world: World) -> None:
    world.refused(world.arguments(command, model="x" * 300), 2, "--model x", early=True)
    world.refused(world.arguments(command, model=""), 2, "--model is empty", early=True)
    world.refused(world.arguments(command, model="~nobody-at-all/x"), 2, "--model ~nobody-at-all", early=True)
    world.refused(world.arguments(command, out="y" * 300), 2, "--out y", early=True)


@pytest.mark.parametrize("command", ["rank", "prune-angular", "run", "eval"])
def test_an_unknown_dtype(command: str, world: World) -> None:
    world.refused(world.arguments(command, dtype="float8"), 2, "--dtype float8", "bfloat16")


@pytest.mark.parametrize("command", LOADING)
@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cuda", "meta", "cpu:x"])
def test_a_device_that_is_not_there(command: str, device: str, world: World) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    world.refused(world.arguments(command, device=device), 2, f"--device {device}")


# Tasks


def task_folder(world: World, data: bool = True) -> Path:
    """A folder with the task `towers`, whose items may be missing."""
    folder = world.root / "tasks"
    folder.mkdir()
    items = [{"query": f"The tower {i} is", "choices": ["tall", "lost"], "gold": i % 2} for i in range(4)]
    if data:
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "towers.yaml").write_text(
        f"task: towers\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'items.jsonl'}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{gold}}"\nmetric_list:\n  - metric: acc\n'
    )
    return folder


@pytest.mark.parametrize("command", ["run", "eval"])
def test_tasks_that_are_unknown_or_have_no_data(command: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(world.root / "hf"))
    folder = task_folder(world, data=False)
    if command == "run":  # an unknown name makes lm-eval read its thousands of task files, which takes seconds
        world.refused(world.arguments(command, tasks="towers:x", **{"task-folder": folder}), 2, "towers:x", "towers")
    world.refused(world.arguments(command, tasks="towers", **{"task-folder": folder}), 1, "towers", "items.jsonl")
    world.refused(world.arguments(command, tasks="towers", **{"task-folder": world.root / "none"}), 2, "none", "does not exist")
    world.refused(world.arguments(command, tasks="towers,towers", **{"task-folder": folder}), 2, "towers twice")


def test_scores_of_weights_that_are_not_numbers(world: World) -> None:
    edit_weights(world.model, BROKEN_NUMBERS["NaN in layer 3"])
    options = {"tasks": "towers", "task-folder": task_folder(world), "no-loss": True, "eval-data": None}
    world.refused(world.arguments("eval", **options), 1, "logits are not numbers")


# Rankings


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, 1, ("rank.json", "does not exist")),
        ("", 1, ("not valid JSON",)),
        ("[]", 1, ("not a ranking",)),
        ('{"layers": 5, "distance": []}', 1, ("not a ranking",)),
        ('{"layers": 2, "distance": [[0.1, 7]]}', 1, ("not a ranking",)),
        ('{"layers": 2, "distance": [[0.1, NaN]]}', 1, ("not a ranking",)),
        ('{"layers": 2, "distance": [[0.1, 0.2]], "best": {"1": 0}}', 2, ("2 layers", "5")),
        (json.dumps({"layers": 5, "distance": [[0.1] * (6 - n) for n in range(1, 5)]}), 1, ("not a ranking",)),
        (json.dumps({"layers": 5, "distance": [[0.1] * (6 - n) for n in range(1, 5)], "best": {"2": 9}}), 1, ("not a ranking",)),
    ],
)
def test_rankings_that_are_none_or_of_another_model(text: str | None, code: int, words: tuple[str, ...], world: World) -> None:
    path = world.root / "rank.json"
    if text is not None:
        path.write_text(text)
    world.refused(world.arguments("prune", strategy=None, ranking=path), code, *words, early=True)


def test_a_ranking_is_taken_for_the_checkpoint_that_was_ranked_only(world: World) -> None:
    from layerprune import prune_checkpoint, rank_blocks
    from layerprune.model.errors import UsageError

    ranking = rank_blocks(world.model, data=str(world.data), samples=4, length=16, out=world.root / "new" / "rank.json")
    folder = world.root / "new"
    assert CliRunner().invoke(main, world.arguments("prune", strategy=None, ranking=folder)).exit_code == 0
    shutil.rmtree(world.out)
    edit_weights(world.model, lambda t: t["lm_head.weight"].mul_(2.0))
    words = ("another checkpoint", str(world.model), "--layers")
    world.refused(world.arguments("prune", strategy=None, ranking=folder), 2, *words, early=True)
    with pytest.raises(UsageError, match="another checkpoint"):
        prune_checkpoint(world.model, world.out, drop=0.4, ranking=ranking)
    with pytest.raises(UsageError, match="4 layers"):
        less = {**ranking, "layers": 4, "distance": [row[:-1] for row in ranking["distance"][:-1]]}
        less["best"] = {n: start for n, start in ranking["best"].items() if n != "4"}
        less["best"] = {str(n): row.index(min(row)) for n, row in enumerate(less["distance"], 1)}
        prune_checkpoint(world.model, world.out, drop=0.4, ranking=less)
    assert not world.out.exists()


# The data


def gz_and_zst(text: bytes) -> tuple[bytes, bytes]:
    return gzip.compress(text), zstandard.compress(text)


GOOD = "".join(json.dumps({"text": f"the river runs under the tower {i}"}) + "\n" for i in range(400)).encode()
BROKEN_DATA: dict[str, tuple[str, bytes, str]] = {
    "empty": ("d.jsonl", b"", "no documents"),
    "empty text": ("d.txt", b"", "no documents"),
    "whitespace": ("d.txt", b"\n  \n\t\n", "no documents"),
    "texts of whitespace": ("d.jsonl", b'{"text": "  "}\n{"text": ""}\n', "no documents"),
    "broken line": ("d.jsonl", b'{"text": "fine"}\n\n{"text": "bro\n', "line 3"),
    "no text": ("d.jsonl", b'{"text": "fine"}\n{"content": "other"}\n', "line 2"),
    "text is a number": ("d.jsonl", b'{"text": 7}\n', "line 1"),
    "half of a surrogate pair": ("d.jsonl", b'{"text": "fine"}\n{"text": "\\ud83d"}\n', "line 2"),
    "deep nesting": ("d.jsonl", b'{"text": "fine"}\n{"a":' + b"[" * 100_000 + b"\n", "line 2"),
    "a line that is a list": ("d.jsonl", b'{"text": "fine"}\n["text"]\n', "line 2"),
    "truncated gzip": ("d.jsonl.gz", gz_and_zst(GOOD)[0][:-200], "d.jsonl.gz"),
    "corrupt gzip": ("d.jsonl.gz", (lambda z: z[:300] + b"\xff" * 64 + z[364:])(gz_and_zst(GOOD)[0]), "d.jsonl.gz"),
    "no gzip": ("d.txt.gz", GOOD, "d.txt.gz"),
    "truncated zstd": ("d.jsonl.zst", gz_and_zst(GOOD)[1][:-200], "d.jsonl.zst"),
    "zstd truncated after a frame": ("d.jsonl.zst", gz_and_zst(GOOD)[1] * 2 + gz_and_zst(GOOD)[1][:-9], "d.jsonl.zst"),
    "no zstd": ("d.txt.zst", GOOD, "d.txt.zst"),
    "binary garbage": ("d.bin", bytes(range(256)) * 9, "d.bin"),
    "not UTF-8": ("d.txt", "Übermut\n".encode("latin-1"), "d.txt"),
    "zeros": ("d.txt", b"\0" * 500, "d.txt"),
}


@pytest.mark.parametrize("command", LOADING)
@pytest.mark.parametrize("what", BROKEN_DATA)
def test_broken_data(command: str, what: str, world: World) -> None:
    name, content, word = BROKEN_DATA[what]
    world.data = world.root / name
    world.data.write_bytes(content)
    world.refused(world.arguments(command), 1, str(world.data), word)


@pytest.mark.parametrize("command", LOADING)
def test_data_that_is_not_there(command: str, world: World) -> None:
    option = {"eval": "--eval-data", "heal": "--heal-data"}.get(command, "--calibration")
    for missing in (world.root / "none.jsonl", world.model, world.data / "below-a-file"):
        world.data = missing
        world.refused(world.arguments(command), 2, option, str(missing))


def test_every_data_option_of_a_run_is_checked_before_it_starts(world: World) -> None:
    for option in ("calibration", "eval-data"):
        world.refused(world.arguments("run", **{option: "none.jsonl"}), 2, f"--{option} none.jsonl", early=True)


@pytest.mark.parametrize("command", ["eval", "heal"])
def test_documents_too_short_to_predict_anything(command: str, world: World) -> None:
    tokenizer = json.loads((world.model / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None  # without <s> a document of one letter is one token
    (world.model / "tokenizer.json").write_text(json.dumps(tokenizer))
    world.data.write_text('{"text": "a"}\n{"text": "b"}\n')
    word = {"heal": "4 tokens, which do not fill one sequence of 16"}.get(command, "shorter than 2 tokens")
    world.refused(world.arguments(command), 1, word)


def test_a_run_on_documents_too_short_for_its_loss_leaves_nothing(world: World) -> None:
    test_documents_too_short_to_predict_anything("run", world)


# The output


@pytest.mark.parametrize("command", [*COMMANDS, "prune-angular"])
def test_an_existing_output_stays_as_it_is(command: str, world: World) -> None:
    world.out.mkdir()
    (world.out / "thesis.txt").write_text("years of work")
    world.refused(world.arguments(command), 2, str(world.out), "exists", early=True)
    shutil.rmtree(world.out)
    world.out.write_text("years of work")
    world.refused(world.arguments(command), 2, str(world.out), "exists", early=True)
    world.out.unlink()
    world.out.symlink_to(world.model)
    world.refused(world.arguments(command), 2, str(world.out), "exists", early=True)


@pytest.mark.parametrize("command", [*COMMANDS, "prune-angular"])
def test_an_output_below_a_file(command: str, world: World) -> None:
    for out in (world.data / "out", world.data / "deep" / "out"):
        world.refused(world.arguments(command, out=out), 2, str(out), f"{world.data} is a file", early=True)


@pytest.mark.parametrize("command", [*COMMANDS, "prune-angular"])
def test_missing_parents_are_made_and_taken_away_when_nothing_came_of_it(command: str, world: World) -> None:
    good = world.root / "made" / "deep" / "out"
    result = CliRunner().invoke(main, world.arguments(command, out=good))
    assert result.exit_code == 0 and any(good.iterdir()), result.output
    edit_config(world.model, hidden_size=32)
    world.refused(world.arguments(command, out=world.root / "new" / "deep" / "out"), 1)


def test_a_finished_run_whose_result_is_gone_does_not_say_that_it_is_there(world: World) -> None:
    assert CliRunner().invoke(main, world.arguments("run")).exit_code == 0
    shutil.rmtree(world.out / "pruned")
    world.refused(world.arguments("run"), 1, "pruned/ is gone", early=True)


def test_more_steps_than_a_disk_holds_tokens_of(world: World) -> None:
    world.refused(world.arguments("heal", **{"heal-steps": 10**12}), 1, "the disk is full")


def test_an_output_in_the_home_folder(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(world.root))
    assert CliRunner().invoke(main, world.arguments("prune", out="~/out")).exit_code == 0
    assert (world.out / "config.json").exists() and not (world.root / "~").exists()


def test_a_run_of_other_inputs_is_not_touched(world: World) -> None:
    assert CliRunner().invoke(main, world.arguments("run")).exit_code == 0
    edit_weights(world.model, lambda t: t["model.layers.2.mlp.up_proj.weight"][7].mul_(2.0))
    world.refused(world.arguments("run"), 2, "checkpoint was", early=True)
    edit_weights(world.model, lambda t: t["model.layers.2.mlp.up_proj.weight"][7].mul_(0.5))
    world.refused(world.arguments("run", seed=1), 2, "seed was 0, now 1", early=True)
    world.refused(world.arguments("run", drop=0.2), 2, "drop was 0.4, now 0.2", early=True)
    manifest = world.out / "manifest.json"
    for text, word in (("{", "not valid JSON"), ("[]", "not the manifest"), ("{}", "not the manifest")):
        manifest.write_text(text)
        world.refused(world.arguments("run"), 1, str(manifest), word, early=True)


def test_a_run_goes_on_where_its_inputs_are_the_same_wherever_they_lie(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = task_folder(world)
    tasks = {"tasks": "towers", "task-folder": folder}
    first = CliRunner().invoke(main, world.arguments("run", **tasks))
    assert first.exit_code == 0, first.output
    moved = Path(shutil.copytree(world.model, world.root / "elsewhere" / "copy"))
    shutil.copyfile(world.data, world.root / "elsewhere" / "data.jsonl")
    monkeypatch.chdir(world.root / "elsewhere")
    again = World(world.root, Path("copy"), Path("data.jsonl"))
    done = CliRunner().invoke(main, again.arguments("run", **tasks))
    assert (done.exit_code, done.stdout) == (0, first.stdout), done.output
    (folder / "items.jsonl").write_text((folder / "items.jsonl").read_text().replace("tall", "high"))
    again.refused(again.arguments("run", **tasks), 2, "task_folder was", early=True)
    folder.joinpath("items.jsonl").write_text((folder / "items.jsonl").read_text().replace("high", "tall"))
    tokenizer = moved / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    again.refused(again.arguments("run", **tasks), 2, "tokenizer was", early=True)


def test_a_repository_with_nothing_but_its_history_is_no_empty_folder(world: World) -> None:
    (world.out / ".git").mkdir(parents=True)
    world.refused(world.arguments("run"), 2, "exists already", early=True)


def test_what_healing_would_refuse_is_refused_before_ranking(world: World) -> None:
    short = world.root / "short.jsonl"
    short.write_text('{"text": "the"}\n')
    broken = world.root / "broken.jsonl"
    broken.write_text('{"text": "the river"}\n' * 300 + "{\n")
    for data, word in ((short, "do not fill one sequence"), (broken, "line 301")):
        changes = {"no-heal": None, "heal-data": data}
        said = CliRunner().invoke(main, world.arguments("run", **changes)).stderr
        assert "ranking" not in said.replace("chosen by ranking", "")
        world.refused(world.arguments("run", **changes), 1, str(data), word)


def test_a_run_that_another_process_is_at_work_on(world: World) -> None:
    fcntl = pytest.importorskip("fcntl")
    assert CliRunner().invoke(main, world.arguments("run")).exit_code == 0
    with open(world.out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        world.refused(world.arguments("run"), 1, str(world.out), "another process", early=True)


def test_what_a_failed_run_has_found_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerprune.model.errors import Refused
    from layerprune.prune import cut

    def refuse(*args: Any) -> None:
        raise Refused("no cut today")

    with monkeypatch.context() as patch:
        patch.setattr(cut, "write_cut", refuse)
        result = CliRunner().invoke(main, world.arguments("run"))
    assert result.exit_code == 1 and "no cut today" in result.stderr
    left = {path.name for path in world.out.iterdir()}
    assert "rank.json" in left and "pruned" not in left
    ranked = (world.out / "rank.json").stat().st_mtime_ns
    result = CliRunner().invoke(main, world.arguments("run"))
    assert result.exit_code == 0, result.output
    assert (world.out / "rank.json").stat().st_mtime_ns == ranked


# A full disk: a real small file system, in a namespace of its own


ON_A_SMALL_DISK = """
import json, pathlib, shutil, subprocess, sys
import torch
from click.testing import CliRunner
from layerprune.cli import main
from layerprune.model.files import must_have_room
from layerprune.heal import train
from layerprune.prune import cut

torch.set_num_threads(1)
disk, model, data = (pathlib.Path(a) for a in sys.argv[1:4])
out, filler = disk / "out", disk / "filler"
ours = ["--calibration", str(data), "--samples", "8", "--length", "16"]
COMMANDS = {
    "prune": ["prune", "--model", str(model), "--drop", "0.4", "--strategy", "last"],
    "prune here": ["prune", "--model", str(disk / "model"), "--drop", "0.4", "--strategy", "last"],
    "run": ["run", "--model", str(model), "--drop", "0.4", "--no-heal", "--curve", "", "--eval-data", str(data), *ours],
    "rank": ["rank", "--model", str(model), *ours],
    "eval": ["eval", "--model", str(model), "--eval-data", str(data), "--samples", "8", "--length", "16"],
    "heal": ["heal", "--model", str(model), "--heal-data", str(data), "--heal-steps", "1", "--batch-size", "1", "--length", "16"],
}

def fill(leave):
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))

def checked_then_filled(leave):
    def check(out, need, held=0):
        must_have_room(out, need, held)
        if not filler.exists():
            fill(leave)
    return check

def call(command):
    made = CliRunner().invoke(main, [*COMMANDS[command], "--out", str(out)])
    if filler.exists():
        filler.unlink()
    left = sorted(str(p.relative_to(disk)) for p in disk.rglob("*") if not p.is_relative_to(disk / "model"))
    failure = None if made.exception is None or isinstance(made.exception, SystemExit) else repr(made.exception)
    return {"code": made.exit_code, "stderr": made.stderr, "stdout": made.stdout, "left": left, "failure": failure}

def scenario(command, when, leave, keep=False):
    if command == "prune here":
        shutil.copytree(model, disk / "model", dirs_exist_ok=True)
    if when == "before":
        fill(leave)
    if when == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    cut.must_have_room = train.must_have_room = checked_then_filled(leave) if when == "meanwhile" else must_have_room
    found = call(command)
    cut.must_have_room = train.must_have_room = must_have_room
    if when == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    if keep:
        found["again"] = call(command)
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(disk / "model", ignore_errors=True)
    return found

print(json.dumps({name: scenario(*arguments) for name, arguments in json.loads(sys.argv[4]).items()}))
"""

PRUNE_LEAVES = [*range(0, 640, 64)]
HEAL_LEAVES = [0, 200, 600, 1000, 2400]
"""Kilobytes that are free when the writing starts: from nothing to enough."""


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command prefix that runs the rest with a file system of 3 MB mounted at its first argument."""
    place = tmp_path_factory.mktemp("probe")
    mount = 'mount -t tmpfs -o size=3m tmpfs "$0" && exec "$@"'
    for unshare in (["unshare", "-rm"], ["unshare", "-m"]):
        prefix = [*unshare, "sh", "-c", mount]
        probe = subprocess.run([*prefix, str(place), "df", "-P", "-k", str(place)], capture_output=True, text=True, check=False)
        if probe.returncode == 0 and probe.stdout.split()[-5] == "3072":
            return prefix
    pytest.skip(f"this system lets nobody mount a tmpfs in a namespace of its own: {probe.stderr.strip()}")


@pytest.fixture(scope="module")
def on_a_small_disk(
    small_disk: list[str], tiny_llama: Path, prose: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Commands on a real disk that is full, or fills up meanwhile: what they said, and what was left."""
    root = tmp_path_factory.mktemp("disk")
    (root / "mounted").mkdir()
    data = root / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    scenarios: dict[str, tuple[Any, ...]] = {
        f"{command} before": (command, "before", 64 << 10) for command in ("prune", "prune here", "run")
    }
    scenarios |= {f"{command} before": (command, "before", 0) for command in ("rank", "eval")}
    scenarios |= {f"rank before, {kb} kB": ("rank", "before", kb << 10) for kb in (4, 12, 40)}
    for command in ("prune", "prune here"):
        scenarios |= {f"{command} meanwhile, {kb} kB": (command, "meanwhile", kb << 10) for kb in PRUNE_LEAVES}
    scenarios["run meanwhile"] = ("run", "meanwhile", 64 << 10, True)
    scenarios["heal before"] = ("heal", "before", 64 << 10)
    scenarios |= {f"heal meanwhile, {kb} kB": ("heal", "meanwhile", kb << 10, True) for kb in HEAL_LEAVES}
    scenarios |= {f"{command} read-only": (command, "read-only", 0) for command in COMMANDS}
    line = [sys.executable, "-c", ON_A_SMALL_DISK, root / "mounted", tiny_llama, data, json.dumps(scenarios)]
    done = subprocess.run([*small_disk, root / "mounted", *line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def full(found: dict[str, Any]) -> None:
    assert found["failure"] is None and found["code"] == 1 and found["stdout"] == "", found
    lines = [line for line in re.split(r"[\r\n]+", found["stderr"]) if line]
    assert sum(line.startswith("Error: ") for line in lines) == 1, found
    assert lines[-1].startswith("Error: the disk is full: ") and "/out" in lines[-1] and "partial" not in lines[-1], found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_system_that_is_read_only(command: str, on_a_small_disk: dict[str, dict[str, Any]]) -> None:
    found = on_a_small_disk[f"{command} read-only"]
    assert found["failure"] is None and found["code"] == 1 and found["stdout"] == "" and found["left"] == [], found
    assert re.fullmatch(r"Error: \S+/mounted/out cannot be written because \S+/mounted is read-only: .*\n", found["stderr"]), found


@pytest.mark.parametrize("command", ["prune", "prune here", "run", "rank", "eval", "heal"])
def test_a_disk_that_is_full_already(command: str, on_a_small_disk: dict[str, dict[str, Any]]) -> None:
    found = [f for name, f in on_a_small_disk.items() if name.startswith(f"{command} before")]
    assert found
    for one in found:
        full(one)
        assert one["left"] == []


@pytest.mark.parametrize("command", ["prune", "prune here", "heal"])
def test_a_disk_that_fills_up_while_it_is_written(command: str, on_a_small_disk: dict[str, dict[str, Any]]) -> None:
    found = [one for name, one in on_a_small_disk.items() if name.startswith(f"{command} meanwhile")]
    assert len(found) == len(HEAL_LEAVES if command == "heal" else PRUNE_LEAVES)
    for one in found:
        if one["code"] == 0:
            assert {"out", "out/config.json", "out/model.safetensors", "out/layerprune.json", "out/README.md"} <= set(one["left"])
        else:
            full(one)
            trained = ".out.work/trained.json" in one["left"]  # hours of training are not thrown away
            assert one["left"] == [] or (trained and all(name.startswith(".out.work") for name in one["left"])), one
            if trained:
                assert one["again"]["code"] == 0 and "heal: " not in one["again"]["stderr"], one
                assert all(name.startswith("out") for name in one["again"]["left"]), one
    assert command != "heal" or any(".out.work" in one["left"] for one in found)
    codes = [one["code"] for one in found]
    assert codes == sorted(codes, reverse=True) and codes[0] == 1 and codes[-1] == 0


def test_a_run_on_a_disk_that_fills_up_keeps_what_it_has_found(on_a_small_disk: dict[str, dict[str, Any]]) -> None:
    found = on_a_small_disk["run meanwhile"]
    full(found)
    seen = [name for name in found["left"] if "/.work" not in name]  # there the answers lie that a resume goes on with
    assert seen == ["out", "out/manifest.json", "out/rank.json"]
    assert not any("partial" in name for name in found["left"])
    assert "goes on with it" in found["stderr"]
    again = found["again"]
    assert again["code"] == 0 and "ranking all blocks" not in again["stderr"], again
    assert {"out/pruned", "out/eval.json", "out/figures"} <= set(again["left"])
