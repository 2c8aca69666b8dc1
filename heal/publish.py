"""The end of a healing: the adapter merged, the result proven, recorded and published."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layerprune.heal.card import healed_card
from layerprune.heal.carry import carry_over
from layerprune.heal.job import Job
from layerprune.model.data import data_fingerprint
from layerprune.model.files import new_folder, read_json, write_json, write_text


def publish(job: Job) -> dict[str, Any]:
    """Merge, prove, publish; returns the record."""
    trained = read_json(job.work / "trained.json")
    healing = _record(job, trained)
    healing["seconds"] = _write(job, healing, trained)
    return healing


def _keep_bridge(job: Job) -> None:
    """The bridged tensors beside the adapter, which was trained on them: with these in the cut it fits."""
    from safetensors.torch import save_file

    from layerprune.model.feed import read_tensor

    bridges = read_json(job.source.folder / "layerprune.json")["bridge"]["bridges"]
    tensors = {bridge["tensor"]: read_tensor(job.stored[bridge["tensor"]]) for bridge in bridges}
    save_file(tensors, job.work / "adapter" / "bridge.safetensors", metadata={"format": "pt"})


def _record(job: Job, trained: Mapping[str, Any]) -> dict[str, Any]:
    names = ("layerprune", "torch", "transformers", "peft", "bitsandbytes", "accelerate")
    chosen, source, settings = job.settings.record(), job.source, job.settings
    # the file's name is enough beside its fingerprint: this record goes where the checkpoint goes
    chosen |= {"data": Path(settings.data).name, "micro_batch": trained["memory"]["micro_batch"]}
    chosen["validation"] = None if settings.validation is None else Path(settings.validation).name
    return {
        "model": source.name,
        "recipe": source.recipe.name if source.recipe else None,
        "settings": {**chosen, "lora_alpha": settings.lora_rank},
        "origin": settings.origin,
        "teacher": None if job.teacher is None else job.teacher.source.name,
        "quantisation": f"NF4, double quantisation, {trained['compute']} compute",
        "device": job.device,
        "processes": trained["processes"],
        "memory": trained["memory"],
        "documents_apart": trained["separate"],
        "steps": settings.steps,
        "tokens": trained["tokens"],
        "documents": trained["documents"],
        "epochs": trained["epochs"],
        "order": trained["order"],
        "validation": trained["validation"],
        "data_fingerprint": data_fingerprint(settings.data),
        "trainable": trained["trainable"],
        "modules": trained["modules"],
        "losses": trained["losses"],
        "held_out": trained["held_out"],
        "adapter": os.path.relpath(job.outside, job.out) if job.outside is not None else "adapter",
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def _write(job: Job, healing: dict[str, Any], trained: Mapping[str, Any]) -> dict[str, float]:
    """Merge, prove that the result is the adapter over the source, and publish: first the adapter, then the checkpoint."""
    from layerprune.heal.merge import Stored, merge_adapter
    from layerprune.heal.proof import prove_healed
    from layerprune.model.progress import progress_bar

    source, work, out = job.source, job.work, job.out
    job.say("merging the adapter")
    started = time.perf_counter()
    total = sum(t.nbytes for t in job.stored.values())
    where, quantised = (
        {module: Stored(name, transposed) for module, (name, transposed) in trained[key].items()} for key in ("where", "quantised")
    )
    compute = getattr(torch, trained["compute"])
    if job.settings.bridge is not None:
        _keep_bridge(job)
    with new_folder(out) as folder:
        carry_over(source.folder, folder)
        with progress_bar(total, "merge", "B", job.progress) as bar:
            merge_adapter(
                source.folder, work / "adapter", folder, where, bar.update, base=job.settings.merge, quantised=quantised,
                compute=compute,
            )  # fmt: skip
        seconds = {"train": trained["seconds"], "merge": round(time.perf_counter() - started, 1)}
        healing["verified"] = prove_healed(
            source.folder, folder, work / "adapter", where, job.settings.merge, quantised, job.trust, job.progress,
            compute=compute, ram=job.ram,
        )  # fmt: skip
        for what, how in healing["verified"].items():
            job.say(f"  {what}: {how}")
        before = source.folder / "layerprune.json"
        record = read_json(before) if before.exists() else {"source": source.name, "hub_id": source.hub_id}
        earlier = {"previous": record["healing"]} if "healing" in record else {}
        record["healing"] = {**healing, "seconds": seconds, **earlier}
        write_json(folder / "layerprune.json", record)
        write_text(folder / "README.md", healed_card(record, out.name, source.folder))
        if job.outside is None:
            shutil.copytree(work / "adapter", folder / "adapter")
        else:
            shutil.rmtree(job.outside, ignore_errors=True)
            with new_folder(job.outside) as beside:
                shutil.copytree(work / "adapter", beside, dirs_exist_ok=True)
    return seconds
