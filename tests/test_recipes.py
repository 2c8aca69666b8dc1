"""Recipes: the paper's table, sizes against the real model classes, faults, estimates, and what `check`
prints."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerprune.check import check_recipe_file, format_check, size
from layerprune.model.errors import Refused, UsageError
from layerprune.model.estimate import (
    DEVICES,
    NF4_BITS,
    estimate,
    heal_memory,
    lora_parameters,
    parameters_of,
    rank_memory,
    shape_of_checkpoint,
    task_size,
)
from layerprune.model.recipes import (
    RECIPES,
    EvalSettings,
    HealSettings,
    RankSettings,
    Recipe,
    Shape,
    load_recipe,
    read_recipe,
    recipe_names,
    section_of,
)

# arXiv 2403.17887, App. A.1: Hub id, layers, healing length, million tokens, peak learning rate, LoRA rank,
# targets.
GLU = {"gate_proj", "down_proj", "up_proj"}
PAPER = {
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", 32, 2048, 164, 3e-4, 2, GLU),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", 40, 4096, 328, 3e-4, 64, GLU),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", 80, 4096, 328, 3e-5, 8, GLU),
    "qwen-7b": ("Qwen/Qwen-7B", 32, 2048, 164, 3e-4, 64, {"w1", "w2", "mlp.c_proj"}),
    "qwen-14b": ("Qwen/Qwen-14B", 40, 4096, 328, 3e-4, 64, {"w1", "w2", "mlp.c_proj"}),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", 32, 2048, 164, 3e-6, 4, GLU),
    "phi-2": ("microsoft/phi-2", 32, 2048, 164, 2e-4, 64, {"fc1", "fc2"}),
}


def _config(
    layers: int, hidden: int, mlp: int, heads: int, kv: int, vocab: int, tied: bool, **more: Any
) -> dict[str, Any]:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "vocab_size": vocab,
    }
    heads_and_ties = {"num_attention_heads": heads, "num_key_value_heads": kv, "tie_word_embeddings": tied}
    return {**sizes, **heads_and_ties, "pad_token_id": 0, **more}


def _with_vision(**text: Any) -> dict[str, Any]:
    tower = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    return {"text_config": text, "vision_config": tower}


# Sizes of the public config.json of every model that transformers has a class for.
PUBLIC: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("llama", _config(32, 4096, 11008, 32, 32, 32000, False)),
    "llama-2-13b": ("llama", _config(40, 5120, 13824, 40, 40, 32000, False)),
    "llama-2-70b": ("llama", _config(80, 8192, 28672, 64, 8, 32000, False)),
    "mistral-7b": ("mistral", _config(32, 4096, 14336, 32, 8, 32000, False)),
    "mistral-7b-v0.3": ("mistral", _config(32, 4096, 14336, 32, 8, 32768, False)),
    "phi-2": ("phi", _config(32, 2560, 10240, 32, 32, 51200, False)),
    "llama-3.1-8b": ("llama", _config(32, 4096, 14336, 32, 8, 128256, False)),
    "llama-3.1-70b": ("llama", _config(80, 8192, 28672, 64, 8, 128256, False)),
    "llama-3.2-1b": ("llama", _config(16, 2048, 8192, 32, 8, 128256, True, head_dim=64)),
    "llama-3.2-3b": ("llama", _config(28, 3072, 8192, 24, 8, 128256, True, head_dim=128)),
    "qwen2.5-0.5b": ("qwen2", _config(24, 896, 4864, 14, 2, 151936, True)),
    "qwen2.5-1.5b": ("qwen2", _config(28, 1536, 8960, 12, 2, 151936, True)),
    "qwen2.5-3b": ("qwen2", _config(36, 2048, 11008, 16, 2, 151936, True)),
    "qwen2.5-7b": ("qwen2", _config(28, 3584, 18944, 28, 4, 152064, False)),
    "qwen2.5-14b": ("qwen2", _config(48, 5120, 13824, 40, 8, 152064, False)),
    "qwen2.5-32b": ("qwen2", _config(64, 5120, 27648, 40, 8, 152064, False)),
    "qwen2.5-72b": ("qwen2", _config(80, 8192, 29568, 64, 8, 152064, False)),
    "qwen3-0.6b": ("qwen3", _config(28, 1024, 3072, 16, 8, 151936, True, head_dim=128)),
    "qwen3-1.7b": ("qwen3", _config(28, 2048, 6144, 16, 8, 151936, True, head_dim=128)),
    "qwen3-4b": ("qwen3", _config(36, 2560, 9728, 32, 8, 151936, True, head_dim=128)),
    "qwen3-8b": ("qwen3", _config(36, 4096, 12288, 32, 8, 151936, False, head_dim=128)),
    "qwen3-14b": ("qwen3", _config(40, 5120, 17408, 40, 8, 151936, False, head_dim=128)),
    "qwen3-32b": ("qwen3", _config(64, 5120, 25600, 64, 8, 151936, False, head_dim=128)),
    "gemma-2-2b": ("gemma2", _config(26, 2304, 9216, 8, 4, 256000, True, head_dim=256)),
    "gemma-2-9b": ("gemma2", _config(42, 3584, 14336, 16, 8, 256000, True, head_dim=256)),
    "gemma-2-27b": ("gemma2", _config(46, 4608, 36864, 32, 16, 256000, True, head_dim=128)),
    "gemma-3-1b": ("gemma3_text", _config(26, 1152, 6912, 4, 1, 262144, True, head_dim=256)),
    "gemma-3-4b": ("gemma3", _with_vision(**_config(34, 2560, 10240, 8, 4, 262208, True, head_dim=256))),
    "gemma-3-12b": ("gemma3", _with_vision(**_config(48, 3840, 15360, 16, 8, 262208, True, head_dim=256))),
    "gemma-3-27b": ("gemma3", _with_vision(**_config(62, 5376, 21504, 32, 16, 262208, True, head_dim=128))),
    "phi-3-mini": ("phi3", _config(32, 3072, 8192, 32, 32, 32064, False)),
    "phi-4": ("phi3", _config(40, 5120, 17920, 40, 10, 100352, False)),
    "phi-4-mini": ("phi3", _config(32, 3072, 8192, 24, 8, 200064, True, partial_rotary_factor=0.75)),
    "olmo-2-1b": ("olmo2", _config(16, 2048, 8192, 16, 16, 100352, False)),
    "olmo-2-7b": ("olmo2", _config(32, 4096, 11008, 32, 32, 100352, False)),
    "olmo-2-13b": ("olmo2", _config(40, 5120, 13824, 40, 40, 100352, False)),
    "smollm2-135m": ("llama", _config(30, 576, 1536, 9, 3, 49152, True)),
    "smollm2-360m": ("llama", _config(32, 960, 2560, 15, 5, 49152, True)),
    "smollm2-1.7b": ("llama", _config(24, 2048, 8192, 32, 32, 49152, True)),
    "smollm3-3b": ("smollm3", _config(36, 2048, 11008, 16, 4, 128256, True)),
}
HUB_RECIPES = [name for name in recipe_names() if not load_recipe(name).model.startswith("./")]


def test_every_recipe_is_known_to_these_tests() -> None:
    assert set(HUB_RECIPES) == set(PAPER) | set(PUBLIC)


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_are_the_papers_table(name: str) -> None:
    hub, layers, length, millions, rate, rank, targets = PAPER[name]
    recipe = load_recipe(name)
    heal = recipe.heal
    assert recipe.origin == "paper"
    assert (recipe.model, recipe.shape.layers) == (hub, layers)
    assert (heal.length, heal.learning_rate) == (length, rate)
    assert (heal.lora_rank, set(heal.targets)) == (rank, targets)
    assert (heal.steps, heal.batch_size, heal.warmup_steps) == (5000, 16, 100)
    assert (heal.dropout, heal.data) == (0.05, "c4")
    by_step = {step.name: step for step in estimate(recipe, 0.4).steps}
    assert by_step["heal"].tokens == 5000 * 16 * length
    assert round(by_step["heal"].tokens / 1e6) == millions
    assert (recipe.rank.samples, recipe.rank.data) == (10_000, "c4")
    assert (recipe.eval.samples, recipe.eval.tasks) == (60_000, {"mmlu": 5, "boolq": 0})


def test_only_the_papers_models_claim_the_papers_settings() -> None:
    assert {name for name in recipe_names() if load_recipe(name).origin == "paper"} == set(PAPER)


def _build(kind: str, config: dict[str, Any], layers: int) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if "text_config" in config:
        config = {**config, "text_config": {**config["text_config"], "num_hidden_layers": layers}}
    else:
        config = {**config, "num_hidden_layers": layers}
    auto = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(kind, **config))


@pytest.mark.parametrize("name", PUBLIC)
def test_shape_and_targets_are_those_of_the_model_class(name: str) -> None:
    kind, config = PUBLIC[name]
    text = config.get("text_config", config)
    one, two = _build(kind, config, 1), _build(kind, config, 2)
    first, second = (sum(p.numel() for p in model.parameters()) for model in (one, two))
    layer = second - first
    recipe = load_recipe(name)
    layers = text["num_hidden_layers"]
    total = first + (layers - 1) * layer
    assert recipe.shape == Shape(
        layers, text["hidden_size"], text["vocab_size"], total, layer, text["intermediate_size"]
    )
    modules = {path: module for path, module in two.named_modules() if type(module).__name__ == "Linear"}
    hits = [path for path in modules for target in recipe.heal.targets if path.endswith(f".{target}")]
    assert len(hits) == 2 * len(recipe.heal.targets), "each target is one linear in each of the two layers"
    assert all(".mlp." in path and "vision" not in path for path in hits)
    trainable = sum(recipe.heal.lora_rank * sum(modules[path].weight.shape) for path in hits)
    assert lora_parameters(recipe.shape, recipe.heal, 2) == trainable


def test_qwen_1_says_that_it_is_remote_code() -> None:
    from transformers import CONFIG_MAPPING

    assert "qwen" not in CONFIG_MAPPING, "transformers has a class now: the note is out of date"
    for name in ("qwen-7b", "qwen-14b"):
        text = format_check(check_recipe_file(name, 0.15))
        assert "Remote code" in text and "--trust-remote-code" in text


@pytest.mark.parametrize("name", HUB_RECIPES)
def test_header_says_what_how_on_what_and_what_to_expect(name: str) -> None:
    recipe = load_recipe(name)
    header = (RECIPES / f"{name}.yaml").read_text().split("\nmodel:")[0]
    command = re.search(r"^# Run: +layerprune run --model (\S+) --drop (\S+)$", header, re.M)
    assert command and command[1] == name
    assert "# Hardware:" in header and "# Expected:" in header
    assert ("settings are ours" in header) == (recipe.origin == "ours")
    found = estimate(recipe, float(command[2]))
    memory = {step.name: size(step.memory) for step in found.steps}
    stated = re.search(r"ranking (.+?), healing (.+?), evaluating (.+?) of memory;\n# +(.+?) of disk", header)
    assert stated, "the header states its hardware"
    assert stated.groups() == (memory["rank"], memory["heal"], memory["loss"], size(sum(found.disk.values())))


def test_unknown_recipe_names_near_ones() -> None:
    with pytest.raises(UsageError, match="did you mean llama-2-70b"):
        check_recipe_file("lama-2-70b")
    with pytest.raises(UsageError, match="`layerprune recipes` lists them all"):
        load_recipe("zzzzzzzz")


GOOD = """\
model: someone/something
origin: ours
shape: {layers: 8, hidden: 64, vocab: 512, parameters: 1_000_000}
"""


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "origin: mine\nshape: {layers: 0, hidden: 64, vocab: 512}\nheel: {}\n"
        "task_folder: ./nowhere\nnote: [1]\n"
        "rank: {sample: 3, data: ./gone.jsonl}\nheal: {learning_rate: 3e-4, dropout: 1.5, targets: mlp}\n"
        "eval: {tasks: {mmlu: five}}\ncurve: [0.1, 2]\n"
    )
    with pytest.raises(Refused) as caught:
        check_recipe_file(bad)
    message = str(caught.value)
    parts = [
        "14 faults",
        "unknown setting 'heel' (did you mean 'heal'?)",
        "shape.layers: 0 is not a whole number above 0",
        "shape.parameters: missing",
        "rank.sample: unknown setting (did you mean 'samples'?)",
        "write 3.0e-4",
        "heal.dropout: 1.5",
        "heal.targets: 'mlp'",
        "eval.tasks",
        "model: a Hub id is missing",
        "origin: 'mine'",
        "curve: [0.1, 2]",
        "note: [1] is not text",
        "task_folder: ./nowhere does not exist",
        "rank.data: ./gone.jsonl does not exist",
    ]
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("heal: {steps: 100, warmup_steps: 100}", "leaves none of the 100 steps"),
        ("origin: paper", "'origin' is set twice, the second time on line 4"),
        ("heal: [1", "cannot be read as YAML"),
    ],
)
def test_single_faults(tmp_path: Path, more: str, fault: str) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(GOOD)
    assert read_recipe(path).shape.layers == 8
    path.write_text(GOOD + more + "\n")
    with pytest.raises(Refused, match=fault):
        read_recipe(path)


def test_layers_cannot_hold_more_than_the_model(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD.replace("1_000_000", "1_000_000, layer_parameters: 125_001"))
    with pytest.raises(Refused, match="8 layers of 125,001 are more than the model's 1,000,000"):
        read_recipe(path)


def test_llama_2_70b_against_hand_arithmetic() -> None:
    recipe = load_recipe("llama-2-70b")
    found = estimate(recipe, 0.4)
    # A layer: q and o 8192 x 8192, k and v 8192 x 1024, gate, up and down 8192 x 28672, two norms.
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    outside = 2 * 32000 * 8192 + 8192
    assert (found.dropped, found.kept, found.exact) == (32, 48, True)
    assert found.kept_parameters == 48 * layer + outside
    by_step = {step.name: step for step in found.steps}
    assert by_step["heal"].flops == pytest.approx(4 * (48 * layer + outside) * 5000 * 16 * 4096)
    assert by_step["heal"].steps == 5000
    lora = 48 * 8 * 3 * (8192 + 28672)
    token = 2 * 8192 * 48 + 26 * 8192 + 13 * 28672 + 12 * 32000
    by_hand = 48 * layer * 4.127 / 8 + outside * 2 + lora * 16 + 4096 * token
    assert by_step["heal"].memory == pytest.approx(by_hand, rel=1e-4)
    assert by_step["heal"].memory < 40e9, "the paper heals it on one 40 GB A100"
    assert found.disk["source"] == 2 * (80 * layer + outside)
    assert found.disk["pruned"] == found.disk["healed"] == 2 * found.kept_parameters
    assert found.disk["work"] == 12 * lora
    assert by_step["rank"].tokens == 10_000 * 430
    assert by_step["loss"].tokens == 60_000 * 430
    assert by_step["rank"].hours == pytest.approx(2 * (80 * layer + outside) * 4.3e6 / (0.4 * 989e12) / 3600)
    assert by_step["mmlu"].tokens == 14_042 * 130 * 6
    assert by_step["boolq"].tokens == 3_270 * 130


def test_memory_formulas_meet_what_was_measured_on_a_gpu() -> None:
    shape = load_recipe("llama-2-7b").shape
    heal = HealSettings(lora_rank=64, length=2048)
    assert heal_memory(shape, heal, 32, micro_batch=16) == pytest.approx(33.7 * 2**30, rel=0.06)
    assert rank_memory(shape, DEVICES["h100"]) == pytest.approx(14.1 * 2**30, rel=0.03)
    assert pytest.approx(4.127, abs=1e-3) == NF4_BITS


@pytest.mark.parametrize("name", ["llama-2-70b", "llama-3.1-8b", "qwen3-32b", "phi-2"])
def test_parameters_without_a_layers_size_are_near(name: str) -> None:
    shape = load_recipe(name).shape
    rough = Shape(shape.layers, shape.hidden, shape.vocab, shape.parameters)
    kept = shape.layers * 3 // 5
    exact, yes = parameters_of(shape, kept)
    near, no = parameters_of(rough, kept)
    assert (yes, no) == (True, False)
    assert near == pytest.approx(exact, rel=0.02)
    assert parameters_of(rough, shape.layers)[0] == shape.parameters


def test_limits_and_devices_change_the_estimate() -> None:
    assert task_size("mmlu", EvalSettings(tasks={"mmlu": 0}, limit=10)) == (570, 570 * 130)
    recipe = load_recipe("smollm2-135m")
    on_gpu, on_cpu = (estimate(recipe, 0.3, DEVICES[name]).steps[0] for name in ("h100", "cpu"))
    assert on_gpu.flops == on_cpu.flops
    assert on_cpu.hours / on_gpu.hours == pytest.approx(0.4 * 989e12 / 100e9)
    with pytest.raises(UsageError, match="drops all 30"):
        estimate(recipe, 0.99)
    with pytest.raises(UsageError, match="no device of the estimates"):
        check_recipe_file("phi-2", device="abacus")


def _checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """Three layers of 10 parameters and 14 outside, bf16."""
    folder.mkdir()
    sizes = {"model.embed.weight": 12, "model.norm.weight": 2}
    sizes |= {f"model.layers.{i}.{part}.weight": n for i in range(3) for part, n in (("a", 4), ("b", 6))}
    at, header = 0, {}
    for name, count in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [count], "data_offsets": [at, at + 2 * count]}
        at += 2 * count
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_local_checkpoint_is_counted_from_its_headers(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 3, "hidden_size": 2, "vocab_size": 6, "intermediate_size": 3}
    folder = _checkpoint(tmp_path / "tiny", config)
    assert shape_of_checkpoint(folder) == (Shape(3, 2, 6, 44, 10, 3), 2.0)
    nested = _checkpoint(tmp_path / "nested", {"text_config": config, "vision_config": {"hidden_size": 99}})
    assert shape_of_checkpoint(nested)[0].hidden == 2
    checked = check_recipe_file(folder, 0.3)
    assert (checked["kept"], checked["kept_parameters"], checked["disk"]["pruned"]) == (2, 34, 68)
    assert "tiny" in format_check(checked)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"hidden_size": 2, "vocab_size": 6}, "does not say num_hidden_layers"),
        (
            {"num_hidden_layers": 3, "hidden_size": 2, "vocab_size": 6, "quantization_config": {}},
            "quantised already",
        ),
    ],
)
def test_checkpoints_that_cannot_be_counted_are_refused(
    tmp_path: Path, config: dict[str, Any], fault: str
) -> None:
    with pytest.raises(Refused, match=fault):
        shape_of_checkpoint(_checkpoint(tmp_path / "bad", config))


def test_what_check_prints() -> None:
    text = format_check(check_recipe_file("llama-2-70b"))
    assert text.splitlines()[:3] == [
        "llama-2-70b: meta-llama/Llama-2-70b-hf, the paper's settings, no fault found",
        "80 layers, hidden size 8,192, vocabulary 32,000, 68.98 B parameters",
        "--drop 0.4 drops 32 layers and keeps 48: 41.60 B parameters (60%)",
    ]
    assert re.search(r"^heal +80,000 +327.7 M +5,000 +54,520 +34 +30 GB$", text, re.M)
    assert "disk 306 GB: source 138 GB, pruned 83 GB, healed 83 GB, work 510 MB, C4 980 MB" in text


def test_check_says_what_it_cannot_estimate() -> None:
    shape = Shape(8, 64, 512, 1_000_000)
    recipe = Recipe("r", "a/b", "ours", shape, eval=EvalSettings(tasks={"my_task": 0}))
    found = estimate(recipe, 0.5)
    assert found.unknown_tasks == ("my_task",)
    assert not found.exact


def test_estimates_import_no_torch() -> None:
    code = (
        "import sys, layerprune.check as c; c.format_check(c.check_recipe_file('phi-2', 0.2)); "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_steps_data_is_a_path_from_here() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        for kind, own in ((RankSettings, recipe.rank), (HealSettings, recipe.heal), (EvalSettings, recipe.eval)):
            found = section_of(recipe, kind)
            expected = str(RECIPES / own.data[2:]) if own.data.startswith("./") else own.data
            assert found == replace(own, data=found.data) and Path(found.data) == Path(expected), (name, kind)
            assert section_of(None, kind) == kind()
    assert Path(section_of(load_recipe("demo"), HealSettings).data).is_file()
