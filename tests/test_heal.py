"""Healing: settings, targets, merging, and whole runs on a tiny checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerprune.heal import quantise, trainer, watch
from layerprune.heal.checks import check_reports
from layerprune.heal.merge import Stored, _live_weight, locate, merge_adapter, merged_weight
from layerprune.heal.packing import pack
from layerprune.heal.settings import heal_settings
from layerprune.heal.targets import choose_targets, target_pattern
from layerprune.heal.telling import format_healing
from layerprune.heal.train import heal_checkpoint
from layerprune.model import nf4
from layerprune.model.config import load_config
from layerprune.model.decoder import view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.feed import read_tensor
from layerprune.model.load import load_model
from layerprune.model.recipes import load_recipe
from layerprune.model.tensors import read_checkpoint

torch.set_num_threads(1)

BF16_ROUNDOFF = 2.0**-8
"""Rounding to bf16 (8 significant bits) changes a number by at most this fraction of it."""

SMALL = {"steps": 12, "batch_size": 4, "length": 32, "lora_rank": 4, "learning_rate": 2e-2, "warmup_steps": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def base(build_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint of 3 layers in several shards, wide enough for NF4's blocks, with traces of a cut."""
    folder = build_llama(
        tmp_path_factory.mktemp("base") / "cut",
        layers=3,
        hidden=64,
        shard="100KB",
        dtype=torch.bfloat16,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    record = {"source": "some/base", "hub_id": "some/base", "layers": 5, "kept": [0, 1, 4], "dropped": "2:4", "serving": "anything"}
    (folder / "layerprune.json").write_text(json.dumps(record))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (folder / "LICENSE").write_text("terms\n")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, prose: list[str]) -> str:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    return str(path)


@pytest.fixture(scope="module")
def healed(base: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(the healed folder, what heal_checkpoint returned, what it reported)."""
    out = tmp_path_factory.mktemp("healed") / "model"
    said: list[str] = []
    return out, heal_checkpoint(base, out, data=data, report=said.append, **SMALL), said


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder but those that hold times."""
    timed = ("layerprune.json",)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in timed
    }


def loss_of(folder: Path, ids_NT: torch.Tensor) -> float:
    model = load_model(folder, device="cpu")
    with torch.no_grad():
        return float(model(input_ids=ids_NT, labels=ids_NT).loss)


# Settings


def test_settings_come_from_the_paper_where_the_recipe_has_them(base: Path) -> None:
    class Config:
        """A config with a context of 4096."""

        max_position_embeddings = 4096

        def get_text_config(self, decoder: bool = False) -> Any:
            return self

    found = heal_settings(Config(), "llama-2-7b", data="train.jsonl")
    assert (found.lora_rank, found.learning_rate, found.steps, found.batch_size, found.length) == (2, 3e-4, 5000, 16, 2048)
    assert (found.dropout, found.warmup_steps, found.targets) == (0.05, 100, ("gate_proj", "down_proj", "up_proj"))
    assert found.tokens == 5000 * 16 * 2048
    assert found.origin["lora_rank"] == "paper" and found.origin["data"] == "user"
    shorter = heal_settings(Config(), load_recipe("llama-2-7b"), steps=300, lora_rank=8)
    assert (shorter.warmup_steps, shorter.origin["warmup_steps"]) == (30, "ours")
    assert (shorter.lora_rank, shorter.origin["lora_rank"], shorter.origin["steps"]) == (8, "user", "user")
    without = heal_settings(load_config(base), None)
    assert (without.lora_rank, without.length, without.data) == (64, 128, "c4")
    assert set(without.origin.values()) == {"ours"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"steps": 0}, "--heal-steps 0 is not a number above 0"),
        ({"batch_size": -1}, "--batch-size -1 is not"),
        ({"lora_rank": 0}, "--lora-rank 0 is not"),
        ({"learning_rate": 0.0}, "--learning-rate 0 is not between 0 and 1"),
        ({"learning_rate": float("nan")}, "--learning-rate nan is not between 0 and 1"),
        ({"dropout": 1.0}, "dropout of 1 is not between 0 and 1"),
        ({"warmup_steps": -1}, "-1 warm-up steps are fewer than none"),
        ({"warmup_steps": 12}, "12 warm-up steps leave none of the 12 steps"),
        ({"micro_batch": 3}, "--micro-batch 3 does not divide the batch of 4: use one of 1, 2, 4"),
        ({"length": 129}, "--length 129 is beyond the model's context of 128"),
        ({"length": 1}, "--length 1 leaves nothing to predict"),
    ],
)
def test_settings_out_of_range_are_named(base: Path, changed: dict[str, Any], told: str) -> None:
    given = {key: value for key, value in SMALL.items() if key != "device"}
    with pytest.raises(UsageError, match=told):
        heal_settings(load_config(base), None, **{**given, **changed})


