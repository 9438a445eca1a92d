"""`--engine ray` and `--shard`: the same results on many machines; nothing lost, nothing done twice."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from hear_ssam import cli
from hear_ssam.errors import HearSsamError
from hear_ssam.evaluation import evaluate
from hear_ssam.evaluation.evaluate import run_evaluation
from hear_ssam.evaluation.records import STORE, key_of, read

from . import tiny_hear
from .tiny_tasks import write_task

ROOT = Path(__file__).resolve().parent.parent
MODULE = "tests.tiny_hear"
CLIPS = 12


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of a length of its own, by which it is known."""
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    for number in range(CLIPS):
        soundfile.write(folder / f"{number:02}.wav", 0.2 * random.standard_normal(8_000 + number), 16_000)
    (folder / "13.wav").write_text("no audio")
    return folder


class Here:
    """A cluster of this process: whatever travels is pickled."""

    device = "cpu"

    def places(self, device: str) -> list[dict[str, Any]]:
        return [{}, {}]

    def work(
        self, build: Callable[[str], Callable[[Any], Any]], items: Iterable[Any], device: str,
        threads: int = 1, idle: Callable[[], object] = lambda: None,
    ) -> Iterator[tuple[Any, Future[Any]]]:  # fmt: skip
        call = pickle.loads(pickle.dumps(build))(device)
        for item in reversed(list(items)):
            outcome: Future[Any] = Future()
            try:
                outcome.set_result(pickle.loads(pickle.dumps(call(pickle.loads(pickle.dumps(item))))))
            except Exception as error:
                outcome.set_exception(error)
            idle()
            yield item, outcome


def embedded(place: Path) -> dict[str, list[Any]]:
    """Columns in the order of the paths; the sort keeps the rows of a file in theirs."""
    rows = sorted(pq.read_table(place).to_pylist(), key=lambda row: row["path"])
    return {name: [row[name] for row in rows] for name in rows[0]}


def same_rows(one: Path, other: Path) -> None:
    found, wanted = embedded(one), embedded(other)
    for left, right in zip(found.pop("embedding"), wanted.pop("embedding"), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-6)
    assert found == wanted


def lasting(records: Iterable[Any]) -> dict[Any, Any]:
    """What of records does not depend on the time and the place."""
    left = {}
    for record in records:
        origin = {k: v for k, v in record["embeddings"].items() if k not in ("seconds", "folder")}
        kept = {k: v for k, v in record.items() if k not in ("seconds", "time", "embeddings")}
        left[key_of(record)] = {**kept, "embeddings": origin}
    return left


def embed_here(files: Path, output: Path) -> int:
    return cli.main(["embed", str(files), "-o", str(output), "--model", "logmel", "--workers", "1"])


