"""The stages that runs and sweeps are made of: load, rank, cut, heal, measure, for one setup."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from layerprune.model.config import layer_count, load_config
from layerprune.model.cuts import Block, Kept
from layerprune.model.errors import Refused
from layerprune.model.tensors import read_checkpoint
from layerprune.runplan import Setup

Say = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Stages:
    """Each stage does its work and returns it; what is done already is the caller's to know.

    verify: as in `prune_checkpoint`. batch_size: rows a batch in tasks, None for what fits.
    """

    def __init__(self, setup: Setup, say: Say, progress: bool, verify: bool | None = None, batch_size: int | None = None) -> None:
        self.setup, self.say, self.progress, self.verify, self.batch_size = setup, say, progress, verify, batch_size
        self._ready: tuple[Any, Any] | None = None
        self._source: tuple[Any, Any] | None = None
        self._streamed: tuple[Any, Any] | None = None
        self._budgets: dict[Path, Any] = {}

    def budget(self, folder: Path) -> Any:
        """The memory within which a checkpoint is streamed; None where it fits, and is loaded.

        Decided once, with nothing of ours in memory: a model that is held would count as memory that is not free.
        """
        from layerprune.model.budget import streaming_budget

        if folder not in self._budgets:
            self.release()
            setup = self.setup
            budget = self._budgets[folder] = streaming_budget(
                folder, device=setup.asked_device, dtype=setup.dtype, memory=setup.memory, ram=setup.ram,
                trust_remote_code=setup.trust_remote_code,
            )  # fmt: skip
            if budget is not None:
                self.say(f"{setup.source.name if folder == setup.source.folder else folder.name}: {budget.why}")
        return self._budgets[folder]

    def stream(self, folder: Path) -> tuple[Any, Any]:
        """A model whose layers stay in its files, and its tokenizer. The source, if it is held, goes first."""
        from layerprune.model.load import load_tokenizer
        from layerprune.model.stream import StreamedModel

        self._source = self._streamed = None
        setup = self.setup
        made = StreamedModel(folder, device=setup.asked_device, dtype=setup.dtype, trust_remote_code=setup.trust_remote_code)
        return made, load_tokenizer(folder, setup.trust_remote_code)

    def streamed_source(self) -> tuple[Any, Any]:
        if self._streamed is None:
            self._streamed = self.stream(self.setup.source.folder)
        return self._streamed

    def load(self, folder: Path) -> tuple[Any, Any]:
        """A live model and its tokenizer. The source, if it is held, goes first."""
        from layerprune.model.load import load_model, load_tokenizer

        self._source = self._streamed = None
        setup = self.setup
        live = load_model(
            folder,
            device=setup.asked_device,
            dtype=setup.dtype,
            trust_remote_code=setup.trust_remote_code,
            progress=self.progress,
        )
        return live, load_tokenizer(folder, setup.trust_remote_code)

    def source(self) -> tuple[Any, Any]:
        """The whole model, held until another one is loaded or healing begins."""
        if self._source is None:
            self._source = self.load(self.setup.source.folder)
        return self._source

    def release(self) -> None:
        """Let the source go, and the memory that it held on GPUs, for other processes."""
        import gc

        import torch

        self._source = self._streamed = None
        gc.collect()  # a model that accelerate spread refers to itself
        torch.cuda.empty_cache()

    def rank(self, keep: Path | None = None) -> dict[str, Any]:
        """keep: a folder for what a streamed pass that is killed goes on with; it is gone in the end."""
        found = self._rank(keep)
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)
        return found

    def _rank(self, keep: Path | None) -> dict[str, Any]:
        from layerprune.model.decoder import view_decoder
        from layerprune.prune.rank import rank_from_disk, rank_live

        setup = self.setup
        budget = self.budget(setup.source.folder)
        if budget is not None:
            streamed, tokenizer = self.streamed_source()
            return rank_from_disk(
                streamed, tokenizer, setup.rank, setup.source, budget, seed=setup.seed, progress=self.progress, say=self.say,
                keep=keep,
            )  # fmt: skip
        live, tokenizer = self.source()
        return dict(rank_live(view_decoder(live), tokenizer, setup.rank, setup.source, seed=setup.seed, progress=self.progress))

    def check_sweep(self, kept: Iterable[Kept], unknown: int, answers: Path) -> None:
        """Refuse, before anything is ranked, what `sweep` of these cuts would refuse, where the source is streamed.

        unknown: how many more cuts there will be, of blocks that the ranking is to choose.
        """
        from layerprune.eval.answers import Answers
        from layerprune.eval.streamed import check_sweep

        budget = self.budget(self.setup.source.folder)
        if budget is None:
            return
        streamed, tokenizer = self.streamed_source()
        tasks, sequences = self.ready()
        self.say("planning the evaluation that follows on the ranking")
        try:
            check_sweep(
                streamed, tokenizer, kept, budget, unknown=unknown, tasks=tasks, sequences=sequences, answers=Answers(answers),
                limit=self.setup.evaluation.limit, batch_size=self.batch_size, seed=self.setup.seed,
                keep=answers.parent / ".pass",
            )  # fmt: skip
        except Refused as refusal:
            raise Refused(f"nothing was ranked, for the evaluation after it would be refused: {refusal}") from None

    def block(self, n: int, strategy: str, ranking: Mapping[str, Any] | None) -> Block:
        from layerprune.prune.cut import choose_block

        return choose_block(n / self.setup.layers, self.setup.layers, strategy, ranking)

    def prune(self, out: Path, drop: float, strategy: str, ranking: Mapping[str, Any] | None) -> None:
        """Write the cut checkpoint."""
        from layerprune.prune.cut import prune_checkpoint

        setup = self.setup
        found = prune_checkpoint(
            setup.source.name,
            out,
            drop=drop,
            strategy=strategy,
            ranking=ranking if strategy == "angular" else None,
            seed=setup.seed,
            trust_remote_code=setup.trust_remote_code,
            verify=self.verify,
            too_large_for=self._too_small(),
            progress=self.progress,
            say=self.say,
        )
        for what, how in found["verified"].items():
            self.say(f"  {what}: {how}")

    def _too_small(self) -> str | None:
        """The memory that the source is streamed for, in words: a proof of the cut's logits would load it as a whole."""
        if self.verify is not None:
            return None
        budget, setup = self.budget(self.setup.source.folder), self.setup
        if budget is None:
            return None
        option, given = ("--ram", setup.ram) if budget.memory is None else ("--memory", setup.memory)
        return "the free memory" if given is None else option

    def check_healing(self, dropped: int | None) -> None:
        """Refuse what healing a cut of so many layers would refuse (the architecture, the targets, the data, the memory), before
        anything is ranked. None: nothing is to be healed any more."""
        from layerprune.heal.checks import check_healing

        setup = self.setup
        assert setup.heal is not None
        check_healing(
            setup.source, data=setup.heal.data, seed=setup.seed, device=setup.asked_device,
            trust_remote_code=setup.trust_remote_code, dropped=dropped, **setup.heal_options,
        )  # fmt: skip

    def heal(self, pruned: Path, healed: Path, adapter: Path, work: Path) -> None:
        """Heal a cut checkpoint."""
        from layerprune.heal.train import heal_checkpoint

        self._source = self._streamed = None
        setup = self.setup
        assert setup.heal is not None
        # the documents that the result is measured on: training leaves them out
        held = {"validation": setup.evaluation.data, "validation_samples": setup.evaluation.samples}
        heal_checkpoint(
            pruned,
            healed,
            data=setup.heal.data if setup.own_heal_data else None,
            seed=setup.seed,
            device=setup.asked_device,
            trust_remote_code=setup.trust_remote_code,
            adapter=adapter,
            work=work,
            report=self.say,
            progress=self.progress,
            origins={key: "ours" for key in held if key not in setup.heal_options},
            **{**held, **setup.heal_options},
        )

    def ready(self) -> tuple[Any, Any]:
        """The tasks (None without any) and the loss sequences; loaded once."""
        from layerprune.eval.evaluate import loss_sequences
        from layerprune.eval.tasks import load_tasks
        from layerprune.model.load import load_tokenizer

        if self._ready is None:
            setup, chosen = self.setup, self.setup.evaluation
            tasks = load_tasks(setup.tasks, setup.task_folder, setup.seed) if setup.tasks else None
            config = load_config(setup.source.folder, setup.trust_remote_code)
            tokenizer = load_tokenizer(setup.source.folder, setup.trust_remote_code)
            sequences = loss_sequences(tokenizer, config, chosen.data, chosen.samples, chosen.length, setup.seed, self.progress)
            self._ready = (tasks, sequences)
        return self._ready

    def measure(self, folder: Path, speed: bool = False) -> dict[str, Any]:
        """Loss and tasks of a checkpoint, and the speed of its generation (None for one that has to be streamed)."""
        from layerprune.eval.evaluate import evaluate_live
        from layerprune.eval.speed import generation_speed

        budget = self.budget(folder)
        if budget is not None:
            streamed, tokenizer = self.stream(folder)
            whole = tuple(range(len(streamed)))
            keep = folder.absolute().parent / f".{folder.name}.pass"
            found = self._from_disk(streamed, tokenizer, [whole], budget, None, keep)[whole]
            shutil.rmtree(keep, ignore_errors=True)
            assert found is not None  # a whole model that does not run is refused
            return {**found, "speed": None} if speed else found
        live, tokenizer = self.load(folder)
        tasks, sequences = self.ready()
        measured = evaluate_live(
            live,
            tokenizer,
            tasks=tasks,
            limit=self.setup.evaluation.limit,
            sequences=sequences,
            batch_size=self.batch_size,
            seed=self.setup.seed,
            samples=True,
            progress=self.progress,
        )
        return {**measured, "speed": generation_speed(live, tokenizer)} if speed else measured

    def speed(self) -> dict[str, Any] | None:
        """Of the source's generation; None where it is streamed."""
        from layerprune.eval.speed import generation_speed

        return None if self.budget(self.setup.source.folder) is not None else generation_speed(*self.source())

    def sweep(self, kept: Iterable[Kept], answers: Path) -> dict[Kept, dict[str, Any] | None]:
        """Loss and tasks of the source under many virtual cuts; None where it cannot run."""
        from layerprune.eval.answers import Answers
        from layerprune.eval.sweep import sweep_live

        budget = self.budget(self.setup.source.folder)
        if budget is not None:
            found = self._from_disk(*self.streamed_source(), kept, budget, answers, answers.parent / ".pass")
            shutil.rmtree(answers.parent / ".pass", ignore_errors=True)
            return found
        live, tokenizer = self.source()
        tasks, sequences = self.ready()
        return sweep_live(
            live,
            tokenizer,
            kept,
            tasks=tasks,
            sequences=sequences,
            answers=Answers(answers),
            limit=self.setup.evaluation.limit,
            batch_size=self.batch_size,
            seed=self.setup.seed,
            progress=self.progress,
            say=self.say,
        )

    def _from_disk(
        self, streamed: Any, tokenizer: Any, kept: Iterable[Kept], budget: Any, answers: Path | None, keep: Path | None = None
    ) -> dict[Kept, dict[str, Any] | None]:
        from layerprune.eval.answers import Answers
        from layerprune.eval.streamed import kept_answers, sweep_streamed

        tasks, sequences = self.ready()
        return sweep_streamed(
            streamed,
            tokenizer,
            kept,
            budget,
            tasks=tasks,
            sequences=sequences,
            answers=kept_answers(keep, streamed) if answers is None else Answers(answers),
            limit=self.setup.evaluation.limit,
            batch_size=self.batch_size,
            seed=self.setup.seed,
            progress=self.progress,
            say=self.say,
            keep=keep,
        )

    def sizes(self, folder: Path) -> dict[str, Any]:
        """layers, parameters and bytes of a written checkpoint."""
        stored = read_checkpoint(folder)
        return {
            "layers": layer_count(load_config(folder, self.setup.trust_remote_code)),
            "parameters": sum(tensor.numel for tensor in stored.values()),
            "bytes": sum(tensor.nbytes for tensor in stored.values()),
        }