# Targets


def test_targets_are_the_mlp_and_nothing_else(base: Path) -> None:
    decoder = view_decoder(load_model(base, device="cpu"))
    mlp = [f"model.layers.{i}.mlp.{name}" for i in range(3) for name in ("gate_proj", "up_proj", "down_proj")]
    assert [t.name for t in choose_targets(decoder)] == mlp
    assert [t.name for t in choose_targets(decoder, ["up_proj"])] == mlp[1::3]
    one = choose_targets(decoder, ["self_attn.q_proj", "mlp.up_proj"])
    assert {t.inside for t in one} == {"self_attn.q_proj", "mlp.up_proj"} and len(one) == 6
    with pytest.raises(UsageError, match="target 'q_proj' is no linear layer of this model's MLP; it has mlp.down_proj, "):
        choose_targets(decoder, ["q_proj"])
    some = [t for t in choose_targets(decoder) if t.layer != 1 or t.inside != "mlp.up_proj"]
    assert target_pattern(decoder, choose_targets(decoder)).startswith("model")
    hit = quantise.add_lora(decoder.model, target_pattern(decoder, some), heal_settings(load_config(base), None, lora_rank=2))
    assert set(hit.targeted_module_names) == {t.name for t in some}


# NF4 on the CPU


def test_layers_that_bitsandbytes_decodes_wrongly_on_the_cpu_are_left_unquantised(
    build_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = build_llama(tmp_path / "odd", layers=2, hidden=64, intermediate_size=96)
    model = load_model(folder, device="cpu")
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert nf4.unquantised(model, "cpu") == [*down, "lm_head"]
    assert nf4.unquantised(model, "cuda") == ["lm_head"]
    packed = quantise.load_quantised(folder, "cpu", torch.float32, nf4.unquantised(model, "cpu"))
    kinds = {name: type(module.weight).__name__ for name, module in packed.named_modules() if hasattr(module, "weight")}
    assert kinds["model.layers.0.mlp.up_proj"] == "Params4bit" and kinds["model.layers.0.mlp.down_proj"] == "Parameter"
    for name in kinds:
        if kinds[name] == "Params4bit":
            # 16 levels for 64 normal weights: 0.09; with another block's scale it is above 0.2
            exact = model.get_submodule(name).weight
            error = torch.linalg.norm(_live_weight(packed.get_submodule(name)) - exact) / torch.linalg.norm(exact)
            assert error < 0.12, name


# Merging


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merged_weight_is_rounded_once(dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 24, generator=generator).to(dtype)
    a, b = torch.randn(3, 24, generator=generator), torch.randn(5000, 3, generator=generator)
    exact = weight.double() + 0.5 * (b.double() @ a.double())
    found = merged_weight(weight.T if transposed else weight, a, b, 0.5, transposed)
    found = found.T if transposed else found
    assert found.dtype == dtype
    # one rounding of the result, and float32's of the sum (which the terms, not the result, bound)
    terms = weight.double().abs() + 0.5 * (b.double().abs() @ a.double().abs())
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 8 * torch.finfo(torch.float32).eps * terms
    assert ((found.double() - exact).abs() <= bound).all()


def test_a_merge_that_overflows_is_refused() -> None:
    weight = torch.full((2, 2), 6e4, dtype=torch.float16)
    with pytest.raises(Refused, match="the merged weights are not finite in torch.float16"):
        merged_weight(weight, torch.ones(1, 2), torch.full((2, 1), 6e4), 1.0, False)


def test_names_that_the_model_does_not_have_are_found_by_value(base: Path, tmp_path: Path) -> None:
    """A layout with another prefix, other names and a transposed weight, as some hub checkpoints have."""
    tensors = {}
    for name, tensor in read_checkpoint(base).items():
        value, new = read_tensor(tensor), name.replace("model.layers.", "blocks.").replace("mlp.up_proj", "ff.W_up")
        tensors[new] = value.T.contiguous() if new.endswith("W_up.weight") else value
    save_file(tensors, tmp_path / "model.safetensors")
    targets = choose_targets(view_decoder(load_model(base, device="cpu")))
    where = locate(targets, read_checkpoint(tmp_path), 3)
    assert where["model.layers.2.mlp.up_proj"] == Stored("blocks.2.ff.W_up.weight", True)
    assert where["model.layers.0.mlp.down_proj"] == Stored("blocks.0.mlp.down_proj.weight", False)
    tensors["blocks.1.ff.W_up.weight"] = torch.randn_like(tensors["blocks.1.ff.W_up.weight"])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match="no tensor holds the weight of model.layers.1.mlp.up_proj"):
        locate(targets, read_checkpoint(tmp_path), 3)


