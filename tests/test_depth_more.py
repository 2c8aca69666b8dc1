"""The probes of the command that cost more: prunability, erasure and gradients of one prompt, the tuned lens."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from layerprune import depth_lens, depth_prompt
from layerprune.cli import main
from layerprune.depth.tuned_file import TunedLens, load_lens, save_lens, save_library_lens
from layerprune.depth_checks import PROBES
from layerprune.depth_maps import plot_erasure, plot_prunability, token_label
from layerprune.depths import format_depth, probe_depth
from layerprune.model.data import read_documents
from layerprune.model.errors import Refused, UsageError
from layerprune.model.load import load_model, load_tokenizer

torch.set_num_threads(1)
LENGTH = 20


@pytest.fixture(scope="module")
def settings(run_inputs: Path) -> dict[str, Any]:
    return {
        "models": run_inputs / "model", "eval_data": str(run_inputs / "loss.jsonl"), "samples": 3, "length": LENGTH,
        "device": "cpu", "say": lambda line: None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(run_inputs: Path) -> Any:
    return load_model(run_inputs / "model", device="cpu")


@pytest.fixture(scope="module")
def sequences(run_inputs: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(run_inputs / "model")
    documents = read_documents(str(run_inputs / "loss.jsonl"), "validation", 3, 0)
    return [tokenizer(text)["input_ids"][:LENGTH] for text in documents]


def stored(folder: Path, probe: str) -> Any:
    return json.loads((folder / "model" / f"{probe}.json").read_text())


@torch.no_grad()
def states(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """x^(0) .. x^(L) (T, D) by hooks of our own: x^(L) before the final norm."""
    seen: list[torch.Tensor] = []
    layers = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, kw: seen.append(args[0][0].clone()), with_kwargs=True) for layer in layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].clone())))
    try:
        model(input_ids=torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def test_prunability_against_the_model_itself(
    settings: dict[str, Any], model: Any, sequences: list[list[int]], tmp_path: Path
) -> None:
    probe_depth(probes=["prunability"], out=tmp_path / "out", **settings)
    found = stored(tmp_path / "out", "prunability")
    layers, vocab = 8, 320
    angle, kl, skip = torch.zeros(layers), torch.zeros(layers), torch.zeros(layers)
    tokens = sum(map(len, sequences))
    with torch.no_grad():
        for ids in sequences:
            x = states(model, ids)
            final = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            for i in range(layers):
                a, b = x[i][-1].double(), x[i + 1][-1].double()
                angle[i] += torch.arccos(a @ b / a.norm() / b.norm()) / math.pi / len(sequences)
                lens = model.lm_head(model.model.norm(x[i])).log_softmax(-1)
                kl[i] += (lens.exp() * (lens - final)).sum() / tokens

                def skipped(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
                    return torch.cat([output[:, :1], args[0][:, 1:]], dim=1)

                hook = model.model.layers[i].register_forward_hook(skipped, with_kwargs=True)
                other = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
                hook.remove()
                skip[i] += (other - final.exp()).norm(dim=-1).sum() / tokens
    assert found["angle"] == pytest.approx(angle.tolist(), abs=1e-5)
    assert found["kl"] == pytest.approx(kl.tolist(), rel=1e-4)
    assert found["skip"] == pytest.approx(skip.tolist(), rel=1e-4)

    @torch.no_grad()
    def loss(kept: list[int]) -> float:
        whole = model.model.layers
        model.model.layers = torch.nn.ModuleList(whole[i] for i in kept)
        model.model.config.num_hidden_layers = len(kept)
        try:
            nats = 0.0
            for ids in sequences:
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
                nats -= float(logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].double().sum())
            return nats / (tokens - len(sequences)) / math.log(vocab)
        finally:
            model.model.layers = whole
            model.model.config.num_hidden_layers = len(whole)

    assert found["whole"] == pytest.approx(loss(list(range(layers))), rel=1e-5)
    assert [cut["n"] for cut in found["cuts"]["last"]] == [1, 2, 3, 4]
    for cuts in found["cuts"].values():
        for cut in cuts:
            gone = range(cut["start"], cut["start"] + cut["n"])
            assert cut["loss"] == pytest.approx(loss([i for i in range(layers) if i not in gone]), rel=1e-5)
    assert [cut["start"] for cut in found["cuts"]["last"]] == [6, 5, 4, 3]
    assert found["cuts"]["angular"][0]["start"] == found["angle"].index(min(found["angle"]))
    assert (tmp_path / "out" / "figures" / "prunability.svg").exists()


def test_prunability_takes_what_is_there(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    probe_depth(probes=["lens", "skip"], out=out, **settings)
    lens, skip = stored(out, "lens"), stored(out, "skip")
    lens["kl"][3], skip["all"]["mean"]["output"][5] = 123.0, 1.25
    (out / "model" / "lens.json").write_text(json.dumps(lens))
    (out / "model" / "skip.json").write_text(json.dumps(skip))
    probe_depth(probes=["prunability"], out=out, **settings)
    found = stored(out, "prunability")
    assert found["kl"][3] == 123 and found["skip"][5] == 1.25


def test_a_killed_prunability_goes_on_with_the_next_part(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("layerprune.eval.sweep.sweep_live", killed)
        with pytest.raises(KeyboardInterrupt):
            probe_depth(probes=["prunability"], out=tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "model" / "prunability.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("layerprune.prune.rank.rank_decoder", killed)
        probe_depth(probes=["prunability"], out=tmp_path / "out", **settings)
    probe_depth(probes=["prunability"], out=tmp_path / "whole", **settings)
    assert stored(tmp_path / "out", "prunability") == stored(tmp_path / "whole", "prunability")
    assert not (tmp_path / "out" / ".work").exists()


def test_erasure_and_gradients_of_a_prompt_against_the_model_itself(
    settings: dict[str, Any], model: Any, sequences: list[list[int]], run_inputs: Path, tmp_path: Path
) -> None:
    arguments = ["depth", "--model", str(settings["models"]), "--eval-data", settings["eval_data"], "--samples", "3"]
    arguments += ["--length", str(LENGTH), "--device", "cpu", "--out", str(tmp_path / "out"), "--probe", "erasure,gradients"]
    done = CliRunner().invoke(main, [*arguments, "--prompt", "the river goes to", "--answer", " the mill"])
    assert done.exit_code == 0, done.output
    assert "no --prompt was given" not in done.stdout and "gradients: probabilities of the answer's" in done.stdout
    erased, integrated = stored(tmp_path / "out", "erasure"), stored(tmp_path / "out", "gradients")
    tokenizer = load_tokenizer(run_inputs / "model")
    ids, gold = tokenizer("the river goes to the mill")["input_ids"], len(tokenizer(" the mill")["input_ids"])
    assert erased["ids"] == ids and erased["answer_tokens"] == gold and "".join(erased["tokens"]) == "the river goes to the mill"
    mean = [torch.cat(depth).mean(0) for depth in zip(*(states(model, s) for s in sequences), strict=True)]
    assert erased["baseline_tokens"] == sum(map(len, sequences))
    where = slice(len(ids) - gold - 1, len(ids) - 1)

    @torch.no_grad()
    def answers(layer: int | None = None, put: Any = None) -> torch.Tensor:
        """The distributions that predict the answer, after `put` changed the input of a layer, (1, T, D)."""
        hooks = []
        if layer is not None:
            at = [*model.model.layers, model.model.norm][layer]
            hooks.append(at.register_forward_pre_hook(lambda m, args: (put(args[0].clone()), *args[1:])))
        try:
            return model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)[where]
        finally:
            for hook in hooks:
                hook.remove()

    plain = answers()
    for layer, token in ((0, 1), (3, len(ids) - 2), (5, 2), (8, len(ids) - gold - 1)):

        def put(x_1TD: torch.Tensor, layer: int = layer, token: int = token) -> torch.Tensor:
            x_1TD[0, token] = mean[layer]
            return x_1TD

        moved = (answers(layer, put) - plain).norm(dim=-1)
        assert erased["max"][layer][token] == pytest.approx(float(moved.max()), rel=1e-3, abs=1e-6)
        assert erased["mean"][layer][token] == pytest.approx(float(moved.mean()), rel=1e-3, abs=1e-6)

    at_gold = torch.arange(gold), torch.tensor(ids[len(ids) - gold :])
    whole = float(plain[at_gold].sum())
    assert integrated["probability"] == pytest.approx(whole, rel=1e-4)
    for layer in (0, 4, 7):
        base = float(answers(layer + 1, lambda x: x.mean(dim=1, keepdim=True).expand_as(x))[at_gold].sum())
        assert integrated["change"][layer] == pytest.approx(whole - base, rel=1e-3, abs=1e-6)
        assert sum(integrated["map"][layer]) == pytest.approx(whole - base, abs=0.011 * max(whole, base))
        assert integrated["error"][layer] == pytest.approx(sum(integrated["map"][layer]) - integrated["change"][layer], abs=1e-9)
    assert integrated["worst"] == max(map(abs, integrated["error"])) and len(integrated["map"]) == 8
    for name in ("erasure", "gradients"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").exists()

    done = CliRunner().invoke(main, [*arguments, "--prompt", "the salt goes to", "--answer", " the mill"])
    assert done.exit_code == 2 and "prompt was 'the river goes to', now 'the salt goes to'" in done.stderr
    assert stored(tmp_path / "out", "erasure") == erased


def test_without_a_prompt_the_data_gives_one_and_it_is_said(
    settings: dict[str, Any], sequences: list[list[int]], tmp_path: Path
) -> None:
    result = probe_depth(probes=["erasure"], out=tmp_path / "out", **settings)
    found = stored(tmp_path / "out", "erasure")
    assert found["ids"] == max(sequences, key=len)[:LENGTH] and found["answer_tokens"] == 2 and found["from_data"] is True
    said = format_depth(result)
    assert f"no --prompt was given: the prompt is the first {len(found['ids']) - 2} tokens of a document" in said
    assert repr("".join(found["tokens"][-2:])) in said


def test_a_token_across_the_border_is_the_answers(run_inputs: Path, model: Any) -> None:
    tokenizer = load_tokenizer(run_inputs / "model")

    def picked(prompt: str, answer: str) -> depth_prompt.Prompt:
        ask = depth_prompt.Ask(3, 0, "auto", "cpu", False, False, lambda line: None, prompt=prompt, answer=answer)
        return depth_prompt.pick_prompt(tokenizer, model.config, ask, [[1, 2, 3]])

    assert len(tokenizer(" river")["input_ids"]) == 1 < len(tokenizer(" riv")["input_ids"])
    split = picked("the riv", "er")
    assert split.ids == tokenizer("the river")["input_ids"] and split.answer == 1
    assert picked("the riv", "er goes").answer == 2 and picked("the river", " goes").answer == 1
    for prompt, answer, told in ((" riv", "er goes", "leaves no token before"), ("the river " * 80, "goes", "context of 128")):
        with pytest.raises(UsageError, match=told):
            picked(prompt, answer)


def test_gradients_that_do_not_add_up_are_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth_prompt, "STEPS", 1)
    monkeypatch.setattr(depth_prompt, "MOST", 1)
    with pytest.raises(Refused, match=r"integrated gradients of layer \d do not add up: with 1 points .* \(1 %\) that is let pass"):
        probe_depth(probes=["erasure", "gradients"], out=tmp_path / "out", **settings)
    assert (tmp_path / "out" / "model" / "erasure.json").exists()
    assert not (tmp_path / "out" / "model" / "gradients.json").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"probes": ["erasure"], "answer": "mill"}, "--answer is given without --prompt"),
        ({"probes": ["gradients"], "prompt": "the"}, "--prompt is given without --answer"),
        ({"probes": ["erasure"], "prompt": "the", "answer": " "}, "--answer ' ' is empty"),
        ({"prompt": "the", "answer": " mill"}, "add --probe erasure,gradients"),
        ({"probes": ["tuned"]}, "give either --lens DIR or --train-lens STEPS"),
        ({"probes": ["tuned"], "lens": "x", "train_lens": 3}, "give either --lens DIR or --train-lens STEPS"),
        ({"probes": ["tuned"], "train_lens": 0}, "--train-lens 0 is not a number of steps"),
        ({"probes": ["tuned"], "lens": "no-such-lens"}, "--lens no-such-lens does not exist"),
        ({"probes": ["lens"], "train_lens": 3}, "--train-lens is for the probe tuned"),
        ({"lens": "x"}, "--lens is for the probe tuned"),
        ({"probes": ["tuned"], "lens": "x", "models": ["a", "b"]}, "--lens is of one model, and 2 are given"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    settings: dict[str, Any], tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        probe_depth(out=tmp_path / "out", **{**settings, **changed})
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def trained(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `depth --probe lens,tuned --train-lens 8`, on the same file's other documents."""
    out = tmp_path_factory.mktemp("trained") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth_lens, "TOKENS_A_STEP", 128)
        probe_depth(probes=["lens", "tuned"], train_lens=8, out=out, **settings)
    return out


