"""The store of clips, the readers of Debian's audio, and `hear-ssam corpus`."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hear_ssam.audio import audio_clips
from hear_ssam.cli import main
from hear_ssam.errors import HearSsamError
from hear_ssam.paths import shipped
from hear_ssam.pretraining.corpus import recipe
from hear_ssam.pretraining.store import build_store, open_store

SCRIPT = shipped("checkpoints") / "corpus.py"
script = runpy.run_path(str(SCRIPT))
recipe_clips = script["recipe_clips"]


def noise(seconds: float, seed: int, rate: int = 16_000) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))).astype(np.float32)


def wav(audio: np.ndarray, rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def soundfont(samples: list[tuple[str, np.ndarray, int, int]]) -> bytes:
    """A SoundFont 2 of (name, int16 samples, rate, type) that holds only what the reader looks at."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    pcm, heads = b"", b""
    for name, data, rate, kind in samples:
        start = len(pcm) // 2
        pcm += data.astype("<i2").tobytes() + bytes(92)  # the format wants 46 zero samples after each
        heads += struct.pack("<20sIIIIIBbHH", name.encode(), start, start + len(data), 0, 0, rate, 60, 0, 0, kind)
    heads += struct.pack("<20sIIIIIBbHH", b"EOS", 0, 0, 0, 0, 0, 0, 0, 0, 0)
    info = chunk(b"LIST", b"INFO" + chunk(b"INAM", b"odd"))  # an odd length: a pad byte follows
    samples_list = chunk(b"LIST", b"sdta" + chunk(b"smpl", pcm))
    return chunk(b"RIFF", b"sfbk" + info + samples_list + chunk(b"LIST", b"pdta" + chunk(b"shdr", heads)))


def test_folder_tar_and_files_make_the_same_store(tmp_path: Path) -> None:
    folder = tmp_path / "sounds"
    folder.mkdir()
    members = {f"sounds/{i}.wav": wav(noise(0.3, i)) for i in range(9)}  # more than are under way at once
    for name, data in members.items():
        (tmp_path / name).write_bytes(data)
    tar = write_tar(tmp_path / "pack.tar", members | {"sounds/LICENSE": b"free"})
    stores = []
    for name, paths in {"s1": [folder], "s2": [tar], "s3": sorted(folder.iterdir())}.items():
        build_store(tmp_path / name, audio_clips(paths), workers=1 if name == "s1" else 2)
        stores.append(open_store(tmp_path / name))
    for store in stores[1:]:
        np.testing.assert_array_equal(store.data, stores[0].data)
        np.testing.assert_array_equal(store.offsets, stores[0].offsets)
    assert [row["name"] for row in stores[1].info["sources"]] == ["sounds"]  # not "pack"
    assert [row["name"] for row in stores[2].info["sources"]] == [str(i) for i in range(9)]


def test_sources_are_first_folders_with_their_licence(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "pack.tar",
        {"blanket/x/1.wav": wav(noise(1, 0)), "mine/2.wav": wav(noise(2, 1)), "3.wav": wav(noise(3, 2))},
    )
    assert main(["corpus", str(tmp_path / "store"), "--audio", str(tar)]) == 0
    store = open_store(tmp_path / "store")
    rows = store.info["sources"]
    assert [row["name"] for row in rows] == ["blanket", "mine", "pack"]
    assert "licence" in rows[0] and "licence" not in rows[1]
    assert store.source.tolist() == [0, 1, 2] and store.source.dtype == np.int32


def test_bad_short_silent_and_repeated_clips(tmp_path: Path) -> None:
    clip = wav(noise(1, 0))
    members = {"s/a.wav": clip, "s/b.wav": b"not audio", "s/c.wav": clip, "s/d.wav": wav(noise(0.0249, 1))}
    members |= {"s/e.wav": wav(np.zeros(16_000)), "s/f.wav": wav(np.full(16_000, 0.25))}  # silence, with an offset too
    tar = write_tar(tmp_path / "pack.tar", members)
    info = build_store(tmp_path / "store", audio_clips([tar]))
    assert (info["clips"], info["short"], info["silent"], info["repeated"]) == (1, 1, 2, 1)
    assert len(info["skipped"]) == 1 and "pack.tar:s/b.wav" in info["skipped"][0]


