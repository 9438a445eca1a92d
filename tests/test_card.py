"""The command that writes results into cards and README.md."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from hear_ssam.checkpoint import load_checkpoint
from hear_ssam.config import CONFIGS
from hear_ssam.demo import TASK
from hear_ssam.evaluation.records import append
from hear_ssam.paths import shipped

card = runpy.run_path(str(shipped("checkpoints") / "card.py"))
WEIGHTS = shipped("checkpoints") / "ssam_tiny.safetensors"


def record(model: str, digest: str, task: str, score: float, probe: str = "exact") -> dict[str, Any]:
    place = {"model": model, "checkpoint_sha256": digest, "task": task, "version": "2", "protocol": "heareval"}
    how = {"probe": probe, "seed": 42, "fold": None, "metric": "top1_acc", "clips": 400}
    return {**place, **how, "score": score, "primary": True, "maximize": True}


@pytest.fixture()
def place(tmp_path: Path) -> Path:
    """A checkpoint with a card, a README, results of the demo and of a private task."""
    shutil.copy(WEIGHTS, tmp_path / "x.safetensors")
    (tmp_path / "x.md").write_text("# x\n\n## Training\n\nBy hand.\n")
    (tmp_path / "README.md").write_text("before\n<!-- made by checkpoints/card.py -->\nold\n<!-- end -->\nafter\n")
    own, task = load_checkpoint(WEIGHTS)[2]["sha256"], "birds-v1-full"
    rows = [record("x", own, TASK, 0.5), record("logmel", "", TASK, 0.25), record("x", "older", TASK, 0.99)]
    rows += [record("x", own, TASK, 0.6, "logreg"), record("logmel", "", TASK, 0.3, "logreg")]
    rows += [record("x", own, TASK, 0.98, "knn")]  # of one model alone: no row of README
    append(tmp_path / "demo" / "records.jsonl", rows)
    append(tmp_path / "private" / "records.jsonl", [record("x", own, task, 0.61), record("logmel", "", task, 0.33)])
    return tmp_path


def run(place: Path, *arguments: str) -> int:
    options = ["--checkpoint", str(place / "x.safetensors"), "--readme", str(place / "README.md")]
    return card["main"]([*map(str, arguments), *options])


def test_results_stand_between_the_marks_and_private_ones_in_the_card_alone(place: Path) -> None:
    command = str(place / "demo"), "--private", str(place / "private")
    assert run(place, *command) == 0
    readme, text = ((place / name).read_text() for name in ("README.md", "x.md"))
    assert "| exact | 50.0 ± 2.5 | 25.0 ± 2.2 |" in readme and "| logreg | 60.0 ± 2.4 | 30.0 ± 2.3 |" in readme
    assert "98.0" not in readme and "| probe | `x` | `logmel` |" in readme
    assert readme.startswith("before\n") and readme.endswith("<!-- end -->\nafter\n") and "old" not in readme
    assert "birds" not in readme and "99.0" not in readme + text
    assert text.startswith("# x\n\n## Training\n\nBy hand.\n\n## How it does\n")
    before, after = text.split("private development pack")
    assert "**50.0** | 25.0" in before and "**61.0** | 33.0" in after and "birds" not in before
    (place / "x.md").write_text(text + "\nA remark.\n")
    assert run(place, *command) == 0  # the same again: nothing changes, what was added by hand stays
    assert (place / "x.md").read_text() == text + "\nA remark.\n" and (place / "README.md").read_text() == readme


def test_windows_and_hours_are_those_of_all_trainings() -> None:
    first = {"clips_seen": 36_800, "wall_minutes": 60.0}
    second = {"clips_seen": 1_000, "wall_minutes": 90.0, "init": first}
    info = {"training": {"clips_seen": 200, "wall_minutes": 30.0, "init": {"sha256": "", "training": second}}}
    for model, seconds in ("ssam_tiny", "2"), ("ssamba_tiny", "10.24"):
        want = f"The encoder saw 38,000 windows of {seconds} s in 3.0 hours."
        assert card["heard"](info, CONFIGS[model]) == want


def test_the_card_of_equal_trainings_knows_the_shipped_one() -> None:
    text = WEIGHTS.with_name("equal.md").read_text("utf-8")
    said = card["heard"](load_checkpoint(WEIGHTS)[2], CONFIGS["ssam_tiny"]) + text
    numbers = re.search(r"saw ([\d,]+) windows.*saw (\d+) times.*\| ssam_tiny.equal \| ([\d,]+) of", said, re.DOTALL)
    assert numbers is not None
    shipped_windows, times, windows = (int(number.replace(",", "")) for number in numbers.groups())
    assert abs(shipped_windows / windows / times - 1) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: (place / "README.md").write_text("no marks"), "README.md: lacks the lines <!-- made by"),
        (lambda place: shutil.rmtree(place / "demo"), "demo"),
        (lambda place: (place / "demo/records.jsonl").write_text(""), "demo: holds no result of these weights"),
        (lambda place: shutil.copytree(place / "private", place / "demo", dirs_exist_ok=True), f"hold no {TASK}"),
    ],
)
def test_what_cannot_be_written_changes_nothing(place: Path, capsys, change, message) -> None:
    change(place)
    before = (place / "README.md").read_text(), (place / "x.md").read_text()
    assert run(place, str(place / "demo"), "--private", str(place / "private")) == 2
    assert message in capsys.readouterr().err
    assert ((place / "README.md").read_text(), (place / "x.md").read_text()) == before