def test_a_trained_lens_is_measured_beside_the_logit_lens(trained: Path, settings: dict[str, Any]) -> None:
    found, lens = stored(trained, "tuned"), stored(trained, "lens")
    for name in ("kl", "kl_final", "overlap", "top1"):
        assert found["logit"][name] == pytest.approx(lens[name], abs=1e-4)
    assert sum(found["tuned"]["kl_final"]) < sum(found["logit"]["kl_final"])
    assert found["tokens"] == lens["tokens"] and found["training"]["steps"] == 8 and found["training"]["left_out"] == 3
    assert found["training"]["documents"] == 7 and found["training"]["hash"] != found["training"]["evaluated_hash"]
    assert load_lens(trained / "model" / "tuned-lens").layers == 8
    assert (trained / "figures" / "tuned.png").exists() and not (trained / ".work").exists()


def test_a_trained_lens_is_not_trained_again(
    trained: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    monkeypatch.setattr("layerprune.depth.tuned.train_lens", None)
    (out / "model" / "tuned.json").unlink()
    result = probe_depth(probes=["tuned"], train_lens=8, out=out, **settings)
    assert stored(out, "tuned") == stored(trained, "tuned") and "tuned lens: mean over layers" in format_depth(result)
    with pytest.raises(UsageError, match="steps was 8, now 9"):
        probe_depth(probes=["tuned"], train_lens=9, out=out, **settings)
    (out / "model" / "tuned.json").unlink()
    with pytest.raises(UsageError, match="was trained with other settings"):
        probe_depth(probes=["tuned"], train_lens=9, out=out, **settings)


def test_a_killed_training_goes_on(
    trained: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerprune.depth.tuned import train_lens

    monkeypatch.setattr(depth_lens, "TOKENS_A_STEP", 128)
    steps: list[int] = []

    def stopped(*args: Any, progress: Any, **kwargs: Any) -> Any:
        def told(step: int, kl_L: list[float]) -> None:
            steps.append(step)
            if step == 5 and len(steps) == 5:
                raise KeyboardInterrupt

        return train_lens(*args, progress=told, **{**kwargs, "save_every": 1})

    monkeypatch.setattr("layerprune.depth.tuned.train_lens", stopped)
    with pytest.raises(KeyboardInterrupt):
        probe_depth(probes=["tuned"], train_lens=8, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "model" / "tuned-lens").exists()
    probe_depth(probes=["tuned"], train_lens=8, out=tmp_path / "out", **settings)
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert stored(tmp_path / "out", "tuned") == stored(trained, "tuned")


def test_a_lens_is_loaded_from_either_format(trained: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = trained / "model" / "tuned-lens"
    save_library_lens(load_lens(folder), tmp_path / "library")
    for name, given in (("ours", folder), ("file", folder / "lens.safetensors"), ("theirs", tmp_path / "library")):
        probe_depth(probes=["tuned"], lens=given, out=tmp_path / name, **settings)
        found = stored(tmp_path / name, "tuned")
        assert found["tuned"] == stored(trained, "tuned")["tuned"] and found["training"] is None
    save_lens(TunedLens(8, 32), tmp_path / "narrow")
    with pytest.raises(UsageError, match="32 features; this one has 64"):
        probe_depth(probes=["tuned"], lens=tmp_path / "narrow", out=tmp_path / "other", **settings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="config.json"):
        probe_depth(probes=["tuned"], lens=tmp_path / "empty", out=tmp_path / "other", **settings)
    assert not (tmp_path / "other" / "depth.json").exists()


def test_no_lens_is_trained_on_what_is_evaluated(settings: dict[str, Any], run_inputs: Path, tmp_path: Path) -> None:
    texts = read_documents(settings["eval_data"], "validation", None)
    data = tmp_path / "few.jsonl"
    again = [text.replace(" ", "  ") + "\n" for text in texts[:3]]  # the same documents by their hash
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts[:3], *again]))
    with pytest.raises(Refused, match=r"all 6 documents of .*few.jsonl are evaluated"):
        probe_depth(probes=["tuned"], train_lens=2, out=tmp_path / "out", **{**settings, "eval_data": str(data), "samples": 6})
    assert not (tmp_path / "out").exists()


def test_figures_of_several_models_and_odd_tokens(settings: dict[str, Any], tmp_path: Path) -> None:
    assert token_label(" a\n$x$") == "␣a\\n\\$x\\$" and token_label("中") == "U+4E2D"
    erased = {"max": [[0.1, 0.2, 0.0]] * 3, "tokens": ["a", "$", "中"], "answer_tokens": 1}
    assert len(plot_erasure({"one": erased, "two": erased}, tmp_path)) == 2
    cut = {"n": 1, "start": 1, "loss": 5.0}
    found = {
        "angle": [0.3, 0.1, 0.2], "skip": [0.5, 0.1, 0.1], "kl": [3.0, 2.0, 1.0], "whole": None,
        "cuts": {"angular": [cut, {**cut, "loss": None}], "last": []},
    }  # fmt: skip
    drawn = plot_prunability({"one": found, "two": found}, tmp_path)
    assert [path.name for path in drawn] == ["prunability.png", "prunability.svg"]
    assert "above 1.05 drawn there" in drawn[1].read_text()


def test_every_probe_is_named_in_the_help() -> None:
    told = CliRunner().invoke(main, ["depth", "--help"]).output
    assert all(probe in told for probe in PROBES)
