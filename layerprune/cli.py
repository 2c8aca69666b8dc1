"""The command line: every command parses, calls one function, prints. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import textwrap
import traceback
from typing import Any

import click

from layerprune import __version__
from layerprune.cli_options import (
    DEVICE,
    DTYPE,
    EVAL_DATA,
    JSON,
    LIMIT,
    MODEL,
    SEED,
    TASK_FOLDER,
    TASKS,
    TRUST,
    VERBOSE,
    Resumed,
    out_folder,
    show,
    split,
    with_options,
)  # fmt: skip
from layerprune.cli_route import route
from layerprune.depth_checks import PROBES


class _Group(click.Group):
    """Prints what the library refuses as one sentence and exits 2 (usage), 1 (refused) or 130 (stopped).

    The rest keeps its traceback.
    """

    def invoke(self, ctx: click.Context) -> Any:
        from layerprune.model.errors import LayerpruneError, Stopped

        # Beside another busy process, threads that spin for each other take the cores that they wait for: torch's OpenMP
        # is told to spin for microseconds only, before it is loaded. Alone on a machine that costs nothing.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        try:
            return super().invoke(ctx)
        except LayerpruneError as error:
            if os.environ.get("LAYERPRUNE_VERBOSE"):
                traceback.print_exc()
            if "RANK" not in os.environ or not _said_elsewhere(error):
                click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as stop:
            if os.environ.get("RANK", "0") == "0":
                click.echo(f"Stopped: {stop}" if isinstance(stop, Stopped) else "Stopped", err=True)
            ctx.exit(Stopped.exit_code)


def _said_elsewhere(error: Exception) -> bool:
    from layerprune.heal.world import is_echo

    return is_echo(error)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="layerprune")
def main() -> None:
    """Make large language models shallower.

    `run` does everything for one fraction of layers; the other commands are its steps. Results go to stdout, progress
    to stderr. Exit codes: 2 for wrong usage, 1 for everything refused, 130 for Ctrl-C.
    """


_drop = click.option("--drop", type=float, metavar="F", help="Fraction of layers to drop; F times L is rounded half up.")
_strategy = click.option(
    "--strategy", type=click.Choice(["angular", "last"]), default="angular", show_default=True,
    help="angular: the block with the smallest angular distance. last: the deepest n layers but the very last one "
    "(0-based L-1-n .. L-2; the last layer and the head stay).",
)  # fmt: skip
_calibration = click.option(
    "--calibration", metavar="FILE|c4", help="Data for ranking (JSONL, text; .gz, .zst; Parquet)  [the recipe's, or c4]."
)
_heal_data = click.option("--heal-data", metavar="FILE|c4", help="Data for healing  [the recipe's, or c4].")
_heal_steps = click.option("--heal-steps", type=int, metavar="N", help="Optimizer steps of healing  [5000, or the recipe's].")
_heal_tokens = click.option("--heal-tokens", type=int, metavar="N", help="Instead of steps: as many as hold N tokens.")
_heal_with = click.option(
    "--heal-with", multiple=True, metavar="K=V",
    help="Another setting of `heal`, such as adapters=after, distil=1, memory=16GiB; may be repeated.",
)  # fmt: skip
_samples = click.option("--samples", type=int, metavar="N", help="Documents read from the data  [256, or the recipe's].")
_length = click.option(
    "--length", type=int, metavar="T", help="Tokens a document is cut at  [2048, or the model's context if shorter]."
)
_memory = click.option(
    "--memory", metavar="SIZE",
    help="GPU memory that may be used, such as 24GiB  [what is free]; a larger model is read layer by layer.",
)  # fmt: skip
_ram = click.option("--ram", metavar="SIZE", help="Host memory that may be used, such as 8GiB  [what is free].")
_shots = click.option("--num-fewshot", type=int, metavar="K", help="Examples in context, for every task that does not fix 0.")
_keep = click.option(
    "--keep", type=float, default=0.95, show_default=True, metavar="S",
    help="Share of the accuracy above chance that a recommended cut is shown to keep on every task (lower end of 95 % intervals).",
)  # fmt: skip
_batch = click.option("--batch-size", type=int, metavar="B", help="Rows a batch in tasks  [what fits].")
_verify = click.option(
    "--verify/--no-verify", default=None,
    help="Check the cut's logits against the source: always, or never  [where both fit in memory].",
)  # fmt: skip


@main.command(cls=Resumed, short_help="Everything, in one run folder.")
@with_options(MODEL)
@click.option("--drop", type=float, required=True, metavar="F", help="Fraction of layers to drop; F times L, rounded half up.")
@with_options(_strategy, TASKS, _shots, LIMIT, TASK_FOLDER, _calibration, _heal_data, EVAL_DATA)
@with_options(_heal_steps, _heal_tokens, _heal_with)
@click.option("--no-heal", is_flag=True, help="Stop after cutting: the result is the cut checkpoint.")
@click.option("--curve", metavar="F,F", help="Fractions of the curve, not healed  [the recipe's; 0.1 to 0.6]; '' for none.")
@with_options(_keep)
@with_options(_samples, _length, SEED, DTYPE, DEVICE, _memory, _ram, _batch, TRUST, _verify)
@with_options(out_folder("runs/<model>-<strategy>-<drop>"), JSON, VERBOSE)
def run(tasks: str | None, curve: str | None, no_heal: bool, as_json: bool, **options: Any) -> None:
    """Rank, prune, heal, evaluate and draw, in one run folder.

    The same command again goes on where a killed run stopped; when it is finished, it prints the result again.
    """
    from layerprune.pipeline import run as run_all
    from layerprune.report import format_run

    fractions = None if curve is None else [_fraction(f) for f in split(curve) or []]
    result = run_all(tasks=split(tasks), curve=fractions, heal=not no_heal, progress=True, **options)
    show(result, as_json, lambda: format_run(result))


def _fraction(text: str, option: str = "--curve") -> float:
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number", param_hint=option) from None


@main.command(cls=Resumed, short_help="The whole curve, and where it collapses.")
@with_options(MODEL)
@click.option("--strategy", default="angular,last", show_default=True, metavar="S,S", help="Which blocks: angular, last or both.")
@click.option("--drops", metavar="F:F,F", help="Fractions or ranges of them, such as 0:0.5  [every depth].")
@click.option("--heal", metavar="F,F", help="Fractions at which the cuts are written and healed too.")
@click.option("--workers", type=int, metavar="N", help="Healings at a time, a process and a GPU each  [all GPUs; 1 on the CPU].")
@click.option(
    "--launcher", type=click.Choice(["slurm", "local"]),
    help="Heal each cut in a job of its own, through submitit (pip install 'layerprune[slurm]'). All machines must see the "
    "folder, the model and the data under the same paths.",
)  # fmt: skip
@click.option(
    "--launcher-args", metavar="K=V,K=V",
    help="Parameters of the jobs, by submitit's names: timeout_min=600,slurm_partition=gpu  [timeout_min=1440, one GPU].",
)  # fmt: skip
@with_options(_keep, TASKS, _shots, LIMIT, TASK_FOLDER, _calibration, _heal_data, EVAL_DATA)
@with_options(_heal_steps, _heal_tokens, _heal_with)
@with_options(_samples, _length, SEED, DTYPE, DEVICE, _batch, TRUST, _memory, _ram)
@with_options(out_folder("runs/<model>-sweep"), JSON, VERBOSE)
def sweep(strategy: str, tasks: str | None, heal: str | None, as_json: bool, **options: Any) -> None:
    """Loss and accuracy at every depth, both strategies, from one pass over the data; and where they collapse.

    The same folder again adds to what is there: more depths, tasks or healing. A killed sweep goes on.
    """
    from layerprune.report import format_sweep
    from layerprune.sweeping import sweep as sweep_all

    healed = [_fraction(f, "--heal") for f in split(heal) or []]
    result = sweep_all(strategies=split(strategy) or [], tasks=split(tasks), heal=healed, progress=True, **options)
    show(result, as_json, lambda: format_sweep(result))


@main.command(cls=Resumed, short_help="The deepest cut that keeps the accuracy.")
@with_options(MODEL, _keep, _strategy, TASKS, _shots, LIMIT, TASK_FOLDER, _calibration, _heal_data, EVAL_DATA)
@with_options(_heal_steps, _heal_tokens, _heal_with)
@with_options(_samples, _length, SEED, DTYPE, DEVICE, _batch, TRUST, _memory, _ram)
@with_options(out_folder("runs/<model>-find"), JSON, VERBOSE)
def find(tasks: str | None, as_json: bool, **options: Any) -> None:
    """How many layers can go, healed, so that a share of the accuracy above chance stays on every task?

    The curve without healing says where to look; then few depths are cut, healed and measured. The answer's checkpoint stays.
    """
    from layerprune.report import format_find
    from layerprune.search import find as find_cut

    result = find_cut(tasks=split(tasks), progress=True, **options)
    show(result, as_json, lambda: format_find(result))


@main.command(short_help="Lay the curves of runs over one another.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN ...")
@with_options(out_folder("runs/compare-<models>"), JSON, VERBOSE)
def compare(runs: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Lay the curves of run or sweep folders over one another: other models, families, strategies, healing."""
    from layerprune.comparison import compare as compare_runs
    from layerprune.comparison import format_compare

    result = compare_runs(runs, out)
    show(result, as_json, lambda: format_compare(result))


