"""The page of `layerprune depth`: what it says for any subset of probes, and how it looks in a headless browser."""

from __future__ import annotations

import base64
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from test_page import HOSTILE, Browser, assert_valid, browser  # noqa: F401 (a fixture)

from layerprune.depth_page import write_depth_page
from layerprune.depths import format_depth, probe_depth
from layerprune.figures import look, new_figure, save
from layerprune.model.errors import Refused
from layerprune.model.files import write_json

KNOWN = [
    "residual", "lens", "tuned", "tokens", "words", "answers", "choices", "skip", "erasure", "gradients", "prunability",
]  # fmt: skip
EFFECTIVE = {
    "cos": {"layer": None, "ratio": None}, "kl": {"layer": 10, "ratio": 11 / 24}, "overlap": {"layer": 17, "ratio": 0.75},
}  # fmt: skip


def make(folder: Path, probes: list[str], labels: tuple[str, ...] = ("tiny",), manifest: bool = True) -> tuple[Any, Any]:
    """A depth folder with a figure a probe: the content of depth.json, and the probes' values."""
    folder.mkdir(parents=True)
    names = []
    for number, probe in enumerate(probes):
        with look():
            figure = new_figure(9.2, 3)
            figure.subplots(1, 2)[0].plot([number, 1, 2])
            names += [str(p.relative_to(folder)) for p in save(figure, folder / "figures", probe)]
    models = [{"label": label, "model": f"models/{label}", "layers": 24, "effective_depth": EFFECTIVE} for label in labels]
    found = {label: {probe: {"kl": [1.0, 0.5], "tokens": 1536} for probe in probes} for label in labels}
    if manifest:
        inputs = {"kind": "depth", "models": dict.fromkeys(labels, "ab" * 32), "data": dict.fromkeys(labels, "cd" * 32),
                  "samples": 16, "lengths": dict.fromkeys(labels, 96), "seed": 7, "dtype": "float32"}  # fmt: skip
        given = {"models": list(labels), "data": {labels[0]: "/x/layerprune/recipes/tiny/data.jsonl"}}
        write_json(folder / "manifest.json", {"given": given, "inputs": inputs, "versions": {"torch": "2.13.0"}, "done": {}})
    return {"models": models, "probes": probes, "reference": False, "figures": names}, found


def page(folder: Path, made: tuple[Any, Any]) -> str:
    """The page's text; it is whole, and outside its pictures nothing says that a value is missing."""
    path = write_depth_page(folder, *made)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>") and html.endswith("</html>\n")
    assert_valid(re.sub(r"<img [^>]*>", "", html))
    return html


def sources(html: str) -> list[tuple[str, bytes]]:
    """Media type and bytes of every picture."""
    found = re.findall(r'<img src="([^"]*)"', html)
    return [(s[5:].partition(";")[0], base64.b64decode(s.partition("base64,")[2])) for s in found]


def settings(html: str) -> dict[str, str]:
    return dict(re.findall(r"<div><dt>([^<]*)</dt><dd>([^<]*)</dd></div>", html.partition('id="settings"')[2]))


@pytest.mark.parametrize("probes", [KNOWN, ["lens"], ["skip", "lens"], [], ["strange"]])
def test_every_probe_has_a_section_in_order(tmp_path: Path, probes: list[str]) -> None:
    made = make(tmp_path / "a", probes)
    html = page(tmp_path / "a", made)
    expected = [(tmp_path / "a" / "figures" / f"{probe}.svg").read_bytes() for probe in probes]
    assert sources(html) == [("image/svg+xml", data) for data in expected]
    assert all(ElementTree.fromstring(data).tag.endswith("svg") for _, data in sources(html))
    assert re.findall(r'alt="[^"]*: ([^"]*)"', html) == probes
    assert html.count('<p class="reading">') == sum(probe in KNOWN for probe in probes)
    assert [f"tiny/{probe}.json" for probe in probes] == re.findall(r"Numbers: <code>([^<]*)</code>", html)


