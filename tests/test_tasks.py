"""HEAR task folders are read as heareval reads them, and what is wrong with one is said by name."""

import codecs
import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import pytest

from hear_ssam import HearSsamError
from hear_ssam.evaluation.embeddings import embed_task
from hear_ssam.evaluation.evaluate import run_evaluation
from hear_ssam.evaluation.folders import find_archives, find_tasks, require_audio, unpack
from hear_ssam.evaluation.module import load_hear_model
from hear_ssam.evaluation.scores import SCORES
from hear_ssam.evaluation.tasks import differences, known_tasks, read_task

from .tiny_tasks import write_task


def test_folds_rotate_as_in_heareval(golden, tmp_path):
    expected = json.loads((golden / "heareval" / "scores.json").read_text())["folds"]
    for count, splits in expected.items():
        task = read_task(write_task(tmp_path / f"k{count}", folds=int(count), clips=3))
        assert [{"train": list(s.train), "valid": [s.valid], "test": [s.test]} for s in task.data_splits] == splits


def test_train_valid_test(tmp_path):
    (split,) = read_task(write_task(tmp_path / "tones")).data_splits
    assert (split.train, split.valid, split.test) == (("train",), "valid", "test")


def test_rows_are_shuffled_as_in_heareval(golden):
    task = read_task(golden / "heareval" / "spoken_digit__default_t1_torch2.13.0")
    for split, order in task.shuffled_clips():
        clips = task.clips(split)
        rows = pickle.loads((task.folder / f"{split}.target-labels.pkl").read_bytes())
        assert [clips[name] for name in order] == rows


def test_targets_are_one_hot_rows_by_vocabulary(tmp_path):
    task = read_task(write_task(tmp_path / "tones"))
    assert task.labels == ("high", "low", "mid")
    assert task.targets([["low"], ["high"]], "here").tolist() == [[0, 1, 0], [1, 0, 0]]


def test_clips_of_a_multilabel_task_have_any_number_of_labels(tmp_path):
    folder = write_task(tmp_path / "tones", prediction_type="multilabel", evaluation=["mAP"])
    (folder / "train.json").write_text('{"a.wav": [], "b.wav": ["low", "high"]}')
    task = read_task(folder)
    assert task.targets(list(task.clips("train").values()), "here").tolist() == [[0, 0, 0], [1, 1, 0]]