def test_nothing_is_left_of_a_store_that_failed(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "pack.tar", {"s/b.wav": b"not audio"})
    with pytest.raises(HearSsamError, match=r"no usable audio.*s/b\.wav"):
        build_store(tmp_path / "store", audio_clips([tar]))
    assert not list((tmp_path / "store").iterdir())
    with pytest.raises(HearSsamError, match="no finished store"):
        open_store(tmp_path / "store")


def test_a_store_is_neither_overwritten_nor_read_damaged(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "pack.tar", {"s/a.wav": wav(noise(1, 0))})
    build_store(tmp_path / "store", audio_clips([tar]))
    with pytest.raises(HearSsamError, match="holds a store already"):
        build_store(tmp_path / "store", audio_clips([tar]))
    for name, content in (
        ("clips.npz", b""),
        ("clips.npz", b"PK\3\4 cut"),
        ("store.json", b"[1]"),
        ("store.json", b"{}"),
    ):
        whole = (tmp_path / "store" / name).read_bytes()
        (tmp_path / "store" / name).write_bytes(content)
        with pytest.raises(HearSsamError, match=r"no finished store here"):
            open_store(tmp_path / "store")
        (tmp_path / "store" / name).write_bytes(whole)
    audio = tmp_path / "store" / "audio.s16"
    audio.write_bytes(audio.read_bytes()[:-160])
    with pytest.raises(HearSsamError, match=r"audio\.s16 and clips\.npz do not belong together"):
        open_store(tmp_path / "store")


def test_shards_in_webdataset_layout_are_one_source(tmp_path: Path) -> None:
    shards = []
    for i in range(3):
        members = {}
        for key in range(2):
            members |= {
                f"{i}{key}.flac": wav(noise(0.3, 2 * i + key)),
                f"{i}{key}.json": b"{}",
                f"._{i}{key}.wav": b"\0",
            }
        shards.append(write_tar(tmp_path / f"speech-00000{i}.tar", members))
    packed = tmp_path / "music.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(shards[0], "a.tar")
        (tmp_path / "x.wav").write_bytes(wav(noise(0.4, 9)))
        tar.add(tmp_path / "x.wav", "x.wav")
    info = build_store(tmp_path / "store", audio_clips([*shards, packed]))
    assert [(row["name"], row["clips"]) for row in info["sources"]] == [("speech", 6), ("music", 1)]
    assert not info["skipped"]
    names = open_store(tmp_path / "store").names
    assert names is not None and names[0] == f"{shards[0]}:00.flac"