@pytest.mark.parametrize("command", ["embed", "evaluate"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--engine ray: Ray is not installed; pip install 'hear-ssam[cluster]'."),
        (["--device", "cuda:1"], "--device cuda:1: with --engine ray the cluster chooses; take auto, cpu or cuda."),
        (["--device", "mps"], "--device mps: with --engine ray"),
        (["--shard", "3/2"], "--shard 3/2: give which part of how many"),
        (["--workers", "0"], "--workers must be at least 1, not 0"),
    ],
)
def test_wrong_arguments(
    recordings: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, command: str, options: list[str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    places = {"embed": [recordings, "-o", tmp_path / "out"]}
    places["evaluate"] = [MODULE, "--tasks-dir", tmp_path, "--results-dir", tmp_path / "out"]
    assert cli.main([command, *map(str, places[command]), "--engine", "ray", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hear-ssam: error: {message}") and not (tmp_path / "out").exists()


@contextlib.contextmanager
def here(name: str, *_: object) -> Iterator[Any]:
    yield Here() if name == "ray" else None


def test_embed_gives_the_rows_of_one_machine(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: Any, same_thread_count: None
) -> None:
    monkeypatch.setattr("hear_ssam.machine.engine_named", here)
    command = ["embed", str(recordings), "--model", str(weights), "--workers", "1", "-o"]
    for output in ("out", "out.parquet"):
        assert cli.main([*command, str(tmp_path / f"one-{output}")]) == 1
        assert cli.main([*command, str(tmp_path / f"many-{output}"), "--engine", "ray"]) == 1
        same_rows(tmp_path / f"many-{output}", tmp_path / f"one-{output}")


def test_evaluate_gives_the_records_of_one_machine(tmp_path: Path, monkeypatch: Any, serial: None) -> None:
    monkeypatch.setattr(evaluate, "engine_named", here)
    for name in ("tones", "others", "broken"):
        write_task(tmp_path / "tasks" / name)
    (tmp_path / "tasks" / "broken" / "16000" / "test" / "test-1.wav").unlink()
    modules, records, failures = [MODULE, MODULE + ':{"bands": 20}'], [], []
    for engine in ("local", "ray"):
        run: Any = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / engine, "seeds": 2, "engine": engine}
        evaluation = run_evaluation(modules, probe=["exact", "knn"], **run)
        records.append(lasting(evaluation.records))
        failures.append({name: reason.replace(f"/{engine}/", "") for name, reason in evaluation.failures.items()})
        before = (tmp_path / engine / STORE).read_bytes()
        run_evaluation(modules, probe=["exact", "knn"], **run)
        assert (tmp_path / engine / STORE).read_bytes() == before  # nothing was done twice
    assert records[0] == records[1] and len(records[0]) == 2 * 2 * 3 * 2
    assert failures[0] == failures[1] and len(failures[0]) == 2


def test_objects_are_the_same_model_on_all_nodes(tmp_path: Path, monkeypatch: Any, serial: None) -> None:
    """Where a class of a notebook is unpickled, its source is not known."""
    monkeypatch.setattr(evaluate, "engine_named", here)
    monkeypatch.setattr("inspect.getsource", lambda _: uuid.uuid4().hex)
    write_task(tmp_path / "tasks" / "tones")
    run: Any = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results", "engine": "ray"}
    evaluation = run_evaluation([tiny_hear.load_model(bands=20)], probe="knn", **run)
    assert evaluation.records and not evaluation.failures


def test_jobs_of_an_array_share_a_results_folder(tmp_path: Path, serial: None) -> None:
    """Each pair of task and model is one job's; together they leave what one run leaves."""
    for name in ("a", "b", "c"):
        write_task(tmp_path / "tasks" / name)
    modules, found = [MODULE, MODULE + ':{"bands": 20}'], []
    run: Any = {"tasks_dir": tmp_path / "tasks", "probe": "knn"}
    for part in range(1, 5):
        found.append(run_evaluation(modules, **run, results_dir=tmp_path / "parts", shard=(part, 4)).records)
    pairs = Counter(pair for part in found for pair in {(r["model"], r["task"]) for r in part})
    assert set(pairs.values()) == {1} and len(pairs) == 6 and [len(part) for part in found] == [4, 4, 2, 2]
    whole = run_evaluation(modules, **run, results_dir=tmp_path / "whole").records
    assert lasting(read(tmp_path / "parts")) == lasting(whole)
    before = (tmp_path / "parts" / STORE).read_bytes()
    assert len(run_evaluation(modules, **run, results_dir=tmp_path / "parts").records) == 12
    assert (tmp_path / "parts" / STORE).read_bytes() == before
    command = ["evaluate", MODULE, "--tasks-dir", str(tmp_path / "tasks"), "--results-dir", str(tmp_path / "cli")]
    assert cli.main([*command, "--probe", "knn", "--shard", "2/3"]) == 0
    assert {r["task"] for r in read(tmp_path / "cli")} == {"b"}


# ---- a real cluster ------------------------------------------------------------------------------------------------

# Runs a command with a model that notes every clip in a file (process, samples), and takes its time.
COUNTED = """
import os, sys, time
from hear_ssam import cli, extract, hear
from hear_ssam.embedding import work

class Counted(hear.HearModel):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def spectrogram(self, audio):
        with open(self.log, "a") as log:
            print(os.getpid(), audio.shape[1], file=log)
        time.sleep(0.5)
        return super().spectrogram(audio)

if __name__ == "__main__":
    from counted import Counted  # by this name it travels
    extract.SAFE, work.BATCH = 0.5, {"cpu": (1, 1)}
    hear.load_model = lambda *_, **__: Counted(os.path.abspath("log"))
    sys.exit(cli.main())
"""

MODULE_COUNTED = """
import os, time
from tests import tiny_hear
from tests.tiny_hear import load_model, get_timestamp_embeddings

def get_scene_embeddings(audio, model):
    with open("log", "a") as log:
        print(os.getpid(), len(audio), file=log)
    time.sleep(0.5)
    return tiny_hear.get_scene_embeddings(audio, model)
"""


PORTS = ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Two nodes with a CPU each; the environment of a driver."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'hear-ssam[cluster]'")
    from ray.cluster_utils import Cluster

    mine = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "HEAR_SSAM_TEST": uuid.uuid4().hex}
    mine |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mine.items():
            patch.setenv(name, value)
        nodes = Cluster()
        try:
            for _ in range(2):  # with ports of our own: on a busy machine those that Ray finds come too late
                with contextlib.ExitStack() as stack:
                    found = [stack.enter_context(socket.create_server(("", 0))).getsockname()[1] for _ in PORTS]
                nodes.add_node(num_cpus=1, include_dashboard=False, **dict(zip(PORTS, found, strict=True)))
            nodes.wait_for_nodes(timeout=120)
            yield {**os.environ, "RAY_ADDRESS": nodes.address}
        finally:
            nodes.shutdown()


def workers(environment: dict[str, str]) -> list[int]:
    """The processes of the cluster that are at work."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = environment["HEAR_SSAM_TEST"].encode() in (process / "environ").read_bytes()
            if mine and (process / "cmdline").read_bytes().startswith(b"ray::_Actor.work"):
                found.append(int(process.name))
    return found


@contextlib.contextmanager
def driving(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A driver, which has ended after the block."""
    driver = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield driver
        driver.wait(timeout=600)
    finally:
        driver.kill()
        driver.wait()


def until(condition: Callable[[], Any], driver: subprocess.Popen[bytes]) -> Any:
    while not (value := condition()):
        assert driver.poll() is None
        time.sleep(0.02)
    return value


def counts(log: Path) -> Counter[str]:
    return Counter(line.split()[1] for line in log.read_text().splitlines()) if log.exists() else Counter()


real = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc"),
]
REAL = pytest.mark.parametrize("victim", [pytest.param(one, marks=real) for one in ("nobody", "worker", "driver")])


