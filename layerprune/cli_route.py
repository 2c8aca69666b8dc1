"""`layerprune route`: search paths for prompts, train routers on them, measure what they keep, freeze one path."""

from __future__ import annotations

from typing import Any

import click

from layerprune.cli_options import (
    DEVICE,
    DTYPE,
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

_ITEMS = click.option(
    "--items", metavar="FILE", help="Instead of tasks: JSON lines with `prompt` and `answer`, or `prompt`, `options` and `gold`."
)
_ROUTERS = click.option("--routers", required=True, metavar="DIR", help="Routers of this model: the folder of `route train`.")


def _split_option(default: str) -> Any:
    return click.option(
        "--split", type=click.Choice(["train", "validation", "test"]), metavar="S",
        help=f"Which documents of the tasks: train, validation or test  [{default}].",
    )  # fmt: skip


@click.group(short_help="Layers by the prompt: skip, repeat.")
def route() -> None:
    """Let every prompt choose the layers that it runs through (arXiv 2510.12773).

    `search` finds for each prompt with a known answer a short path of layers that answers it; `train` trains one small
    router a layer on these paths; `eval` measures routed models beside static cuts; `bake` says which layers could be cut
    for good.
    """


@route.command(cls=Resumed, short_help="Find a short path for each prompt.")
@with_options(MODEL, TASKS, _ITEMS, TASK_FOLDER, LIMIT, _split_option("train"))
@click.option("--simulations", type=int, default=50, show_default=True, metavar="N", help="Paths tried for an item, at most.")
@click.option("--length-penalty", type=float, default=3.0, show_default=True, metavar="X", help="How strongly short paths draw.")
@click.option(
    "--exploration", type=float, default=1.8, show_default=True, metavar="X", help="How strongly paths little tried draw."
)
@click.option("--random-share", type=float, default=0.1, show_default=True, metavar="P", help="Share of choices made at random.")
@click.option("--longest-skip", type=int, default=2, show_default=True, metavar="N", help="Neighbours skipped together, at most.")
@click.option(
    "--stop-shorter", type=int, default=2, show_default=True, metavar="N",
    help="Stop at a path that answers what the model does not, or as well with N layers fewer.",
)  # fmt: skip
@click.option("--no-stop", is_flag=True, help="Run all simulations of every item.")
@click.option("--jobs", type=int, default=1, show_default=True, metavar="N", help="Processes; on GPUs each takes a card in turn.")
@with_options(SEED, DTYPE, DEVICE, TRUST, out_folder("runs/<model>-paths"), JSON, VERBOSE)
def search(tasks: str | None, stop_shorter: int, no_stop: bool, as_json: bool, **options: Any) -> None:
    """Search for every item a path of layers that answers it, shorter than the model or where the model is wrong.

    The same command again goes on where a killed one stopped; when it is finished, it prints the result again.
    """
    from layerprune.route_report import format_search
    from layerprune.routing import search_routing

    result = search_routing(tasks=split(tasks), stop_shorter=None if no_stop else stop_shorter, progress=True, **options)
    show(result, as_json, lambda: format_search(result))


@route.command(cls=Resumed, short_help="Train routers on the paths found.")
@click.option("--search", required=True, metavar="DIR", help="The folder of a finished `route search`.")
@click.option("--epochs", type=int, default=25, show_default=True, metavar="N", help="Times that every item is seen.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, metavar="R", help="Peak learning rate.")
@click.option("--weight-decay", type=float, default=0.01, show_default=True, metavar="W", help="Weight decay of AdamW.")
@click.option("--batch-size", type=int, default=16, show_default=True, metavar="B", help="Items a step.")
@click.option("--warm-up", type=int, default=500, show_default=True, metavar="N", help="Steps of warm-up; a tenth of all at most.")
@click.option("--held-out", type=float, default=0.1, show_default=True, metavar="S", help="Share of items not trained on.")
@click.option("--model", metavar="M", help="The model of the search, where it lies elsewhere now  [as in the search].")
@with_options(SEED, DEVICE, TRUST, out_folder("runs/<model>-routers"), JSON, VERBOSE)
def train(as_json: bool, **options: Any) -> None:
    """Train one router a layer on the paths of a search; the model itself stays as it is.

    The same command again goes on where a killed one stopped; when it is finished, it prints the result again.
    """
    from layerprune.route_report import format_training
    from layerprune.routing import train_routing

    result = train_routing(progress=True, **options)
    show(result, as_json, lambda: format_training(result))


@route.command("eval", cls=Resumed, short_help="Routed models beside static cuts.")
@with_options(MODEL, _ROUTERS, TASKS, _ITEMS, TASK_FOLDER, LIMIT, _split_option("test"))
@click.option(
    "--dial", "dials", multiple=True, metavar="D",
    help="router (their own choice, -0.5), execute (every layer once, 0.5), or a number from -1 (skip) to 1 (repeat); may be "
    "repeated; execute is always measured  [-0.6, router, -0.25, 0].",
)  # fmt: skip
@click.option(
    "--static",
    default="both",
    show_default=True,
    metavar="S",
    help="Static cuts to measure beside them, on the same items: angular, last, both or none.",
)
@click.option("--rank", metavar="FILE", help="rank.json of `layerprune rank`, for the angular cuts; without it, ranks first.")
@with_options(SEED, DTYPE, DEVICE, TRUST, out_folder("runs/<model>-routed"), JSON, VERBOSE)
def evaluate(tasks: str | None, dials: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Accuracy and mean depth of a routed model, beside static cuts of the same items.

    The same command again goes on where a killed one stopped; the same folder again takes more dials.
    """
    from layerprune.route_text import format_routing
    from layerprune.route_use import evaluate_routing

    result = evaluate_routing(tasks=split(tasks), dials=list(dials) or None, progress=True, **options)
    show(result, as_json, lambda: format_routing(result))


@route.command(short_help="Layers that routers always skip.")
@with_options(MODEL, _ROUTERS, TASKS, _ITEMS, TASK_FOLDER, LIMIT, _split_option("train"))
@click.option("--eval-data", metavar="FILE|c4", help="Instead of tasks or items: documents (JSONL, text; .gz, .zst; Parquet).")
@click.option("--dial", default="router", show_default=True, metavar="D", help="As in `route eval`.")
@click.option(
    "--always", type=float, default=1.0, show_default=True, metavar="S", help="Share of the prompts that counts as always."
)
@with_options(SEED, DTYPE, DEVICE, TRUST, out_folder("runs/<model>-baked"), JSON, VERBOSE)
def bake(tasks: str | None, as_json: bool, **options: Any) -> None:
    """Which layers do the routers always skip on these prompts? Writes cut.json, and prints the commands that cut them.

    The prompts are those of tasks, of items, or the documents of --eval-data. Nothing is cut.
    """
    from layerprune.route_bake import bake_routing
    from layerprune.route_text import format_baked

    result = bake_routing(tasks=split(tasks), progress=True, **options)
    show(result, as_json, lambda: format_baked(result))
