"""README: its Python runs, its commands are today's commands, and those that take a moment run too."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from hear_ssam import cli
from hear_ssam.checkpoint import save_checkpoint
from hear_ssam.config import CONFIGS
from hear_ssam.encoder import Encoder
from hear_ssam.evaluation.records import append

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)

# They install, need the network, or are this test command.
OTHERS = ("python3 -m venv", "pip install", ".venv/bin/pip install", ".venv-test/bin/pip install")
TESTS = ".venv-test/bin/python -m tests"
QUICK = ("embed", "classify", "search", "map", "tasks", "report", "models", "doctor", "corpus")


def commands() -> list[list[str]]:
    """Every command of the shell blocks as words, without remarks."""
    found: list[list[str]] = []
    for line in "\n".join(text for language, text in BLOCKS if language == "bash").splitlines():
        found.append([])
        for word in shlex.split(line, comments=True):
            if word == "&&":
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]


OWN = [words[1:] for words in commands() if Path(words[0]).name == "hear-ssam"]


def test_blocks_are_python_or_shell() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    others = [shlex.join(words) for words in commands() if Path(words[0]).name != "hear-ssam"]
    assert all(line.startswith(OTHERS) or line == TESTS for line in others), others
    assert len(OWN) > 15


@pytest.mark.parametrize("words", OWN, ids=" ".join)
def test_every_command_is_parsed(words: list[str]) -> None:
    assert callable(cli.build_parser().parse_args(words).run)


def test_commands_in_the_text_exist() -> None:
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`hear-ssam ([a-z]+)", text)
    assert named and set(named) <= set(cli.COMMANDS)
    scripts = re.findall(r"`python -m benchmarks ([a-z]+)", text)
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in scripts)


def record(model: str, score: float) -> dict[str, Any]:
    place = {"model": model, "checkpoint_sha256": "", "task": "birds", "version": "1", "protocol": "heareval"}
    how = {"probe": "exact", "seed": 42, "fold": None, "metric": "top1_acc"}
    return {**place, **how, "score": score, "primary": True, "maximize": True}


def test_quick_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recordings").mkdir()
    noise = np.random.default_rng(0).normal(0, 0.1, (44_100, 2))
    for name in ("recordings/a.wav", "recordings/b.flac", "recordings/c.wav", "query.wav"):
        soundfile.write(name, noise, 44_100)
    for name in [f"{kind}/{i}" for kind in ("dog", "rain") for i in range(5)]:
        Path("sounds", name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(f"sounds/{name}.wav", noise[:22_050], 44_100)
    append(Path("out/records.jsonl"), [record("ssam_tiny", 0.6), record("logmel", 0.5)])
    quick = [words for words in OWN if words[0] in QUICK and "fetch" not in words]
    assert {words[0] for words in quick} == set(QUICK)
    for words in quick:
        assert cli.main(words) == 0, words
    assert all(
        Path(name).is_file() for name in ("embeddings.parquet", "report.html", "kinds.csv", "moments.csv", "map.html")
    )
    assert Path("store").is_dir() and Path("windows").is_dir()


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its remarks on shapes and steps are true."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEAR_SSAM_CACHE", str(tmp_path))  # with what stands for weights that were fetched
    config = dataclasses.replace(CONFIGS["ssamba_tiny"], depth=2, token_order="official", pooling="mean")
    save_checkpoint(tmp_path / "ssamba_tiny.400.safetensors", config, Encoder(config).state_dict(), {})
    Path("recordings").mkdir()
    for name in ("speech_16k.wav", "recordings/a.wav", "recordings/b.flac"):
        soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, 40_000), 16_000)
    code = "\n".join(text for language, text in BLOCKS if language == "python")
    values: dict[str, Any] = {}
    for line in code.splitlines():
        exec(line, values)
        if shape := re.search(r"^(\w+) = .* # \((\d+), (\d+)\)", line):
            assert values[shape[1]].shape == (int(shape[2]), int(shape[3])), line
    (width,) = re.findall(r"# \(clips, (\d+)\)$", code, flags=re.MULTILINE)
    ((row, step),) = re.findall(r"# \(clips, rows, (\d+)\), .* (\d+) ms$", code, flags=re.MULTILINE)
    assert values["scene"].shape == (1, int(width))
    assert values["frames"].shape == (1, values["ms"].shape[1], int(row))
    assert (values["ms"].diff() - int(step)).abs().max() < 1e-3
