"""HEAR's tasks from a server on this machine; tasks made of labelled recordings."""

import csv
import http.server
import io
import json
import os
import resource
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from hear_ssam import HearSsamError, cli
from hear_ssam.audio import read_audio
from hear_ssam.evaluation import library
from hear_ssam.evaluation.embeddings import task_digest
from hear_ssam.evaluation.evaluate import run_evaluation
from hear_ssam.evaluation.folders import find_archives, find_tasks
from hear_ssam.evaluation.library import fetch_task, make_task, task_table
from hear_ssam.evaluation.tasks import Download, folder_named, known_tasks, read_task
from hear_ssam.paths import sha256

from .tiny_tasks import write_task

FOLDER = "esc50-v2.0.0-full"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that a server on this machine offers, and its address."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    offered = tmp_path / "offered"
    offered.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(offered))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield offered, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def publish(server, monkeypatch, archive, digest=None):
    """Let esc50 be that archive, with the size of a small task."""
    offered, address = server
    card = known_tasks()[FOLDER]
    source = Download(f"{address}/{archive.name}", 48000, sha256(archive) if digest is None else digest)
    small = replace(card, download=source, clips=18, sample_duration=1.0)
    monkeypatch.setattr(library, "known_tasks", lambda: {FOLDER: small})
    assert archive.parent == offered
    return small


def pack(server, tmp_path, rate=48000):
    task = write_task(tmp_path / "made" / FOLDER, rate=rate)
    archive = server[0] / f"hear2021-{FOLDER}-48000.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(task, f"tasks/{FOLDER}")
    return archive


def test_fetch_resamples_verifies_and_is_idempotent(tmp_path, server, monkeypatch, capsys):
    archive = pack(server, tmp_path)
    publish(server, monkeypatch, archive)
    to = tmp_path / "tasks"
    assert cli.main(["tasks", "fetch", "esc50", "--to", str(to), "--rate", "16000"]) == 0
    task = read_task(to / FOLDER)
    assert capsys.readouterr().out.strip() == str(task.folder)
    assert not (task.folder / "48000").exists()
    for split in task.splits:
        for name in task.clips(split):
            audio, rate = soundfile.read(task.folder / "16000" / split / name)
            assert rate == 16000 and audio.shape == (16000,)
    assert [path.name for path in to.iterdir() if path.name != ".archives"] == [FOLDER]
    assert not list((to / ".archives").glob("*.tar.gz"))
    archive.unlink()  # what is here is not fetched again
    assert fetch_task(FOLDER, to, 16000) == task.folder


def test_fetch_adds_another_rate(tmp_path, server, monkeypatch):
    archive = pack(server, tmp_path)
    publish(server, monkeypatch, archive)
    for rate in (16000, None):
        fetch_task("esc50", tmp_path / "tasks", rate)
    assert {p.name for p in (tmp_path / "tasks" / FOLDER).iterdir() if p.is_dir()} == {"16000", "48000"}


def test_fetched_tasks_are_evaluated_by_their_short_name(tmp_path, server, monkeypatch, serial):
    publish(server, monkeypatch, pack(server, tmp_path))
    fetch_task("esc50", tmp_path / "tasks", 16000)
    places = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results"}
    evaluation = run_evaluation(["tests.tiny_hear"], **places, tasks=["esc50"], probe="knn", workers=1)
    assert {r["task"] for r in evaluation.records} == {FOLDER}


def member(name, data=b"x", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = (len(data) if kind == tarfile.REGTYPE else 0), kind, link
    return info, io.BytesIO(data)


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (member("tasks/../../escaped"), "escaped"),
        (member("/etc/escaped"), "lacks|holds no HEAR task"),  # unpacked inside, so that nothing of use is left
        (member("tasks/link", kind=tarfile.SYMTYPE, link="/etc/passwd"), "tasks/link is a link or a device"),
        (member("tasks/hard", kind=tarfile.LNKTYPE, link="tasks/x"), "tasks/hard is a link or a device"),
        (member("tasks/null", kind=tarfile.CHRTYPE), "tasks/null is a link or a device"),
        (member("tasks/bomb", bytes(300_000_000)), "which the task cannot need; do not trust it"),
    ],
)
def test_hostile_archives_leave_nothing(tmp_path, server, monkeypatch, hostile, message):
    archive = server[0] / "evil.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.addfile(*hostile)
    publish(server, monkeypatch, archive)
    before = set(tmp_path.rglob("escaped"))
    with pytest.raises(HearSsamError, match=message):
        fetch_task("esc50", tmp_path / "tasks", 16000)
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == [".archives"]
    assert set(tmp_path.rglob("escaped")) == before


