"""What the demo model reaches: its four tasks on all items, its loss, and yes/no questions about facts asked in training.

    python benchmarks/demo_scores.py --out benchmarks/demo_scores.json

The tasks ask about held facts: prose tells them in training, no question does. The last number asks in the same words
about the other facts, so that what was learned by heart can be told from what carries over.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from record import write_record

from layerprune.eval.evaluate import evaluate_checkpoint
from layerprune.model.recipes import RECIPES

DEMO = RECIPES / "demo"
TASK = """task: asked_yesno
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_asked(folder: Path, count: int) -> None:
    """A task of yes/no questions about facts that training asks about, half of them true."""
    sys.path.insert(0, str(DEMO))
    import quiz
    from world import Rng

    rng, lines = Rng("demo-scores/asked"), []
    for number in range(count):
        text, _, answer = quiz.passage(rng, "yesno").rpartition(" ")
        lines.append(json.dumps({"prompt": text, "choices": ["yes", "no"], "gold": ["yes", "no"].index(answer)}))
        assert text.endswith("Answer:"), number
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "asked.yaml").write_text(TASK.format(file=folder / "items.jsonl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--out")
    given = parser.parse_args()
    held = evaluate_checkpoint("demo", limit=given.items, device="cpu")
    with tempfile.TemporaryDirectory() as made:
        write_asked(Path(made), given.items)
        tasks = {"asked_yesno": 0}
        asked = evaluate_checkpoint("demo", tasks=tasks, task_folder=made, limit=given.items, loss=False, device="cpu")
    rows = held["tasks"]["table"] + asked["tasks"]["table"]
    shown = {row["task"]: {key: row[key] for key in ("value", "stderr", "n", "chance")} for row in rows}
    shape = {"layers": held["layers"], "parameters": held["parameters"]}
    write_record(given.out, "cpu", shape, {"tasks": shown, "loss": held["loss"]})


if __name__ == "__main__":
    main()
