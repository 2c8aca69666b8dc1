"""Healing on a GPU: tokens a second and memory of the plans that the tool chooses for a budget, against the plain script.

    python benchmarks/heal_speed.py --shape llama-2-7b --budgets 16,24,40,80,130 --out benchmarks/heal_speed.json

The plain script is what one writes with peft and bitsandbytes: NF4 with double quantisation, prepare_model_for_kbit_training
with gradient checkpointing, LoRA on the MLP, transformers' Trainer in bf16, 16 sequences at once. Both train random weights of
the shape on the same random sequences, so speed and memory are the real ones and the loss is not. `--curve N` also trains N steps
with each, without dropout and from the same adapters, and compares the losses step by step. `--ways` times the ways to heal a
cut of a quarter of the layers. `--liger` times one budget with liger-kernel's norms, rotary embeddings and gated MLPs in place of
the model's own, and that budget with layers that are not compiled. What the record at `--out` has stays, but what is
measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rank_speed import SHAPES, random_model
from record import commit, write_record
from transformers import Trainer, TrainerCallback, TrainingArguments

from layerprune.heal.kernels import kernels_in_use
from layerprune.heal.linear import stand_in
from layerprune.heal.memory import GIB, context_bytes
from layerprune.heal.planner import Planner
from layerprune.heal.quantise import add_lora
from layerprune.heal.settings import heal_settings
from layerprune.heal.student import Student, Teaching
from layerprune.heal.targets import choose_targets, target_pattern
from layerprune.heal.trainer import train
from layerprune.model.decoder import view_decoder

WAYS_PRETEND = 300
"""Steps of the run that a way is planned for: compiled, and measured at one size."""
EAGER_PRETEND = 1
"""Steps of a run that is too short for layers to be compiled."""
BLOCK = (21, 29)
"""Layers that are cut for `--ways`: those of Llama-2-7B at a quarter (arXiv 2403.17887)."""


class Packed:
    """Random sequences as `heal/packing.py` hands them over."""

    def __init__(self, sequences: int, length: int, vocab: int, documents: int) -> None:
        import numpy as np

        self.ids_NT = np.random.default_rng(0).integers(0, vocab, (sequences, length)).astype("int32")
        self.every = length // documents

    def labels(self, i: int) -> Any:
        labels_T = self.ids_NT[i].astype("int64")
        labels_T[:: self.every] = -100
        return labels_T

    def positions(self, i: int) -> Any:
        import numpy as np

        return np.arange(self.ids_NT.shape[1]) % self.every


def four_bit_model(shape: str) -> Any:
    """Random weights of the shape, quantised as transformers does it when it loads a checkpoint in NF4."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    model = random_model(shape, "cuda")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                layer = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True,
                    quant_type="nf4", device="meta",
                )  # fmt: skip
                layer.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                ).to("cuda")
                setattr(parent, name, layer)
                child.weight = None
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    model.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    model.config.use_cache = False
    model.train()
    model.requires_grad_(False)
    gc.collect()
    torch.cuda.empty_cache()
    return model


class Clock(TrainerCallback):
    """Seconds of the steps after the first two, and the losses."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    @property
    def step(self) -> float:
        return (self.ends[-1] - self.ends[1]) / (len(self.ends) - 2)


class Plain(torch.utils.data.Dataset):
    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed.ids_NT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids_T = torch.from_numpy(self.packed.ids_NT[index].astype("int64"))
        return {"input_ids": ids_T, "labels": torch.from_numpy(self.packed.labels(index))}


def plain_script(shape: str, packed: Packed, settings: Any, micro_batch: int) -> dict[str, Any]:
    """The baseline: peft and bitsandbytes as their documentation puts them together."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(four_bit_model(shape), use_gradient_checkpointing=True)
    torch.manual_seed(settings.seed)
    model = get_peft_model(
        model,
        LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_rank, lora_dropout=settings.dropout,
            target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            output_dir=work, max_steps=settings.steps, per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=settings.batch_size // micro_batch, learning_rate=settings.learning_rate, bf16=True,
            lr_scheduler_type="cosine", warmup_steps=settings.warmup_steps, gradient_checkpointing=True, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=Plain(packed), callbacks=[clock]).train()
    return measured(clock, settings)


WAYS: dict[str, dict[str, Any]] = {
    "all layers, MLP": {},
    "after the cut": {"adapters": (BLOCK[0], 99)},
    "window of 4": {"adapters": (BLOCK[0] - 4, BLOCK[0] + 4)},
    "MLP and attention": {"targets": ["mlp", "attention"]},
    "distilled, all layers": {"teaching": 0},
    "distilled, after the cut": {"teaching": BLOCK[0], "adapters": (BLOCK[0], 99)},
}
"""Ways to heal a cut of BLOCK: layers with adapters, by their number in the cut model, and layers shared with the teacher."""