def test_what_is_wrong_is_one_line_and_the_others_go_on(tmp_path, server, monkeypatch, capsys):
    archive = pack(server, tmp_path)
    publish(server, monkeypatch, archive, digest="0" * 64)
    assert cli.main(["tasks", "fetch", "esc51", "esc50", "--to", str(tmp_path / "tasks")]) == 1
    err = capsys.readouterr().err
    assert "Did you mean 'esc50'" in err and "its SHA-256" in err
    assert not (tmp_path / "tasks" / FOLDER).exists()
    with pytest.warns(UserWarning, match="no hash is published"):
        publish(server, monkeypatch, archive, digest="")
        fetch_task("esc50", tmp_path / "tasks")
    assert cli.main(["tasks", "fetch", "esc50", "--to", str(tmp_path), "--rate", "16"]) == 2


def test_half_a_download_goes_on(tmp_path, server, monkeypatch):
    archive = pack(server, tmp_path)
    publish(server, monkeypatch, archive)
    kept, full = tmp_path / "tasks" / ".archives", archive.read_bytes()
    kept.mkdir(parents=True)
    (kept / f".{archive.name}.part").write_bytes(full[: len(full) // 2])
    assert fetch_task("esc50", tmp_path / "tasks", 48000) and not list(kept.glob("*.part"))


def test_what_is_no_archive_is_fetched_anew(tmp_path, server, monkeypatch):
    """A portal's page, say, taken for the archive by a first download whose hash nobody publishes."""
    archive = pack(server, tmp_path)
    good = archive.read_bytes()
    publish(server, monkeypatch, archive, digest="")
    archive.write_bytes(b"<html>log in, please</html>")
    with pytest.raises(HearSsamError, match="cannot be unpacked"), pytest.warns(UserWarning, match="no hash"):
        fetch_task("esc50", tmp_path / "tasks")
    archive.write_bytes(good)
    left = tmp_path / "tasks" / f".unpacking-{FOLDER}-killed"
    left.mkdir()
    with pytest.warns(UserWarning, match="no hash"):
        assert read_task(fetch_task("esc50", tmp_path / "tasks")) and not left.exists()


def test_two_that_fetch_one_task(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, pack(server, tmp_path))
    slow = library.unpack
    monkeypatch.setattr(library, "unpack", lambda *given: (time.sleep(0.2), slow(*given))[1])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: fetch_task("esc50", tmp_path / "tasks"), range(2)))
    assert found == [tmp_path / "tasks" / FOLDER] * 2


def test_audio_that_is_missing_in_the_archive(tmp_path, server, monkeypatch):
    task = write_task(tmp_path / "made" / FOLDER, rate=48000)
    (task / "48000" / "test" / "test-1.wav").unlink()
    archive = server[0] / "half.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(task, f"tasks/{FOLDER}")
    publish(server, monkeypatch, archive)
    with pytest.raises(HearSsamError, match=r"test-1\.wav: is missing"):
        fetch_task("esc50", tmp_path / "tasks", 16000)
    assert not (tmp_path / "tasks" / FOLDER).exists()


def test_short_names():
    short = [card.short for card in known_tasks().values()]
    assert len(set(short)) == 20 and {"esc50", "speech_commands-5h", "speech_commands", "crema_d"} <= set(short)
    assert {"maestro-5h", "beijing_opera", "nsynth_pitch-50h", "vox_lingua_top10"} <= set(short)
    assert all(folder_named(card.short) == folder for folder, card in known_tasks().items())
    for card in known_tasks().values():
        assert card.download.url.endswith(card.archive.replace("RATE", str(card.download.rate)))
        assert card.download.url.startswith("https://zenodo.org/records/") and len(card.download.sha256) in (0, 64)


def test_archives_are_found_by_short_names(tmp_path):
    for name in ("hear2021-speech_commands-v0.0.2-5h-16000.tar.gz", "hear2021-esc50-v2.0.0-full-16000.tar.gz"):
        (tmp_path / name).touch()
    assert [path.name[9:24] for path in find_archives(tmp_path, ["speech_commands-5h"])] == ["speech_commands"]


