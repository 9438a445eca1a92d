"""`hear_ssam.embed`: inputs as people have them; each clip as if alone; long ones in pieces."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import hear_ssam
from hear_ssam import HearSsamError, load_model
from hear_ssam.audio import audio_clips, read_audio
from hear_ssam.checkpoint import save_checkpoint
from hear_ssam.config import build_config
from hear_ssam.embedding import clips
from hear_ssam.embedding.inputs import find_recordings
from hear_ssam.encoder import Encoder
from hear_ssam.hear import HearModel, get_scene_embeddings, get_timestamp_embeddings

RATE = 16_000
SIZES = [8_000, 33_000, 201, 48_321, 33_000, 15_999]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    for system in ("ssam", "ssast", "axlstm", "ssamba"):
        sizes: dict[str, Any] = {"depth": 4, "window_frames": 128} if system == "ssamba" else {"depth": 2}
        config = build_config(system, 48, **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            save_checkpoint(folder / f"{system}.safetensors", config, Encoder(config).state_dict(), {})
    return {file.stem: file for file in folder.iterdir()}


NAMES = [*(f"{s}-{o}" for s in ("ssam", "ssast", "axlstm", "ssamba") for o in ("time", "official")), "logmel"]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, files: dict[str, Path]) -> HearModel:
    system, _, order = request.param.partition("-")
    return load_model(files[system], token_order=order) if order else load_model(system)


@pytest.fixture(scope="module")
def mini(files: dict[str, Path]) -> HearModel:
    return load_model(files["ssam"])


def noise(size: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    loudness = 0.02 + np.abs(random.normal(0, 0.1, 1 + size // 4000)).repeat(4000)[:size]
    return (loudness * random.standard_normal(size)).astype(np.float32)


def alone(clip: np.ndarray, model: HearModel) -> np.ndarray:
    return get_scene_embeddings(torch.from_numpy(clip)[None], model).numpy()[0]


def test_clips_of_unequal_length_get_what_each_gets_alone(model: HearModel) -> None:
    audio = [noise(max(size, model.min_samples), seed) for seed, size in enumerate(SIZES)]
    found = hear_ssam.embed(audio, model)
    assert found.dtype == np.float32 and found.shape == (len(SIZES), model.scene_embedding_size)
    np.testing.assert_allclose(found, [alone(clip, model) for clip in audio], atol=2e-6, rtol=1e-5)
    with torch.no_grad():
        together = clips.embed_clips(model, [torch.from_numpy(clip) for clip in audio])
    for clip, (_, rows) in zip(audio, together, strict=True):
        expected = get_timestamp_embeddings(torch.from_numpy(clip)[None], model)[0][0]
        np.testing.assert_allclose(rows.numpy(), expected.numpy(), atol=5e-6, rtol=1e-5)


def test_padding_is_not_heard(mini: HearModel) -> None:
    audio = [noise(size, size) for size in SIZES]
    padded = np.zeros((len(audio), max(SIZES)), np.float32)
    for row, clip in zip(padded, audio, strict=True):
        row[: len(clip)] = clip
    expected = hear_ssam.embed(audio, mini)
    np.testing.assert_array_equal(hear_ssam.embed(padded, mini, lengths=SIZES), expected)
    np.testing.assert_array_equal(hear_ssam.embed(torch.from_numpy(padded), mini, lengths=SIZES), expected)
    assert np.abs(hear_ssam.embed(padded, mini) - expected).max() > 0.01


def test_kinds_of_input(mini: HearModel, tmp_path: Path) -> None:
    clip = noise(20_000)
    stereo = np.stack([clip, noise(20_000, 1)], 1)
    soundfile.write(tmp_path / "a.wav", stereo, 44_100, subtype="FLOAT")
    expected = alone(clip, mini)
    for x in (clip, clip[None], [clip], torch.from_numpy(clip), [torch.from_numpy(clip)], clip.astype(np.float64)):
        np.testing.assert_allclose(hear_ssam.embed(x, mini), [expected], atol=1e-6)
    for dtype, full, zero in (np.int16, 2**15, 0), (np.int32, 2**31, 0), (np.uint8, 2**7, 128):
        whole = np.round(clip.astype(np.float64) * full).clip(-full, full - 1)
        found = hear_ssam.embed((whole + zero).astype(dtype), mini)
        np.testing.assert_array_equal(found, hear_ssam.embed(whole / full, mini))
    from_file = alone(read_audio(tmp_path / "a.wav", RATE), mini)
    for x in (tmp_path / "a.wav", str(tmp_path / "a.wav"), [tmp_path / "a.wav"]):
        np.testing.assert_allclose(hear_ssam.embed(x, mini), [from_file], atol=1e-6)
    np.testing.assert_allclose(hear_ssam.embed(stereo.mean(1), mini, rate=44_100), [from_file], atol=1e-5)
    mixed = hear_ssam.embed([tmp_path / "a.wav", clip], mini)
    np.testing.assert_allclose(mixed, [from_file, expected], atol=1e-6)
    assert hear_ssam.embed([], mini).shape == (0, mini.scene_embedding_size)
    assert hear_ssam.embed([], mini, layers=[1, 2], pooling="mean_std").shape == (0, 4 * mini.timestamp_embedding_size)
    half = torch.from_numpy(clip).bfloat16()
    np.testing.assert_array_equal(hear_ssam.embed(half, mini), hear_ssam.embed([half.float()], mini))
    clip.flags.writeable = False
    np.testing.assert_allclose(hear_ssam.embed(clip, mini), [expected], atol=1e-6)  # and nothing warns


def test_a_file_that_is_written_anew_is_another_model(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for own in (tmp_path / "own.safetensors", tmp_path / "folder" / "model.safetensors"):
        for system in ("ssam", "ssast"):
            own.write_bytes(files[system].read_bytes())  # in its place, as transformers does: the folder stays as old
            found = hear_ssam.embed(noise(8_000), own if own.parent == tmp_path else own.parent)
            np.testing.assert_array_equal(found, hear_ssam.embed(noise(8_000), load_model(files[system])))


def test_the_shipped_model_is_the_default() -> None:
    clip = noise(16_000)
    np.testing.assert_allclose(hear_ssam.embed(clip), [alone(clip, load_model())], atol=1e-6)
    np.testing.assert_array_equal(hear_ssam.embed(clip), hear_ssam.embed(clip, "ssam_tiny"))


@pytest.mark.parametrize("system", ["ssam", "axlstm", "ssamba"])
def test_layers_and_pooling(files: dict[str, Path], system: str) -> None:
    model, depth = load_model(files[system]), 4 if system == "ssamba" else 2
    audio = [noise(40_000), noise(70_000, 1)]
    last = hear_ssam.embed(audio, model, pooling="mean")
    both = hear_ssam.embed(audio, model, pooling="mean", layers=[depth // 2, depth])
    assert both.shape == (2, 2 * last.shape[1])
    np.testing.assert_allclose(both[:, last.shape[1] :], last, atol=1e-6)
    assert np.abs(both[:, : last.shape[1]] - last).max() > 0.01
    for numbers in (torch.tensor([depth // 2, depth]), [depth / 2, float(depth)]):
        np.testing.assert_array_equal(hear_ssam.embed(audio, model, pooling="mean", layers=numbers), both)
    np.testing.assert_allclose(hear_ssam.embed(audio, model, layers=[depth], pooling="mean"), last, atol=1e-6)
    wide = hear_ssam.embed(audio, model, pooling="mean_std")
    np.testing.assert_allclose(wide[:, : last.shape[1]], last, atol=1e-6)
    rows = get_timestamp_embeddings(torch.from_numpy(audio[0])[None], model)[0][0].numpy()
    np.testing.assert_allclose(wide[0, last.shape[1] :], rows.std(0), atol=1e-5)


def test_a_middle_layer_is_what_that_block_gives(files: dict[str, Path]) -> None:
    model = load_model(files["ssam"])
    spec = torch.randn(2, 200, 80)
    first, last = model.encoder.hidden(spec, [1, 2])
    torch.testing.assert_close(first, model.encoder.run_blocks(model.encoder._sequence(spec), 1), rtol=0, atol=0)
    torch.testing.assert_close(last, model.encoder.tokens(spec), rtol=0, atol=0)


def test_long_clips_in_pieces(model: HearModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "LONG", 1)
    for size in (48_001, 70_080):
        clip = noise(size) + np.float32(0.05)
        pieces: list[torch.Tensor] = []
        blocks = [clip[:10], clip[10:40_000], clip[40_000:]]
        scene, samples = clips.embed_long(model, lambda blocks=blocks: blocks, pieces.append)
        assert samples == size
        np.testing.assert_allclose(scene.numpy(), alone(clip, model), atol=1e-5, rtol=1e-5)
        rows = get_timestamp_embeddings(torch.from_numpy(clip)[None], model)[0][0].numpy()
        np.testing.assert_allclose(torch.cat(pieces).numpy(), rows, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(hear_ssam.embed(clip, model), [alone(clip, model)], atol=1e-5, rtol=1e-5)


def test_long_files_in_pieces(mini: HearModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.flac", np.stack([noise(300_000), noise(300_000, 1)], 1), 48_000)
    short, options = noise(9_000), {"layers": [1], "pooling": "mean"}
    expected = hear_ssam.embed([short, read_audio(tmp_path / "a.flac", RATE), short], mini, **options)
    monkeypatch.setattr(clips, "LONG", 2)
    found = hear_ssam.embed([short, tmp_path / "a.flac", short], mini, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_groups_end_when_they_are_full() -> None:
    for most, count, expected in [(3, None, [[3, 1], [4], [1, 5]]), (99, 2, [[3, 1], [4, 1], [5]])]:
        assert list(clips.grouped([3, 1, 4, 1, 5], int, most, count)) == expected


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ("absent.wav", {}, r"^absent.wav: cannot be read: No such file"),
        ([np.zeros(16_000), np.zeros(100)], {}, r"^clip 1: audio has 100 samples; .* needs at least 201"),
        (np.zeros((16_000, 2)), {}, r"^x: has the shape \(16000, 2\), .*x\.mean\(1\)"),
        (None, {}, r"^x: 'NoneType' object is not iterable; give paths or arrays"),
        (torch.tensor(1.0), {}, r"^x: iteration over a 0-d array"),
        ([np.zeros((2, 16_000))], {}, r"^clip 0: is float64 of shape \(2, 16000\); .*average its channels"),
        ([0.1, 0.2], {}, r"^clip 0: is float64 of shape \(\)"),
        (np.full(16_000, np.nan), {}, r"^clip 0: audio has NaN"),
        ([np.zeros(16_000, bool)], {}, r"^clip 0: is bool"),
        (np.zeros(16_000, np.int64), {}, r"^clip 0: is int64; give floats"),
        (np.zeros((2, 16_000)), {"lengths": [16_000]}, r"^lengths: has one number per row"),
        ([np.zeros(16_000)], {"lengths": [16_000]}, r"^lengths: has one number per row"),
        (np.zeros((1, 16_000)), {"lengths": [800.0]}, r"^lengths: has one number per row of .* an integer"),
        (np.zeros((1, 16_000)), {"lengths": 800}, r"^lengths: has one number per row"),
        (np.zeros((2, 16_000)), {"lengths": [16_000, 16_001]}, r"^lengths: 16001 of clip 1 is not between"),
        (np.zeros(16_000), {"rate": 0}, r"^rate=0: no sample rate"),
        (np.zeros(16_000), {"rate": "16000"}, r"^rate='16000': no sample rate"),
        (np.zeros(16_000), {"layers": 3}, r"^layers=3: is not a list of blocks"),
        (np.zeros(16_000), {"pooling": "max"}, r"^unknown pooling 'max'"),
        (np.zeros(16_000), {"layers": [3]}, r"^layers=\[3\]: this encoder has no tokens of block 3; take 1 to 2"),
        (np.zeros(16_000), {"layers": []}, r"^layers=\[\]: this encoder has no tokens of block 0; take"),
        (np.zeros(16_000), {"layers": [0]}, r"^layers=\[0\]: this encoder has no tokens of block 0"),
        (np.zeros(16_000), {"model": "logmel", "layers": [1]}, r"^layers=\[1\]: logmel has no blocks"),
        (np.zeros(16_000), {"model": ["a.wav"]}, r"^model: is a list; give what load_model gives"),
        (np.zeros(16_000), {"model": torch.nn.Linear(1, 1)}, r"^model: is a Linear; give what load_model gives"),
        (np.zeros(16_000), {"model": "ssam_tny"}, r"Did you mean 'ssam_tiny'"),
        (np.zeros(16_000), {"model": "SSAM_TINY"}, r"Did you mean 'ssam_tiny'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(mini: HearModel, x: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HearSsamError, match=message):
        hear_ssam.embed(x, **{"model": mini, **options})


def test_pairs_have_even_layers(files: dict[str, Path]) -> None:
    with pytest.raises(HearSsamError, match=r"no tokens of block 3; take 2 to 4"):
        hear_ssam.embed(np.zeros(16_000), load_model(files["ssamba"]), layers=[3])


def write_aac(file: Path, clip: np.ndarray) -> None:
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.repeat(clip, 3)[None], format="fltp", layout="mono")
        frame.sample_rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def test_what_only_ffmpeg_reads(mini: HearModel, tmp_path: Path) -> None:
    clip = np.sin(2 * np.pi * 440 / RATE * np.arange(80_000)).astype(np.float32)
    write_aac(tmp_path / "a.m4a", clip)
    audio = read_audio(tmp_path / "a.m4a", RATE)
    assert abs(len(audio) - len(clip)) < 2000  # AAC pads
    assert np.abs(np.fft.rfft(audio[4_000:36_000])).argmax() == 880 and audio[4_000:36_000].std() > 0.4
    assert hear_ssam.embed(tmp_path / "a.m4a", mini).shape == (1, mini.scene_embedding_size)
    (tmp_path / "cut.m4a").write_bytes((tmp_path / "a.m4a").read_bytes()[:10_000])
    with pytest.raises(HearSsamError, match=r"cut.m4a: is damaged"):
        hear_ssam.embed(tmp_path / "cut.m4a", mini)


def test_a_member_of_a_tar_that_only_ffmpeg_reads_is_decoded_again(tmp_path: Path) -> None:
    """As the windows and long recordings of `hear-ssam embed` are."""
    write_aac(tmp_path / "a.m4a", np.sin(np.arange(20_000)).astype(np.float32))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.m4a", "a.m4a")
    (member,) = find_recordings([tmp_path / "a.tar"])
    first = member.read(RATE)
    assert np.array_equal(np.concatenate([*member.blocks(RATE)]), first)


def test_how_long_a_file_is_meant_to_be(tmp_path: Path) -> None:
    """FFmpeg guesses what a bare stream does not say, and knows of Matroska what its tracks do not say."""
    noise = 0.3 * np.random.default_rng(0).standard_normal(80_000).astype(np.float32)
    write_aac(tmp_path / "a.aac", np.concatenate([np.zeros(320_000, np.float32), noise]))
    assert abs(len(read_audio(tmp_path / "a.aac", RATE)) - 400_000) < 2000
    write_aac(tmp_path / "a.mka", noise)
    (tmp_path / "cut.mka").write_bytes((tmp_path / "a.mka").read_bytes()[:20_000])
    with pytest.raises(HearSsamError, match=r"cut.mka: is cut off: \d\.\d\d of 5\.\d\d s are there"):
        read_audio(tmp_path / "cut.mka", RATE)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(tmp_path / "a.mka", "a.mka")
    (member,) = audio_clips([tmp_path / "some.tar"])
    np.testing.assert_array_equal(member.decode(), read_audio(tmp_path / "a.mka", RATE))


def test_without_pyav_the_file_is_named_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.m4a").write_bytes(b"x")
    with pytest.raises(HearSsamError, match=r"a.m4a: is read by PyAV only; pip install 'hear-ssam\[av\]'"):
        hear_ssam.embed(tmp_path / "a.m4a")