def ours(
    shape: str, packed: Packed, settings: Any, budget: int, separate: bool, pretend: int, way: dict[str, Any] | None = None,
    kernels: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `layerprune heal --memory` does with the same model, sequences and settings."""
    teaching = None
    if way is not None and "teaching" in way:
        kept = tuple(i for i in range(SHAPES[shape]["num_hidden_layers"]) if not BLOCK[0] <= i < BLOCK[1])
        teaching = Teaching(kept, 1.0, way["teaching"])
    elif way is not None:
        SHAPES["cut"] = {**SHAPES[shape], "num_hidden_layers": SHAPES[shape]["num_hidden_layers"] - BLOCK[1] + BLOCK[0]}
        shape = "cut"
    model = four_bit_model(shape)
    decoder = view_decoder(model)
    targets = choose_targets(decoder, (way or {}).get("targets", ()))
    if way is not None:
        low, high = way.get("adapters", (0, 99))
        places = teaching.kept if teaching else tuple(range(len(decoder)))
        targets = [t for t in targets if t.layer in places and low <= places.index(t.layer) < high]
    live = add_lora(model, target_pattern(decoder, targets), settings)
    stand_in(live)
    live.train()
    student = Student(decoder, teaching)
    row = {"input_ids": torch.from_numpy(packed.ids_NT[0].astype("int64")), "labels": torch.from_numpy(packed.labels(0))}
    if separate:
        row["position_ids"] = torch.from_numpy(packed.positions(0))
    proofs: list[str] = []
    with kernels_in_use(kernels, student, row, torch.bfloat16, proofs.append) as prove:
        started = time.perf_counter()
        with student.installed():
            planner = Planner(
                student, settings.length, pretend, settings.batch_size, row.get("position_ids"), compiles=kernels is None
            )
            plan = planner.choose([1, 2, 4, 8, 16], budget, lambda line: print("  " + line, flush=True))
        chosen = time.perf_counter() - started
        prove(plan.micro_batch)
        clock, peak = timed_training(live, student, packed, settings, plan, separate, SHAPES[shape]["vocab_size"])
    result = measured(clock, settings)
    result["peak GiB"] = round(peak / GIB, 2)
    if proofs:
        result["proofs"] = proofs
    return {
        **result,
        "plan": {key: value for key, value in plan.record().items() if key not in ("estimate", "seconds")},
        "estimated GiB": round((plan.estimate or 0) / GIB, 2),
        "planned tokens/s": round(settings.batch_size * settings.length / (plan.seconds or math.inf)),
        "seconds to plan": round(chosen, 1),
    }


def timed_training(
    live: Any, student: Student, packed: Packed, settings: Any, plan: Any, separate: bool, vocab: int
) -> tuple[Clock, int]:
    """Train as heal does it; returns the clock and the peak in bytes."""
    import layerprune.heal.trainer as trainer_module

    clock, watch = Clock(), trainer_module.Watch

    def both(*args: Any, **kwargs: Any) -> Any:
        made = watch(*args, **kwargs)
        made.every = 1
        end, log = made.on_step_end, made.on_log
        made.on_step_end = lambda *a, **k: (clock.on_step_end(*a, **k), end(*a, **k))[1]
        made.on_log = lambda *a, **k: (clock.on_log(*a, **k), log(*a, **k))[1]
        return made

    torch.cuda.reset_peak_memory_stats()
    trainer_module.Watch = both  # type: ignore[misc, assignment]
    try:
        with tempfile.TemporaryDirectory() as work:
            found = train(
                live, student, packed, settings, work=Path(work), device="cuda", memory=plan, separate=separate,  # type: ignore[arg-type]
                finish=lambda trainer: None, vocab=vocab, say=lambda line: None,
            )  # fmt: skip
    finally:
        trainer_module.Watch = watch  # type: ignore[misc]
    return clock, int(found["peak"])


def measured(clock: Clock, settings: Any) -> dict[str, Any]:
    tokens = settings.batch_size * settings.length
    peak = torch.cuda.max_memory_reserved() + context_bytes(torch.device("cuda", 0))
    return {
        "tokens/s": round(tokens / clock.step),
        "peak GiB": round(peak / GIB, 2),
        "losses": [round(loss, 4) for loss in clock.losses],
    }


def matrix_rate() -> float:
    """FLOP/s of an 8192 x 8192 x 8192 product in bf16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - started)


