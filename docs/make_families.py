"""Write docs/families.md: every family and block of tests/families.py, cut and checked.

python docs/make_families.py        (about three minutes on one core, no network)
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import families

Outcomes = Mapping[str, Mapping[str, str | None]]
"""family -> block -> None for right, else the reason of the refusal."""

PAGE = """# Families

Which decoder families a cut is right for. Written by `docs/make_families.py`, checked by `tests/test_families.py`, with
transformers {version}.

Each row is a tiny random checkpoint of {layers} layers in the layout that the Hub has for this family. From each, blocks are
cut {blocks}. *Right* means: the written checkpoint
loads with no missing and no unexpected key; its logits are, bit for bit in fp32 on the CPU, those of the source with the
block skipped; every layer is built like the one it came from; and greedy generation with a cache gives the same tokens as
without. *Refused* means that nothing is written, and the number leads to the reason.

{right} of {all} rows are right for every block.

| Family | model_type | {heads} | Layout |
|---|---|{dashes}|---|
{rows}

## Reasons

{reasons}
"""


def render(outcomes: Outcomes) -> str:
    """The page for these outcomes."""
    import transformers

    numbers: dict[str, int] = {}
    rows = []
    for name, cells in outcomes.items():
        family = families.FAMILIES[name]
        shown = []
        for reason in cells.values():
            number = numbers.setdefault(reason, len(numbers) + 1) if reason else 0
            shown.append(f"refused ({number})" if reason else "right")
        rows.append(f"| {name} | `{family.model_type}` | {' | '.join(shown)} | {family.note} |")
    return PAGE.format(
        version=transformers.__version__,
        layers=families.LAYERS,
        blocks=", ".join(f"at the {where} ({block})" for where, block in families.BLOCKS.items()).replace("at the next", "next"),
        right=sum(not any(cells.values()) for cells in outcomes.values()),
        all=len(outcomes),
        heads=" | ".join(families.BLOCKS),
        dashes="---|" * (len(families.BLOCKS) - 1) + "---",
        rows="\n".join(rows),
        reasons="\n".join(f"{number}. {reason}" for reason, number in numbers.items()),
    )


def main() -> None:
    outcomes: dict[str, dict[str, str | None]] = {}
    for name in families.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            source = families.build(name, Path(folder) / "source")
            outcomes[name] = {
                where: families.try_block(source, block, Path(folder) / block.replace(":", "-"))
                for where, block in families.BLOCKS.items()
            }
        print(name, *(f"{where}: {reason or 'right'}" for where, reason in outcomes[name].items()), sep="\n  ", file=sys.stderr)
    (Path(__file__).parent / "families.md").write_text(render(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