def test_tasks_are_found_by_name_also_below_an_unpacked_archive(tmp_path):
    write_task(tmp_path / "hear-2021.0.6" / "tasks" / "tones")
    write_task(tmp_path / "chords")
    write_task(tmp_path / "elsewhere" / "tones")
    assert list(find_tasks(tmp_path)) == ["chords", "tones"]
    places = find_tasks(tmp_path, ["tones"], [tmp_path / "elsewhere"])
    assert places == {"tones": [tmp_path / "hear-2021.0.6" / "tasks" / "tones", tmp_path / "elsewhere" / "tones"]}
    with pytest.raises(HearSsamError, match="Did you mean 'tones'"):
        find_tasks(tmp_path, ["tone"])
    with pytest.raises(HearSsamError, match="tones: is a task itself; name the folder that holds it"):
        find_tasks(tmp_path / "elsewhere" / "tones")
    with pytest.raises(HearSsamError, match="nowhere: no such folder"):
        find_tasks(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_mode": "loocv"}, "unknown split_mode"),
        ({"splits": ["train", "test"]}, "needs the splits train, valid and test"),
        ({"split_mode": "new_split_kfold", "splits": ["fold00", "fold01"]}, "at least three"),
        ({"evaluation": []}, "at least one score"),
        ({"evaluation": ["top_acc"]}, "unknown score 'top_acc'. Did you mean 'top1_acc'"),
        ({"evaluation": ["segment_1s_er"]}, "does not fit the embedding_type 'scene'"),
        ({"evaluation": "top1_acc"}, "'evaluation' must be a list of scores"),
        ({"splits": None}, "'splits' must be a list of names, not null"),
        ({"splits": ["train", "valid", 3]}, "'splits' must be a list of names"),
        ({"splits": ["train", "valid", "../test"]}, "'splits' must be a list of names"),
        ({"sample_duration": "2.5"}, "'sample_duration' must be seconds above 0, or null, not \"2.5\""),
        ({"sample_duration": float("nan")}, "'sample_duration' must be seconds"),
        ({"sample_duration": True}, "'sample_duration' must be seconds"),
        ({"task_name": ["tones"]}, "'task_name' must be text"),
        ({"embedding_type": ["scene"]}, "unknown embedding_type"),
        ({"use_scoring_for_early_stopping": "no"}, "'use_scoring_for_early_stopping' must be true or false"),
        ({"evaluation_params": None}, "'evaluation_params' must be an object"),
        ({"evaluation_params": {"task_specific_param_grid": {"lr": 1e-3}}}, "'task_specific_param_grid' must be"),
        ({"evaluation_params": {"task_specific_param_grid": {"lr": []}}}, "'task_specific_param_grid' must be"),
        ({"evaluation_params": {"event_postprocessing_grid": {"min_duration": [1]}}}, "median_filter_ms and min_durat"),
        (
            {"embedding_type": "event", "evaluation": ["segment_1s_er"], "use_scoring_for_early_stopping": False},
            "'use_scoring_for_early_stopping' is false, with several postprocessings",
        ),
        *(
            ({"evaluation_params": {"task_specific_param_grid": grid}}, "'task_specific_param_grid' must be")
            for grid in (
                {"epochs": [50]},
                {"lr": ["x"]},
                {"lr": [0]},
                {"dropout": [7]},
                {"hidden_layers": [-1]},
                {"hidden_dim": [0]},
                {"batch_size": [1]},
                {"max_epochs": [2.5]},
                {"patience": [True]},
                {"check_val_every_n_epoch": [0]},
                {"initialization": ["he"]},
            )
        ),
    ],
)
def test_contradictory_metadata(tmp_path, change, message):
    folder = write_task(tmp_path / "tones")
    path = folder / "task_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(HearSsamError, match=f"^{re.escape(str(path))}: .*{re.escape(message)}"):
        read_task(folder)


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "{", "[" * 100_000])
def test_metadata_that_is_no_object(tmp_path, content):
    path = write_task(tmp_path / "tones") / "task_metadata.json"
    path.write_text(content)
    with pytest.raises(HearSsamError, match=f"^{re.escape(str(path))}: (must be a JSON object|is not valid JSON)"):
        read_task(path.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("idx;label\n0;low\n", "needs the columns"),
        ("idx,label\nzero,low\n", "needs the columns"),
        ("idx,label\n1,low\n", "without gaps"),
        ("idx,label\n0,low\n1,mid\n1,high\n", "without gaps"),
        ("idx,label\n0,low\n1\n", "a label of its own"),
        ("idx,label\n0\n0,low\n", "without gaps"),
        ("idx,label\n0,low\n1,low\n", "a label of its own"),
    ],
)
def test_wrong_vocabulary(tmp_path, content, message):
    path = write_task(tmp_path / "tones") / "labelvocabulary.csv"
    path.write_text(content)
    with pytest.raises(HearSsamError, match=f"^{re.escape(str(path))}: .*{message}"):
        read_task(path.parent)


FILES = ("task_metadata.json", "labelvocabulary.csv", "valid.json")


@pytest.mark.parametrize("name", FILES)
def test_a_byte_order_mark_changes_nothing(tmp_path, name):
    path = write_task(tmp_path / "tones") / name
    plain = read_task(path.parent), read_task(path.parent).clips("valid")
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert (read_task(path.parent), read_task(path.parent).clips("valid")) == plain


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("name", FILES)
def test_another_encoding_is_called_that(tmp_path, name, encoding):
    path = write_task(tmp_path / "tones") / name
    path.write_bytes(path.read_text().replace("low", "gr\u00fcn").replace("task_name", "gr\u00fcn").encode(encoding))
    with pytest.raises(HearSsamError, match=f"^{re.escape(str(path))}: has another encoding than UTF-8"):
        read_task(path.parent).clips("valid")