def useful_flops(shape: str, length: int, lora_rank: int) -> float:
    """FLOP of a trained token, recomputation not counted: forward and the gradient of the states, 2 a weight each; the
    adapters, 6; attention under its mask."""
    sizes = SHAPES[shape]
    hidden, wide, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    linear = layers * (4 * hidden * hidden + 3 * hidden * wide) + hidden * sizes["vocab_size"]
    adapters = layers * 3 * lora_rank * (hidden + wide)
    attention = layers * 2 * 2 * hidden * length / 2
    return 4 * linear + 6 * adapters + 3 * attention


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--budgets", default="16,24,40,80,130", help="GiB")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pretend", type=int, default=5000, help="steps of the run that is planned for")
    parser.add_argument("--documents", type=int, default=1, help="documents a sequence, kept apart where more than one")
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--curve", type=int, default=0, help="steps of the comparison of losses")
    parser.add_argument("--curve-budget", type=int, default=80)
    parser.add_argument("--ways", action="store_true", help="time the ways to heal, at the curve's budget")
    parser.add_argument("--liger", nargs="?", const="130", metavar="GIB", help="time liger's kernels within this budget  [130]")
    parser.add_argument("--out")
    given = parser.parse_args()
    vocab = SHAPES[given.shape]["vocab_size"]

    def settings(steps: int, dropout: float = 0.05, rate: float = 3e-4) -> Any:
        config = SimpleNamespace(max_position_embeddings=4096, get_text_config=lambda decoder=False: config)
        return heal_settings(
            config, None, steps=steps, batch_size=16, length=given.length, lora_rank=given.lora_rank, dropout=dropout,
            warmup_steps=0, learning_rate=rate,
        )  # fmt: skip

    rate = matrix_rate()
    flops = useful_flops(given.shape, given.length, given.lora_rank)
    packed = Packed(16 * given.steps, given.length, vocab, given.documents)
    before = json.loads(Path(given.out).read_text()) if given.out and Path(given.out).exists() else {}
    rows: dict[str, Any] = before.get("rows", {})

    def show(name: str, row: dict[str, Any]) -> None:
        row["share of the matrix rate"] = round(row["tokens/s"] * flops / rate, 3)
        row["commit"] = commit()
        rows[name] = row
        print(name, json.dumps(row), flush=True)
        if given.out:
            Path(given.out + ".part").write_text(json.dumps(rows))

    if not given.no_plain:
        show("plain script, 16 at once", plain_script(given.shape, packed, settings(given.steps), 16))
        free()
    asked: list[tuple[str, str, int, str | None]] = [
        (f"{budget} GiB", budget, given.pretend, None) for budget in filter(None, given.budgets.split(","))
    ]
    if given.liger:
        name = f"{given.liger} GiB"
        asked += [] if any(name == row[0] for row in asked) else [(name, given.liger, given.pretend, None)]
        asked += [
            (f"{name}, not compiled", given.liger, EAGER_PRETEND, None),
            (f"{name}, liger", given.liger, given.pretend, "liger"),
        ]
    for name, budget, pretend, kernels in asked:
        try:
            most, several = int(float(budget) * GIB), given.documents > 1
            show(name, ours(given.shape, packed, settings(given.steps), most, several, pretend, kernels=kernels))
        except Exception as error:  # the other rows are worth having
            import traceback

            traceback.print_exc()
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        free()
    ways: dict[str, Any] = {} if given.ways else before.get("ways", {})
    for name, way in WAYS.items() if given.ways else ():
        most = given.curve_budget * GIB
        ways[name] = ours(given.shape, packed, settings(given.steps), most, given.documents > 1, WAYS_PRETEND, way)
        print(name, json.dumps(ways[name]), flush=True)
        free()
    curve: dict[str, Any] = {} if given.curve else before.get("curve", {})
    if given.curve:
        same = Packed(16, given.length, vocab, 1)
        same.ids_NT = same.ids_NT.repeat(given.curve, 0).reshape(16, given.curve, -1).swapaxes(0, 1).reshape(16 * given.curve, -1)
        chosen = settings(given.curve, 0.0, 1e-3)
        curve["plain script"] = plain_script(given.shape, same, chosen, 16)["losses"]
        free()
        curve["ours"] = ours(given.shape, same, chosen, given.curve_budget * GIB, False, given.pretend)["losses"]
        free()
        curve["largest difference"] = round(max(abs(a - b) for a, b in zip(curve["plain script"], curve["ours"], strict=True)), 4)
    plain = rows.get("plain script, 16 at once")
    print(f"{'':<26}{'tokens/s':>10}{'x plain':>9}{'GiB':>8}{'estimate':>10}{'of matrix rate':>16}")
    for name, row in rows.items():
        times = f"{row['tokens/s'] / plain['tokens/s']:.2f}" if plain else ""
        print(
            f"{name:<26}{row['tokens/s']:>10,}{times:>9}{row['peak GiB']:>8}{row.get('estimated GiB', ''):>10}"
            f"{row['share of the matrix rate']:>15.0%}"
        )
    shape = {"shape": given.shape, "tokens a step": 16 * given.length, "LoRA": f"rank {given.lora_rank} on the MLP"}
    write_record(
        given.out, "cuda", {**shape, "documents a sequence": given.documents},
        {"matrix TFLOP/s": round(rate / 1e12), "rows": rows, "ways": ways, "curve": curve},
    )  # fmt: skip


if __name__ == "__main__":
    main()
