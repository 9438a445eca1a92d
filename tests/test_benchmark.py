"""The benchmark measures what it says: work counted by hand, peers equal to ours, tables that say all. No timing."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

from hear_ssam import benchmark, cli
from hear_ssam.benchmark import Row
from hear_ssam.benchmark_process import PEERS, Task, Worker, build_peer, prepare
from hear_ssam.config import CONFIGS, build_config
from hear_ssam.encoder import Encoder


def test_work_is_counted():
    work = benchmark._work("tiny")
    encoder = Encoder(CONFIGS["ssam_tiny"])
    linear = [m for name, m in encoder.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in name]
    patch = encoder.patch_embed.weight.numel() * 250  # the class token is no patch
    flop = 2 * (251 * sum(m.weight.numel() for m in linear if m is not encoder.patch_embed) + patch)
    assert work["flop"] == pytest.approx(flop, rel=1e-3)
    assert work["elements"] == 12 * 251 * 576 * 24


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_the_same(name):
    if name != "selective_scan_ref":
        pytest.importorskip(name, reason=f"{name} is not installed; see `hear-ssam benchmark --help`")
    torch.manual_seed(0)
    encoder = Encoder(build_config("ssam", 32, depth=1, window_frames=40)).double()
    mixer, x = encoder.blocks[0].mixer, torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight += 0.1 * torch.randn_like(weight)
        torch.testing.assert_close(build_peer(name, mixer).double()(x), mixer(x), rtol=1e-5, atol=1e-6)


def test_missing_peer_is_a_row_not_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mambapy", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "mambapy.mamba", None)
    with pytest.raises(ImportError):
        prepare(Task("inference", "ssam", "tiny", "mambapy", "fp32", torch.get_num_threads()), 0.0)
    worker = Worker.__new__(Worker)
    worker.task, worker.failed = Task("inference", "ssam", "tiny", "mambapy", "fp32", 1), "No module named 'mambapy'"
    row = benchmark._row(worker, None, {})
    assert row.ms is None and "mambapy" in row.note


def test_tables(tmp_path):
    rows = [
        Row("inference", "tiny", "ssam cpu", "fp32", 20.0, 19.0, 7, error=3e-7, gflop=2.25, floor_ms=16.0),
        Row("inference", "tiny", "ssam mambapy", "fp32", note="ImportError: No module named 'mambapy'"),
    ]
    conditions = benchmark._conditions(1)
    text = benchmark._markdown("inference", benchmark._compared(rows), conditions)
    assert "| tiny | ssam cpu | fp32 | 20.0 | 19.0 | 7 | 1.00 | 3e-07 |" in text and "No module named" in text
    assert "peak_mb" not in text  # a column that no row fills
    assert f"torch {torch.__version__}" in conditions["versions"]
    benchmark._write(tmp_path, rows, text, conditions)
    (table,) = tmp_path.glob("inference_fp32_*_1-threads_torch-*.csv")
    with open(table, newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["ms"]) == 20 and first["CPU"] == conditions["CPU"] and second["ms"] == ""
    assert table.with_suffix(".md").read_text() == text


def test_error_is_against_float64():
    """One real process, taking no turn: its output is compared with the reference in double precision."""
    with Worker(Task("inference", "ssam", "tiny", "torch", "fp32", 1)) as worker:
        assert worker.wait() == ""
        got = worker.ask("output")["tokens"]
    torch.manual_seed(0)
    encoder = Encoder(CONFIGS["ssam_tiny"]).eval()
    spec = torch.randn(1, 200, 80)
    with torch.no_grad():
        want = encoder.double().tokens(spec.double()).numpy()
    assert got.shape == (1, 251, 192) and 0 < abs(got - want).max() / abs(want).max() < 1e-5


def test_wrong_words_are_named(capsys):
    assert cli.main(["benchmark", "--sizes", "tiny,smal"]) == 2
    assert "small" in capsys.readouterr().err
    assert cli.main(["benchmark", "--threads", "0"]) == 2
