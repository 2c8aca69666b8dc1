"""The README's picture: the demo run with all items of its tasks and more depths.

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

CALL = "run --model demo --drop 0.4 --limit 1000 --curve 0.05,0.1,0.15,0.2,0.25,0.3,0.35,0.5,0.6"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "layerprune", *CALL.split()], cwd=folder, check=True)
        made = Path(folder) / "runs" / "demo-angular-0.4"
        curve = json.loads((made / "curve.json").read_text())
        if given.picture:
            shutil.copyfile(made / "figures" / "curve.png", given.picture)
    rows = [
        {
            **{key: row[key] for key in ("n", "fraction", "healed", "loss")},
            "dropped": sorted(set(range(curve["layers"])) - set(row["kept"])),
            "tasks": row["tasks"],
        }
        for row in curve["rows"]
    ]
    write_record(given.out, "cpu", {"layers": curve["layers"], "run": f"layerprune {CALL}"}, {"rows": rows})


if __name__ == "__main__":
    main()
