"""The tuned lens: against an independent computation, planted truths, a killed training, its two file formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from layerprune.depth import tuned
from layerprune.depth.lens import lens_probe
from layerprune.depth.tuned import chunks, evaluate_lens, lens_width, train_lens
from layerprune.depth.tuned_file import TunedLens, load_lens, save_lens, save_library_lens
from layerprune.model.data import TokenBatch
from layerprune.model.decoder import Decoder, forward_logits, is_cut, view_decoder, walk_states
from layerprune.model.errors import LayerpruneError, Refused, UsageError
from layerprune.model.load import load_model
from layerprune.model.tail import Tail, frozen

torch.set_num_threads(1)

LAYERS, WIDTH, VOCAB = 4, 16, 64

# each family's final norm, and what follows the head
ENDS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "Llama": ("model.norm", lambda x: x),
    "GPT-2": ("transformer.ln_f", lambda x: x),
    "GPT-NeoX": ("gpt_neox.final_layer_norm", lambda x: x),
    "OPT": ("model.decoder.final_layer_norm", lambda x: x),
    "Falcon": ("transformer.ln_f", lambda x: x),
    "BLOOM": ("transformer.ln_f", lambda x: x),
    "Gemma-2": ("model.norm", lambda x: 30 * torch.tanh(x / 30)),
    "Granite": ("model.norm", lambda x: x / 2),
    "Cohere2": ("model.norm", lambda x: x * 0.0625),
    "Mamba": ("backbone.norm_f", lambda x: x),
}


def llama(seed: int = 0, **more: Any) -> Any:
    """A random Llama with uneven norm weights, in eval mode."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3, **more,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.copy_(torch.rand_like(value) * 2 + 0.2)
    return model


def documents(count: int = 12, seed: int = 1, vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 20, (count,), generator=generator).tolist()
    return [torch.randint(2, vocab, (size,), generator=generator).tolist() for size in sizes]


def a_lens(layers: int = LAYERS, width: int = WIDTH, vocab: int = VOCAB, size: float = 0.1, **more: Any) -> TunedLens:
    lens = TunedLens(layers, width, vocabulary=vocab, **more)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return lens


