"""What a written checkpoint takes over from its source beside the weights: config, tokenizer, templates, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_RESULTS = {"layerprune.json", "README.md", "eval.json", "rank.json", "curve.json", "manifest.json"}


def carry_over(source: Path, folder: Path) -> None:
    """Copy the files of the folder `source` that are neither weights nor results of ours into `folder`."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in _RESULTS and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)
