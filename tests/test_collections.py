"""`hear-ssam embed` on collections: resumed, sharded, in windows, from every kind of list, in bounded memory."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import hear_ssam
from hear_ssam import cli, extract
from hear_ssam.audio import read_audio
from hear_ssam.embedding import clips, shards, work
from hear_ssam.embedding.inputs import find_recordings, of_file
from hear_ssam.embedding.shards import Output
from hear_ssam.embedding.work import cut_windows
from hear_ssam.errors import HearSsamError
from hear_ssam.hear import get_scene_embeddings, get_timestamp_embeddings

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("same_thread_count")
RATE = 16_000


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    for number in range(12):
        soundfile.write(folder / f"{number:02}.wav", 0.2 * random.standard_normal(9_000 + 1_777 * number), RATE)
    return folder


def embed(*arguments: str | Path) -> int:
    return cli.main(["embed", *map(str, arguments), "--workers", "2"])


def columns(place: Path) -> dict[str, list[Any]]:
    return pq.read_table(place).to_pydict()


def names(place: Path) -> list[str]:
    return [Path(path).name for path in columns(place)["path"]]


def scene(file: Path, model: Any) -> np.ndarray:
    return get_scene_embeddings(torch.from_numpy(read_audio(file, RATE))[None], model)[0].numpy()


def test_files_of_unequal_length_share_batches(recordings: Path, weights: Path, tmp_path: Path) -> None:
    assert embed(recordings, "-o", tmp_path / "out.parquet", "--model", weights, "--kind", "scene") == 0
    model, found = hear_ssam.load_model(weights), columns(tmp_path / "out.parquet")
    expected = [scene(file, model) for file in sorted(recordings.iterdir())]
    np.testing.assert_allclose(found["embedding"], expected, atol=2e-6)


def test_a_folder_of_shards(recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "SAFE", -1.0)  # every file closes a shard
    assert embed(recordings, "-o", tmp_path / "out", "--model", weights) == 0
    assert len(list((tmp_path / "out").iterdir())) == 12 == len(list((tmp_path / "out").glob("part-*.parquet")))
    monkeypatch.undo()
    assert embed(recordings, "-o", tmp_path / "one.parquet", "--model", weights) == 0
    folder, one = columns(tmp_path / "out"), columns(tmp_path / "one.parquet")
    np.testing.assert_allclose(folder.pop("embedding"), one.pop("embedding"), atol=2e-6)
    assert folder == one
    assert len(pandas.read_parquet(tmp_path / "out").query("start_ms.isnull()")) == 12


def test_what_made_the_rows_stands_in_the_metadata(recordings: Path, weights: Path, tmp_path: Path) -> None:
    assert embed(recordings / "00.wav", "-o", tmp_path / "a.parquet", "--model", weights, "--precision", "bf16") == 0
    made = json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[b"hear_ssam"])
    model = hear_ssam.load_model(weights)
    assert made["version"] == hear_ssam.__version__ and made["model"] == "mini"
    assert made["checkpoint_sha256"] == model.checkpoint_sha256
    assert (made["kind"], made["token_order"], made["model_options"]) == ("both", "time", {"precision": "bf16"})


@pytest.mark.parametrize("output", ["out", "out.parquet"])
def test_killed_and_resumed(recordings: Path, weights: Path, tmp_path: Path, output: str) -> None:
    """Killed without warning: nothing of closed shards is lost, nothing is done twice or half."""
    code = (
        "import sys, time, hear_ssam.audio as audio\n"
        "read = audio.read_audio\n"
        "def slowly(*arguments): time.sleep(0.4); return read(*arguments)\n"
        "audio.read_audio = slowly\n"
        "from hear_ssam import cli, extract\n"
        "from hear_ssam.embedding import work\n"
        "extract.SAFE, work.BATCH = 0.5, {'cpu': (1, 1)}\n"
        "sys.exit(cli.main())"
    )
    arguments = ["embed", recordings, "-o", tmp_path / output, "--model", weights, "--workers", "1"]
    call = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(call, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    shards = tmp_path / ("out" if output == "out" else ".out.parquet.parts")
    while len(list(shards.glob("part-*.parquet"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = set(names(shards))
    assert 2 <= len(done) < 12
    assert embed(*arguments[1:-2]) == 0
    assert sorted(set(names(tmp_path / output))) == [f"{number:02}.wav" for number in range(12)]
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.lock"))
    found = columns(tmp_path / output)
    scenes = [path for path, start in zip(found["path"], found["start_ms"], strict=True) if start is None]
    assert len(scenes) == len(set(scenes)) == 12


def test_done_files_are_skipped_and_counted(
    recordings: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.parquet").symlink_to(tmp_path / "far" / "file.parquet")
    for output in (tmp_path / "out", tmp_path / "out.parquet", tmp_path / "link.parquet"):
        assert embed(recordings / "0*.wav", "-o", output, "--model", weights, "--kind", "scene") == 0
        assert "10 of 10 files\n" in capsys.readouterr().err
        before = columns(output)
        assert embed(recordings, "-o", output, "--model", weights, "--kind", "scene") == 0
        assert f"{output}: 2 of 2 files, 10 were there already" in capsys.readouterr().err
        assert names(output) == [f"{number:02}.wav" for number in range(12)]
        assert columns(output)["embedding"][:10] == before["embedding"]
        monkeypatch.setattr(clips, "embed_clips", None)  # not needed any more
        assert embed(recordings, "-o", output, "--model", weights, "--kind", "scene") == 0
        assert f"{output}: 0 of 0 files, 12 were there already" in capsys.readouterr().err
        monkeypatch.undo()
    assert (tmp_path / "link.parquet").is_symlink()
    assert [file.name for file in (tmp_path / "far").iterdir()] == ["file.parquet"]


@pytest.mark.parametrize("output", ["out", "out.parquet"])
def test_done_files_are_told_from_others_of_their_name(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """Which were recorded on another day, or are here now; a folder that was moved is the same."""
    place = tmp_path / output
    for day in ("01", "02"):
        (tmp_path / day).mkdir()
        shutil.copy(recordings / f"{day}.wav", tmp_path / day / "a.wav")
    monkeypatch.chdir(tmp_path / "01")
    assert embed("a.wav", "-o", place, "--model", "logmel") == 0
    before = columns(place)
    monkeypatch.chdir(tmp_path / "02")
    assert embed("a.wav", "-o", place, "--model", "logmel") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"hear-ssam: error: {place}: holds embeddings of {tmp_path / '01' / 'a.wav'}, which ")
    monkeypatch.chdir(tmp_path)
    assert embed("01/a.wav", "-o", place, "--model", "logmel") == 0  # called otherwise, and so another row
    (tmp_path / "01").rename(tmp_path / "03")
    monkeypatch.chdir(tmp_path / "03")
    capsys.readouterr()
    assert embed("a.wav", "-o", place, "--model", "logmel") == 0
    assert capsys.readouterr().err == f"{place}: 0 of 0 files, 1 were there already\n"
    os.utime("a.wav", (2e9, 2e9))
    assert embed("a.wav", "-o", place, "--model", "logmel") == 0
    assert "1 files are newer than their embeddings, which were kept, a.wav first; delete it" in capsys.readouterr().err
    assert columns(place)["embedding"][: len(before["embedding"])] == before["embedding"]


@pytest.mark.parametrize("output", ["out", "out.parquet"])
def test_other_weights_or_options_are_refused(
    recordings: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    place, file = tmp_path / output, recordings / "00.wav"
    assert embed(file, "-o", place, "--model", weights, "--kind", "scene") == 0
    before = columns(place)
    for options, message in [
        (["--model", "logmel", "--kind", "scene"], "model='mini', not 'logmel'"),
        (["--model", weights], "kind='scene', not 'both'"),
        (["--model", weights, "--kind", "scene", "--dtype", "float16"], "dtype='float32', not 'float16'"),
        (["--model", weights, "--window", "1"], "window=0.0, not 1.0"),
        (["--model", weights, "--kind", "scene", "--precision", "bf16"], "model_options={'precision': 'fp32'}, not"),
    ]:
        capsys.readouterr()
        assert embed(file, "-o", place, *options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"hear-ssam: error: {place}: holds embeddings with ") and message in line
    assert columns(place) == before and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "linked.safetensors").symlink_to(weights)  # the same weights by another name
    assert embed(file, "-o", place, "--model", tmp_path / "linked.safetensors", "--kind", "scene") == 0
    assert "1 were there already" in capsys.readouterr().err


def test_foreign_files_in_the_folder(
    recordings: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    assert embed(recordings / "00.wav", "-o", tmp_path, "--model", weights) == 2
    assert f"{tmp_path / 'x.parquet'}: is not a file of embeddings, or damaged" in capsys.readouterr().err
    before = sorted(recordings.iterdir())
    assert embed(recordings, "-o", recordings, "--model", weights) == 2  # pandas could not read that folder
    assert f"{recordings}: holds other things than embeddings (" in capsys.readouterr().err
    assert sorted(recordings.iterdir()) == before


def test_two_runs_do_not_write_to_one_folder(recordings: Path, weights: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".part.lock"):
        with pytest.raises(HearSsamError, match="out: another run writes to it"):
            extract.embed_files(
                [of_file(recordings / "00.wav")], tmp_path / "out", hear_ssam.load_model(weights), work.Options()
            )
        embed(recordings, "-o", tmp_path / "out", "--model", weights, "--shard", "1/2")  # has shards of its own


@pytest.mark.parametrize("output", ["out", "out.parquet"])
def test_a_lock_that_cannot_be_deleted_is_no_failure(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    unlink = os.unlink

    def as_on_windows(path: Any, **options: Any) -> None:
        if os.fspath(path).endswith(".lock"):
            raise PermissionError(13, "The process cannot access the file because it is being used", path)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", as_on_windows)
    assert embed(recordings / "00.wav", "-o", tmp_path / output, "--model", weights) == 0
    assert set(names(tmp_path / output)) == {"00.wav"}


def test_an_interrupt_while_rows_are_written_doubles_none(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table = pq.ParquetWriter.write_table

    def interrupted(writer: pq.ParquetWriter, *arguments: Any) -> None:
        write_table(writer, *arguments)  # Python handles a signal when C code returns
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_table", interrupted)
    command = recordings, "-o", tmp_path / "out", "--model", weights, "--kind", "scene"
    assert embed(*command) == 130
    assert embed(*command) == 0
    assert sorted(names(tmp_path / "out")) == [f"{number:02}.wav" for number in range(12)]


def test_jobs_of_an_array_share_a_folder(recordings: Path, weights: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        arguments = recordings, "-o", tmp_path / "out", "--model", weights, "--kind", "scene", "--shard", f"{number}/3"
        assert embed(*arguments) == 0
        assert len(columns(tmp_path / "out")["path"]) == 4 * number
    assert sorted(names(tmp_path / "out")) == [f"{number:02}.wav" for number in range(12)]
    under_way = tmp_path / "out" / ".part-1-of-3-00001.tmp"
    under_way.touch()
    assert embed(recordings, "-o", tmp_path / "out", "--model", weights, "--kind", "scene") == 0  # all are there
    under_way.unlink()  # it is another job's
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"part-{i}-of-3-00000.parquet" for i in (1, 2, 3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "0/3"], "--shard 0/3: give which part of how many"),
        (["--shard", "4/3"], "--shard 4/3"),
        (["--shard", "a"], "--shard a"),
        (["--shard", "1/2", "-o", "x.parquet"], "x.parquet: is one file, and --shard jobs write to a folder"),
        (["--hop", "1"], "--hop 1: of no use without --window"),
        (["--window", "1", "--kind", "both"], "--kind both: --window writes scenes of windows only"),
        (["--window", "0"], "--window 0"),
        (["--window", "1", "--hop", "0"], "--window 1 --hop 0"),
        (["-"], "-: no path came on stdin"),
        (["nothing-*.wav"], "nothing-*.wav: no file is called like that"),
        (["list.csv"], "list.csv: cannot be read as a CSV file"),
        (["files.csv"], "files.csv: has no column path (file)"),
        (["missing.csv"], "missing.csv: 1 of 2 files are not there, gone.wav first"),
    ],
)
def test_wrong_arguments(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    Path("files.csv").write_text("file\na.wav\n")
    Path("missing.csv").write_text(f"path\n{recordings / '00.wav'}\ngone.wav\n")
    first = [recordings / "00.wav"] if options[0].startswith("-") else []
    assert embed(*first, *options, *([] if "-o" in options else ["-o", "out"]), "--model", "logmel") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hear-ssam: error: ") and message in line
    assert not Path("out").exists() and not Path("x.parquet").exists()


def test_kinds_of_lists(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text(f"label,path\nx,{recordings / '03.wav'}\ny,local.wav\n", encoding="utf-8-sig")
    Path("local.wav").write_bytes((recordings / "04.wav").read_bytes())
    with tarfile.open("b.tar", "w") as tar:
        for name in ("05.wav", "06.wav"):
            data = (recordings / name).read_bytes()
            info = tarfile.TarInfo(f"x/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{recordings / '07.wav'}\n\n{recordings / '00.wav'}\n"))
    Path("deep/empty").mkdir(parents=True)
    Path("deep/notes.csv").write_text("of something else")
    Path("deep/08.wav").write_bytes((recordings / "08.wav").read_bytes())
    inputs = recordings / "0[01].wav", "a.csv", "b.tar", "-", "deep/**"
    assert embed(*inputs, "-o", "out.parquet", "--model", "logmel", "--kind", "scene") == 0
    found = columns(Path("out.parquet"))
    own = [str(recordings / f"{number:02}.wav") for number in (0, 1, 3)]
    others = ["local.wav", "b.tar:x/05.wav", "b.tar:x/06.wav", str(recordings / "07.wav"), "deep/08.wav"]
    assert found["path"] == own + others
    members = find_recordings(["b.*r"])
    assert not isinstance(members, list)  # all of them are never held at once
    assert [member.bytes for member in members] == [(recordings / name).stat().st_size for name in ("05.wav", "06.wav")]
    model = hear_ssam.load_model("logmel")
    for row, number in enumerate((0, 1, 3, 4, 5, 6, 7, 8)):
        np.testing.assert_allclose(found["embedding"][row], scene(recordings / f"{number:02}.wav", model), atol=1e-5)


def test_windows_are_what_the_cut_out_clips_give(recordings: Path, weights: Path, tmp_path: Path) -> None:
    long = 0.1 * np.random.default_rng(1).standard_normal(5 * RATE + 100)
    soundfile.write(tmp_path / "long.wav", long, RATE, subtype="FLOAT")
    inputs = tmp_path / "long.wav", recordings / "00.wav"
    out, options = tmp_path / "out.parquet", ["--window", "1", "--hop", "0.75"]
    assert embed(*inputs, "-o", out, "--model", weights, *options) == 0
    table = pq.read_table(out)
    assert table.schema.names == ["path", "start_ms", "end_ms", "model", "checkpoint_sha256", "embedding"]
    rows, model = table.to_pylist(), hear_ssam.load_model(weights)
    assert [row["start_ms"] for row in rows] == [0, 750, 1500, 2250, 3000, 3750, 4500, 0]
    assert [row["end_ms"] for row in rows] == [1000, 1750, 2500, 3250, 4000, 4750, 5006.25, 562.5]
    for row in rows:
        clip = read_audio(row["path"], RATE)[round(16 * row["start_ms"]) : round(16 * row["end_ms"])]
        expected = get_scene_embeddings(torch.from_numpy(clip)[None], model)[0]
        np.testing.assert_allclose(row["embedding"], expected, atol=2e-6)


@pytest.mark.parametrize(("size", "starts"), [(10, [0]), (3, [0]), (11, [0, 10]), (21, [0, 10, 20]), (20, [0, 10])])
def test_the_last_window_ends_with_the_audio(size: int, starts: list[int]) -> None:
    audio = np.arange(size, dtype=np.float32)
    for blocks in ([audio], np.array_split(audio, size)):
        found = list(cut_windows(blocks, 10, 10, 1))
        assert [start for start, _ in found] == starts
        np.testing.assert_array_equal(np.concatenate([piece for _, piece in found]), audio)


def test_windows_with_gaps_and_rests_that_are_too_short() -> None:
    audio = np.arange(35, dtype=np.float32)
    for blocks in ([audio], np.array_split(audio, 9)):
        assert [(start, len(piece)) for start, piece in cut_windows(blocks, 4, 10, 1)] == [
            (0, 4),
            (10, 4),
            (20, 4),
            (30, 4),
        ]
        assert [(s, len(piece)) for s, piece in cut_windows(blocks, 10, 4, 1)] == [
            (4 * i, 10 - (i == 7) * 3) for i in range(8)
        ]
        assert [start for start, _ in cut_windows(blocks, 10, 10, 6)] == [0, 10, 20]
    assert [len(piece) for _, piece in cut_windows([audio[:3]], 10, 10, 6)] == [3]  # the only one; its clip is named


def test_half_precision(recordings: Path, weights: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        assert (
            embed(recordings / "00.wav", "-o", tmp_path / f"{dtype}.parquet", "--model", weights, "--dtype", dtype) == 0
        )
    half, full = (pq.read_table(tmp_path / f"{dtype}.parquet")["embedding"] for dtype in ("float16", "float32"))
    assert half.type.value_type == "halffloat"
    np.testing.assert_array_equal(np.array(half.to_pylist()), np.float16(full.to_pylist()))


@pytest.mark.parametrize("kind", ["both", "scene", "timestamps"])
def test_long_recordings_are_read_in_pieces(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(clips, "LONG", 1)
    monkeypatch.setattr(work, "CHUNK", 20)
    monkeypatch.setattr("hear_ssam.audio.BLOCK", 4096)
    files = [recordings / "00.wav", recordings / "11.wav", recordings / "10.wav"]  # 0.6, 1.8 and 1.7 s
    assert embed(*files, "-o", tmp_path / "out.parquet", "--model", weights, "--kind", kind) == 0
    model, paths, times, rows = hear_ssam.load_model(weights), [], [], []
    for file in files:
        audio = torch.from_numpy(read_audio(file, RATE))[None]
        found, milliseconds = get_timestamp_embeddings(audio, model)
        if kind != "timestamps":
            paths, times, rows = [*paths, str(file)], [*times, None], [*rows, *get_scene_embeddings(audio, model)]
        if kind != "scene":
            paths, times, rows = (
                [*paths, *[str(file)] * found.shape[1]],
                [*times, *milliseconds[0].tolist()],
                [*rows, *found[0]],
            )
    data = columns(tmp_path / "out.parquet")
    assert (data["path"], data["start_ms"]) == (paths, times)
    np.testing.assert_allclose(data["embedding"], torch.stack(rows).numpy(), atol=1e-5)


def test_the_one_file_is_made_piece_by_piece(tmp_path: Path) -> None:
    """What is read of a shard is freed before the next piece of it is read."""
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema({"x": pa.list_(pa.float32())})) as writer:
        for _ in range(20):
            values = np.random.default_rng(0).random(256 * 256, np.float32)
            lists = pa.ListArray.from_arrays(np.arange(0, len(values) + 1, 256, dtype=np.int32), values)
            writer.write_table(pa.table({"x": lists}))
    before, held, rows = pa.total_allocated_bytes(), [], 0
    for table in shards.row_groups(tmp_path / "a.parquet"):
        held.append((pa.total_allocated_bytes() - before) / table.nbytes)
        rows += table.num_rows
    assert rows == 20 * 256 and max(held) < 12  # threads of pyarrow are late in freeing some; all at once: 33


def test_the_windows_of_a_long_recording_are_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a day, a gigabyte."""
    model, width, count = hear_ssam.load_model("logmel"), 1 << 15, 400
    model.scene_embedding_size = width
    soundfile.write(tmp_path / "a.wav", np.repeat(np.arange(count) / 1000, 800), RATE, subtype="FLOAT")

    def found(_: Any, pieces: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.from_numpy(np.full(width, piece[0])), torch.zeros(1, 80)) for piece in pieces]

    monkeypatch.setattr(clips, "embed_clips", found)
    monkeypatch.setattr(clips, "LONG", 1)
    monkeypatch.setattr(work, "CHUNK", 16)
    worker = work.Worker(model, work.Options("scene", 0.05, 0.05), tmp_path)
    tracemalloc.start()
    try:
        ((_, tables, error),) = worker([of_file(tmp_path / "a.wav")])
        rows = [(*row[1:3], row[-1][0]) for table in tables for row in zip(*table.to_pydict().values(), strict=True)]
        assert tracemalloc.get_traced_memory()[1] < 4 * width * count / 2
    finally:
        tracemalloc.stop()
    assert error is None and rows == [(50.0 * i, 50.0 * (i + 1), np.float32(i / 1000)) for i in range(count)]


