"""docs/scale.md says what the planner and the record say; `check` tells when a model does not fit."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

from layerprune.check import check_recipe_file, format_check
from layerprune.model.errors import Refused, UsageError
from layerprune.model.estimate import DEVICES
from layerprune.model.passplan import PROCESS_BYTES, Sizes, plan_passes
from layerprune.model.recipes import Shape, load_recipe
from layerprune.model.streamplan import last_branches, plan_streaming, rank_branches, sizes_of_shape
from layerprune.model.tree import CutTree

DOCS = Path(__file__).parent.parent / "docs"


def maker() -> Any:
    return load_script("docs/make_scale.py")


def test_the_tables_are_those_of_the_planner_and_the_record() -> None:
    made, page = maker(), (DOCS / "scale.md").read_text(encoding="utf-8")
    assert made.page(page) == page, "run python docs/make_scale.py"
    assert made.page(page.replace("137 GB", "1 GB")) == page, "a changed number is seen"


def test_the_sizes_of_the_two_models_without_a_recipe() -> None:
    """A layer's parameters and what lies outside add up to what the models are said to have."""
    made = maker()
    for shape in (made.LLAMA_405B, made.QWEN_235B):
        outside = 2 * shape.vocab * shape.hidden + shape.hidden  # embedding, head, final norm
        assert shape.layers * shape.layer_parameters + outside == shape.parameters


SHAPE = Shape(layers=4, hidden=8, vocab=100, parameters=4 * 1000 + 1600, layer_parameters=1000, mlp=16)
CARD = replace(DEVICES["h100"], forward_rate=1e6, batch_tokens=20)


def plan(kept: Any, **given: Any) -> Any:
    return plan_streaming(
        SHAPE, kept, CARD, name="x", data="mine.jsonl", samples=6, length=10,
        **{"memory": 1 << 40, "ram": 1 << 40, "disk_rate": 1e6, "heads": False, **given},
    )  # fmt: skip


def test_the_arithmetic_by_hand() -> None:
    sizes = sizes_of_shape(SHAPE, 2, 2)
    assert (sizes.rest, sizes.layers, sizes.width, sizes.itemsize) == (3200, (2000,) * 4, 8, 2)
    cost = plan(rank_branches(4))
    # three batches of 2 x 10 tokens, in one pass: 3 states of 8 numbers a token, and a mask of 10
    assert len(cost.plan.groups) == 1 and cost.plan.states == 60 * 2 * (3 * 8 + 10)
    assert cost.plan.read == 8000 and cost.read_hours == pytest.approx((8000 + 3200) / 1e6 / 3600)
    assert cost.flops == 2 * 60 * 4 * 1000 and cost.compute_hours == pytest.approx(cost.flops / 1e6 / 3600)
    fixed = 3200 + 2 * 2000 + 2000 + 20 * (4 * 8 + 3 * 16) * 2
    assert cost.plan.fixed == fixed
    swept = plan(last_branches(4), heads=True)
    assert swept.plan.hold == (3,)
    assert swept.flops == 2 * 60 * (1000 * 7 + 100 * 8 * 4)  # 2 L - 1 layer applications, 4 heads
    small = plan(rank_branches(4), memory=fixed + 20 * 2 * (3 * 8 + 10), ram=PROCESS_BYTES + 4000)
    assert len(small.plan.groups) == 3 and small.plan.read == 24000
    with pytest.raises(Refused, match="--memory"):
        plan(rank_branches(4), memory=fixed - 1, ram=1 << 40)
    with pytest.raises(Refused, match="--ram"):  # what arrives goes through the host, wherever the states lie
        plan(rank_branches(4), memory=1 << 40, ram=1000)


def test_check_tells_the_plan_of_what_does_not_fit() -> None:
    checked = check_recipe_file("llama-2-70b")
    assert len(checked["streamed"]) == 2 and "passes over the checkpoint" in checked["streamed"][0]
    assert checked["streamed"][0] in format_check(checked)
    assert check_recipe_file("llama-2-7b")["streamed"] == []
    assert "use at least" in check_recipe_file("llama-2-70b", memory="4GiB")["streamed"][0]
    assert len(check_recipe_file("llama-2-7b", device="cpu", ram="8GiB")["streamed"]) == 2
    assert checked["too_large"] == [] and checked["healing_verdict"] == ""
    with pytest.raises(UsageError, match="--memory is the GPU's"):
        check_recipe_file("llama-2-7b", device="cpu", memory="8GiB")
    assert load_recipe("llama-2-70b").shape.layers == 80


