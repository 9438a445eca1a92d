"""The command line as a whole: starts fast, helps by example, fails in one line."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hear_ssam import __version__, cli
from hear_ssam.errors import HearSsamError

ROOT = Path(__file__).resolve().parent.parent


def call(code: str, **options: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, **options)


def commands(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, argparse.ArgumentParser]:
    """Every command that can be called, those of commands included."""
    (nested,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)] or [None]
    if nested is None:
        return {prefix: parser}
    found = {}
    for name, below in nested.choices.items():
        found |= commands(below, f"{prefix} {name}".strip())
    return found


COMMANDS = commands(cli.build_parser())


def test_every_command_is_there() -> None:
    assert {name.split()[0] for name in COMMANDS} == set(cli.COMMANDS)


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_needs_no_heavy_import(command: str) -> None:
    done = call(
        "import sys\n"
        "from hear_ssam.cli import main\n"
        f"try: main({[*command.split(), '--help']})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'scipy', 'sklearn', 'pyarrow', 'matplotlib'}\n"
        "print(*heavy & set(sys.modules), file=sys.stderr)"
    )
    assert done.returncode == 0 and done.stderr.strip() == ""
    assert "usage: hear-ssam" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_examples_that_parse(command: str) -> None:
    text = COMMANDS[command].format_help()
    examples = [line.strip() for line in text[text.index("examples:") :].splitlines() if "hear-ssam " in line]
    assert any(f"hear-ssam {command}" in example for example in examples)
    for example in examples:
        words = shlex.split(re.split(r"  +| \| | > ", example)[0])  # without a remark, a pipe
        start = words.index("hear-ssam") + 1
        if "--help" not in words:
            cli.build_parser().parse_args(words[start:])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"hear-ssam {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["embd"], ["embed"], ["embed", "a.wav", "-o", "b", "--modle", "x"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: hear-ssam" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        (HearSsamError("a.wav: is broken."), 2, "hear-ssam: error: a.wav: is broken.\n"),
        (KeyboardInterrupt(), 130, "hear-ssam: interrupted\n"),
    ],
)
def test_what_ends_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: BaseException, code: int, message: str
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise ending

    monkeypatch.setattr("hear_ssam.doctor.run", run)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == message


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Call the command as its entry point does, on a terminal of some encoding."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(encoding: str, *arguments: str) -> tuple[int, str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["hear-ssam", *arguments])
        code = cli.main()
        for stream in streams:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
        return code, out, err

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("encoding", "signs"),
    [
        ("ascii", ("82.0 +- 25.4", "~ 81.5", "\\u6a21\\u578b", "-----")),
        ("cp1252", ("82.0 ± 25.4", "~ 81.5", "\\u6a21\\u578b", "-----")),
        ("utf-8", ("82.0 ± 25.4", "≈ 81.5", "\u6a21\u578b", "─────")),
    ],
)
def test_any_terminal_shows_tables_and_names(
    terminal: Callable[..., tuple[int, str, str]], tmp_path: Path, encoding: str, signs: tuple[str, ...]
) -> None:
    """Our own signs have plain stand-ins; what else a terminal cannot show is escaped and ends nothing."""
    scores = {"model": (0.8, 0.84), "\u6a21\u578b": (0.81, 0.82)}
    key = {"checkpoint_sha256": "", "task": "birds", "version": "1", "protocol": "ssam", "probe": "exact", "fold": None}
    lines = [
        json.dumps({**key, "model": m, "seed": seed, "metric": "mAP", "score": s, "primary": True, "maximize": True})
        for m, row in scores.items()
        for seed, s in enumerate(row)
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    code, out, err = terminal(encoding, "report", str(tmp_path))
    assert (code, err) == (0, "") and all(sign in out for sign in signs)
    code, _, err = terminal(encoding, "report", os.fsdecode(b"\xff\xe4"))  # a name that is no text at all
    assert code == 2 and "\\udcff" in err


def test_paths_on_stdin_need_not_be_text(
    terminal: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9.wav\n"), "utf-8"))
    code, _, err = terminal("utf-8", "embed", "-", "-o", str(tmp_path / "out"), "--model", "logmel")
    assert code == 2 and "skipped caf\\udce9.wav: cannot be read: No such file" in err


def test_a_process_without_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["models", "list"]) == 0


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "hear_ssam", "doctor"], env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no disk that is always full")
def test_output_to_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hear_ssam", "models", "list"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("hear-ssam: error: standard output: No space left") and done.stderr.count("\n") == 1
