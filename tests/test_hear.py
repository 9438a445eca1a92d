"""The HEAR contract as properties, for all systems and both token orders; golden embeddings; bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import hear_ssam
from hear_ssam import HearSsamError, get_scene_embeddings, get_timestamp_embeddings, hear, load_model, scan
from hear_ssam.checkpoint import convert, load_checkpoint, save_checkpoint
from hear_ssam.config import CONFIGS, EncoderConfig, build_config
from hear_ssam.embedding.clips import embed_long
from hear_ssam.encoder import Encoder, resize_positions
from hear_ssam.hear import EncoderModel, available_models
from hear_ssam.paths import sha256
from hear_ssam.pretraining.windows import random_mask

from .masked import losses

SYSTEMS = ("ssam", "ssast", "axlstm", "ssamba")
ORDERS = ("time", "official")
SECOND = 16_000


def noise(clips: int, seconds: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(clips, round(seconds * SECOND), generator=generator)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each system, every parameter moved off its initial value; SSAMBA sees 2.56 s at once."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for system in SYSTEMS:
        sizes: dict[str, Any] = {"depth": 4, "window_frames": 256} if system == "ssamba" else {"depth": 2}
        config = build_config(system, 48, **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            encoder = Encoder(config)
            for name, weight in encoder.named_parameters():
                if name != "pos_embed":
                    weight.data += 0.02 * torch.randn_like(weight)
        save_checkpoint(folder / f"{system}.safetensors", config, encoder.state_dict(), {"licence": "CC0-1.0"})
    return {system: folder / f"{system}.safetensors" for system in SYSTEMS}


@pytest.fixture(scope="session", params=[(system, order) for system in SYSTEMS for order in ORDERS], ids="-".join)
def model(request: pytest.FixtureRequest, files: dict[str, Path]) -> EncoderModel:
    system, order = request.param
    return load(files[system], token_order=order)


def load(path: Path | str, **options: Any) -> EncoderModel:
    model = load_model(path, **options)
    assert isinstance(model, EncoderModel)
    return model


@pytest.fixture(scope="session", params=["logmel", *SYSTEMS])
def any_model(request: pytest.FixtureRequest, files: dict[str, Path]) -> hear.HearModel:
    return load_model(files.get(request.param, request.param))


# ---------------------------------------------------------------------------------------------------- the contract


def test_attributes(any_model: hear.HearModel) -> None:
    assert any_model.sample_rate == 16_000
    assert type(any_model.scene_embedding_size) is int and type(any_model.timestamp_embedding_size) is int
    assert not any_model.training


def test_same_input_same_output(model: EncoderModel) -> None:
    audio = noise(2, 2.3)
    assert torch.equal(get_scene_embeddings(audio, model), get_scene_embeddings(audio, model))
    first, _ = get_timestamp_embeddings(audio, model)
    assert torch.equal(first, get_timestamp_embeddings(audio, model)[0])


def test_group_size_does_not_matter(model: EncoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = noise(2, 7.5)
    expected = get_timestamp_embeddings(audio, model)[0]
    monkeypatch.setattr(hear, "GROUP", {"cpu": 1})  # one window at a time
    assert_close(get_timestamp_embeddings(audio, model)[0], expected)


def test_no_clips(any_model: hear.HearModel) -> None:
    rows, times = get_timestamp_embeddings(noise(0, 1), any_model)
    full, _ = get_timestamp_embeddings(noise(1, 1), any_model)
    assert rows.shape == (0, *full.shape[1:]) and times.shape == (0, full.shape[1])
    assert get_scene_embeddings(noise(0, 1), any_model).shape == (0, any_model.scene_embedding_size)


def test_one_clip_without_a_batch_axis(any_model: hear.HearModel) -> None:
    audio = noise(1, 1)
    assert torch.equal(get_scene_embeddings(audio[0], any_model), get_scene_embeddings(audio, any_model))
    assert torch.equal(get_timestamp_embeddings(audio[0], any_model)[1], get_timestamp_embeddings(audio, any_model)[1])


# ---------------------------------------------------------------------------------------------------- time order


def seen_windows(model: EncoderModel, monkeypatch: pytest.MonkeyPatch, audio: Tensor) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    tokens = model.encoder.tokens

    def record(spec: Tensor) -> Tensor:
        shapes.append(tuple(spec.shape[:2]))
        return tokens(spec)

    with monkeypatch.context() as patch:
        patch.setattr(model.encoder, "tokens", record)
        get_scene_embeddings(audio, model)
    return shapes


@pytest.mark.parametrize("system", ["ssam", "ssast", "axlstm"])
def test_windows_hold_kept_rows_only(system: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(files[system])
    for seconds, expected in (
        (2.0, [(3, 200)]),  # 50 rows, one window
        (4.0, [(6, 200)]),
        (1.0, [(3, 100)]),
        (2.5, [(3, 200), (3, 52)]),  # the last row is centred at 2.495 s
    ):
        audio = noise(3, seconds)
        assert seen_windows(model, monkeypatch, audio) == expected
        rows, _ = get_timestamp_embeddings(audio, model)
        assert rows.shape[1] == sum(clips * frames for clips, frames in expected) // 3 // 4
    assert seen_windows(model, monkeypatch, noise(3, 201 / SECOND)) == [(3, 4)]


def test_ssamba_windows(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(files["ssamba"])  # 256 frames = 16 slots
    assert seen_windows(model, monkeypatch, noise(1, 0.175)) == [(1, 16)]  # 2800 samples: one patch
    assert seen_windows(model, monkeypatch, noise(2, 6)) == [(4, 256), (2, 80)]  # 598 frames, 6 of them dropped


@pytest.mark.parametrize("system", SYSTEMS)
def test_row_t_holds_the_tokens_of_slot_t(system: str, files: dict[str, Path]) -> None:
    model = load(files[system])
    audio = noise(1, 1.5)
    rows, _ = get_timestamp_embeddings(audio, model)
    slots, bands, width = rows.shape[1], model.config.grid[1], model.config.embed_dim
    spec = hear.normalize(model.frontend(audio), model.config)
    spec = functional.pad(spec, (0, 0, 0, slots * model.config.patch_frames - spec.shape[1]))
    tokens = model.encoder.tokens(spec)[0, 1:].detach()
    for t in (0, 3, slots - 1):
        for f in range(bands):
            token = tokens[f * slots + t if system == "ssamba" else bands * t + f]
            assert_close(rows[0, t, f * width : (f + 1) * width], token)
    assert_close(get_scene_embeddings(audio, model), rows.mean(1))


@pytest.mark.parametrize("order", ["time", "official"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_pooling(files: dict[str, Path], system: str, order: str) -> None:
    audio = noise(3, 1.7)
    models = {name: load(files[system], token_order=order, pooling=name) for name in ("mean", "mean_std")}
    mean, both = (get_scene_embeddings(audio, model) for model in models.values())
    rows, times = get_timestamp_embeddings(audio, models["mean"])
    assert both.shape == (3, models["mean_std"].scene_embedding_size) == (3, 2 * mean.shape[1])
    assert torch.equal(both[:, : mean.shape[1]], mean)
    if (system, order) != ("ssamba", "official"):  # whose scene counts padding too
        assert_close(both[:, mean.shape[1] :], rows.std(1, correction=0))
    again = get_timestamp_embeddings(audio, models["mean_std"])
    assert torch.equal(again[0], rows) and torch.equal(again[1], times)


def test_files_without_a_pooling_keep_the_mean(files: dict[str, Path], tmp_path: Path) -> None:
    config, state, info = load_checkpoint(files["ssam"])
    path = tmp_path / "both.safetensors"
    save_checkpoint(path, dataclasses.replace(config, pooling="mean_std"), state, info)
    assert load(path).config.pooling == "mean_std"
    values = config.to_dict()
    del values["pooling"]
    assert EncoderConfig.from_dict(values).pooling == "mean"
    with pytest.raises(HearSsamError, match=r"pooling.*median.*mean_std"):
        load(files["ssam"], pooling="median")


def test_times_follow_the_formula(files: dict[str, Path]) -> None:
    ssam, ssamba = load(files["ssam"]), load(files["ssamba"])
    for samples in (201, 239, 240, 879, 880, 881, 31_999, 32_000, 32_240, 40_000, 12_345):
        centres = [40 * t + 15 for t in range(100) if 40 * t + 15 <= samples / 16] or [15]
        assert ssam.timestamps(samples).tolist() == centres
    for samples in (2800, 5359, 5360, 48_000):
        rows = (1 + (samples - 400) // 160) // 16
        assert ssamba.timestamps(samples).tolist() == [160 * t + 87.5 for t in range(rows)]


@pytest.mark.parametrize("system", ["logmel", *SYSTEMS])
def test_times_do_not_drift_in_an_hour(system: str, files: dict[str, Path]) -> None:
    model = load_model(files.get(system, system))
    times = model.timestamps(3600 * SECOND)
    step, start = {"logmel": (10, 0), "ssamba": (160, 87.5)}.get(system, (40, 15))
    assert times[-1] == start + step * (len(times) - 1) and 3_600_000 - 2 * step < times[-1] <= 3_600_000
    assert torch.equal(times.float().double(), times)


# ---------------------------------------------------------------------------------------------------- official order


def test_official_row_counts(files: dict[str, Path]) -> None:
    model = load(files["ssam"], token_order="official")
    for seconds, rows, step in (
        (0.5, 13, None), (1.0, 26, 38.4615), (1.5, 38, None), (1.99, 50, None), (2.0, 51, 39.2157), (3.7, 93, 39.7849),
        (4.0, 101, None), (5.0, 126, None), (10.0, 251, None),
    ):  # fmt: skip
        times = model.timestamps(round(seconds * SECOND))
        assert len(times) == rows and times[0] == 0
        assert step is None or math.isclose(times[1].item(), step, abs_tol=1e-4)


def test_official_order_is_the_published_scramble(files: dict[str, Path]) -> None:
    time, official = load(files["ssam"]), load(files["ssam"], token_order="official")
    audio = noise(1, 1.995)  # exactly 200 frames: the same tokens either way
    rows, scrambled = (get_timestamp_embeddings(audio, model)[0][0].unflatten(1, (5, 48)) for model in (time, official))
    assert rows.shape == scrambled.shape == (50, 5, 48)
    for j in (0, 7, 49):
        for k in range(5):
            assert_close(scrambled[j, k], rows[10 * k + j // 5, j % 5])


@pytest.mark.parametrize("system", ["ssam", "ssast", "axlstm"])
@pytest.mark.parametrize("seconds", ["0.7s", "2.5s"])
def test_golden_embeddings(system: str, seconds: str, golden: Path) -> None:
    model = load_model(golden / f"{system}_mini_official.pth", token_order="official")
    numbers = np.load(golden / f"{system}_mini.npz")
    audio = torch.from_numpy(numbers[f"wave_{seconds}"])
    rows, times = get_timestamp_embeddings(audio, model)
    np.testing.assert_allclose(rows, numbers[f"timestamp_emb_{seconds}"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(get_scene_embeddings(audio, model), numbers[f"scene_{seconds}"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(times, numbers[f"timestamps_{seconds}"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("clip", "window"), [("10s_T1024", None), ("3s_T512", 512)])
def test_golden_embeddings_of_ssamba(clip: str, window: int | None, golden: Path) -> None:
    model = load_model(golden / "ssamba_mini_official.pth", token_order="official", window_frames=window)
    numbers = np.load(golden / "ssamba_mini.npz")
    audio = torch.from_numpy(numbers[f"wave_{clip}"])
    np.testing.assert_allclose(get_scene_embeddings(audio, model), numbers[f"avgtok_{clip}"], rtol=0, atol=1e-5)


def test_official_ssamba_cuts_long_audio_into_windows(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(files["ssamba"], token_order="official")
    assert seen_windows(model, monkeypatch, noise(1, 6)) == [(3, 256)]
    assert model.scene_embedding_size == 48
    rows, times = get_timestamp_embeddings(noise(1, 6), model)
    assert rows.shape == (1, 37, 48) and times[0, :2].tolist() == [87.5, 247.5]


def test_official_ssamba_pads_before_it_normalises(files: dict[str, Path]) -> None:
    model = load(files["ssamba"], token_order="official")
    raw = model.frontend(noise(1, 1))
    spec = (functional.pad(raw, (0, 0, 0, 256 - raw.shape[1])) + 4.2677393) / (2 * 4.5689974)
    with torch.no_grad():
        expected = model.encoder.tokens(spec)[:, 1:].mean(1)
    assert_close(get_scene_embeddings(noise(1, 1), model), expected)


def test_official_ssamba_rows_are_means_over_the_bands(files: dict[str, Path]) -> None:
    time, official = load(files["ssamba"]), load(files["ssamba"], token_order="official")
    audio = noise(1, 2.575)  # 256 frames: no padding, the same tokens either way
    rows, means = (get_timestamp_embeddings(audio, model)[0] for model in (time, official))
    assert_close(means, rows.unflatten(2, (8, 48)).mean(2))
    assert_close(get_scene_embeddings(audio, official), means.mean(1))


@pytest.mark.parametrize("system", SYSTEMS)
def test_golden_conversion_is_bit_identical(system: str, golden: Path, tmp_path: Path) -> None:
    source, target = golden / f"{system}_mini_official.pth", tmp_path / "converted.safetensors"
    convert(source, target)
    audio = noise(2, 2.5)
    before, after = load_model(source), load(target)
    assert after.config.token_order == "official"
    assert torch.equal(get_scene_embeddings(audio, before), get_scene_embeddings(audio, after))
    assert torch.equal(get_timestamp_embeddings(audio, before)[0], get_timestamp_embeddings(audio, after)[0])
    assert after.checkpoint_sha256 == sha256(target)


# ---------------------------------------------------------------------------------------------------- load_model


def test_a_file_stores_its_order_and_options_override_it(files: dict[str, Path]) -> None:
    assert load(files["ssam"]).config.token_order == "time"
    assert load(files["ssam"], token_order="official").config.token_order == "official"
    assert load(files["ssam"]).checkpoint_sha256 == sha256(files["ssam"])
    assert load(files["ssam"]).name == "ssam"


def test_window_frames_resizes_learned_positions(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = load(files["ssamba"]), load(files["ssamba"], window_frames=128)
    expected = resize_positions(plain.encoder.pos_embed, plain.config, 8)
    assert torch.equal(model.encoder.pos_embed, expected) and model.config.window_frames == 128
    assert seen_windows(model, monkeypatch, noise(1, 3)) == [(2, 128), (1, 32)]
    assert load("ssamba_tiny", pretrained=False, window_frames=64).encoder.pos_embed.shape == (1, 1 + 8 * 4, 192)
    with pytest.raises(HearSsamError, match="does not divide window_frames=100"):
        load_model(files["ssamba"], window_frames=100)
    with pytest.raises(HearSsamError, match="window_frames is an option of SSAMBA"):
        load_model(files["ssam"], window_frames=100)


def test_random_weights_follow_the_seed_and_nothing_else() -> None:
    state = torch.get_rng_state()
    first, again, other = (load("ssam_tiny", pretrained=False, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.encoder.patch_embed.weight, again.encoder.patch_embed.weight)
    assert not torch.equal(first.encoder.patch_embed.weight, other.encoder.patch_embed.weight)
    assert first.checkpoint_sha256 == "" and first.name == "ssam_tiny"


def test_loading_draws_no_random_numbers(files: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    load_model(files["ssamba"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("system", SYSTEMS)
def test_named_models_without_weights(system: str) -> None:
    name = f"{system}_tiny"
    model, row = load_model(model=name, pretrained=False), available_models()[name]
    rows, _ = get_timestamp_embeddings(noise(1, 0.5), model)
    assert rows.shape[2] == row.timestamp_embedding_size == model.timestamp_embedding_size
    assert model.scene_embedding_size == 2 * row.timestamp_embedding_size  # ours are pooled to mean and deviation
    if row.weights is None:
        assert model.scene_embedding_size == row.scene_embedding_size
        with pytest.raises(HearSsamError, match=rf"{name}\.\w+: .*drive\.google\.com|HF_HUB_OFFLINE"):
            load_model(name)


def test_logmel_is_mean_and_deviation() -> None:
    model = load_model("logmel")
    rows, times = get_timestamp_embeddings(noise(2, 1), model)
    assert rows.shape == (2, 101, 80) and times[0, :3].tolist() == [0, 10, 20]
    scene = get_scene_embeddings(noise(2, 1), model).numpy()
    np.testing.assert_allclose(scene, np.hstack([rows.mean(1), rows.numpy().std(1)]), rtol=1e-5, atol=1e-5)


def test_explicit_backends_agree(files: dict[str, Path]) -> None:
    audio = noise(1, 0.5)
    expected = get_scene_embeddings(audio, load_model(files["ssam"], backend="reference"))
    for name, reason in scan.available_backends().items():
        if name in ("reference", "torch", "cpu") and reason is None:  # the others may be here, but not for the CPU
            scene = get_scene_embeddings(audio, load_model(files["ssam"], backend=name))
            assert_close(scene, expected)
        elif reason is not None:
            with pytest.raises(HearSsamError, match=f"'{name}' cannot run here: "):
                load_model(files["ssam"], backend=name)


def test_backends_that_nobody_asked_for_are_left_alone(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []  # that of a GPU would wake it
    monkeypatch.setattr(scan, "_probe", looked_at.append)
    load_model(files["ssam"], backend="torch")
    assert looked_at == ["torch"]


def test_bf16_is_close(files: dict[str, Path]) -> None:
    audio = noise(2, 1)
    scene = get_scene_embeddings(audio, load_model(files["ssam"], precision="bf16"))
    exact = get_scene_embeddings(audio, load_model(files["ssam"]))
    assert scene.dtype == torch.float32 and not torch.equal(scene, exact)
    assert functional.cosine_similarity(scene, exact).min() > 0.999


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modell": "ssam_tiny"}, "unknown option of load_model 'modell'. Did you mean 'model'.*window_frames"),
        ({"model": "ssam_tiny", "pretrained": "false"}, "pretrained='false': has a wrong type, str"),
        ({"cache": 3}, "cache=3: has a wrong type, int"),
        ({"device": None}, "device=None: has a wrong type, NoneType"),
        ({"model_file_path": 3}, "model_file_path=3: has a wrong type, int"),
        ({"model": "ssam_tinny", "pretrained": False}, "unknown model 'ssam_tinny'. Did you mean 'ssam_tiny'"),
        ({"model_file_path": "ssam_tiney"}, "unknown model 'ssam_tiney'. Did you mean 'ssam_tiny'"),
        ({"model_file_path": "folder/weights.pth"}, r"^folder/weights\.pth: no such file or folder"),
        ({"model_file_path": "a.pth", "model": "ssam_tiny"}, "both model_file_path='a.pth' and model='ssam_tiny'"),
        ({"model": "ssam_tiny", "pretrained": False, "backend": "tourch"}, "Did you mean 'torch'"),
        ({"model": "ssam_tiny", "pretrained": False, "precision": "fp16"}, "precision"),
        ({"model": "ssam_tiny", "pretrained": False, "token_order": "tim"}, "Did you mean 'time'"),
        ({"model": "ssam_tiny", "pretrained": False, "device": "gpu"}, "unknown device 'gpu'"),
        ({"model": "logmel", "token_order": "time"}, "logmel has no encoder"),
    ],
)
def test_wrong_options(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(HearSsamError, match=reason):
        load_model(**options)


@contextlib.contextmanager
def other_state(name: str) -> Iterator[None]:
    """A process in which torch's globals are not what they are at its start."""
    if name == "float64":
        torch.set_default_dtype(torch.float64)
    elif name == "deterministic":
        torch.use_deterministic_algorithms(True)
    elif name == "device":
        torch.set_default_device("meta")  # any that is not the CPU
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
    try:
        with torch.inference_mode(name == "inference"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_default_device(None)
        if name == "threads":
            torch.set_num_threads(threads)


@pytest.mark.parametrize("state", ["float64", "deterministic", "device", "threads", "inference"])
@pytest.mark.parametrize("name", ["logmel", *SYSTEMS])
def test_no_global_state_of_torch_matters(name: str, state: str, files: dict[str, Path]) -> None:
    audio = noise(2, 1.5)

    def embed() -> list[Tensor]:
        loaded = load_model(files.get(name, name))
        drawn = load_model(f"{name}_tiny", pretrained=False) if name in files else loaded
        both = [get_scene_embeddings(audio, model) for model in (loaded, drawn)]
        in_pieces, _ = embed_long(loaded, lambda: [clip.numpy() for clip in audio])
        return [*both, *get_timestamp_embeddings(audio, loaded), in_pieces]

    expected = embed()
    with other_state(state):
        results = embed()
    for result, want in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        assert_close(result, want)
    if name in files:
        with other_state(state):
            model = load(files[name])
        model(audio).sum().backward()  # weights as good for training as any


@pytest.mark.parametrize("samples", [640, 24_000])  # the shorter have one row, of no deviation
def test_gradients_of_scenes_are_numbers(samples: int) -> None:
    model = load_model(model="ssam_tiny", pretrained=False)
    scene, rows = model.scene_and_rows(noise(2, samples / 16_000))
    scene.square().sum().backward()
    assert (rows.shape[1] == 1) == (samples == 640) and scene.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("state", ["float64", "deterministic", "threads"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_nor_in_training(system: str, state: str) -> None:
    config = build_config(system, 48, depth=2, window_frames=256 if system == "ssamba" else 200)

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        encoder = Encoder(config)
        spec = torch.randn(2, config.window_frames, config.n_mels, dtype=torch.float32)
        loss = losses(encoder, spec, random_mask(2, config, torch.Generator().manual_seed(0)))["total"]
        loss.backward()
        return [loss, *(weight.grad for weight in encoder.parameters() if weight.grad is not None)]

    expected = step()
    with other_state(state):
        results = step()
    for result, want in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        assert_close(result, want)


def test_bf16_inside_inference_mode(files: dict[str, Path]) -> None:
    audio = noise(1, 1)
    expected = get_scene_embeddings(audio, load_model(files["ssam"], precision="bf16"))
    with torch.inference_mode():
        inside = load_model(files["ssam"], precision="bf16")
        assert torch.equal(get_scene_embeddings(audio, inside), expected)
        moved = load_model(files["ssam"], precision="bf16").to(torch.float64).to(torch.float32)  # new weights, in here
        assert torch.equal(get_scene_embeddings(audio, moved), expected)
        assert torch.equal(moved.encoder.patch_embed.weight, inside.encoder.patch_embed.weight)
    assert torch.equal(get_scene_embeddings(audio, inside), expected)


def test_a_halved_model_is_told_of_bf16(any_model: hear.HearModel, files: dict[str, Path]) -> None:
    model = load_model(files.get(any_model.name, any_model.name)).half()
    for function in (get_scene_embeddings, lambda audio, model: hear_ssam.embed(audio, model)):
        with pytest.raises(HearSsamError, match=r'weights are torch\.float16; call model\.float\(\).*precision="bf16"'):
            function(noise(1, 1), model)
    get_scene_embeddings(noise(1, 1), model.float())


def test_random_weights_need_a_name(files: dict[str, Path]) -> None:
    with pytest.raises(HearSsamError, match=r"ssam\.safetensors: .*pass the name of a model with pretrained=False"):
        load_model(files["ssam"], pretrained=False)


def test_the_shipped_default() -> None:
    if available_models()[hear.DEFAULT].weights is None:
        pytest.skip(f"no {hear.DEFAULT} among the shipped checkpoints")
    model = load("")
    assert model.name == hear.DEFAULT and len(model.checkpoint_sha256) == 64
    assert model.config.token_order == "time" and model.config.mask_position == "after"
    with np.load(Path(__file__).parent / "golden" / "ssam_tiny.npz") as numbers:
        assert model.checkpoint_sha256 == numbers["sha256"]  # made with these weights; new ones need new numbers
        audio = torch.from_numpy(numbers["audio"]).float() / 32768
        scene, rows = get_scene_embeddings(audio, model), get_timestamp_embeddings(audio, model)[0]
        torch.testing.assert_close(scene, torch.from_numpy(numbers["scene"]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows[:, ::12], torch.from_numpy(numbers["rows"]), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- bad audio


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (np.zeros((1, 9000), np.float32), "must be a torch.Tensor, not ndarray; use torch.from_numpy"),
        (torch.zeros(1, 9000, dtype=torch.int16), r"not torch.int16; use audio.float\(\) / 32768"),
        (torch.zeros(1, 9000, dtype=torch.int32), r"not torch.int32; use audio.float\(\) / 2\*\*31"),
        (torch.zeros(1, 9000, dtype=torch.float64), r"not torch.float64; use audio.float\(\)\."),
        (torch.zeros(1, 9000, dtype=torch.float16), r"not torch.float16"),
        (torch.zeros(()), r"shape \(clips, samples\), mono, not \(\)"),
        (torch.zeros(1, 2, 9000), r"mono, not \(1, 2, 9000\)"),
        (torch.zeros(1, 0), "0 samples; .* needs at least"),
        (torch.zeros(2, 200), "200 samples; .* needs at least (201 .12.5625 ms|2800 .175 ms)"),
        (torch.zeros(1, 9000, device="meta"), "audio is on meta, the model on cpu"),
    ],
)
def test_bad_audio(any_model: hear.HearModel, audio: Any, reason: str) -> None:
    with pytest.raises(HearSsamError, match=reason):
        get_scene_embeddings(audio, any_model)
    with pytest.raises(HearSsamError, match=reason):
        get_timestamp_embeddings(audio, any_model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_samples_are_located(any_model: hear.HearModel, value: float) -> None:
    audio = noise(4, 1)
    audio[1, 5] = audio[3, 70] = value
    with pytest.raises(HearSsamError, match=r"NaN or infinite samples in clip 1, 3 of the batch .* set them to 0"):
        get_scene_embeddings(audio, any_model)
    for single in (audio[1], audio[1:2]):  # of which there is no number to tell
        with pytest.raises(HearSsamError, match="NaN or infinite samples; leave them out"):
            get_scene_embeddings(single, any_model)


def test_the_shortest_audio(any_model: hear.HearModel) -> None:
    rows, times = get_timestamp_embeddings(noise(1, any_model.min_samples / SECOND), any_model)
    assert rows.shape[:2] == times.shape and torch.isfinite(rows).all()
    with pytest.raises(HearSsamError, match="needs at least"):
        get_scene_embeddings(noise(1, (any_model.min_samples - 1) / SECOND), any_model)


def test_a_foreign_model() -> None:
    with pytest.raises(HearSsamError, match=r"must come from hear_ssam\.load_model, not be a Linear"):
        get_scene_embeddings(noise(1, 1), torch.nn.Linear(2, 2))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- the table


def test_the_table_of_models() -> None:
    rows = available_models()
    assert rows.keys() == {*CONFIGS, "logmel"}
    origins = [row.published.origin for row in rows.values() if row.published]
    assert len(origins) == len(CONFIGS) and all(origin.page and origin.licence for origin in origins)
    assert (rows["ssamba_base"].window_seconds, rows["ssamba_base"].scene_embedding_size) == (10.24, 12288)
    assert rows["logmel"].scene_embedding_size == 160


def test_the_package_root_offers_the_api() -> None:
    for name in ("load_model", "get_scene_embeddings", "get_timestamp_embeddings", "available_models"):
        assert getattr(hear_ssam, name) is getattr(hear, name)


def test_a_model_is_loaded_and_run_without_the_compiler() -> None:
    """Importing it takes as long as importing torch does."""
    code = "import sys, torch, hear_ssam as h; m = h.load_model(); h.get_scene_embeddings(torch.zeros(1, 9000), m); "
    assert subprocess.run([sys.executable, "-c", code + "sys.exit('torch._dynamo' in sys.modules)"]).returncode == 0