def test_an_adapter_of_another_model_is_refused(base: Path, healed: tuple[Path, Any, Any], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not fit this checkpoint"):
        merge_adapter(base, healed[0] / "adapter", tmp_path, {"model.layers.0.mlp.up_proj": Stored("x", False)})


# Whole runs


def test_healing_lowers_the_loss_and_records_what_it_did(
    base: Path, data: str, healed: tuple[Path, dict[str, Any], list[str]], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    out, result, said = healed
    ids_NT = torch.from_numpy(pack(tiny_tokenizer, data, 16, 32, 7, tmp_path).ids_NT.astype("int64"))
    assert loss_of(out, ids_NT) < loss_of(base, ids_NT) - 0.3
    assert said[0].startswith("healing: 12 steps of 4 x 32 = 1,536 tokens of ")
    assert result["losses"]["last"] < result["losses"]["first"]
    assert [step for step, _ in result["losses"]["curve"]] == list(range(1, 13))
    assert result["trainable"] == 3 * 3 * 4 * (64 + 128)
    assert result["modules"] == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert (
        result["settings"]["lora_rank"] == 4 and result["origin"]["lora_rank"] == "user" and result["origin"]["dropout"] == "ours"
    )
    record = json.loads((out / "layerprune.json").read_text())
    assert record["kept"] == [0, 1, 4] and record["healing"] == json.loads(json.dumps(result))
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "base_model: some/base" in card and "without layers 2:4" in card and "healed" in card
    assert not (out.parent / f".{out.name}.work").exists()
    text = format_healing(result, str(out))
    assert f"adapter: {out / 'adapter'}" in text and "lora_rank 4 (user)" in text
    (first, begun), *_, (last, ended) = result["held_out"]
    assert (first, last) == (0, 12) and ended < begun
    assert f"held-out loss {begun:.4f} -> {ended:.4f} (normalised)" in text.splitlines()
    assert "held-out" not in format_healing({**result, "held_out": []}, str(out))


def test_only_the_trained_weights_change(base: Path, healed: tuple[Path, Any, Any]) -> None:
    before, after = read_checkpoint(base), read_checkpoint(healed[0])
    assert before.keys() == after.keys() and {t.file.name for t in before.values()} == {t.file.name for t in after.values()}
    changed = {name for name in before if before[name].read() != after[name].read()}
    assert changed == {f"model.layers.{i}.mlp.{n}.weight" for i in range(3) for n in ("gate_proj", "up_proj", "down_proj")}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (base / name).read_bytes() == (healed[0] / name).read_bytes()


def test_merged_equals_adapter_on_within_bf16_rounding(base: Path, healed: tuple[Path, Any, Any]) -> None:
    from peft import PeftModel

    out = healed[0]
    ids = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    merged, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out / "adapter").eval()
    with torch.no_grad():
        on, off = adapted(input_ids=ids).logits, adapted.get_base_model().eval()
        with adapted.disable_adapter():
            unhealed = off(input_ids=ids).logits
    exact = adapted.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(exact(input_ids=ids).logits, on, rtol=1e-4, atol=1e-4)
    trained = {n: p for n, p in exact.named_parameters() if "mlp." in n}
    for name, weight in trained.items():
        stored = merged.get_parameter(name)
        assert ((stored - weight).abs() <= BF16_ROUNDOFF * weight.abs() * (1 + 1e-4) + 1e-7).all(), name
    # a logit moves, to first order, by at most sum |d logit / d weight| * rounding
    for parameter in exact.parameters():
        parameter.requires_grad_(False)
    for weight in trained.values():
        weight.requires_grad_(True)
    logits = exact(input_ids=ids).logits
    with torch.no_grad():
        found = merged(input_ids=ids).logits
    for b, t, v in ((0, 3, 17), (1, 23, 250), (0, 23, 99)):
        gradients = torch.autograd.grad(logits[b, t, v], list(trained.values()), retain_graph=True)
        bound = (
            sum(float((g.abs() * w.detach().abs()).sum()) for g, w in zip(gradients, trained.values(), strict=True)) * BF16_ROUNDOFF
        )
        assert abs(float(found[b, t, v] - on[b, t, v])) <= bound * 1.1
    assert float((found - on).abs().max()) < float((unhealed - on).abs().max()) / 20, "the adapter does far more than rounding"


def test_two_runs_with_one_seed_agree_and_another_seed_differs(
    base: Path, data: str, healed: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    again = heal_checkpoint(base, tmp_path / "model", data=data, report=lambda line: None, adapter=tmp_path / "adapter", **SMALL)
    first = digest(healed[0])
    inside = {name.removeprefix("adapter/"): value for name, value in first.items() if name.startswith("adapter/")}
    assert digest(tmp_path / "model") == {n: v for n, v in first.items() if not n.startswith("adapter/")}
    assert digest(tmp_path / "adapter") == inside and inside
    assert again["losses"] == healed[1]["losses"] and again["adapter"] == "../adapter"
    heal_checkpoint(base, tmp_path / "other", data=data, report=lambda line: None, seed=1, **SMALL)
    assert digest(tmp_path / "other")["adapter/adapter_model.safetensors"] != inside["adapter_model.safetensors"]


def test_the_micro_batch_does_not_change_what_is_learnt(
    base: Path, data: str, healed: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    same = {**SMALL, "dropout": 0.0}
    for size in (4, 1):
        heal_checkpoint(base, tmp_path / str(size), data=data, micro_batch=size, report=lambda line: None, **same)
    whole, split = (load_file(tmp_path / str(size) / "adapter" / "adapter_model.safetensors") for size in (4, 1))
    for name, value in whole.items():
        # Adam's first steps are signs: rounding may flip those of gradients near zero
        assert torch.linalg.norm(split[name] - value) < 0.1 * torch.linalg.norm(value), name


_KILLED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from layerprune.heal import merge, packing, train, trainer, watch

root, base, data, settings = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
watch.SAVE_SECONDS = 0.0

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def packing_dies():
    documents = packing.stream_documents
    def some(*args):
        for number, text in enumerate(documents(*args)):
            die() if number == 40 else None
            yield text
    packing.stream_documents, packing._TOGETHER = some, 16

def saving_dies():  # in the middle of writing a Trainer checkpoint
    save = trainer.Trainer._save_rng_state
    trainer.Trainer._save_rng_state = lambda self, folder: die() if self.state.global_step == 4 else save(self, folder)

def merging_dies():
    write = merge.write_checkpoint
    def once(tensors, folder, replace, progress):
        write(tensors, folder, replace, die)
    merge.write_checkpoint = once

def publishing_dies():  # the adapter is in its place, the checkpoint is not
    replace = os.replace
    os.replace = lambda a, b: die() if Path(b).name == "model" else replace(a, b)

phases = {"packing": packing_dies, "training": saving_dies, "merging": merging_dies, "publishing": publishing_dies}
for name in ("undisturbed", *phases):
    folder = root / name
    def heal():
        said = []
        train.heal_checkpoint(base, folder / "model", data=data, adapter=folder / "adapter", report=said.append, **settings)
        return said
    if name in phases:
        child = os.fork()
        if child == 0:
            phases[name]()
            heal()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
        assert not (folder / "model").exists(), name
    print(json.dumps([name, heal()]))
"""


def test_a_run_killed_in_any_phase_ends_with_the_same_bytes(base: Path, data: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), str(base), data, json.dumps({**SMALL, "steps": 6, "batch_size": 16})],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(said) == ["undisturbed", "packing", "training", "merging", "publishing"]
    assert any("going on from step 3 of 6" in line for line in said["training"])
    assert not any("trainable" in line for line in said["merging"]), "training is not done again"
    expected, losses = digest(tmp_path / "undisturbed"), None
    assert {"adapter/adapter_model.safetensors", "model/config.json"} <= expected.keys()
    for name in said:
        assert digest(tmp_path / name) == expected, name
        found = json.loads((tmp_path / name / "model" / "layerprune.json").read_text())["healing"]["losses"]
        losses = losses or found
        assert found == losses, name
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["adapter", "model"], "nothing is left behind"


# Refusals


def test_other_settings_do_not_go_on_with_a_started_healing(base: Path, data: str, tmp_path: Path, monkeypatch: Any) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layerprune.heal.merge.merge_adapter", stop)
    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(base, tmp_path / "model", data=data, report=lambda line: None, **{**SMALL, "steps": 2, "warmup_steps": 0})
    with pytest.raises(UsageError, match="begun with other settings .*steps was 2, now 3"):
        heal_checkpoint(base, tmp_path / "model", data=data, report=lambda line: None, **{**SMALL, "steps": 3, "warmup_steps": 0})
    assert not (tmp_path / "model").exists() and (tmp_path / ".model.work" / "trained.json").exists()


def test_an_output_or_adapter_that_exists_is_left_alone(base: Path, data: str, tmp_path: Path) -> None:
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    with pytest.raises(UsageError, match="model exists already and is left as it is"):
        heal_checkpoint(base, tmp_path / "model", data=data, **SMALL)
    with pytest.raises(UsageError, match="adapter exists already and is left as it is"):
        heal_checkpoint(base, tmp_path / "new", data=data, adapter=tmp_path / "adapter", report=lambda line: None, **SMALL)
    assert (tmp_path / "adapter" / "mine").read_text() == "mine" and not (tmp_path / "new").exists()


def test_a_loss_that_is_no_number_is_refused_with_the_good_state_kept(
    base: Path, data: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(watch, "SAVE_SECONDS", 0.0)
    step = trainer.Trainer.training_step

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(trainer.Trainer, "training_step", broken)
    with pytest.raises(Refused, match="not a number at step 5 of 12.*smaller --learning-rate.*last good state stays in"):
        heal_checkpoint(base, tmp_path / "model", data=data, report=lambda line: None, **SMALL)
    assert not (tmp_path / "model").exists()
    last = trainer.newest_checkpoint(tmp_path / ".model.work")
    assert last is not None and last.name == "checkpoint-4"


def test_where_memory_runs_out_a_smaller_micro_batch_goes_on(base: Path, data: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(watch, "SAVE_SECONDS", 0.0)
    step = trainer.Trainer.training_step
    full = 0

    def short(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= full and len(inputs["input_ids"]) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "training_step", short)
    said: list[str] = []
    given = {"data": data, "report": said.append, **SMALL}
    with pytest.raises(
        Refused, match="ran out with 4 sequences of 32 tokens at once: use a smaller .* --length; no step was saved"
    ):
        heal_checkpoint(base, tmp_path / "model", **given)
    assert not (tmp_path / ".model.work").exists()
    full = 3
    with pytest.raises(Refused, match=f"smaller --micro-batch or --memory, it goes on from step 3 in {tmp_path}/.model.work$"):
        heal_checkpoint(base, tmp_path / "model", **given)
    assert heal_checkpoint(base, tmp_path / "model", micro_batch=2, **given)["steps"] == 12
    assert "going on from step 3 of 12" in said


def test_what_cannot_be_healed_is_refused_before_training(
    base: Path, data: str, tmp_path: Path, build_llama: Callable[..., Path]
) -> None:
    quantised = build_llama(tmp_path / "quantised", layers=1)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (quantised / "config.json").write_text(json.dumps(config))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (quantised, {"data": data}, "is quantised already: heal its unquantised checkpoint"),
        (base, {"data": str(tmp_path / "none.jsonl")}, "is neither 'c4' nor an existing file"),
        (base, {"data": data, "targets": ["w1"]}, "target 'w1' is no linear layer"),
    ]
    for model, options, told in cases:
        with pytest.raises((UsageError, Refused), match=told):
            heal_checkpoint(model, tmp_path / "out", report=lambda line: None, **{**SMALL, **options})
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.work").exists()


def test_a_second_gpu_is_refused_in_words_that_help() -> None:
    from layerprune.heal.checks import check_device

    for device in ("cpu", "cuda", "cuda:0", "mps"):
        check_device(device)
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=1"):
        check_device("cuda:1")


# What a tester found


@pytest.fixture(scope="module")
def cut_pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cut of a bf16 model, with its original beside it."""
    from layerprune.prune.cut import prune_checkpoint

    source = tmp_path_factory.mktemp("pair") / "whole"
    shutil.copytree(base, source)
    (source / "layerprune.json").unlink()
    prune_checkpoint(str(source), source.parent / "cut", layers="1:2")
    return source.parent / "cut"


def test_a_bridge_alone_is_told_and_leaves_the_held_out_documents(
    cut_pair: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerprune.heal import bridge
    from layerprune.heal.packing import validation_documents
    from layerprune.model.data import document_hash

    used: list[list[str]] = []
    read = bridge.tokenise

    def seen(tokenizer: Any, texts: list[str], *args: Any, **kwargs: Any) -> Any:
        used.append(list(texts))
        return read(tokenizer, texts, *args, **kwargs)

    monkeypatch.setattr(bridge, "tokenise", seen)
    said: list[str] = []
    more = {"data": data, "length": 32, "device": "cpu", "report": said.append}
    result = heal_checkpoint(cut_pair, tmp_path / "bridged", bridge="map", steps=0, **more)
    said += format_healing(result, str(tmp_path / "bridged")).splitlines()
    assert sum("bridge over layers" in line for line in said) == 1, "not on stderr and in the result"
    documents = validation_documents(None, data, 32, 0)
    fitted, measured = used
    assert documents and fitted and not set(map(document_hash, documents)) & set(map(document_hash, fitted))
    assert measured == documents and result["loss"]["documents"] == len(documents)
    loss = result["loss"]
    for folder, told in ((cut_pair, loss["cut"]), (tmp_path / "bridged", loss["bridged"])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer, nats, tokens = AutoTokenizer.from_pretrained(folder), 0.0, 0
        for text in documents:
            ids = torch.tensor([tokenizer(text)["input_ids"][:32]])
            with torch.no_grad():
                nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
        assert told == pytest.approx(nats / tokens / math.log(model.config.vocab_size), rel=1e-5)
    assert json.loads((tmp_path / "bridged" / "layerprune.json").read_text())["bridge"]["loss"] == loss
    card = " ".join((tmp_path / "bridged" / "README.md").read_text().split())
    assert f"it was not fitted on: {loss['cut']:.4f} without it, {loss['bridged']:.4f} with it." in card
    assert sum(line.startswith(f"held-out loss {loss['cut']:.4f} -> {loss['bridged']:.4f} (normalised") for line in said) == 1
    (user,) = (line for part in said for line in part.splitlines() if line.startswith("  user: "))
    assert ", steps 0, " in user


def test_a_bridge_that_makes_the_loss_worse_says_so() -> None:
    from layerprune.heal.bridge import format_bridges

    loss = {"cut": 0.5, "bridged": 0.6, "documents": 9}
    worse = "held-out loss 0.5000 -> 0.6000 (normalised, 9 documents): worse than the cut without the bridge"
    assert format_bridges({"bridges": [], "loss": loss}) == [worse]
    better = format_bridges({"bridges": [], "loss": {**loss, "bridged": 0.4}})
    assert better == ["held-out loss 0.5000 -> 0.4000 (normalised, 9 documents)"] and format_bridges({"bridges": []}) == []


def test_a_bridge_is_told_before_its_copy_is_made(cut_pair: Path, data: str, tmp_path: Path) -> None:
    said: list[str] = []
    more: dict[str, Any] = {"data": data, "length": 32, "device": "cpu", "report": said.append}
    heal_checkpoint(cut_pair, tmp_path / "out", bridge="map", steps=0, nf4_copy=True, validation_samples=0, **more)
    at = said.index("quantising a copy")
    assert said[at - 1].startswith("bridge over layers") and (tmp_path / "out-nf4").is_dir()
    assert "loss" not in json.loads((tmp_path / "out" / "layerprune.json").read_text())["bridge"]


def test_an_adapter_trained_on_a_bridge_comes_with_its_tensors(cut_pair: Path, data: str, tmp_path: Path) -> None:
    from peft import PeftModel

    small = {**SMALL, "steps": 3}
    heal_checkpoint(cut_pair, tmp_path / "out", data=data, bridge="projection", report=lambda line: None, **small)
    model = AutoModelForCausalLM.from_pretrained(cut_pair, dtype=torch.float32)
    state = load_file(tmp_path / "out" / "adapter" / "bridge.safetensors")
    assert len(state) == 1
    model.load_state_dict({**model.state_dict(), **{k: v.float() for k, v in state.items()}})
    adapted = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(2, 300, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        on, found = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
    assert float((on - found).abs().max()) < 0.05 * float(on.std())


def test_healing_again_keeps_the_first_record(base: Path, data: str, healed: tuple[Path, Any, Any], tmp_path: Path) -> None:
    again = heal_checkpoint(healed[0], tmp_path / "again", data=data, report=lambda line: None, **{**SMALL, "steps": 2})
    record = json.loads((tmp_path / "again" / "layerprune.json").read_text())["healing"]
    assert record["steps"] == again["steps"] == 2 and record["previous"]["steps"] == 12


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"report_to": ["nonsense"]}, "--report-to nonsense is not to be had here: install its package"),
        ({"adapters": "window:²"}, "--adapters window:² is none of"),
        ({"adapters": "after"}, "counts from the cut, and this checkpoint has none on record"),
        ({"targets": []}, "--targets is empty"),
        (
            {"targets": ["foo"]},
            r"it has mlp.down_proj, mlp.gate_proj, mlp.up_proj; attention.* has self_attn.k_proj, self_attn.o_proj,",
        ),
        ({"targets": ["q_proj"]}, r"self_attn.q_proj is elsewhere: write it out, or take `attention`"),
        ({"teacher": "demo"}, "--teacher demo is for --distil or --bridge"),
        ({"distil": 1.0, "bridge": "map"}, "--distil and --bridge cannot be combined"),
        ({"memory": "much"}, "--memory much is no amount of memory"),
        ({"ram": "much"}, "--ram much is no amount of memory"),
        ({"memory": "8GiB"}, "--memory is the GPU's, and this healing runs on the CPU: use --ram"),
        ({"tokens": 100}, "--heal-steps 12 and --heal-tokens 100 both say"),
    ],
)
def test_settings_that_cannot_be_are_told(build_llama: Any, data: str, tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    folder = build_llama(tmp_path / "plain", layers=2, hidden=64, intermediate_size=128, max_position_embeddings=128)
    with pytest.raises(UsageError, match=told):
        heal_checkpoint(folder, tmp_path / "out", data=data, report=lambda line: None, **{**SMALL, **changed})
    assert not (tmp_path / "out").exists()


def test_too_little_ram_is_refused_before_anything_is_loaded(base: Path, data: str, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(Refused, match="does not fit in --ram 0.29GiB: the process and the model take 0.68 GiB alone"):
        heal_checkpoint(base, tmp_path / "out", data=data, report=said.append, ram="300MiB", **SMALL)
    assert said == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_report_whose_package_is_missing_names_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(UsageError, match=f"{name} is not to be had here: pip install {name}, or take one of mlflow"):
        check_reports([name])
    check_reports(["mlflow"])
