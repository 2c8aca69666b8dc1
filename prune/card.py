"""What is said of a cut checkpoint: its model card, and where it can be served."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ANYWHERE = "anything that serves the source's family"


def serving_note(old: dict[str, Any], new: dict[str, Any], config: Any) -> str:
    """Where the cut config can be served. old, new: config.json before and after; config: the source's config object.

    Some servers (llama.cpp, parts of vLLM) know a family's pattern of layer types as a period and do not read the
    list in the config. They are right only if the cut's list is what the family's default makes of the new depth.
    """
    from layerprune.model.config import text_config
    from layerprune.model.surgery import text_part

    before, inner = text_part(old, config), text_part(new, config)
    # every list that the cut wrote or changed says something about single layers
    lists = [key for key, value in inner.items() if isinstance(value, list) and value != before.get(key)]
    lists += [key for key in ("layer_types", "mlp_layer_types") if key not in lists and isinstance(inner.get(key), list)]
    if not lists:
        return ANYWHERE
    plain = copy.deepcopy({key: value for key, value in inner.items() if key not in (*lists, "model_type")})
    default = None
    try:
        default = type(text_config(config))(**plain).to_dict()
    except Exception:  # a config class may do anything here; not knowing is an answer
        return "transformers; servers that assume this family's own pattern of layers may be wrong"
    broken = sorted(key for key in lists if default.get(key) != inner[key])
    if not broken:
        return ANYWHERE
    return (
        f"transformers, and servers that read {' and '.join(broken)} from config.json; the cut breaks the family's own "
        "period, so a server that assumes it (llama.cpp for most such families) would run a different model"
    )


def model_card(record: Mapping[str, Any], name: str, source: Path) -> str:
    """README.md of a cut checkpoint, with the Hub's metadata."""
    base = record["hub_id"]
    meta: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base:
        meta |= {"base_model": base, "base_model_relation": "finetune"}
    meta |= _inherited(source)
    meta["tags"] = ["layerprune", "layer-pruning", "pruned"]
    front = yaml.safe_dump(meta, sort_keys=False).strip()
    called = base or Path(record["source"]).name
    how = {
        "angular": "the block of this size with the smallest angular distance between its input and its output",
        "last": "the deepest layers but the very last one",
        "layers": "chosen by hand",
    }[record["strategy"]]
    distance = "" if record["distance"] is None else f" Its angular distance is {record['distance']:.4f}."
    return f"""---
{front}
---

# {name}

`{called}` without layers {record["dropped"]} (0-based, the end not included) of its {record["layers"]}: {how}
([arXiv 2403.17887](https://arxiv.org/abs/2403.17887)).{distance}
It has {len(record["kept"])} layers and {record["parameters"]:,} parameters. Every tensor that stays is the source's, byte
for byte. A cut that is not healed predicts worse than its source: evaluate it before you use it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

- Served by: {record["serving"]}.
- Kept layers of the source: {", ".join(map(str, record["kept"]))}.
- `layerprune.json` holds the record of the cut. Made with layerprune {record["versions"]["layerprune"]}.
"""


def _inherited(source: Path) -> dict[str, Any]:
    """Licence and language from the source's own card: they go on applying to the cut."""
    card = source / "README.md"
    if not card.is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.S)
    try:
        meta = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}
    wanted = ("license", "license_name", "license_link", "language")
    return {key: meta[key] for key in wanted if isinstance(meta, dict) and key in meta}
