"""The four blocks: direction, precision, and every fast form against its readable one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hear_ssam import blocks
from hear_ssam.blocks import BLOCKS, Projection, mlstm_chunked, mlstm_parallel
from hear_ssam.config import EncoderConfig, build_config

CONFIGS = {
    "mamba": build_config("ssam", 48),
    "bimamba": build_config("ssamba", 48),
    "transformer": build_config("ssast", 48, num_heads=3),
    "mlstm": build_config("axlstm", 48),
}
EVERY_BLOCK = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def build(config: EncoderConfig) -> nn.Module:
    """A block whose parameters are all off their initial values, so that none hides behind a zero or a one."""
    torch.manual_seed(0)
    block = BLOCKS[config.block](config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return block


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 48, generator=torch.Generator().manual_seed(seed))


@EVERY_BLOCK
@torch.no_grad()
def test_reading_backwards_is_reading_the_flipped_sequence(config: EncoderConfig) -> None:
    block, x = build(config), tokens(2, 19)
    torch.testing.assert_close(block(x, reverse=True), block(x.flip(1)).flip(1), atol=1e-5, rtol=1e-5)
    if config.block != "transformer":
        assert (block(x, reverse=True) - block(x)).abs().max() > 1e-3


@EVERY_BLOCK
@torch.no_grad()
def test_what_a_token_can_see(config: EncoderConfig) -> None:
    block, x = build(config), tokens(1, 20)
    changed = x.clone()
    changed[:, 10] = tokens(1, 1, seed=2)[:, 0]
    touched = (block(changed) - block(x)).abs().amax(2)[0] > 1e-5
    assert touched[10:].any()
    assert touched[:10].any() == (config.block in ("bimamba", "transformer"))


def test_mamba_starts_where_the_paper_starts() -> None:
    torch.manual_seed(0)
    mixer = blocks.Mamba(CONFIGS["mamba"])
    step = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.99 <= step.min() and step.max() <= 1e-1 * 1.01
    assert step.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.3)
    torch.testing.assert_close(torch.exp(mixer.A_log), torch.arange(1.0, 25).expand(144, 24))
    assert mixer.D.eq(1).all() and 0.95 * 3**-0.5 < mixer.dt_proj.weight.abs().max() <= 3**-0.5
    assert mixer.out_proj.weight.abs().max() <= (144 * 12) ** -0.5
    for drawn in (mixer.conv.weight, mixer.conv.bias):  # uniform within ±1/√4, four taps
        assert -0.5 <= drawn.min() < -0.4 and 0.4 < drawn.max() <= 0.5


def test_mlstm_starts_where_the_paper_starts() -> None:
    torch.manual_seed(0)
    layer = blocks.MLSTM(CONFIGS["mlstm"])
    assert layer.fgate.bias.tolist() == [3, 4, 5, 6]
    assert not layer.fgate.weight.any() and not layer.igate.weight.any() and layer.igate.bias.abs().max() < 0.5
    assert layer.learnable_skip.eq(1).all() and not layer.outnorm.weight.any()
    for weight, std in (
        (layer.proj_up.weight, (2 / (5 * 48)) ** 0.5),
        (layer.q_proj.weight, (2 / (5 * 48)) ** 0.5),
        (layer.proj_down.weight, 2 / 48**0.5),
    ):
        assert abs(weight.std().item() / std - 1) < 0.1


@pytest.mark.parametrize("how", ["autocast", "bf16"])
def test_steps_and_states_stay_float32(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.dtype] = {}
    scan = blocks.selective_scan

    def spy(u: Tensor, delta: Tensor, A: Tensor, *rest: Any, **options: Any) -> Any:
        y, last = scan(u, delta, A, *rest, **options, return_last_state=True)
        seen.update(u=u.dtype, delta=delta.dtype, A=A.dtype, state=last.dtype, y=y.dtype)
        return y

    monkeypatch.setattr(blocks, "selective_scan", spy)
    block = build(CONFIGS["mamba"])
    for module in block.modules():
        if isinstance(module, Projection):
            module.bf16 = how == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = block(tokens(2, 9))
    assert out.dtype == torch.float32
    half, full = torch.bfloat16, torch.float32
    assert seen == {"u": half, "delta": full, "A": full, "state": full, "y": half}


def test_rounded_weights_follow_the_weights() -> None:
    layer, x = Projection(8, 4), torch.randn(3, 8)
    layer.bf16 = True
    with torch.no_grad():
        before = layer(x)
        assert layer(x).equal(before)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.load_state_dict({"weight": torch.zeros(4, 8), "bias": torch.ones(4)})
        assert layer(x).eq(1).all()
        for value in (2.0, 3.0):  # new parameters may reuse the memory of the old ones
            layer.load_state_dict({"weight": torch.zeros(4, 8), "bias": torch.full((4,), value)}, assign=True)
            assert layer(x).eq(value).all()
    layer(x).float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    for change in (torch.optim.SGD(layer.parameters(), 1.0, fused=True).step, lambda: layer.weight.data.mul_(2)):
        before = layer.weight.clone()
        with torch.no_grad():
            layer(x)
            change()  # which no version of the weight counts
            found = layer(x)
        torch.testing.assert_close(found, layer(x))  # which keeps nothing
        assert not layer.weight.equal(before)


def mlstm_recurrent(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """Beck et al. 2024, equations 19-27, one token at a time."""
    batch, heads, length, d = q.shape
    memory, keys, m = q.new_zeros(batch, heads, d, d), q.new_zeros(batch, heads, d), q.new_full((batch, heads), -1e30)
    outputs = []
    for t in range(length):
        log_f = F.logsigmoid(f[:, :, t])
        m_new = torch.maximum(log_f + m, i[:, :, t])
        keep, add, m = torch.exp(log_f + m - m_new), torch.exp(i[:, :, t] - m_new), m_new
        key, value = k[:, :, t] / math.sqrt(d), v[:, :, t]
        memory = keep[..., None, None] * memory + add[..., None, None] * key[..., :, None] * value[..., None, :]
        keys = keep[..., None] * keys + add[..., None] * key
        query = q[:, :, t]
        norm = torch.maximum((keys * query).sum(-1).abs(), torch.exp(-m))
        outputs.append((query[..., None, :] @ memory)[..., 0, :] / (norm[..., None] + 1e-6))
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("length", [1, 7, 64, 65, 150])
def test_mlstm_forms_are_equal_with_their_gradients(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 2, 3, length, 8, generator=generator, dtype=torch.float64)
    i, f = 3 * torch.randn(2, 2, 3, length, generator=generator, dtype=torch.float64)
    upstream = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    results = []
    for form in (mlstm_recurrent, mlstm_parallel, mlstm_chunked, lambda *x: mlstm_chunked(*x, chunk=5)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v, i, f)]
        out = form(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
    for other in results[1:]:
        for ours, exact in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, exact, atol=1e-8, rtol=1e-8)


@torch.no_grad()
def test_long_mlstm_sequences_take_the_linear_form(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = build(CONFIGS["mlstm"]), tokens(1, 70)
    quadratic = block(x)
    monkeypatch.setattr(blocks.MLSTM, "PARALLEL_UP_TO", 69)
    monkeypatch.setattr(blocks, "mlstm_parallel", None)
    torch.testing.assert_close(block(x), quadratic, atol=1e-4, rtol=1e-4)
