"""The driver end to end: records, resumption, failures, foreign embedding folders."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from hear_ssam import HearSsamError, cli
from hear_ssam.evaluation import jobs
from hear_ssam.evaluation.embeddings import embed_task
from hear_ssam.evaluation.evaluate import run_evaluation
from hear_ssam.evaluation.folders import best_folder
from hear_ssam.evaluation.module import load_hear_model
from hear_ssam.evaluation.probe import run_probe
from hear_ssam.evaluation.records import STORE, embeddings_folder, key_of, predictions_file, read
from hear_ssam.evaluation.rows import open_embeddings

from . import tiny_hear
from .tiny_tasks import write_task

ROOT = Path(__file__).resolve().parent.parent
MODULE = "tests.tiny_hear"


def embeddings(results, model=MODULE, task="tones"):
    return embeddings_folder(results, model, "", task)


def test_one_bad_task_does_not_stop_the_others(tmp_path, capsys, serial):
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

    folds_record = next(r for r in records if r["task"] == "folds")
    with np.load(predictions_file(results, folds_record)) as stored:
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

    for _ in range(2):  # the second time, of other embeddings: all tasks have changed
        assert cli.main([*command, "--existing", "never"]) == 2
        assert "--existing never" in capsys.readouterr().err
        for path in tasks.glob("*/[tf]*[n0].json"):
            path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    assert (results / STORE).read_bytes() == after


@pytest.mark.parametrize(("probe", "good"), [("exact", 0.9), ("bf16", 0.8)])
def test_event_tasks(tmp_path, serial, probe, good):
    quick = {"task_specific_param_grid": {"hidden_dim": [64], "max_epochs": [60], "lr": [1e-2], "hidden_layers": [1]}}
    write_task(tmp_path / "tasks" / "beeps", embedding_type="event", clips=12, evaluation_params=quick)
    evaluation = run_evaluation(
        [MODULE], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "results", workers=2, probe=probe
    )
    assert not evaluation.failures
    scores = {r["metric"]: r["score"] for r in evaluation.records}
    assert scores["event_onset_200ms_fms"] == scores["event_onset_200ms_fms_f_measure"] > good
    assert scores["segment_1s_er"] == scores["segment_1s_er_error_rate"] < 0.2
    assert {r["metric"]: r["maximize"] for r in evaluation.records}["segment_1s_er_error_rate"] is False


def test_records_tell_how_their_heads_were_trained(tmp_path, serial):
    """The predictions of every seed and probe are those of `run_probe` when it is asked for what the record says."""
    write_task(tmp_path / "tasks" / "tones")
    places = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results"}
    evaluation = run_evaluation([MODULE], **places, probe=["exact", "bf16"], protocol="ssam", seeds=2, workers=1)
    found = []
    for record in (r for r in evaluation.records if r["primary"] and r["fold"] is None):
        bf16 = record["dtype"] == "bfloat16"
        result = run_probe(embeddings(tmp_path / "results"), record["protocol"], record["seed"], bf16=bf16)
        assert bf16 == (record["probe"] == "bf16") and record["grid_point"] == asdict(result.config)
        with np.load(predictions_file(tmp_path / "results", record)) as stored:
            np.testing.assert_array_equal(stored["test/prediction"], result.folds[0].prediction)
            found.append(stored["test/prediction"])
    assert len(found) == 4 and not any(np.array_equal(*pair) for pair in itertools.combinations(found, 2))


def test_foreign_embeddings_need_no_module(tmp_path, serial):
    """Folders as heareval leaves them: no provenance file; the parent folder names the model."""
    write_task(tmp_path / "tasks" / "tones")
    run_evaluation([MODULE], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "a", workers=1)
    folder = shutil.copytree(embeddings(tmp_path / "a").parent, tmp_path / "openl3")
    (folder / "tones" / "embeddings.json").unlink()
    evaluation = run_evaluation(embeddings_dir=folder, results_dir=tmp_path / "b", workers=1)
    assert not evaluation.failures
    assert {r["model"] for r in evaluation.records} == {"openl3"}
    assert [r["score"] for r in evaluation.records] == [r["score"] for r in read(tmp_path / "a")]
    again = run_evaluation(embeddings_dir=folder, results_dir=tmp_path / "b", workers=1)
    assert again.records == evaluation.records  # nothing ran twice
    rows = np.fromfile(folder / "tones" / "test.embeddings.npy", np.float32)
    rows[:] = rows[::-1]
    rows.tofile(folder / "tones" / "test.embeddings.npy")  # of another model, say
    others = run_evaluation(embeddings_dir=folder, results_dir=tmp_path / "b", workers=1)
    assert [r["score"] for r in others.records] != [r["score"] for r in evaluation.records]
    other = shutil.copytree(folder, tmp_path / "elsewhere" / "openl3")  # the same name is not the same embeddings
    moved = run_evaluation(embeddings_dir=other, results_dir=tmp_path / "b", workers=1)
    assert {r["embeddings"]["folder"] for r in moved.records} == {str(other / "tones")}
    (folder / "tones" / ".done.embeddings").unlink()
    evaluation = run_evaluation(embeddings_dir=folder, results_dir=tmp_path / "c", workers=1)
    assert "not a finished embedding folder" in evaluation.failures["openl3, tones"]


def test_several_models_at_once(tmp_path, serial):
    """One that fails does not stop the others; each may have options of its own; the same one runs once."""
    write_task(tmp_path / "tasks" / "tones")
    broken = [f"{MODULE}:{json.dumps({'broken': fault})}" for fault in ("nan", "exit", "exit at once")]
    modules = [MODULE, *broken, MODULE + ':{"bands": 20}', MODULE + ":{}", "no_such_module"]
    tried = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results", "workers": 1}
    evaluation = run_evaluation(modules, **tried)
    assert {(r["model"], r["embeddings"]["dim"]) for r in evaluation.records} == {
        (MODULE, 40), (MODULE + "-bands=20", 20)
    }  # fmt: skip
    assert len(evaluation.records) == 2 * len({r["metric"] for r in evaluation.records})
    assert len((tmp_path / "results" / STORE).read_text().splitlines()) == len(evaluation.records)
    names = [broken[2], "no_such_module", MODULE + "-broken=nan, tones", MODULE + "-broken=exit, tones"]
    assert list(evaluation.failures) == names
    for name, words in zip(names, ("no licence", "cannot import", "NaN", "SystemExit: 3"), strict=True):
        assert words in evaluation.failures[name]
    with pytest.raises(HearSsamError, match="must be a JSON object"):
        run_evaluation([MODULE + ":bands=20"], **tried)


def test_two_modules_may_not_share_a_name(tmp_path, serial, monkeypatch):
    """Their results would be one model's: the second was left out, and nothing said so."""
    write_task(tmp_path / "tasks" / "tones")
    (tmp_path / "other_hear.py").write_text("from tests.tiny_hear import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tiny_hear.Bands, "name", "bands", raising=False)
    tried = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results", "workers": 1}
    evaluation = run_evaluation([MODULE, "other_hear"], **tried)
    assert {r["model"] for r in evaluation.records} == {"bands"}
    assert "a model of tests.tiny_hear has this name" in evaluation.failures["other_hear"]


def test_modules_may_raise_what_is_no_exception_and_leave_the_folder(tmp_path, serial, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_task(Path("tasks/tones"))
    odd = {
        "wanderer": "import os\nos.chdir('/')",
        "rude": "def get_scene_embeddings(*_):\n    raise BaseException('no')",
    }
    for name, code in odd.items():
        Path(f"{name}.py").write_text(f"from tests.tiny_hear import *\n{code}\n")
    run = {"tasks_dir": Path("tasks"), "results_dir": Path("out"), "workers": 1, "probe": "knn"}
    evaluation = run_evaluation([*odd], **run)
    assert {r["model"] for r in evaluation.records} == {"wanderer"} and Path.cwd() == tmp_path
    (name, reason), *_ = evaluation.failures.items()
    assert name == "rude, tones" and "BaseException: no (" in reason


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize("stop", ["SIGKILL", "SIGTERM"])  # which the command takes as it takes Ctrl-C
def test_a_killed_run_loses_no_finished_job(tmp_path, stop, serial):
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


def job(folder, results, seed, model="m"):
    identity = {"model": model, "checkpoint_sha256": "", "task": "task", "version": "1"}
    return jobs.Job(folder, {**identity, "protocol": "heareval", "probe": "exact", "seed": seed}, results)


def test_a_killed_worker_takes_only_its_job_along(tmp_path, monkeypatch):
    """That runs once more, alone, when all others are done; one line says what failed."""
    write_task(tmp_path / "tasks" / "tones")
    folder = embed_task(load_hear_model(MODULE), tmp_path / "tasks" / "tones", tmp_path / "a")
    make = [job(folder, tmp_path / "b", seed) for seed in range(4)]
    make.insert(1, job(folder, tmp_path / "b", 0, model=_Killer()))
    started, given, failures, store = [], [], {}, tmp_path / "b" / STORE

    class Watched(jobs.ProcessPoolExecutor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self)

        def submit(self, function, *arguments):
            given.append((arguments[0].label, len(read(store)) if store.exists() else 0) if arguments else None)
            return super().submit(function, *arguments)

    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Watched)
    jobs.run_jobs(make, store, 2, failures)
    assert list(failures) == ["killer, task, seed 0"] and "out of memory?" in failures["killer, task, seed 0"]
    records = read(tmp_path / "b")
    assert {r["seed"] for r in records} == set(range(4)) and len(store.read_text().splitlines()) == len(records)
    assert len(started) == 5  # two, and three for the two deaths
    assert given[-2:] == [("killer, task, seed 0", len(records)), None] and len(given) == 7


def _dies(leash):
    os._exit(3)


def test_workers_that_never_start_are_not_blamed_on_memory(tmp_path, monkeypatch):
    """As in a script without the main guard."""
    folder = embed_task(load_hear_model(MODULE), write_task(tmp_path / "tones"), tmp_path / "a")
    monkeypatch.setattr(jobs, "_start_worker", _dies)
    with pytest.raises(HearSsamError, match=r"workers of the probe do not start: .*__main__"):
        jobs.run_jobs([job(folder, tmp_path, 0)], tmp_path / STORE, 2, {})


def test_the_longest_job_runs_first(tmp_path, serial):
    """By the rows to train on: those of the split train, or for k folds about all, for every fold."""
    (tmp_path / "tasks").mkdir()
    hear = load_hear_model(MODULE)
    sizes = {"few": {"clips": 3}, "many": {"clips": 12}, "folds": {"clips": 3, "folds": 3}, "some": {"clips": 6}}
    made = {
        name: embed_task(hear, write_task(tmp_path / "tasks" / name, **size), tmp_path / name)
        for name, size in sizes.items()
    }
    make = [job(folder, tmp_path / "results", 0, model=name) for name, folder in made.items()]
    jobs.run_jobs(make, tmp_path / STORE, 1, {})
    assert list(dict.fromkeys(r["model"] for r in read(tmp_path))) == ["folds", "many", "some", "few"]


def test_a_broken_archive_does_not_stop_the_others(tmp_path, serial):
    write_task(tmp_path / "tasks" / "tones")
    (tmp_path / "tasks" / "half.tar.gz").write_bytes(b"no archive")
    evaluation = run_evaluation([MODULE], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "results", workers=1)
    assert {r["task"] for r in evaluation.records} == {"tones"} and list(evaluation.failures) == ["half.tar.gz"]


def test_of_two_rates_a_model_gets_its_own(tmp_path, serial):
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


def test_results_may_lie_beside_the_tasks(tmp_path, serial):
    """Archives are not unpacked onto themselves, and no limited task joins those of the user."""
    folder = write_task(tmp_path / "source" / "tones")
    write_task(tmp_path / "tasks" / "folds", folds=3)
    with tarfile.open(tmp_path / "tasks" / "tones-16000.tar", "w") as tar:
        tar.add(folder, "hear-2021.0.6/tasks/tones")
    run = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path, "workers": 1, "probe": "knn"}
    for limit, names in ((4, {"folds-limit4", "tones-limit4"}), (None, {"folds", "tones"})):
        evaluation = run_evaluation([MODULE], **run, limit=limit)
        assert not evaluation.failures and {r["task"] for r in evaluation.records} == names
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {"folds", "tones-16000.tar"}


