"""From what the user calls a model (recipe name, Hub id, local folder) to a checked folder."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from layerprune.model.errors import Refused, UsageError, network_errors, one_line
from layerprune.model.files import read_json
from layerprune.model.recipes import Recipe, load_recipe, recipe_names

# What a checkpoint needs to be used and passed on; weights in other formats are never fetched.
_HUB_PATTERNS = [
    "*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py",
    "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
_HUB_IGNORED = ["consolidated*", "original/*", "*/consolidated*"]  # the same weights once more, in other layouts


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint in a local folder, and how the user named it."""

    name: str
    """What was asked for: a recipe name, a Hub id or a path."""
    folder: Path
    hub_id: str | None
    revision: str | None
    recipe: Recipe | None

    @property
    def label(self) -> str:
        """Short name for default output folders: the last part of the name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.name.rstrip("/")).name) or "model"


def find_model(name: str, revision: str | None = None) -> ModelSource:
    """Resolve a recipe name, a local folder or a Hub id (in that order) to a folder with a checkpoint.

    A Hub id is taken from the local cache when it is there, else downloaded (safetensors, config, tokenizer).
    Raises UsageError for a name that is nothing of the three, Refused where the Hub cannot give it.
    """
    if not name.strip():
        raise UsageError("--model is empty: give a recipe name, a Hub id or a local folder")
    recipe = load_recipe(name) if name in recipe_names() else None
    if recipe is not None:
        if recipe.local_folder is not None:
            return ModelSource(name, recipe.local_folder, None, None, recipe)
        return _from_hub(name, recipe.model, revision, recipe)
    try:
        folder = Path(name).expanduser()
        there, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home that is nobody's, a folder that is closed
        raise UsageError(f"--model {name} cannot be looked up: {one_line(error)}") from None
    if there:
        if not (folder / "config.json").exists():
            raise Refused(f"{name} is a folder without config.json: not a Hugging Face checkpoint")
        _refuse_adapter(folder)
        return ModelSource(name, folder.absolute(), None, None, recipe_of_checkpoint(folder))
    if is_file:
        raise UsageError(f"--model {name} is a file: give the folder that holds config.json")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        known = {r.model: r for r in map(load_recipe, recipe_names())}
        return _from_hub(name, name, revision, known.get(name))
    near = difflib.get_close_matches(name.lower(), recipe_names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`layerprune recipes` lists the recipes"
    raise UsageError(f"--model {name} is no recipe, no local folder and no Hub id (owner/name); {hint}")


def recipe_of_checkpoint(folder: Path) -> Recipe | None:
    """The recipe that a folder written by layerprune came from, so that healing it keeps the recipe's settings."""
    card = folder / "layerprune.json"
    if not card.exists():
        return None
    record = read_json(card)
    if not isinstance(record, dict):
        raise Refused(f"{card} is not a record that layerprune wrote: remove it, or give another --model")
    name = record.get("recipe")
    return load_recipe(name) if name in recipe_names() else None


def _refuse_adapter(folder: Path) -> None:
    """Transformers would load the adapter with the model, and a cut would be of the model alone."""
    if (folder / "adapter_config.json").exists():
        raise Refused(
            f"{folder} holds a LoRA adapter beside the model (adapter_config.json): merge it into the weights first, or "
            "move it away"
        )


def _from_hub(name: str, hub_id: str, revision: str | None, recipe: Recipe | None) -> ModelSource:
    folder = _fetch(hub_id, revision)
    _refuse_adapter(folder)
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return ModelSource(name, folder, hub_id, commit, recipe)


def _fetch(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED))
    except HFValidationError as error:
        raise UsageError(f"--model {hub_id} is no local folder and cannot be a Hub id: {one_line(error)}") from None
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise Refused(
            f"{hub_id}{at} is not in the local Hub cache and {why}: download it once where there is a network "
            "(hf download), or give --model a local folder"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise Refused(f"{hub_id}{at} is gated or private: accept its licence on the Hub and run `hf auth login`") from error
        if status == 404:
            raise Refused(f"{hub_id}{at} is not on the Hub: check the spelling") from error
        raise Refused(f"{hub_id}{at} could not be downloaded: {one_line(error)}") from error
    except network_errors() as error:
        raise Refused(f"{hub_id}{at} could not be downloaded: {one_line(error)}") from error
