"""HEAR task folders are read as heareval reads them, and what is wrong with one is said by name."""

import json
import pickle
import re
import tarfile

import pytest

from hear_ssam import HearSsamError
from hear_ssam.scores import SCORES
from hear_ssam.tasks import find_archives, find_tasks, known_tasks, read_task, unpack

from .tiny_tasks import write_task


def test_folds_rotate_as_in_heareval(golden, tmp_path):
    expected = json.loads((golden / "heareval" / "scores.json").read_text())["folds"]
    for count, splits in expected.items():
        task = read_task(write_task(tmp_path / f"k{count}", folds=int(count), clips=3))
        assert [
            {"train": list(s.train), "valid": [s.valid], "test": [s.test]} for s in task.data_splits
        ] == splits


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


def test_tasks_are_found_by_name_also_below_an_unpacked_archive(tmp_path):
    write_task(tmp_path / "hear-2021.0.6" / "tasks" / "tones")
    write_task(tmp_path / "chords")
    write_task(tmp_path / "elsewhere" / "tones")
    assert list(find_tasks(tmp_path)) == ["chords", "tones"]
    places = find_tasks(tmp_path, ["tones"], [tmp_path / "elsewhere"])
    assert places == {"tones": [tmp_path / "hear-2021.0.6" / "tasks" / "tones", tmp_path / "elsewhere" / "tones"]}
    with pytest.raises(HearSsamError, match="Did you mean 'tones'"):
        find_tasks(tmp_path, ["tone"])
    with pytest.raises(HearSsamError, match="no folder"):
        find_tasks(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_mode": "loocv"}, "unknown split_mode"),
        ({"splits": ["train", "test"]}, "needs the splits train, valid and test"),
        ({"split_mode": "new_split_kfold", "splits": ["fold00", "fold01"]}, "at least three"),
        ({"evaluation": []}, "at least one score"),
    ],
)
def test_contradictory_metadata(tmp_path, change, message):
    folder = write_task(tmp_path / "tones")
    path = folder / "task_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(HearSsamError, match=message):
        read_task(folder)


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
    (found,) = find_tasks(tmp_path / "tasks", ["tones"], [unpack(archive, cache)])["tones"]
    assert read_task(found).clips("train") == read_task(folder).clips("train")
    (found / "train.json").unlink()  # a second unpacking would bring it back
    (again,) = find_tasks(tmp_path / "tasks", unpacked=[unpack(archive, cache)])["tones"]
    assert again == found and not (found / "train.json").exists()

    with tarfile.open(tmp_path / "tasks" / "hostile.tar", "w") as tar:
        tar.add(folder / "test.json", "../outside.json")
    half = tmp_path / "tasks" / "half.tar.gz"
    half.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    for path in (tmp_path / "tasks" / "hostile.tar", half):
        with pytest.raises(HearSsamError, match=f"cannot unpack .*{path.name}"):
            unpack(path, cache)
    assert not (tmp_path / "outside.json").exists() and not list(cache.glob(".unpacking*"))


def test_cards_describe_hears_nineteen_tasks():
    cards = known_tasks()
    assert len(cards) == 20  # Beehive States has two folders
    for name, card in cards.items():
        assert card.folder == name and card.version in name and name in card.archive
        assert all(SCORES[score].maximize == (way == "max") for score, way in card.scores.items())
        assert all(0 < row["score"] < 1 and row["source"] for row in card.published)
    assert sum(card.embedding_type == "event" for card in cards.values()) == 2
    assert cards["esc50-v2.0.0-full"].clips == 2000


def test_a_missing_hear_task_says_where_to_get_it(tmp_path):
    write_task(tmp_path / "tones")
    with pytest.raises(HearSsamError, match=r"lacks esc50-v2\.0\.0-full; get hear2021-esc50.*zenodo"):
        find_tasks(tmp_path, ["esc50-v2.0.0-full"])


def test_a_folder_that_differs_from_the_release_is_told(tmp_path):
    task = read_task(write_task(tmp_path / "esc50-v2.0.0-full", folds=5, version="v2.0.0", sample_duration=5.0))
    told = known_tasks()["esc50-v2.0.0-full"].differences(task)
    assert [line.split()[0] for line in told] == ["classes", "clips", "scores"]


def test_absent_classes_are_told(tmp_path):
    task = read_task(write_task(tmp_path / "tones", clips=2))
    assert task.absent_classes() == {"train": ["mid"], "valid": ["mid"], "test": ["mid"]}
    assert read_task(write_task(tmp_path / "beeps", embedding_type="event")).absent_classes() == {}
