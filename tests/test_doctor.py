"""`hear-ssam doctor` tells the truth about this machine."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from hear_ssam import cli
from hear_ssam.paths import sha256, shipped
from hear_ssam.scan import available_backends


@pytest.fixture(scope="module")
def report() -> dict:
    from hear_ssam.doctor import examine

    return json.loads(json.dumps(examine()))


def test_versions(report: dict) -> None:
    assert report["versions"]["torch"] == torch.__version__
    assert platform.python_version() in report["versions"]["python"]


def test_every_backend_runs_or_says_why_not(report: dict) -> None:
    backends = report["scan_backends"]
    assert backends["reference"] == backends["torch"] == "runs"
    for name, reason in available_backends().items():
        assert backends[name] == (reason or "runs")


def test_weights_by_their_hash(report: dict) -> None:
    files = list(shipped("checkpoints").glob("*.safetensors"))
    assert len(report["weights"]) == len(files)
    for file in files:
        assert sha256(file) in report["weights"][str(file)]


def test_text_says_the_same(report: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for entries in report.values():
        for name, value in entries.items():
            assert name in text and str(value) in text


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {
        "versions", "cpu", "devices", "scan_backends", "weights", "hear_tools",
    }  # fmt: skip