def test_list_says_what_is_here(tmp_path, capsys):
    write_task(tmp_path / FOLDER)
    write_task(tmp_path / "mine")
    rows = {row[1]: row for row in task_table(tmp_path)}
    assert rows[FOLDER][:4] == ["esc50", FOLDER, "2000", "2.8"] and rows[FOLDER][5] == "CC BY-NC 3.0"
    assert rows[FOLDER][6].startswith("16000 Hz, 1 MB") and rows["mine"][5:] == ["yours", rows["mine"][6]]
    assert rows["fsd50k-v1.0-full"][6] == "–" and len(rows) == 22
    (tmp_path / "mine" / "test.json").unlink()
    write_task(tmp_path / "unpacked" / "tasks" / "deep")
    assert cli.main(["tasks", "list", "--dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert all(name in out for name in ("speech_commands-5h", "mine", "deep"))
    assert "test.json: cannot be read" in err


# ---- make ------------------------------------------------------------------------------------------------------------


def recordings(folder, counts, rate=22050):
    rng = np.random.default_rng(0)
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            tone = np.sin(np.arange(rate) * (0.05 + 0.3 * len(label) / 10)) * 0.3
            soundfile.write(folder / label / f"{number}.wav", tone + rng.normal(0, 0.01, rate), rate)
    return folder


def test_make_a_task_of_a_folder(tmp_path, capsys, serial):
    source = recordings(tmp_path / "sounds", {"cat": 12, "doggy": 8})
    assert cli.main(["tasks", "make", str(source), "-o", str(tmp_path / "tasks"), "--folds", "4"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "tasks" / "sounds-v1-full")
    ((folder,),) = find_tasks(tmp_path / "tasks").values()
    task = read_task(folder)
    assert task.labels == ("cat", "doggy") and task.splits == [f"fold{i:02d}" for i in range(4)]
    for split in task.splits:  # the same share of both
        labels = [label for (label,) in task.clips(split).values()]
        assert (labels.count("cat"), labels.count("doggy")) == (3, 2)
    audio = [soundfile.info(p) for p in folder.rglob("*.wav")]
    assert len(audio) == 20 and {(a.samplerate, a.channels, a.frames) for a in audio} == {(16000, 1, 16000)}
    places = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results"}
    evaluation = run_evaluation(["tests.tiny_hear"], **places, probe="logreg", workers=1)
    assert not evaluation.failures and evaluation.records[-1]["score"] > 0.9
    with pytest.raises(HearSsamError, match="is there already; delete it or give another --name"):
        make_task(source, tmp_path / "tasks", folds=4)
    make_task(recordings(tmp_path / "few", {"cat": 6, "owls": 2, "rooks": 4}), tmp_path / "tasks", folds=3)
    assert "owls: 2 groups of recordings for 3 folds; some will lack it." in capsys.readouterr().err


def drawn(folder):
    return {split: list(read_task(folder).clips(split)) for split in read_task(folder).splits}


def test_make_is_seeded(tmp_path):
    source = recordings(tmp_path / "sounds", {"cat": 8, "doggy": 8})
    made = [drawn(make_task(source, tmp_path / str(i), seed=seed, folds=4)) for i, seed in enumerate((0, 0, 1))]
    assert made[0] == made[1] != made[2]
    soundfile.write(source / "cat" / "0.wav", np.zeros(22050), 22050)  # what was recorded anew is another task
    made_of = [make_task(source, tmp_path / name, seed=0, folds=4) for name in ("new", "same")]
    digests = [task_digest(read_task(folder)) for folder in (tmp_path / "0" / made_of[0].name, *made_of)]
    assert digests[0] != digests[1] == digests[2]


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_make_keeps_groups_whole_and_names_apart(tmp_path):
    recordings(tmp_path, {"cat": 12, "doggy": 12})
    rows = [
        {"path": f"{label}/{i}.wav", "label": label, "group": f"speaker{i % 6}"}
        for label in ("cat", "doggy")
        for i in range(12)
    ]
    folder = make_task(table(tmp_path / "labels.csv", rows), tmp_path / "tasks", "animals", folds=3)
    assert folder.name == "animals-v1-full" and len(list(folder.rglob("*.wav"))) == 24
    fold_of = {}
    for split, clips in drawn(folder).items():
        for clip in clips:
            number = int(clip.removesuffix(".wav").split("~")[0])
            assert fold_of.setdefault(number % 6, split) == split
    assert json.loads((folder / "task_metadata.json").read_text())["sample_duration"] == 1.0  # of all clips
    assert library._names(["x/a.wav", "y/A.wav", "a~2.wav", "z/a.wav"]) == ["a.wav", "A~2.wav", "a~2~2.wav", "a~3.wav"]


def test_names_of_other_encodings_become_utf8(tmp_path):
    recordings(tmp_path / "sounds", {"caf": 3, "bar": 3})
    os.rename(tmp_path / "sounds" / "caf", os.fsencode(tmp_path / "sounds") + b"/caf\xe9")
    os.rename(tmp_path / "sounds" / "bar" / "0.wav", os.fsencode(tmp_path / "sounds" / "bar") + b"/\xe9.wav")
    task = read_task(make_task(tmp_path / "sounds", tmp_path / "tasks", folds=3))
    names = [name for split in task.splits for name in task.clips(split)]
    assert task.labels == ("bar", "caf\N{REPLACEMENT CHARACTER}") and "\N{REPLACEMENT CHARACTER}.wav" in names


def test_make_takes_given_splits(tmp_path):
    recordings(tmp_path, {"cat": 12, "doggy": 12})
    splits = ["train"] * 9 + ["test"] * 3
    rows = [
        {"path": f"{label}/{i}.wav", "label": label, "split": splits[i]}
        for label in ("cat", "doggy")
        for i in range(12)
    ]
    task = read_task(make_task(table(tmp_path / "labels.csv", rows), tmp_path / "tasks", folds=3))
    assert {split: len(task.clips(split)) for split in task.splits} == {"train": 12, "valid": 6, "test": 6}


def test_a_recording_that_is_named_twice_is_there_once(tmp_path):
    """Spelled in two ways it was in two folds."""
    recordings(tmp_path, {"cat": 4, "doggy": 4})
    rows = [
        {"path": f"{here}{label}/{i}.wav", "label": label}
        for here in ("", "./") for label in ("cat", "doggy") for i in range(4)
    ]  # fmt: skip
    task = read_task(make_task(table(tmp_path / "labels.csv", rows), tmp_path / "tasks", folds=3))
    assert sum(len(task.clips(split)) for split in task.splits) == 8


def test_labels_that_make_no_task(tmp_path, capsys):
    one = recordings(tmp_path / "one", {"cat": 3})
    two = recordings(tmp_path / "two", {"cat": 3, "doggy": 2})
    with pytest.raises(HearSsamError, match=r"one: .*class"):
        make_task(one, tmp_path / "tasks")
    for options, message in (
        ({"folds": 2}, "--folds must be at least 3"),
        ({"folds": 9}, "--folds 9: there are 5 groups"),
        ({"folds": 4}, "--folds 4: no class has more than 3 recordings; ask for fewer folds"),
        ({"name": "a/b"}, "--name a/b: names a folder"),
    ):
        with pytest.raises(HearSsamError, match=message):
            make_task(two, tmp_path / "tasks", **options)
    least = recordings(tmp_path / "least", {"cat": 2, "doggy": 2})  # too few for any number of folds
    for folds, message in (5, "are 4 groups of recordings; it needs more"), (3, "than 2 recordings; it needs more"):
        with pytest.raises(HearSsamError, match=message):
            make_task(least, tmp_path / "tasks", folds=folds)
    (tmp_path / "both.csv").write_text("path,label\n" + "two/cat/0.wav,cat\n./two/cat/0.wav,dog\n" * 2)
    with pytest.raises(HearSsamError, match=r"0\.wav stands in it twice, as cat and dog"):
        make_task(tmp_path / "both.csv", tmp_path / "tasks")
    with pytest.raises(HearSsamError, match=r"both\.csv: cannot be written"):
        make_task(two, tmp_path / "both.csv", folds=3)
    assert cli.main(["tasks", "make", str(two), "-o", str(tmp_path / "tasks"), "--seed", "-1"]) == 2
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, most[1]))
    try:
        with pytest.raises(HearSsamError, match=r"\.wav: cannot be written: File too large; make room"):
            make_task(two, tmp_path / "tasks", folds=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    (two / "cat" / "0.wav").write_bytes(b"no audio")
    with pytest.raises(HearSsamError, match=r"0\.wav: cannot be read as audio"):
        make_task(two, tmp_path / "tasks", folds=3)
    assert not list((tmp_path / "tasks").glob("*"))


def test_a_recording_that_cannot_be_read_leaves_nothing_however_slow_the_others(tmp_path, monkeypatch):
    two = recordings(tmp_path / "two", {"cat": 3, "doggy": 3})
    (two / "cat" / "0.wav").write_bytes(b"no audio")

    def slow(path, rate):
        time.sleep(0.0 if path.name == "0.wav" and path.parent.name == "cat" else 0.3)
        return read_audio(path, rate)

    monkeypatch.setattr("hear_ssam.evaluation.library.usable_cpus", lambda: 4)
    monkeypatch.setattr("hear_ssam.evaluation.library.read_audio", slow)
    with pytest.raises(HearSsamError, match=r"0\.wav: cannot be read as audio"):
        make_task(two, tmp_path / "tasks", folds=3)
    time.sleep(0.5)
    assert not list((tmp_path / "tasks").glob("*"))