@main.command(short_help="Rank all blocks of layers in one pass.")
@with_options(MODEL, _calibration, _samples, _length, SEED, DTYPE, DEVICE, _memory, _ram, TRUST)
@with_options(out_folder("runs/<model>-rank"), JSON, VERBOSE)
def rank(as_json: bool, **options: Any) -> None:
    """Rank all blocks of layers by angular distance, in one pass."""
    from layerprune.stages import to_stderr
    from layerprune.steps import format_rank
    from layerprune.steps import rank as rank_all

    options["data"] = options.pop("calibration")
    result = rank_all(progress=True, say=to_stderr, **options)
    show(result, as_json, lambda: format_rank(result))


@main.command(short_help="Write a checkpoint without some layers.")
@with_options(MODEL, _drop)
@click.option("--layers", metavar="A:B", help="Drop layers A to B-1 instead (0-based, half-open).")
@with_options(_strategy)
@click.option("--ranking", metavar="FILE", help="rank.json of `layerprune rank`; without it, angular ranks first.")
@with_options(_calibration, _samples, _length, SEED, DTYPE, DEVICE, TRUST, _verify)
@click.option("--dry-run", is_flag=True, help="Print where every tensor would go, and write nothing.")
@with_options(out_folder("runs/<model>-<strategy>-<drop>-pruned"), JSON, VERBOSE)
def prune(out: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write a checkpoint without a block of its layers.

    With `last` or --layers the model is never loaded to choose the block. Bytes are copied, not decoded.
    """
    from layerprune.prune.cut import format_cut, prune_checkpoint
    from layerprune.steps import prune_folder

    folder = None if dry_run else prune_folder(out, **options)
    result = prune_checkpoint(out=folder, dry_run=dry_run, progress=True, **options)
    show(result, as_json, lambda: format_cut(result, str(folder), plan=dry_run))


@main.command(cls=Resumed, short_help="Train a cut checkpoint back with QLoRA.")
@click.option("--model", required=True, metavar="DIR", help="The cut checkpoint (any recipe name, Hub id or folder).")
@with_options(_heal_data)
@click.option("--heal-steps", "steps", type=int, metavar="N", help="Optimizer steps  [5000, or the recipe's].")
@click.option("--heal-tokens", "tokens", type=int, metavar="N", help="Instead of steps: as many as hold N tokens.")
@click.option("--learning-rate", type=float, metavar="R", help="Peak learning rate  [3e-4, or the recipe's].")
@click.option("--lora-rank", type=int, metavar="R", help="Rank of LoRA, and its alpha  [64, or the recipe's].")
@click.option("--dropout", type=float, metavar="P", help="Dropout of LoRA  [0.05, or the recipe's].")
@click.option("--warmup-steps", type=int, metavar="N", help="Steps of warm-up  [100, or the recipe's; a tenth of fewer steps].")
@click.option("--batch-size", type=int, metavar="B", help="Sequences a step, over all micro-batches  [16, or the recipe's].")
@click.option("--length", type=int, metavar="T", help="Tokens of a packed sequence  [the recipe's; 2048, or the model's context].")
@click.option("--targets", metavar="A,B", help="What gets adapters: mlp, attention, or names of linear layers  [the MLP].")
@click.option("--adapters", metavar="WHERE", help="all layers, those after the cut, or window:K, K on each side of it  [all].")
@click.option("--distil", type=float, metavar="W", help="Add W times KL(unpruned || healed) to the loss, not with --bridge  [0].")
@click.option(
    "--bridge", type=click.Choice(["map", "projection"]), help="Begin with a least-squares map over the cut, not with --distil."
)
@click.option("--teacher", metavar="M", help="The unpruned model, for --distil and --bridge  [the one the cut's record names].")
@click.option(
    "--packing", type=click.Choice(["documents", "joined", "truncate"]),
    help="documents: joined, none sees another; joined: they do; truncate: one a sequence, as in the paper  [documents].",
)  # fmt: skip
@click.option("--validation", metavar="FILE|c4", help="Documents for the loss during training  [C4's, or held out of the data].")
@click.option("--merge", type=click.Choice(["weights", "nf4"]), help="Into the checkpoint's weights, or those trained  [weights].")
@click.option("--memory", metavar="SIZE", help="GPU memory to plan for, such as 16GiB  [most of what is free].")
@_ram
@click.option("--micro-batch", type=int, metavar="B", help="Sequences in memory at once  [chosen].")
@click.option(
    "--kernels", type=click.Choice(["liger", "none"]),
    help="liger: its norms, rotary embeddings and gated MLPs, on a GPU (pip install 'layerprune[liger]')  [none].",
)  # fmt: skip
@click.option("--nf4-copy", is_flag=True, help="Write the result once more in NF4, to OUT-nf4.")
@click.option("--report-to", metavar="A,B", help="Reports beside the terminal's: tensorboard, wandb, trackio.")
@with_options(SEED, DEVICE, TRUST, out_folder("runs/<model>-healed"), JSON, VERBOSE)
def heal(heal_data: str | None, out: str | None, as_json: bool, targets: str | None, report_to: str | None, **options: Any) -> None:
    """Train a cut checkpoint back (QLoRA on the MLPs) and merge the adapter into it.

    Under `accelerate launch -m layerprune heal ...` on as many GPUs as that starts processes.
    """
    from layerprune.heal.telling import format_healing
    from layerprune.heal.train import heal_checkpoint
    from layerprune.heal.world import is_first, leave
    from layerprune.steps import default_folder

    folder = default_folder(out, options["model"], "healed")
    result = heal_checkpoint(
        out=folder, data=heal_data, targets=split(targets), report_to=split(report_to) or (), progress=is_first(), **options
    )
    leave()
    if is_first():
        show(result, as_json, lambda: format_healing(result, str(folder)))


@main.command("eval", short_help="Score lm-eval tasks, measure the loss.")
@click.option("--model", required=True, metavar="DIR", help="Any recipe name, Hub id or folder.")
@with_options(TASKS, _shots, LIMIT, TASK_FOLDER, EVAL_DATA)
@click.option("--no-loss", is_flag=True, help="Tasks only.")
@with_options(_samples, _length, SEED, DTYPE, DEVICE, _batch, TRUST, _memory, _ram)
@with_options(out_folder("runs/<model>-eval"), JSON, VERBOSE)
def evaluate(tasks: str | None, eval_data: str | None, no_loss: bool, out: str | None, as_json: bool, **options: Any) -> None:
    """Score a checkpoint on lm-eval tasks, and measure its normalised loss; writes eval.json."""
    from layerprune.eval.evaluate import evaluate_checkpoint, format_table
    from layerprune.stages import to_stderr
    from layerprune.steps import default_folder

    folder = default_folder(out, options["model"], "eval")
    result = evaluate_checkpoint(
        tasks=split(tasks), data=eval_data, loss=not no_loss, items=True, out=folder / "eval.json", progress=True,
        say=to_stderr, **options,
    )  # fmt: skip
    show(result, as_json, lambda: format_table(result) + f"\n\n{folder / 'eval.json'}")


def _probe_lines() -> str:
    """A paragraph that click leaves as it is: the probes and what they tell."""
    lines = ["\b", "Probes (--probe A,B), and what they cost on a model of L layers:"]
    for name, told in PROBES.items():
        first, *more = textwrap.wrap(told, 62)
        lines += [f"  {name:<12}{first}", *(" " * 14 + line for line in more)]
    return "\n".join(lines)


@main.command(cls=Resumed, short_help="How deep models think: probes, lens.", epilog=_probe_lines())
@click.option("--model", "models", required=True, multiple=True, metavar="M", help="Recipe name, Hub id or folder; repeatable.")
@click.option(
    "--probe", "probes", metavar="A,B",
    help="Probes of the list below  [residual, lens, tokens; choices where there are --tasks].",
)  # fmt: skip
@click.option("--reference", is_flag=True, help="Effective depth by the first layer past a threshold, as the paper's code has it.")
@click.option("--tasks", metavar="A,B", help="lm-eval tasks with letters as options, for the probe `choices`; `name:5` as in eval.")
@click.option("--prompt", metavar="TEXT", help="Prompt for erasure and gradients  [the start of a document].")
@click.option("--answer", metavar="TEXT", help="Its gold answer, as it goes on after the prompt: with a blank before a word.")
@click.option("--lens", metavar="DIR", help="A trained lens for `tuned`: a folder of ours, or of the tuned-lens library.")
@click.option("--train-lens", type=int, metavar="STEPS", help="Train one instead, on the recipe's healing data or other documents.")
@click.option("--answers", metavar="FILE", help="Items for `answers`: JSON lines with `prompt` and `answer`.")
@with_options(LIMIT, TASK_FOLDER)
@click.option("--eval-data", metavar="FILE|c4", help="Documents that are probed  [the recipe's, or c4].")
@click.option("--samples", type=int, metavar="N", help="Documents read from the data  [64].")
@click.option("--length", type=int, metavar="T", help="Tokens a document is cut at  [512, or the model's context if shorter].")
@with_options(SEED, DTYPE, DEVICE, TRUST, out_folder("runs/<model>-depth"), JSON, VERBOSE)
def depth(models: tuple[str, ...], probes: str | None, tasks: str | None, as_json: bool, **options: Any) -> None:
    """Probe how deep models think: what each layer adds, when the prediction stands, effective depth.

    Leaves report.html with all figures, and JSON files with the numbers. The same command again goes on where a killed one
    stopped, and makes only the probes that are not there yet; what other calls left in the folder is shown too. Several models
    are set beside one another.
    """
    from layerprune.depths import format_depth, probe_depth

    result = probe_depth(list(models), probes=split(probes), tasks=split(tasks), progress=True, **options)
    show(result, as_json, lambda: format_depth(result))


@main.command()
@click.argument("name", required=False)
@with_options(JSON)
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes, or show one (NAME)."""
    from layerprune.check import format_recipes, list_recipes, recipe_text

    if name is not None and not as_json:
        click.echo(recipe_text(name).rstrip())
        return
    result = list_recipes(name)
    show(result, as_json, lambda: format_recipes(result))


@main.command(short_help="Faults and cost of a recipe.")
@click.argument("recipe")
@click.option("--drop", type=float, default=0.4, show_default=True, metavar="F", help="Fraction of layers to drop.")
@click.option("--device", type=click.Choice(["h100", "cpu"]), default="h100", show_default=True, help="Whose rate gives the hours.")
@click.option("--memory", metavar="SIZE", help="The GPU's memory, such as 24GiB  [80GB].")
@click.option("--ram", metavar="SIZE", help="The host's memory  [64GB; 16GB for --device cpu].")
@with_options(JSON)
def check(recipe: str, drop: float, device: str, memory: str | None, ram: str | None, as_json: bool) -> None:
    """Check a recipe (name, YAML file or checkpoint folder): all faults at once, then memory, disk and steps."""
    from layerprune.check import check_recipe_file, format_check

    result = check_recipe_file(recipe, drop, device, memory, ram)
    show(result, as_json, lambda: format_check(result))


main.add_command(route)