def test_always_makes_embeddings_again_too(tmp_path, serial):
    write_task(tmp_path / "tasks" / "tones")
    run = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results", "workers": 1}
    run_evaluation([MODULE], **run)
    made = embeddings(tmp_path / "results") / "test.embeddings.npy"
    made.write_bytes(bytes(made.stat().st_size))
    run_evaluation([MODULE], **run, seeds=2)
    assert not any(made.read_bytes())
    run_evaluation([MODULE], **run, existing="always")
    assert any(made.read_bytes())


def test_options_that_look_alike_in_a_path_have_embeddings_of_their_own(tmp_path, serial):
    write_task(tmp_path / "tasks" / "tones")
    modules = [MODULE + ":" + json.dumps({"pool": pool}) for pool in ("mean+max", "mean/max", "mean-max")]
    alone = []
    for number, module in enumerate(modules):
        run_evaluation([module], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / str(number), workers=1)
        (made,) = (tmp_path / str(number) / "embeddings").glob("*/tones/test.embeddings.npy")
        alone.append(made.read_bytes())
    evaluation = run_evaluation(modules, tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "all", workers=1)
    folders = {r["model"]: Path(r["embeddings"]["folder"]) for r in evaluation.records}
    assert [(folder / "test.embeddings.npy").read_bytes() for folder in folders.values()] == alone
    assert len({predictions_file(tmp_path, r) for r in evaluation.records}) == 3


