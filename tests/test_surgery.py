"""Names of layers inside a quantisation config, and what identifies a checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerprune.model.errors import Refused
from layerprune.model.fingerprint import checkpoint_fingerprint
from layerprune.model.plan import plan_cut
from layerprune.model.surgery import _cut_names
from layerprune.model.tensors import read_checkpoint
from layerprune.prune.cut import prune_checkpoint

KEPT = (0, 3, 4, 5)  # of 6 layers
RENAMED = {
    f"model.layers.{old}.{part}.weight": f"model.layers.{new}.{part}.weight"
    for new, old in enumerate(KEPT)
    for part in ("mlp.up_proj", "mlp.w1", "self_attn.q_proj")
} | {"lm_head.weight": "lm_head.weight"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["model.layers.5", "model.layers.1", "lm_head"], ["model.layers.3", "lm_head"]),
        (["model.layers.5.", "model.layers.4.mlp"], ["model.layers.3", "model.layers.2.mlp"]),
        (["model.layers.*.mlp", "re:.*lm_head", r"re:.*\\.mlp\\.w1$"], None),
        ({"model.layers.3.mlp.up_proj": 4, "model.layers.2.mlp.up_proj": 8}, {"model.layers.1.mlp.up_proj": 4}),
        (["model.vision_tower.layers.5.mlp", "a text (with a bracket"], None),
    ],
)
def test_names_are_renumbered(before: object, after: object) -> None:
    assert _cut_names(before, KEPT, RENAMED) == (before if after is None else after)


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*layers[.]0[.].*|.*layers[.]5.*", r"re:.*layers\.([1-3]|5)\..*mlp.*", r"model\.layers\.(3|4)\.",
        r"re:.*layers\.\b5\b", "a text (with layer 5",
    ],  # fmt: skip
)
def test_patterns_that_would_pick_other_layers_are_refused(pattern: str) -> None:
    with pytest.raises(Refused, match="cannot be renumbered"):
        _cut_names([pattern], KEPT, RENAMED)


def test_patterns_that_pick_the_same_layers_stay() -> None:
    same = [r"re:.*layers\.0\..*", r"re:.*layers\.\d+\.mlp.*", r"re:.*layers\.(?!0\.).*"]
    assert _cut_names(same, KEPT, RENAMED) == same


def test_a_quantised_source_is_cut_where_that_is_a_matter_of_names(
    tmp_path: Path, build_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerprune.model import verify

    def refuse(*args: object, **kwargs: object) -> None:
        raise Refused("no kernel")

    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder = build_llama(tmp_path / "fp8", layers=6)
    tensors, packed = load_file(folder / "model.safetensors"), {}
    for name, weight in tensors.items():
        packed[name] = weight
        if "proj" in name and not name.startswith("model.layers.5."):
            scale = weight.abs().max() / 400
            packed[name] = (weight / scale).to(torch.float8_e4m3fn)
            grid = torch.full((weight.shape[0] // 32, weight.shape[1] // 32), scale.item())
            packed[name.replace(".weight", ".weight_scale_inv")] = grid
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32],
        "modules_to_not_convert": ["lm_head", "model.layers.5"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    told: list[str] = []
    found = prune_checkpoint(folder, tmp_path / "cut", layers="1:3", say=told.append)
    assert found["verified"]["logits"].startswith("proven"), found["verified"]
    names = json.loads((tmp_path / "cut" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert names == ["lm_head", "model.layers.3"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True, device_map={"": "cpu"})
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(model.model.layers) == 4 and not told
    with monkeypatch.context() as patch:  # as where the kernels of a quantisation do not run
        patch.setattr(verify, "load_model", refuse)
        found = prune_checkpoint(folder, tmp_path / "unproven", layers="1:3", say=told.append)
        assert "quantised" in found["verified"]["logits"] and "not proven" in told[-1]
        with pytest.raises(Refused, match="no kernel"):
            prune_checkpoint(folder, tmp_path / "forced", layers="1:3", verify=True, say=told.append)
    assert not (tmp_path / "forced").exists()


def test_a_cut_that_takes_all_attention_away_is_refused_without_the_logits(tmp_path: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("families", Path(__file__).with_name("families.py"))
    assert spec is not None and spec.loader is not None
    families = sys.modules.setdefault("families", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(families)
    source = families.build("RecurrentGemma", tmp_path / "model")
    with pytest.raises(Refused, match="every layer with attention"):
        prune_checkpoint(source, tmp_path / "cut", layers="0:7", verify=False, say=lambda line: None)


def test_any_change_of_a_small_checkpoint_changes_its_fingerprint(tiny_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    assert checkpoint_fingerprint(copy) == checkpoint_fingerprint(tiny_llama)
    tensor = read_checkpoint(copy)["model.layers.3.mlp.up_proj.weight"]
    with open(tensor.file, "r+b") as file:
        file.seek(tensor.begin + 1001)
        file.write(b"\x01")
    assert checkpoint_fingerprint(copy) != checkpoint_fingerprint(tiny_llama)


def test_a_change_of_any_tensor_of_a_large_one_does_too(own_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerprune.model import fingerprint

    monkeypatch.setattr(fingerprint, "_WHOLE", 0)
    seen = {checkpoint_fingerprint(own_llama)}
    for name, tensor in read_checkpoint(own_llama).items():
        with open(tensor.file, "r+b") as file:
            file.seek(tensor.begin)
            data = file.read(tensor.nbytes)
            file.seek(tensor.begin)
            file.write(bytes(b ^ 1 for b in data))
        assert checkpoint_fingerprint(own_llama) not in seen, name
        seen.add(checkpoint_fingerprint(own_llama))


def test_the_plan_names_every_tensor(tiny_llama: Path) -> None:
    stored = read_checkpoint(tiny_llama)
    plan = plan_cut(stored, 5, (0, 3, 4))
    assert set(plan.renamed) | set(plan.dropped) == set(stored)
