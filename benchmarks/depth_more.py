"""What the further depth probes find on one checkpoint: cuts beside skips, one prompt, a tuned lens, kinds of words.

    python benchmarks/depth_more.py models/english-32l=data/english-valid.jsonl --prompt "They live in the United" \
        --answer " States" --train-lens 20 --tagger en_core_web_sm --out benchmarks/depth_english.json
    python benchmarks/depth_more.py demo --train-lens 30 --out benchmarks/depth_demo.json

The model is a recipe, a Hub id or a folder; after `=` its data, else the recipe's. The probes are those of `layerprune depth`,
but for `words`, which takes any model of spaCy's, by name or path, and is left out without `--tagger`. Without `--prompt` the
data gives one. With `--work` a killed call goes on; the folder is that of `layerprune depth --out`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import rounded, write_record

PROBES = ("lens", "prunability", "erasure", "gradients", "tuned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL[=DATA]")
    parser.add_argument("--prompt")
    parser.add_argument("--answer")
    parser.add_argument("--train-lens", type=int, required=True, metavar="STEPS")
    parser.add_argument("--tagger", help="a model of spaCy's")
    parser.add_argument("--samples", type=int, default=64, help="documents")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", help="folder that a killed call goes on from")
    parser.add_argument("--out")
    given = parser.parse_args()
    name, _, data = given.model.partition("=")
    with tempfile.TemporaryDirectory() as folder:
        found = probed(name, data or None, given, Path(given.work or folder) / "out")
    if given.tagger:
        found["words"] = words(name, data or None, given)
    shape = {"samples": given.samples, "length": given.length, "seed": given.seed, "dtype": given.dtype}
    write_record(given.out, given.device, shape, {"model": Path(name).name, **rounded(found)})


def probed(name: str, data: str | None, given: argparse.Namespace, out: Path) -> dict[str, Any]:
    from layerprune.depths import probe_depth
    from layerprune.model.files import read_json

    result = probe_depth(
        name, probes=PROBES, eval_data=data, samples=given.samples, length=given.length, seed=given.seed, prompt=given.prompt,
        answer=given.answer, train_lens=given.train_lens, dtype=given.dtype, device=given.device, out=out, progress=True,
    )  # fmt: skip
    found = {probe: read_json(out / result["models"][0]["label"] / f"{probe}.json") for probe in PROBES}
    cuts = found["prunability"]
    cuts["rank_correlation"] = {
        "angle_skip": rank_correlation(cuts["angle"], cuts["skip"]),
        "angle_skip_without_layer_0": rank_correlation(cuts["angle"][1:], cuts["skip"][1:]),
    }
    for key in ("mean", "ids", "applications", "naive"):
        found["erasure"].pop(key)
    for key in ("ids", "applications", "naive", "change", "error"):
        found["gradients"].pop(key)
    training = found["tuned"]["training"]
    found["tuned"]["training"] = {key: training[key] for key in ("steps", "tokens", "documents", "left_out")}
    for probe in found.values():
        probe.pop("asked", None)
    return {"layers": len(cuts["kl"]), **found}


def words(name: str, data: str | None, given: argparse.Namespace) -> dict[str, Any]:
    """The probe `words` with a tagger of any name."""
    import spacy

    from layerprune.depth.words import spacy_tagger, words_probe
    from layerprune.model.data import read_documents
    from layerprune.model.decoder import view_decoder
    from layerprune.model.load import load_model, load_tokenizer
    from layerprune.model.source import find_model

    source = find_model(name)
    own = data or (source.recipe.data_path(source.recipe.eval.data) if source.recipe else "c4")
    documents = read_documents(own, "validation", given.samples, given.seed)
    decoder = view_decoder(load_model(source.folder, device=given.device, dtype=given.dtype))
    total = words_probe(decoder, load_tokenizer(source.folder), documents, spacy_tagger(given.tagger), length=given.length)
    about = spacy.load(given.tagger).meta
    return {"tagger": f"{about['lang']}_{about['name']} {about['version']}, spaCy {spacy.__version__}", **total.result()}


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [[sorted(values).index(v) for v in values] for values in (a, b)]
    count = len(a)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(*ranks, strict=True)) / (count * (count**2 - 1))


if __name__ == "__main__":
    main()
