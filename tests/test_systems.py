"""All systems × sizes: counts, the HEAR contract, properties on every CPU backend, numbers of the official classes.

Runs from a bare clone; tests/golden/README.md says where its numbers come from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hear_ssam import HearSsamError, cli, get_scene_embeddings, get_timestamp_embeddings, load_model
from hear_ssam.checkpoint import convert, save_checkpoint
from hear_ssam.config import CONFIGS, SYSTEMS, WIDTHS, build_config
from hear_ssam.encoder import Encoder
from hear_ssam.evaluation.records import read
from hear_ssam.frontend import LogMel, standardize
from hear_ssam.hear import EncoderModel
from hear_ssam.pretraining.windows import random_mask
from hear_ssam.scan import available_backends

from .masked import losses, predictions
from .test_hear_tools import call
from .tiny_tasks import write_task

ROOT = Path(__file__).resolve().parent
SECOND = 16_000
ORDERS = ("time", "official")
EVERY_SYSTEM = pytest.mark.parametrize("system", SYSTEMS)
EVERY_ORDER = pytest.mark.parametrize("order", ORDERS)
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])  # the others need a GPU


@functools.cache
def tiny(system: str, order: str = "time", backend: str | None = None) -> EncoderModel:
    """The named model with random weights, all moved off their initial values so that none hides behind 0 or 1."""
    model = load_model(model=f"{system}_tiny", pretrained=False, token_order=order, backend=backend)
    assert isinstance(model, EncoderModel)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def noise(clips: int, seconds: float, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(clips, round(seconds * SECOND), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ the table of models

# Trainable parameters of the official classes; SSAMBA without the unused ImageNet head and its two integer scalars.
PARAMETERS = {
    "ssam_tiny": 4_760_512, "ssam_small": 17_889_088, "ssam_base": 69_250_624,
    "ssast_tiny": 5_401_024, "ssast_small": 21_492_544, "ssast_base": 85_747_264,
    "axlstm_tiny": 2_917_408, "axlstm_small": 11_216_800, "axlstm_base": 43_962_016,
    "ssamba_tiny": 7_095_296,
    "ssamba_small": 26_224_106 - 1000 * (384 + 1) - 2,
    "ssamba_base": 99_042_794 - 1000 * (768 + 1) - 2,
}  # fmt: skip


@pytest.mark.parametrize("size", WIDTHS)
@EVERY_SYSTEM
def test_every_named_model_is_built_and_counted(system: str, size: str) -> None:
    config = CONFIGS[f"{system}_{size}"]
    with torch.device("meta"):
        encoder = Encoder(config)
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == PARAMETERS[f"{system}_{size}"]
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert frozen == ([] if system == "ssamba" else ["pos_embed"])
    assert config.embedding_dim == (8 if system == "ssamba" else 5) * WIDTHS[size]
    assert config.token_order == "time" and config.mask_position == "after"  # the right choices are the defaults


def test_models_list_prints_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {name: row["parameters"] for name, row in rows.items()} == {**PARAMETERS, "logmel": 0}
    columns = {"system", "scene_embedding_size", "timestamp_embedding_size", "window_seconds", "weights", "published"}
    assert columns <= rows["ssam_tiny"].keys()
    assert cli.main(["models", "list"]) == 0
    table = capsys.readouterr().out
    for name, row in rows.items():
        (line,) = (line for line in table.splitlines() if line.startswith(name))
        assert f"{row['parameters']:,}" in line
        assert not row["published"] or row["published"]["origin"]["licence"] in line
    assert "10.24 s" in table and "drive.google.com" in table


# ------------------------------------------------------------------------------------------------ tiny, in full


@pytest.mark.parametrize("seconds", [0.2, 1.98, 5.3])
@EVERY_ORDER
@EVERY_SYSTEM
def test_hear_contract(system: str, order: str, seconds: float) -> None:
    model, audio = tiny(system, order), noise(2, seconds)
    rows, times = get_timestamp_embeddings(audio, model)
    scene = get_scene_embeddings(audio[1:], model)
    width = 192 if (system, order) == ("ssamba", "official") else 192 * (8 if system == "ssamba" else 5)
    assert model.timestamp_embedding_size == width and model.scene_embedding_size == 2 * width
    assert scene.shape == (1, 2 * width) and rows.shape == (2, times.shape[1], width)
    assert scene.dtype == rows.dtype == times.dtype == torch.float32
    assert scene.isfinite().all() and rows.isfinite().all() and not scene.requires_grad and not rows.requires_grad
    assert times[0].equal(times[1]) and times.min() >= 0 and times.max() <= 1000 * seconds
    hop = 160 if system == "ssamba" else 40
    assert abs(times.shape[1] - 1000 * seconds / hop) <= 1
    if order == "official" and system != "ssamba":  # stretched over the clip
        hop = 1000 * seconds / times.shape[1]
    assert ((times.diff() - hop).abs() < 1e-3).all()
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    if (system, order) != ("ssamba", "official"):  # whose scene takes in the padding
        assert_close(scene[0, :width], rows[1].mean(0))


@EVERY_BACKEND
@EVERY_SYSTEM
@torch.no_grad()
def test_a_clip_does_not_know_its_batch(system: str, backend: str) -> None:
    if (reason := available_backends()[backend]) is not None:
        pytest.skip(reason)
    model, audio = tiny(system, backend=backend), noise(3, 0.25)
    audio[1] *= 9  # a loud and a silent companion
    audio[2] = 0
    scene, rows = model.scene_and_rows(audio)
    for i in range(3):
        for alone, together in zip(model.scene_and_rows(audio[i : i + 1]), (scene, rows), strict=True):
            assert_close(alone[0], together[i])
    assert_close(model.scene_and_rows(audio[[1, 0]])[1], rows[[1, 0]])
    assert_close(rows, tiny(system, backend="torch")(audio))


@EVERY_ORDER
@EVERY_SYSTEM
def test_nor_does_a_clip_of_several_windows(system: str, order: str) -> None:
    model, audio = tiny(system, order), noise(2, 2.3)
    rows, _ = get_timestamp_embeddings(audio, model)
    assert_close(get_timestamp_embeddings(audio[1:], model)[0][0], rows[1])


@EVERY_ORDER
@EVERY_SYSTEM
def test_gradients_reach_audio_and_weights(system: str, order: str) -> None:
    model, audio = tiny(system, order), noise(1, 0.5).requires_grad_()
    rows = model(audio)
    assert_close(rows.detach(), get_timestamp_embeddings(audio.detach(), model)[0])
    rows.square().sum().backward()
    assert audio.grad is not None and audio.grad.isfinite().all() and audio.grad.abs().max() > 0
    heads = ("head", "contrast", "generate", "mask_token")
    for name, parameter in model.encoder.named_parameters():
        if parameter.requires_grad and not name.startswith(heads):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    model.zero_grad()


@pytest.mark.parametrize("seconds", [0.2, 1.0, 2.0, 2.5, 5.3, 60.0])
@EVERY_SYSTEM
def test_no_token_is_computed_from_padding(system: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, audio, seen = tiny(system), noise(1, seconds), []

    def tokens(spec: Tensor) -> Tensor:
        seen.append(spec.shape[0] * spec.shape[1])
        return spec.new_zeros(len(spec), 1 + model.encoder.patchify(spec).shape[1], 192)

    monkeypatch.setattr(model.encoder, "tokens", tokens)
    rows, _ = get_timestamp_embeddings(audio, model)
    assert sum(seen) == rows.shape[1] * model.config.patch_frames  # windows of exact length
    missing = sum(seen) - model.frontend(audio).shape[1]
    assert missing <= (0 if system == "ssamba" else 2)  # the last row may lack half of its four frames


@pytest.mark.parametrize("at", [0.31, 2.41])
@EVERY_SYSTEM
def test_a_click_moves_the_row_of_its_time(system: str, at: float) -> None:
    model, audio = tiny(system), noise(1, 2.7)
    click = audio.clone()
    click[0, round(at * SECOND) : round(at * SECOND) + 16] += 0.5
    rows, times = get_timestamp_embeddings(torch.cat([audio, click]), model)
    nearest = times[0, (rows[0] - rows[1]).norm(dim=1).argmax()]
    assert abs(nearest - 1000 * at) <= (160 if system == "ssamba" else 40)


@pytest.mark.parametrize("patch", [(4, 8), (4, 16), (8, 16)])
@EVERY_SYSTEM
def test_patch_sizes(system: str, patch: tuple[int, int], tmp_path: Path) -> None:
    slots, bands = 200 // patch[0], (128 if system == "ssamba" else 80) // patch[1]
    config = build_config(
        system, 48, depth=2, window_frames=200, patch_frames=patch[0], patch_mels=patch[1], mask_ratio=0.5
    )
    torch.manual_seed(0)
    encoder = Encoder(config)
    drawn = torch.randn(1, 200, config.n_mels), random_mask(1, config, torch.Generator().manual_seed(0))
    assert predictions(encoder, *drawn).shape == (1, slots * bands, patch[0] * patch[1])
    assert losses(encoder, *drawn)["total"].isfinite()
    save_checkpoint(tmp_path / "a.safetensors", config, encoder.state_dict(), {})
    for order in ORDERS:
        model, audio = load_model(tmp_path / "a.safetensors", token_order=order), noise(2, 2.5)
        rows, times = get_timestamp_embeddings(audio, model)
        assert rows.shape == (2, times.shape[1], model.timestamp_embedding_size)
        assert model.scene_embedding_size == 48 * (1 if (system, order) == ("ssamba", "official") else bands)
        hop = 2500 / times.shape[1] if order == "official" and system != "ssamba" else 10 * patch[0]
        assert ((times.diff() - hop).abs() < 1e-3).all()
        first = (10 * patch[0] + (15 if system == "ssamba" else -10)) / 2
        assert times[0, 0] == first or (order == "official" and system != "ssamba" and times[0, 0] == 0)
        assert_close(get_scene_embeddings(audio[1:], model), get_scene_embeddings(audio, model)[1:])


def test_audio_too_short_for_ssamba_is_refused() -> None:
    get_scene_embeddings(noise(1, 2800 / SECOND), tiny("ssamba"))
    with pytest.raises(HearSsamError, match=r"2799 samples.*at least 2800"):
        get_scene_embeddings(noise(1, 2799 / SECOND), tiny("ssamba"))


@EVERY_SYSTEM
def test_evaluate(system: str, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks" / "tones", sample_duration=1.0)
    options = json.dumps({"model": f"{system}_tiny", "pretrained": False})
    folders = ["--tasks-dir", str(tmp_path / "tasks"), "--results-dir", str(tmp_path / "results")]
    assert cli.main(["evaluate", "--model-options", options, *folders, "--workers", "1"]) == 0
    records = read(tmp_path / "results")
    assert {record["metric"] for record in records} == {"top1_acc", "mAP"}
    assert all(record["embeddings"]["dim"] == tiny(system).scene_embedding_size for record in records)


WITHOUT_WEIGHTS = """
import hear_ssam
from hear_ssam import get_scene_embeddings, get_timestamp_embeddings

