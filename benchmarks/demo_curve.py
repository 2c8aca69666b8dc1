"""The README's picture: the demo model at every depth, on all items of its tasks, healed at a quarter.

    python benchmarks/demo_curve.py --out benchmarks/demo_curve.json --picture docs/demo-curve.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from record import write_record

CALL = "sweep --model demo --limit 1000 --heal 0.25"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "layerprune", *CALL.split()], cwd=folder, check=True)
        made = Path(folder) / "runs" / "demo-sweep"
        curve = json.loads((made / "curve.json").read_text())
        found = json.loads((made / "collapse.json").read_text())["series"]
        if given.picture:
            shutil.copyfile(made / "figures" / "curve.png", given.picture)
    rows = [
        {
            **{key: row[key] for key in ("strategy", "n", "fraction", "healed", "loss")},
            "dropped": sorted(set(range(curve["layers"])) - set(row["kept"])),
            "tasks": row["tasks"],
        }
        for row in curve["rows"]
    ]
    series = {
        name: {task: data["transition"] for task, data in one["tasks"].items()} | {"recommendation": one["recommendation"]}
        for name, one in found.items()
    }
    write_record(given.out, "cpu", {"layers": curve["layers"], "run": f"layerprune {CALL}"}, {"rows": rows, "collapse": series})


if __name__ == "__main__":
    main()
