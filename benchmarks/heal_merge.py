"""What the base of the merge costs: one QLoRA adapter, trained in NF4, merged into the checkpoint's weights and into NF4's.

    python benchmarks/heal_merge.py --model DIR --layers 9:17 --data TRAIN.jsonl.zst --eval-data C4.jsonl \
        --steps 160 --batch-size 4 --length 512 --lora-rank 16 --learning-rate 1e-3 --out benchmarks/heal_merge.json

Measures the normalised loss of the cut, of the cut in NF4, of both merged checkpoints, and of the model that was trained
(NF4 with the adapter on, in the type that it was trained in), on documents of at least `--length` tokens, cut at that;
`--skip` leaves out the first ones (used to choose the block). Each merged checkpoint is proven by `prove_healed`. Prints a
table and the record, and writes the record to `--out`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from record import write_record

from layerprune.heal.merge import locate, merge_adapter, quantised_linears
from layerprune.heal.proof import prove_healed
from layerprune.heal.quantise import load_quantised
from layerprune.heal.train import heal_checkpoint
from layerprune.model.config import load_config, vocab_size
from layerprune.model.cuts import describe_dropped
from layerprune.model.data import batches, read_documents, tokenise
from layerprune.model.decoder import view_decoder
from layerprune.model.load import load_model, load_tokenizer, pick_device
from layerprune.model.loss import total_loss
from layerprune.model.nf4 import compute_dtype, unquantised
from layerprune.model.source import find_model
from layerprune.model.tensors import read_checkpoint
from layerprune.model.verify import meta_decoder
from layerprune.prune.cut import prune_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", required=True, help="block to cut, A:B")
    parser.add_argument("--data", required=True, help="training documents")
    parser.add_argument("--eval-data", required=True, help="documents for the loss")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--skip", type=int, default=20)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--out", help="file for the record")
    args = parser.parse_args()

    source, device = find_model(args.model), pick_device(args.device)
    vocab = vocab_size(load_config(source.folder))
    documents = read_documents(args.eval_data, "validation", None)
    sequences = tokenise(load_tokenizer(source.folder), documents, args.length, at_least=args.length)
    sequences = sequences[args.skip : args.skip + args.samples]

    def normalised(model: Any) -> float:
        """Loss / ln V of a model."""
        return round(total_loss(view_decoder(model), batches(sequences, 4096)).normalised(vocab), 5)

    losses: dict[str, float] = {}
    seconds: dict[str, float] = {}
    proven: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as made:
        cut, adapter = Path(made) / "cut", Path(made) / "adapter"
        pruned = prune_checkpoint(args.model, cut, layers=args.layers, verify=False)
        losses["cut"] = normalised(load_model(cut, device=args.device))
        began = time.perf_counter()
        healing = heal_checkpoint(
            cut, Path(made) / "healed", data=args.data, steps=args.steps, batch_size=args.batch_size, length=args.length,
            lora_rank=args.lora_rank, learning_rate=args.learning_rate, seed=args.seed, device=args.device,
            adapter=adapter, progress=True,
        )  # fmt: skip
        seconds["healing"] = round(time.perf_counter() - began, 1)

        compute = compute_dtype(device)
        keep = unquantised(meta_decoder(cut).model, device.partition(":")[0])
        live = load_quantised(cut, args.device, compute, keep)  # stays in training mode: no dropout in its base
        losses["cut in NF4"] = normalised(live)
        decoder, stored = view_decoder(live), read_checkpoint(cut)
        quantised = locate(quantised_linears(decoder), stored, len(decoder))
        adapted = PeftModel.from_pretrained(live, adapter)
        lora = {name.removesuffix(".base_layer") for name, _ in live.named_modules() if name.endswith(".base_layer")}
        for module in adapted.modules():  # 4-bit layers stay in training mode: some CPUs repack them else
            module.training = type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer")
        losses["NF4, adapter on (as trained)"] = normalised(live)
        # an untrained layer is no part of the adapter; one that was left unquantised would be missing here
        where = {name: quantised[name] for name in lora}
        del live, adapted, decoder

        for base in ("weights", "nf4"):
            out = Path(made) / base
            out.mkdir()
            shutil.copyfile(cut / "config.json", out / "config.json")
            began = time.perf_counter()
            merge_adapter(cut, adapter, out, where, base=base, quantised=quantised, compute=compute)
            seconds[f"merge into {base}"] = round(time.perf_counter() - began, 2)
            began = time.perf_counter()
            proven[base] = prove_healed(cut, out, adapter, where, base, quantised, compute=compute)
            seconds[f"prove {base}"] = round(time.perf_counter() - began, 2)
            losses[f"merged into {base}"] = normalised(load_model(out, device=args.device))

    trained = losses["NF4, adapter on (as trained)"]
    print(f"{'model':<32}{'normalised loss':>16}{'less the trained':>18}")
    for name, loss in losses.items():
        print(f"{name:<32}{loss:>16.5f}{loss - trained:>+18.5f}")
    dropped = describe_dropped(tuple(pruned["kept"]), pruned["layers"])
    shape: dict[str, Any] = {
        "model": source.label, "dropped": dropped, "loss documents": len(sequences), "tokens": healing["tokens"],
    }  # fmt: skip
    result = {
        "normalised loss": losses,
        "seconds": seconds,
        "proven": proven,
        "training loss": [healing["losses"]["first"], healing["losses"]["last"]],
        "settings": {**healing["settings"], "data": Path(healing["settings"]["data"]).name},
        "quantisation": healing["quantisation"],
        "threads": torch.get_num_threads(),
        "healing versions": {name: importlib.metadata.version(name) for name in ("peft", "bitsandbytes", "accelerate")},
    }
    write_record(args.out, device, shape, result)


if __name__ == "__main__":
    main()
