"""Memory that may be taken: the machine's, or the control group's where that is less."""

from pathlib import Path

import pytest

from layerprune.model import memory


def test_a_groups_limit_counts_less_what_it_uses_and_cannot_give_back(tmp_path: Path) -> None:
    limit, used, stat = (tmp_path / name for name in ("max", "current", "stat"))
    limit.write_text("16000\n")
    used.write_text("9000\n")
    stat.write_text("anon 1\ninactive_file 3000\nactive_file 7\n")
    assert memory._of_group(limit, used, stat, "inactive_file") == 16000 - 9000 + 3000
    limit.write_text("max\n")
    assert memory._of_group(limit, used, stat, "inactive_file") > 1 << 60
    assert memory._of_group(tmp_path / "none", used, stat, "inactive_file") > 1 << 60


def test_a_limit_counts_with_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 9 << 30)
    assert memory.host_room(None) == memory.host_room(None, 1 << 30) == 9 << 30, "what is free is free"
    assert memory.host_room(4 << 30, 1 << 30) == (3 << 30) - memory.PROCESS_BYTES
    assert memory.host_room(40 << 30) == 9 << 30 and memory.host_room(1 << 20) == 0


def test_the_lesser_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.available_memory()
    assert 1 << 20 < whole < 1 << 50
    monkeypatch.setattr(memory, "_of_group", lambda *files: 5 << 20)
    assert memory.available_memory() == 5 << 20
