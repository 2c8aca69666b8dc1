"""README.md of a healed checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def healed_card(record: Mapping[str, Any], name: str, source: Path) -> str:
    """The model card, with the Hub's metadata taken over from the source's card.

    record: the content of layerprune.json, with "healing"; name: the checkpoint's; source: the folder it came from.
    """
    healing = record["healing"]
    settings, losses = healing["settings"], healing["losses"]
    front = yaml.safe_dump(_metadata(record, source), sort_keys=False).strip()
    base = record.get("hub_id") or Path(str(record["source"])).name
    where = "the MLP's linear layers" if not settings.get("targets") else f"the linear layers {', '.join(settings['targets'])}"
    if "kept" in record:
        what = (
            f"`{base}` without layers {record['dropped']} (0-based, the end not included) of its {record['layers']}, then "
            "healed:\nthe gap was closed by training"
        )
    else:
        what = f"`{base}`, healed: trained further"
    data = settings["data"] if settings["data"] == "c4" else f"`{Path(settings['data']).name}`"
    return f"""---
{front}
---

# {name}

{what} with QLoRA on {where}
([arXiv 2403.17887](https://arxiv.org/abs/2403.17887)), and the adapter is merged into the weights.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

| healing | |
|---|---|
| data | {data}: {healing["tokens"]:,} tokens of {healing["documents"]:,} documents, {healing["epochs"]} x |
| steps | {healing["steps"]:,} of {settings["batch_size"]} sequences of {settings["length"]} tokens |
| learning rate | {settings["learning_rate"]:g} at the peak, {settings["warmup_steps"]} warm-up steps, cosine decay |
| LoRA | rank and alpha {settings["lora_rank"]}, dropout {settings["dropout"]:g}, on {_adapters(healing)} |
| base | {healing["quantisation"]} |
{_more_rows(record)}| training loss | {losses["first"]:.3f} at first, {losses["last"]:.3f} at last (nats a token) |
{_held_out_rows(healing)}
{_bridged(record)}- {_unchanged(record)}
{_served(record)}- `layerprune.json` holds the record. Made with layerprune {healing["versions"]["layerprune"]}.
"""


_PACKING = {
    "documents": "documents one after another, {}",
    "joined": "documents one after another, each sees those before it in its sequence",
    "truncate": "one document a sequence, truncated",
}


def _adapters(healing: Mapping[str, Any]) -> str:
    """The linear layers that have adapters, and in which layers where that is not all of them."""
    kind, _, size = healing["settings"].get("adapters", "all").partition(":")
    where = {"all": "", "after": ", in the layers after the cut"}.get(kind, f", in {size} layers on each side of the cut")
    return ", ".join(healing["modules"]) + where


def _more_rows(record: Mapping[str, Any]) -> str:
    """Rows of the table for what older records do not say, or what was not used."""
    healing = record["healing"]
    settings, rows = healing["settings"], []
    if "packing" in settings:
        apart = "none sees another" if healing.get("documents_apart") else "each sees those before it in its sequence"
        rows.append(("packing", _PACKING[settings["packing"]].format(apart)))
    if settings.get("distil"):
        told = f"from `{healing['teacher']}`, weight {settings['distil']:g}; the training loss holds its part"
        rows.append(("distillation", told))
    if settings.get("bridge"):
        rows.append(("bridge", f"{settings['bridge']}, by least squares before the training"))
    if "merge" in settings:
        base = "the checkpoint's weights as NF4 holds them" if settings["merge"] == "nf4" else "the checkpoint's own weights"
        rows.append(("merge", f"into {base}"))
    return "".join(f"| {key} | {text} |\n" for key, text in rows)


def _held_out_rows(healing: Mapping[str, Any]) -> str:
    held, documents = healing.get("held_out"), healing.get("validation") or {}
    rows = []
    if held:
        rows.append(("held-out loss", f"{held[0][1]:.4f} at first, {held[-1][1]:.4f} at last (nats a token / ln V), in training"))
    if documents.get("documents"):
        name = healing["settings"]["validation"]
        source = "the training data" if name is None else "c4" if name == "c4" else f"`{name}`"
        left = f"{documents['left_out']:,} of the training data left out for that"
        told = f"{documents['documents']:,} of {source}, none of them trained on ({left}); hash {documents['hash'][:16]}"
        rows.append(("held-out documents", told))
    return "".join(f"| {key} | {text} |\n" for key, text in rows)


def _bridged(record: Mapping[str, Any]) -> str:
    """A sentence on the weights that a bridge changed, whether it was made with the healing or before it."""
    changed = [f"`{one['tensor']}`" for one in record.get("bridge", {}).get("bridges", []) if one["ridge"] is not None]
    if not changed:
        return ""
    form = record["bridge"]["form"]
    bias = ", and its bias where it has one" if form == "map" else ""
    return f"- Before that, a least-squares map over the cut was folded into {', '.join(changed)}{bias} (bridge, form `{form}`).\n"


def _unchanged(record: Mapping[str, Any]) -> str:
    """What differs from the checkpoint that was healed."""
    settings = record["healing"]["settings"]
    bridge = settings.get("bridge") and _bridged(record)
    before = "the cut" if bridge else "the checkpoint that was healed"
    if settings.get("merge") == "nf4":
        these = "The linear layers that training held in NF4 are written as NF4 decodes them, with the adapter in those above"
        return f"{these}; {'but for the bridge, ' * bool(bridge)}all else is the bytes of {before}."
    if bridge:
        return f"Only those layers' weights, and what the bridge changed, differ from {before}; all else is its bytes."
    return f"Only those layers' weights differ from {before}; all else is its bytes."


def _served(record: Mapping[str, Any]) -> str:
    return f"- Served by: {record['serving']}.\n" if record.get("serving") else ""


def _metadata(record: Mapping[str, Any], source: Path) -> dict[str, Any]:
    meta: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if record.get("hub_id"):
        meta |= {"base_model": record["hub_id"], "base_model_relation": "finetune"}
    card = source / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    try:
        before = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        before = {}
    if isinstance(before, dict):
        meta |= {key: before[key] for key in ("license", "license_name", "license_link", "language") if key in before}
    cut = ["layer-pruning", "pruned"] if "kept" in record else []
    return {**meta, "tags": ["layerprune", *cut, "healed", "qlora"]}
