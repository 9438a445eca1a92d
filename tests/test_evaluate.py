"""The driver end to end: records, resumption, failures, foreign embedding folders."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from hear_ssam import HearSsamError, cli
from hear_ssam.evaluation import jobs
from hear_ssam.evaluation.embeddings import best_folder
from hear_ssam.evaluation.evaluate import run_evaluation
from hear_ssam.evaluation.records import KEY, STORE, key_of, read

from .tiny_tasks import write_task

ROOT = Path(__file__).resolve().parent.parent
MODULE = "tests.tiny_hear"


def test_one_bad_task_does_not_stop_the_others(tmp_path, capsys):
    tasks, results = tmp_path / "tasks", tmp_path / "results"
    write_task(tasks / "tones")
    write_task(tasks / "folds", folds=3)
    write_task(tasks / "broken")
    (tasks / "broken" / "16000" / "test" / "test-1.wav").unlink()
    command = ["evaluate", MODULE, "--tasks-dir", str(tasks), "--results-dir", str(results), "--workers", "1"]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "1 failed" in captured.err and "test-1.wav" in captured.err
    assert "tones" in captured.out and "folds" in captured.out and "broken" not in captured.out

    records = read(results)
    assert {(r["task"], r["fold"]) for r in records} == {
        ("tones", None), ("folds", None), ("folds", "fold00"), ("folds", "fold01"), ("folds", "fold02"),
    }  # fmt: skip
    assert {r["metric"] for r in records} == {"top1_acc", "mAP"}
    folds = [r["score"] for r in records if r["task"] == "folds" and r["fold"] and r["primary"]]
    (mean,) = (r["score"] for r in records if r["task"] == "folds" and r["fold"] is None and r["primary"])
    assert mean == pytest.approx(np.mean(folds))
    first = records[0]
    assert (first["model"], first["protocol"], first["probe"], first["seed"]) == (MODULE, "heareval", "exact", 42)
    assert (first["clips"], first["threads"], first["embeddings"]["dim"]) == (18, 1, 40)

    with np.load(results / "predictions" / MODULE / "folds" / "heareval-exact-seed42.npz") as stored:
        assert stored["labels"].tolist() == ["high", "low", "mid"]
        right = stored["fold00/prediction"].argmax(1) == stored["fold00/target"].argmax(1)
    assert right.mean() == pytest.approx(folds[0])

    # Repairing the task and running again does only what is missing.
    before = (results / STORE).read_bytes()
    shutil.copy(tasks / "broken" / "16000" / "test" / "test-4.wav", tasks / "broken" / "16000" / "test" / "test-1.wav")
    assert cli.main(command) == 0
    after = (results / STORE).read_bytes()
    assert after.startswith(before) and {r["task"] for r in read(results)} == {"tones", "folds", "broken"}
    assert cli.main(command) == 0 and (results / STORE).read_bytes() == after

    assert cli.main([*command, "--existing", "never"]) == 2
    assert "--existing never" in capsys.readouterr().err


@pytest.mark.parametrize("probe", ["exact", "bf16"])
def test_event_tasks(tmp_path, probe):
    quick = {"task_specific_param_grid": {"hidden_dim": [64], "max_epochs": [60], "lr": [1e-2], "hidden_layers": [1]}}
    write_task(tmp_path / "tasks" / "beeps", embedding_type="event", clips=12, evaluation_params=quick)
    evaluation = run_evaluation(
        [MODULE], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "results", workers=2, probe=probe
    )
    assert not evaluation.failures
    scores = {r["metric"]: r["score"] for r in evaluation.records}
    assert scores["event_onset_200ms_fms"] == scores["event_onset_200ms_fms_f_measure"] > 0.9
    assert scores["segment_1s_er"] == scores["segment_1s_er_error_rate"] < 0.2
    assert {r["metric"]: r["maximize"] for r in evaluation.records}["segment_1s_er_error_rate"] is False


def test_foreign_embeddings_need_no_module(tmp_path):
    """Folders as heareval leaves them: no provenance file; the parent folder names the model."""
    write_task(tmp_path / "tasks" / "tones")
    run_evaluation([MODULE], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "a", workers=1)
    folder = shutil.copytree(tmp_path / "a" / "embeddings" / MODULE, tmp_path / "openl3")
    (folder / "tones" / "embeddings.json").unlink()
    evaluation = run_evaluation(embeddings_dir=folder, results_dir=tmp_path / "b", workers=1)
    assert not evaluation.failures
    assert {r["model"] for r in evaluation.records} == {"openl3"}
    assert [r["score"] for r in evaluation.records] == [r["score"] for r in read(tmp_path / "a")]
    (folder / "tones" / ".done.embeddings").unlink()
    evaluation = run_evaluation(embeddings_dir=folder, results_dir=tmp_path / "c", workers=1)
    assert "not a finished embedding folder" in evaluation.failures["openl3, tones"]


def test_several_models_at_once(tmp_path):
    """One that fails does not stop the others; each may have options of its own."""
    write_task(tmp_path / "tasks" / "tones")
    modules = [MODULE, MODULE + ':{"bands": 20}', MODULE + ':{"broken": "nan"}']
    tried = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results", "workers": 1}
    evaluation = run_evaluation(modules, **tried)
    assert {(r["model"], r["embeddings"]["dim"]) for r in evaluation.records} == {
        (MODULE, 40), (MODULE + "-bands=20", 20)
    }  # fmt: skip
    assert list(evaluation.failures) == [MODULE + "-broken=nan, tones"]
    with pytest.raises(HearSsamError, match="must be a JSON object"):
        run_evaluation([MODULE + ":bands=20"], **tried)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize("stop", ["SIGKILL", "SIGTERM"])  # which the command takes as it takes Ctrl-C
def test_a_killed_run_loses_no_finished_job(tmp_path, stop):
    write_task(tmp_path / "tasks" / "tones")
    store = tmp_path / "results" / STORE
    command = [sys.executable, "-m", "hear_ssam", "evaluate", MODULE, "--tasks-dir", str(tmp_path / "tasks")]
    command += ["--results-dir", str(store.parent), "--seeds", "40", "--workers", "1"]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while driver.poll() is None and not (store.exists() and store.stat().st_size):
            time.sleep(0.02)
        os.kill(driver.pid, getattr(signal, stop))
        assert driver.wait(timeout=60) == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 130}[stop]
    finally:
        driver.kill()
    kept = read(store)
    seeds = {r["seed"] for r in kept}
    assert 1 <= len(seeds) < 40
    evaluation = run_evaluation(
        [MODULE], tasks_dir=tmp_path / "tasks", results_dir=store.parent, seeds=len(seeds) + 1, workers=1
    )
    assert not evaluation.failures
    records = {key_of(r): r for r in read(store)}
    assert all(records[key_of(r)] == r for r in kept)  # not run again: their time stamps are the old ones
    assert {r["seed"] for r in records.values()} == set(range(42, 43 + len(seeds)))


class _Killer:
    """Ends the process that reads it from a pickle."""

    def __reduce__(self):
        return os._exit, (9,)

    def __str__(self):
        return "killer"


def test_a_killed_worker_takes_only_its_job_along(tmp_path, monkeypatch):
    """What ran beside it runs again, alone; what had not begun still runs side by side; one line says what failed."""
    write_task(tmp_path / "tasks" / "tones")
    evaluation = run_evaluation([MODULE], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "a", workers=1)
    (folder,) = (tmp_path / "a" / "embeddings" / MODULE).iterdir()
    identity = {name: evaluation.records[0][name] for name in KEY[:7]}
    make = [jobs.Job(folder, {**identity, "seed": seed}, tmp_path / "b", None) for seed in range(6)]
    make.insert(2, jobs.Job(folder, {**identity, "model": _Killer(), "seed": 0}, tmp_path / "b", None))
    pools, failures, run_pool = [], {}, jobs._run_pool

    def watched(waiting, store, workers, *others):
        pools.append((len(waiting), workers))
        return run_pool(waiting, store, workers, *others)

    monkeypatch.setattr(jobs, "_run_pool", watched)
    jobs.run_jobs(make, tmp_path / "b" / STORE, 2, failures)
    assert list(failures) == ["killer, tones, seed 0"] and "out of memory?" in failures["killer, tones, seed 0"]
    assert {r["seed"] for r in read(tmp_path / "b")} == set(range(6))
    assert pools[0] == (7, 2) and pools[-1][1] == 2 and len([1 for _, workers in pools if workers == 1]) <= 2


def test_a_broken_archive_does_not_stop_the_others(tmp_path):
    write_task(tmp_path / "tasks" / "tones")
    (tmp_path / "tasks" / "half.tar.gz").write_bytes(b"no archive")
    evaluation = run_evaluation([MODULE], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "results", workers=1)
    assert {r["task"] for r in evaluation.records} == {"tones"} and list(evaluation.failures) == ["half.tar.gz"]


def test_of_two_rates_a_model_gets_its_own(tmp_path):
    (tmp_path / "tasks").mkdir()
    for rate in (48000, 16000):  # the other order on disk
        folder = write_task(tmp_path / str(rate) / "tones", rate=rate)
        with tarfile.open(tmp_path / "tasks" / f"{'ab'[rate == 16000]}-tones-{rate}.tar", "w") as tar:
            tar.add(folder, "hear-2021.0.6/tasks/tones")
    evaluation = run_evaluation([MODULE], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "results", workers=1)
    assert evaluation.records and not evaluation.failures
    folders = [tmp_path / str(rate) / "tones" for rate in (16000, 48000)]
    wanted = {16000: 0, 22050: 1, 48000: 1, 96000: 1, 8000: 0}
    assert {rate: folders.index(best_folder(folders, rate)) for rate in wanted} == wanted


def test_always_makes_embeddings_again_too(tmp_path):
    write_task(tmp_path / "tasks" / "tones")
    run = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results", "workers": 1}
    run_evaluation([MODULE], **run)
    made = tmp_path / "results" / "embeddings" / MODULE / "tones" / "test.embeddings.npy"
    made.write_bytes(bytes(made.stat().st_size))
    run_evaluation([MODULE], **run, seeds=2)
    assert not any(made.read_bytes())
    run_evaluation([MODULE], **run, existing="always")
    assert any(made.read_bytes())


def test_two_drivers_on_one_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HearSsamError, match="another evaluation writes to"):
            run_evaluation([MODULE], tasks_dir=tmp_path, results_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks-dir", "nowhere"], "nowhere: no such folder"),
        ([], "--tasks-dir"),
        (["--tasks-dir", "nowhere", "--protocol", "sam"], "Did you mean 'ssam'"),
        (["--tasks-dir", "nowhere", "--seeds", "0"], "--seeds must be at least 1"),
        (["--tasks-dir", "nowhere", "--workers", "-1"], "--workers must be at least 1"),
        (["--tasks-dir", "nowhere", "--model-options", "[1]"], "must be a JSON object"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, message):
    assert cli.main(["evaluate", MODULE, "--results-dir", str(tmp_path / "results"), *arguments]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(HearSsamError, match="Did you mean 'always'"):
        run_evaluation([MODULE], tasks_dir=tmp_path, results_dir=tmp_path, existing="allways")


def test_help_is_light():
    code = "import sys, hear_ssam.evaluation.evaluate, hear_ssam.evaluation.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