@pytest.mark.parametrize("name", FILES)
def test_only_regular_files_are_opened(tmp_path, name):
    path = write_task(tmp_path / "tones") / name
    path.unlink()
    os.mkfifo(path)  # opening it would wait for a writer for ever
    with pytest.raises(HearSsamError, match=f"^{re.escape(str(path))}: is no regular file"):
        read_task(path.parent).clips("valid")


def test_audio_that_is_missing_or_no_regular_file_is_named(tmp_path):
    folder = write_task(tmp_path / "tones") / "16000" / "test"
    names = [path.name for path in folder.iterdir()]
    require_audio(folder, names)
    os.symlink(folder / names[0], folder / "link.wav")
    require_audio(folder, ["link.wav"])
    os.mkfifo(folder / "pipe.wav")
    for name, what in {"pipe.wav": "is no regular file", "absent.wav": "is missing"}.items():
        with pytest.raises(HearSsamError, match=f"^{re.escape(str(folder / name))}: {what}"):
            require_audio(folder, [*names, name])


@pytest.mark.parametrize("name", ["task_metadata.json", "labelvocabulary.csv"])
def test_missing_file_is_named(tmp_path, name):
    folder = write_task(tmp_path / "tones")
    (folder / name).unlink()
    with pytest.raises(HearSsamError, match=re.escape(name)):
        read_task(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a.wav": ["lou"]}', "label 'lou'"),
        ('{"a.wav": ["low", "high"]}', "exactly one"),
        ('{"a.wav": "low"}', "must be a list"),
        ("{}", "at least one file"),
        ("{", "not valid JSON"),
    ],
)
def test_wrong_labels_are_named(tmp_path, content, message):
    folder = write_task(tmp_path / "tones")
    (folder / "valid.json").write_text(content)
    with pytest.raises(HearSsamError, match=message) as caught:
        read_task(folder).clips("valid")
    assert "valid.json" in str(caught.value)


EVENT = {"label": "low", "start": 100, "end": 500.5}


@pytest.mark.parametrize(
    "change",
    [
        {"end": 99},
        {"start": float("nan")},
        {"end": float("inf")},
        {"start": -1},
        {"end": "500"},
        {"start": None},
        {"end": True},
        {"end": 10**400},
    ],
)
def test_wrong_times_of_events_are_named(tmp_path, change):
    folder = write_task(tmp_path / "beeps", embedding_type="event")
    path = folder / "valid.json"
    path.write_text(json.dumps({"good.wav": [EVENT], "bad.wav": [EVENT, EVENT | change]}))
    with pytest.raises(HearSsamError, match=f"^{re.escape(str(path))}: 'bad.wav': an event from .* give ms"):
        read_task(folder).clips("valid")


@pytest.mark.parametrize("event", ["low", None, ["low"], {"label": "low", "start": 100}, {"start": 100, "end": 200}])
def test_what_is_no_event_is_named(tmp_path, event):
    folder = write_task(tmp_path / "beeps", embedding_type="event")
    path = folder / "valid.json"
    path.write_text(json.dumps({"bad.wav": [EVENT, event]}))
    with pytest.raises(HearSsamError, match=f"^{re.escape(str(path))}: 'bad.wav': an event needs label, start and end"):
        read_task(folder).clips("valid")


@pytest.mark.parametrize("duration", [120.0, None])
def test_events_in_seconds_are_named(tmp_path, duration):
    folder = write_task(tmp_path / "beeps", embedding_type="event", sample_duration=duration)
    path = folder / "valid.json"
    clips = {"silent.wav": [], "early.wav": [EVENT | {"start": 0, "end": 1.25}], "late.wav": [EVENT | {"end": 50}]}
    clips["late.wav"][0]["start"] = 3.5
    path.write_text(json.dumps(clips))
    with pytest.raises(HearSsamError, match=f"^{re.escape(str(path))}: .* 'late.wav' at 50: seconds"):
        read_task(folder).clips("valid")
    clips["long.wav"] = [EVENT]  # one event in ms tells that a short one is just short
    path.write_text(json.dumps(clips))
    assert read_task(folder).clips("valid") == clips
    path.write_text(json.dumps({"silent.wav": []}))
    assert read_task(folder).clips("valid") == {"silent.wav": []}