def test_what_a_run_left_when_it_ended_while_making_the_one_file(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the one file was there, and between making it and removing its parts: no row is lost, none twice."""
    out, parts = tmp_path / "out.parquet", tmp_path / ".out.parquet.parts"
    arguments = "-o", out, "--model", weights, "--kind", "scene"
    monkeypatch.setattr(Output, "finish", Output.close)
    assert embed(recordings / "0*", *arguments) == 0 and not out.exists() and len(list(parts.iterdir())) == 1
    monkeypatch.undo()
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    assert embed(recordings / "0*", *arguments) == 0 and len(list(parts.iterdir())) == 1
    assert names(out) == [f"{number:02}.wav" for number in range(10)]
    monkeypatch.undo()
    assert embed(recordings, *arguments) == 0
    assert names(out) == [f"{number:02}.wav" for number in range(12)] and not parts.exists()


def test_a_recording_is_whole_or_absent_in_a_shard(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of the rows of a long one."""
    monkeypatch.setattr(clips, "LONG", 1)
    monkeypatch.setattr(work, "CHUNK", 10)
    monkeypatch.setattr(extract, "ROW_GROUP", 5)
    monkeypatch.setattr(extract, "SAFE", -1.0)
    flush, count = Output._flush, [0]

    def interrupted(self: Output) -> None:
        flush(self)
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Output, "_flush", interrupted)
    files = [recordings / "00.wav", recordings / "11.wav"]
    assert embed(*files, "-o", tmp_path / "out", "--model", weights) == 130
    assert count[0] == 4 and set(names(tmp_path / "out")) == {"00.wav"}
    assert embed(*files, "-o", tmp_path / "out", "--model", weights) == 0
    expected = 2 + sum(len(hear_ssam.load_model(weights).timestamps(len(read_audio(file, RATE)))) for file in files)
    assert len(names(tmp_path / "out")) == expected