@REAL
def test_embed_on_two_nodes(recordings: Path, tmp_path: Path, cluster: dict[str, str], victim: str) -> None:
    (tmp_path / "counted.py").write_text(COUNTED)
    log, out = tmp_path / "log", tmp_path / "out"
    command = ["counted.py", "embed", str(recordings), "-o", "out", "--engine", "ray"]
    with driving(command, tmp_path, cluster) as driver:
        if victim == "worker":
            until(lambda: sum(counts(log).values()) > 3, driver)
            os.kill(int(log.read_text().split()[-2]), signal.SIGKILL)
        if victim == "driver":
            until(lambda: len(list(out.glob("part-*.parquet"))) > 2, driver)
            driver.kill()
    at_most_twice = 1 if victim == "worker" else 0  # what it was at
    if victim == "driver":
        done, before = set(embedded(out)["path"]), counts(log)
        at_most_twice = CLIPS - len(done)
        with driving(command, tmp_path, cluster) as driver:
            pass
        stored = {str(soundfile.info(path).frames) for path in done}
        assert 3 <= len(done) < CLIPS and all(counts(log)[size] == before[size] == 1 for size in stored)
    assert driver.returncode == 1  # of 13.wav
    assert len({line.split()[0] for line in log.read_text().splitlines()}) > 1  # both nodes were at work
    assert len(counts(log)) == CLIPS and sum(counts(log).values()) - CLIPS <= at_most_twice
    assert embed_here(recordings, tmp_path / "one") == 1
    same_rows(out, tmp_path / "one")


