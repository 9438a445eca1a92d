"""`hear-ssam embed`: any audio in, one Parquet file out, whole or not at all. Collections: test_collections.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import hear_ssam
from hear_ssam import cli, extract
from hear_ssam.audio import read_audio
from hear_ssam.embedding.inputs import of_file
from hear_ssam.embedding.work import Options
from hear_ssam.errors import HearSsamError
from hear_ssam.hear import EncoderModel
from hear_ssam.paths import sha256

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("same_thread_count")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    (folder / "sub").mkdir()
    for name, rate, channels, seconds in [
        ("a.wav", 16000, 1, 2.0),
        ("b.flac", 44100, 2, 5.3),
        ("c.wav", 8000, 6, 0.5),
        ("sub/d.ogg", 48000, 1, 1.0),
    ]:
        soundfile.write(folder / name, 0.3 * random.standard_normal((round(rate * seconds), channels)), rate)
    return folder


@pytest.fixture(scope="module")
def with_bad(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two good files among bad ones."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.wav").write_text("hello")
    soundfile.write(folder / "short.wav", np.zeros(100), 16000)
    good, also_good = recordings / "a.wav", recordings / "c.wav"
    return [folder / "text.wav", good, folder / "absent.wav", folder / "short.wav", also_good]


def embed(*arguments: str | Path) -> int:
    return cli.main(["embed", *map(str, arguments)])


def columns(file: Path) -> dict[str, list]:
    return pq.read_table(file).to_pydict()


def test_rows_are_those_of_the_hear_functions(recordings: Path, weights: Path, tmp_path: Path) -> None:
    assert embed(recordings, "-o", tmp_path / "out.parquet", "--model", weights) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.names == ["path", "start_ms", "model", "checkpoint_sha256", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 80)
    data = table.to_pydict()
    assert set(data["model"]) == {"mini"} and set(data["checkpoint_sha256"]) == {sha256(weights)}

    model = hear_ssam.load_model(weights)
    paths, times, embeddings = [], [], []
    for name in ("a.wav", "b.flac", "c.wav", "sub/d.ogg"):
        clip = torch.from_numpy(read_audio(recordings / name, 16000))[None]
        rows, milliseconds = hear_ssam.get_timestamp_embeddings(clip, model)
        embeddings += [hear_ssam.get_scene_embeddings(clip, model), rows[0]]
        times += [None, *milliseconds[0].tolist()]
        paths += [str(recordings / name)] * (1 + rows.shape[1])
    assert data["path"] == paths
    assert data["start_ms"] == times
    np.testing.assert_allclose(np.array(data["embedding"]), torch.cat(embeddings).numpy(), atol=1e-5)


def test_scenes_and_timestamps_of_different_width_share_a_column(recordings: Path, tmp_path: Path) -> None:
    assert embed(recordings / "a.wav", "-o", tmp_path / "out", "--model", "logmel") == 0
    clip, model = torch.from_numpy(read_audio(recordings / "a.wav", 16000))[None], hear_ssam.load_model("logmel")
    scene, *rows = columns(tmp_path / "out")["embedding"]
    np.testing.assert_allclose(scene, hear_ssam.get_scene_embeddings(clip, model)[0], atol=1e-5)
    np.testing.assert_allclose(rows, hear_ssam.get_timestamp_embeddings(clip, model)[0][0], atol=1e-5)


@pytest.mark.parametrize(("kind", "rows"), [("scene", 4), ("timestamps", 50 + 133 + 13 + 25)])
def test_kinds(recordings: Path, weights: Path, tmp_path: Path, kind: str, rows: int) -> None:
    for output, chosen in {"some": kind, "all": "both"}.items():
        assert embed(recordings, "-o", tmp_path / output, "--model", weights, "--kind", chosen) == 0
    everything = pq.read_table(tmp_path / "all").to_pylist()
    wanted = [row for row in everything if (row["start_ms"] is None) == (kind == "scene")]
    assert pq.read_table(tmp_path / "some").to_pylist() == wanted
    assert len(wanted) == rows


def test_workers_and_row_groups_change_nothing(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(recordings, "-o", tmp_path / "one.parquet", "--model", weights, "--workers", "1")
    monkeypatch.setattr(extract, "ROW_GROUP", 20)
    embed(recordings, "-o", tmp_path / "three.parquet", "--model", weights, "--workers", "3")
    one, three = columns(tmp_path / "one.parquet"), columns(tmp_path / "three.parquet")
    np.testing.assert_allclose(np.array(one.pop("embedding")), np.array(three.pop("embedding")), atol=1e-5)
    assert one == three
    assert pq.ParquetFile(tmp_path / "three.parquet").num_row_groups > 10


def test_bad_files_are_named_and_skipped(
    with_bad: list[Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(*with_bad, "-o", tmp_path / "out", "--model", weights, "--kind", "scene") == 1
    text, good, absent, short, also_good = with_bad
    assert columns(tmp_path / "out")["path"] == [str(good), str(also_good)]
    errors = capsys.readouterr().err.splitlines()
    for line, (file, reason) in zip(
        [line for line in errors if line.startswith("skipped")],
        [(text, "cannot be read"), (absent, "No such file"), (short, "at least 201")],
        strict=True,
    ):
        assert line.startswith(f"skipped {file}: ") and reason in line


def test_nothing_good_leaves_the_older_output(
    with_bad: list[Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.parquet"
    assert embed(with_bad[1], "-o", output, "--model", weights) == 0
    before = output.read_bytes()
    assert embed(with_bad[0], "-o", output, "--model", weights) == 2
    assert "none of 1 files" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"] and output.read_bytes() == before


def test_a_file_of_another_kind_is_not_overwritten(
    with_bad: list[Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.parquet"
    output.write_text("mine")
    assert embed(with_bad[1], "-o", output, "--model", weights) == 2
    assert f"{output}: is not a file of embeddings, or damaged; move it away" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"] and output.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_audio_here", "-o", "out"], "no_audio_here: no audio files below it"),
        (["a.wav", "-o", "a.wav/out"], "a.wav/out: cannot be written"),
        (["a.wav", "-o", "some.parquet"], "some.parquet: cannot be written: it is a folder or a device; name a file"),
        (["a.wav", "-o", "/dev/null"], "/dev/null: cannot be written: it is a file or a device; name a folder"),
        (["a.wav", "-o", "out", "--model", "ssam_tny"], "Did you mean 'ssam_tiny'"),
        (["a.wav", "-o", "out", "--workers", "0"], "--workers must be at least 1"),
        (["a.wav", "-o", "out", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_audio_here").mkdir()
    (tmp_path / "some.parquet").mkdir()
    soundfile.write("a.wav", np.zeros(16000), 16000)
    if "--model" not in arguments:
        arguments = [*arguments, "--model", "logmel", "--kind", "scene"]
    assert embed(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hear-ssam: error: ") and message in line
    assert not (tmp_path / "out").exists()


def start(*arguments: str | Path, **options: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hear_ssam", "embed", *map(str, arguments), "--model", "logmel"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def test_a_full_disk_leaves_nothing(recordings: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # not on Windows

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    for output in ("out", "out.parquet"):
        process = start(recordings, "-o", tmp_path / output, "--kind", "timestamps", preexec_fn=small_disk)
        error = process.communicate()[1]
        assert process.returncode == 2 and f"hear-ssam: error: {tmp_path / output}: cannot be written: " in error
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reason", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_keeps_what_is_done_and_the_same_command_goes_on(
    recordings: Path, tmp_path: Path, reason: signal.Signals
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3000):
        (tmp_path / "in" / f"{number:04}.flac").hardlink_to(recordings / "b.flac")
    arguments = tmp_path / "in", "-o", tmp_path / "out.parquet", "--kind", "scene"

    def hear_ctrl_c() -> None:  # which a shell's background jobs, this test among them, are made to ignore
        signal.signal(signal.SIGINT, signal.default_int_handler)

    code = "import sys; from hear_ssam import cli, extract; extract.SAFE = 0.1; sys.exit(cli.main())"
    call = [sys.executable, "-c", code, "embed", *map(str, arguments), "--model", "logmel"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    parts = tmp_path / ".out.parquet.parts"
    while not list(parts.glob("part-*.parquet")):  # until something is safe
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(reason)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error.splitlines()[-1] == "hear-ssam: interrupted" and "Traceback" not in error
    assert not (tmp_path / "out.parquet").exists()
    assert all(file.name.startswith("part-") for file in parts.iterdir())  # whole shards, and nothing beside them
    done = pq.read_table(parts).num_rows
    assert 0 < done < 3000
    for file in sorted((tmp_path / "in").iterdir())[done + 40 :]:
        file.unlink()  # the rest would only take time
    process = start(*arguments)
    assert f"40 of 40 files, {done} were there already" in process.communicate()[1]
    assert columns(tmp_path / "out.parquet")["path"] == [str(file) for file in sorted((tmp_path / "in").iterdir())]
    assert not parts.exists()


def test_a_defect_spoils_one_file_only(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = EncoderModel.spectrogram

    def broken(model: EncoderModel, audio: torch.Tensor) -> torch.Tensor:
        if audio.shape[1] == 8000:  # c.wav
            raise RuntimeError("a defect")
        return whole(model, audio)

    monkeypatch.setattr(EncoderModel, "spectrogram", broken)
    assert embed(recordings, "-o", tmp_path / "out", "--model", weights, "--kind", "scene") == 1
    assert [Path(path).name for path in columns(tmp_path / "out")["path"]] == ["a.wav", "b.flac", "d.ogg"]
    assert f"skipped {recordings / 'c.wav'}: RuntimeError: a defect; " in capsys.readouterr().err


def test_folders_say_what_was_left_out(recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.m4a", "c.m4a", "d.wma"):
        (tmp_path / "in" / name).touch()
    soundfile.write(tmp_path / "in" / "a.wav", np.zeros(16000), 16000)
    code = "import sys; sys.modules['av'] = None; from hear_ssam import cli; sys.exit(cli.main())"
    arguments = ["embed", tmp_path / "in", "-o", tmp_path / "out.parquet", "--model", "logmel", "--kind", "scene"]
    process = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert process.returncode == 0
    text = f"{tmp_path / 'in'}: left out 2 .m4a, 1 .wma; convert what is audio, or pip install 'hear-ssam[av]', name"
    assert f"hear-ssam: warning: {text}" in process.stderr


@pytest.mark.parametrize("command", ["embed", "corpus"])
def test_an_interrupted_command_does_not_wait_for_what_it_reads(tmp_path: Path, command: str) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    arguments = {
        "embed": ["embed", tmp_path / "a.wav", "-o", tmp_path / "out", "--model", "logmel", "--kind", "scene"],
        "corpus": ["corpus", tmp_path / "out", "--audio", tmp_path / "a.wav"],
    }[command]
    code = (
        "import sys, time, hear_ssam.audio, hear_ssam.cli\n"
        "def read(*_): print('reading', flush=True); time.sleep(100)\n"
        "hear_ssam.audio.read_audio = read\n"
        "sys.exit(hear_ssam.cli.main())"
    )
    call = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None and process.stdout.readline() == b"reading\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    assert not (tmp_path / "out").is_file() and not list((tmp_path / "out").glob("*"))


def test_the_function_behind_the_command(recordings: Path, with_bad: list[Path], tmp_path: Path) -> None:
    model = hear_ssam.load_model("logmel")
    skipped = extract.embed_files([*map(of_file, with_bad)], tmp_path / "out", model, Options("scene"))
    assert skipped == [str(file) for file in (with_bad[0], with_bad[2], with_bad[3])]
    with pytest.raises(HearSsamError, match="none of 1 files"):
        extract.embed_files([of_file(with_bad[0])], tmp_path / "out", model, Options("scene"))
