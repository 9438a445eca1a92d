"""The one encoder: all systems and sizes, properties, and the outputs of the official classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hear_ssam.config import CONFIGS, SYSTEMS, EncoderConfig, build_config
from hear_ssam.encoder import Encoder, resize_positions, sincos_positions
from hear_ssam.errors import HearSsamError
from hear_ssam.pretraining.windows import random_mask

from .masked import losses, predictions

EVERY_SYSTEM = pytest.mark.parametrize("system", SYSTEMS)


def mini(system: str, **overrides: Any) -> EncoderConfig:
    """A small config: two layers of width 48 (SSAMBA two pairs), windows of 8 time slots."""
    sizes: dict[str, Any] = {"depth": 4 if system == "ssamba" else 2}
    sizes["window_frames"] = 8 * (16 if system == "ssamba" else 4)
    return build_config(system, 48, **{**sizes, **overrides})


def build(config: EncoderConfig) -> Encoder:
    """An encoder whose parameters are all off their initial values, so that none hides behind a zero or a one."""
    torch.manual_seed(0)
    encoder = Encoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return encoder


def spectrogram(config: EncoderConfig, batch: int, slots: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, slots * config.patch_frames, config.n_mels, generator=torch.Generator().manual_seed(seed))


def mask_for(config: EncoderConfig, batch: int, seed: int = 2) -> Tensor:
    return random_mask(batch, config, torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize(("system", "block"), [("ssam", 1), ("axlstm", 1), ("ssamba", 2)])
@torch.no_grad()
def test_the_readout_block_gives_the_embeddings_and_what_follows_does_not_matter(system: str, block: int) -> None:
    encoder = build(mini(system, readout_block=block))
    spec = spectrogram(encoder.config, 2, 8)
    (found,), (asked,), (last,) = (encoder.hidden(spec, layers) for layers in (None, [block], [len(encoder.blocks)]))
    assert torch.equal(found, asked) and torch.equal(last, encoder.tokens(spec)) and not torch.allclose(found, last)
    for parameter in encoder.blocks[block:].parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(encoder.hidden(spec)[0], found)
    assert EncoderConfig.from_dict(encoder.config.to_dict()).readout_block == block


@pytest.mark.parametrize(("system", "block"), [("ssam", 3), ("ssam", -1), ("ssamba", 3)])
def test_a_readout_block_that_is_not_there(system: str, block: int) -> None:
    with pytest.raises(HearSsamError, match=f"config field readout_block={block} is none of"):
        mini(system, readout_block=block)


@torch.no_grad()
def test_ssamba_as_its_rmsnorm_users_run_it() -> None:
    encoder = build(mini("ssamba", norm="rmsnorm", paired=False))
    assert not any("norm.bias" in name for name in encoder.state_dict())
    spec = spectrogram(encoder.config, 1, 8)
    x = torch.cat([encoder.cls_token + encoder.pos_embed[:, :1], encoder.embed(spec)], dim=1)
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(encoder.tokens(spec), encoder.norm(encoder.norm(x)))


@pytest.mark.parametrize(
    ("field", "system", "wrong"),
    [
        ("system", "ssam", {"system": "ssan"}),
        ("embed_dim", "ssam", {"embed_dim": 46}),
        ("depth", "ssam", {"depth": 0}),
        ("patch_mels", "ssam", {"patch_mels": 7}),
        ("patch_frames", "ssamba", {"patch_frames": 15}),
        ("num_heads", "ssam", {"num_heads": 3}),
        ("num_heads", "ssast", {"num_heads": 5}),
        ("paired", "ssam", {"paired": True}),
        ("paired", "ssamba", {"depth": 3}),
        ("flip_odd", "ssast", {"flip_odd": True}),
        ("mask_ratio", "ssam", {"mask_ratio": 1.0}),
        ("block", "ssam", {"block": "bimamba"}),
        ("embed_dim", "axlstm", {"embed_dim": 46, "num_heads": 2, "positions": "learned"}),
        ("embed_dim", "ssam", {"embed_dim": "48"}),
        ("depth", "ssam", {"depth": 2.0}),
        ("paired", "ssamba", {"paired": 1}),
        ("norm_eps", "ssam", {"norm_eps": 0.0}),
        ("fbank_std", "ssamba", {"fbank_std": float("nan")}),
    ],
)
def test_contradictory_configs_name_the_field(field: str, system: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(HearSsamError, match=field):
        dataclasses.replace(mini(system), **wrong)


def test_new_weights_are_drawn_as_in_the_papers() -> None:
    torch.manual_seed(0)
    ssam, ssast, ssamba = (Encoder(CONFIGS[f"{name}_tiny"]) for name in ("ssam", "ssast", "ssamba"))
    for encoder in (ssam, ssast):
        assert encoder.patch_embed.weight.abs().max() <= (6 / (64 + 192)) ** 0.5
        assert abs(encoder.mask_token.std().item() - 0.02) < 0.005
    for layer in (m for m in ssast.modules() if isinstance(m, torch.nn.Linear)):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    assert abs(ssamba.mask_token.std().item() - 192**-0.5) < 0.015
    assert abs(ssamba.pos_embed.std().item() - 0.02) < 0.002


@EVERY_SYSTEM
def test_configs_survive_a_file(system: str) -> None:
    config = CONFIGS[f"{system}_tiny"]
    assert EncoderConfig.from_dict(config.to_dict()) == config
    with pytest.raises(HearSsamError, match="embed_dim"):
        EncoderConfig.from_dict({**config.to_dict(), "embed_dims": 3})
    with pytest.raises(HearSsamError, match="depth"):
        EncoderConfig.from_dict({key: value for key, value in config.to_dict().items() if key != "depth"})


# ------------------------------------------------------------------------------------------------ properties


@EVERY_SYSTEM
def test_gradients_reach_every_trainable_parameter(system: str) -> None:
    encoder = build(mini(system))
    spec = spectrogram(encoder.config, 2, 8)
    losses(encoder, spec, mask_for(encoder.config, 2))["total"].backward()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None


@EVERY_SYSTEM
def test_a_few_steps_lower_the_loss(system: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(mini(system))
    spec, mask = spectrogram(encoder.config, 2, 8), mask_for(encoder.config, 2)
    optimizer = torch.optim.AdamW((p for p in encoder.parameters() if p.requires_grad), lr=3e-3)
    course = []
    for _ in range(15):
        loss = losses(encoder, spec, mask)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    assert course[-1] < 0.9 * course[0]


@EVERY_SYSTEM
@torch.no_grad()
def test_shorter_windows_stand_at_the_first_time_slots(system: str) -> None:
    encoder = build(mini(system))
    spec = spectrogram(encoder.config, 1, 8)
    bands, frames = encoder.config.grid[1], 3 * encoder.config.patch_frames
    shape = (8, bands) if encoder.config.patch_order == "time" else (bands, 8)
    whole = encoder.embed(spec).unflatten(1, shape)
    first = whole[:, :3] if encoder.config.patch_order == "time" else whole[:, :, :3]
    torch.testing.assert_close(encoder.embed(spec[:, :frames]), first.flatten(1, 2))


@torch.no_grad()
def test_ssam_tokens_depend_on_the_past_only() -> None:
    encoder = build(mini("ssam"))
    spec = spectrogram(encoder.config, 2, 8)
    whole = encoder.tokens(spec)
    prefix = encoder.tokens(spec[:, :12])  # 3 of 8 slots: no padded token is ever computed
    torch.testing.assert_close(prefix, whole[:, : 1 + 3 * 5], atol=1e-5, rtol=1e-5)
    padded = torch.cat([spec[:, :12], torch.zeros(2, 20, 80)], dim=1)
    torch.testing.assert_close(prefix, encoder.tokens(padded)[:, : 1 + 3 * 5], atol=1e-5, rtol=1e-5)


@EVERY_SYSTEM
@torch.no_grad()
def test_bf16_stays_near_float32(system: str) -> None:
    encoder = build(mini(system))
    spec = spectrogram(encoder.config, 2, 8)
    full = encoder.tokens(spec)
    half = encoder.set_precision("bf16").tokens(spec)
    assert half.dtype == torch.float32 and not half.equal(full)
    assert (half - full).norm() / full.norm() < 0.02
    assert encoder.set_precision("fp32").tokens(spec).equal(full)
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    for weight in encoder.blocks.parameters():
        weight.data.mul_(1.2)  # which torch does not count as a change
    half, full = (encoder.set_precision(precision).tokens(spec) for precision in ("bf16", "fp32"))
    assert (half - full).norm() / full.norm() < 0.02


@EVERY_SYSTEM
def test_training_under_autocast(system: str) -> None:
    encoder = build(mini(system))
    spec, mask = spectrogram(encoder.config, 2, 8), mask_for(encoder.config, 2)
    expected = losses(encoder, spec, mask)["total"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses(encoder, spec, mask)["total"]
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() / expected.item() - 1) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------ patches and positions


def test_patches_are_numbered_as_published() -> None:
    for system in ("ssam", "ssamba"):
        encoder = Encoder(mini(system, depth=2))
        c = encoder.config
        spec = torch.arange(8.0 * c.patch_frames * c.n_mels).view(1, -1, c.n_mels)
        patches = encoder.patchify(spec)
        slot, band, frame, mel = 5, 3, 2, 7
        value = spec[0, slot * c.patch_frames + frame, band * 16 + mel]
        if system == "ssam":
            assert patches[0, 5 * slot + band, 16 * frame + mel] == value
        else:
            assert patches[0, 8 * band + slot, 16 * mel + frame] == value


def test_sincos_positions_encode_band_then_slot() -> None:
    config = CONFIGS["ssam_tiny"]
    positions = sincos_positions(config)
    assert positions.shape == (1, 251, 192) and positions[0, 0].eq(0).all()
    grid = positions[0, 1:].view(50, 5, 192)
    assert grid[:, :, :96].eq(grid[:1, :, :96]).all() and grid[:, :, 96:].eq(grid[:, :1, 96:]).all()
    angle = torch.arange(5)[:, None] / 10000 ** (torch.arange(48) / 48)
    torch.testing.assert_close(grid[0, :, :96], torch.cat([angle.sin(), angle.cos()], 1), atol=4e-6, rtol=0)
    angle = torch.arange(50)[:, None] / 10000 ** (torch.arange(48) / 48)
    torch.testing.assert_close(grid[:, 0, 96:], torch.cat([angle.sin(), angle.cos()], 1), atol=4e-6, rtol=0)


def test_resized_positions_crop_the_centre_and_interpolate() -> None:
    config = mini("ssamba")  # 8 slots x 8 bands
    ramp = torch.arange(8.0).expand(8, 8).reshape(1, 64, 1).expand(-1, -1, 48)  # the slot's number
    positions = torch.cat([torch.full((1, 1, 48), -1.0), ramp], 1)
    assert resize_positions(positions, config, 8).equal(positions)
    assert resize_positions(positions, config, 4)[0, 1:5, 0].tolist() == [2.0, 3.0, 4.0, 5.0]
    longer = resize_positions(positions, config, 16)
    assert longer.shape == (1, 1 + 8 * 16, 48) and longer[0, 0].eq(-1).all()
    expected = torch.cat([torch.tensor([0.0]), torch.arange(0.25, 7, 0.5), torch.tensor([7.0])])
    torch.testing.assert_close(longer[0, 1:17, 0], expected)

    time_first = dataclasses.replace(config, patch_order="time")
    transposed = torch.cat([positions[:, :1], ramp.view(1, 8, 8, 48).transpose(1, 2).flatten(1, 2)], 1)
    cropped = resize_positions(transposed, time_first, 4)[0, 1:].view(4, 8, 48)
    assert cropped[:, 3, 0].tolist() == [2.0, 3.0, 4.0, 5.0]


def test_wrong_input_is_named() -> None:
    encoder = Encoder(mini("ssam"))
    spec = spectrogram(encoder.config, 1, 8)
    for wrong in (spec[0], spec[:, :30], spec[:, :0], spec[:, :, :79]):
        with pytest.raises(HearSsamError, match="spec must have the shape"):
            encoder.tokens(wrong)
    with pytest.raises(HearSsamError, match="8 time slots"):
        encoder.tokens(spectrogram(encoder.config, 1, 9))
    with pytest.raises(HearSsamError, match="mask must be a bool"):
        encoder.tokens(spec, torch.ones(1, 40))
    with pytest.raises(HearSsamError, match="mask must be a bool"):
        encoder.tokens(spec, torch.ones(1, 39, dtype=torch.bool))
    with pytest.raises(HearSsamError, match="bf16"):
        encoder.set_precision("bf17")


# ------------------------------------------------------------------------------------------------ masks and objectives


@pytest.mark.parametrize("name", ["ssam_tiny", "ssamba_tiny"])
def test_masks_hide_the_exact_share(name: str) -> None:
    config = CONFIGS[name]
    mask = mask_for(config, 64)
    assert mask.shape == (64, config.num_patches)
    assert mask.sum(1).eq(125 if name == "ssam_tiny" else 400).all()
    assert mask.equal(mask_for(config, 64)) and not mask.equal(mask_for(config, 64, seed=3))
    assert not mask[0].equal(mask[1])
    rate = mask.float().mean(0)
    rest = rate[0 if name == "ssam_tiny" else 200 :]  # cluster corners never lie before patch 0: fewer at the start
    assert (rest - config.mask_ratio).abs().max() < 0.3


def test_ssamba_hides_square_clusters() -> None:
    config = build_config("ssamba", 48, mask_ratio=9 / 512)  # a whole cluster of side 3, a part of a larger one
    sides = []
    for seed in range(40):
        mask = mask_for(config, 1, seed)
        assert not mask[0, 0] and mask.sum() == 9
        hidden = set(mask[0].nonzero()[:, 0].tolist())
        corner = min(hidden)
        squares = {s: {corner + 64 * i + j for i in range(s) for j in range(s)} for s in (3, 4, 5)}
        sides += [side for side, square in squares.items() if hidden <= square][:1]
    assert len(sides) > 20  # in the highest bands a cluster is cut, and a second one has to help
    assert set(sides) == {3, 4, 5}


def test_official_masking_blinds_a_transformer() -> None:
    """Masked tokens without positions are interchangeable for attention: one prediction for all of them."""
    spread = {}
    for position in ("before", "after"):
        encoder = build(mini("ssast", mask_position=position))
        spec, mask = spectrogram(encoder.config, 2, 8), mask_for(encoder.config, 2)
        with torch.no_grad():
            clips = zip(predictions(encoder, spec, mask), mask, strict=True)
        spread[position] = max((p[m].amax(0) - p[m].amin(0)).max().item() for p, m in clips)
    assert spread["before"] <= 1e-6
    assert spread["after"] > 1e-2


@EVERY_SYSTEM
@torch.no_grad()
def test_hidden_patches_do_not_leak(system: str) -> None:
    encoder = build(mini(system))
    spec, mask = spectrogram(encoder.config, 1, 8), mask_for(encoder.config, 1)
    other = encoder.tokens(torch.where(pixels(encoder, mask), 5.0, spec), mask)
    assert other.equal(encoder.tokens(spec, mask))


def pixels(encoder: Encoder, mask: Tensor) -> Tensor:
    """Which values of a spectrogram (1, F, mels) the hidden patches hold."""
    c = encoder.config
    where = torch.arange(c.window_frames * c.n_mels).view(1, c.window_frames, c.n_mels)
    hidden = torch.zeros(where.numel(), dtype=torch.bool)
    hidden[encoder.patchify(where)[mask].flatten()] = True
    return hidden.view(where.shape)


# ------------------------------------------------------------------------------------------------ the official classes


def official(golden: Path, system: str) -> Encoder:
    from hear_ssam.checkpoint import load_checkpoint

    config, state, _ = load_checkpoint(golden / f"{system}_mini_official.pth")
    encoder = Encoder(config)
    encoder.load_state_dict(state)
    return encoder


@pytest.mark.parametrize("system", ["ssam", "ssast", "axlstm"])
@torch.no_grad()
def test_golden_tokens_and_masked_pass(golden: Path, system: str) -> None:
    encoder = official(golden, system)
    with np.load(golden / f"{system}_mini.npz") as file:
        spec = torch.from_numpy(file["unit_logmel"][:, 0])
        np.testing.assert_allclose(encoder.tokens(spec), file["unit_encoder_tokens"], atol=1e-5, rtol=0)
        mask = torch.from_numpy(file["unit_mask"]).bool()
        np.testing.assert_array_equal(encoder.patchify(spec), file["unit_targets"])
        np.testing.assert_allclose(predictions(encoder, spec, mask), file["unit_pred_masked"], atol=1e-5, rtol=0)
        assert losses(encoder, spec, mask)["total"].item() == pytest.approx(file["unit_loss"].item(), abs=1e-5)
    torch.testing.assert_close(sincos_positions(encoder.config), encoder.pos_embed, atol=4e-6, rtol=0)


@pytest.mark.parametrize("window", ["10s_T1024", "3s_T512"])
@torch.no_grad()
def test_golden_ssamba(golden: Path, window: str) -> None:
    encoder = official(golden, "ssamba")
    with np.load(golden / "ssamba_mini.npz") as file:
        spec = torch.from_numpy(file[f"input_{window}"])[None]
        slots = spec.shape[1] // 16
        positions = resize_positions(encoder.pos_embed, encoder.config, slots)
        np.testing.assert_allclose(positions, file[f"pos_embed_{window}"], atol=1e-6, rtol=0)
        resized = Encoder(dataclasses.replace(encoder.config, window_frames=spec.shape[1]))
        resized.load_state_dict({**encoder.state_dict(), "pos_embed": positions})
        tokens = resized.tokens(spec)
        np.testing.assert_allclose(tokens[:, 1:].mean(1), file[f"avgtok_{window}"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(tokens[:, 0], file[f"cls_{window}"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_golden_ssamba_objective(golden: Path) -> None:
    encoder = official(golden, "ssamba")
    with np.load(golden / "ssamba_mini.npz") as file:
        mask = torch.zeros(1, 512, dtype=torch.bool)
        mask[0, torch.from_numpy(file["mask_ids_seed5"])] = True
        nce, mse, total = losses(encoder, torch.from_numpy(file["input_10s_T1024"])[None], mask).values()
        assert nce.item() == pytest.approx(file["mpc_nce"].item(), abs=1e-5)
        assert mse.item() == pytest.approx(file["mpg_mse"].item(), abs=1e-5)
        assert total.item() == pytest.approx(nce.item() + 10 * mse.item(), abs=1e-4)
