"""What each way of healing gives: normalised loss against tokens trained and seconds, at several fractions dropped.

    python benchmarks/heal_variants.py --model DIR --rank rank.json --drops 0.25,0.4,0.5 --data TRAIN.jsonl.zst \
        --eval-data C4.jsonl --skip 20 --steps 300 --batch-size 8 --length 512 --lora-rank 16 --learning-rate 1e-3 \
        --out benchmarks/heal_variants.json

Cuts the model by angular distance at each fraction, and heals every cut in every way below, each from the same data in the
same order. What the record at `--out` holds already, of the same settings, is not done again. The held-out loss is measured
during training (NF4 base, adapters on) on documents that no training sees; the loss of the merged checkpoint, at the end.
`--jobs N` heals N at a time on one device: then its seconds are those of a shared device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "all layers, MLP (paper)": {},
    "joined documents": {"packing": "joined"},
    "truncated documents": {"packing": "truncate"},
    "after the cut": {"adapters": "after"},
    "window of 4": {"adapters": "window:4"},
    "MLP and attention": {"targets": ["mlp", "attention"]},
    "distilled, all layers": {"distil": 1.0},
    "distilled, after the cut": {"distil": 1.0, "adapters": "after"},
    "bridge (map) alone": {"bridge": "map", "steps": 0},
    "bridge (projection) alone": {"bridge": "projection", "steps": 0},
    "bridge (map), then all layers": {"bridge": "map"},
    "bridge (projection), then all layers": {"bridge": "projection"},
    "merged into NF4": {"merge": "nf4"},
    "bridge (projection), MLP and attention": {"bridge": "projection", "targets": ["mlp", "attention"]},
    "bridge (projection), window of 4": {"bridge": "projection", "adapters": "window:4"},
}


def one(spec: dict[str, Any]) -> dict[str, Any]:
    """Heal one cut in one way, and measure the checkpoint."""
    import torch
    from heal_quality import normalised_loss

    from layerprune.heal.train import heal_checkpoint
    from layerprune.model.data import read_documents, tokenise
    from layerprune.model.load import load_tokenizer
    from layerprune.model.source import find_model

    torch.set_num_threads(spec["threads"])
    settings = {**spec["settings"], **spec["variant"]}
    out = Path(spec["cut"]).parent / f"healed-{spec['number']}"
    began = time.perf_counter()
    healing = heal_checkpoint(
        spec["cut"], out, data=spec["data"], validation=spec["eval_data"], device=spec["device"], progress=False,
        report=lambda line: print(line, file=sys.stderr, flush=True), **settings,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    documents = read_documents(spec["eval_data"], "validation", None)
    tokens = tokenise(load_tokenizer(find_model(spec["cut"]).folder), documents, settings["length"], at_least=spec["at_least"])
    chosen = tokens[spec["skip"] : spec["skip"] + spec["samples"]]
    loss = normalised_loss(out, chosen, spec["device"])
    return {
        "loss": round(loss, 4),
        "held out": healing["held_out"] if "losses" in healing else [],
        "tokens": healing.get("tokens", 0),
        "trained": healing.get("trainable", 0),
        "seconds": healing["seconds"]["train"] if "losses" in healing else round(seconds, 1),
        "all seconds": round(seconds, 1),
    }


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(one(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rank", required=True, help="rank.json of the model")
    parser.add_argument("--drops", default="0.25,0.4,0.5")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--skip", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--validation-samples", type=int, default=64)
    parser.add_argument("--at-least", type=int, help="tokens of a document that the final loss is measured on  [the length]")
    parser.add_argument("--variants", help="names, joined by ;  [all]")
    parser.add_argument("--device")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--name", help="of the model in the record")
    parser.add_argument("--out")
    given = parser.parse_args()

    import torch
    from heal_quality import normalised_loss
    from record import write_record

    from layerprune.model.config import layer_count, load_config
    from layerprune.model.cuts import drop_count
    from layerprune.model.data import read_documents, tokenise
    from layerprune.model.load import load_tokenizer, pick_device
    from layerprune.model.source import find_model
    from layerprune.prune.cut import prune_checkpoint

    device = pick_device(given.device)
    source = find_model(given.model)
    layers = layer_count(load_config(source.folder))
    threads = given.threads or torch.get_num_threads()
    names = given.variants.split(";") if given.variants else list(VARIANTS)
    settings = {
        "steps": given.steps, "batch_size": given.batch_size, "length": given.length, "lora_rank": given.lora_rank,
        "learning_rate": given.learning_rate, "validation_samples": given.validation_samples,
    }  # fmt: skip
    more: dict[str, Any] = {}
    documents = read_documents(given.eval_data, "validation", None)
    tokens = tokenise(load_tokenizer(source.folder), documents, given.length, at_least=given.at_least or given.length)
    chosen = tokens[given.skip : given.skip + given.samples]
    found: dict[str, Any] = {}
    before = {}
    if given.out and Path(given.out).exists():
        record = json.loads(Path(given.out).read_text())
        if record["settings"] != settings:
            raise SystemExit(f"{given.out} holds a record of other settings: {record['settings']}")
        before = record["drops"]
    if device.startswith("cuda") and given.jobs > 1:
        more["memory"] = int(0.8 * torch.cuda.get_device_properties(0).total_memory / given.jobs)
    with tempfile.TemporaryDirectory() as made:
        whole = normalised_loss(source.folder, chosen, device)
        waiting: list[tuple[str, str, dict[str, Any]]] = []
        for drop in given.drops.split(","):
            cut = Path(made) / drop / "cut"
            cut.parent.mkdir()
            pruned = prune_checkpoint(given.model, cut, drop=float(drop), ranking=given.rank, verify=False)
            found[drop] = {
                "block": pruned["block"],
                "n": drop_count(float(drop), layers),
                "cut": round(normalised_loss(cut, chosen, device), 4),
                "variants": before.get(drop, {}).get("variants", {}),
            }
            for number, name in enumerate(names):
                spec = {
                    "cut": str(cut), "number": number, "variant": VARIANTS[name], "settings": settings | more, "data": given.data,
                    "eval_data": given.eval_data, "device": device, "skip": given.skip, "samples": given.samples,
                    "threads": threads, "at_least": given.at_least or given.length,
                }  # fmt: skip
                if name not in found[drop]["variants"]:
                    waiting.append((drop, name, spec))
        running: dict[tuple[str, str], subprocess.Popen[str]] = {}
        while waiting or running:
            while waiting and len(running) < given.jobs:
                drop, name, spec = waiting.pop(0)
                log = open(Path(made) / f"{drop}-{spec['number']}.log", "w")  # noqa: SIM115 (the child's)
                running[drop, name] = subprocess.Popen(
                    [sys.executable, __file__, "--one", json.dumps(spec)], stdout=subprocess.PIPE, stderr=log, text=True,
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                )  # fmt: skip
                running[drop, name].log = log.name  # type: ignore[attr-defined]
            time.sleep(0.2)
            for key, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                out = process.stdout.read() if process.stdout else ""
                if process.returncode:
                    tail = Path(process.log).read_text()[-600:]  # type: ignore[attr-defined]
                    print(f"{key}: failed: {tail}", flush=True)
                    continue
                found[key[0]]["variants"][key[1]] = json.loads(out.strip().splitlines()[-1])
                row = found[key[0]]["variants"][key[1]]
                print(f"{key[0]:<6}{key[1]:<38}{row['loss']:>8.4f}{row['tokens']:>12,}{row['seconds']:>9.1f} s", flush=True)
                if given.out:
                    Path(given.out + ".part").write_text(json.dumps(found))
    shape = {"model": given.name or source.label, "loss documents": len(chosen), "threads": threads, "at a time": given.jobs}
    write_record(given.out, device, shape, {"whole": round(whole, 4), "settings": settings, "drops": found})


if __name__ == "__main__":
    main()
