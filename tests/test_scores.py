"""HEAR's scores against heareval's own values and by their definitions."""

import json
import math

import numpy as np
import pytest
from scipy.ndimage import median_filter
from sklearn.metrics import average_precision_score

from hear_ssam.evaluation.scores import (
    SCORES,
    EventJudge,
    Events,
    active_frames,
    aggregate_folds,
    decode_events,
    to_events,
)

SCENE = ("top1_acc", "pitch_acc", "chroma_acc", "mAP", "d_prime", "aucroc")


def test_scene_scores_equal_heareval(golden):
    for case in json.loads((golden / "heareval" / "scores.json").read_text())["scene"]:
        prediction, target = np.array(case["prediction"]), np.array(case["target"])
        for name in SCENE:
            assert SCORES[name].compute(prediction, target) == pytest.approx(case["scores"][name], rel=1e-12)


def test_perfect_and_undefined_scores():
    target = np.eye(3)[[0, 1, 2, 0]]
    perfect = {name: SCORES[name].compute(target, target) for name in SCENE}
    assert perfect["d_prime"] == math.inf  # Φ⁻¹(1), as in heareval
    assert all(value == 1 for name, value in perfect.items() if name != "d_prime")
    absent = np.eye(3)[[0, 1, 1, 0]]  # the last class has no positive
    assert SCORES["mAP"].compute(absent, absent) == pytest.approx(2 / 3)
    assert math.isnan(SCORES["aucroc"].compute(absent, absent))
    assert math.isnan(SCORES["d_prime"].compute(absent, absent))


def test_average_precision_is_scikit_learns_to_the_last_bit():
    generator = np.random.default_rng(0)
    for rows in (1, 2, 50, 333):
        prediction = generator.random((rows, 7)).astype(np.float32)
        prediction[:, 3] = prediction[:, 3].round(1)  # ties
        target = (generator.random((rows, 7)) < 0.3).astype(np.float32)
        target[0] = 1
        assert SCORES["mAP"].compute(prediction, target) == average_precision_score(target, prediction)


def test_octave_errors_are_forgiven_by_chroma_alone():
    target, prediction = np.eye(24)[[3, 5]], np.eye(24)[[15, 5]]
    assert SCORES["pitch_acc"].compute(prediction, target) == 0.5
    assert SCORES["chroma_acc"].compute(prediction, target) == 1


def test_fold_scores_are_averaged(golden):
    case = json.loads((golden / "heareval" / "scores.json").read_text())["aggregate"]
    means = aggregate_folds(list(case["input"].values()))
    assert {f"{name}_mean": value for name, value in means.items()} == pytest.approx(
        {name: value for name, value in case["output"].items() if name.endswith("_mean")}
    )
    undefined = [
        {"aucroc": 0.5, "d_prime": math.inf, "mAP": math.nan},
        {"aucroc": math.nan, "d_prime": 1.0, "mAP": math.nan},
    ]
    assert (
        repr(aggregate_folds(undefined)) == "{'aucroc': 0.5, 'd_prime': inf, 'mAP': nan}"
    )  # as pandas, and so heareval


# ---- events


def test_event_scores_equal_sed_eval(golden):
    for case in json.loads((golden / "heareval" / "scores.json").read_text())["event"]:
        events = [*case["reference"].values(), *case["estimated"].values()]
        index = {label: i for i, label in enumerate(sorted({e["label"] for file in events for e in file}))}
        reference = {file: to_events(listed, index) for file, listed in case["reference"].items()}
        estimated = {file: to_events(listed, index) for file, listed in case["estimated"].items()}
        for name, parts in case["scores"].items():
            ours = SCORES[name].compute(estimated, reference, len(index))
            assert [ours[part] for part, _ in parts] == pytest.approx([value for _, value in parts], rel=1e-12)


def test_decoded_events_equal_heareval(golden):
    for case in json.loads((golden / "heareval" / "scores.json").read_text())["create_events"]:
        probability, timestamps = np.array(case["prediction"], np.float32), np.array(case["timestamps"])
        active = active_frames(probability, timestamps, case["median_filter_ms"])
        found = decode_events(active, timestamps, case["min_duration"])
        expected = to_events(case["events"], {label: i for i, label in enumerate("abcdefgh")})
        assert sorted(zip(*found, strict=True)) == sorted(zip(*expected, strict=True))


def test_counting_majorities_is_a_median_filter():
    generator = np.random.default_rng(0)
    for frames in (1, 2, 7, 40):
        probability = generator.random((frames, 3)).astype(np.float32)
        for width in (1, 2, 5, 6, 11):
            expected = median_filter(probability, size=(width, 1)) > 0.5
            timestamps = np.arange(frames) * 10.0
            if frames > 1:
                assert (active_frames(probability, timestamps, width * 10 - 4) == expected).all()  # rounded


def test_matching_is_as_large_as_possible():
    """Greedy matching from the left would spend the first estimate on the first event and miss the second."""
    reference = {"f": Events(np.array([0, 0]), np.array([100.0, 300.0]), np.array([200.0, 400.0]))}
    estimated = {"f": Events(np.array([0, 0]), np.array([120.0, 0.0]), np.array([200.0, 400.0]))}
    assert SCORES["event_onset_200ms_fms"].compute(estimated, reference, 1)["f_measure"] == 1


@pytest.mark.parametrize(("name", "collar"), [("event_onset_50ms_fms", 50), ("event_onset_200ms_fms", 200)])
def test_onsets_match_up_to_the_collar_and_no_further(name, collar):
    reference = {"f": Events(np.array([0]), np.array([1000.0]), np.array([2000.0]))}
    for shift, expected in ((collar - 0.1, 1), (collar + 0.1, 0), (0.1 - collar, 1), (-0.1 - collar, 0)):
        estimated = {"f": Events(np.array([0]), np.array([1000.0 + shift]), np.array([1500.0]))}
        assert SCORES[name].compute(estimated, reference, 1)["f_measure"] == expected


def test_no_events():
    none = {"f": Events(*(np.zeros(0) for _ in range(3)))}
    one = {"f": Events(np.array([0]), np.array([0.0]), np.array([1500.0]))}
    assert math.isnan(SCORES["event_onset_200ms_fms"].compute(none, one, 1)["f_measure"])  # as sed_eval has it
    assert SCORES["segment_1s_er"].compute(none, one, 1)["error_rate"] == 1  # two segments deleted of two
    assert math.isnan(SCORES["segment_1s_er"].compute(one, none, 1)["error_rate"])


def test_the_judge_chooses_the_postprocessing():
    times = np.arange(40) * 25.0
    truth = Events(np.array([0]), np.array([250.0]), np.array([450.0]))
    probability = ((times >= 250) & (times <= 450)).astype(np.float32)[:, None]
    shuffled = np.random.default_rng(0).permutation(40)
    grid = {"min_duration": [125, 250], "median_filter_ms": [0]}
    judge = EventJudge(["event_onset_200ms_fms"], 1, ["f"] * 40, times[shuffled], {"f": truth}, grid)
    score, chosen = judge.validate(probability[shuffled])
    assert (score, chosen) == (1.0, {"median_filter_ms": 0, "min_duration": 125})  # 250 would drop the event of 200 ms
    assert judge.test(probability[shuffled], chosen)["event_onset_200ms_fms_recall"] == 1
    assert judge.validate(np.zeros((40, 1)))[1] == {"median_filter_ms": 0, "min_duration": 250}  # ties: the larger