def test_damaged_and_empty_shards_are_named_and_the_others_read(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a-000.tar", {"a.wav": wav(noise(1, 0)), "b.wav": wav(noise(1, 1))})
    bad = {name: tmp_path / f"{name}-001.tar" for name in ("cut", "empty", "noise", "bare")}
    bad["cut"].write_bytes(whole.read_bytes()[:40_000])
    bad["empty"].write_bytes(b"")
    bad["noise"].write_bytes(np.random.default_rng(0).bytes(2000))
    write_tar(bad["bare"], {"readme.txt": b"no audio"})
    packed = tmp_path / "packed.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(whole, "x.wav")
    packed.write_bytes(packed.read_bytes()[:20_000])
    with pytest.raises(HearSsamError, match=r"no usable audio: .*empty-001\.tar: cannot be read to its end"):
        build_store(tmp_path / "store", audio_clips([bad["empty"]]))
    info = build_store(tmp_path / "store", audio_clips([*bad.values(), packed, whole]))
    assert info["clips"] == 2 and info["repeated"] == 1  # the first clip of the tar that was cut
    assert len(info["skipped"]) == 5
    for path, reason in zip([*bad.values(), packed], info["skipped"], strict=True):
        assert reason.startswith(f"{path}: ") and reason.endswith("leave it out.")


def test_tars_that_end_where_they_should_not(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "pack.tar", {"s/a.wav": wav(noise(1, 0)), "s/b.wav": wav(noise(1, 1))})
    whole = tar.read_bytes()
    first = 512 + 32_256 + 512  # bytes of the first member and a block; tarfile takes the next four places for the end
    damaged = {
        "between members": whole[: first - 512],
        "in a header": whole[: first - 212],
        "a header": whole[: first - 512] + b"x" * 512 + whole[first:],
        "joined": whole + whole,
    }
    for i, (where, data) in enumerate(damaged.items()):
        tar.write_bytes(data)
        info = build_store(tmp_path / f"store{i}", audio_clips([tar]))
        assert [reason.split(" at byte ")[0] for reason in info["skipped"]] == [
            f"{tar}: is cut off, damaged or joined to another tar"
        ], where


def test_what_a_tar_holds_besides_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    members = dict.fromkeys(["s/._a.wav", "s/b.m4a", "s/b.json", ".git/c.wav"], b"")
    members |= {"./s/a.wav": wav(noise(1, 0)), "/t/d.wav": wav(noise(1, 1))}
    tar = write_tar(tmp_path / "pack.tar", members)
    with pytest.warns(UserWarning, match=r"pack\.tar: left out 1 \.m4a;"):
        clips = list(audio_clips([tar]))
    assert [(clip.source, Path(clip.name).name) for clip in clips] == [("s", "a.wav"), ("t", "d.wav")]


def packages(*entries: dict) -> list[dict]:
    return [{"version": "1", **entry} for entry in entries]


def test_soundfont_reader(tmp_path: Path) -> None:
    tone = (10_000 * np.sin(np.arange(32_000) / 20)).astype(np.int16)
    kept = [("whole", tone[:16_000], 16_000, 1), ("faster", tone, 32_000, 1)]
    dropped = [("rom", tone, 16_000, 0x8001), ("short", tone[:700], 16_000, 1), ("silent", tone // 300, 16_000, 1)]
    (tmp_path / "font" / "usr").mkdir(parents=True)
    (tmp_path / "font" / "usr" / "x.sf2").write_bytes(soundfont([dropped[0], kept[0], *dropped[1:], kept[1]]))
    clips = list(recipe_clips(tmp_path, packages({"name": "font", "files": ["usr/*.sf2"], "decoder": "sf2"})))
    assert [clip.name.split()[-1] for clip in clips] == ["whole", "faster"]
    np.testing.assert_array_equal(clips[0].decode(), tone[:16_000] / np.float32(32768))
    assert clips[1].decode().shape == (16_000,) and clips[1].decode().dtype == np.float32


def test_readers_of_joined_and_zipped_wavs(tmp_path: Path) -> None:
    audio = [noise(0.2, i) for i in range(3)]
    for name in ("cats", "zips"):
        (tmp_path / name).mkdir()
    (tmp_path / "cats" / "sounds.cat").write_bytes(b"table" + wav(audio[0][:0]) + b"name".join(wav(a) for a in audio))
    with zipfile.ZipFile(tmp_path / "zips" / "sounds.pk3", "w") as archive:
        archive.writestr("readme.txt", "no audio")
        for i, a in enumerate(audio):
            archive.writestr(f"{i}.wav", wav(a))
    entries = packages(
        {"name": "cats", "files": ["*.cat"], "decoder": "cat"}, {"name": "zips", "files": ["*.pk3"], "decoder": "zip"}
    )
    clips = list(recipe_clips(tmp_path, entries))
    assert [clip.source for clip in clips] == ["cats"] * 3 + ["zips"] * 3
    for clip, expected in zip(clips, audio * 2, strict=True):
        np.testing.assert_allclose(clip.decode(), expected, atol=1e-4)
    entries[1]["exclude"] = r"/sounds\.pk3:[02]\.wav$"  # members too are left out by name
    assert [clip.name[-5:] for clip in recipe_clips(tmp_path, entries[1:])] == ["1.wav"]


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_g722_reader(tmp_path: Path) -> None:
    tone = (0.5 * np.sin(2 * np.pi * 440 / 16_000 * np.arange(16_000))).astype(np.float32)
    (tmp_path / "tone.wav").write_bytes(wav(tone))
    (tmp_path / "p").mkdir()
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "tone.wav", tmp_path / "p" / "tone.g722"], check=True)
    (clip,) = recipe_clips(tmp_path, packages({"name": "p", "files": ["*.g722"], "decoder": "g722"}))
    decoded = clip.decode()
    assert decoded.shape == (16_000,)
    assert np.argmax(np.abs(np.fft.rfft(decoded))) == 440  # 1 Hz bins


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_one_ffmpeg_decodes_many_g722_files_to_the_samples_of_each_alone(tmp_path, monkeypatch) -> None:
    (tmp_path / "p").mkdir()
    for i in range(5):
        (tmp_path / f"{i}.wav").write_bytes(wav(noise(0.2 + 0.3 * i, i)))
        made = ["ffmpeg", "-v", "error", "-i", tmp_path / f"{i}.wav", tmp_path / "p" / f"{i}.g722"]
        subprocess.run(made, check=True)
    entry = packages({"name": "p", "files": ["*.g722"], "decoder": "g722"})
    monkeypatch.setitem(recipe_clips.__globals__, "GROUP", 3)
    run, calls = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: calls.append(args) or run(*args, **options))
    together = [clip.decode() for clip in recipe_clips(tmp_path, entry)]
    assert len(calls) == 2
    for i, audio in enumerate(together):
        command = ["ffmpeg", "-v", "error", "-f", "g722", "-i", tmp_path / "p" / f"{i}.g722", "-f", "f32le", "-"]
        np.testing.assert_array_equal(audio, np.frombuffer(run(command, capture_output=True, check=True).stdout, "<f4"))
    recipe_clips.__globals__["_ffmpeg"].cache_clear()
    clips = list(recipe_clips(tmp_path, entry))
    (tmp_path / "p" / "1.g722").unlink()
    with pytest.raises(HearSsamError, match=r"^\S+1\.g722: ffmpeg cannot decode it"):
        clips[1].decode()
    np.testing.assert_array_equal(clips[2].decode(), together[2])


