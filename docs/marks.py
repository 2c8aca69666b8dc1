"""What the scripts that fill the pages share: records of benchmarks/, and the text between a page's marks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def filled_page(page: str, blocks: Mapping[str, str]) -> str:
    """The page with each block between `<!-- name -->` and the next `<!-- end -->`; a name that the page lacks is an error."""
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        assert re.search(pattern, page, re.DOTALL), f"the page has no mark {name}"
        page = re.sub(pattern, lambda found, block=block: f"{found[1]}{block}\n{found[2]}", page, flags=re.DOTALL)
    return page
