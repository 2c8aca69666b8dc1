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

{what} with QLoRA on the MLP's linear layers
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
| LoRA | rank and alpha {settings["lora_rank"]}, dropout {settings["dropout"]:g}, on {", ".join(healing["modules"])} |
| base | {healing["quantisation"]} |
| training loss | {losses["first"]:.3f} at first, {losses["last"]:.3f} at last (nats a token) |

- Only those layers' weights differ from the checkpoint that was healed; all else is its bytes.
{_served(record)}- `layerprune.json` holds the record. Made with layerprune {healing["versions"]["layerprune"]}.
"""


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