def test_check_says_that_healing_does_not_fit_though_the_rest_is_streamed() -> None:
    checked = check_recipe_file("llama-2-70b", memory="24GB")
    need = next(step["memory"] for step in checked["steps"] if step["name"] == "heal")
    assert need > 24e9 and checked["too_large"] == ["healing"] and "passes over the checkpoint" in checked["streamed"][1]
    lines = format_check(checked).splitlines()
    assert lines[0].endswith("the paper's settings, no fault in the recipe, but healing does not fit in the memory")
    assert [line.endswith("30 GB  does not fit") for line in lines if line.startswith("heal ")] == [True]
    least = re.search(
        r"^Healing does not fit: it takes 30 GB, more than the 24 GB of --memory, .* at least --memory ([\d.]+GB), several GPUs "
        r"with recipes/accelerate/fsdp.yaml, or no healing \(--no-heal\)\.$",
        "\n".join(lines),
        re.M,
    )
    assert least is not None
    assert (DOCS.parent / "recipes" / "accelerate" / "fsdp.yaml").is_file()
    assert check_recipe_file("llama-2-70b", memory=least[1])["too_large"] == []  # and what it says is enough
    below = check_recipe_file("llama-2-70b", memory=int(need) - 1)
    assert below["too_large"] == ["healing"]


def test_check_names_every_step_that_does_not_fit() -> None:
    text = format_check(check_recipe_file("llama-2-70b", memory="4GiB"))
    assert "but ranking, the loss and healing do not fit in the memory" in text.splitlines()[0]
    marked = [line.split()[0] for line in text.splitlines() if line.endswith("  does not fit")]
    assert marked == ["rank", "heal", "loss"]
    fits = check_recipe_file("llama-2-7b", memory="16GiB")  # loaded whole, and healed
    assert fits["streamed"] == [] and fits["too_large"] == []
    small = check_recipe_file("llama-2-7b", drop=0.05, memory="5GB")
    assert small["too_large"] == ["healing"] and check_recipe_file("llama-2-7b", drop=0.4, memory="5GB")["too_large"] == []
    on_cpu = check_recipe_file("llama-2-70b", device="cpu")
    assert "more than 16 GB, which --ram would change" in on_cpu["healing_verdict"] and "fsdp" not in on_cpu["healing_verdict"]


def test_the_memory_that_a_refusal_asks_for_is_enough_and_hardly_more() -> None:
    some = random.Random(0)
    refused = 0
    for _ in range(300):
        layers = some.randint(2, 9)
        layer = some.randint(1 << 20, 1 << 32)
        sizes = Sizes(
            some.randint(0, 1 << 33), (layer,) * layers, (layer,) * layers, layer, some.choice([64, 4096]), 2,
            some.choice([0, 600]), some.choice([0, 2]),
        )  # fmt: skip
        tree = CutTree(some.choice([rank_branches, last_branches])(layers), layers)
        shapes = [(some.randint(1, 8), some.randint(1, 4096)) for _ in range(some.randint(1, 4))]
        given = {"working": some.randint(0, 1 << 31), "scratch": some.choice([0, 1 << 40])}
        memory, ram = some.choice([None, some.randint(1, 1 << 35)]), some.randint(1, 1 << 35)
        for _ in range(3):  # first the one, then the other
            try:
                plan_passes(sizes, tree, shapes, memory=memory, ram=ram, **given)
                break
            except Refused as refusal:
                refused += 1
                option, least = re.search(r"(--\w+) .* at least ([\d.]+)GiB", str(refusal)).groups()  # type: ignore[union-attr]
                enough = math.ceil(float(least) * (1 << 30))
                with pytest.raises(Refused):  # 0.02 GiB less is not
                    less = max(0, enough - (1 << 30) // 50)
                    plan_passes(
                        sizes, tree, shapes, memory=less if option == "--memory" else memory,
                        ram=less if option == "--ram" else ram, **given,
                    )  # fmt: skip
                memory, ram = (enough, ram) if option == "--memory" else (memory, enough)
        else:
            pytest.fail(f"{memory} and {ram} were to be enough")
    assert refused > 100


def test_check_says_the_limit_in_the_unit_that_was_given_too() -> None:
    for memory, told in (
        ("24GiB", "the 26 GB (24GiB) of --memory"),
        ("24 GB", "the 24 GB of --memory"),
        (24 << 30, "the 26 GB of"),
    ):
        assert told in check_recipe_file("llama-2-70b", memory=memory)["healing_verdict"]
    on_cpu = check_recipe_file("llama-2-70b", device="cpu", ram="16GiB")
    assert "the 17 GB (16GiB) of --ram" in on_cpu["healing_verdict"]


def test_a_row_that_is_streamed_or_fits_is_not_marked() -> None:
    lines = format_check(check_recipe_file("llama-2-70b", memory="24GB")).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("  does not fit")] == ["heal"]
