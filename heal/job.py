"""One healing, resolved and checked: its bridge, its data, its training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerprune.heal.settings import Healing
from layerprune.heal.teacher import Teacher, recorded_cut
from layerprune.heal.telling import plan_line
from layerprune.heal.world import first_alone, is_sharded
from layerprune.model.config import load_config, vocab_size
from layerprune.model.data import check_token_id, document_hash
from layerprune.model.files import write_json
from layerprune.model.load import load_tokenizer
from layerprune.model.source import ModelSource
from layerprune.model.tensors import StoredTensor, read_checkpoint

Say = Callable[[str], None]
_MEASURED = 32
"""Of the validation documents, all of which training leaves out, those that the loss is measured on while it runs."""


@dataclass(frozen=True)
class Job:
    """One healing, resolved and checked. source: what is trained; teacher: the unpruned model, for distil and bridge."""

    source: ModelSource
    stored: Mapping[str, StoredTensor]
    settings: Healing
    teacher: Teacher | None
    work: Path
    out: Path
    outside: Path | None
    """Folder for the adapter where it does not lie in `out`."""
    device: str
    spread: bool
    budget: int | None
    ram: int | None
    """Bytes of the GPU's and of the host's memory that may be taken, where the user said so."""
    report_to: tuple[str, ...]
    trust: bool
    say: Say
    progress: bool

    def bridge_only(self) -> dict[str, Any]:
        """The bridged checkpoint as the result, without any training."""
        # what it gives is the result, which is told at the end
        return first_alone(lambda: self._bridge(self.out, lambda line: None, measured=_MEASURED), self.device)

    def bridged(self) -> Job:
        """This job on the bridged checkpoint, which is made first; itself where no bridge is asked for."""
        if self.settings.bridge is None:
            return self
        folder = self.work / "bridged"

        def make() -> None:
            if not folder.exists():
                self._bridge(folder, self.say)

        first_alone(make, self.device)
        source = replace(self.source, folder=folder)
        return replace(self, source=source, stored=read_checkpoint(folder), teacher=None)

    def _bridge(self, out: Path, report: Say, measured: int = 0) -> dict[str, Any]:
        """measured: of the validation documents, those that the loss before and after is measured on."""
        from layerprune.heal.bridge import bridge_checkpoint

        assert self.settings.bridge is not None and self.teacher is not None
        self.say("solving for the bridge over the cut")
        held = self._held_out()
        return dict(bridge_checkpoint(
            self.source.folder, out, teacher=self.teacher.source.folder, data=self.settings.data, length=self.settings.length,
            form=self.settings.bridge, seed=self.settings.seed, device=self.device, trust_remote_code=self.trust,
            progress=self.progress, report=report, exclude=frozenset(map(document_hash, held)),
            validation=held[:measured],
        ))  # fmt: skip

    def train(self) -> None:
        """Pack, load, train; leaves work/adapter and work/trained.json."""
        from layerprune.heal.kernels import kernels_in_use
        from layerprune.heal.prepare import plan_memory, prepare
        from layerprune.heal.trainer import Sequences, save_adapter, train

        settings, work, say = self.settings, self.work, self.say
        tokenizer = load_tokenizer(self.source.folder, self.trust)
        vocab = vocab_size(load_config(self.source.folder, self.trust))
        held = first_alone(self._held_out, self.device)
        packed = self._packed(tokenizer, held)
        check_token_id(int(packed.ids_NT.max()), vocab)
        if packed.epochs > 1:
            say(f"the data is shorter than {settings.tokens:,} tokens: it is gone through {packed.epochs} times")
        validation = [tokenizer(text, verbose=False)["input_ids"][: settings.length] for text in held[:_MEASURED]]
        validation = [ids for ids in validation if len(ids) > 1]
        if validation and is_sharded():
            say("the held-out loss is not measured while FSDP trains: evaluate the result")
        made = prepare(
            self.source, settings, recorded_cut(self.source), self.teacher, self.device, self.spread, self.trust, say, self.progress
        )
        several = int(packed.starts_NT[:64].sum(axis=1).argmax())
        positions = torch.from_numpy(packed.positions(several)) if made.separate else None
        row = Sequences(packed, made.separate, {})[several]
        with kernels_in_use(settings.kernels, made.student, row, made.compute, say) as prove:
            trainable = made.trainable  # before FSDP leaves a share of them here
            memory = plan_memory(made, settings, self.device, self.budget, self.ram, positions, work, say)
            prove(memory.micro_batch)
            say(
                f"{trainable:,} trainable parameters in {len(made.where)} linear layers ({', '.join(made.leaves)}); NF4 base, "
                f"{str(made.compute).removeprefix('torch.')} on {self.device}"
            )
            say(plan_line(memory, made.student, settings))
            losses = train(
                made.live, made.student, packed, settings, work=work, device=self.device, memory=memory, separate=made.separate,
                validation=validation, vocab=vocab, say=say, progress=self.progress, report_to=self.report_to,
                finish=lambda trainer: save_adapter(
                    trainer, made.live, work / "adapter", made.renamed, made.pattern, self.source.hub_id or self.source.name
                ),
            )  # fmt: skip
        about = {
            "losses": {key: losses[key] for key in ("first", "last", "curve")},
            "held_out": losses["held_out"],
            "seconds": losses["seconds"],
            "processes": losses["processes"],
            "documents": packed.documents,
            "epochs": packed.epochs,
            "tokens": packed.tokens,
            "order": packed.order,
            "validation": {
                "documents": len(held),
                "measured": len(validation),
                "hash": hashlib.sha256(b"".join(sorted(map(document_hash, held)))).hexdigest(),
                "left_out": packed.excluded,
            },
            "trainable": trainable,
            "modules": made.leaves,
            "separate": made.separate,
            "memory": {**memory.record(), "peak": losses["peak"]},
            "compute": str(made.compute).removeprefix("torch."),
            "where": {module: [place.name, place.transposed] for module, place in made.where.items()},
            "quantised": {module: [place.name, place.transposed] for module, place in made.quantised.items()},
        }
        first_alone(lambda: write_json(work / "trained.json", about), self.device)

    def _held_out(self) -> list[str]:
        from layerprune.heal.packing import validation_documents

        chosen = self.settings
        if chosen.validation_samples == 0:
            return []
        return validation_documents(chosen.validation, chosen.data, chosen.validation_samples, chosen.seed)

    def _packed(self, tokenizer: Any, held: Sequence[str]) -> Any:
        from layerprune.heal.packing import pack

        chosen = self.settings

        def make() -> Any:
            return pack(
                tokenizer, chosen.data, chosen.steps * chosen.batch_size, chosen.length, chosen.seed, self.work, self.progress,
                packing="truncate" if chosen.packing == "truncate" else "documents", exclude=frozenset(map(document_hash, held)),
            )  # fmt: skip

        first_alone(lambda: make() and None, self.device)
        return make()  # reads what the first process wrote
