"""A model larger than memory: ranked, and swept at every depth (last n), from its files; memory, bytes read, time.

    python benchmarks/streaming.py --work FOLDER --shape llama-2-7b --ram 4GiB --dtype bfloat16 --out benchmarks/streaming_cpu.json
    python benchmarks/streaming.py --work FOLDER --shape llama-2-13b --memory 6GiB --resident --out benchmarks/streaming_gpu.json

Makes a random bf16 checkpoint of the shape in FOLDER, sharded (kept, and used again by the next call). Each measurement is a
process of its own, whose peak of resident memory is the kernel's (VmHWM: pages of mapped files count). Times: the layers'
bytes read and copied to the device by a few lines of plain code (`bare`); all layers brought in without computing (`read`);
the streamed computation; and with --resident (where the model fits) the same computation by the loaded model. `share` is the
streamed time over the larger of the faster of `bare` and `read` (times its passes) and the resident computation;
`largest_difference` is that between their distances, or losses in nats a token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import write_record

SHAPES = {
    "llama-2-7b": (32, 4096, 11008, 32), "llama-2-13b": (40, 5120, 13824, 40), "small": (12, 256, 688, 4),
}  # fmt: skip
"""Layers, hidden size, width of the MLP, heads; vocabulary 32,000."""
VOCABULARY = 32_000
SHARD = 5_000_000_000


def make_checkpoint(folder: Path, shape: str) -> None:
    """Random weights around 0 with the spread of an initialisation, in shards; never more than a tensor in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layers, hidden, width, heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=4096, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    square = {f"self_attn.{n}_proj": (hidden, hidden) for n in "qkvo"}
    mlp = {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, hidden)}
    for layer in range(layers):
        names |= {f"model.layers.{layer}.{n}": size for n, size in {**square, **mlp, **norms}.items()}
    names |= {"model.norm": (hidden,), "lm_head": (VOCABULARY, hidden)}
    some = torch.Generator().manual_seed(0)
    pool = (0.02 * torch.randn(1 << 24, generator=some)).to(torch.bfloat16)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shard: dict[str, Any] = {}
    where: dict[str, str] = {}
    number = total = 0

    def write() -> None:
        nonlocal number, shard
        number += 1
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard = {}

    for name, size in names.items():
        count = 1
        for edge in size:
            count *= edge
        start = int(torch.randint(0, 1 << 20, (1,), generator=some))
        if len(size) == 1:
            tensor = torch.ones(size, dtype=torch.bfloat16)
        else:
            tensor = torch.cat([pool[start:], *[pool] * (count // len(pool) + 1)])[:count].view(size).clone()
        shard[f"{name}.weight"] = tensor
        total += 2 * count
        if sum(2 * t.numel() for t in shard.values()) > min(SHARD, 1 << 30):
            write()
    if shard:
        write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))


def bare_read(folder: Path, layers: int, device: Any) -> None:
    """The bytes of all layers from the files to the device, 64 MiB at a time through two buffers, and forgotten there."""
    import torch

    from layerprune.model.plan import split_name
    from layerprune.model.tensors import read_checkpoint

    gpu = device.type == "cuda"
    buffers = [torch.empty(64 << 20, dtype=torch.uint8, pin_memory=gpu) for _ in range(2)]
    done = [torch.cuda.Event() for _ in buffers] if gpu else []
    target = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    turn = 0
    for name, stored in read_checkpoint(folder).items():
        parts = split_name(name)
        if parts is None or parts[1] >= layers:
            continue
        with open(stored.file, "rb", buffering=0) as file:
            file.seek(stored.begin)
            left = stored.nbytes
            while left:
                turn = 1 - turn
                if gpu:
                    done[turn].synchronize()
                got = file.readinto(memoryview(buffers[turn].numpy())[: min(left, 64 << 20)])
                left -= got
                if gpu:
                    target[:got].copy_(buffers[turn][:got], non_blocking=True)
                    done[turn].record()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement in this process."""
    import torch

    from layerprune.model.budget import Budget
    from layerprune.model.load import load_model, pick_device
    from layerprune.model.memory import byte_count
    from layerprune.model.stream import StreamedModel

    folder = args.work / args.shape
    layers = SHAPES[args.shape][0]
    some = torch.Generator().manual_seed(1)
    asked = [torch.randint(3, VOCABULARY, (args.length,), generator=some).tolist() for _ in range(args.samples)]
    kept = [tuple(range(layers)), *[(*range(layers - 1 - n), layers - 1) for n in range(1, layers - 1)]]
    told: list[str] = []
    found: dict[str, Any] = {}
    values: Any = None

    def timed(work: Any) -> Any:
        started = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found["seconds"] = time.perf_counter() - started
        return result

    def warm(work: Any) -> None:
        """What is made at the first pass is made: kernels, handles, buffers."""
        if torch.cuda.is_available():
            work()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    if args.measure == "bare":
        timed(lambda: bare_read(folder, layers, torch.device(pick_device(args.device))))
    elif args.measure.startswith("resident"):
        from layerprune.eval.sweep import sweep_live
        from layerprune.model.decoder import view_decoder
        from layerprune.prune.rank import rank_decoder

        live = load_model(folder, device=args.device, dtype=args.dtype)
        warm(lambda: rank_decoder(view_decoder(live), asked[:1]))
        warm(lambda: sweep_live(live, None, kept[:2], sequences=asked[:1]))
        if args.measure == "resident-rank":
            values = timed(lambda: rank_decoder(view_decoder(live), asked))
        else:
            values = timed(lambda: sweep_live(live, None, kept, sequences=asked))
    else:
        from layerprune.eval.streamed import sweep_streamed
        from layerprune.prune.rank_streamed import rank_streamed

        streamed = StreamedModel(folder, device=args.device, dtype=args.dtype)
        rest = streamed.read
        budget = Budget(byte_count(args.memory, "--memory"), byte_count(args.ram, "--ram") or 1 << 40)
        warm(lambda: sweep_streamed(streamed, None, kept[:2], budget, sequences=asked[:1]))
        before = streamed.read
        if args.measure == "read":
            timed(lambda: [None for _ in streamed.layers(range(layers))])
        elif args.measure == "rank":
            values = timed(lambda: rank_streamed(streamed, asked, budget, say=told.append))[0]
        else:
            values = timed(lambda: sweep_streamed(streamed, None, kept, budget, sequences=asked, say=told.append))
        passes = max(1, sum(int(line.split(" pass")[0].split()[-1]) for line in told))
        stored = sum(streamed.stored_bytes(i) for i in range(layers))
        found |= {"plan": told, "passes": passes, "read": streamed.read - before}
        found["read_of_layers"] = found["read"] / stored
        found["read_of_checkpoint"] = (rest + found["read"]) / (passes * (rest + stored))
    if args.measure.endswith("rank"):
        found["values"] = [d for row in values for d in row]
    elif args.measure.endswith("sweep"):
        found["values"] = [one["loss"]["nats_per_token"] for one in values.values()]
    if torch.cuda.is_available():
        found["gpu_peak"] = torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    found["rss_peak"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return found


def main() -> None:
    from layerprune.model.load import pick_device

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ram")
    parser.add_argument("--memory")
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--measure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    if not (args.work / args.shape).exists():
        made = args.work / f".{args.shape}"
        make_checkpoint(made, args.shape)
        made.rename(args.work / args.shape)
    found: dict[str, Any] = {}
    for what in ("bare", "read", "rank", "sweep", *(("resident-rank", "resident-sweep") if args.resident else ())):
        call = [sys.executable, __file__, *sys.argv[1:], "--measure", what]
        found[what] = json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        told = {key: value for key, value in found[what].items() if key != "values"}
        print(what, json.dumps(told), file=sys.stderr, flush=True)
    for what in ("rank", "sweep"):
        others = [min(found["bare"]["seconds"], found["read"]["seconds"]) * found[what]["passes"]]
        if args.resident:
            others.append(found[f"resident-{what}"]["seconds"])
        own, other = (found.get(name, {}).pop("values", None) for name in (what, f"resident-{what}"))
        if args.resident:
            found[what]["largest_difference"] = max(abs(a - b) for a, b in zip(own, other, strict=True))
        found[what]["share"] = found[what]["seconds"] / max(others)
    layers, hidden, width, heads = SHAPES[args.shape]
    shape = {"name": args.shape, "layers": layers, "hidden": hidden, "mlp": width, "heads": heads, "vocabulary": VOCABULARY}
    shape |= {"documents": args.samples, "length": args.length}
    write_record(None if args.out is None else str(args.out), pick_device(args.device), shape, found)


if __name__ == "__main__":
    main()
