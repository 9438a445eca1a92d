"""The four blocks. Each maps tokens (B, L, D) to tokens (B, L, D), residual included, and can read backwards.

MambaBlock        x + Mamba(norm(x))                          Gu & Dao 2023 (arXiv 2312.00752)
  of BiMamba      the same with scans in both directions      Zhu et al. 2024 (arXiv 2401.09417), "v2"
TransformerBlock  x + attention(norm(x)), then x + MLP(norm(x))
MLSTMBlock        x + mLSTM(norm(x))                          Beck et al. 2024, Alkin et al. 2024 (arXiv 2406.04303)

Symbols: B batch, L tokens, D width of the model, I inner width of a mixer, N state size, R rank of delta, K kernel.
Tensors are channel-last throughout; nothing of size L x I x N is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import EncoderConfig
from .scan import causal_conv1d, selective_scan


class Projection(nn.Linear):
    """A linear layer that can run in bfloat16 (`bf16 = True`) while its weights stay float32.

    On a CPU, and without gradients, the rounded weights are kept from call to call, until the weights change.
    """

    bf16 = False
    _kept: tuple[Tensor, int, Tensor, Tensor] | None = None  # the weight, its version, some of it, what it rounds to

    def forward(self, x: Tensor) -> Tensor:
        if not self.bf16:
            return super().forward(x)
        return F.linear(x.bfloat16(), self._rounded_weight(), None if self.bias is None else self.bias.bfloat16())

    def _rounded_weight(self) -> Tensor:
        weight, kept = self.weight, self._kept
        passing = torch.is_grad_enabled() or weight.is_inference() or torch.compiler.is_compiling()
        if passing or weight.device.type != "cpu":
            return weight.bfloat16()
        some = weight.flatten()[:: 1 + weight.numel() // 64]  # no version counts fused optimisers and `.data`
        if kept is None or kept[0] is not weight or kept[1] != weight._version or not torch.equal(kept[2], some):
            self._kept = kept = weight, weight._version, some.clone(), weight.bfloat16()
        return kept[3]


def build_norm(config: EncoderConfig) -> nn.Module:
    """LayerNorm (weight and bias) or RMSNorm (weight only) over D."""
    norm = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return norm(config.embed_dim, eps=config.norm_eps)


def xavier_init(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer in `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------------------------------------------------- Mamba


class CausalConv(nn.Module):
    """Depthwise causal convolution followed by SiLU; weight (I, K), bias (I)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        bound = kernel**-0.5  # torch's default for a convolution with one input channel per group
        self.weight = nn.Parameter(torch.empty(width, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        return cast(Tensor, causal_conv1d(x, self.weight, self.bias, reverse=reverse))


class SelectiveSSM(nn.Module):
    """Convolution, input-dependent step, B and C, selective scan and gate: one direction of a Mamba mixer.

    The state space model always runs in float32: step size, transition and state, whatever the projections use.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        inner, state, rank = config.inner_dim, config.state_dim, config.dt_rank
        self.split = (rank, state, state)
        self.conv = CausalConv(inner, config.conv_kernel)
        self.x_proj = Projection(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():  # steps log-uniform in [0.001, 0.1]; the bias is their inverse softplus
            step = torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.A_log = nn.Parameter(torch.arange(1, state + 1, dtype=torch.float32).log().repeat(inner, 1))  # (I, N)
        self.D = nn.Parameter(torch.ones(inner))

    def forward(self, xz: Tensor, reverse: bool = False) -> Tensor:
        x, z = xz.chunk(2, dim=-1)  # (B, L, I) each, views
        x = self.conv(x, reverse)
        low, b, c = self.x_proj(x).split(self.split, dim=-1)  # (B, L, R), (B, L, N), (B, L, N)
        with torch.autocast(xz.device.type, enabled=False):
            weight, bias, A = self.dt_proj.weight, self.dt_proj.bias, -torch.exp(self.A_log)
            delta = F.linear(low.to(weight.dtype), weight)  # (B, L, I); bias and softplus happen inside the scan
            return cast(Tensor, selective_scan(x, delta, A, b, c, self.D, z, bias, True, reverse=reverse))


class Mamba(SelectiveSSM):
    """The Mamba-1 mixer: project to [x | z], one causal direction, project back."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.in_proj, self.out_proj = _in_out(config)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        return cast(Tensor, self.out_proj(super().forward(self.in_proj(x), reverse)))


class BiMamba(nn.Module):
    """Both directions share the projections; each has its own convolution and state space model ("bimamba v2")."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.in_proj, self.out_proj = _in_out(config)
        self.forward_, self.backward_ = SelectiveSSM(config), SelectiveSSM(config)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        xz = self.in_proj(x)
        return cast(Tensor, self.out_proj((self.forward_(xz, reverse) + self.backward_(xz, not reverse)) / 2))


def _in_out(config: EncoderConfig) -> tuple[Projection, Projection]:
    """in_proj (2I, D) and out_proj (D, I), which starts small: depth residual branches add up."""
    in_proj = Projection(config.embed_dim, 2 * config.inner_dim, bias=False)
    out_proj = Projection(config.inner_dim, config.embed_dim, bias=False)
    with torch.no_grad():
        out_proj.weight /= math.sqrt(config.depth)
    return in_proj, out_proj


class MambaBlock(nn.Module):
    """x + Mamba(norm(x)), with `reverse` from the last token to the first; BiMamba's directions swap weights then."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.norm = build_norm(config)
        self.mixer = (BiMamba if config.block == "bimamba" else Mamba)(config)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        return x + cast(Tensor, self.mixer(self.norm(x), reverse))


# ---------------------------------------------------------------------------------------------------- Transformer


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = Projection(config.embed_dim, 3 * config.embed_dim)  # [q | k | v], each head-major
        self.proj = Projection(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, d) each
        return cast(Tensor, self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class TransformerBlock(nn.Module):
    """A pre-norm Transformer block. It has no direction: `reverse` changes nothing."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden = config.embed_dim * config.expand
        self.norm1 = build_norm(config)
        self.attn = Attention(config)
        self.norm2 = build_norm(config)
        self.mlp = nn.Sequential(Projection(config.embed_dim, hidden), nn.GELU(), Projection(hidden, config.embed_dim))
        xavier_init(self)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + cast(Tensor, self.mlp(self.norm2(x)))


# ---------------------------------------------------------------------------------------------------------- mLSTM


def mlstm_parallel(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """The mLSTM cell as one masked matrix product: O(L^2) time and memory, the readable form.

    q, k, v (B, heads, L, d); input and forget gates before activation i, f (B, heads, L) → (B, heads, L, d).
    Beck et al. 2024 (arXiv 2405.04517), appendix A.3: weight of token s in token t is
    exp(sum_{r=s+1..t} log sigmoid(f_r) + i_s - m_t), m_t the row's maximum.
    """
    decay = F.logsigmoid(f).cumsum(-1)
    log_weights = decay[..., :, None] - decay[..., None, :] + i[..., None, :]  # (B, heads, L, L)
    past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    log_weights = log_weights.masked_fill(~past, -math.inf)
    m = log_weights.amax(-1, keepdim=True)
    k = k * k.shape[-1] ** -0.5
    scores = (q @ k.transpose(-1, -2)) * torch.exp(log_weights - m)
    normalizer = torch.maximum(scores.sum(-1, keepdim=True).abs(), torch.exp(-m))
    return scores @ v / (normalizer + 1e-6)


def mlstm_chunked(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, chunk: int = 64) -> Tensor:
    """The same cell in O(L): chunks are parallel inside and pass on a matrix memory, its normaliser and scale."""
    k = k * k.shape[-1] ** -0.5
    memory = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])  # (B, heads, d, d): sum of k v'
    keys = q.new_zeros(*q.shape[:2], q.shape[3], 1)  # the same sum of k alone
    scale = q.new_full((*q.shape[:2], 1, 1), -math.inf)  # log of what both are divided by
    outputs = []
    for q_, k_, v_, i_, f_ in zip(*(x.split(chunk, dim=2) for x in (q, k, v, i, f)), strict=True):
        decay = F.logsigmoid(f_).cumsum(-1)[..., None]  # (B, heads, T, 1)
        gain = i_[..., None] - decay
        past = torch.ones(q_.shape[2], q_.shape[2], dtype=torch.bool, device=q.device).tril()
        log_weights = (decay + gain.transpose(-1, -2)).masked_fill(~past, -math.inf)  # (B, heads, T, T)
        m = torch.maximum(log_weights.amax(-1, keepdim=True), decay + scale)
        scores = (q_ @ k_.transpose(-1, -2)) * torch.exp(log_weights - m)
        q_before = q_ * torch.exp(decay + scale - m)
        normalizer = torch.maximum((scores.sum(-1, keepdim=True) + q_before @ keys).abs(), torch.exp(-m))
        outputs.append((scores @ v_ + q_before @ memory) / (normalizer + 1e-6))

        end = decay[..., -1:, :]
        new_scale = torch.maximum(end + scale, (end + gain).amax(2, keepdim=True))
        k_weighted = (k_ * torch.exp(end + gain - new_scale)).transpose(-1, -2)  # (B, heads, d, T)
        keep = torch.exp(end + scale - new_scale)
        memory = keep * memory + k_weighted @ v_
        keys = keep * keys + k_weighted.sum(-1, keepdim=True)
        scale = new_scale
    return torch.cat(outputs, dim=2)


class OffsetNorm(nn.Module):
    """LayerNorm over each of `groups` equal slices, no bias; a stored weight w scales by 1 + w."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.groups, -1))
        return F.layer_norm(x, x.shape[-1:], eps=1e-5).flatten(-2) * (1 + self.weight)


class BlockDiagonal(nn.Module):
    """A linear layer without bias whose matrix is block-diagonal: weight (width // 4, 4 out, 4 in)."""

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width // 4, 4, 4) * std)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("blgi,goi->blgo", x.unflatten(-1, (-1, 4)), self.weight.to(x.dtype)).flatten(-2)


class MLSTM(nn.Module):
    """The Vision-LSTM layer, version 1: up-projection, causal convolution, mLSTM cell, gate, down-projection."""

    PARALLEL_UP_TO = 512  # tokens; beyond that the O(L) form is faster

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, inner, self.heads = config.embed_dim, config.inner_dim, config.num_heads
        std = math.sqrt(2 / (5 * width))
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_up = Projection(width, 2 * inner, bias=False)
        self.q_proj, self.k_proj, self.v_proj = (BlockDiagonal(inner, std) for _ in range(3))
        self.conv = CausalConv(inner, config.conv_kernel)
        self.igate, self.fgate = (nn.Linear(3 * inner, self.heads) for _ in range(2))
        self.outnorm = OffsetNorm(inner, groups=self.heads)
        self.proj_down = Projection(inner, width, bias=False)
        nn.init.normal_(self.proj_up.weight, std=std)
        nn.init.normal_(self.proj_down.weight, std=2 / math.sqrt(width))
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3, 6, self.heads))

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.proj_up(x).chunk(2, dim=-1)  # (B, L, I) each
        conv = self.conv(x)
        with torch.autocast(x.device.type, enabled=False):  # gates and memory need float32
            dtype = self.igate.weight.dtype
            qkv = [self.q_proj(conv).to(dtype), self.k_proj(conv).to(dtype), self.v_proj(x).to(dtype)]
            gates_in = torch.cat(qkv, dim=-1)
            i, f = self.igate(gates_in).transpose(1, 2), self.fgate(gates_in).transpose(1, 2)  # (B, heads, L)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)  # (B, heads, L, d)
            cell = mlstm_parallel if x.shape[1] <= self.PARALLEL_UP_TO else mlstm_chunked
            h = self.outnorm(cell(q, k, v, i, f).transpose(1, 2).flatten(2))  # (B, L, I)
        return cast(Tensor, self.proj_down((h + self.learnable_skip * conv) * F.silu(z)))


class MLSTMBlock(nn.Module):
    """x + mLSTM(norm(x)), with `reverse` from the last token to the first."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.norm = OffsetNorm(config.embed_dim)
        self.layer = MLSTM(config)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        y: Tensor = self.norm(x)
        y = self.layer(y.flip(1)).flip(1) if reverse else self.layer(y)
        return x + y


BLOCKS: dict[str, Callable[[EncoderConfig], nn.Module]] = {
    "mamba": MambaBlock, "bimamba": MambaBlock, "transformer": TransformerBlock, "mlstm": MLSTMBlock,
}  # fmt: skip
