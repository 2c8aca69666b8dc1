"""What a healing's record becomes: a figure, a section of the page, a model card."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_page import HOSTILE, OVERLAPS, Browser, assert_valid, browser, make, page  # noqa: F401 (a fixture)
from test_plots import clashes, named

from layerprune.curve import draw_curve, healings, held_out_losses, trained_losses
from layerprune.figures import look, shares, short, spread_apart
from layerprune.heal.card import healed_card
from layerprune.model.files import read_json, write_json
from layerprune.plots import _healing_figure, plot_healing

LAYERS, STEPS, TOKENS = 24, 200, 200 * 4096
NEW = ("held_out", "memory", "teacher", "validation", "order", "documents_apart", "verified")
NEW_SETTINGS = ("adapters", "distil", "bridge", "packing", "merge", "validation", "validation_samples")
CUTS = (("angular", 4, 0.31), ("angular", 8, 0.4), ("last", 8, 1.9))
"""Strategy, depth, and the held-out loss before healing."""


def healing(first: float = 0.4, **settings: Any) -> dict[str, Any]:
    """A record as heal/publish.py writes it; the held-out loss halves."""
    losses = [[step, round(10 * first * (1 - step / 2 / STEPS), 5)] for step in range(2, STEPS + 1, 2)]
    given = {
        "data": "heal.jsonl", "steps": STEPS, "learning_rate": 3e-4, "lora_rank": 8, "dropout": 0.05, "warmup_steps": 20,
        "batch_size": 8, "micro_batch": 4, "length": 512, "targets": [], "seed": 0, "packing": "documents", "adapters": "all",
        "distil": 0.0, "bridge": None, "merge": "weights", "validation": "eval.jsonl", "validation_samples": 128, "lora_alpha": 8,
        **settings,
    }  # fmt: skip
    return {
        "model": "cut", "settings": given, "origin": {**dict.fromkeys(given, "ours"), "steps": "user", "dropout": "paper"},
        "teacher": "the-whole-one" if given["distil"] else None, "quantisation": "NF4, double quantisation, bfloat16 compute",
        "device": "cuda", "processes": 1, "documents_apart": True, "steps": STEPS, "tokens": TOKENS, "documents": 900, "epochs": 1,
        "memory": {"micro_batch": 4, "recomputed": 3, "decoded": 5, "compiled": True, "estimate": 3 << 30, "seconds": 1.0,
                   "peak": 5 << 29},
        "order": "ef" * 32, "validation": {"documents": 128, "hash": "cd" * 32, "left_out": 1234, "measured": 32},
        "modules": ["mlp.up", "mlp.down"],
        "losses": {"first": losses[0][1], "last": losses[-1][1], "curve": losses}, "seconds": {"train": 400.0, "merge": 2.0},
        "held_out": [[step, first * (1 - step / 2 / STEPS)] for step in range(0, STEPS + 1, 40)], "versions": {"layerprune": "1.2"},
    }  # fmt: skip


def older(record: dict[str, Any]) -> dict[str, Any]:
    """The same without what healing did not record before."""
    found = {key: value for key, value in copy.deepcopy(record).items() if key not in NEW}
    found["settings"] = {key: value for key, value in found["settings"].items() if key not in NEW_SETTINGS}
    return found


BRIDGE: dict[str, Any] = {
    "form": "projection", "tokens": 4096, "documents": 8,
    "bridges": [{"tensor": "model.layers.7.mlp.down.weight", "ridge": 0.1, "error": {"cut": 0.5, "bridged": 0.25}}],
}  # fmt: skip


def heal(place: Path, strategy: str, n: int, record: dict[str, Any] | None, **more: Any) -> None:
    kept = [i for i in range(LAYERS) if not 5 <= i < 5 + n]
    place.mkdir(parents=True)
    about = {} if record is None else {"healing": record}
    write_json(place / "layerprune.json", {"strategy": strategy, "layers": LAYERS, "kept": kept, **about, **more})


def swept(folder: Path, records: list[dict[str, Any]] | None = None, **more: Any) -> Path:
    make(folder, LAYERS, tasks=1, items=60)
    records = records or [healing(first) for _, _, first in CUTS]
    for (strategy, n, _), record in zip(CUTS, records, strict=False):
        heal(folder / "heal" / f"{strategy}-{n}" / "healed", strategy, n, record, **more)
    return folder


def found_in(folder: Path) -> list[dict[str, Any]]:
    return healings(folder, read_json(folder / "curve.json"))


def section(html: str) -> str:
    return html.partition('<h2 id="healing">')[2].partition("</section>")[0]


def cells(html: str) -> list[list[str]]:
    table = html.partition('<table id="healings">')[2].partition("</table>")[0]
    return [re.findall(r"<(?:td|th)[^>]*>(.*?)</", line) for line in table.splitlines() if line.startswith('<tr><th scope="row')]


def facts(html: str) -> dict[str, str]:
    """The lists below the table, by their keys."""
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", section(html))
    return {key: re.sub(" +", " ", re.sub("<[^>]*>", " ", value)).strip() for key, value in found}


# What is read


def test_healings_are_read_with_the_losses_that_the_curve_knows(tmp_path: Path) -> None:
    folder = swept(tmp_path / "a")
    heal(folder / "heal" / "last-3" / "healed", "last", 3, None)  # a cut with no record of a healing
    found, rows = found_in(folder), read_json(folder / "curve.json")["rows"]
    assert [(one["strategy"], one["n"]) for one in found] == [("angular", 4), ("angular", 8), ("last", 8)]
    loss = {(r["strategy"], r["n"], r["healed"]): r["loss"] for r in rows}
    assert found[2]["cut"] == loss["last", 8, False] and found[2]["healed"] == loss["last", 8, True] != found[2]["cut"]
    assert {one["whole"] for one in found} == {rows[0]["loss"]}
    curve = {"layers": LAYERS, "rows": rows[:1]}
    assert [one["cut"] for one in healings(folder, curve)] == [None] * 3


def test_a_run_has_one_healing(tmp_path: Path) -> None:
    make(tmp_path / "a", LAYERS, tasks=0)
    assert found_in(tmp_path / "a") == []
    heal(tmp_path / "a" / "healed", "angular", 8, healing())
    assert [one["n"] for one in found_in(tmp_path / "a")] == [8]


def test_losses_stand_against_tokens() -> None:
    one: dict[str, Any] = {"healing": healing(0.4)}
    assert trained_losses(one)[0] == (2 * 4096, 3.98) and trained_losses(one)[-1] == (TOKENS, 2.0)
    assert held_out_losses(one)[0] == (0, 0.4) and held_out_losses(one)[-1] == (TOKENS, 0.2)
    one["healing"]["held_out"][1][1] = math.nan
    assert [x for x, _ in held_out_losses(one)] == [0, *(step * 4096 for step in (80, 120, 160, 200))]
    assert held_out_losses({"healing": older(one["healing"])}) == [] == trained_losses({"healing": {}})


# The figure


def test_the_figure_is_written_where_the_others_are(tmp_path: Path) -> None:
    folder = swept(tmp_path / "a")
    curve = read_json(folder / "curve.json")
    written = draw_curve(folder, curve, None)
    assert {"figures/healing.png", "figures/healing.svg"} <= set(written)
    first = (folder / "figures" / "healing.svg").read_bytes()
    draw_curve(folder, curve, None)
    assert (folder / "figures" / "healing.svg").read_bytes() == first
    assert not [name for name in draw_curve(make(tmp_path / "b", LAYERS, tasks=0), curve, None) if "healing" in name]
    assert plot_healing([{"healing": {}, "strategy": "last", "n": 1}], tmp_path / "c") == []


def figure(folder: Path) -> Any:
    with look():
        return _healing_figure(found_in(folder), "title")


def test_every_healing_has_a_line_and_the_cut_and_the_whole_model_theirs(tmp_path: Path) -> None:
    folder = swept(tmp_path / "a")
    found = found_in(folder)
    left, right = figure(folder).axes
    assert [list(zip(*line.get_data(), strict=True)) for line in named(left, "trained")] == [trained_losses(one) for one in found]
    held = named(right, "held-out")
    assert [list(zip(*line.get_data(), strict=True)) for line in held] == [held_out_losses(one) for one in found]
    assert [line.get_ydata()[0] for line in named(right, "before")] == [one["cut"] for one in found]
    assert [line.get_ydata()[0] for line in named(right, "after")] == [one["healed"] for one in found]
    assert [line.get_ydata()[0] for line in named(right, "whole")] == [found[0]["whole"]]
    assert [line.get_marker() for line in held] == ["o", "o", "s"] and len({line.get_color() for line in held}) == 3
    assert [line.get_color() for line in named(right, "before")] == [line.get_color() for line in held]
    assert [text.get_text() for text in right.texts] == ["4", "8", "8"]
    assert right.get_ylim()[1] < 1.7 and named(right, "above"), "a loss of 1.9 is cut off, and it is said"
    assert right.get_ylim()[0] < found[0]["whole"]


def test_without_held_out_losses_there_is_one_panel(tmp_path: Path) -> None:
    folder = swept(tmp_path / "a", [older(healing(first)) for _, _, first in CUTS])
    assert len(figure(folder).axes) == 1 and named(figure(folder).axes[0], "before") == []


@pytest.mark.parametrize("count", [1, 3])
def test_no_text_of_the_figure_lies_on_another(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = swept(tmp_path / "a", [healing(first) for _, _, first in CUTS][:count])
    assert clashes(figure(folder), monkeypatch) == []


def test_places_are_spread_apart_no_further_than_they_must() -> None:
    assert spread_apart([5, 1, 3], 1) == [5, 1, 3]
    assert spread_apart([2, 2], 1) == [1.5, 2.5] and spread_apart([9, 2, 2, 2], 3) == [9, -1, 2, 5]
    draw = random.Random(0)
    for _ in range(50):
        given = [draw.uniform(0, 10) for _ in range(6)]
        found = spread_apart(given, 1.5)
        ordered = sorted(found)
        assert all(b - a >= 1.5 - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
        assert sorted(range(6), key=lambda i: found[i]) == sorted(range(6), key=lambda i: given[i])
        assert sum(found) == pytest.approx(sum(given))


def test_short_counts_and_shares() -> None:
    assert [short(v) for v in (0, 500, 20_000, 1_500_000, 2e9)] == ["0", "500", "20 k", "1.5 M", "2 B"]
    assert shares([8, 4, 8, 12]) == {4: 0.5, 8: 0.75, 12: 1} and shares([3]) == {3: 1}


# The page


def test_the_page_has_a_row_each_and_the_settings_with_their_origin(tmp_path: Path) -> None:
    html = page(swept(tmp_path / "a"))
    assert_valid(html)
    rows, found = cells(html), found_in(tmp_path / "a")
    assert [row[:2] for row in rows] == [["angular distance", "4"], ["angular distance", "8"], ["last n", "8"]]
    assert rows[1][2:9] == ["200", "819,200", "400", "2,048", "2.5 GiB", "3.980 to 2.000", "0.4000 to 0.2000"]
    assert rows[1][9:] == [f"{found[1]['cut']:.4f}", f"{found[1]['healed']:.4f}"]
    told = facts(html)
    assert (told["steps"], told["LoRA dropout"], told["data"]) == ("200 user", "0.05 paper", "heal.jsonl ours")
    assert told["packing"].startswith("documents joined, none sees another")
    assert told["plan"] == (
        "4 sequences at once; weights kept decoded in 5 layers; activations of 3 layers computed again; layers compiled"
    )
    assert (told["planned peak, at most"], told["measured peak"]) == ("3.0 GiB", "2.5 GiB")
    assert (told["from"], told["documents"], told["of the training data, left out"]) == ("eval.jsonl", "128", "1,234")
    assert "distillation" not in told and "bridge" not in told
    assert section(html).count('class="plot"') == 2 and 'data-panel="2"' in section(html) and 'data-panel="3"' in section(html)
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert len(data["panels"]) == 4 and [row[-1][0] for row in data["panels"][3]["v"]] == [0.155, 0.2, 0.95]


def test_the_page_tells_every_way_of_healing(tmp_path: Path) -> None:
    ways = healing(distil=0.5, adapters="window:4", packing="truncate", merge="nf4")
    told = facts(page(swept(tmp_path / "a", [ways] * 3, bridge=BRIDGE)))
    assert told["distillation"] == "weight 0.5, by the-whole-one ours" and told["bridge"].startswith("projection, fitted on 4,096")
    assert told["adapters in"].startswith("4 layers on each side") and told["merged into"].startswith("the weights as NF4")
    assert told["bridge: squared error"] == "0.500 to 0.250" and told["packing"].startswith("one document a sequence")
    one, other = healing(), healing()
    other["memory"] = {**other["memory"], "decoded": 0, "recomputed": 0, "compiled": False, "peak": None}
    one["documents_apart"] = False
    told = facts(page(swept(tmp_path / "b", [one, other, one])))
    assert "angular distance, n = 8: 4 sequences at once; no weights kept decoded; all activations kept" in told["plan"]
    assert "angular distance, n = 4 and last n, n = 8: 4 sequences" in told["plan"]
    assert "let them see one another" not in told["packing"] and "lets them see one another" in told["packing"]


def test_older_records_are_shown_with_what_they_know(tmp_path: Path) -> None:
    html = page(swept(tmp_path / "a", [older(healing(first)) for _, _, first in CUTS]))
    assert_valid(html)
    assert cells(html)[0][6:9] == ["–", "3.084 to 1.550", "–"]
    told = facts(html)
    assert told["steps"] == "200 user" and not {"plan", "packing", "documents", "adapters in"} & set(told)
    assert section(html).count('class="plot"') == 1 and "The points are measured" not in html
    bare: list[dict[str, Any]] = [{"steps": 1, "tokens": 2}] * 3
    assert_valid(page(swept(tmp_path / "b", bare)))


def test_a_mix_of_old_and_new_records_is_shown(tmp_path: Path) -> None:
    folder = swept(tmp_path / "a", [healing(), older(healing()), healing()])
    html = page(folder)
    assert_valid(html)
    assert [row[8] for row in cells(html)] == ["0.4000 to 0.2000", "–", "0.4000 to 0.2000"]
    assert len(figure(folder).axes) == 2


def test_a_bridge_alone_is_no_training(tmp_path: Path) -> None:
    make(tmp_path / "a", LAYERS, tasks=0)
    heal(tmp_path / "a" / "healed", "angular", 8, None, bridge=BRIDGE)
    html = page(tmp_path / "a")
    assert_valid(html)
    assert cells(html)[0][2:9] == ["–"] * 7 and facts(html)["bridge"] == "projection, fitted on 4,096 tokens"
    assert plot_healing(found_in(tmp_path / "a"), tmp_path / "figures") == []


def test_without_healing_there_is_no_section(tmp_path: Path) -> None:
    html = page(make(tmp_path / "a", LAYERS, tasks=1, items=40))
    assert 'id="healing"' not in html and 'id="healings"' not in html


def test_strings_of_a_record_are_escaped(tmp_path: Path) -> None:
    record = healing(data=HOSTILE, validation=HOSTILE)
    html = page(swept(tmp_path / "a", [{**record, "modules": [HOSTILE], "quantisation": HOSTILE, "device": HOSTILE}] * 3))
    assert "<script>alert" not in html and "<b>" not in html and html.count("<script") == 2


def test_a_cut_far_above_is_said_and_not_drawn(tmp_path: Path) -> None:
    folder = swept(tmp_path / "a")
    curve = read_json(folder / "curve.json")
    for row in curve["rows"]:
        if (row["strategy"], row["n"], row["healed"]) == ("last", 8, False):
            row["loss"] = 7.25
    write_json(folder / "curve.json", curve)
    html = section(page(folder))
    assert "above the picture: the cut, 7.25 with n\u00a0=\u00a08" in html and html.count('class="before" d="M44') == 2


def test_the_healed_checkpoints_have_lines_where_the_curve_has_their_losses(tmp_path: Path) -> None:
    folder = swept(tmp_path / "a")
    html = section(page(folder)).partition('data-panel="3"')[2]
    drawn = [float(y) for y in re.findall(r'class="after" d="M44 ([\d.]+)H426"', html)]
    marks = [(float(y) - 4, float(text)) for y, text in re.findall(r'x="38" y="([\d.]+)" text-anchor="end">([\d.]+)<', html)]
    (bottom, low), (top, high) = marks[0], marks[-1]
    expected = [bottom + (one["healed"] - low) / (high - low) * (top - bottom) for one in found_in(folder)]
    assert drawn == pytest.approx(expected, abs=0.2) and len(drawn) == 3
    assert "the healed checkpoint, as written" in section(page(folder))
    curve = read_json(folder / "curve.json")
    write_json(folder / "curve.json", {**curve, "rows": [row for row in curve["rows"] if not row["healed"]]})
    html = section(page(folder))
    assert 'class="after"' not in html and "the healed checkpoint, as written" not in html


def test_the_caption_tells_documents_and_weights_of_every_number(tmp_path: Path) -> None:
    folder = swept(tmp_path / "a")
    html = section(page(folder))
    assert "32 of the 128 held-out documents of eval.jsonl, with the weights in NF4" in html
    assert "the checkpoints as written: up to 128 documents of my data.jsonl" in html and "are not those of the horizontal" in html
    same = swept(tmp_path / "b", [healing(validation="my data.jsonl")] * 3)
    assert "of the 128 held-out documents of my data.jsonl," in section(page(same))
    assert "are not those of the horizontal" not in section(page(same))
    other = healing(validation="my data.jsonl")
    other["validation"] = {**other["validation"], "measured": 31}
    html = section(page(swept(tmp_path / "c", [healing(validation="my data.jsonl"), other, healing(validation=None)])))
    assert "some of the 128 held-out documents of my data.jsonl and the training data" in html
    assert "are not those of the horizontal" in html


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = swept(tmp_path_factory.mktemp("healed") / "a")
    page(folder)
    yield folder


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_section_fits_and_nothing_overlaps(browser: Browser, healed: Path, width: int, theme: str) -> None:  # noqa: F811
    browser.open(healed / "report.html", width, theme)
    assert browser.wider_than_the_window() <= 0
    assert browser.js(OVERLAPS) == []
    assert browser.complaints() == []


def test_pointing_at_a_healing_tells_its_loss(browser: Browser, healed: Path) -> None:  # noqa: F811
    browser.open(healed / "report.html")
    plot = "svg[data-panel='3']"
    browser.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", plot)
    x, y = browser.js(
        "const p = document.querySelector(arguments[0] + ' .angular-healed .dots');"
        "const [x, y] = p.getAttribute('d').split('M')[3].replace('h0', '').split(' ').map(Number);"
        "const at = new DOMPoint(x, y).matrixTransform(p.getScreenCTM()); return [at.x, at.y]",
        plot,
    )
    browser.point(x, y)
    said = browser.tip()
    assert said is not None
    lines = [line.split("\t") for line in said.splitlines()]
    assert lines[0] == ["327,680 tokens trained"]
    assert lines[1:] == [["angular distance, n = 4", "0.2480"], ["angular distance, n = 8", "0.3200"], ["last n, n = 8", "1.5200"]]
    assert browser.complaints() == []


# The model card


def card(record: dict[str, Any], tmp_path: Path, **more: Any) -> str:
    cut = {"source": "/x/base", "kept": [0, 1], "dropped": "2:4", "layers": 4, **more}
    return " ".join(healed_card({**cut, "healing": record}, "healed", tmp_path).split())


def test_the_card_tells_how_it_was_healed(tmp_path: Path) -> None:
    text = card(healing(distil=0.5, adapters="after"), tmp_path)
    assert "on mlp.up, mlp.down, in the layers after the cut |" in text
    assert "| distillation | from `the-whole-one`, weight 0.5; the training loss holds its part |" in text
    assert "| held-out loss | 0.4000 at first, 0.2000 at last (nats a token / ln V), in training |" in text
    assert "128 of `eval.jsonl`, none of them trained on (1,234 of the training data left out for that); hash cdcdcdcd" in text
    assert "documents one after another, none sees another |" in text and "into the checkpoint's own weights |" in text
    assert "- Only those layers' weights differ from the checkpoint that was healed; all else is its bytes." in text
    assert "in 4 layers on each side of the cut |" in card(healing(adapters="window:4"), tmp_path)
    apart = {**healing(), "documents_apart": False}
    assert "each sees those before it in its sequence |" in card(apart, tmp_path)
    assert "QLoRA on the linear layers attention" in card(healing(targets=["attention"]), tmp_path)


def test_the_card_says_what_else_a_merge_into_nf4_changes(tmp_path: Path) -> None:
    text = card(healing(merge="nf4"), tmp_path)
    assert "Only those layers' weights differ" not in text
    assert (
        "- The linear layers that training held in NF4 are written as NF4 decodes them, with the adapter in those above; "
        "all else is the bytes of the checkpoint that was healed."
    ) in text


def test_the_card_says_what_a_bridge_changes(tmp_path: Path) -> None:
    tensor = "folded into `model.layers.7.mlp.down.weight` (bridge, form `projection`)."
    text = card(healing(bridge="projection"), tmp_path, bridge=BRIDGE)
    assert tensor in text and "| bridge | projection, by least squares before the training |" in text
    assert "- Only those layers' weights, and what the bridge changed, differ from the cut; all else is its bytes." in text
    text = card(healing(bridge="projection", merge="nf4"), tmp_path, bridge=BRIDGE)
    assert "with the adapter in those above; but for the bridge, all else is the bytes of the cut." in text
    text = card(healing(), tmp_path, bridge=BRIDGE)  # a cut that was bridged before, with the bridge in what was healed
    assert tensor in text and "- Only those layers' weights differ from the checkpoint that was healed;" in text
    nothing = {**BRIDGE, "bridges": [{**BRIDGE["bridges"][0], "ridge": None}]}
    text = card(healing(bridge="projection"), tmp_path, bridge=nothing)
    assert "folded" not in text and "- Only those layers' weights differ from the checkpoint that was healed;" in text


def test_the_card_of_an_older_record_says_what_it_knows(tmp_path: Path) -> None:
    text = card(older(healing()), tmp_path)
    assert "| training loss | 3.980 at first, 2.000 at last (nats a token) | - Only those layers' weights differ" in text
    for word in ("held-out", "packing", "merge |", "bridge", "distillation"):
        assert word not in text
    assert healed_card({"source": "/x/base", "healing": older(healing())}, "healed", tmp_path).count("\n\n\n") == 0
