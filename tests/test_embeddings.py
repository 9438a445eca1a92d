"""Stage one writes heareval's folder layout, row for row, for any HEAR module."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch

from hear_ssam import HearSsamError
from hear_ssam.evaluation.embeddings import embed_task, frame_labels, require_done
from hear_ssam.evaluation.evaluate import run_evaluation
from hear_ssam.evaluation.module import load_hear_model
from hear_ssam.evaluation.tasks import read_task

from . import tiny_hear
from .tiny_tasks import write_task

TRAINED = """
from pathlib import Path
import torch
from tests import tiny_hear
from tests.tiny_hear import *

def load_model(model_file_path="latest.txt"):
    model = tiny_hear.load_model()
    model.register_buffer("weight", torch.tensor(float(Path(model_file_path).read_text())))
    return model
"""


@pytest.fixture(scope="module")
def hear():
    return load_hear_model("tests.tiny_hear")


def embed_alone(path):
    audio, _ = soundfile.read(path, dtype="float32")
    return tiny_hear.get_scene_embeddings(torch.from_numpy(audio)[None], tiny_hear.load_model())[0].numpy()


def test_scene_folder(hear, tmp_path):
    task = read_task(write_task(tmp_path / "tones", folds=3, clips=8))
    out = embed_task(hear, task.folder, tmp_path / "out" / "tones")
    for split, order in task.shuffled_clips():
        assert json.loads((out / f"{split}.embedding-dimensions.json").read_text()) == [8, 40]
        rows = np.fromfile(out / f"{split}.embeddings.npy", np.float32).reshape(8, 40)
        alone = np.stack([embed_alone(task.folder / "16000" / split / name) for name in order])
        np.testing.assert_allclose(rows, alone, atol=1e-5)
        labels = task.clips(split)
        assert pickle.loads((out / f"{split}.target-labels.pkl").read_bytes()) == [labels[name] for name in order]
        assert (out / f"{split}.json").read_bytes() == (task.folder / f"{split}.json").read_bytes()
    assert not [path.name for path in out.iterdir() if path.name.startswith(".") and path.name != ".done.embeddings"]
    made_by = json.loads((out / "embeddings.json").read_text())
    assert (made_by["model"], made_by["clips"], made_by["dim"]) == ("tests.tiny_hear", 24, 40)


def test_event_folder(hear, tmp_path):
    task = read_task(write_task(tmp_path / "beeps", embedding_type="event"))
    out = embed_task(hear, task.folder, tmp_path / "out")
    split, order = next(iter(task.shuffled_clips()))
    stamped = json.loads((out / f"{split}.filename-timestamps.json").read_text())
    frames = 20  # of 50 ms
    assert json.loads((out / f"{split}.embedding-dimensions.json").read_text()) == [len(order) * frames, 40]
    assert [name for name, _ in stamped] == [str(out / split / name) for name in order for _ in range(frames)]
    assert [ms for _, ms in stamped] == [25.0 + 50 * t for _ in order for t in range(frames)]
    labels = pickle.loads((out / f"{split}.target-labels.pkl").read_bytes())
    for (path, ms), active in zip(stamped, labels, strict=True):
        (event,) = task.clips(split)[path.rpartition("/")[2]]
        assert active == ([event["label"]] if event["start"] <= ms <= event["end"] else [])


def test_frame_labels_equal_heareval(golden):
    for case in json.loads((golden / "heareval" / "scores.json").read_text())["timestamp_labels"]:
        for events, times, expected in zip(case["events"], case["timestamps"], case["labels"], strict=True):
            ours = frame_labels(events, np.array(times, np.float32))
            assert [set(frame) for frame in ours] == [set(frame) for frame in expected]


def test_a_finished_folder_is_kept_a_half_done_or_outdated_one_is_made_again(hear, tmp_path):
    folder = write_task(tmp_path / "tones")
    out = tmp_path / "out"

    def run():
        embed_task(hear, folder, out)
        return (out / "train.embeddings.npy").stat().st_mtime_ns

    first = run()
    assert run() == first
    (out / ".done.embeddings").unlink()
    with pytest.raises(HearSsamError, match="not a finished embedding folder"):
        require_done(out)
    second = run()
    assert second > first
    clips = json.loads((folder / "valid.json").read_text())
    clips.popitem()
    (folder / "valid.json").write_text(json.dumps(clips))
    assert run() > second
    assert json.loads((out / "valid.embedding-dimensions.json").read_text())[0] == len(clips)


def test_clips_of_different_lengths(hear, tmp_path):
    folder = write_task(tmp_path / "tones", sample_duration=None)
    path = folder / "16000" / "test" / "test-2.wav"
    soundfile.write(path, soundfile.read(path)[0][:8000], 16000)
    for duration in (None, 1.0):
        metadata = json.loads((folder / "task_metadata.json").read_text())
        (folder / "task_metadata.json").write_text(json.dumps(metadata | {"sample_duration": duration}))
        out = embed_task(hear, folder, tmp_path / f"out-{duration}")
        order = dict(read_task(folder).shuffled_clips())["test"]
        rows = np.fromfile(out / "test.embeddings.npy", np.float32).reshape(-1, 40)
        np.testing.assert_allclose(rows[order.index("test-2.wav")], embed_alone(path), atol=1e-5)


def test_other_rates_only_on_request(hear, tmp_path):
    folder = write_task(tmp_path / "tones", rate=48000)
    with pytest.raises(HearSsamError, match=r"no 16000 Hz audio for train, only 48000 Hz.*--resample"):
        embed_task(hear, folder, tmp_path / "out")
    resampled = embed_task(hear, folder, tmp_path / "out", resample=True)
    (folder / "48000").rename(folder / "16000")
    with pytest.raises(HearSsamError, match=r"train-0\.wav has 48000 Hz"):
        embed_task(hear, folder, tmp_path / "again")
    native = embed_task(hear, write_task(tmp_path / "native"), tmp_path / "native-out")
    a, b = (np.fromfile(out / "test.embeddings.npy", np.float32).reshape(-1, 40) for out in (resampled, native))
    assert (np.exp(a).argmax(1) == np.exp(b).argmax(1)).all()  # the tones stay where they are


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("nan", r"NaN or infinite values for the clip train-0\.wav of the task tones"),
        ("shape", r"get_scene_embeddings returned embeddings \(6, 39\)"),
        ("tolist", r"get_scene_embeddings returned a list; .* torch\.Tensor"),
        ("meta", r"get_scene_embeddings returned a tensor that cannot be read: NotImplementedError"),
        (
            "exit",
            r"get_scene_embeddings failed for the clip train-0\.wav and 5 others .*: SystemExit: 3 \(.*tiny_hear\.py",
        ),
    ],
)
def test_wrong_scene_embeddings(tmp_path, broken, message):
    hear = load_hear_model("tests.tiny_hear", options={"broken": broken})
    assert hear.name == f"tests.tiny_hear-broken={broken}"
    with pytest.raises(HearSsamError, match=message):
        embed_task(hear, write_task(tmp_path / "tones"), tmp_path / "out")


def test_weights_tell_models_apart(tmp_path):
    """By the digest of a file, or by the name of anything else that a module understands."""
    (tmp_path / "weights").write_bytes(b"")
    models = [load_hear_model("tests.tiny_hear", str(name)) for name in ("", "base", "large", tmp_path / "weights")]
    assert [model.name for model in models[:3]] == [
        f"tests.tiny_hear{name}" for name in ("", "-weights=base", "-weights=large")
    ]
    assert models[3].name == "tests.tiny_hear" and len(models[3].checkpoint_sha256) == 64


def test_weights_that_a_module_finds_itself_are_a_part_of_the_origin(tmp_path, monkeypatch, serial):
    """As those of a training that goes on writing to the same file."""
    write_task(tmp_path / "tasks" / "tones")
    (tmp_path / "trained.py").write_text(TRAINED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "out", "workers": 1, "probe": "knn"}
    times = []
    for weight in "1122":
        (tmp_path / "latest.txt").write_text(weight)
        records = run_evaluation(["trained"], **run).records
        assert {(r["model"], r["checkpoint_sha256"]) for r in records} == {("trained", "")}
        times += [len((tmp_path / "out" / "records.jsonl").read_text().splitlines())]
    assert times[0] == times[1] < times[2] == times[3]


@pytest.mark.parametrize("kind", ["bfloat16", "numpy", "conjugate"])
@pytest.mark.parametrize("embedding_type", ["scene", "event"])
def test_modules_may_return_what_real_ones_do(hear, tmp_path, kind, embedding_type):
    folder = write_task(tmp_path / "task", embedding_type=embedding_type)
    plain, odd = (
        np.fromfile(embed_task(model, folder, tmp_path / name) / "test.embeddings.npy", np.float32)
        for name, model in (("plain", hear), ("odd", load_hear_model("tests.tiny_hear", options={"broken": kind})))
    )
    np.testing.assert_allclose(odd, plain, atol=0.05 if kind == "bfloat16" else 0)


@pytest.mark.parametrize("embedding_type", ["scene", "event"])
def test_a_clip_without_frames_is_named(tmp_path, embedding_type):
    hear = load_hear_model("tests.tiny_hear", options={"broken": "empty"})
    folder = write_task(tmp_path / "task", embedding_type=embedding_type)
    message = "no frames for" if embedding_type == "event" else "NaN or infinite values for"
    with pytest.raises(HearSsamError, match=rf"{message} the clip train-0\.wav"):
        embed_task(hear, folder, tmp_path / "out")


def test_a_model_may_call_a_part_of_it_backend(tmp_path):
    """As ours calls the name of its scan, which is noted."""
    hear = load_hear_model("tests.tiny_hear")
    hear.model.backend = torch.nn.Identity()
    out = embed_task(hear, write_task(tmp_path / "tones"), tmp_path / "out")
    assert embedded_by(out)["backend"] is None and embedded_by(out)["clips"] == 18


def test_names_tell_options_apart():
    """Text from numbers, and text that looks like the next option."""
    options = [{"pool": "mean"}, {"pool": "1"}, {"pool": 1}, {"pool": "None"}, {"pool": None}, {"pool": True}]
    options += [{"pool": "a-broken=b"}, {"pool": "a", "broken": "b"}, {"pool": "[1]"}, {"pool": [1]}]
    names = [load_hear_model("tests.tiny_hear", options=chosen).name for chosen in options]
    assert len(set(names)) == len(names) and names[0] == "tests.tiny_hear-pool=mean"


def embedded_by(out):
    return json.loads((out / "embeddings.json").read_text())


def test_another_origin_is_made_again(hear, tmp_path, monkeypatch):
    """Another model, module file or version, task or rate in the same folder; what is the same is kept."""
    task = write_task(tmp_path / "tones")
    out = embed_task(hear, task, tmp_path / "out")

    def made_again(model=hear, **options):
        (out / "test.embeddings.npy").write_bytes(b"old")
        embed_task(model, task, out, **options)
        return (out / "test.embeddings.npy").read_bytes() != b"old"

    assert not made_again()
    assert made_again(load_hear_model("tests.tiny_hear", options={"bands": 20})) and embedded_by(out)["dim"] == 20
    assert made_again() and not made_again()
    monkeypatch.setattr(tiny_hear, "__version__", "2.0", raising=False)
    assert not made_again()  # what was loaded before is what it was, whatever is in its file meanwhile
    newer = load_hear_model("tests.tiny_hear")
    assert made_again(newer) and embedded_by(out)["module_version"] == "2.0"
    monkeypatch.setattr(tiny_hear, "__file__", str(tmp_path / "tones" / "train.json"))
    assert not made_again(newer) and made_again(load_hear_model("tests.tiny_hear")) and made_again()
    (task / "labelvocabulary.csv").write_text("idx,label\n0,low\n1,mid\n2,high\n")
    assert made_again() and not made_again()


def test_a_task_that_was_changed_after_it_was_read_is_taken_as_it_is(hear, tmp_path):
    """Its digest, its labels and the copies of its files belong together."""
    task = read_task(write_task(tmp_path / "tones"))
    before = task.clips("train")
    (task.folder / "train.json").write_text(json.dumps({name: ["mid"] for name in before}))
    out = embed_task(hear, task, tmp_path / "out")
    assert pickle.loads((out / "train.target-labels.pkl").read_bytes()) == [["mid"]] * len(before)


def test_the_code_of_a_module_is_what_was_imported(tmp_path, monkeypatch):
    """As in a notebook, where its file is edited meanwhile."""
    (tmp_path / "edited.py").write_text("from tests.tiny_hear import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = load_hear_model("edited").source
    (tmp_path / "edited.py").write_text("from tests.tiny_hear import *\nPOOL = 'max'\n")
    assert load_hear_model("edited").source == before
    monkeypatch.delitem(sys.modules, "edited")
    assert load_hear_model("edited").source["module_sha256"] != before["module_sha256"]


def test_resampling_is_part_of_the_origin(hear, tmp_path):
    task = write_task(tmp_path / "48" / "tones", rate=48000)
    out = embed_task(hear, task, tmp_path / "out", resample=True)
    assert embedded_by(out)["audio_hz"] == [48000]
    with pytest.raises(HearSsamError, match="only 48000 Hz"):
        embed_task(hear, task, out)
    shutil.move(write_task(tmp_path / "16" / "tones") / "16000", task)  # native audio arrives
    embed_task(hear, task, out, resample=True)
    assert embedded_by(out)["audio_hz"] == [16000]
    for rate in ("16000", "48000"):  # without audio, what is there serves
        shutil.rmtree(task / rate)
    assert embed_task(hear, task, out) == out


def test_foreign_folders_are_left_alone(hear, tmp_path):
    task, other = write_task(tmp_path / "tones"), write_task(tmp_path / "other")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years")
    for folder in (task, other, tmp_path / "notes"):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(HearSsamError, match="holds something else than embeddings; choose another folder"):
            embed_task(hear, task, folder, again=True)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    out = embed_task(hear, task, tmp_path / "out")
    (out / "thesis.txt").write_text("years")
    embed_task(hear, task, out, again=True)
    assert (out / "thesis.txt").read_text() == "years"


def test_timestamps_in_seconds(tmp_path):
    hear = load_hear_model("tests.tiny_hear", options={"broken": "seconds"})
    with pytest.raises(HearSsamError, match="they must be milliseconds"):
        embed_task(hear, write_task(tmp_path / "beeps", embedding_type="event"), tmp_path / "out")


def test_a_timestamp_that_is_no_number(hear, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tests.tiny_hear.get_timestamp_embeddings",
        lambda audio, model: (torch.zeros(len(audio), 1, 40), torch.full((len(audio), 1), torch.nan)),
    )
    with pytest.raises(HearSsamError, match="must lie within the audio"):
        embed_task(hear, write_task(tmp_path / "beeps", embedding_type="event"), tmp_path / "out")


def test_missing_audio_is_named(hear, tmp_path):
    folder = write_task(tmp_path / "tones")
    (folder / "16000" / "valid" / "valid-3.wav").unlink()
    with pytest.raises(HearSsamError, match=r"valid-3\.wav"):
        embed_task(hear, folder, tmp_path / "out")
    shutil.rmtree(folder / "16000")
    with pytest.raises(HearSsamError, match="has no audio: the folder 16000/train is missing"):
        embed_task(hear, folder, tmp_path / "out")


def test_a_module_in_the_current_folder_will_do(tmp_path, monkeypatch):
    """For every command that names one: the script `hear-ssam` does not look there by itself."""
    (tmp_path / "lies_here.py").write_text("from tests.tiny_hear import *\n")
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert load_hear_model("lies_here").name == "lies_here"


def test_modules_without_the_hear_api(monkeypatch):
    with pytest.raises(HearSsamError, match="cannot import the HEAR module 'no_such_module'"):
        load_hear_model("no_such_module")
    with pytest.raises(HearSsamError, match="json has no function load_model"):
        load_hear_model("json")
    with pytest.raises(HearSsamError, match=r"tests.tiny_hear.load_model failed: TypeError: .*'widht'"):
        load_hear_model("tests.tiny_hear", options={"widht": 2})
    with pytest.raises(
        HearSsamError, match=r"tests.tiny_hear.load_model failed: SystemExit: no licence \(.*line \d+\)"
    ):
        load_hear_model("tests.tiny_hear", options={"broken": "exit at once"})
    with pytest.raises(HearSsamError, match=r"load_model returned a str, not a torch\.nn\.Module"):
        load_hear_model("tests.tiny_hear", options={"broken": "no model"})
    with pytest.raises(HearSsamError, match=r"needs the attribute scene_embedding_size .*not -1"):
        load_hear_model("tests.tiny_hear", options={"bands": -1})
    monkeypatch.delattr(tiny_hear.Bands, "sample_rate")
    with pytest.raises(HearSsamError, match="needs the attribute sample_rate"):
        load_hear_model("tests.tiny_hear")
