"""Models whose linear layers are quantised to NF4 when they are loaded, whole or layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import FAMILIES, make_config

from layerprune.cli import main
from layerprune.eval.streamed import sweep_streamed
from layerprune.eval.sweep import sweep_live
from layerprune.model.budget import Budget, streaming_budget
from layerprune.model.config import auto_class
from layerprune.model.decoder import forward_logits, view_decoder
from layerprune.model.layermajor import sizes_of
from layerprune.model.load import dtype_name, load_model
from layerprune.model.nf4 import CPU_PACKING_BYTES, NF4_BYTES, compute_dtype
from layerprune.model.stream import StreamedModel
from layerprune.prune.rank import rank_decoder
from layerprune.prune.rank_streamed import rank_streamed

PLENTY = Budget(None, 8 << 30)


@pytest.fixture(scope="module", params=["GPT-2", "Llama", "Qwen2", "Mixtral", "Phi"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model wide enough for NF4's blocks, with biases, transposed weights, or experts."""
    config = make_config(FAMILIES[request.param])
    sizes = {"hidden_size": 64, "n_embd": 64, "intermediate_size": 128, "n_inner": 128, "head_dim": None, "vocab_size": 96}
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, 64 // config.num_attention_heads if value is None else value)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    folder = tmp_path_factory.mktemp("wide") / request.param
    model.save_pretrained(folder)
    return folder


def sequences(vocabulary: int = 96) -> list[list[int]]:
    some = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=some).tolist() for n in (20, 20, 13)]


def test_streamed_is_loaded_to_the_bit(wide: Path) -> None:
    live = load_model(wide, device="cpu", dtype="nf4")
    packed = [name for name, module in live.named_modules() if type(module).__name__ == "Linear4bit"]
    assert packed and dtype_name(live) == "nf4" and live.get_output_embeddings() not in [live.get_submodule(n) for n in packed]
    streamed = StreamedModel(wide, device="cpu", dtype="nf4")
    assert streamed.dtype == "nf4" and streamed.decoder.model.dtype == compute_dtype("cpu")
    asked = sequences()
    assert rank_streamed(streamed, asked, PLENTY)[0] == rank_decoder(view_decoder(live), asked)
    layers = len(streamed)
    kept = [tuple(range(layers)), (0, *range(2, layers)), tuple(range(layers - 1))]
    assert sweep_streamed(streamed, None, kept, PLENTY, sequences=asked) == sweep_live(live, None, kept, sequences=asked)
    # and it is another model than the unquantised one
    whole = load_model(wide, device="cpu", dtype=str(compute_dtype("cpu"))[6:])
    ids_BT = torch.tensor(asked[:2])
    with torch.no_grad():
        assert not torch.equal(forward_logits(view_decoder(live), ids_BT), forward_logits(view_decoder(whole), ids_BT))


def test_a_layer_takes_a_quarter_and_goes_again(wide: Path) -> None:
    streamed = StreamedModel(wide, device="cpu", dtype="nf4")
    plain = StreamedModel(wide, device="cpu", dtype=str(compute_dtype("cpu"))[6:])
    for layer in streamed.layers(range(2)):
        own = streamed.decoder.layers[layer]
        four = [m.forward for m in own.modules() if type(m.forward).__name__ == "Linear4bit"]
        assert four and all(m.weight.dtype == torch.uint8 for m in four)
        saved = sum((2 - NF4_BYTES) * m.in_features * m.out_features for m in four)
        if compute_dtype("cpu") == torch.bfloat16:
            assert streamed.layer_bytes(layer) == int(plain.layer_bytes(layer) - saved)
        dense = plain.layer_bytes(layer)  # all of it is there before the first linear layer is packed
        largest = max(m.in_features * m.out_features for m in four)
        assert streamed.arriving_bytes(layer) == dense + max(streamed.stored_bytes(layer), CPU_PACKING_BYTES * largest)
        assert plain.arriving_bytes(layer) == plain.stored_bytes(layer)
    assert sizes_of(streamed).arriving == max(map(streamed.arriving_bytes, range(2)))
    assert not any("forward" in m.__dict__ for layer in streamed.decoder.layers for m in layer.modules())
    assert all(t.is_meta for layer in streamed.decoder.layers for t in layer.parameters())


def test_what_fits_in_four_bits_is_loaded(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a model is streamed is decided by its size in NF4."""
    from layerprune.model import budget
    from layerprune.model.tensors import read_checkpoint

    monkeypatch.setattr(budget, "WORKING_BYTES", 0)
    monkeypatch.setattr(budget, "refuse_too_little", lambda *given: None)  # no process is that small
    stored = sum(t.numel for t in read_checkpoint(wide).values())
    given: dict[str, Any] = {"device": "cpu", "ram": int(1.6 * stored)}
    assert streaming_budget(wide, dtype="float32", **given) is not None
    assert streaming_budget(wide, dtype="nf4", **given) is None or compute_dtype("cpu") == torch.float32


def test_the_command_and_its_refusals(run_inputs: Path, tmp_path: Path) -> None:
    folder, out = run_inputs / "model", tmp_path / "out"
    ask = ["--eval-data", str(run_inputs / "loss.jsonl"), "--samples", "4", "--length", "16", "--device", "cpu"]
    found = CliRunner().invoke(main, ["eval", "--model", str(folder), *ask, "--dtype", "nf4", "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert json.loads((out / "eval.json").read_text())["settings"]["dtype"] == "nf4"
    model = load_model(folder, device="cpu", dtype="nf4")
    if any(type(m).__name__ == "Linear4bit" for m in model.modules()):
        model.save_pretrained(tmp_path / "packed")
        with pytest.raises(Exception, match="is stored quantised: it is used as it is, leave --dtype nf4 out"):
            load_model(tmp_path / "packed", device="cpu", dtype="nf4")
    wrong = CliRunner().invoke(main, ["eval", "--model", str(folder), *ask, "--dtype", "int4"])
    assert wrong.exit_code == 2 and "nf4" in wrong.output