def test_what_is_missing_is_said_with_the_commands_that_get_it(tmp_path: Path, monkeypatch, capsys) -> None:
    """The commands are run, on a repository and a package of this machine."""
    origin = tmp_path / "origin"
    git = ["git", "-C", str(origin), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run(["git", "init", "-q", str(origin)], check=True)
    commits = []
    for i in range(2):
        (origin / "a.wav").write_bytes(wav(noise(0.5, i)))
        subprocess.run([*git, "add", "a.wav"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
        done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        commits.append(done.stdout.strip())
    source = {"name": "birds", "repository": str(origin), "commit": commits[0], "files": ["*.wav"]}
    monkeypatch.setattr(
        "hear_ssam.pretrain.recipe", lambda: {"package": packages({"name": "deb", "files": ["*"]}), "source": [source]}
    )
    (tmp_path / "my sources" / "deb").mkdir(parents=True)
    command = ["corpus", "store", "--missing", str(tmp_path / "my sources")]
    assert main([*command, "--audio", "x"]) == 2 and "--missing" in capsys.readouterr().err
    assert main(command) == 1
    lines = capsys.readouterr().out
    subprocess.run(["bash", "-e", "-c", lines], check=True)
    assert main(command) == 0 and f"corpus.py '{tmp_path}/my sources' AUDIO" in capsys.readouterr().err
    (clip,) = recipe_clips(tmp_path / "my sources", [source])
    np.testing.assert_allclose(clip.decode(), noise(0.5, 0), atol=1e-4)
    source["commit"] = commits[1]  # another commit than is there
    assert main(command) == 1 and commits[1] in capsys.readouterr().out
    (tmp_path / "my sources" / "deb").rmdir()
    assert main(command) == 1 and "apt-get download deb\nfor deb in" in capsys.readouterr().out


def test_exclude_and_links(tmp_path: Path) -> None:
    for name in ("keep/1.wav", "drop/2.wav"):
        (tmp_path / "drop" / name).parent.mkdir(parents=True)  # the package's own name is not matched
        (tmp_path / "drop" / name).write_bytes(wav(noise(0.1, 0)))
    (tmp_path / "drop" / "keep" / "link.wav").symlink_to("1.wav")
    entry = {"name": "drop", "files": ["**/*.wav"], "exclude": "^/drop/", "decoder": "audio"}
    assert [Path(clip.name).name for clip in recipe_clips(tmp_path, packages(entry))] == ["1.wav"]


def test_packages_that_lack_something_are_named(tmp_path: Path) -> None:
    with pytest.raises(HearSsamError, match=r"apt-get download gcin-voice"):
        list(recipe_clips(tmp_path, packages({"name": "gcin-voice", "files": ["*"], "decoder": "audio"})))
    (tmp_path / "p").mkdir()
    with pytest.raises(HearSsamError, match="holds none of"):
        list(recipe_clips(tmp_path, packages({"name": "p", "files": ["*.wav"], "decoder": "audio"})))
    (tmp_path / "p" / "x.wav").write_bytes(b"")
    for decoder in ("sf2", "zip"):
        with pytest.raises(HearSsamError, match=r"x\.wav: damaged"):
            list(recipe_clips(tmp_path, packages({"name": "p", "files": ["*.wav"], "decoder": decoder})))
    with pytest.raises(HearSsamError, match="Did you mean 'zip'"):
        list(recipe_clips(tmp_path, packages({"name": "p", "files": ["*.wav"], "decoder": "zpi"})))


def test_recipe_is_complete_and_leaves_evaluation_material_out() -> None:
    table = recipe()
    names = [entry["name"] for entry in table["package"] + table["source"]]
    assert len(set(names)) == len(names)
    for entry in table["package"] + table["source"]:
        assert entry["licence"] and entry["attribution"] and entry["content"] and entry["hours"] > 0
    for entry in table["package"]:
        assert entry["decoder"] in script["DECODERS"] and entry["version"] and entry["files"]
    for entry in table["source"]:
        assert entry["repository"].startswith("https://") and len(entry["commit"]) == 40 and entry["files"]
    left_out = {name for entry in table["left_out"] for name in entry["names"]}
    assert not left_out & set(names)
    stamps = next(re.compile(e["exclude"]) for e in table["package"] if e["name"] == "tuxpaint-stamps-default")
    assert stamps.search("/food/apple_desc_nl.ogg") and stamps.search("/animals/cat_desc_fr.ogg")
    assert not stamps.search("/food/apple_desc_fr.ogg") and not stamps.search("/animals/cat.ogg")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = write_tar(tmp_path / "pack.tar", {"s/a.wav": wav(noise(1, 0)), "s/b.wav": wav(noise(1, 1))})
    assert main(["corpus", str(tmp_path / "one"), "--audio", str(tar)]) == 0
    assert "2 clips" in capsys.readouterr().out
    assert json.loads((tmp_path / "one" / "store.json").read_text())["clips"] == 2
    (tmp_path / "bad.wav").write_bytes(b"")
    assert main(["corpus", str(tmp_path / "two"), "--audio", str(tar), str(tmp_path / "bad.wav")]) == 1
    told = capsys.readouterr()
    assert "skipped" in told.err and "1 that cannot be read" in told.out


def test_decoded_packages_make_the_store_of_their_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(("first", "second")):
        (tmp_path / "packages" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "packages" / name / "x.wav", noise(0.5, i, 44_100), 44_100)
    (tmp_path / "packages" / "first" / "a.wav").write_bytes(b"not audio")
    entries = packages(*({"name": n, "files": ["*.wav"], "decoder": "audio"} for n in ("first", "second")))
    for _ in range(2):  # the second time, what is there is left alone
        (skipped,) = script["write_audio"](recipe_clips(tmp_path / "packages", entries), tmp_path / "decoded")
        assert skipped.startswith(f"{tmp_path}/packages/first/a.wav: cannot be read")
    build_store(tmp_path / "direct", (c for c in recipe_clips(tmp_path / "packages", entries) if "a.wav" not in c.name))
    assert main(["corpus", str(tmp_path / "store"), "--audio", str(tmp_path / "decoded")]) == 0
    direct, store = (open_store(tmp_path / name) for name in ("direct", "store"))
    np.testing.assert_array_equal(store.data, direct.data)
    assert store.info["sources"] == direct.info["sources"]
    entries[1]["exclude"] = "x"  # such as a clip in which an evaluation was heard
    soundfile.write(tmp_path / "packages" / "second" / "a.wav", noise(0.5, 7), 16_000)
    with pytest.raises(HearSsamError, match=r"decoded/second/00002-\w+\.wav: not of this recipe, as 1 files in "):
        script["write_audio"](recipe_clips(tmp_path / "packages", entries), tmp_path / "decoded")


def test_the_script_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2 and "apt-get download asterisk" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "python checkpoints/corpus.py FOLDER AUDIO" in done.stderr
