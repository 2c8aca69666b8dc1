"""The report page: what it says, read back from its text, and from its DOM in a headless browser."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerprune.curve import write_curve
from layerprune.eval.collapse import accuracy_interval
from layerprune.model.cuts import drop_count
from layerprune.model.errors import Refused
from layerprune.model.files import read_json, write_json
from layerprune.page import _fraction, write_report
from layerprune.report import format_collapse

HOSTILE = "<script>alert('x')</script><b>\"&"
LONG = "hella_with_a_very_long_name"
TASKS = {"arc": (0.25, 0.6), LONG: (0.25, 0.75), "boolq": (0.6, 0.8), "mmlu": (0.25, 0.7), "piqa": (0.5, 0.8), "wino": (0.5, 0.7)}
"""Chance and the level of the whole model."""


def measured(layers: int, strategy: str, n: int, healed: bool, tasks: int, items: int) -> dict[str, Any]:
    """A row whose tasks fall from their level to chance at a third of the layers, later where healed."""
    fraction, found, answers = n / layers, {}, {}
    for k, (name, (chance, level)) in enumerate(list(TASKS.items())[:tasks]):
        cliff = 0.33 + 0.02 * k + 0.12 * healed + 0.05 * (strategy == "last")
        accuracy = chance + (level - chance) / (1 + math.exp((fraction - cliff) * 60))
        correct = (np.random.default_rng(k).random(items) < accuracy).astype(int)
        low, high = accuracy_interval(correct)
        source = "majority class" if name == "boolq" else "choices"
        score = {"value": float(correct.mean()), "stderr": 0.02, "n": items, "chance": chance, "chance_from": source}
        found[f"{name}/acc"] = {**score, "low": low, "high": high}
        answers[f"{name}/acc"] = "".join(map(str, correct))
    start = layers - 1 - n if strategy == "last" else (layers - n) // 2
    return {
        "strategy": strategy, "n": n, "fraction": fraction, "healed": healed, "parameters": 10**9 + 10**8 * (layers - n),
        "kept": [i for i in range(layers) if not start <= i < start + n], "tasks": found, "items": answers,
        "loss": 0.2 + 0.9 / (1 + math.exp((0.6 + 0.1 * (strategy == "last") - fraction) * 20)) - 0.1 * fraction * healed,
    }  # fmt: skip


def make(folder: Path, layers: int = 24, tasks: int = 2, items: int = 400, healed: bool = True, model: str = "tiny") -> Path:
    """A sweep folder of synthetic numbers, with the project's own verdict."""
    rows = [measured(layers, "angular", 0, False, tasks, items)]
    rows += [
        measured(layers, strategy, n, h, tasks, items)
        for strategy in ("angular", "last") for h in ([False, True] if healed else [False]) for n in range(1, layers)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    write_curve(folder, model, layers, rows, 0.95)
    distance = [
        [0.02 * math.sqrt(n) * (1.4 - s / layers) + 0.2 * (s + n == layers) for s in range(layers - n + 1)]
        for n in range(1, layers)
    ]
    write_json(
        folder / "rank.json",
        {"layers": layers, "distance": distance, "best": {str(n): row.index(min(row)) for n, row in enumerate(distance, 1)}},
    )
    inputs = {
        "kind": "sweep", "checkpoint": "ab" * 32, "rank": {"data": "cd" * 32, "samples": 256, "length": 512}, "task_folder": None,
        "loss": {"data": "ef" * 32, "samples": 128, "length": 512}, "limit": items, "seed": 7, "dtype": "auto", "device": "cpu",
    }  # fmt: skip
    asked = {
        "strategies": ["angular", "last"], "drops": list(range(1, layers)), "heal": [], "heal_settings": None,
        "tasks": dict.fromkeys(list(TASKS)[:tasks], 5), "keep": 0.95,
    }  # fmt: skip
    given = {
        "model": model,
        "revision": None,
        "calibration": "/somewhere/layerprune/recipes/tiny/c.jsonl",
        "eval_data": "my data.jsonl",
    }
    write_json(
        folder / "manifest.json",
        {"given": given, "inputs": inputs, "versions": {"torch": "2.9"}, "done": {"rank": 1.5}, "asked": asked},
    )
    return folder


def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def head(html: str) -> str:
    found = re.search(r'<h1 id="verdict">(.*?)</h1>', html)
    assert found
    return found[1]


def points(html: str) -> str:
    return html.partition('<dl class="points">')[2].partition("</dl>")[0]


class Checker(HTMLParser):
    """Open elements are closed in order, and no id comes twice."""

    void = {"meta", "link"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.faults: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def assert_valid(html: str) -> None:
    checker = Checker()
    checker.feed(html)
    assert not checker.faults and not checker.open and len(set(checker.ids)) == len(checker.ids)
    said = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.S)
    assert not re.findall(r"\b(None|NaN|nan|Infinity|inf|undefined)\b", said)


@pytest.mark.parametrize("layers", [2, 3, 8, 24])
def test_the_page_is_whole_and_says_no_none(tmp_path: Path, layers: int) -> None:
    html = page(make(tmp_path / "a", layers, items=40))
    assert_valid(html)
    assert html.startswith("<!doctype html>") and html.endswith("</html>\n")


def test_the_verdict_is_the_one_of_collapse_json(tmp_path: Path) -> None:
    html = page(make(tmp_path / "a"))
    verdict = read_json(tmp_path / "a" / "collapse.json")["verdict"]
    assert verdict["status"] == "cut"
    assert head(html) == f"Drop {verdict['n']} of 24 layers"
    strategy = verdict["series"].split()[0]
    option = re.search(r"--drop ([0-9.]+) --strategy (\w+)", points(html))
    assert option and drop_count(float(option[1]), 24) == verdict["n"] and option[2] == strategy
    start = 23 - verdict["n"] if strategy == "last" else (24 - verdict["n"]) // 2
    assert f"<code>{start}:{start + verdict['n']}</code>" in points(html)
    assert f"{100 * verdict['retained']:.1f} % of its accuracy above chance" in points(html)
    assert f"{100 * verdict['low']:.1f} % to {100 * verdict['high']:.1f} %" in points(html)


def test_too_few_items_are_not_decided_and_the_page_says_what_would_decide(tmp_path: Path) -> None:
    html = page(make(tmp_path / "a", items=40))
    series = read_json(tmp_path / "a" / "collapse.json")["series"]
    assert {one["recommendation"]["n"] for one in series.values()} == {0}
    assert head(html).startswith("Not decided: no cut is shown to keep 95 %")
    likely = max(one["recommendation"]["likely"] for one in series.values())
    assert f"{likely} of 24 layers could go" in points(html) and "--limit" in points(html)


def test_a_task_that_fails_at_once_is_no_cut(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", healed=False, tasks=1)
    collapse = read_json(folder / "collapse.json")
    for one in collapse["series"].values():
        one["recommendation"] |= {"status": "no cut", "n": 0, "likely": 0, "why": "It falls."}
    write_json(folder / "collapse.json", collapse)
    html = page(folder)
    assert head(html) == "No measured cut keeps 95 % of the accuracy above chance"
    assert "It falls." in points(html) and "--drop" not in points(html)


def test_without_tasks_the_loss_speaks(tmp_path: Path) -> None:
    html = page(make(tmp_path / "a", tasks=0))
    losses = [one["loss"] for one in read_json(tmp_path / "a" / "collapse.json")["series"].values()]
    assert head(html) == f"By the loss alone: at most {max(loss['from_n'] for loss in losses)} of 24 layers"
    assert "No task was measured." in points(html)
    assert_valid(html)


def loss_page(folder: Path, losses: list[float]) -> tuple[str, str]:
    """The page and the terminal's words of a sweep by `last` that measured nothing but these losses, from n = 0 on."""
    layers = len(losses)
    rows = [{**measured(layers, "last", n, False, 0, 0), "loss": loss} for n, loss in enumerate(losses)]
    folder.mkdir()
    write_curve(folder, "tiny", layers, rows, 0.95)
    return page(folder), "\n".join(format_collapse(read_json(folder / "collapse.json")))


def test_a_loss_that_wears_out_evenly_offers_no_cut(tmp_path: Path) -> None:
    even = [0.4 + 0.03 * n for n in range(30)]  # above 1 from n = 21 on
    jump = [*even, 1.3, 3.0]  # and the largest jump at the last layer, where nothing is left
    for name, losses in (("jump", jump), ("late", [*even[:16], 0.95, 0.96])):  # "late": a cliff after 0.45 of 0.6
        html, terminal = loss_page(tmp_path / name, losses)
        assert head(html) == "Not decided: the loss rises evenly, no cliff"
        assert "--drop" not in points(html) and "parameters" not in points(html)
        assert "no recommendation: the loss rises evenly, no cliff" in terminal and "by the loss alone" not in terminal
        assert terminal.count("o task was measured") == 1 and terminal.endswith("; give --tasks A,B to measure some.")
        assert_valid(html)


def test_a_cliff_of_the_loss_is_offered_whatever_follows_it(tmp_path: Path) -> None:
    losses = [0.4 + 0.01 * n for n in range(12)] + [1.2 + 0.01 * n for n in range(19)] + [5.0]
    html, terminal = loss_page(tmp_path / "a", losses)
    assert head(html) == "By the loss alone: at most 11 of 32 layers" and "--drop" in points(html)
    assert "by the loss alone: at most 11 of 32 layers (last)" in terminal


def test_only_the_curve_is_needed(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    for path in folder.iterdir():
        if path.name != "curve.json":
            path.unlink()
    html = page(folder)
    assert_valid(html)
    assert head(html).startswith("Not decided") and 'id="command"' not in html and "data-heat" not in html
    (folder / "curve.json").unlink()
    with pytest.raises(Refused, match="curve.json does not exist"):
        write_report(folder)


def test_holes_in_the_numbers_are_dashes(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    text = (folder / "curve.json").read_text()
    curve = json.loads(text)
    for row in curve["rows"][3:30]:
        row["loss"] = [None, math.nan, math.inf][row["n"] % 3]
        row["tasks"]["arc/acc"] |= {"value": math.nan, "low": None, "high": None}
        del row["tasks"][f"{LONG}/acc"]
    (folder / "curve.json").write_text(json.dumps(curve))
    assert_valid(page(folder))


def test_a_run_shows_its_own_cut(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", healed=False)
    row = {"task": "arc", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4, "chance": 0.25, "majority": None}
    tasks = {"table": [row], "items": {"arc/acc": [1, 1, 0, 0]}}
    n = read_json(folder / "collapse.json")["verdict"]["n"]
    sizes = {"whole": (24, 240, 126.8), "pruned": (24 - n, 140, 204.2), "healed": (24 - n, 130, 199.9)}
    write_json(
        folder / "eval.json",
        {
            name: {"layers": count, "parameters": size * 10**7, "bytes": size * 10**7, "loss": {"normalised": 0.3}, "tasks": tasks,
                   "speed": {"tokens_per_second": speed}}
            for name, (count, size, speed) in sizes.items()
        },
    )  # fmt: skip
    (folder / "healed").mkdir()
    (folder / "healed" / "layerprune.json").write_text('{"serving": "anything that serves it"}')
    html = page(folder)
    assert_valid(html)
    table = html.partition('<table id="steps">')[2].partition("</table>")[0]
    assert [re.findall(r"<td>(.*?)</td>", line) for line in table.splitlines() if "tokens/s" in line] == [
        ["126.8", "204.2", "199.9"]
    ]
    assert "42 % of the bytes (1.40 GB stay); 126.8 to 204.2 tokens/s when generating" in points(html)
    assert "vllm serve healed" in html and "Served by: anything that serves it." in html and "layerprune prune" not in html


def test_strings_are_escaped(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", model=HOSTILE)
    text = (folder / "curve.json").read_text().replace("arc/acc", "</script><i>/acc")
    (folder / "curve.json").write_text(text)
    (folder / "collapse.json").write_text((folder / "collapse.json").read_text().replace("arc/acc", "</script><i>/acc"))
    html = page(folder)
    assert "<script>alert" not in html and "<b>" not in html and "<i>" not in html and "&lt;script&gt;alert" in html
    assert html.count("<script") == html.count("</script>") == 2


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert page(first) == page(second) == page(first)
    assert not list(first.glob("*.partial"))


def test_the_largest_page_is_small(tmp_path: Path) -> None:
    html = page(make(tmp_path / "a", layers=80, tasks=6, items=200))
    assert len(html.encode()) < 600_000
    assert html.count('data-panel="') == 7 and html.count('<tr><th scope="row">') == 1 + 4 * 79 + 4


def test_the_command_makes_the_folder_again(tmp_path: Path) -> None:
    from layerprune.cli import main

    folder = make(tmp_path / "a", items=400)

    def parsed() -> dict[str, Any]:
        found = re.search(r'<code id="command">(.*?)</code>', page(folder))
        assert found
        words = shlex.split(found[1].replace("&#39;", "'"))
        assert words[0] == "layerprune"
        command = main.commands[words[1]]  # type: ignore[attr-defined]
        return dict(command.make_context(words[1], words[2:]).params)

    sweep = parsed()
    assert (sweep["model"], sweep["tasks"], sweep["limit"], sweep["seed"]) == (
        "tiny",
        f"arc:5,{LONG}:5",
        400,
        7,
    )
    assert (sweep["eval_data"], sweep["calibration"], sweep["drops"]) == ("my data.jsonl", None, None)
    assert (sweep["samples"], sweep["length"], sweep["device"]) == (None, 512, "cpu")
    manifest = read_json(folder / "manifest.json")
    del manifest["inputs"]["kind"], manifest["asked"]
    manifest["inputs"] |= {"drop": 0.4, "strategy": "last", "curve": [2, 10], "tasks": {"arc": None}, "heal": None, "keep": 0.9}
    write_json(folder / "manifest.json", manifest)
    run = parsed()
    assert (run["drop"], run["strategy"], run["tasks"], run["no_heal"], run["keep"]) == (0.4, "last", "arc", True, 0.9)
    assert [drop_count(float(f), 24) for f in run["curve"].split(",")] == [2, 10]


def test_the_shortest_fraction_gives_the_depth() -> None:
    assert _fraction(10, 24) == "0.4" and _fraction(1, 2) == "0.5"
    for layers in (2, 3, 7, 24, 32, 80, 126):
        assert [drop_count(float(_fraction(n, layers)), layers) for n in range(1, layers)] == list(range(1, layers))


# In a browser

_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


class Browser:
    """Headless Chromium, with what it complains of."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def open(self, path: Path, width: int = 1400, theme: str = "light") -> None:
        self.width = width
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
        self.complaints()
        self.driver.get(path.as_uri())

    def complaints(self) -> list[str]:
        """Console errors, and requests for anything but a file of ours, since the last call."""
        found = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        pages = 0
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                pages += url.endswith("report.html")
                if not url.startswith("data:") and not url.endswith("report.html"):
                    found.append(url)
        return found + ["the page asks for itself"] * (pages > 1)

    def js(self, code: str, *args: Any) -> Any:
        return self.driver.execute_script(code, *args)

    def text(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0]).textContent", selector)).strip()

    def middle(self, selector: str) -> tuple[float, float]:
        x, y = self.js(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();return [b.x + b.width / 2, b.y + b.height / 2]",
            selector,
        )
        return x, y

    def point(self, x: float, y: float) -> None:
        """A real movement of the mouse, to a place in the window."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        actions = ActionBuilder(self.driver)
        actions.pointer_action.move_to_location(round(x), round(y))
        actions.perform()

    def tip(self) -> str | None:
        return self.js("const t = document.getElementById('tip'); return t.hidden ? null : t.innerText")  # type: ignore[no-any-return]

    def wider_than_the_window(self) -> int:
        found = self.js(
            "const d = document.documentElement; return d.scrollWidth - Math.min(d.clientWidth, arguments[0])", self.width
        )
        return int(found)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        if os.environ.get("LAYERPRUNE_BROWSER") == "required":
            pytest.fail("LAYERPRUNE_BROWSER=required, but chromium and chromedriver are not installed")
        pytest.skip("no chromium and chromedriver")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    made = {layers: tmp_path_factory.mktemp("pages") / str(layers) for layers in (8, 24, 80)}
    for layers, folder in made.items():
        write_report(make(folder, layers, tasks=6 if layers == 80 else 2, items=200 if layers == 80 else 400))
    return made


def test_the_browser_shows_the_numbers(browser: Browser, folders: dict[int, Path]) -> None:
    browser.open(folders[24] / "report.html")
    curve, collapse = read_json(folders[24] / "curve.json"), read_json(folders[24] / "collapse.json")
    assert browser.text("#verdict") == f"Drop {collapse['verdict']['n']} of 24 layers"
    cells = browser.js(
        "return [...document.querySelectorAll('#table tbody tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
    )
    assert len(cells) == len(curve["rows"])
    row = next(r for r in curve["rows"] if (r["strategy"], r["n"], r["healed"]) == ("last", 7, True))
    shown = next(c for c in cells if c[:2] == ["last n, healed", "7"])
    score = row["tasks"]["arc/acc"]
    assert shown[2:4] == ["29.2 %", "16:23"] and shown[5] == f"{row['loss']:.4f}"
    assert shown[6].split() == [f"{score['value']:.3f}", f"{score['low']:.3f}", "to", f"{score['high']:.3f}"]
    assert browser.complaints() == []


def test_pointing_at_a_point_of_a_curve_tells_its_values(browser: Browser, folders: dict[int, Path]) -> None:
    browser.open(folders[24] / "report.html")
    plot = "svg[data-panel='0']"
    browser.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", plot)
    row = next(
        r for r in read_json(folders[24] / "curve.json")["rows"] if (r["strategy"], r["n"], r["healed"]) == ("angular", 8, False)
    )
    score = row["tasks"]["arc/acc"]
    # The place of the point by the ticks alone: n = 0 and 10 below, accuracy 0 and 1 at the left.
    zero, ten = (browser.middle(f"{plot} text[data-n='{n}']")[0] for n in (0, 10))
    x = zero + 0.8 * (ten - zero)
    rules = browser.js("return [...document.querySelectorAll(arguments[0] + ' .rule')].map(r => r.getBoundingClientRect().y)", plot)
    y = rules[0] + score["value"] * (rules[-1] - rules[0])
    drawn = browser.js(
        "const p = document.querySelector(arguments[0] + ' .angular .line'); const at = new DOMPoint(arguments[1], arguments[2])"
        ".matrixTransform(p.getScreenCTM().inverse()); p.style.strokeDasharray = 'none'; return p.isPointInStroke(at)",
        plot, x, y,
    )  # fmt: skip
    assert drawn, "the line does not go through its point"
    assert browser.tip() is None
    browser.point(x, y)
    said = browser.tip()
    assert said is not None and said.startswith("8 of 24 layers dropped (33.3 %)")
    line = next(part for part in said.splitlines() if part.startswith("angular distance 8:16"))
    assert line.split()[3:] == [f"{score['value']:.4f}", f"{score['low']:.3f}", "to", f"{score['high']:.3f}"]
    assert len(said.splitlines()) == 5
    browser.point(2, 2)
    assert browser.tip() is None
    assert browser.complaints() == []


def test_the_keyboard_tells_the_values_too(browser: Browser, folders: dict[int, Path]) -> None:
    from selenium.webdriver import ActionChains, Keys

    browser.open(folders[24] / "report.html")
    browser.js("document.querySelector(\"svg[data-panel='1']\").focus()")
    ActionChains(browser.driver).send_keys(Keys.ARROW_RIGHT * 3, Keys.ARROW_LEFT).perform()
    said = browser.tip()
    assert said is not None and said.startswith("2 of 24 layers dropped")
    assert browser.js("return document.activeElement.getAttribute('aria-valuetext')").startswith(
        "2 of 24 layers dropped (8.3 %); angular"
    )
    ActionChains(browser.driver).send_keys(Keys.ESCAPE).perform()
    assert browser.tip() is None
    browser.js("document.querySelector('svg[data-heat]').focus()")
    ActionChains(browser.driver).send_keys(Keys.END, Keys.ARROW_UP).perform()
    assert str(browser.tip()).startswith("layers 22:24")


@pytest.mark.parametrize("layers", [24, 80])
def test_pointing_at_a_block_tells_its_distance(browser: Browser, folders: dict[int, Path], layers: int) -> None:
    browser.open(folders[layers] / "report.html")
    browser.js("document.querySelector('svg[data-heat]').scrollIntoView({block: 'center'})")
    ticks = browser.js(
        "return [...document.querySelectorAll('svg[data-heat] text')].map(t => { const b = t.getBoundingClientRect();"
        "return [t.textContent, t.getAttribute('text-anchor'), b.x + b.width / 2, b.y + b.height / 2] })"
    )
    start, x = next((int(t[0]), t[2]) for t in ticks if t[1] == "middle" and t[0] not in "0" and t[0].isdigit())
    size, y = next((int(t[0]), t[3]) for t in ticks if t[1] == "end")
    browser.point(x, y)
    distance = read_json(folders[layers] / "rank.json")["distance"][size - 1][start]
    said = browser.tip()
    assert said is not None and said.startswith(f"layers {start}:{start + size}")
    assert said.split()[-1] == f"{distance:.4f}"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("layers", [8, 80])
def test_it_fits_and_nothing_overlaps(browser: Browser, folders: dict[int, Path], layers: int, width: int, theme: str) -> None:
    browser.open(folders[layers] / "report.html", width, theme)
    assert browser.wider_than_the_window() <= 0
    assert browser.js("return innerWidth") == width
    assert (browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (theme == "light")
    assert browser.js(OVERLAPS) == []
    plot = "svg[data-panel='0']"
    browser.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", plot)
    browser.point(*browser.middle(plot))
    box = browser.js("const b = document.getElementById('tip').getBoundingClientRect(); return [b.width, b.left, b.right]")
    assert box[0] > 100 and box[1] >= 0 and box[2] <= width
    assert browser.js("const t = document.getElementById('tip'); return t.scrollWidth - t.clientWidth") <= 0
    assert browser.complaints() == []


OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll("svg.plot")) {
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  const frame = svg.getBoundingClientRect();
  texts.forEach(([a, p], i) => {
    if (p.left < frame.left - 1 || p.right > frame.right + 1 || p.bottom > frame.bottom + 1) found.push(a + " leaves the picture");
    for (const [b, q] of texts.slice(i + 1))
      if (p.left < q.right && q.left < p.right && p.top + 2 < q.bottom && q.top + 2 < p.bottom) found.push(a + " on " + b);
  });
}
return found;
"""


def test_the_header_of_the_table_stays(browser: Browser, folders: dict[int, Path]) -> None:
    browser.open(folders[80] / "report.html")
    place = (
        "return document.querySelector('#table thead th').getBoundingClientRect().y"
        "- document.querySelector('.tall').getBoundingClientRect().y"
    )
    before = browser.js(place)
    browser.js("document.querySelector('.tall').scrollTop = 800")
    assert browser.js("return document.querySelector('.tall').scrollTop") == 800 and browser.js(place) == before


@pytest.mark.parametrize(
    "planted",
    ["<script>boom()</script>", "<img src='http://127.0.0.1:9/x.png'>", "<link rel='stylesheet' href='x.css'>",
     "<script>fetch('http://127.0.0.1:9/').catch(() => 0)</script>"],
)  # fmt: skip
@pytest.mark.parametrize("policy", [True, False])
def test_the_checks_see_what_they_are_for(
    browser: Browser, folders: dict[int, Path], tmp_path: Path, planted: str, policy: bool
) -> None:
    html = (folders[8] / "report.html").read_text().replace("</body>", f"{planted}<div style='width: 3000px'>x</div></body>")
    (tmp_path / "report.html").write_text(html if policy else re.sub("<meta http-equiv=[^\n]*\n", "", html))
    for width in (390, 1400):
        browser.open(tmp_path / "report.html", width)
        assert browser.complaints() != []
        assert browser.wider_than_the_window() > 0


def test_that_no_task_was_measured_is_said_once_for_all_series(tmp_path: Path) -> None:
    def told(name: str, tasks: int) -> str:
        return "\n".join(format_collapse(read_json(make(tmp_path / name, tasks=tasks) / "collapse.json")))

    without = told("without", 0)
    assert without.count("loss rises most") > 1 and without.count("o task was measured") == 1 and "--tasks" in without
    both = told("with", 1)
    assert "o task was measured" not in both and "give --tasks" not in both