def test_a_split_is_parsed_once(tmp_path, monkeypatch):
    """By all that the driver does with a task, embedding included."""
    task = read_task(write_task(tmp_path / "tones"))
    hear = load_hear_model("tests.tiny_hear")
    opened = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read_bytes(path))
    for _ in range(2):
        list(task.shuffled_clips())
        task.absent_classes()
        embed_task(hear, task, tmp_path / "embedded", again=True)
    opened = [name for name in opened if name.endswith(".json") and "task" not in name]
    assert sorted(opened) == ["test.json", "train.json", "valid.json"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("task_metadata.json", {"evaluation": ["segment_1s"]}, "unknown score 'segment_1s'"),
        ("test.json", {"test-0.wav": [EVENT | {"end": 3}]}, "'test-0.wav': an event from"),
        ("test.json", {"test-0.wav": [{"label": "low", "start": 0.1, "end": 0.5}]}, "seconds"),
        ("test.json", {"absent.wav": [EVENT]}, "absent.wav: is missing"),
        ("test.json", {"/etc/passwd": [EVENT]}, "must be the name of a file in the folder test"),
        ("test.json", {"../train/train-0.wav": [EVENT]}, "must be the name of a file in the folder test"),
    ],
)
def test_a_wrong_task_is_refused_before_anything_is_embedded(tmp_path, monkeypatch, name, content, message):
    folder = write_task(tmp_path / "tasks" / "beeps", embedding_type="event")
    if name == "task_metadata.json":
        content = json.loads((folder / name).read_text()) | content
    (folder / name).write_text(json.dumps(content))

    def embed(audio, model):
        raise AssertionError("embedded")

    monkeypatch.setattr("tests.tiny_hear.get_timestamp_embeddings", embed)
    evaluation = run_evaluation(["tests.tiny_hear"], tasks_dir=tmp_path / "tasks", results_dir=tmp_path / "out")
    (reason,) = evaluation.failures.values()
    assert message in reason and str(folder) in reason and not evaluation.records


def test_missing_split_is_named(tmp_path):
    folder = write_task(tmp_path / "tones")
    (folder / "test.json").unlink()
    with pytest.raises(HearSsamError, match=r"test\.json"):
        read_task(folder).clips("test")


def test_archives_are_unpacked_once_and_safely(tmp_path):
    folder = write_task(tmp_path / "source" / "tones")
    (tmp_path / "tasks").mkdir()
    archive = tmp_path / "tasks" / "hear2021-tones-16000.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "hear-2021.0.6/tasks/tones")
    assert find_archives(tmp_path / "tasks", ["chords"]) == []
    assert find_archives(tmp_path / "tasks", ["tones"]) == [archive]
    cache = tmp_path / "cache"
    (cache / ".unpacking-killed").mkdir(parents=True)  # of a process that was
    (found,) = find_tasks(tmp_path / "tasks", ["tones"], [unpack(archive, cache)])["tones"]
    assert read_task(found).clips("train") == read_task(folder).clips("train")
    (found / "train.json").unlink()  # a second unpacking would bring it back
    (again,) = find_tasks(tmp_path / "tasks", unpacked=[unpack(archive, cache)])["tones"]
    assert again == found and not (found / "train.json").exists()

    with tarfile.open(tmp_path / "tasks" / "hostile.tar", "w") as tar:
        tar.add(folder / "test.json", "../outside.json")
    half = tmp_path / "tasks" / "half.tar.gz"
    half.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    text = tmp_path / "tasks" / "text.tar"
    text.write_text("no archive")
    for path, mend in ((tmp_path / "tasks" / "hostile.tar", "do not trust it"), (half, "again"), (text, "again")):
        with pytest.raises(HearSsamError, match=rf"{path.name}: cannot be unpacked: .*{mend}\.$"):  # in one line
            unpack(path, cache)
    assert not (tmp_path / "outside.json").exists() and not list(cache.glob(".unpacking*"))


