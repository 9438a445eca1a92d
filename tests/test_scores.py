"""HEAR's scores against heareval's own values and by their definitions."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from hear_ssam import HearSsamError
from hear_ssam.scores import SCORES, aggregate_folds, named_score

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


def test_unknown_score():
    with pytest.raises(HearSsamError, match="Did you mean 'top1_acc'"):
        named_score("top_acc")