def test_results_of_another_origin_are_not_used_again(tmp_path, serial, monkeypatch):
    """The same name means nothing: not for a module of another version or file, an edited task, resampled audio."""
    task = write_task(tmp_path / "tasks" / "tones", rate=48000)
    run = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results", "workers": 1, "resample": True}

    def ran():
        store = tmp_path / "results" / STORE
        before = len(store.read_text().splitlines()) if store.exists() else 0
        evaluation = run_evaluation([MODULE], **run)
        assert not evaluation.failures
        return len(store.read_text().splitlines()) > before, evaluation.records[0]

    assert ran()[1]["embeddings"]["audio_hz"] == [48000]
    assert not ran()[0]
    shutil.move(write_task(tmp_path / "native" / "tones") / "16000", task)
    new, record = ran()
    assert new and record["embeddings"]["audio_hz"] == [16000] and not ran()[0]
    clips = json.loads((task / "train.json").read_text())
    clips.popitem()
    (task / "train.json").write_text(json.dumps(clips))
    new, record = ran()
    assert new and record["clips"] == 17 and not ran()[0]
    monkeypatch.setattr(tiny_hear, "__version__", "2.0", raising=False)
    new, record = ran()
    assert new and record["embeddings"]["module_version"] == "2.0" and not ran()[0]
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "judged.py").write_text(f"import beside\nfrom tests.tiny_hear import *  # in {place}\n")
        (tmp_path / place / "beside.py").write_text("")
    digests = []
    for place in ("a", "b", "b"):
        (tmp_path / place / "beside.py").write_text(f"# {len(digests)}")
        monkeypatch.syspath_prepend(tmp_path / place)
        monkeypatch.delitem(sys.modules, "judged", raising=False)
        digests += [r["embeddings"]["module_sha256"] for r in run_evaluation(["judged"], **run).records]
    assert len(set(digests)) == 3  # what a module imports beside it is a part of it
    broken = "from tests.tiny_hear import *\ndef get_scene_embeddings(*_):\n    return 1\n"
    (tmp_path / "b" / "judged.py").write_text(broken)
    monkeypatch.delitem(sys.modules, "judged")
    failed = run_evaluation(["judged"], **run)
    assert failed.failures and not failed.records  # results of its earlier code are not its own
    assert len(read(run["results_dir"])) > 0