def load_model(model_file_path=""):
    return hear_ssam.load_model(model_file_path, pretrained=False)
"""


def validate(name: str, tools: Path, folder: Path) -> None:
    """The unmodified hear-validator, which can pass a name to load_model but no options."""
    (folder / "random_weights.py").write_text(WITHOUT_WEIGHTS)
    module = "hear_ssam" if name == "logmel" else "random_weights"
    out = call(tools / "python", "-m", "hear_ssam", "heareval", "validator", module, "-m", name, cwd=folder)
    assert "Looks good!" in out


@pytest.mark.tools
@pytest.mark.parametrize("name", ["logmel", *(f"{system}_tiny" for system in SYSTEMS)])
def test_hear_validator(name: str, tools_bin: Path, tmp_path: Path) -> None:
    validate(name, tools_bin, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith("tiny")])
def test_hear_validator_on_larger_models(name: str, tools_bin: Path, tmp_path: Path) -> None:
    validate(name, tools_bin, tmp_path)


# ------------------------------------------------------------------------------------------------ the official numbers

COPIES = ("ssam", "ssast", "axlstm")
EVERY_COPY = pytest.mark.parametrize("system", COPIES)


@functools.cache
def numbers(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "golden" / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small models as their repositories would save them."""
    folder, files = tmp_path_factory.mktemp("official"), {}
    for system in COPIES:
        stored = numbers(system)
        shapes = [json.loads(shape) for shape in stored["shapes"]]
        parts = torch.from_numpy(stored["weights"]).split([int(np.prod(shape)) for shape in shapes])
        names = stored["names"].tolist()
        state = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        state["pos_embed"] = torch.from_numpy(numbers("inputs")["pos_embed"])
        files[system] = folder / f"{system}.pth"
        torch.save({"model": state, "optimizer": {}, "epoch": 99, "scaler": {}, "args": None}, files[system])
    return files