def test_readings_say_what_nothing_and_one_mean(tmp_path: Path) -> None:
    html = page(tmp_path / "a", make(tmp_path / "a", KNOWN))
    readings = re.findall(r'<p class="reading">(.*?)</p>', html)
    assert len(set(readings)) == len(KNOWN)
    assert all(re.search(r"\b0\b", reading) for reading in readings)
    assert all(reading.count(". ") == 0 and reading.endswith(".") for reading in readings), "one sentence each"


def test_the_table_is_that_of_depth_json(tmp_path: Path) -> None:
    result, found = make(tmp_path / "a", ["lens"], ("tiny", "other"))
    result["models"][1] |= {"effective_depth": None, "notes": ["the prompt is 'A & B'", "two"]}
    html = page(tmp_path / "a", (result, found))
    table = html.partition('<table id="depth">')[2].partition("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in table.splitlines()]
    assert [row for row in rows if row] == [["24", "none", "10 (0.46)", "17 (0.75)"], ["24", "–", "–", "–"]]
    assert re.findall("<li>(.*?)</li>", html) == ["other: the prompt is &#39;A &amp; B&#39;", "other: two"]
    assert "tiny, other: 1,536 tokens." in html
    assert "The first layer from which on" in html and "The first layer at which" not in html
    html = page(tmp_path / "a", ({**result, "reference": True}, found))
    assert "The first layer at which" in html and "The first layer from which on" not in html


def test_settings_and_versions(tmp_path: Path) -> None:
    html = page(tmp_path / "a", make(tmp_path / "a", ["lens"]))
    told = settings(html)
    assert told["models"] == "tiny"
    assert re.findall("<dt>data: tiny</dt><dd>(.*?)</dd>", html) == ["tiny/data.jsonl", "cdcdcdcdcdcd…"]
    assert (told["documents"], told["tokens of a document, at most: tiny"], told["tokens: tiny"]) == ("16", "96", "1,536")
    assert (told["seed"], told["dtype"], told["torch"], told["checkpoint: tiny"]) == ("7", "float32", "2.13.0", "abababababab…")
    assert "kind" not in told
    html = page(tmp_path / "b", make(tmp_path / "b", ["lens"], manifest=False))
    assert list(settings(html)) == ["tokens: tiny"]
    result, found = make(tmp_path / "d", ["lens", "answers"])
    found["tiny"]["answers"]["tokens"] = 99_999  # not of the documents
    assert settings(page(tmp_path / "d", (result, found)))["tokens: tiny"] == "1,536"
    (tmp_path / "b" / "manifest.json").write_text("{")
    with pytest.raises(Refused, match="not valid JSON"):
        write_depth_page(tmp_path / "b", *make(tmp_path / "c", ["lens"]))


def test_what_was_asked_and_counted_stands_with_its_probe(tmp_path: Path) -> None:
    result, found = make(tmp_path / "a", ["erasure", "choices", "skip"])
    found["tiny"]["skip"] = {variant: {"documents": 8, "tokens": 2000, "mean": {"output": [0.5]}} for variant in ("all", "future")}
    found["tiny"]["erasure"] = {"asked": {"prompt": "Salt is", "answer": None}, "documents": 2048}
    found["tiny"]["choices"] = {"quiz": {"items": 40, "mass": [0.5]}, "facts": {"items": 1234}}
    html = page(tmp_path / "a", (result, found))
    assert "prompt “Salt is”, 2,048 documents. Numbers" in html
    assert "quiz: 40 items, facts: 1,234 items. Numbers" in html
    assert "all: 8 documents and 2,000 tokens, future: 8 documents and 2,000 tokens. Numbers" in html


def test_values_of_any_shape_do_no_harm(tmp_path: Path) -> None:
    result, found = make(tmp_path / "a", ["strange"])
    found["tiny"]["strange"] = {"asked": [1, 2], "tokens": None, "items": True, "documents": 2.5, "part": {"tokens": [3]}, "a": "b"}
    assert '<p class="hint">Numbers:' in page(tmp_path / "a", (result, found))


def test_figures_go_to_their_probe_or_to_the_end(tmp_path: Path) -> None:
    result, found = make(tmp_path / "a", ["lens", "lens-tuned", "lens-tuned-2", "lensing", "odd"])
    result["probes"] = ["odd", "lens-tuned", "lens"]
    (tmp_path / "a" / "figures" / "odd.svg").unlink()
    (tmp_path / "a" / "figures" / "lens.svg").unlink()
    (tmp_path / "a" / "figures" / "lens.png").unlink()
    found["tiny"] = {probe: {} for probe in result["probes"]}
    html = page(tmp_path / "a", (result, found))
    shown = re.findall(r'alt="([^"]*)"', html)
    assert shown == ["odd: odd", "lens-tuned: lens-tuned", "lens-tuned: lens-tuned-2", "More figures: lensing"]
    kind, data = sources(html)[0]
    assert kind == "image/png" and data == (tmp_path / "a" / "figures" / "odd.png").read_bytes()


def test_strings_are_escaped(tmp_path: Path) -> None:
    result, found = make(tmp_path / "a", ["lens"])
    result["models"][0] |= {"label": HOSTILE, "model": "<i>" + HOSTILE, "notes": [HOSTILE]}
    result["probes"] = ["lens", "<u>" + HOSTILE]
    found = {HOSTILE: {"lens": {"asked": {"prompt": HOSTILE}, "tokens": 3}, "<u>" + HOSTILE: {"tokens": 4}}}
    manifest = {"given": {HOSTILE: HOSTILE}, "inputs": {HOSTILE: {HOSTILE: HOSTILE}}, "versions": {HOSTILE: HOSTILE}}
    write_json(tmp_path / "a" / "manifest.json", manifest)
    html = page(tmp_path / "a", (result, found))
    assert not re.search(r"<(script|b|i|u)>", html) and "&lt;script&gt;alert" in html
    assert not re.search(r"""(src|href|style)=["'](?!data:)""", html)


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", ["lens"]), make(tmp_path / "b", ["lens"])
    assert page(tmp_path / "a", first) == page(tmp_path / "b", second) == page(tmp_path / "a", first)
    assert not list((tmp_path / "a").glob(".*partial"))


def test_probe_depth_leaves_the_page_and_says_so(tiny_llama: Path, documents_file: Path, tmp_path: Path) -> None:
    def probe(*names: str) -> str:
        result = probe_depth(
            tiny_llama, probes=names, eval_data=str(documents_file), samples=6, length=20, seed=3, device="cpu", out=tmp_path / "a",
            say=lambda line: None,
        )  # fmt: skip
        assert f"{tmp_path / 'a'}: report.html, depth.json, " in format_depth(result)
        return (tmp_path / "a" / "report.html").read_text(encoding="utf-8")

    html = probe("lens")
    assert settings(html)["seed"] == "3" and f"<dd>{documents_file}</dd>" in html
    assert re.findall(r'alt="[^"]*: ([^"]*)"', html) == ["lens"] and "<td>5</td><td>–</td>" in html
    # the same folder again, with more probes: the page is of them all
    html = probe("lens", "residual")
    assert re.findall(r'alt="[^"]*: ([^"]*)"', html) == ["residual", "lens"] and "<td>5</td><td>–</td>" not in html
    (tmp_path / "a" / "report.html").unlink()
    assert probe("lens", "residual") == html


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_and_its_figures_are_shown(browser: Browser, tmp_path: Path, width: int, theme: str) -> None:  # noqa: F811
    labels = ("tiny", "a-model-with-a-name-that-is-rather-long-3.1-405b")
    page(tmp_path / "a", make(tmp_path / "a", ["lens", "residual"], labels))
    shutil.rmtree(tmp_path / "a" / "figures")  # the page needs nothing beside it
    browser.open(tmp_path / "a" / "report.html", width, theme)
    assert browser.wider_than_the_window() <= 0
    seen = browser.js("return [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.getBoundingClientRect().width])")
    assert len(seen) == 2 and all(shown and wide >= 600 for shown, wide in seen)
    assert browser.complaints() == []