def test_seeds_of_a_task_read_it_once(tmp_path, serial, monkeypatch):
    read_folders = []
    monkeypatch.setattr(
        "hear_ssam.evaluation.rows.open_embeddings",
        lambda folder: read_folders.append(folder) or open_embeddings(folder),
    )
    write_task(tmp_path / "tasks" / "tones")
    evaluation = run_evaluation(
        [MODULE], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "results", workers=1, seeds=3
    )
    assert {r["seed"] for r in evaluation.records} == {42, 43, 44} and len(read_folders) == 1


def test_wrong_scores_are_found_before_any_embedding(tmp_path, serial):
    write_task(tmp_path / "tasks" / "tones")
    write_task(tmp_path / "tasks" / "odd", evaluation=["top1_acc", "top2_acc"])
    evaluation = run_evaluation([MODULE], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "results", workers=1)
    assert "unknown score 'top2_acc'" in evaluation.failures[MODULE + ", odd"]
    assert not embeddings(tmp_path / "results", task="odd").exists() and evaluation.records


def test_a_failure_names_its_model_once(tmp_path, capsys):
    write_task(tmp_path / "tasks" / "tones")
    command = ["evaluate", "xares:none.py", "--tasks-dir", str(tmp_path / "tasks"), "--results-dir", str(tmp_path)]
    assert cli.main(command) == 2
    said, error = capsys.readouterr().err.splitlines()
    assert said.startswith("xares:none.py: no such file") and error == f"hear-ssam: error: {said}"