@REAL
def test_evaluate_on_two_nodes(tmp_path: Path, cluster: dict[str, str], victim: str, serial: None) -> None:
    (tmp_path / "counted_hear.py").write_text(MODULE_COUNTED)
    slow = {"task_specific_param_grid": {"hidden_dim": [256], "max_epochs": [60], "lr": [1e-3]}}
    for name in ("a", "b", "c", "d"):
        write_task(tmp_path / "tasks" / name, evaluation_params=slow)
    log, store = tmp_path / "log", tmp_path / "out" / STORE
    command = ["-m", "hear_ssam", "evaluate", "counted_hear", "--tasks-dir", "tasks", "--results-dir", "out"]
    command += ["--seeds", "4", "--engine", "ray"]
    with driving(command, tmp_path, cluster) as driver:
        if victim == "worker":  # one while it embeds, one while it trains
            until(lambda: sum(counts(log).values()) > 1, driver)
            os.kill(int(log.read_text().split()[-2]), signal.SIGKILL)
        if victim != "nobody":
            until(lambda: store.exists() and len(read(store)) > 4, driver)
        if victim == "worker":
            os.kill(until(lambda: workers(cluster), driver)[0], signal.SIGKILL)
        if victim == "driver":
            driver.kill()
    if victim == "driver":
        before, embeddings = store.read_bytes(), counts(log)
        assert len(before.splitlines()) < 4 * 4 * 2
        with driving(command, tmp_path, cluster) as driver:
            pass
        assert store.read_bytes().startswith(before) and counts(log) == embeddings  # both were used again
    assert driver.returncode == 0
    clips = sum(int(line.split()[1]) for line in log.read_text().splitlines())
    assert 4 * 18 <= clips <= (5 if victim == "worker" else 4) * 18
    records = read(store)
    assert len(store.read_text().splitlines()) == len(records) == 4 * 4 * 2  # each once
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.syspath_prepend(tmp_path)
        one = run_evaluation(["counted_hear"], tasks_dir=Path("tasks"), results_dir=tmp_path / "one", seeds=4)
    assert lasting(one.records) == lasting(records)


@pytest.mark.slow
def test_what_a_cluster_cannot_do(recordings: Path, tmp_path: Path, cluster: dict[str, str], capfd: Any) -> None:
    command = [sys.executable, "-m", "hear_ssam", "embed", str(recordings), "-o", str(tmp_path / "out")]
    for options, address, message in [
        (["--device", "cuda"], cluster["RAY_ADDRESS"], "--engine ray: the cluster has no GPU; add a node, or take"),
        ([], "127.0.0.1:1", "RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers; correct or unset it."),
    ]:
        environment = {**cluster, "RAY_ADDRESS": address}
        assert subprocess.run([*command, "--engine", "ray", *options], env=environment, cwd=ROOT).returncode == 2
        assert capfd.readouterr().err.splitlines()[-1].startswith(f"hear-ssam: error: {message}")
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_job_that_kills_its_worker_again_and_again(tmp_path: Path, cluster: dict[str, str], monkeypatch: Any) -> None:
    """It is given up, the others go on; what cannot start says so."""
    from hear_ssam.machine import engine_named

    monkeypatch.setenv("RAY_ADDRESS", cluster["RAY_ADDRESS"])
    monkeypatch.chdir(ROOT)
    handler = signal.getsignal(signal.SIGTERM)
    with engine_named("ray", "auto", None) as nodes:
        assert nodes and nodes.device == "cpu" and len(nodes.places("cpu")) == 2
        found = {item: outcome for item, outcome in nodes.work(deadly, range(8), "cpu")}
        assert found[3].exception() and "was killed or crashed 3 times" in str(found[3].exception())
        assert isinstance(found[5].exception(), ZeroDivisionError)
        assert [found[item].result() for item in (0, 1, 2, 4, 6, 7)] == [0, 1, 2, 4, 6, 7]
        with pytest.raises(HearSsamError, match="was killed or crashed 3 times"):
            list(nodes.work(stillborn, range(2), "cpu"))
    with engine_named("ray", "auto", None, Path("/nowhere")) as nodes:
        assert nodes
        with pytest.raises(HearSsamError, match="/nowhere: is not there on the node"):
            list(nodes.work(deadly, range(2), "cpu"))
    assert signal.getsignal(signal.SIGTERM) == handler  # not Ray's


def deadly(_: str) -> Callable[[int], int]:
    def work(item: int) -> int:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * (1 // (5 - item) if item == 5 else 1)

    return work


def stillborn(_: str) -> Callable[[int], int]:
    os._exit(1)