@EVERY_COPY
def test_embeddings_of_the_official_classes(system: str, official: dict[str, Path]) -> None:
    model, expected = load_model(official[system], token_order="official"), numbers(system)
    wave = torch.from_numpy(numbers("inputs")["wave"])
    for seconds, keep in (("0.7s", 4), ("2.5s", 10)):
        audio = wave[:, : round(float(seconds[:-1]) * SECOND)]
        rows, times = get_timestamp_embeddings(audio, model)
        assert_close(rows[0, ::keep], expected[f"rows_{seconds}"])
        assert_close(get_scene_embeddings(audio, model)[0], expected[f"scene_{seconds}"])
        assert_close(times[0], expected[f"times_{seconds}"], tolerance=1e-3)


@EVERY_COPY
@torch.no_grad()
def test_masked_pass_of_the_official_classes(system: str, official: dict[str, Path]) -> None:
    model, expected = load_model(official[system]), numbers(system)
    assert isinstance(model, EncoderModel)
    unit = standardize(LogMel()(torch.from_numpy(numbers("inputs")["wave"])))[:, :200]
    mask = torch.from_numpy(numbers("inputs")["mask"])
    assert_close(model.encoder.tokens(unit)[0, ::10], expected["tokens"])
    assert_close(predictions(model.encoder, unit, mask)[0, ::10], expected["predictions"])
    assert losses(model.encoder, unit, mask)["total"].item() == pytest.approx(expected["loss"].item(), abs=1e-5)


