"""The command line's contract: flags, exit codes, streams, and what --help may cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from layerprune.cli import main

# Flags are a promise to scripts: a change here is a change of the interface, and belongs in the log.
COMMON = {"--model", "--length", "--seed", "--device", "--trust-remote-code", "--out", "--json", "-v", "--verbose", "-h", "--help"}
DATA = {"--samples", "--dtype"}
TASKS = {"--tasks", "--num-fewshot", "--limit", "--task-folder", "--batch-size"}
MEMORY = {"--memory", "--ram"}
HEAL = {"--heal-steps", "--heal-tokens", "--heal-with"}
ROUTE = COMMON - {"--length"}
ITEMS = {"--tasks", "--items", "--task-folder", "--limit", "--split"}
FLAGS = {
    "run": COMMON
    | DATA
    | TASKS
    | {"--drop", "--strategy", "--calibration", "--heal-data", "--eval-data", "--no-heal", "--curve"}
    | HEAL
    | MEMORY
    | {"--verify", "--no-verify", "--keep"},
    "sweep": COMMON
    | DATA
    | TASKS
    | HEAL
    | MEMORY
    | {"--strategy", "--drops", "--heal", "--keep", "--calibration", "--heal-data", "--eval-data"}
    | {"--workers", "--launcher", "--launcher-args"},
    "find": COMMON | DATA | TASKS | HEAL | MEMORY | {"--strategy", "--keep", "--calibration", "--heal-data", "--eval-data"},
    "compare": {"--out", "--json", "-v", "--verbose", "-h", "--help"},
    "rank": COMMON | DATA | MEMORY | {"--calibration"},
    "prune": COMMON
    | DATA
    | {"--drop", "--layers", "--strategy", "--ranking", "--calibration", "--dry-run", "--verify", "--no-verify"},
    "heal": COMMON
    | {"--heal-data", "--heal-steps", "--heal-tokens", "--learning-rate", "--lora-rank", "--dropout", "--warmup-steps"}
    | {"--batch-size", "--micro-batch", "--memory", "--ram", "--targets", "--adapters", "--distil", "--bridge", "--teacher"}
    | {"--packing", "--validation", "--merge", "--nf4-copy", "--report-to", "--kernels"},
    "eval": COMMON | DATA | TASKS | MEMORY | {"--eval-data", "--no-loss"},
    "depth": COMMON
    | DATA
    | {"--probe", "--reference", "--eval-data", "--tasks", "--limit", "--task-folder"}
    | {"--prompt", "--answer", "--lens", "--train-lens", "--answers"},
    "route": {"-h", "--help"},
    "route search": ROUTE
    | ITEMS
    | {"--simulations", "--length-penalty", "--exploration", "--random-share", "--longest-skip", "--stop-shorter", "--no-stop"}
    | {"--jobs", "--dtype"},
    "route train": ROUTE | {"--search", "--epochs", "--learning-rate", "--weight-decay", "--batch-size", "--warm-up", "--held-out"},
    "route eval": ROUTE | ITEMS | {"--routers", "--dial", "--static", "--rank", "--dtype"},
    "route bake": ROUTE | ITEMS | {"--routers", "--eval-data", "--dtype", "--dial", "--always"},
    "recipes": {"--json", "-h", "--help"},
    "check": {"--drop", "--device", "--memory", "--ram", "--json", "-h", "--help"},
}


def find_command(name: str) -> click.Command:
    found: click.Command = main
    for part in name.split():
        assert isinstance(found, click.Group)
        found = found.commands[part]
    return found


def all_commands(group: click.Group = main, above: str = "") -> set[str]:
    found = set()
    for name, command in group.commands.items():
        found |= {above + name} | (all_commands(command, f"{above}{name} ") if isinstance(command, click.Group) else set())
    return found


def flags_of(name: str) -> set[str]:
    command = find_command(name)
    params = command.get_params(command.make_context(name, [], resilient_parsing=True))
    return {name for p in params if p.param_type_name == "option" for name in (*p.opts, *p.secondary_opts)}


def test_all_commands_are_known() -> None:
    assert all_commands() == set(FLAGS)


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_frozen(command: str) -> None:
    help_names = {"-h", "--help"}  # added by the group's settings, not by the command
    assert flags_of(command) | help_names == FLAGS[command] | help_names


@pytest.mark.parametrize("command", ["", *FLAGS])
def test_help_is_cheap(command: str) -> None:
    code = (
        "import sys\nfrom layerprune.cli import main\n"
        f"try:\n    main({[*command.split(), '--help']})\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'lm_eval', 'datasets', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "Usage:" in found.stdout


def test_the_help_says_that_distillation_and_a_bridge_exclude_each_other() -> None:
    told = " ".join(CliRunner().invoke(main, ["heal", "--help"]).output.split())
    assert "to the loss, not with --bridge" in told and "over the cut, not with --distil" in told


def test_version() -> None:
    import layerprune

    assert layerprune.__version__ in CliRunner().invoke(main, ["--version"]).output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "--model", "lama-2-7b", "--drop", "0.4"], 2, ["lama-2-7b", "llama-2-7b"]),
        (["run", "--model", "llama-2-7b"], 2, ["--drop"]),
        (["recipes", "qwen-77b"], 2, ["qwen-77b", "qwen-7b"]),
        (["check", "no-such.yaml"], 2, ["no-such.yaml", "does not exist"]),
        (["check", "llama-2-7b", "--drop", "0.999"], 2, ["0.999", "32", "at least one must stay"]),
        (["prune", "--model", "."], 2, ["--drop", "--layers"]),
        (["nonsense"], 2, ["nonsense"]),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    arguments: list[str], code: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == code
    assert found.stdout == ""
    errors = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "Traceback" not in found.stderr
    for word in words:
        assert word in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_recipes_lists_and_shows() -> None:
    runner = CliRunner()
    listed = runner.invoke(main, ["recipes"])
    assert listed.exit_code == 0
    names = [line.split()[0] for line in listed.stdout.splitlines()[1:]]
    assert "llama-2-70b" in names and names == sorted(names)
    shown = runner.invoke(main, ["recipes", "llama-2-70b"])
    assert "lora_rank: 8" in shown.stdout and "meta-llama/Llama-2-70b-hf" in shown.stdout
    one = json.loads(runner.invoke(main, ["recipes", "llama-2-70b", "--json"]).stdout)
    assert one[0]["heal"]["lora_rank"] == 8


def test_check_prints_what_a_run_needs() -> None:
    found = CliRunner().invoke(main, ["check", "llama-2-70b", "--drop", "0.4"])
    assert found.exit_code == 0
    assert "drops 32 layers and keeps 48" in found.stdout
    assert json.loads(CliRunner().invoke(main, ["check", "llama-2-70b", "--json"]).stdout)["dropped"] == 32


def stopped(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


GOES_ON = "Stopped: the same command goes on with what is done"
MODEL = ["--model", "nowhere"]
INTERRUPTED = {
    "run": ("pipeline.run", [*MODEL, "--drop", "0.5"], GOES_ON),
    "sweep": ("sweeping.sweep", MODEL, GOES_ON),
    "find": ("search.find", MODEL, GOES_ON),
    "heal": ("heal.train.heal_checkpoint", [*MODEL, "--bridge", "map"], GOES_ON),
    "heal without training": ("heal.train.heal_checkpoint", [*MODEL, "--bridge", "map", "--heal-steps", "0"], "Stopped"),
    "depth": ("depths.probe_depth", MODEL, GOES_ON),
    "route search": ("routing.search_routing", MODEL, GOES_ON),
    "route train": ("routing.train_routing", ["--search", "nowhere"], GOES_ON),
    "route eval": ("route_use.evaluate_routing", [*MODEL, "--routers", "nowhere"], GOES_ON),
    "route bake": ("route_bake.bake_routing", [*MODEL, "--routers", "nowhere"], "Stopped"),
    "eval": ("eval.evaluate.evaluate_checkpoint", MODEL, "Stopped"),
    "prune": ("prune.cut.prune_checkpoint", [*MODEL, "--drop", "0.5"], "Stopped"),
}


@pytest.mark.parametrize("command", INTERRUPTED)
def test_ctrl_c_says_whether_the_command_goes_on(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    function, given, told = INTERRUPTED[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"layerprune.{function}", stopped)
    found = CliRunner().invoke(main, [*command.partition(" without")[0].split(), *given])
    assert (found.exit_code, found.stdout, found.stderr) == (130, "", told + "\n")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stopped_ranking_goes_on_only_where_its_pass_was_kept(
    streamed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rank_blocks(model: str, keep: Path, **settings: object) -> None:
        if streamed:
            keep.mkdir()
            (keep / "rank.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("layerprune.prune.rank.rank_blocks", rank_blocks)
    found = CliRunner().invoke(main, ["rank", *MODEL, "--out", str(tmp_path / "out")])
    assert (found.exit_code, found.stderr) == (130, (GOES_ON if streamed else "Stopped") + "\n")