def by_hooks(model: Any, layers: Any, ids: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The inputs of all layers, (T, D) each, then the last one's output; and the model's own logits (T, V)."""
    seen: list[torch.Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0].detach().clone())

    def after(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].detach().clone())

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(after))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return seen, logits


def brute_force(
    model: Any, layers: Any, end: Callable[[torch.Tensor], torch.Tensor], sequences: list[list[int]], lens: TunedLens | None
) -> dict[str, list[float]]:
    """One document, one layer, one position at a time, in float64 after the logits."""
    count = len(layers)
    sums = {name: [0.0] * count for name in ("kl", "kl_final", "overlap", "top1")}
    tokens = 0
    for ids in sequences:
        states, logits = by_hooks(model, layers, ids)
        for layer in range(count):
            x = states[layer + (lens is not None and lens.tap == "output")]
            if lens is not None:
                translator = lens.translators[layer]
                x = x + (x @ translator.weight.detach().T + translator.bias.detach())
            with torch.no_grad():
                found = end(x).double()
            for t in range(len(ids)):
                p, q = logits[t].double().softmax(0), found[t].softmax(0)
                sums["kl_final"][layer] += float((p * (p.log() - q.log())).sum())
                sums["kl"][layer] += float((q * (q.log() - p.log())).sum())
                best_p, best_q = p.argsort(descending=True)[:5].tolist(), q.argsort(descending=True)[:5].tolist()
                sums["overlap"][layer] += len(set(best_p) & set(best_q)) / 5
                sums["top1"][layer] += best_p[0] == best_q[0]
        tokens += len(ids)
    return {name: [value / tokens for value in values] for name, values in sums.items()}


def difference(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    assert a.keys() == b.keys()
    return max(abs(x - y) for name in a for x, y in zip(a[name], b[name], strict=True))


def llama_end(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: model.lm_head(model.model.norm(x))


@pytest.mark.parametrize("name", ENDS)
def test_evaluation_equals_brute_force(name: str, tmp_path: Path) -> None:
    model = load_model(families.build(name, tmp_path), device="cpu", dtype="float32")
    norm, after = ENDS[name]
    decoder, sequences = view_decoder(model), documents(5, vocab=160)

    def end(x: torch.Tensor) -> torch.Tensor:
        return after(model.get_output_embeddings()(model.get_submodule(norm)(x)))

    for lens in (None, a_lens(8, 32, 160), a_lens(8, 32, 160, tap="output")):
        expected = brute_force(model, decoder.layers, end, sequences, lens)
        found = evaluate_lens(decoder, sequences, lens, max_tokens=40)
        assert found.tokens == sum(map(len, sequences))
        assert difference(found.result(), expected) < 1e-5
        assert min(expected["kl_final"][:-1]) > 1e-4


def test_small_slices_and_left_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, sequences, lens = view_decoder(llama()), documents(), a_lens()
    whole = evaluate_lens(decoder, sequences, lens)
    monkeypatch.setitem(tuned._SLICE, "cpu", 3 * VOCAB)
    small = evaluate_lens(decoder, sequences, lens, max_tokens=25)
    left = evaluate_lens(decoder, sequences, lens, max_tokens=60, padding_side="left")
    assert small.tokens == left.tokens == whole.tokens
    assert difference(small.result(), whole.result()) < 1e-5
    assert difference(left.result(), whole.result()) < 1e-5


def test_sums_of_parts_merge_to_the_whole() -> None:
    decoder, sequences, lens = view_decoder(llama()), documents(), a_lens()
    total = evaluate_lens(decoder, sequences[:5], lens)
    total.merge(evaluate_lens(decoder, sequences[5:], lens))
    whole = evaluate_lens(decoder, sequences, lens)
    assert total.tokens == whole.tokens and difference(total.result(), whole.result()) < 1e-5


def test_a_new_lens_is_the_logit_lens_to_the_bit() -> None:
    decoder, sequences = view_decoder(llama()), documents()
    assert evaluate_lens(decoder, sequences, TunedLens(LAYERS, WIDTH)).result() == evaluate_lens(decoder, sequences, None).result()


def test_the_logit_lens_is_that_of_the_other_probe() -> None:
    decoder, sequences = view_decoder(llama()), documents()
    assert difference(evaluate_lens(decoder, sequences, None).result(), lens_probe(decoder, sequences).result()) < 1e-5


def test_at_the_output_tap_the_last_layer_is_the_final_prediction() -> None:
    found = evaluate_lens(view_decoder(llama()), documents(), TunedLens(LAYERS, WIDTH, tap="output")).result()
    shifted = evaluate_lens(view_decoder(llama()), documents(), None).result()
    assert found["kl_final"][-1] == 0 and found["top1"][-1] == 1 and found["overlap"][-1] == 1
    assert found["kl_final"][:-1] == shifted["kl_final"][1:]


def test_the_tail_gives_the_models_logits_of_the_state_before_the_norm() -> None:
    decoder = view_decoder(llama())
    ids_BT = torch.tensor([documents(1)[0]])
    states: list[torch.Tensor] = []
    walk_states(decoder, ids_BT, None, lambda layer, x: states.append(x.clone()))
    with torch.no_grad():
        logits_BTV = forward_logits(decoder, ids_BT)
    assert torch.equal(Tail(decoder)(states[-1]), logits_BTV)
    after_the_norm = decoder.model.model.norm(states[-1])
    assert (Tail(decoder)(after_the_norm) - logits_BTV).abs().max() > 0.1  # the norm weights are uneven


def test_the_tails_gradient_is_the_ends_and_reaches_no_parameter() -> None:
    model = llama().train()
    decoder = view_decoder(model)
    x = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 2, VOCAB, generator=torch.Generator().manual_seed(1))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    Tail(decoder)(one).backward(weight)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    (llama_end(model)(other) * weight).sum().backward()
    assert one.grad is not None and other.grad is not None
    assert (one.grad - other.grad).abs().max() < 1e-5 and one.grad.abs().max() > 0.1
    assert all(module.training for module in model.modules())


def test_the_model_is_restored_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)  # a mixed state must come back as it was
    model.model.layers[1].eval()
    decoder = view_decoder(model)
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    with pytest.raises(RuntimeError):  # inside the model's own end
        Tail(decoder)(torch.zeros(1, 2, WIDTH + 1))

    def stop(step: int, kl_L: list[float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_lens(decoder, documents(), steps=2, tokens_per_step=20, progress=stop)
    with pytest.raises(ZeroDivisionError), frozen(model):
        raise ZeroDivisionError
    assert flags == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    assert not is_cut(model) and all("forward" not in layer.__dict__ for layer in decoder.layers)


@pytest.mark.parametrize(("optimizer", "size"), [("sgd", 0.3), ("adam", 0.3), ("sgd", 0.05)])
def test_training_is_the_recipe_computed_by_itself(optimizer: str, size: float) -> None:
    """Three steps against torch's own optimizer, clipping, schedule and KL on states from hooks."""
    model, sequences = llama(initializer_range=size), documents(6)
    decoder, steps = view_decoder(model), 3
    tokens = sum(map(len, sequences))
    found = train_lens(decoder, sequences, steps=steps, tokens_per_step=tokens, optimizer=optimizer, max_tokens=33)
    maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    for parameter in maps.parameters():
        nn.init.zeros_(parameter)
    made: Any
    if optimizer == "sgd":
        made = torch.optim.SGD(maps.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    else:
        made = torch.optim.Adam(maps.parameters(), lr=1e-3, betas=(0.9, 0.999), amsgrad=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 - step / steps)
    seen = [by_hooks(model, decoder.layers, ids) for ids in sequences]
    logits = torch.cat([logits for _, logits in seen])
    losses = []
    for _step in range(steps):  # a step takes all documents, in any order
        losses.append([])
        for layer in range(LAYERS):
            x = torch.cat([states[layer] for states, _ in seen])
            q = llama_end(model)(x + maps[layer](x)).log_softmax(-1)
            loss = nn.functional.kl_div(q, logits.log_softmax(-1), log_target=True, reduction="batchmean")
            losses[-1].append(loss.item())
            loss.backward()
        norm = nn.utils.clip_grad_norm_(maps.parameters(), 1.0)
        assert norm > 1.01 if size == 0.3 else norm < 0.99  # clipping is seen, and what it would hide
        made.step()
        made.zero_grad()
        schedule.step()
    assert (found.kl_SL - torch.tensor(losses)).abs().max() < 1e-5
    assert found.tokens == steps * tokens
    for ours, theirs in zip(found.lens.translators, maps, strict=True):
        assert theirs.weight.abs().max() > 1e-4
        assert (ours.weight - theirs.weight).abs().max() < 2e-6 and (ours.bias - theirs.bias).abs().max() < 2e-6


def test_adam_is_amsgrad() -> None:
    """Too slow a difference for the steps above."""
    made = tuned._Recipe(1, 1, "adam", 1e-3, 0.0, 0, "input").made([nn.Parameter(torch.zeros(1))])
    assert isinstance(made, torch.optim.Adam) and made.defaults["amsgrad"]


@pytest.mark.parametrize("tap", ["input", "output"])
def test_training_lowers_kl_and_leaves_the_parameters(tap: str) -> None:
    model, sequences = llama(), documents(40)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoder = view_decoder(model)
    found = train_lens(decoder, sequences, steps=30, tokens_per_step=150, tap=tap)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    unseen = documents(20, seed=9)
    new = evaluate_lens(decoder, unseen, TunedLens(LAYERS, WIDTH, tap=tap)).result()["kl_final"]
    trained = evaluate_lens(decoder, unseen, found.lens).result()["kl_final"]
    # at the output tap the last map has nothing to learn, and nothing to spoil
    pairs = list(zip(trained, new, strict=True))[: LAYERS if tap == "input" else LAYERS - 1]
    assert all(after < 0.8 * first for after, first in pairs), pairs
    assert tap == "input" or trained[-1] < 1e-6


class Affine(nn.Module):
    """A layer that is an affine map of the residual stream."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(WIDTH, generator=generator))

    def forward(self, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
        return hidden_states + hidden_states @ self.weight.T + self.bias


def planted() -> Decoder:
    """Layers 2 and 3 are affine: the maps of layers 2 and 3 can be exact, those of 0 and 1 cannot."""
    model = llama()
    for index in (2, 3):
        model.model.layers[index] = Affine(index)
    return view_decoder(model)


def test_a_planted_affine_end_has_a_known_lens() -> None:
    decoder, sequences = planted(), documents()
    lens = TunedLens(LAYERS, WIDTH)
    last, before = decoder.layers[3], decoder.layers[2]
    eye = torch.eye(WIDTH)
    with torch.no_grad():
        lens.translators[3].weight.copy_(last.weight)
        lens.translators[3].bias.copy_(last.bias)
        lens.translators[2].weight.copy_((eye + last.weight) @ (eye + before.weight) - eye)
        lens.translators[2].bias.copy_((eye + last.weight) @ before.bias + last.bias)
    found = evaluate_lens(decoder, sequences, lens).result()
    assert max(found["kl_final"][2:]) < 1e-6 < 0.01 < min(found["kl_final"][:2])
    assert found["top1"][2:] == [1, 1]


def test_training_finds_a_planted_affine_end() -> None:
    decoder, unseen = planted(), documents(20, seed=9)
    found = train_lens(decoder, documents(60), steps=150, tokens_per_step=300, optimizer="adam", learning_rate=0.03, weight_decay=0)
    logit = evaluate_lens(decoder, unseen, None).result()["kl_final"]
    trained = evaluate_lens(decoder, unseen, found.lens).result()["kl_final"]
    assert min(logit) > 0.1
    assert max(trained[2:]) < 1e-3, trained
    assert min(trained[:2]) > 0.01, trained


def bytes_of(lens: TunedLens) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in lens.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_killed_training_goes_on_to_the_same_bytes(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, work = view_decoder(llama()), tmp_path / "work"
    settings: dict[str, Any] = {"steps": 7, "tokens_per_step": 50, "optimizer": optimizer, "seed": 3}
    whole = train_lens(decoder, documents(), **settings)

    def kill(step: int, kl_L: list[float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_lens(decoder, documents(), **settings, work=work, save_every=2, progress=kill)
    assert [path.name for path in work.iterdir()] == [tuned.STATE]
    torch.rand(3)  # the caller's random numbers have no part in it
    steps: list[int] = []
    resumed = train_lens(
        decoder, documents(), **settings, work=work, save_every=2, progress=lambda step, kl_L: steps.append(step)
    )
    assert steps == [5, 6, 7]  # from the state after step 4
    assert bytes_of(resumed.lens) == bytes_of(whole.lens) != bytes_of(TunedLens(LAYERS, WIDTH))
    assert torch.equal(resumed.kl_SL, whole.kl_SL) and resumed.tokens == whole.tokens
    again = train_lens(decoder, documents(), **settings, work=work, progress=lambda step, kl_L: pytest.fail("nothing is left"))
    assert bytes_of(again.lens) == bytes_of(whole.lens)


def test_a_save_that_fails_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    decoder, work, real = view_decoder(llama()), tmp_path / "work", safetensors.torch.save_file
    calls: list[int] = []

    def third_breaks(tensors: Any, path: Path, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        real(tensors, path, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", third_breaks)
    with pytest.raises(KeyboardInterrupt):
        train_lens(decoder, documents(), steps=4, tokens_per_step=30, work=work, save_every=1)
    assert [path.name for path in work.iterdir()] == [tuned.STATE]
    steps: list[int] = []
    train_lens(decoder, documents(), steps=4, tokens_per_step=30, work=work, progress=lambda step, kl_L: steps.append(step))
    assert steps == [3, 4]


def test_seeds_decide_the_order() -> None:
    decoder = view_decoder(llama())
    one, same, other = (train_lens(decoder, documents(), steps=3, tokens_per_step=40, seed=seed) for seed in (0, 0, 1))
    assert bytes_of(one.lens) == bytes_of(same.lens) != bytes_of(other.lens)


def test_a_work_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    decoder, settings = view_decoder(llama()), {"steps": 2, "tokens_per_step": 30, "work": tmp_path}
    train_lens(decoder, documents(), **settings)
    with pytest.raises(UsageError, match="seed 0, not 1"):
        train_lens(decoder, documents(), **settings, seed=1)
    with pytest.raises(UsageError, match="data"):
        train_lens(decoder, documents(seed=2), **settings)
    with pytest.raises(UsageError, match="layers 4, not 5"):
        train_lens(view_decoder(llama(num_hidden_layers=5)), documents(), **settings)
    (tmp_path / tuned.STATE).write_bytes(b"broken")
    with pytest.raises(Refused, match="remove it to begin anew"):
        train_lens(decoder, documents(), **settings)


@pytest.mark.parametrize(("save", "files"), [(save_lens, "lens.safetensors"), (save_library_lens, "params.pt")])
def test_a_saved_lens_is_read_back(save: Any, files: str, tmp_path: Path) -> None:
    lens = a_lens(model="tiny/llama")
    save(lens, tmp_path / "lens")
    assert sorted(path.name for path in (tmp_path / "lens").iterdir()) == sorted(["config.json", files])
    found = load_lens(tmp_path / "lens")
    assert bytes_of(found) == bytes_of(lens)
    assert (found.layers, found.width, found.model, found.tap) == (LAYERS, WIDTH, "tiny/llama", "input")
    assert found.vocabulary == (VOCAB if save is save_lens else None)
    with pytest.raises(UsageError, match="exists already"):
        save(lens, tmp_path / "lens")


def test_the_tap_is_kept_and_the_library_cannot_say_it(tmp_path: Path) -> None:
    lens = a_lens(tap="output")
    save_lens(lens, tmp_path / "lens")
    assert load_lens(tmp_path / "lens").tap == "output"
    with pytest.raises(UsageError, match="output"):
        save_library_lens(lens, tmp_path / "library")


def library_folder(folder: Path, state: Any, **more: Any) -> Path:
    """A folder as the tuned-lens library's 0.2 writes it."""
    folder.mkdir()
    config = {
        "base_model_name_or_path": "gpt2", "d_model": 3, "num_hidden_layers": 2, "bias": True, "base_model_revision": None,
        "unembed_hash": "0" * 64, "lens_type": "linear_tuned_lens", **more,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "params.pt")
    return folder


def test_the_librarys_own_files_are_read(tmp_path: Path) -> None:
    """layer_translators' state dict, h + Linear(h); half precision and no biases too."""
    torch.manual_seed(1)
    theirs = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    lens = load_lens(library_folder(tmp_path / "a", theirs.state_dict()))
    x = torch.randn(4, 3)
    for layer in range(2):
        assert torch.allclose(lens(layer, x), x + theirs[layer](x), atol=1e-6)
    halves = {name: tensor.half() for name, tensor in theirs.state_dict().items() if "weight" in name}
    lens = load_lens(library_folder(tmp_path / "b", halves, bias=False))
    assert torch.equal(lens.translators[1].weight, halves["1.weight"].float()) and lens.translators[1].bias.abs().max() == 0


class Code:
    """Unpickled without care, it makes the file `ran`."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return Path.touch, (self.ran,)


def test_bad_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    good = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)).state_dict()
    cases: dict[str, tuple[Any, dict[str, Any], str]] = {
        "missing": ({n: t for n, t in good.items() if n != "1.bias"}, {}, "1.bias is missing"),
        "more": ({**good, "2.weight": torch.zeros(3, 3)}, {}, "2.weight is too many"),
        "shape": ({**good, "0.weight": torch.zeros(3, 4)}, {}, r"0.weight .* is float32 \(3, 4\)"),
        "integers": ({**good, "0.bias": torch.zeros(3, dtype=torch.long)}, {}, "0.bias .* is int64"),
        "nan": ({**good, "0.bias": torch.full((3,), torch.nan)}, {}, "not finite"),
        "list": ([1, 2], {}, "no mapping"),
        "number": ({**good, "0.bias": 3}, {}, "0.bias is no tensor"),
        "code": ({**good, "x": Code(tmp_path / "ran")}, {}, "broken, or holds code"),
        "layers": (good, {"num_hidden_layers": "2"}, "num_hidden_layers '2'"),
        "huge": (good, {"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000"),
        "kind": (good, {"lens_type": "linear"}, "lens_type 'linear'"),
        "name": (good, {"base_model_name_or_path": 3}, "does not name the model"),
    }
    for name, (state, more, said) in cases.items():
        with pytest.raises(Refused, match=said) as refusal:
            load_lens(library_folder(tmp_path / name, state, **more))
        assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)
    assert not (tmp_path / "ran").exists()
    folder = tmp_path / "own"
    save_lens(a_lens(), folder)
    (folder / "lens.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(Refused, match="safetensors"):
        load_lens(folder)
    (folder / "lens.safetensors").unlink()
    with pytest.raises(Refused, match="does not exist"):
        load_lens(folder)
    (folder / "config.json").write_text('{"lens_type": "layerprune_tuned_lens", "layers": 4, "width": true}')
    with pytest.raises(Refused, match="width True"):
        load_lens(folder)
    with pytest.raises(Refused, match="does not exist"):
        load_lens(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("lens", "said"),
    [
        (TunedLens(LAYERS + 1, WIDTH), "5 layers; this one has 4"),
        (TunedLens(LAYERS, WIDTH * 2, model="big"), "made for big.* 32 features; this one has 16"),
        (TunedLens(LAYERS, WIDTH, vocabulary=VOCAB + 1), "65 tokens in the vocabulary; this one has 64"),
    ],
)
def test_a_lens_of_another_shape_is_refused(lens: TunedLens, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        evaluate_lens(view_decoder(llama()), documents(), lens)


def test_wrong_states_and_layers_are_refused() -> None:
    lens = TunedLens(LAYERS, WIDTH)
    with pytest.raises(UsageError, match="17 features"):
        lens(0, torch.zeros(2, 17))
    for layer in (-1, LAYERS):
        with pytest.raises(UsageError, match=f"layer {layer} is none"):
            lens(layer, torch.zeros(2, WIDTH))
    with pytest.raises(UsageError, match="middle"):
        TunedLens(LAYERS, WIDTH, tap="middle")


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"optimizer": "lion"}, UsageError), ({"steps": 0}, UsageError), ({"tokens_per_step": 0}, UsageError),
        ({"learning_rate": 0.0}, UsageError), ({"learning_rate": float("nan")}, UsageError), ({"weight_decay": -1.0}, UsageError),
        ({"seed": -1}, UsageError), ({"tap": "middle"}, UsageError), ({"save_every": 0}, UsageError),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(more: dict[str, Any], kind: type[LayerpruneError]) -> None:
    with pytest.raises(kind):
        train_lens(view_decoder(llama()), documents(), **{"steps": 1, "tokens_per_step": 20, **more})


def test_bad_sequences_are_refused() -> None:
    decoder = view_decoder(llama())
    for run in (lambda s: train_lens(decoder, s, steps=1, tokens_per_step=9), lambda s: evaluate_lens(decoder, s, None)):
        with pytest.raises(UsageError, match="no sequence has a token"):
            run([[], []])
        with pytest.raises(Refused, match="token id 64"):
            run([[1, 2], [VOCAB]])


def test_a_loss_that_is_no_number_is_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(Refused, match="layer 0 is not a number at step 1"):
        train_lens(view_decoder(model), documents(), steps=1, tokens_per_step=20)
    with pytest.raises(Refused, match="not a number"):
        evaluate_lens(view_decoder(model), documents(), None)


@pytest.mark.parametrize(("name", "said"), [("RWKV", "more between its layers"), ("Gemma-3n", "several streams")])
def test_models_without_a_readable_stream_are_refused(name: str, said: str, tmp_path: Path) -> None:
    decoder = view_decoder(load_model(families.build(name, tmp_path), device="cpu", dtype="float32"))
    with pytest.raises(Refused, match=said):
        train_lens(decoder, documents(vocab=160), steps=1, tokens_per_step=20)
    with pytest.raises(Refused, match=said):
        evaluate_lens(decoder, documents(vocab=160), None)


def test_a_state_as_wide_as_the_layers_not_as_the_embedding(tmp_path: Path) -> None:
    """OPT (350M) projects its embeddings (16) to its states (32) and back."""
    decoder = view_decoder(load_model(families.build("OPT (350M)", tmp_path), device="cpu", dtype="float32"))
    assert lens_width(decoder) == 32
    assert train_lens(decoder, documents(vocab=160), steps=1, tokens_per_step=20).lens.width == 32


def test_half_precision_models_train_in_float32() -> None:
    decoder = view_decoder(llama().to(torch.bfloat16))
    found = train_lens(decoder, documents(40), steps=20, tokens_per_step=150)
    assert all(p.dtype == torch.float32 for p in found.lens.parameters())
    logit, trained = (evaluate_lens(decoder, documents(seed=9), lens).result()["kl_final"] for lens in (None, found.lens))
    assert all(after < first for after, first in zip(trained, logit, strict=True))


def test_a_layer_that_adds_in_place_does_not_change_what_was_seen() -> None:
    class InPlace(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
            return hidden_states.add_(1.0)

    model = llama()
    plain = evaluate_lens(view_decoder(model), documents(), None).result()["kl_final"]
    model.model.layers[3] = InPlace()
    decoder = view_decoder(model)
    batch = TokenBatch(torch.tensor([[1, 2, 3]]), None, (0,))
    (states,) = tuned._slices(decoder, batch)
    assert torch.allclose(states[4], states[3] + 1.0) and plain[3] > 0


def test_documents_are_packed_end_to_end() -> None:
    assert chunks([[1, 2, 3], [4], [5, 6, 7]], 3, 0) == [[1, 2, 3], [0, 4, 0], [5, 6, 7]]
    assert chunks([torch.tensor([1, 2]), [3]], 2) == [[1, 2]]
    with pytest.raises(UsageError, match="fewer than 9 tokens"):
        chunks([[1, 2]], 9)


def test_a_stream_of_rows_is_taken_as_sequences() -> None:
    decoder = view_decoder(llama())
    rows = torch.tensor(documents(1)[0] * 8)[:32].view(4, 8)
    one, other = (train_lens(decoder, s, steps=2, tokens_per_step=16) for s in (rows, rows.tolist()))
    assert bytes_of(one.lens) == bytes_of(other.lens)
    assert one.tokens == 32


def test_the_callers_random_numbers_are_left_alone() -> None:
    decoder = view_decoder(llama())
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    train_lens(decoder, documents(), steps=1, tokens_per_step=20)
    assert torch.equal(torch.rand(2), expected)


def test_a_batch_that_runs_out_of_memory_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, sequences = view_decoder(llama()), documents()
    expected, real = evaluate_lens(decoder, sequences, None), tuned._compare

    def limited(tail: Any, lens: Any, states: list[torch.Tensor]) -> torch.Tensor:
        limited.calls += 1  # type: ignore[attr-defined]
        if limited.calls == 2:  # type: ignore[attr-defined]
            raise torch.cuda.OutOfMemoryError
        return real(tail, lens, states)

    limited.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(tuned, "_compare", limited)
    monkeypatch.setitem(tuned._SLICE, "cpu", 20 * VOCAB)
    found = evaluate_lens(decoder, sequences, None)
    assert found.tokens == expected.tokens and difference(found.result(), expected.result()) < 1e-5
