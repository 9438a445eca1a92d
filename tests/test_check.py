"""`hear-ssam check` passes a sound module and finds each fault, those that hear-validator lets pass too."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hear_ssam import cli
from hear_ssam.errors import HearSsamError
from hear_ssam.evaluation.check import CHECKS, Checks, _Warning, check_model
from hear_ssam.evaluation.module import load_hear_model


def findings(broken=""):
    hear = load_hear_model("tests.tiny_hear", options={"broken": broken})
    return {finding.check: finding for finding in check_model(hear, long_seconds=300)}


def test_a_sound_module_passes():
    found = findings()
    assert list(found) == [name for name, *_ in CHECKS]
    assert {finding.level for finding in found.values()} <= {"ok", "warning"}
    assert found["drift"].level == found["batch independence"].level == "ok"


@pytest.mark.parametrize(
    ("broken", "check", "words"),
    [
        ("rate", "sample rate", "sample_rate is 12345"),
        ("shape", "scene embeddings", "expected float32 (4, 40)"),
        ("batch", "batch independence", "other clips of its batch"),
        ("seconds", "milliseconds", "seconds?"),
        ("drift", "drift", "timestamps drift"),
        ("silence", "silence", "digital silence"),
        ("nan", "scene embeddings", "NaN"),
    ],
)
def test_each_fault_is_found(broken, check, words):
    finding = findings(broken)[check]
    assert finding.level == "error" and words in finding.text


@pytest.mark.parametrize(("rate", "hop"), [(22050, 1103), (22050, 1102), (16000, 544), (16000, 6000), (16000, 40000)])
def test_steps_of_any_length_do_not_pass_for_drift(rate, hop):
    """Mean energies of frames whose timestamps are right."""

    def energies(audio, model):
        frames = audio.unfold(1, hop, hop).square().mean(2)
        times = (torch.arange(frames.shape[1]) + 0.5) * hop / rate * 1000
        return frames[..., None], times.expand(len(audio), -1)

    hear = SimpleNamespace(
        module=SimpleNamespace(get_timestamp_embeddings=energies), model=None, sample_rate=rate, device="cpu"
    )
    if hop / rate > 2:
        with pytest.raises(_Warning, match=r"every 2\.5 s"):
            Checks(hear, 300).drift()
    else:
        assert "s later" in Checks(hear, 300).drift()
        hear.module.get_timestamp_embeddings = lambda *_: (energies(*_)[0], energies(*_)[1] / 3)
        with pytest.raises(HearSsamError, match=r"300 s of audio have no timestamp near \d+ s, the last is \d+"):
            Checks(hear, 300).drift()


def leave(*_):
    sys.exit("no GPU")


@pytest.mark.parametrize(
    ("scene", "timestamps", "words"),
    [
        (lambda *_: None, lambda *_: None, "returned a NoneType; HEAR wants a torch.Tensor"),
        (lambda *_: np.zeros((4, 40), np.float32), lambda *_: 3, "returned a ndarray; HEAR wants a torch.Tensor"),
        (lambda *_: "text", lambda *_: (torch.zeros(2, 3, 40), [1, 2, 3]), "returned a str; HEAR wants"),
        (leave, leave, "SystemExit: no GPU"),
        (lambda *_: 1 / 0, lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_nonsense_is_named_and_ends_nothing(scene, timestamps, words):
    sound = load_hear_model("tests.tiny_hear")
    module = SimpleNamespace(get_scene_embeddings=scene, get_timestamp_embeddings=timestamps)
    hear = dataclasses.replace(sound, module=module)
    found = {finding.check: finding for finding in check_model(hear, long_seconds=300)}
    assert list(found) == [name for name, *_ in CHECKS]
    assert words in found["scene embeddings"].text
    assert {found[name].level for name in ("scene embeddings", "timestamp embeddings", "drift")} == {"error"}


def test_audio_is_float32_on_the_models_device_whatever_torchs_defaults():
    sound = load_hear_model("tests.tiny_hear")
    seen = []

    def scene(audio, model):
        seen.append((audio.dtype, audio.device.type))
        return sound.module.get_scene_embeddings(audio, model)

    def timestamps(audio, model):
        seen.append((audio.dtype, audio.device.type))
        return sound.module.get_timestamp_embeddings(audio, model)

    module = SimpleNamespace(get_scene_embeddings=scene, get_timestamp_embeddings=timestamps)
    hear = dataclasses.replace(sound, module=module, device=torch.device("cpu"))
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = {finding.check: finding.level for finding in check_model(hear, long_seconds=300)}
    finally:
        torch.set_default_dtype(default)
        torch.set_default_device(None)
    assert set(seen) == {(torch.float32, "cpu")}
    assert found["scene embeddings"] == found["batch independence"] == "ok"


def test_short_audio_that_only_tiny_clips_break_is_a_warning():
    finding = findings("short")["short audio"]
    assert finding.level == "warning" and "0.03 s" in finding.text


def test_training_mode_is_a_warning():
    hear = load_hear_model("tests.tiny_hear")
    hear.model.train()
    (finding,) = (f for f in check_model(hear, long_seconds=300) if f.check == "evaluation mode")
    assert finding.level == "warning" and "model.eval()" in finding.text


def test_the_command(capsys):
    assert cli.main(["check", "tests.tiny_hear", "--long", "300"]) == 0
    captured = capsys.readouterr().out
    assert "ok       drift" in captured and "FSD50K has clips of 0.3 s (hear-validator does not look)" in captured
    assert cli.main(["check", "tests.tiny_hear", "--long", "100"]) == 0
    assert "warning  drift: 100 s are too short to tell" in capsys.readouterr().out
    options = ["--model-options", '{"broken": "drift"}', "--long", "300", "--json"]
    assert cli.main(["check", "tests.tiny_hear", *options]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["check"] for line in lines if line["level"] == "error"] == ["drift"]
    assert cli.main(["check", "json"]) == 2
    for seconds in ("-5", "0", "nan", "inf"):  # no fault of the module
        assert cli.main(["check", "tests.tiny_hear", "--long", seconds]) == 2
    assert "no function load_model" in capsys.readouterr().err
