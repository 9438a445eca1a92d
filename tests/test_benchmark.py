"""The benchmark measures what it says: work counted by hand, peers equal to ours, tables that say all. No timing."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import cpu
from benchmarks.cpu import Row
from benchmarks.cpu_process import (
    PARTS,
    PEERS,
    REST,
    WHOLE,
    Measurement,
    Worker,
    build_peer,
    carried,
    naive_attention,
    parts,
)
from hear_ssam.config import CONFIGS, build_config
from hear_ssam.encoder import Encoder


def test_work_is_counted():
    work = cpu._work("tiny")
    encoder = Encoder(CONFIGS["ssam_tiny"])
    linear = [m for name, m in encoder.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in name]
    patch = encoder.patch_embed.weight.numel() * 250  # the class token is no patch
    flop = 2 * (251 * sum(m.weight.numel() for m in linear if m is not encoder.patch_embed) + patch)
    assert work["flop"] == pytest.approx(flop, rel=1e-3)
    assert work["elements"] == 12 * 251 * 576 * 24


def test_parts_are_all_of_the_time():
    encoder = Encoder(build_config("ssam", 32, depth=2, window_frames=40)).eval()
    spec = torch.randn(1, 40, 80)
    with torch.no_grad():
        found = parts(encoder, lambda: encoder.tokens(spec), time.perf_counter)
    for *several, whole in zip(*(found[part] for part in (*PARTS, REST, WHOLE)), strict=True):
        assert min(several) > 0 and sum(several) == pytest.approx(whole)
    assert set(cpu._products("tiny")) <= set(found)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_the_same(name):
    if name != "selective_scan_ref":
        pytest.importorskip(name, reason=f"{name} is not installed; see `python -m benchmarks cpu --help`")
    torch.manual_seed(0)
    encoder = Encoder(build_config("ssam", 32, depth=1, window_frames=40)).double()
    mixer, x = encoder.blocks[0].mixer, torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight += 0.1 * torch.randn_like(weight)
        torch.testing.assert_close(build_peer(name, mixer).double()(x), mixer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [9, 40])
def test_chunks_with_carried_state_equal_the_whole(length):
    torch.manual_seed(0)
    encoder = Encoder(build_config("ssam", 32, depth=1, window_frames=40))
    mixer, x = encoder.blocks[0].mixer, torch.randn(2, length, 32)
    chunked = carried(mixer)
    with torch.no_grad():
        chunks = torch.cat([chunked(chunk) for chunk in x.split(4, dim=1)], dim=1)
        torch.testing.assert_close(chunks, mixer(x), rtol=1e-5, atol=1e-6)


def test_naive_attention_equals_the_fused_one():
    torch.manual_seed(0)
    attention, x = Encoder(build_config("ssast", 32, depth=1, num_heads=4)).blocks[0].attn, torch.randn(2, 9, 32)
    with torch.no_grad():
        torch.testing.assert_close(naive_attention(attention)(x), attention(x), rtol=1e-5, atol=1e-6)


def test_a_missing_peer_is_a_row_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A real process, in which mambapy cannot be imported."""
    (tmp_path / "mambapy.py").write_text("raise ImportError('No module named mambapy')")
    monkeypatch.syspath_prepend(tmp_path)  # spawned processes inherit it
    (row,) = cpu._one_by_one([Measurement("start", "ssam", "tiny", "mambapy", "fp32", 1)])
    assert row.implementation == "ssam mambapy" and row.ms is None
    assert row.note == "ImportError: No module named mambapy"


def test_tables(tmp_path):
    rows = [
        Row("inference", "tiny", "ssam cpu", "fp32", 20.0, 19.0, 7, error=3e-7, gflop=2.25, floor_ms=16.0),
        Row("inference", "tiny", "ssam mambapy", "fp32", note="ImportError: No module named 'mambapy'"),
    ]
    conditions = cpu.facts(1)
    text = cpu._markdown("inference", cpu._compared(rows), conditions)
    assert "| tiny | ssam cpu | fp32 | 20.0 | 19.0 | 7 | 1.00 | 3e-07 |" in text and "No module named" in text
    assert "peak_mb" not in text  # a column that no row fills
    assert f"torch {torch.__version__}" in conditions["versions"]
    cpu._write(tmp_path, rows, text, conditions)
    (table,) = tmp_path.glob("inference_fp32_*_1-threads_torch-*.csv")
    with open(table, newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["ms"]) == 20 and first["CPU"] == conditions["CPU"] and second["ms"] == ""
    assert table.with_suffix(".md").read_text() == text


def test_error_is_against_float64():
    """One real process, taking no turn: its output is compared with the reference in double precision."""
    with Worker(Measurement("inference", "ssam", "tiny", "torch", "fp32", 1)) as worker:
        assert worker.wait() == ""
        got = worker.ask("output")["tokens"]
    torch.manual_seed(0)
    encoder = Encoder(CONFIGS["ssam_tiny"]).eval()
    spec = torch.randn(1, 200, 80)
    with torch.no_grad():
        want = encoder.double().tokens(spec.double()).numpy()
    assert got.shape == (1, 251, 192) and 0 < abs(got - want).max() / abs(want).max() < 1e-5


def test_wrong_words_are_named(capsys):
    assert benchmarks.main(["cpu", "--sizes", "tiny,smal"]) == 2
    assert "Did you mean 'small'" in capsys.readouterr().err
    assert benchmarks.main(["cpu", "--threads", "0"]) == 2
    assert "--threads must be at least 1, not 0" in capsys.readouterr().err
    assert benchmarks.main(["cpus"]) == 2 and benchmarks.main([]) == 0


def test_what_a_benchmark_lacks_is_named(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "benchmarks.gpu", raising=False)
    assert benchmarks.main(["gpu", "-o", "out"]) == 2
    assert "benchmarks gpu: error: " in (error := capsys.readouterr().err) and "triton" in error


def test_every_benchmark_is_listed_and_described(capsys):
    folder = Path(benchmarks.__file__).parent
    modules = {file.stem for file in folder.glob("*.py") if "\ndef main(" in file.read_text()} - {"__main__"}
    assert modules == set(benchmarks.NAMES)
    assert benchmarks.main(["--help"]) == 0
    listed, readme = capsys.readouterr().out, (folder / "README.md").read_text()
    for name in modules:
        assert f"  {name} " in listed and f"`python -m benchmarks {name}" in readme
    for table in folder.glob("*_torch-*.md"):
        assert "made by: `python -m benchmarks cpu --" in table.read_text()
