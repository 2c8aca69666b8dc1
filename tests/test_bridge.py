"""Bridges: planted truths, the folded weight against its prediction, many families, refusals, and the teacher's proof."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from conftest import make_llama

from layerprune.heal.bridge import bridge_checkpoint
from layerprune.heal.fit import Bridge, fit_bridges, split_documents
from layerprune.heal.gaps import Gap, find_gaps, find_projection
from layerprune.heal.teacher import find_teacher, prove_pair, seam
from layerprune.model.config import load_config, vocab_size
from layerprune.model.cuts import parse_layers
from layerprune.model.data import batches, read_documents, tokenise
from layerprune.model.decoder import Decoder, replaced_forwards, view_decoder, walk_states
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model, load_tokenizer
from layerprune.model.loss import total_loss
from layerprune.model.ridge import Moments, choose_ridge
from layerprune.model.source import find_model
from layerprune.model.tensors import read_checkpoint
from layerprune.model.verify import meta_decoder
from layerprune.prune.cut import prune_checkpoint

torch.set_num_threads(1)

FOLDED = [
    "GPT-2", "GPT-NeoX", "GPT-J", "OPT", "Falcon", "Falcon (RW)", "BLOOM", "MPT", "Llama", "Mistral", "Qwen2", "Gemma", "Phi",
    "Phi-3", "StarCoder2", "Cohere", "Granite", "LLaVA", "DeepSeek-V3",
]  # fmt: skip
REFUSED = ["OPT (350M)", "Gemma-2", "OLMo-2", "Mixtral", "Mamba", "GPT-OSS"]


def quiet(line: str) -> None:
    pass


def cut(source: Path, out: Path, layers: str) -> Path:
    prune_checkpoint(source, out, layers=layers, verify=False, say=quiet)
    return out


def sequences_of(folder: Path, documents: Path, length: int = 64) -> list[list[int]]:
    return tokenise(load_tokenizer(folder), read_documents(str(documents), "train", 128), length)


def loss(folder: Path, sequences: list[list[int]]) -> float:
    decoder = view_decoder(load_model(folder, device="cpu", dtype="float32"))
    return total_loss(decoder, batches(sequences, 1024)).normalised(vocab_size(load_config(folder)))


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors whose bytes differ; names, types and shapes must not."""
    a, b = read_checkpoint(before), read_checkpoint(after)
    assert {n: (t.dtype, t.shape) for n, t in a.items()} == {n: (t.dtype, t.shape) for n, t in b.items()}
    return {name for name in a if a[name].read() != b[name].read()}


def edit(folder: Path, name: str, values: torch.Tensor) -> None:
    """Write a float32 tensor of a one-file checkpoint anew."""
    tensor = read_checkpoint(folder)[name]
    data = values.float().contiguous().numpy().tobytes()
    assert len(data) == tensor.nbytes
    with open(tensor.file, "r+b") as file:
        file.seek(tensor.begin)
        file.write(data)


# --- least squares


