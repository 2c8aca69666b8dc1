"""Depth probes: what layers add, the logit lens, effective depth, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from click.testing import CliRunner

from layerprune.cli import main
from layerprune.depth import lens, parts, residual
from layerprune.depth.choices import Item, choices_probe
from layerprune.depth.effective import by_cosine, by_kl, by_overlap, effective_depth
from layerprune.depth.lens import LensSum, lens_probe
from layerprune.depth.parts import find_parts
from layerprune.depth.residual import ResidualSum, residual_probe
from layerprune.depth.tokens import BUCKETS, RANKS, bucket_names, count_buckets, tokens_probe
from layerprune.depths import format_depth, probe_depth
from layerprune.model.decoder import Decoder, view_decoder
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model

torch.set_num_threads(1)

# family: the sub-modules that add to the stream, and whether both read the same
SEQUENTIAL = {
    "Llama": ("self_attn", "mlp"), "GPT-2": ("attn", "mlp"), "OPT": ("self_attn", "fc2"), "Qwen2": ("self_attn", "mlp"),
    "Gemma-2": ("post_attention_layernorm", "post_feedforward_layernorm"), "Mixtral": ("self_attn", "mlp"),
    "OLMo-2": ("post_attention_layernorm", "post_feedforward_layernorm"), "StarCoder2": ("self_attn", "mlp"),
    "GLM-4": ("post_self_attn_layernorm", "post_mlp_layernorm"), "SmolLM3": ("self_attn", "mlp"),
}  # fmt: skip
PARALLEL = {
    "GPT-NeoX": ("attention", "mlp"), "GPT-J": ("attn", "mlp"), "Phi": ("self_attn", "mlp"), "Falcon": ("self_attention", "mlp"),
    "Cohere2": ("self_attn", "mlp"),
}  # fmt: skip
LENSES = [
    "Llama", "GPT-2", "GPT-NeoX", "Falcon", "BLOOM", "OPT", "Gemma-2", "Gemma-3", "Phi", "Granite", "Cohere2", "Qwen3-MoE",
    "Mamba",
]  # fmt: skip
WITHOUT = ["Mamba", "Gemma-3n", "OPT (350M)"]
MORE = [
    "GPT-Neo", "CodeGen", "Falcon (RW)", "BLOOM", "MPT", "Mistral", "Qwen3", "Qwen3-MoE", "Gemma-3", "Phi-3", "OLMo", "StableLM",
    "Granite", "Nemotron", "DeepSeek-V3", "LFM2",
]  # fmt: skip


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decoder]:
    made: dict[str, Decoder] = {}

    def load(name: str) -> Decoder:
        if name not in made:
            folder = families.build(name, tmp_path_factory.mktemp("depth") / "model")
            made[name] = view_decoder(load_model(folder, device="cpu"))
        return made[name]

    return load


def documents(decoder: Decoder, lengths: tuple[int, ...] = (13, 7, 10)) -> list[list[int]]:
    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, min(vocab, 90), (n,), generator=generator).tolist() for n in lengths]


def by_hand(decoder: Decoder, sequences: list[list[int]], names: tuple[str, str], parallel: bool) -> torch.Tensor:
    """The six values by plain hooks, one document at a time, in float64."""
    layers = len(decoder)
    total, tokens = torch.zeros(6, layers, dtype=torch.float64), 0
    for ids in sequences:
        seen: dict[Any, torch.Tensor] = {}
        handles = []
        for i, layer in enumerate(decoder.layers):

            def before(module: Any, args: Any, kwargs: Any, i: int = i, seen: dict[Any, Any] = seen) -> None:
                seen[i, "x"] = (args[0] if args else kwargs["hidden_states"]).double().clone()

            def after(module: Any, args: Any, output: Any, i: int = i, seen: dict[Any, Any] = seen) -> None:
                seen[i, "y"] = (output[0] if isinstance(output, tuple) else output).double().clone()

            handles += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
            for place, name in enumerate(names):

                def part(module: Any, args: Any, output: Any, i: int = i, place: int = place, seen: dict[Any, Any] = seen) -> None:
                    seen[i, place] = (output[0] if isinstance(output, tuple) else output).double().clone()

                handles.append(layer.get_submodule(name).register_forward_hook(part))
        with torch.no_grad():
            decoder.model(input_ids=torch.tensor([ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        for i in range(layers):
            h, u = seen[i, "x"], seen[i, "y"] - seen[i, "x"]
            a, m = (seen[i, place].reshape(h.shape) for place in (0, 1))
            pairs = [(a, h), (m, h if parallel else h + a), (u, h)]
            for k, (added, stream) in enumerate(pairs):
                total[k, i] += torch.nn.functional.cosine_similarity(added, stream, dim=-1).sum()
                total[3 + k, i] += (added.norm(dim=-1) / stream.norm(dim=-1)).sum()
        tokens += len(ids)
    return total / tokens


@pytest.mark.parametrize("name", [*SEQUENTIAL, *PARALLEL])
def test_what_layers_add_against_plain_hooks(name: str, live: Callable[[str], Decoder]) -> None:
    decoder = live(name)
    sequences = documents(decoder)
    expected = by_hand(decoder, sequences, SEQUENTIAL.get(name) or PARALLEL[name], name in PARALLEL)
    found = residual_probe(decoder, sequences, max_tokens=26).result()
    for k, value in enumerate(residual.VALUES):
        assert found[value] == pytest.approx(expected[k].tolist(), abs=1e-5), value


@pytest.mark.parametrize("name", MORE)
def test_parts_are_found_in_other_families(name: str, live: Callable[[str], Decoder]) -> None:
    assert all(find_parts(live(name)))


@pytest.mark.parametrize("name", ["XGLM", "BLOOM", "Nemotron", "GPT-NeoX", "Falcon"])
def test_rounding_does_not_change_what_reads_what(name: str, tmp_path: Path) -> None:
    """In bfloat16 the sum that the MLP reads is rounded by as much as a small attention adds."""
    folder = families.build(name, tmp_path / "model")
    wide, half = (view_decoder(load_model(folder, device="cpu", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    for every in (False, True):
        expected, found = (
            [part and (part.first, part.second, part.parallel) for part in find_parts(d, every)] for d in (wide, half)
        )
        assert all(expected) and found == expected


@pytest.mark.parametrize("name", WITHOUT)
def test_layers_without_parts_give_their_own_values(name: str, live: Callable[[str], Decoder]) -> None:
    decoder = live(name)
    found = residual_probe(decoder, documents(decoder)).result()
    assert set(found["cos_att"]) == set(found["rc_mlp"]) == {None}
    assert all(v is not None and -1 <= v <= 1 for v in found["cos_layer"]) and all(v > 0 for v in found["rc_layer"] if v)


def test_a_layer_that_writes_along_or_against_the_stream_is_seen(live: Callable[[str], Decoder]) -> None:
    """Planted: a layer whose output is a multiple of its input has a cosine of 1 or -1."""
    decoder = live("Llama")
    before = [layer.__dict__.get("forward") for layer in decoder.layers]
    try:
        for i, factor in ((2, 1.5), (3, 0.25)):
            decoder.layers[i].forward = lambda hidden, *a, _f=factor, **k: _f * hidden
        found = residual_probe(decoder, documents(decoder)).result()
    finally:
        for layer, old in zip(decoder.layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if old is not None:
                layer.__dict__["forward"] = old
    assert found["cos_layer"][2] == pytest.approx(1) and found["cos_layer"][3] == pytest.approx(-1)
    assert found["rc_layer"][2] == pytest.approx(0.5) and found["rc_layer"][3] == pytest.approx(0.75)
    assert found["cos_att"][2] is None and found["cos_att"][4] is not None


def like(layer: Any, changed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a layer do something else with its output, and look in every other way like the layers around it."""
    kind = type(layer)

    def forward(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return changed(hidden, kind.forward(self, hidden, *args, **kwargs))

    about = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    monkeypatch.setattr(layer, "__class__", type(kind.__name__, (kind,), about))


def test_what_reads_what_is_looked_at_in_layers_of_other_code(
    live: Callable[[str], Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a layer whose MLP reads what its attention reads, in a stack in which all others' do not."""
    decoder = live("Llama")
    layer = decoder.layers[2]

    def parallel(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attention = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]
        return hidden + attention + layer.mlp(layer.post_attention_layernorm(hidden))

    monkeypatch.setitem(layer.__dict__, "forward", parallel)
    assert [part is not None and part.parallel for part in find_parts(decoder)] == [i == 2 for i in range(len(decoder))]


def test_a_massive_token_does_not_hide_the_others(live: Callable[[str], Decoder]) -> None:
    """Planted: one token a thousand times as large as the others, whose rounding is as large as their updates."""
    folder = live("Llama").model.name_or_path
    found = {}
    for dtype in ("float32", "bfloat16"):
        decoder = view_decoder(load_model(Path(folder), device="cpu", dtype=dtype))
        with torch.no_grad():
            embeddings = decoder.model.get_input_embeddings().weight
            embeddings[5] *= 1000
        found[dtype] = residual_probe(decoder, [[5, 9, 11, 30, 8, 40, 5], [7, 8, 5, 9]]).result()
        assert {(p.first, p.second) for p in find_parts(decoder, every=True) if p} == {("self_attn.o_proj", "mlp.down_proj")}
    for value in residual.VALUES:
        assert found["bfloat16"][value] == pytest.approx(found["float32"][value], abs=0.1), value


def test_a_layer_that_scales_what_its_likes_do_not_is_tried_for_itself(
    live: Callable[[str], Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: one layer adds half of what its attention and MLP give; the others show that it is not like them."""
    decoder = live("Llama")
    trials: list[int] = []
    search = parts._two_that_sum
    monkeypatch.setattr(parts, "_two_that_sum", lambda *given: trials.append(1) or search(*given))
    whole = residual_probe(decoder, documents(decoder)).result()
    assert len(trials) == 1, "layers of one kind are tried once"
    trials.clear()

    layer = decoder.layers[len(decoder) - 1]
    like(layer, lambda hidden, out: hidden + 0.5 * (out - hidden), monkeypatch)
    found = residual_probe(decoder, documents(decoder)).result()
    assert len(trials) == 1 + len(decoder)
    for value in residual.VALUES:
        assert found[value][:-1] == pytest.approx(whole[value][:-1], abs=1e-6)
    assert found["rc_att"][-1] == pytest.approx(0.5 * whole["rc_att"][-1], abs=1e-6)  # type: ignore[operator]
    assert found["cos_att"][-1] == pytest.approx(whole["cos_att"][-1], abs=1e-6)
    assert found["rc_layer"][-1] == pytest.approx(0.5 * whole["rc_layer"][-1], abs=1e-6)  # type: ignore[operator]


def test_parts_that_stop_summing_to_the_update_are_left_out(
    live: Callable[[str], Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a layer that adds something of its own to long documents only, which no trial of short ones shows."""
    decoder = live("Llama")

    layer = decoder.layers[1]
    like(layer, lambda hidden, out: out + 0.1 * torch.sin(hidden) if hidden.shape[1] > 12 else out, monkeypatch)
    found = residual_probe(decoder, documents(decoder, (6, 20)), max_tokens=20).result()
    assert found["cos_att"][1] is found["rc_mlp"][1] is None and found["rc_layer"][1] is not None
    assert found["cos_att"][0] is not None and found["cos_att"][2] is not None


def test_sums_of_two_halves_are_the_whole(live: Callable[[str], Decoder]) -> None:
    decoder = live("Qwen2")
    sequences = documents(decoder, (9, 6, 11, 4))
    whole = residual_probe(decoder, sequences)
    halves = residual_probe(decoder, sequences[:2])
    halves.merge(residual_probe(decoder, sequences[2:]))
    assert torch.allclose(whole.total_6L, halves.total_6L, atol=1e-6) and torch.equal(whole.tokens_L, halves.tokens_L)
    lens_whole, lens_halves = lens_probe(decoder, sequences), lens_probe(decoder, sequences[:2])
    lens_halves.merge(lens_probe(decoder, sequences[2:]))
    assert torch.allclose(lens_whole.total_4L, lens_halves.total_4L, atol=1e-4) and lens_whole.tokens == lens_halves.tokens
    assert ResidualSum(3).result()["cos_att"] == [None] * 3 and LensSum(2).tokens == 0


def taps_by_hand(decoder: Decoder, ids: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The model's logits (T, V), and those of its end on each layer's input, by hooks on the last layer's output."""
    inputs: list[torch.Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).clone())

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = decoder.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return found

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in decoder.layers]
    final = logits()
    for handle in handles:
        handle.remove()
    taps = []
    for x in inputs:

        def inject(module: Any, args: Any, output: Any, x: torch.Tensor = x) -> Any:
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = decoder.layers[-1].register_forward_hook(inject)
        taps.append(logits())
        handle.remove()
    return final, taps


def lens_by_hand(decoder: Decoder, sequences: list[list[int]]) -> torch.Tensor:
    """KL both ways, overlap and agreement, by hooks on the layers' inputs and the model's own norm and head."""
    layers, tokens = len(decoder), 0
    total = torch.zeros(4, layers, dtype=torch.float64)
    for ids in sequences:
        logits, taps = taps_by_hand(decoder, ids)
        final = logits.double()
        for i, tap in enumerate(taps):
            own = tap.double()
            p, q = own.log_softmax(-1), final.log_softmax(-1)
            total[0, i] += (p.exp() * (p - q)).sum()
            total[1, i] += (q.exp() * (q - p)).sum()
            tops = [set(row.topk(5).indices.tolist()) for row in own], [set(row.topk(5).indices.tolist()) for row in final]
            total[2, i] += sum(len(a & b) / 5 for a, b in zip(*tops, strict=True))
            total[3, i] += (own.argmax(-1) == final.argmax(-1)).sum()
        tokens += len(ids)
    return total / tokens


@pytest.mark.parametrize("name", LENSES)
def test_the_lens_against_the_models_own_end(name: str, live: Callable[[str], Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = live(name)
    sequences = documents(decoder)
    monkeypatch.setattr(lens, "SLICE", {"cpu": 200, "cuda": 200})
    expected = lens_by_hand(decoder, sequences)
    found = lens_probe(decoder, sequences, max_tokens=26).result()
    for k, value in enumerate(LensSum.names):
        assert found[value] == pytest.approx(expected[k].tolist(), abs=2e-5, rel=1e-5), value


def test_ranks_tell_the_overlap_that_a_top_5_tells() -> None:
    """What a GPU counts, here on a CPU: with many equal logits, where the lower index is first, and on a lens that is the end."""
    generator = torch.Generator().manual_seed(5)
    ends, own = torch.randn(2, 40, 60, generator=generator)
    for final_NV, lens_NV in ((ends, own), (ends, ends + own / 5), (ends.round(), own.round()), (ends.round(), ends.round())):
        _, most_N1, size_N1, _ = lens.final_of(final_NV)
        order_NV, own_NV = (torch.sort(x, dim=1, descending=True, stable=True).indices for x in (final_NV, lens_NV))
        found = lens._by_rank(lens_NV, final_NV, most_N1, size_N1, order_NV[:, :5])
        same = [len(set(a[:5]) & set(b[:5])) / 5 for a, b in zip(order_NV.tolist(), own_NV.tolist(), strict=True)]
        assert found[2:].tolist() == [pytest.approx(sum(same)), float((order_NV[:, 0] == own_NV[:, 0]).sum())]
        p, q = lens_NV.double().log_softmax(1), final_NV.double().log_softmax(1)
        expected = [float((p.exp() * (p - q)).sum()), float((q.exp() * (q - p)).sum())]
        assert found[:2].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)
        if final_NV is ends:  # without equal logits both ways are one
            final = lens.final_of(final_NV)
            assert torch.equal(lens._by_top(lens_NV, *final), lens._by_rank(lens_NV, *final))


def test_effective_depth_of_known_curves() -> None:
    cosine = {"cos_att": [-0.1, -0.2, 0.1, -0.1, 0.2], "cos_mlp": [-0.1] * 4 + [0.2], "cos_layer": [-0.1, 0, 0.1, -0.1, 0.2]}
    assert by_cosine(cosine) == 3
    assert by_cosine({**cosine, "cos_att": [None] * 5, "cos_mlp": [None] * 5}) == 3
    assert by_cosine({name: [0.1, 0.2] for name in cosine}) is None
    kl = [14.0, 5.0, 9.0, 8.0, 3.0, 1.0]
    assert (by_kl(kl), by_kl(kl, reference=True)) == (4, 1), "one dip after the embedding is no arrival"
    assert by_kl([1.0, 1.0]) is None
    overlap = [0.0, 0.4, 0.2, 0.5]
    assert (by_overlap(overlap), by_overlap(overlap, reference=True)) == (3, 1)
    lenses = {"kl": kl, "overlap": [0, 0, 0, 0, 0.4, 0.9]}
    found = effective_depth({name: [*values, 0.3] for name, values in cosine.items()}, lenses)
    assert found["cos"] == {"layer": 3, "ratio": 4 / 6}
    assert found["kl"] == found["overlap"] == {"layer": 4, "ratio": 5 / 6}


# The command


def test_the_command_writes_files_and_goes_on(run_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"eval_data": str(run_inputs / "loss.jsonl"), "samples": 6, "length": 16, "device": "cpu", "say": lambda line: None}
    whole = probe_depth(run_inputs / "model", out=tmp_path / "whole", **settings)
    (model,) = whole["models"]
    assert model["effective_depth"] is not None and whole["probes"] == ["residual", "lens", "tokens"]
    for name in ("depth.json", "model/residual.json", "model/lens.json", "figures/residual.png", "figures/lens.svg"):
        assert (tmp_path / "whole" / name).stat().st_size > 0, name
    told = format_depth(whole)
    assert told.startswith("effective depth: layer (0-based)") and str(tmp_path / "whole") in told
    assert "KL       first layer from which on" in told
    assert "KL       first layer at which" in format_depth({**whole, "reference": True})

    def dies(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lens, "lens_probe", dies)
        with pytest.raises(KeyboardInterrupt):
            probe_depth(run_inputs / "model", out=tmp_path / "killed", **settings)
    assert (tmp_path / "killed" / "model" / "residual.json").exists() and not (tmp_path / "killed" / "depth.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(residual, "residual_probe", dies)  # it is there, and not made again
        again = probe_depth(run_inputs / "model", out=tmp_path / "killed", **settings)
    assert {**again, "folder": ""} == {**whole, "folder": ""}
    with pytest.raises(UsageError, match="holds a run of other inputs .*samples was 6, now 5"):
        probe_depth(run_inputs / "model", out=tmp_path / "killed", **{**settings, "samples": 5})


def test_the_skip_map_is_written_and_drawn(run_inputs: Path, tmp_path: Path) -> None:
    settings = {"eval_data": str(run_inputs / "loss.jsonl"), "samples": 3, "length": 20, "device": "cpu"}
    probe_depth(run_inputs / "model", probes=["skip"], out=tmp_path / "out", say=lambda line: None, **settings)
    found = json.loads((tmp_path / "out" / "model" / "skip.json").read_text())
    assert set(found) == {"all", "future"} and found["all"]["applications"] < 0.6 * found["all"]["naive"]
    mean = found["all"]["mean"]
    assert len(mean["output"]) == 8 and mean["contribution"][3][3] is None and mean["contribution"][3][4] > 0
    assert (tmp_path / "out" / "figures" / "skip.png").exists()

    more = probe_depth(run_inputs / "model", probes=["residual"], out=tmp_path / "out", say=lambda line: None, **settings)
    assert more["probes"] == ["residual", "skip"], "what an earlier call found stays in the summary"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "figures/skip" in str(more["figures"]) and page.count("<h2") >= 2


def test_several_models_lie_side_by_side(run_inputs: Path, tmp_path: Path) -> None:
    arguments = ["depth", "--model", str(run_inputs / "model"), "--model", str(run_inputs / "model"), "--probe", "residual"]
    arguments += ["--eval-data", str(run_inputs / "loss.jsonl"), "--samples", "3", "--length", "12", "--device", "cpu"]
    done = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "two"), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [m["label"] for m in result["models"]] == ["model", "model-2"] and result["models"][0]["effective_depth"] is None
    told = format_depth({**result, "folder": "two"})
    assert told.startswith("effective depth is not told: it needs the probes residual and lens") and "cosine" not in told
    first, second = (json.loads((tmp_path / "two" / n / "residual.json").read_text()) for n in ("model", "model-2"))
    assert first == second and first["tokens"] > 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"probes": ["lense"]}, "--probe 'lense' is none of residual, lens, tokens, choices, skip"),
        ({"probes": ["choices"]}, "--probe choices looks at the options of tasks: give --tasks"),
        ({"limit": 0}, "--limit 0 is not"),
        ({"probes": []}, "--probe '' is none of"),
        ({"samples": 0}, "--samples 0 is not a number above 0"),
        ({"length": 1}, "--length 1"),
        ({"length": 10**6}, "--length 1000000"),
        ({"eval_data": "nowhere.jsonl"}, "--eval-data nowhere.jsonl is neither"),
        ({"dtype": "float8"}, "--dtype float8"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(run_inputs: Path, tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    settings = {"eval_data": str(run_inputs / "loss.jsonl"), "samples": 3, "length": 12, "device": "cpu", **changed}
    with pytest.raises(UsageError, match=told):
        probe_depth(run_inputs / "model", out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


# Tokens by frequency


def test_buckets_follow_the_counts_given() -> None:
    ids = [7] * 30 + [3] * 20 + list(range(10, 25)) * 5 + list(range(100, 210)) * 2
    buckets = count_buckets([ids[:40], ids[40:]], 300)
    assert buckets[7] == buckets[3] == 0 and buckets[10] == 0 and buckets[17] == 0, "ties go by id: 7, 3 and the first eight"
    assert buckets[18] == 1 and buckets[24] == 1 and buckets[100] == 1 and int((buckets == 1).sum()) == 90
    assert buckets[209] == 2 and buckets[299] == len(BUCKETS), "what was not seen is rest"
    assert bucket_names() == ["top 1-10", "top 11-100", "top 101-1000", "rest"]


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "GPT-NeoX", "Gemma-2"])
def test_first_choices_flips_and_decisions_against_counting_by_hand(name: str, live: Callable[[str], Decoder]) -> None:
    decoder = live(name)
    sequences = documents(decoder, (11, 8))
    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    buckets = torch.randint(0, 4, (vocab,), generator=torch.Generator().manual_seed(1))
    found = tokens_probe(decoder, sequences, buckets, max_tokens=11)
    layers = len(decoder)
    said, flipped, own = torch.zeros(layers, 4), torch.zeros(layers, 4), torch.zeros(4)
    first, last = torch.zeros(4, len(RANKS)), torch.zeros(4, len(RANKS))
    for ids in sequences:
        whole, taps = taps_by_hand(decoder, ids)
        final = whole.argmax(-1)
        ranks = torch.zeros(layers, len(ids))
        for i, logits in enumerate(taps):
            for t, answer in enumerate(final.tolist()):
                top = int(logits[t].argmax())
                said[i, buckets[top]] += 1
                flipped[i, buckets[top]] += top != answer
                ranks[i, t] = 1 + int((logits[t] > logits[t, answer]).sum())
        for t, answer in enumerate(final.tolist()):
            own[buckets[answer]] += 1
            for k, rank in enumerate(RANKS):
                good = [bool(r <= rank) for r in ranks[:, t]]
                first[buckets[answer], k] += next((i for i, g in enumerate(good) if g), layers)
                last[buckets[answer], k] += next((i for i in range(layers) if all(good[i:])), layers)
    assert torch.equal(found.said_LG.float(), said) and torch.equal(found.flipped_LG.float(), flipped)
    assert torch.equal(found.said_G.float(), own) and found.tokens == sum(map(len, sequences))
    assert torch.equal(found.first_GK.float(), first) and torch.equal(found.last_GK.float(), last)
    result = found.result()
    assert sum(result["share"][0]) == pytest.approx(1) and sum(result["share_final"]) == pytest.approx(1)


def test_token_sums_of_two_halves_are_the_whole(live: Callable[[str], Decoder]) -> None:
    decoder = live("Qwen2")
    sequences = documents(decoder, (9, 6, 11, 4))
    buckets = count_buckets(sequences, decoder.model.get_input_embeddings().weight.shape[0])
    whole, half = tokens_probe(decoder, sequences), tokens_probe(decoder, sequences[:2], buckets)
    half.merge(tokens_probe(decoder, sequences[2:], buckets))
    assert whole.result() == half.result()


# Multiple choice


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Falcon", "Gemma-2"])
def test_options_by_layer_against_counting_by_hand(name: str, live: Callable[[str], Decoder]) -> None:
    decoder = live(name)
    contexts = documents(decoder, (6, 11, 8, 4))
    items = [
        Item(tuple(contexts[0]), (5, 9, 31), 1), Item(tuple(contexts[1]), (7, 8), None),
        Item(tuple(contexts[2]), (40, 12, 20, 33), 3), Item(tuple(contexts[3]), (3, 4), 0),
    ]  # fmt: skip
    found = choices_probe(decoder, items, max_tokens=22).result()
    layers = len(decoder)
    listed, mass, rank, chosen, right = (torch.zeros(layers + 1, dtype=torch.float64) for _ in range(5))
    for item in items:
        whole, lenses = taps_by_hand(decoder, list(item.context))
        taps = [tap[-1] for tap in (*lenses, whole)]
        own = [[float(tap[o]) for o in item.options] for tap in taps]
        last = own[-1].index(max(own[-1]))
        for i, tap in enumerate(taps):
            ranks = [1 + int((tap > tap[o]).sum()) for o in item.options]
            listed[i] += all(r <= 2 * len(ranks) for r in ranks)
            mass[i] += tap.double().softmax(0)[list(item.options)].sum()
            rank[i] += torch.tensor(ranks, dtype=torch.float64).log().mean()
            chosen[i] += own[i].index(max(own[i])) == last
            right[i] += own[i].index(max(own[i])) == item.gold
    assert found["listed"] == (listed / 4).tolist() and found["chosen"] == (chosen / 4).tolist() and found["items"] == 4
    assert found["right"] == pytest.approx((right / 3).tolist()) and found["mass"] == pytest.approx((mass / 4).tolist(), abs=1e-6)
    assert found["rank"] == pytest.approx((rank / 4).exp().tolist(), rel=1e-6) and found["chosen"][-1] == 1


def test_items_that_cannot_be_told_apart_are_refused(live: Callable[[str], Decoder]) -> None:
    decoder = live("Llama")
    none: list[Item] = []
    same, one = [Item((3, 4), (5, 5), 0)], [Item((3,), (5,), 0)]
    for items, told in ((none, "no multiple-choice item"), (same, "same token"), (one, "fewer than two options")):
        with pytest.raises(Refused, match=told):
            choices_probe(decoder, items)


def test_letters_of_a_task_become_items(run_inputs: Path, tmp_path: Path) -> None:
    arguments = ["depth", "--model", "demo", "--probe", "choices", "--tasks", "demo_letters", "--limit", "5", "--samples", "2"]
    done = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "demo" / "choices.json").read_text())["demo_letters"]
    assert found["items"] == 5 and found["mass"][0] < 0.1 < 0.9 < found["mass"][-1] and found["listed"][-1] == 1
    assert 0 < found["right"][-1] <= 1 and (tmp_path / "out" / "figures" / "choices.png").exists()
    source = shutil.copytree(run_inputs / "tasks", tmp_path / "tasks")
    names = ["a river of stone", "the long winter road", "nothing at all"]
    texts = [json.dumps({"question": "which", "choices": names, "gold": 0}) for _ in range(4)]
    (source / "items.jsonl").write_text("\n".join(texts) + "\n")
    for file in source.glob("*.yaml"):
        file.write_text(file.read_text().replace(str(run_inputs / "tasks"), str(source)))
    arguments = ["depth", "--model", str(run_inputs / "model"), "--probe", "choices", "--tasks", "tiny", "--device", "cpu"]
    arguments += ["--task-folder", str(source), "--eval-data", str(run_inputs / "loss.jsonl")]
    done = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "other")])
    assert done.exit_code == 1 and "--tasks tiny has no items whose options are single tokens" in done.output
    assert not (tmp_path / "other" / "depth.json").exists()
