"""What the depth probes find in several models, and what they cost against a bare forward pass over the same tokens.

    python benchmarks/depth.py demo english-32l=english-valid.jsonl --samples 64 --length 128 --out benchmarks/depth.json
    python benchmarks/depth.py llama-2-7b --random --device cuda --length 512 --out benchmarks/depth_gpu.json

A model is a recipe, a Hub id or a folder; after `=` its data, else the recipe's; with --random a shape, with random bf16 weights
and random tokens: costs only. `values` are those of `layerprune depth`.
Bare pass, `ends`, `residual` and `lens` run in turns on the same batches; the bare pass includes the head. `ends` is what no
logit lens can do without, alone: for every layer the head, a softmax and a top 5. The skip map is counted,
not timed: layers run, one layer on one document each, against the whole model once for every skip and position.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rank_speed import SHAPES, random_model
from record import rounded, timed, write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL[=DATA]")
    parser.add_argument("--samples", type=int, default=64, help="documents")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", help="for the probe `choices`, of recipes that have task files")
    parser.add_argument("--limit", type=int, help="items a task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-samples", type=int, default=8, help="documents of the skip map")
    parser.add_argument("--no-values", action="store_true", help="costs only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out")
    parser.add_argument("--random", action="store_true", help=f"random weights of a shape: {', '.join(SHAPES)}")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for text in given.models:
        name, _, data = text.partition("=")
        label = Path(name).name
        found[label] = costs(name, data or None, given)
        if not given.no_values and not given.random:
            found[label]["values"] = values(name, data or None, given)
    shape = {"samples": given.samples, "length": given.length, "dtype": given.dtype, "rounds": given.rounds}
    write_record(given.out, given.device, shape, {"models": found})


def values(name: str, data: str | None, given: argparse.Namespace) -> dict[str, Any]:
    """The result of each cheap probe, to five decimals, and effective depth."""
    from layerprune.depths import probe_depth
    from layerprune.model.files import read_json
    from layerprune.model.source import find_model

    recipe = find_model(name).recipe
    tasks = given.tasks.split(",") if given.tasks and recipe and recipe.task_folder else None
    with tempfile.TemporaryDirectory() as folder:
        result = probe_depth(
            name,
            tasks=tasks,
            limit=given.limit if tasks else None,
            eval_data=data,
            samples=given.samples,
            length=given.length,
            seed=given.seed,
            dtype=given.dtype,
            device=given.device,
            out=Path(folder) / "out",
        )
        (model,) = result["models"]
        files = {probe: Path(folder) / "out" / model["label"] / f"{probe}.json" for probe in result["probes"]}
        return {
            "effective_depth": model["effective_depth"],
            **{probe: rounded(read_json(file)) for probe, file in files.items()},
        }


def costs(name: str, data: str | None, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and ratios of `residual` and `lens`, and the layer applications of the skip map."""
    from layerprune.depth.lens import SLICE, TOP, lens_probe, token_budget
    from layerprune.depth.residual import residual_probe
    from layerprune.depth.skip import VARIANTS, skip_effects
    from layerprune.model.data import batches, read_documents, tokenise
    from layerprune.model.decoder import view_decoder
    from layerprune.model.load import load_model, load_tokenizer
    from layerprune.model.recipes import EvalSettings, section_of
    from layerprune.model.source import find_model

    if given.random:
        decoder = view_decoder(random_model(name, given.device))
        vocab, some = decoder.model.config.vocab_size, torch.Generator().manual_seed(given.seed)
        sequences = torch.randint(vocab, (given.samples, given.length), generator=some).tolist()
    else:
        source = find_model(name)
        own = data or section_of(source.recipe, EvalSettings).data
        documents = read_documents(own, "validation", given.samples, given.seed)
        sequences = tokenise(load_tokenizer(source.folder), documents, given.length, at_least=2)
        decoder = view_decoder(load_model(source.folder, device=given.device, dtype=given.dtype))
    kind = "cpu" if decoder.device.type == "cpu" else "cuda"
    budget = token_budget(decoder)
    together = batches(sequences, budget)

    @torch.no_grad()
    def bare() -> None:
        for batch in together:
            mask = None if batch.mask_BT is None else batch.mask_BT.to(decoder.device)
            decoder.model(input_ids=batch.ids_BT.to(decoder.device), attention_mask=mask, use_cache=False)

    head = decoder.model.get_output_embeddings()
    like = head.weight

    @torch.no_grad()
    def ends() -> None:
        for batch in together:
            real = batch.ids_BT.numel() if batch.mask_BT is None else int(batch.mask_BT.sum())
            states_ND = torch.ones((real, like.shape[1]), device=like.device, dtype=like.dtype)
            for _ in range(len(decoder)):
                for part_SD in states_ND.split(max(1, SLICE[kind] // like.shape[0])):
                    head(part_SD).float().softmax(-1).topk(TOP)

    works: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "ends": ends,
        "residual": lambda: residual_probe(decoder, sequences, max_tokens=budget),
        "lens": lambda: lens_probe(decoder, sequences, max_tokens=budget),
    }
    cuda = given.device.startswith("cuda")
    for work in works.values():  # warm-up
        timed(work, cuda)
    rounds = [{probe: timed(work, cuda) for probe, work in works.items()} for _ in range(given.rounds)]
    result: dict[str, Any] = {
        "layers": len(decoder),
        "hidden": decoder.model.get_input_embeddings().weight.shape[1],
        "vocab": decoder.model.get_input_embeddings().weight.shape[0],
        "documents": len(sequences),
        "tokens": sum(map(len, sequences)),
    }
    for probe in works:
        ratios = [one[probe][0] / one["bare"][0] for one in rounds]
        result[probe] = {"seconds": statistics.median(one[probe][0] for one in rounds)}
        if probe != "bare":
            result[probe] |= {
                "ratio": statistics.median(ratios),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
        if probe == "lens":
            result[probe]["to_parts"] = [round(one[probe][0] / (one["bare"][0] + one["ends"][0]), 3) for one in rounds]
        if cuda:
            result[probe]["peak_bytes"] = max(one[probe][1] for one in rounds)
    result["skip"] = {}
    for variant in VARIANTS:
        effects = skip_effects(decoder, sequences[: given.skip_samples], variant=variant).result()
        result["skip"][variant] = {
            "documents": effects.documents,
            "positions": effects.positions,
            "applications": effects.applications,
            "naive": effects.naive,
            "times_fewer": effects.naive / effects.applications,
        }
    return result


if __name__ == "__main__":
    main()
