"""What commands share: one rule for the device, one way to name a model."""

from __future__ import annotations

import argparse

import pytest
import torch

from hear_ssam import cli
from hear_ssam.errors import HearSsamError
from hear_ssam.options import add_device, parse_options, pick_device
from tests.test_cli import COMMANDS


def test_auto_is_what_is_there() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:99", r"device 'cuda:99' cannot be used: .*; take another one, or auto"),
        ("mps", "device 'mps' cannot be used"),
        ("gpu", "unknown device 'gpu'.*Known: auto, cpu, cuda, mps"),
        ("meta", "unknown device 'meta'"),
        ("", "unknown device ''"),
    ],
)
def test_a_device_that_is_not_there_raises(name: str, message: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is an Apple GPU here")
    with pytest.raises(HearSsamError, match=message):
        pick_device(name)


def test_all_commands_describe_options_alike() -> None:
    shared = argparse.ArgumentParser()
    add_device(shared)
    wanted = {action.dest: (action.default, action.help) for action in shared._actions}
    found = {}
    for command, parser in COMMANDS.items():
        for action in parser._actions:
            if action.dest == "device":
                found[command] = (action.default, action.help)
    assert set(found.values()) == {wanted["device"]}
    assert {"embed", "evaluate", "check", "pretrain"} <= set(found)


@pytest.mark.parametrize("command", [["search"], ["classify", "predict"]])
def test_what_is_made_already_names_its_model(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    assert "shipped ssam_tiny" not in capsys.readouterr().out


def test_model_options_are_a_json_object() -> None:
    assert parse_options('{"precision": "bf16"}') == {"precision": "bf16"}
    with pytest.raises(HearSsamError, match="model options: name 'x' by --model, not as"):
        parse_options('{"model_file_path": "x"}')
    for text in ("[1]", "{", "1"):
        with pytest.raises(HearSsamError, match="model options must be a JSON object"):
            parse_options(text)


def test_embed_takes_model_options(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    (tmp_path / "a.wav").write_bytes(b"no audio")
    words = ["embed", str(tmp_path / "a.wav"), "-o", str(tmp_path / "out"), "--model-options", '{"poling": "mean"}']
    assert cli.main(words) == 2
    assert "Did you mean 'pooling'?" in capsys.readouterr().err
