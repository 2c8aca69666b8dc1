"""What routers cost in generation: transformers' own `generate` against a routed model whose rows all take the whole model.

    python benchmarks/route_overhead.py --device cuda --shape llama-2-7b --out benchmarks/route_overhead_gpu.json
    python benchmarks/route_overhead.py --device cpu --shape small --prompt 32 --new 16 --out benchmarks/route_overhead_cpu.json

The biases of the routers are planted, so that every layer is executed: both sides make the same tokens, and what the second
takes longer is the routers' own. "decide" is the decision alone, as `RoutedModel.decide` makes it (a pass over the prompt with
routers in it; `generate` makes it in its own first pass where "one_pass" is true), "prefill" the bare pass over the prompt,
"routers" their arithmetic alone. All run in turns, so that a change of the machine's speed meets all of them. Weights of a shape
are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rank_speed import SHAPES, random_model
from record import timed, write_record

SHAPES["small"] = {  # for a CPU: to see that the benchmark runs
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 1000,
}  # fmt: skip


def whole_model_routers(layers: int, width: int) -> Any:
    """Routers of random weights that always execute."""
    from layerprune.route.paths import EXECUTE
    from layerprune.route.router import Routers

    routers = Routers(layers, width)
    with torch.no_grad():
        routers.down_bias_LC[:, EXECUTE] = 1e4
    return routers.eval()


def main() -> None:
    from layerprune.model.decoder import view_decoder
    from layerprune.route.routed import RoutedModel
    from layerprune.route.router import Windows, turn_dial

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rows", default="1,8", help="rows of a batch, several with commas")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out")
    given = parser.parse_args()
    cuda = given.device.startswith("cuda")
    model = random_model(given.shape, given.device).to(getattr(torch, given.dtype))
    decoder = view_decoder(model)
    layers, width, vocab = len(decoder), model.config.hidden_size, model.config.vocab_size
    routed = RoutedModel(decoder, whole_model_routers(layers, width))
    routers = routed.routers
    settings: dict[str, Any] = {"min_new_tokens": given.new, "eos_token_id": None}
    maker = torch.Generator().manual_seed(0)

    def measure(rows: int) -> dict[str, Any]:
        ids_BT = torch.randint(0, vocab, (rows, given.prompt), generator=maker)
        prompts = ids_BT.tolist()
        ids_BT = ids_BT.to(given.device)
        mask_BT = torch.ones_like(ids_BT)
        hidden_BTD = torch.randn(rows, given.prompt, width, device=given.device, dtype=model.dtype)
        made: dict[str, Any] = {}

        @torch.no_grad()
        def bare() -> None:
            found_BT = model.generate(
                ids_BT, attention_mask=mask_BT, max_new_tokens=given.new, do_sample=False, num_beams=1, use_cache=True,
                pad_token_id=0, **settings,
            )  # fmt: skip
            made["bare"] = found_BT[:, given.prompt :].tolist()

        def along() -> None:
            made["routed"] = routed.generate(prompts, given.new, **settings)

        def decide() -> None:
            assert routed.decide(prompts) == [(1,) * layers] * rows

        @torch.no_grad()
        def prefill() -> None:
            model(ids_BT, attention_mask=mask_BT, use_cache=True, logits_to_keep=1)

        @torch.no_grad()
        def alone() -> None:
            windows = Windows(mask_BT)
            for layer in range(layers):
                turn_dial(routers.one_layer(layer, windows.pool(hidden_BTD), windows.real_BW), -0.5).cpu()

        jobs: dict[str, Callable[[], None]] = {
            "bare": bare, "routed": along, "decide": decide, "prefill": prefill, "routers": alone,
        }  # fmt: skip
        for job in jobs.values():  # warm-up
            job()
        tokens = [list(one.tokens) for one in made["routed"]]
        agreed = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(tokens, made["bare"], strict=True)]
        rounds = [{name: timed(job, cuda) for name, job in jobs.items()} for _ in range(given.rounds)]
        ratios = [one["routed"][0] / one["bare"][0] for one in rounds]
        seconds = {name: statistics.median(one[name][0] for one in rounds) for name in jobs}
        found: dict[str, Any] = {
            "rows": rows, "ratio": statistics.median(ratios), "ratios": [round(ratio, 4) for ratio in ratios], "seconds": seconds,
            "share_of_bare": {name: seconds[name] / seconds["bare"] for name in jobs if name != "bare"},
            "one_pass": routed.one_pass, "same_tokens": sum(agreed) / (rows * given.new),
        }  # fmt: skip
        if cuda:
            found["peak_bytes"] = {name: max(one[name][1] for one in rounds) for name in jobs}
        return found

    shape = {"hidden": width, "layers": layers, "dtype": str(model.dtype), "prompt": given.prompt, "new": given.new}
    write_record(given.out, given.device, shape, {"runs": [measure(int(rows)) for rows in given.rows.split(",")]})


if __name__ == "__main__":
    main()
