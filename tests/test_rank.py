"""Angular distances against brute force, laws of the distance, and planted truths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from layerprune.model.decoder import view_decoder
from layerprune.model.errors import Refused
from layerprune.prune.rank import angles_L1L1, best_starts, rank_decoder


def llama(layers: int = 6, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return uneven(LlamaForCausalLM(config))


def uneven(model: Any) -> Any:
    """Norm weights that turn vectors: they show whether x^(L) was taken after the final norm."""
    for module in model.modules():
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            nn.init.uniform_(module.weight, 0.1, 3.0)
    return model.eval()


def documents(seed: int = 1, count: int = 12, vocab: int = 101) -> list[list[int]]:
    maker = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (count,), generator=maker).tolist()
    return [torch.randint(0, vocab, (n,), generator=maker).tolist() for n in lengths]


def brute_force(model: Any, sequences: list[list[int]]) -> list[list[float]]:
    """One document at a time, hooks on the layers, arccos in fp64, sums in plain Python."""
    count = len(view_decoder(model))
    sums = [[0.0] * (count + 1) for _ in range(count + 1)]
    for ids in sequences:
        seen = states_by_hooks(model, ids)
        assert len(seen) == count + 1
        for i in range(count + 1):
            for j in range(i + 1, count + 1):
                cosine = (seen[i] @ seen[j] / seen[i].norm() / seen[j].norm()).item()
                sums[i][j] += math.acos(max(-1.0, min(1.0, cosine))) / math.pi
    return [[sums[i][i + n] / len(sequences) for i in range(count - n + 1)] for n in range(1, count)]


def states_by_hooks(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """The last token's input of every layer, and the last layer's output."""
    layers, seen = view_decoder(model).layers, []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0, -1].double())

    def after(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0, -1].double())

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(after))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def difference(a: list[list[float]], b: list[list[float]]) -> float:
    assert [len(row) for row in a] == [len(row) for row in b]
    return max(abs(x - y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=101, n_embd=32, n_layer=5, n_head=4, n_positions=64, initializer_range=0.2)
    return uneven(GPT2LMHeadModel(config))


def falcon() -> Any:
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=101, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, initializer_range=0.2)
    return uneven(FalconForCausalLM(config))


@pytest.mark.parametrize("make", [llama, gpt2, falcon])
def test_distances_equal_brute_force(make: Any) -> None:
    model = make()
    found = rank_decoder(view_decoder(model), documents(), max_tokens=1)  # one document a batch
    assert difference(found, brute_force(model, documents())) < 1e-6


# GPT-2 counts absolute positions: padded on the left they must count from the first real token.
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [llama, gpt2, falcon])
def test_padded_batches_agree_with_single_documents(make: Any, side: str) -> None:
    model = make()
    alone = rank_decoder(view_decoder(model), documents(), max_tokens=1)
    padded = rank_decoder(view_decoder(model), documents(), max_tokens=200, pad_id=7, padding_side=side)
    assert difference(alone, padded) < 1e-5


def test_the_last_state_is_before_the_final_norm() -> None:
    model = llama()
    found = rank_decoder(view_decoder(model), documents())
    with torch.no_grad():
        wrong = []
        for ids in documents():
            states = torch.stack(model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states)[:, 0, -1]
            wrong.append(angles_L1L1(states))
    post_norm = torch.stack(wrong).mean(0)
    last = len(found)  # row n-1 ends with the block that reaches x^(L)
    gaps = [abs(found[n - 1][-1] - post_norm[last + 1 - n, last + 1].item()) for n in range(1, last + 1)]
    assert max(gaps) > 0.01, "the planted uneven norm does not tell the two states apart"
    assert abs(found[0][0] - post_norm[0, 1].item()) < 1e-6


def test_a_planted_identity_block_wins() -> None:
    model = llama(layers=8)
    with torch.no_grad():
        for i in (3, 4, 5):  # these add nothing to the residual stream
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
    distance = rank_decoder(view_decoder(model), documents())
    assert distance[2][3] < 1e-7
    assert best_starts(distance)["3"] == 3
    assert best_starts(distance)["1"] == 3, "lowest start on ties"
    assert best_starts(distance)["2"] == 3


def test_the_model_is_left_as_it_was() -> None:
    model = llama()
    ids = torch.tensor([documents()[0]])
    before = model(input_ids=ids).logits
    attributes = [dict(vars(layer)) for layer in model.model.layers]
    rank_decoder(view_decoder(model), documents())
    assert [vars(layer) for layer in model.model.layers] == attributes
    assert torch.equal(before, model(input_ids=ids).logits)


def test_the_model_is_left_as_it_was_after_a_failure() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(Refused, match="layer 2"):
        rank_decoder(view_decoder(model), documents())
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_laws_of_the_distance() -> None:
    torch.manual_seed(0)
    states = torch.randn(50, 7, 16)
    angles = angles_L1L1(states)
    assert angles.dtype == torch.float64
    assert (angles >= 0).all() and (angles <= 1).all()
    assert torch.equal(angles.diagonal(dim1=-2, dim2=-1), torch.zeros(50, 7, dtype=torch.float64))
    assert torch.allclose(angles, angles.transpose(-1, -2), atol=1e-15)
    scaled = angles_L1L1(states * torch.rand(50, 7, 1).add(0.01) * 1e3)
    assert torch.allclose(angles, scaled, atol=1e-7)
    through = angles[:, :, :, None] + angles[:, None, :, :]  # d(i, j) + d(j, k)
    assert (angles[:, :, None, :] <= through + 1e-12).all()
    opposite = angles_L1L1(torch.stack([states[:, 0], -2 * states[:, 0]], dim=1))
    assert torch.allclose(opposite[:, 0, 1], torch.ones(50, dtype=torch.float64))


def test_nearly_equal_states_keep_their_precision() -> None:
    # the truth of a turn by 1e-9 rad is 1e-9 / pi; arccos of a cosine near 1 gives 0 or 1e-8 noise
    base, ortho = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    base[0], ortho[1] = 1.0, 1.0
    turned = math.cos(1e-9) * base + math.sin(1e-9) * ortho
    found = angles_L1L1(torch.stack([base, turned]))[0, 1].item()
    assert found == pytest.approx(1e-9 / math.pi, rel=1e-6)


def test_a_zero_state_is_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    with pytest.raises(Refused, match="embedding are zero"):
        rank_decoder(view_decoder(model), documents())


def test_streams_and_documents_of_one_number_are_told_apart() -> None:
    """Gemma-3n hands its layers (streams, batch, tokens, features): four streams of four documents."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, num_kv_shared_layers=0, altup_num_inputs=4, hidden_size_per_layer_input=8, laurel_rank=4,
        vocab_size_per_layer_input=101, layer_types=["full_attention"] * 4, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    decoder = view_decoder(Gemma3nForCausalLM(config).eval())
    same_length = [ids[:3] + ids[:3] for ids in documents(count=4)]
    together = rank_decoder(decoder, same_length, max_tokens=24)
    assert difference(together, rank_decoder(decoder, same_length, max_tokens=1)) < 1e-5


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    usual, forward, failures = rank_decoder(view_decoder(model), documents()), model.forward, []

    def limited(rows: int) -> Any:
        def small(input_ids: torch.Tensor, **more: Any) -> Any:
            if len(input_ids) > rows:
                failures.append(len(input_ids))
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return forward(input_ids=input_ids, **more)

        return small

    told: list[int] = []
    monkeypatch.setattr(model, "forward", limited(2))
    found = rank_decoder(view_decoder(model), documents(), progress=told.append)
    assert difference(found, usual) < 1e-6 and failures and sum(told) == len(documents())
    monkeypatch.setattr(model, "forward", limited(0))
    with pytest.raises(Refused, match="not even one sequence"):
        rank_decoder(view_decoder(model), documents())


def test_a_pad_token_that_the_model_has_no_embedding_for(build_llama: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    from layerprune.prune.rank import rank_blocks

    folder = build_llama(tmp_path / "model", layers=3, vocab_size=300)
    data = tmp_path / "d.txt"
    data.write_text("the river\n\nthe old tower over the small stone\n")
    before = rank_blocks(folder, data=str(data), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 300
    tokenizer.save_pretrained(folder)
    assert difference(rank_blocks(folder, data=str(data), device="cpu")["distance"], before["distance"]) < 1e-6


def test_layers_that_do_not_run_on_text_alone_are_refused() -> None:
    model = llama()
    decoder = view_decoder(model)
    decoder.layers[2].forward = None  # never called below
    model.model.layers = nn.ModuleList([layer for i, layer in enumerate(decoder.layers) if i != 2])
    with pytest.raises(Refused, match="runs 5 of its 6 layers"):
        rank_decoder(decoder, documents())
