"""What `make demo` takes after installation, phase by phase, and what comes out.

    python benchmarks/demo_time.py --out benchmarks/demo_time.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "layerprune", "run", "--model", "demo", "--drop", "0.4"]
        started = time.perf_counter()
        subprocess.run(call, cwd=folder, check=True)
        seconds = time.perf_counter() - started
        manifest = json.loads((Path(folder) / "runs" / "demo-angular-0.4" / "manifest.json").read_text())
    result = manifest["result"]
    shape = {"layers": result["layers"], "parameters": result["rows"][0]["parameters"]}
    rows = [
        {"model": row["model"], "loss": row["loss"], "tasks": {name: t["value"] for name, t in row["tasks"].items()}}
        for row in result["rows"]
    ]
    write_record(given.out, "cpu", shape, {"seconds": round(seconds, 1), "phases": manifest["done"], "rows": rows})


if __name__ == "__main__":
    main()