@EVERY_COPY
def test_a_converted_official_file_gives_the_same_bits(system: str, official: dict[str, Path], tmp_path: Path) -> None:
    convert(official[system], tmp_path / "ours.safetensors")
    before, after = load_model(official[system]), load_model(tmp_path / "ours.safetensors")
    assert after.config is not None and after.config.token_order == "official"
    audio = noise(2, 2.5)
    assert get_scene_embeddings(audio, before).equal(get_scene_embeddings(audio, after))
    assert get_timestamp_embeddings(audio, before)[0].equal(get_timestamp_embeddings(audio, after)[0])


@torch.no_grad()
def test_masked_patches_without_a_place(official: dict[str, Path]) -> None:
    """As released, SSAST predicts the same for every masked patch of a clip; with positions after the mask it does not.

    The state dict is the same and so is every token without a mask.
    """
    as_released = load_model(official["ssast"])
    assert isinstance(as_released, EncoderModel) and as_released.config.mask_position == "before"
    ours = Encoder(dataclasses.replace(as_released.config, mask_position="after"))
    ours.load_state_dict(as_released.encoder.state_dict())
    unit = standardize(LogMel()(torch.from_numpy(numbers("inputs")["wave"])))[:, :200]
    mask = torch.from_numpy(numbers("inputs")["mask"])
    assert ours.tokens(unit).equal(as_released.encoder.tokens(unit))

    def spread(pixels: Tensor) -> float:
        return (pixels.amax(0) - pixels.amin(0)).max().item()

    theirs = torch.from_numpy(numbers("ssast")["predictions"])
    assert spread(theirs[mask[0, ::10]]) <= 1e-6 < 1e-2 < spread(theirs[~mask[0, ::10]])
    assert spread(predictions(as_released.encoder, unit, mask)[mask]) <= 1e-6
    assert spread(predictions(ours, unit, mask)[mask]) > 1e-2


@torch.no_grad()
def test_ssamba_from_its_formulas() -> None:
    """Written out once more, plainly: flipped copies, two residual streams, a loop over time, Conv2d patches."""
    config = build_config("ssamba", 32, depth=4, window_frames=96)
    torch.manual_seed(0)
    encoder = Encoder(config)
    for parameter in encoder.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    w = encoder.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def direction(xz: Tensor, name: str) -> Tensor:
        x, z = xz.chunk(2, dim=-1)
        kernel, bias = w[f"{name}.conv.weight"][:, None], w[f"{name}.conv.bias"]
        x = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), kernel, bias, groups=64)).mT
        low, b, c = (x @ w[f"{name}.x_proj.weight"].T).split((2, 16, 16), dim=-1)
        step = F.softplus(low @ w[f"{name}.dt_proj.weight"].T + w[f"{name}.dt_proj.bias"])
        decay = torch.exp(step[..., None] * -torch.exp(w[f"{name}.A_log"]))  # (B, L, I, N)
        state, outputs = torch.zeros(len(x), 64, 16), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + (step * x)[:, t, :, None] * b[:, t, None]
            outputs.append((state * c[:, t, None]).sum(-1) + w[f"{name}.D"] * x[:, t])
        return torch.stack(outputs, dim=1) * F.silu(z)

    def mixer(x: Tensor, layer: int) -> Tensor:
        name = f"blocks.{layer}.mixer"
        xz = norm(x, f"blocks.{layer}.norm") @ w[f"{name}.in_proj.weight"].T
        both = direction(xz, f"{name}.forward_") + direction(xz.flip(1), f"{name}.backward_").flip(1)
        return both / 2 @ w[f"{name}.out_proj.weight"].T

    spec = torch.randn(2, 96, 128)
    kernel = w["patch_embed.weight"].view(32, 1, 16, 16)
    h = F.conv2d(spec.mT[:, None], kernel, w["patch_embed.bias"], stride=16).flatten(2).mT  # band-major
    h = torch.cat([w["cls_token"].expand(2, -1, -1), h], dim=1) + w["pos_embed"]
    residual = torch.zeros_like(h)
    for pair in (0, 2):
        forward, backward = residual + h, (residual + h).flip(1)
        h = mixer(forward, pair) + mixer(backward, pair + 1).flip(1)
        residual = forward + backward.flip(1)
    assert_close(encoder.tokens(spec), norm(norm(residual + h, "norm"), "norm"))