def test_without_what_windows_lacks(tmp_path, serial, monkeypatch):
    for name in ("pread", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr("ctypes.CDLL", None)
    write_task(tmp_path / "tasks" / "tones")
    run = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results", "workers": 1}
    assert run_evaluation([MODULE], **run).records
    jobs.keep_freed_memory()
    assert {r["seed"] for r in run_evaluation([MODULE], **run, seeds=2).records} == {42, 43}


def test_two_drivers_on_one_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HearSsamError, match="another evaluation writes to"):
            run_evaluation([MODULE], tasks_dir=tmp_path, results_dir=tmp_path)


def test_only_shards_of_one_whole_share_a_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    both = "another evaluation (.*) writes to", "holds no HEAR task"
    for held, shard, refused in (
        (".lock", (1, 2), True), (".lock-1-of-2", (1, 1), True), (".lock-1-of-2", (2, 3), True),
        (".lock-1-of-2", (2, 2), False), (".lock-1-of-12", (2, 2), True),
    ):  # fmt: skip
        folder = tmp_path / f"{held}{shard}"
        folder.mkdir()
        (folder / ".lock-2-of-4").touch()  # of one that was killed
        with open(folder / held, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(HearSsamError, match=both[not refused]):
                run_evaluation([MODULE], tasks_dir=folder, results_dir=folder, shard=shard)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks-dir", "nowhere"], "nowhere: no such folder"),
        ([], "--tasks-dir"),
        (["--tasks-dir", "nowhere", "--protocol", "sam"], "Did you mean 'ssam'"),
        (["--tasks-dir", "nowhere", "--seeds", "0"], "--seeds must be at least 1"),
        (["--tasks-dir", "nowhere", "--workers", "-1"], "--workers must be at least 1"),
        (["--tasks-dir", "nowhere", "--model-options", "[1]"], "must be a JSON object"),
        (["--embeddings-dir", "nowhere"], "MODULE: of no use with --embeddings-dir"),
        (["--tasks-dir", "nowhere", "--shots", "4"], "--shots: of no use with --probe exact"),
        (["--tasks-dir", "nowhere", "--seeds", "3", "--probe", "knn"], "--seeds: of no use with --probe knn"),
        (["--tasks-dir", "nowhere", "--protocol", "ssam", "--probe", "logreg"], "--protocol: of no use with --probe"),
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


@pytest.mark.parametrize(
    "asked", [{"modules": ["m"]}, {"model": "w.pt"}, {"model_options": {"bands": 2}}, {"resample": True}]
)
def test_arguments_that_contradict_each_other_are_refused(tmp_path, asked):
    with pytest.raises(HearSsamError, match=r"^(MODULE|--model|--model-options|--resample): of no use with"):
        run_evaluation(**asked, embeddings_dir=tmp_path, results_dir=tmp_path / "results")
    assert not (tmp_path / "results").exists()
