"""The studies: what a cell may and may not do, what is counted, what the pages say of rows; trainings marked slow."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ablations, cells, comparison, cpu, scaling
from hear_ssam import HearSsamError, config
from hear_ssam.audio import Clip
from hear_ssam.encoder import Encoder
from hear_ssam.pretraining.store import build_store
from hear_ssam.scan import use_backend
from tests.tiny_tasks import write_task

FAKE = """
from benchmarks.cells import timed
KEYS = ("kind",)

def spin(_):
    while True: pass

def measure(cell):
    open(cell["_log"], "a").write(cell["kind"] + "\\n")
    yield {"known": 1}
    if cell["kind"] == "large": bytearray(int(4e9))
    if cell["kind"] == "slow": timed(spin, limit=cell["limit_s"])
    if cell["kind"] == "broken": raise ValueError("oh")
    if cell.get("_meanwhile"): open(cell["_meanwhile"], "a").write("other,1,,\\n")
    yield {"found": 2}

def page(rows, folder):
    return f"{len(rows)} rows"
"""


def test_cells_end_cleanly_and_are_not_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "README.md").write_text("before\n")
    args = cells.parser("fake", "").parse_args(["-o", str(tmp_path)])
    log = tmp_path / "log"
    work = [{"kind": kind, "_log": str(log)} for kind in ("good", "large", "slow", "broken")]

    def run(gigabytes: float) -> dict[str, cells.Row]:
        assert cells.run("fake", work, args, lambda cell: 0, limit_s=0.1, limit_gb=gigabytes) == 1  # broken
        return {row["kind"]: row for row in cells.read(tmp_path / "fake.csv")}

    rows = run(3.0)
    assert {kind: (row["ended"], row["known"], row["found"]) for kind, row in rows.items()} == {
        "good": ("", "1", "2"), "large": ("out of memory", "1", ""), "slow": ("over 0.1 s", "1", ""),
    }  # fmt: skip
    assert "torch" in rows["good"]["versions"] and rows["good"]["limit_gb"] == "3.0" and "_log" not in rows["good"]
    assert "ValueError: oh" in capfd.readouterr().err
    assert (tmp_path / "README.md").read_text().startswith("before\n") and "3 rows" in (
        tmp_path / "README.md"
    ).read_text()
    assert sorted(log.read_text().split()) == ["broken", "good", "large", "slow"]
    assert run(9.0)["large"]["ended"] == ""  # what ended at a limit runs again when it is raised
    assert sorted(log.read_text().split()[4:]) == ["broken", "large", "slow"]
    assert (tmp_path / "README.md").read_text().count("3 rows") == 1
    meanwhile = [{"kind": "new", "_log": str(log), "_meanwhile": str(tmp_path / "fake.csv")}]
    assert cells.run("fake", meanwhile, args, lambda cell: 0) == 0
    assert {row["kind"] for row in cells.read(tmp_path / "fake.csv")} == {*rows, "new", "other"}  # of another run


def hundred_megabytes() -> dict[str, Any]:
    return cells.timed(lambda size: torch.ones(size).sum(), lambda: 25_000_000, runs=2, enough=9)


def test_timed_counts_memory_of_the_first_call():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # this process may hold freed memory, and use it again
        found = pool.submit(hundred_megabytes).result()
    assert len(found["cpu_s"]) == len(found["wall_s"]) == 2 and 95 < found["peak_mb"] < 130


@pytest.mark.parametrize("name", scaling.SYSTEMS)
def test_operations_are_those_of_torchs_counter(name):
    system, form = scaling.SYSTEMS[name]
    small = config.build_config(system, 48, depth=2)
    encoder = Encoder(small)
    for block in encoder.blocks:
        scaling.choose(block, "naive" if form == "sdpa" else form)  # of which the counter knows nothing on a CPU
    for length in (64, 192):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend("reference"):
            encoder.run_blocks(torch.randn(1, length, 48))
        uncounted = 2 * small.conv_kernel * small.inner_dim if form != "sdpa" and form != "naive" else 0
        uncounted += 7 * small.inner_dim * small.state_dim if form == "scan" else 0
        uncounted *= small.depth * length * (2 if system == "ssamba" else 1)
        assert scaling.operations(small, form, length) - uncounted == pytest.approx(counter.get_total_flops(), rel=0.01)


def row(form: tuple[str, str], tokens: int, ms: float, mb: float, ended: str = "") -> cells.Row:
    key = (*form, "tiny", "inference", "fp32", "cpu", "1", str(tokens))
    row = dict(zip(scaling.KEYS, key, strict=True)) | {"ended": ended, "cpu_ms": str(ms), "peak_mb": str(mb)}
    return row | {"audio_s_per_s": "9", "gflop": "1", "kernel": "k", "limit_gb": "10.0", **cpu.facts(1)}


def test_the_page_of_scaling_says_what_the_rows_say(tmp_path: Path):
    rows = [row(("ssast", "naive"), 64_000, 0, 0, "out of memory")]
    for tokens in [*scaling.DOUBLING[:8], 22_000]:
        rows += [
            row(("ssast", "naive"), tokens, 1e-4 * tokens**2, 2e-5 * tokens**2),
            row(("ssast", "sdpa"), tokens, 2e-5 * tokens**2, 0.01 * tokens),
            row(("ssamba", "scan"), tokens, 0.1 * tokens, 0.02 * tokens),
        ]
    text = scaling.page(rows, tmp_path)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert "out of memory (10 GB)" in text and "not run" in text
    assert "| SSAST, naive attention | 2.00 | 2.00 |" in text and "| SSAMBA | 1.00 | 1.00 |" in text
    # 2e-5 L^2 = 0.1 L at 5,000; 0.02 L is never below 0.01 L; 1e-4 L^2 = 0.1 L and 2e-5 L^2 = 0.02 L at 1,000
    assert "| SSAMBA | from 5,000 | not up to 32,000 | from 1,000 | from 1,000 |" in text
    # at 22,000 tokens: 1 - 0.1 / 2.2, 1 - 0.1 / 0.44; 1 - 0.02 / 0.44, twice as much
    assert "| 95.5 % less: holds | 77.3 % less: less than published |" in text
    assert "| 95.5 % less: holds | 100 % more: does not hold |" in text
    rows = [one for one in rows if one["form"] != "naive" or one["tokens"] != "22000"]
    rows.append(row(("ssast", "naive"), 22_000, 0, 0, "over 60 s") | {"limit_s": "60.0"})
    times, sizes = ({name: scaling.curve(rows, name, c) for name in scaling.SYSTEMS} for c in ("cpu_ms", "peak_mb"))
    first, second, *_ = scaling.claims(rows, times, sizes)
    assert first[2] == "at least 96.3 % less: holds" and second[2] == "SSAST ended: over 60 s"  # of 2.2 s


def test_the_page_of_the_comparison_pairs_clips(tmp_path: Path):
    generator = np.random.default_rng(0)
    facts = cpu.facts(1) | dict.fromkeys(("sha256", "metric"), "x") | {"what": "score", "task": "t", "audio_s": ""}
    easy, rows = generator.random(400), []
    for model, share in (("good", 0.7), ("same", 0.69), ("bad", 0.5)):
        right = easy < share
        score = {
            "right": "".join(map(str, right.astype(int))),
            "score": str(right.mean()),
            "probe": "logreg",
            "seed": "0",
        }
        rows.append(facts | score | {"model": model})
        cost = {
            "what": "speed",
            "cpu_ms": "12",
            "peak_mb": "34",
            "parameters": "1e6",
            "probe": "",
            "task": "",
            "seed": "",
        }
        rows += [facts | cost | {"model": model, "audio_s": str(seconds)} for seconds in comparison.LENGTHS]
    text = comparison.page(rows, tmp_path)
    share = 100 * (easy < 0.7).mean()
    assert f"| t | logreg | good | {share:.1f} ± {196 * (share * (100 - share)) ** 0.5 / 100 / 20:.1f} | 1 |" in text
    verdicts = {line.split(" | ")[2]: line.split(" | ")[-1] for line in text.splitlines() if " − " in line}
    assert verdicts["good − bad"] == "yes |" and verdicts["good − same"] == "no |"
    assert "| good | 1.0 M | 12 ms, 34 MB |" in text and f" 34 MB | {share:.1f} ± " in text
    text = comparison.page([*rows, *(row | {"task": "u"} for row in rows if row["what"] == "score")], tmp_path)
    one = next(line for line in text.splitlines() if "| t | logreg | good − bad |" in line).split(" | ")[3].split(" ± ")
    mean = next(line for line in text.splitlines() if "| mean of 2 | logreg | bad − good |" in line).split(" | ")[3]
    assert mean == f"-{one[0].strip('+')} ± {float(one[1]) / 2**0.5:.1f}"
    newer = rows[0] | {"sha256": "y" * 12, "score": "0.1", "right": "0" * 400}
    text = comparison.page([*rows, newer], tmp_path)  # trained on, and judged again under the same name
    assert f"| t | logreg | good@x | {share:.1f} ± " in text and "| t | logreg | good@yyyyyyyy | 10.0 | 1 |" in text
    text = comparison.page([*rows, rows[0] | {"task": "u", "score": "1"}], tmp_path)  # which others have not had yet
    assert f" 34 MB | {share:.1f} ± " in text and "| u | logreg | good | 100.0 " in text


def test_the_page_of_ablations_takes_the_tasks_that_all_were_judged_on(tmp_path: Path):
    facts = (
        cpu.facts(1) | dict(zip(ablations.KEYS[1:], "abcd", strict=True)) | {"held_out_loss": "1", "clips_seen": "4"}
    )
    rows = [
        facts | {"training": training, "score one": "0.5", "score two": two}
        for training, two in ((ablations.BASELINE, "0.9"), ("patches 4x8", ""))
    ]
    text = ablations.page(rows, tmp_path)
    assert "| 50.0 | +0.0 | 50.0 |" in text and "two" not in text


@pytest.mark.slow
def test_all_ablations_train_and_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(0)
    noise = (Clip("s", str(i), lambda: generator.normal(0, 0.1, 40_000).astype(np.float32)) for i in range(130))
    build_store(tmp_path / "store", noise)
    write_task(tmp_path / "tasks" / "tones")
    monkeypatch.setitem(config.CONFIGS, "ssam_tiny", config.build_config("ssam", 32, depth=8))
    monkeypatch.setattr(
        cells, "alone", lambda study, cell: {k: v for found in ablations.measure(cell) for k, v in found.items()}
    )
    options = ["--tasks-dir", str(tmp_path / "tasks"), "--runs", str(tmp_path / "runs"), "--steps", "2", "--batch", "2"]
    assert ablations.main([str(tmp_path / "store"), "-o", str(tmp_path), *options]) == 0
    rows = {row["training"]: row for row in cells.read(tmp_path / "ablations.csv")}
    assert rows.keys() == ablations.TRAININGS.keys()
    assert all(0 <= float(row["score tones"]) <= 1 and row["clips_seen"] == "4" for row in rows.values())
    left_out = {path.parts[-3]: len(path.read_text().split()) for path in tmp_path.glob("runs/*/*/store/left-out.tsv")}
    assert left_out["baseline"] == 0 and 100 < left_out["10-%-of-the-data"] < 130
    page = (tmp_path / "README.md").read_text()
    assert "Not run yet" not in page and "| bidirectional | 2 | 4 |" in page


@pytest.mark.slow
def test_a_comparison_scores_and_times_files(tmp_path: Path, weights: Path):
    write_task(tmp_path / "tasks" / "tones")
    options = ["--tasks-dir", str(tmp_path / "tasks"), "--results", str(tmp_path / "results"), "-o", str(tmp_path)]
    options += ["--probes", "logreg", "fewshot", "--seeds", "3"]
    assert comparison.main([f"small={weights}", f"again={weights}", *options]) == 0
    scores = [row for row in cells.read(tmp_path / "comparison.csv") if row["what"] == "score"]
    for row in scores:
        assert float(row["score"]) == pytest.approx(row["right"].count("1") / len(row["right"]), abs=1e-5)
    cell = {"_file": weights, "_tasks": tmp_path / "ranked", "_results": tmp_path / "results", "probe": "logreg"}
    write_task(tmp_path / "ranked" / "ranked", evaluation=["mAP", "top1_acc"])
    ranked = comparison.score(cell | {"task": "ranked", "seed": 0})
    assert (ranked["metric"], ranked["right"]) == ("mAP", "")  # no interval of accuracies around it
    write_task(tmp_path / "ranked" / "undefined", clips=2, evaluation=["aucroc"])
    with pytest.raises(HearSsamError, match="undefined: aucroc is not finite"):
        comparison.score(cell | {"task": "undefined", "seed": 0})
    assert len(scores) == 8 and "+0.0 ± 0.0" in (tmp_path / "README.md").read_text()
