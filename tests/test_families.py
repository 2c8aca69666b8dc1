"""A written cut is right for every family and block, or refused with the reason; docs/families.md says which."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scripts import load_script

DOCS = Path(__file__).parents[1] / "docs"


torch.set_num_threads(1)
table = load_script("docs/make_families.py")
families = table.families
Cell = Callable[[str, str], str | None]


def known(name: str) -> bool:
    from transformers import CONFIG_MAPPING

    return families.FAMILIES[name].model_type in CONFIG_MAPPING


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint of a family, built once; its own generation agrees with and without cache."""
    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        from layerprune.model.load import load_model

        if name not in made:
            folder = families.build(name, tmp_path_factory.mktemp("family") / "source")
            model = load_model(folder, device="cpu", dtype="float32")
            assert families.greedy(model, True) == families.greedy(model, False), f"{name}: the source disagrees with itself"
            made[name] = folder
        return made[name]

    return source


@pytest.fixture(scope="session")
def cell(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """The outcome of one family and block, computed once: None for right, else the reason of the refusal."""
    found: dict[tuple[str, str], str | None] = {}

    def outcome(name: str, where: str) -> str | None:
        if (name, where) not in found:
            folder = tmp_path_factory.mktemp("cut")
            found[name, where] = families.try_block(sources(name), families.BLOCKS[where], folder / "out")
            shutil.rmtree(folder)
        return found[name, where]

    return outcome


@pytest.mark.parametrize("where", families.BLOCKS)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_cut_is_right_or_refused(cell: Cell, name: str, where: str) -> None:
    if not known(name):
        pytest.skip(f"this transformers has no {families.FAMILIES[name].model_type}")
    reason = cell(name, where)
    if reason is not None:
        assert re.fullmatch(r"[^\n]{40,500}", reason), reason
        assert "/" not in reason.replace("1 / (", ""), f"a reason is about the model, not about a path: {reason}"


def test_thirty_families_are_right_for_every_block(cell: Cell) -> None:
    right = [n for n in families.FAMILIES if known(n) and all(cell(n, w) is None for w in families.BLOCKS)]
    kinds = {families.FAMILIES[n].model_type for n in right}
    assert len(kinds) >= 30, kinds


def test_the_table_in_the_docs_is_current(cell: Cell) -> None:
    import transformers

    text = (DOCS / "families.md").read_text(encoding="utf-8")
    made_with = re.search(r"transformers (\S+)\.\n", text)
    assert made_with is not None
    if made_with[1] != transformers.__version__:
        pytest.skip(f"the table was made with transformers {made_with[1]}")
    outcomes = {n: {w: cell(n, w) for w in families.BLOCKS} for n in families.FAMILIES}
    assert text == table.render(outcomes), "run docs/make_families.py"


def test_a_wrong_cut_is_seen(sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: a cut whose kept layers are swapped, behind proofs that see nothing."""
    from layerprune.model import verify
    from layerprune.prune import cut

    plan = cut.plan_cut

    def swapped(*arguments: object) -> object:
        made = plan(*arguments)
        for old, new in made.renamed.items():
            made.renamed[old] = re.sub(r"layers\.([01])\.", lambda m: f"layers.{1 - int(m[1])}.", new)
        return made

    monkeypatch.setattr(cut, "plan_cut", swapped)
    monkeypatch.setattr(verify, "prove_logits", lambda *arguments: None)
    with pytest.raises(AssertionError, match="logits differ"):
        families.try_block(sources("Llama"), "5:7", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "block", "anywhere"),
    [("Llama", "2:5", True), ("SmolLM3", "4:8", True), ("SmolLM3", "2:5", False), ("Gemma-3", "2:5", False)],
)
def test_a_broken_period_is_told(name: str, block: str, anywhere: bool, sources: Callable[[str], Path]) -> None:
    from layerprune.prune.cut import prune_checkpoint

    told = prune_checkpoint(sources(name), None, layers=block, dry_run=True, say=lambda line: None)["serving"]
    assert (told == "anything that serves the source's family") is anywhere, told