def test_archives_of_one_stem_and_other_versions_of_one_name_are_kept_apart(tmp_path):
    folders = [write_task(tmp_path / name, clips=count) for name, count in (("tones", 3), ("chords", 4), ("beeps", 5))]
    names = ("hear.target-a.tar.gz", "hear.target-b.tar.gz", "hear.target-a.tar")
    for folder, name in zip(folders, names, strict=True):
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
            tar.add(folder, f"tasks/{folder.name}")
    unpacked = [unpack(archive, tmp_path / "cache") for archive in find_archives(tmp_path)]
    (tmp_path / "none").mkdir()
    assert list(find_tasks(tmp_path / "none", unpacked=unpacked)) == ["beeps", "chords", "tones"]

    archive = tmp_path / names[0]
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folders[1], "tasks/chords")
    os.utime(archive, (1_000_000_000,) * 2)  # an older release takes the place of a newer one
    assert list(find_tasks(unpack(archive, tmp_path / "cache"))) == ["chords"]


def test_hidden_entries_are_ignored(tmp_path):
    write_task(tmp_path / "tones")
    for hidden in (".ipynb_checkpoints", ".trash/tasks/chords", "release/.tasks/chords", "release/tasks/.chords"):
        write_task(tmp_path / hidden)
    (tmp_path / "._hear-tones.tar.gz").write_bytes(b"what macOS leaves")
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    assert list(find_tasks(tmp_path)) == ["tones"] and find_archives(tmp_path) == []
    write_task(tmp_path / ".cache" / "chords")  # but who names a hidden folder means it
    assert list(find_tasks(tmp_path / ".cache")) == ["chords"]


def test_cards_describe_hears_nineteen_tasks():
    cards = known_tasks()
    assert len(cards) == 20  # Beehive States has two folders
    for name, card in cards.items():
        assert card.folder == name and card.version in name and name in card.archive
        assert all(SCORES[score].maximize == (way == "max") for score, way in card.scores.items())
        assert card.published and all(0 < row["score"] < 1 for row in card.published)
        models = [row["model"] for row in card.published]
        assert len(set(models)) == len(models)
        protocols = ("heareval", "HEAR kit", "HEAR leaderboard", "ten-seed protocol")
        assert all(any(protocol in row["source"] for protocol in protocols) for row in card.published)
    assert sum(card.embedding_type == "event" for card in cards.values()) == 2
    assert cards["esc50-v2.0.0-full"].clips == 2000


def test_a_missing_hear_task_says_where_to_get_it(tmp_path):
    write_task(tmp_path / "tones")
    with pytest.raises(
        HearSsamError,
        match=r"lacks esc50-v2\.0\.0-full; get it with `hear-ssam tasks fetch esc50`, or hear2021-esc50.*zenodo",
    ):
        find_tasks(tmp_path, ["esc50-v2.0.0-full"])


def test_a_folder_that_differs_from_the_release_is_told(tmp_path):
    for name, folds, seconds in ("esc50-v2.0.0-full", 5, 5.0), ("speech_commands-v0.0.2-5h", 0, 1.0):
        version = name.split("-")[1]
        task = read_task(write_task(tmp_path / name, folds=folds, version=version, sample_duration=seconds))
        told = [line.removeprefix("is not as HEAR released it: ").split()[0] for line in differences(task)]
        assert told == ["classes", "clips", "scores"]
    assert differences(read_task(write_task(tmp_path / "mine"))) == []


def test_absent_classes_are_told(tmp_path):
    task = read_task(write_task(tmp_path / "tones", clips=2))
    assert task.absent_classes() == {"train": ["mid"], "valid": ["mid"], "test": ["mid"]}
    assert read_task(write_task(tmp_path / "beeps", embedding_type="event")).absent_classes() == {}
