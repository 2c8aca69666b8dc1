"""Options that commands share, and how a command prints: nothing heavy is imported here."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]


class Resumed(click.Command):
    """A command whose folder lets the same command go on: it says so when Ctrl-C stops it."""

    def invoke(self, ctx: click.Context) -> Any:
        from layerprune.model.errors import Stopped

        try:
            return super().invoke(ctx)
        except Stopped:  # knows better where it goes on
            raise
        except KeyboardInterrupt:
            if ctx.params.get("steps") == 0:  # a bridge without training has no folder but the result's
                raise
            raise Stopped("the same command goes on with what is done") from None


def with_options(*options: Command) -> Command:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        os.environ["LAYERPRUNE_VERBOSE"] = "1"
        logging.basicConfig(level=logging.INFO)


MODEL = click.option("--model", required=True, metavar="M", help="Recipe name (llama-2-70b), Hub id, or local folder.")
EVAL_DATA = click.option("--eval-data", metavar="FILE|c4", help="Data for the normalised loss  [the recipe's, or c4].")
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Seed of every random choice.")
DTYPE = click.option(
    "--dtype", default="auto", show_default=True, metavar="D",
    help="auto, float32, bfloat16, float16, or nf4 (4 bits); auto: the checkpoint's on a GPU, float32 on the CPU.",
)  # fmt: skip
DEVICE = click.option("--device", metavar="D", help="cpu, cuda, cuda:1  [the GPUs where there are any].")
TRUST = click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
VERBOSE = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, is_eager=True, callback=_verbose,
    help="Show the libraries' logs, and where in the code something was refused.",
)  # fmt: skip
TASKS = click.option("--tasks", metavar="A,B", help="lm-eval tasks; `name:5` gives 5 examples in context.")
LIMIT = click.option("--limit", type=int, metavar="N", help="Only the first N items of every task.")
TASK_FOLDER = click.option("--task-folder", metavar="DIR", help="Folder with task files (YAML) of your own.")


def _home(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return None if value is None else os.path.expanduser(value)


def out_folder(what: str) -> Command:
    return click.option("--out", metavar="DIR", callback=_home, help=f"New folder for the result  [{what}].")


def split(text: str | None) -> list[str] | None:
    return None if text is None else [part for part in (p.strip() for p in text.split(",")) if part]


def show(result: Any, as_json: bool, text: Callable[[], str]) -> None:
    click.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text())