def moments_of(features: torch.Tensor, residuals: torch.Tensor) -> Moments:
    moments = Moments()
    for at in range(0, len(features), 7):
        moments.update(features[at : at + 7], residuals[at : at + 7])
    return moments


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0])
def test_ridge_is_the_least_squares_solution(strength: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    f, e = torch.randn(50, 6, generator=drawn), torch.randn(50, 4, generator=drawn)
    moments = moments_of(f, e)
    found = moments.solve(strength)
    # the same problem as plain least squares: the penalty as six more equations
    penalty = strength * f.double().square().sum().item() / 6
    equations = np.vstack([f.double().numpy(), np.sqrt(penalty) * np.eye(6)])
    expected = np.linalg.lstsq(equations, np.vstack([e.double().numpy(), np.zeros((6, 4))]), rcond=None)[0].T
    assert found is not None
    assert np.allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert moments.error(found) == pytest.approx((f.double() @ found.T - e.double()).square().sum().item(), rel=1e-9)
    assert moments.tokens == 50


def test_a_map_that_only_fits_its_own_tokens_is_not_taken() -> None:
    drawn = torch.Generator().manual_seed(0)
    f, e = torch.randn(40, 30, generator=drawn), torch.randn(40, 4, generator=drawn)
    noise = choose_ridge(moments_of(f[:31], e[:31]), moments_of(f[31:], e[31:]), [1e-6, 1e-3])
    assert noise.map_DK is None and noise.strength is None and noise.error == noise.before
    true = choose_ridge(moments_of(f[:35], 2 * f[:35, :4]), moments_of(f[35:], 2 * f[35:, :4]), [1.0, 1e-6])
    assert true.strength == 1e-6 and true.error < 1e-6 * true.before


def test_features_that_are_zero_have_no_map() -> None:
    zero = moments_of(torch.zeros(8, 3), torch.ones(8, 2))
    assert choose_ridge(zero, zero, [1e-2, 1.0]).map_DK is None


# --- planted truths


def make_linear_block(folder: Path) -> Path:
    """A Llama whose layer 2 adds a linear function of what the MLP of layer 1 adds, exact to about 1e-3.

    Feature 63 is 100 at every token, so that norms divide by nearly the same number everywhere; features 0 to 15 are
    written by layer 1's MLP alone, and layer 2 reads nothing else, through a gate that only sees feature 63.
    """
    make_llama(folder, layers=5)
    stored = read_checkpoint(folder)
    drawn = torch.Generator().manual_seed(1)
    level = torch.full((64,), 100 / 8)
    level[63] = 8 / 100
    for name, tensor in stored.items():
        values = torch.randn(tensor.shape, generator=drawn) * 0.1
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if "norm" in name:
            values = level
        elif "embed_tokens" in name:
            values = 10 * values
            values[:, :16], values[:, 63] = 0, 100
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            values[63] = 0
            if layer in (0, 1):
                values[:16] = 0
        if layer == 1 and name.endswith("down_proj.weight"):
            values = torch.zeros(64, 64)
            values[:16] = torch.randn(16, 64, generator=drawn)
        if layer == 2:
            if name.endswith("o_proj.weight"):
                values = torch.zeros(64, 64)
            elif name.endswith("gate_proj.weight"):
                values = torch.zeros(64, 64)
                values[:, 63] = 1
            elif name.endswith("up_proj.weight"):
                values[:, 16:] = 0
                values = 10 * values
        edit(folder, name, values)
    return folder


@pytest.mark.parametrize("form", ["map", "projection"])
def test_a_block_that_is_linear_in_the_mlp_is_bridged_exactly(tmp_path: Path, documents_file: Path, form: str) -> None:
    whole = make_linear_block(tmp_path / "whole")
    pruned = cut(whole, tmp_path / "cut", "2:3")
    record = bridge_checkpoint(pruned, tmp_path / "out", data=str(documents_file), form=form, report=quiet)
    error = record["bridges"][0]["error"]
    assert error["bridged"] < 1e-3 * error["cut"]
    sequences = sequences_of(whole, documents_file)
    was, gone, now = (loss(folder, sequences) for folder in (whole, pruned, tmp_path / "out"))
    assert abs(gone - was) > 0.1
    assert abs(now - was) < 0.02 * abs(gone - was)


@pytest.mark.parametrize("form", ["map", "projection"])
def test_a_block_of_identities_needs_no_bridge(own_llama: Path, tmp_path: Path, documents_file: Path, form: str) -> None:
    for layer in (2, 3):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            edit(own_llama, f"model.layers.{layer}.{part}.weight", torch.zeros(64, 64))
    pruned = cut(own_llama, tmp_path / "cut", "2:4")
    record = bridge_checkpoint(pruned, tmp_path / "out", data=str(documents_file), form=form, report=quiet)
    assert record["bridges"][0]["error"] == {"cut": 0.0, "bridged": 0.0}
    assert changed(pruned, tmp_path / "out") == set()


def test_a_planted_map_is_found(tiny_llama: Path, documents_file: Path) -> None:
    decoder = view_decoder(load_model(tiny_llama, device="cpu"))
    planted_DD = 0.3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    seen: list[torch.Tensor] = []
    decoder.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(output))  # type: ignore[operator, union-attr]

    def add(old: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden + seen[-1] @ planted_DD.T

    fit, held = split_documents(sequences_of(tiny_llama, documents_file), 0)
    with replaced_forwards([(decoder.layers[2], add)]):
        (bridge,) = fit_bridges(decoder, [Gap(1, 1, 3)], fit, held)
    assert bridge.choice.error < 1e-6 * bridge.choice.before
    # directions in which the MLP adds next to nothing are damped: the maps are compared by what they do
    m_ND = torch.cat([m.flatten(0, 1) for m in seen]).double()
    found, expected = m_ND @ bridge.choice.map_DK.T, m_ND @ planted_DD.double().T
    assert (found - expected).norm() < 1e-3 * expected.norm()


# --- the folded checkpoint


def predicted(decoder: Decoder, bridge: Bridge, ids_BT: torch.Tensor) -> torch.Tensor:
    """What layer `after` of the cut should hand on: its output in the uncut model, and the map's addition."""
    features: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    hook = bridge.target.module.register_forward_hook(
        lambda module, args, output: features.append((output if bridge.form == "map" else args[0]).clone())
    )
    try:
        walk_states(decoder, ids_BT, None, lambda layer, x: after.append(x.clone()) if layer == bridge.gap.after + 1 else None)
    finally:
        hook.remove()
    addition = bridge.scale * features[0].double() @ bridge.choice.map_DK.T
    return after[0].double() + addition.reshape(after[0].shape)


def state(decoder: Decoder, ids_BT: torch.Tensor, layer: int) -> torch.Tensor:
    """x^(layer) in float64."""
    seen: list[torch.Tensor] = []
    walk_states(decoder, ids_BT, None, lambda index, x: seen.append(x.double()) if index == layer else None)
    return seen[0]


def write_words(folder: Path) -> Path:
    """A tokenizer of 150 words for the checkpoint, and documents in them in which a word leads to the next."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(150)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w1").save_pretrained(folder)
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(2, 150)}" for _ in range(rng.randint(8, 40))) for _ in range(80)]
    path = folder.parent / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("form", ["map", "projection"])
@pytest.mark.parametrize("name", FOLDED)
def test_families(tmp_path: Path, name: str, form: str) -> None:
    whole = families.build(name, tmp_path / "whole")
    data = write_words(whole)
    block = "5:7" if name == "DeepSeek-V3" else "2:4"  # layer 4 is a mixture with a shared expert, which holds the bridge
    pruned, out = cut(whole, tmp_path / "cut", block), tmp_path / "out"
    length = 8 if form == "map" else 64  # 8: no document is shorter, so that nothing is padded and no mask is given
    record = bridge_checkpoint(pruned, out, data=str(data), form=form, length=length, report=quiet)
    told = record["bridges"][0]
    assert told["error"]["bridged"] < told["error"]["cut"]
    assert told["scale"] == pytest.approx(0.5 if name == "Granite" else 1.0)
    module = meta_decoder(out).model.get_submodule(told["module"])
    bias = {told["tensor"].removesuffix("weight") + "bias"} if form == "map" and module.bias is not None else set()
    assert changed(pruned, out) == {told["tensor"]} | bias

    teacher = view_decoder(load_model(whole, device="cpu"))
    fit, held = split_documents(sequences_of(whole, data, length), 0)
    (gap,) = find_gaps(parse_layers(block, 8).kept(8), 8)
    (bridge,) = fit_bridges(teacher, [gap], fit, held, form)
    ids_BT = torch.randint(2, 150, (2, 14), generator=torch.Generator().manual_seed(3))
    expected = predicted(teacher, bridge, ids_BT)
    bridged = view_decoder(load_model(out, device="cpu"))
    found = state(bridged, ids_BT, gap.place + 1)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()

    # and the error on the held-out documents is what the record says
    error = energy = 0.0
    for ids in held:
        ids_BT = torch.tensor([ids])
        wanted = state(teacher, ids_BT, gap.before)
        error += (state(bridged, ids_BT, gap.place + 1) - wanted).square().sum().item()
        energy += wanted.square().sum().item()
    assert told["error"]["bridged"] == pytest.approx(error / energy, rel=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_hold_a_bridge(tmp_path: Path, name: str) -> None:
    whole = families.build(name, tmp_path / "whole")
    data = write_words(whole)
    pruned = cut(whole, tmp_path / "cut", "2:4")
    with pytest.raises(Refused, match=r"^layer 1 of this \w+ cannot hold a bridge: .*; heal the cut instead$"):
        bridge_checkpoint(pruned, tmp_path / "out", data=str(data), report=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole", "words.jsonl"]


@pytest.mark.parametrize(("name", "found"), [("Llama", True), ("GPT-NeoX", True), ("Granite", True), ("Gemma-2", False)])
def test_the_projection_is_found_in_bfloat16(tmp_path: Path, name: str, found: bool) -> None:
    decoder = view_decoder(load_model(families.build(name, tmp_path / "whole"), device="cpu", dtype="bfloat16"))
    if found:
        assert find_projection(decoder, 1).scale == pytest.approx(0.5 if name == "Granite" else 1.0, rel=1e-2)
    else:
        with pytest.raises(Refused, match="cannot hold a bridge"):
            find_projection(decoder, 1)


def test_a_weight_that_another_layer_uses_too_is_refused(tiny_llama: Path) -> None:
    decoder = view_decoder(load_model(tiny_llama, device="cpu"))
    decoder.layers[3].mlp.down_proj.weight = decoder.layers[1].mlp.down_proj.weight  # type: ignore[union-attr]
    with pytest.raises(Refused, match="cannot hold a bridge"):
        find_projection(decoder, 1)
    assert find_projection(decoder, 0).inside == "mlp.down_proj"


def test_states_changed_between_layers_are_refused(tiny_llama: Path) -> None:
    decoder = view_decoder(load_model(tiny_llama, device="cpu"))
    decoder.layers[2].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    # the hook stands for a model that scales states between its layers
    with pytest.raises(Refused, match="changes states between its layers"):
        find_projection(decoder, 1)


def test_states_in_several_streams_are_refused(tmp_path: Path) -> None:
    decoder = view_decoder(load_model(families.build("Gemma-3n", tmp_path / "whole"), device="cpu"))
    with pytest.raises(Refused, match="cannot hold a bridge"):
        find_projection(decoder, 1)


@pytest.mark.parametrize("form", ["map", "projection"])
def test_held_out_error_is_never_worse_and_the_record_says_what_was_done(
    tiny_llama: Path, tmp_path: Path, documents_file: Path, form: str
) -> None:
    pruned, lines = cut(tiny_llama, tmp_path / "cut", "1:3"), []
    for seed, samples in ((0, 2), (1, 5), (2, 60)):
        out = tmp_path / f"out{seed}"
        record = bridge_checkpoint(
            pruned, out, data=str(documents_file), samples=samples, length=32, form=form, seed=seed, report=lines.append
        )
        bridge = record["bridges"][0]
        assert 0 <= bridge["error"]["bridged"] <= bridge["error"]["cut"]
        assert (bridge["ridge"] is None) == (changed(pruned, out) == set())
        assert (record["documents"], record["held_out"]) == (samples, max(1, samples // 10))
    written = json.loads((out / "layerprune.json").read_text())
    assert written["bridge"] == record
    assert written["kept"] == [0, 3, 4]
    assert bridge["tensor"] == "model.layers.0.mlp.down_proj.weight" and bridge["dropped"] == [1, 3]
    assert "## Bridge" in (out / "README.md").read_text()
    assert (out / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    assert len(lines) == 3 and lines[-1].startswith(f"bridge over layers 1:3 in {bridge['tensor']} ({form}, ")


def test_the_same_seed_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path, documents_file: Path) -> None:
    pruned = cut(tiny_llama, tmp_path / "cut", "1:3")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        bridge_checkpoint(pruned, tmp_path / name, data=str(documents_file), seed=seed, report=quiet)
    assert changed(tmp_path / "a", tmp_path / "b") == set()
    assert changed(tmp_path / "a", tmp_path / "c") != set()


def test_padding_does_not_count(tiny_llama: Path, documents_file: Path) -> None:
    decoder = view_decoder(load_model(tiny_llama, device="cpu"))
    sequences = sequences_of(tiny_llama, documents_file)
    fit, held = split_documents(sequences, 0)
    assert len(set(map(len, held))) > 1
    (together,) = fit_bridges(decoder, [Gap(1, 1, 3)], fit, held)
    alone = [fit_bridges(decoder, [Gap(1, 1, 3)], fit, [document])[0] for document in held]
    assert together.choice.before == pytest.approx(sum(bridge.choice.before for bridge in alone), rel=1e-5)
    assert together.energy == pytest.approx(sum(bridge.energy for bridge in alone), rel=1e-5)


def test_two_cuts_get_two_bridges(tmp_path: Path, documents_file: Path) -> None:
    whole = make_llama(tmp_path / "whole", layers=8)
    once = cut(whole, tmp_path / "once", "2:3")
    twice = cut(once, tmp_path / "twice", "3:5")  # layers 4 and 5 of the whole: 3 is all that stays between the cuts
    teacher = find_teacher(find_model(str(twice)))
    assert (teacher.kept, teacher.layers, teacher.source.folder) == ((0, 1, 3, 6, 7), 8, whole)
    record = bridge_checkpoint(twice, tmp_path / "out", data=str(documents_file), report=quiet)
    assert [bridge["dropped"] for bridge in record["bridges"]] == [[2, 3], [4, 6]]
    assert changed(twice, tmp_path / "out") == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    # against the first cut as teacher there is one cut, and the same bridge as when the other is not there
    near = bridge_checkpoint(twice, tmp_path / "near", teacher=once, data=str(documents_file), report=quiet)
    assert [bridge["dropped"] for bridge in near["bridges"]] == [[3, 5]]
    assert changed(twice, tmp_path / "near") == {"model.layers.2.mlp.down_proj.weight"}


# --- what is refused


@pytest.mark.parametrize(("layers", "words"), [("0:2", "cut from the start"), ("3:5", "cut from the end")])
def test_cuts_at_an_end_are_refused(tiny_llama: Path, tmp_path: Path, documents_file: Path, layers: str, words: str) -> None:
    pruned = cut(tiny_llama, tmp_path / "cut", layers)
    with pytest.raises(Refused, match=words):
        bridge_checkpoint(pruned, tmp_path / "out", data=str(documents_file), report=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"form": "affine"}, "--form affine is none of map, projection"),
        ({"samples": 1}, "--samples 1 leaves no document"),
        ({"data": "none.jsonl"}, "--data none.jsonl is neither"),
        ({"length": 65}, "--length 65 is beyond the model's context of 64"),
    ],
)
def test_wrong_arguments(tiny_llama: Path, tmp_path: Path, documents_file: Path, given: dict[str, Any], words: str) -> None:
    pruned = cut(tiny_llama, tmp_path / "cut", "1:3")
    with pytest.raises(UsageError, match=words):
        bridge_checkpoint(pruned, tmp_path / "out", **{"data": str(documents_file), "report": quiet, **given})


def test_one_document_is_too_few(tiny_llama: Path, tmp_path: Path) -> None:
    pruned, data = cut(tiny_llama, tmp_path / "cut", "1:3"), tmp_path / "one.txt"
    data.write_text("The river runs slowly.")
    with pytest.raises(Refused, match="at least 2 documents"):
        bridge_checkpoint(pruned, tmp_path / "out", data=str(data), report=quiet)


def test_nothing_that_exists_is_overwritten(tiny_llama: Path, tmp_path: Path, documents_file: Path) -> None:
    pruned = cut(tiny_llama, tmp_path / "cut", "1:3")
    with pytest.raises(UsageError, match="exists already"):
        bridge_checkpoint(pruned, pruned, data=str(documents_file), report=quiet)


# --- the teacher


@pytest.mark.parametrize(("kept", "expected"), [((0, 1, 4, 5), 2), ((2, 3), 0), ((0, 1, 2), 3), ((0, 2, 3, 6), 1), ((0, 1), 2)])
def test_seam(kept: tuple[int, ...], expected: int) -> None:
    assert seam(kept) == expected


def test_gaps() -> None:
    assert find_gaps((0, 1, 4, 6), 7) == [Gap(1, 1, 4), Gap(2, 4, 6)]
    with pytest.raises(Refused, match="none of the 3 layers is cut"):
        find_gaps((0, 1, 2), 3)


def test_the_teacher_is_the_source_of_the_cut(tiny_llama: Path, tmp_path: Path) -> None:
    pruned = find_model(str(cut(tiny_llama, tmp_path / "cut", "1:3")))
    teacher = find_teacher(pruned)
    assert (teacher.source.folder, teacher.kept, teacher.layers) == (tiny_llama, (0, 3, 4), 5)
    assert find_teacher(pruned, str(tiny_llama)) == teacher
    plan = prove_pair(pruned, teacher)
    assert plan.renamed["model.layers.3.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"


def test_a_teacher_that_is_gone_is_asked_for(own_llama: Path, tmp_path: Path) -> None:
    pruned = find_model(str(cut(own_llama, tmp_path / "cut", "1:3")))
    moved = own_llama.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"is not to be found \(.*\): give it with --teacher$"):
        find_teacher(pruned)
    assert find_teacher(pruned, str(moved)).source.folder == moved
    make_llama(own_llama, layers=7)
    with pytest.raises(UsageError, match="when that had 5 layers, now it has 7: give the original with --teacher"):
        find_teacher(pruned)


def test_what_is_no_cut_has_no_teacher(own_llama: Path) -> None:
    with pytest.raises(UsageError, match="is no cut"):
        find_teacher(find_model(str(own_llama)))
    (own_llama / "layerprune.json").write_text('{"source": "x", "healing": {}}')
    with pytest.raises(UsageError, match="is no cut"):
        find_teacher(find_model(str(own_llama)))
    (own_llama / "layerprune.json").write_text('{"kept": [0, 9], "layers": 5, "source": "x"}')
    with pytest.raises(Refused, match="not a record of a cut"):
        find_teacher(find_model(str(own_llama)))


def test_the_wrong_teacher_is_refused(tiny_llama: Path, own_llama: Path, tmp_path: Path) -> None:
    pruned = find_model(str(cut(tiny_llama, tmp_path / "cut", "1:3")))
    with pytest.raises(UsageError, match="--teacher nobody is no recipe"):
        find_teacher(pruned, "nobody")
    deep = make_llama(tmp_path / "deep", layers=6)
    with pytest.raises(UsageError, match="has 6 layers, and .* was cut from a model of 5"):
        find_teacher(pruned, str(deep))
    wide = make_llama(tmp_path / "wide", intermediate_size=96)
    with pytest.raises(Refused, match=r"it has the shape \(64, 64\), a cut of that model the shape \(64, 96\)"):
        find_teacher(pruned, str(wide))
    # right shapes, and one number is another
    name = "model.layers.3.mlp.up_proj.weight"
    values = torch.frombuffer(bytearray(read_checkpoint(own_llama)[name].read()), dtype=torch.float32).reshape(64, 64)
    values[63, 63] += 1
    edit(own_llama, name, values)
    other = find_teacher(pruned, str(own_llama))
    with pytest.raises(Refused, match=r"share no weights \(model.layers.1.mlp.up_proj.weight is not model.layers.3"):
        prove_pair(pruned, other)


def test_a_trained_cut_is_refused(tiny_llama: Path, tmp_path: Path, documents_file: Path) -> None:
    pruned = cut(tiny_llama, tmp_path / "cut", "1:3")
    bridge_checkpoint(pruned, tmp_path / "bridged", data=str(documents_file), report=quiet)
    with pytest.raises(Refused, match="trained after it was cut .*'bridge' entry"):
        bridge_checkpoint(tmp_path / "bridged", tmp_path / "again", data=str(documents_file), report=quiet)
    # it has a teacher nevertheless, for those who train
    assert find_teacher(find_model(str(tmp_path / "bridged"))).source.folder == tiny_llama
    # and a cut of it has it as its teacher, not the model before
    after = cut(tmp_path / "bridged", tmp_path / "after", "1:2")
    assert find_teacher(find_model(str(after))).source.folder == tmp_path / "bridged"
    shutil.rmtree(tmp_path / "bridged")
    with pytest.raises(UsageError, match="give it with --teacher"):
        find_teacher(find_model(str(after)))
