"""The one encoder: patches (+ positions, mask) → depth x block → norm → tokens → features or predictions.

Symbols: B batch, F frames, n patch tokens, D width, P pixels of a patch; T time slots and f bands of the patch grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .blocks import BLOCKS, Projection, build_norm, xavier_init
from .config import EncoderConfig
from .errors import HearSsamError, unknown_name
from .machine import keep_freed_memory


class _Float32(TorchFunctionMode):
    """Inside, this thread's new tensors are float32 where no dtype is given, whatever torch's default is."""

    MAKERS = torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.randn, torch.linspace

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in self.MAKERS and options.get("dtype") is None:
            options["dtype"] = torch.float32
        return func(*args, **options)


class Undrawn(TorchFunctionMode):
    """Inside, new weights are zeros instead of drawn ones: for encoders whose weights are replaced, or only counted.

    Drawing takes time, and on the meta device torch imports its compiler, which takes as long as torch itself.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func in (torch.Tensor.uniform_, torch.Tensor.normal_)
        if drawn or getattr(func, "__module__", "") == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            tensor.detach().zero_()  # trunc_normal_ draws until it likes what it sees
            return tensor
        return (torch.zeros if func is torch.randn else func)(*args, **(kwargs or {}))


class Encoder(nn.Module):
    """Spectrogram windows → tokens; holds the heads that pre-training predicts with (pretraining.learner).

    New weights are drawn as the papers' code draws them. SSAMBA's stochastic depth (0.1, training only) is left out.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        keep_freed_memory()
        dim, pixels = config.embed_dim, config.patch_dim
        with _Float32():
            self.patch_embed = nn.Linear(pixels, dim)
            xavier_init(self.patch_embed)
            self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
            self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
            if config.positions == "sincos":
                self.pos_embed = nn.Parameter(sincos_positions(config), requires_grad=False)
            else:
                positions = torch.empty(1, 1 + config.num_patches, dim)
                self.pos_embed = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))
            self.blocks = nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.depth))
            self.norm = build_norm(config)
            if config.whitening:
                self.whitening = Whitening(config)
            if config.objective == "reconstruction":
                self.head = _head(dim, nn.GELU(), pixels)
                if config.block == "transformer":
                    xavier_init(self.head)
            else:
                nn.init.xavier_normal_(self.mask_token)
                self.contrast, self.generate = (_head(dim, nn.ReLU(), pixels) for _ in range(2))

    def patchify(self, spec: Tensor) -> Tensor:
        """Spectrogram (B, F, n_mels) → flattened patches (B, n, P), in the order of the tokens.

        `patch_order="time"`: token 5t + f, pixel 16 dt + dm (SSAM's numbers); "frequency": token 64f + t,
        pixel 16 dm + dt (SSAMBA's). Raises HearSsamError if F is not a multiple of `patch_frames`.
        """
        c = self.config
        if spec.dim() != 3 or spec.shape[2] != c.n_mels or spec.shape[1] % c.patch_frames or not spec.shape[1]:
            needed = f"the shape (batch, frames, {c.n_mels}) with frames a positive multiple of {c.patch_frames}"
            raise HearSsamError(f"spec must have {needed}, not {tuple(spec.shape)}.")
        grid: Tensor = spec.unflatten(2, (-1, c.patch_mels)).unflatten(1, (-1, c.patch_frames))  # (B, T, dt, f, dm)
        order = (0, 1, 3, 2, 4) if c.patch_order == "time" else (0, 3, 1, 4, 2)
        return grid.permute(order).flatten(3).flatten(1, 2)

    def positions(self, slots: int) -> Tensor:
        """Position embeddings (1, slots * f, D) of the first `slots` time slots of a window."""
        window, bands = self.config.grid
        if slots > window:
            known = f"{window} time slots ({self.config.window_frames} frames)"
            raise HearSsamError(f"this encoder knows {known}, not {slots}: cut the input into windows.")
        shape, axis = ((window, bands), 1) if self.config.patch_order == "time" else ((bands, window), 2)
        grid: Tensor = self.pos_embed[:, 1:].unflatten(1, shape)
        return grid.narrow(axis, 0, slots).flatten(1, 2)

    def embed(self, spec: Tensor, mask: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Patch tokens before the first block (B, n, D): embedded, masked where `mask` (B, n) is True, positioned.

        With `visible` (B, V) int64 only those patches are embedded, each at its position: (B, V, D).
        """
        patches, positions = self.patchify(spec), self.positions(spec.shape[1] // self.config.patch_frames)
        if visible is not None:
            patches, positions = pick(patches, visible), pick(positions.expand(len(spec), -1, -1), visible)
        x: Tensor = self.patch_embed(patches)
        if mask is None:
            return x + positions
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            found = f"{mask.dtype} {tuple(mask.shape)}"
            raise HearSsamError(f"mask must be a bool tensor of shape {tuple(x.shape[:2])}, not {found}.")
        mask = mask[..., None]
        if self.config.mask_position == "after":
            return torch.where(mask, self.mask_token, x) + positions
        return torch.where(mask, self.mask_token, x + positions)  # as SSAM was released: masked tokens know no place

    def run_blocks(self, x: Tensor, depth: int | None = None, start: int = 0) -> Tensor:
        """The blocks from `start` to `depth`, all if not said, on any token sequence (B, L, D), without positions and
        final norm."""
        blocks = self.blocks[start:depth]
        if self.config.paired:
            # Both layers of a pair read the same x, the second one backwards; both residuals are kept, so x doubles.
            for even, odd in zip(blocks[::2], blocks[1::2], strict=True):
                x = even(x) + odd(x, reverse=True)
        else:
            for i, block in enumerate(blocks, start):
                x = block(x, reverse=self.config.flip_odd and i % 2 == 1)
        return x

    def tokens(self, spec: Tensor, mask: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Normalised spectrogram (B, F, n_mels) float → tokens (B, 1 + n, D) after the final norm, class token first.

        F is any multiple of `patch_frames` up to `window_frames`; a shorter window has fewer tokens, at the positions
        of the first time slots. No padding is needed, and for a causal system none would matter. `visible` (B, V) int64
        reads only these patches, in this order → (B, 1 + V, D).
        """
        return self._normed(self.run_blocks(self._sequence(spec, mask, visible)))

    def _normed(self, x: Tensor) -> Tensor:
        for _ in range(self.config.final_norms):
            x = self.norm(x)
        return x

    def _sequence(self, spec: Tensor, mask: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        x = self.embed(spec, mask, visible)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([first, x], dim=1)

    def hidden(self, spec: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """The tokens (B, 1 + n, D) after each of these blocks, counted from 1, in the order asked for.

        The last block's are those of `tokens`, with the final norm; the others have none. None: the config's
        `readout_block`, beyond which nothing is computed.
        Raises HearSsamError for a block that is not there, or is the first half of a pair (SSAMBA).
        """
        last, step = len(self.blocks), 1 + self.config.paired
        if layers is None:
            if not self.config.readout_block:
                return [self.tokens(spec)]
            layers = [self.config.readout_block]
        for layer in [*layers] or [0]:
            if layer not in range(step, last + 1, step):
                known = f"{step}, {2 * step}, ... {last}" if last > 2 * step else f"{step} to {last}"
                what = f"layers={list(layers)}: this encoder has no tokens of block {layer!r}"
                raise HearSsamError(f"{what}; take {known}.")
        layers = [*map(int, layers)]  # of a tensor each number would be another key
        x, done, found = self._sequence(spec), 0, {}
        for layer in sorted(set(layers)):
            x, done = self.run_blocks(x, layer, done), layer
            found[layer] = x
        return [self._normed(found[layer]) if layer == last else found[layer] for layer in layers]

    def set_precision(self, precision: str) -> Encoder:
        """Use "fp32", or "bf16" in the large projections only: norms, residuals, steps and states stay float32."""
        if precision not in ("fp32", "bf16"):
            raise unknown_name("precision", precision, ("fp32", "bf16"))
        for module in self.modules():
            if isinstance(module, Projection):
                module.bf16 = precision == "bf16"
        return self


class Whitening(nn.Module):
    """Pooled tokens → scene embeddings with less correlation: centred, then times one matrix for the D numbers of every
    band's mean, and one for those of its deviation. New ones change nothing; `checkpoints/whitening.py` fits them.

    Of use where scale and correlation hinder what learns from the embeddings: gradient descent, cosines, neighbours.
    """

    center: Tensor
    maps: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(2, config.grid[1], config.embed_dim))
        self.register_buffer("maps", torch.eye(config.embed_dim).repeat(2, 1, 1))

    def forward(self, pooled: Tensor) -> Tensor:
        """Means, or means and deviations side by side, of all bands (B, E') → as many numbers (B, E')."""
        x: Tensor = pooled.unflatten(1, (-1, *self.center.shape[1:]))  # (B, 1 or 2, bands, D)
        with torch.autocast(x.device.type, enabled=False):  # scenes are float32 inside anybody's block
            centred = x - self.center[: x.shape[1]]
            maps = self.maps[: x.shape[1]]  # which `@` would copy for every clip
            return torch.einsum("bkfd,kde->bkfe", centred, maps).flatten(1)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The rows `index` (B, V) int64 of each item of x (B, n, D): (B, V, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _head(dim: int, activation: nn.Module, pixels: int) -> nn.Sequential:
    layers = nn.Linear(dim, dim), nn.Linear(dim, pixels)
    for layer in layers:
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], activation, layers[1])


def sincos_positions(config: EncoderConfig) -> Tensor:
    """Fixed positions (1, 1 + n, D), float32: zeros for the class token; the first D/2 dimensions encode the band,
    the others the time slot, each as [sin(p w), cos(p w)] with w_k = 10000^(-k / (D/4))."""
    slots, bands = config.grid
    quarter = config.embed_dim // 4
    omega = 10000 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)

    def wave(positions: int) -> Tensor:  # (positions, D/2)
        angle = torch.arange(positions, dtype=torch.float32)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    band = wave(bands).expand(slots, -1, -1)  # (T, f, D/2)
    slot = wave(slots)[:, None].expand(-1, bands, -1)
    grid = torch.cat([band, slot], dim=2)  # (T, f, D)
    grid = grid.transpose(0, 1) if config.patch_order == "frequency" else grid
    return F.pad(grid.flatten(0, 1), (0, 0, 1, 0))[None]


def resize_positions(pos_embed: Tensor, config: EncoderConfig, slots: int) -> Tensor:
    """Learned positions (1, 1 + n, D) for windows of `slots` time slots instead of the grid of `config`.

    As SSAMBA does it: fewer slots are the centre of the grid, more are interpolated linearly.
    """
    window, bands = config.grid
    shape, axis = ((window, bands), 0) if config.patch_order == "time" else ((bands, window), 1)
    grid = pos_embed[0, 1:].unflatten(0, shape)
    if slots <= window:
        grid = grid.narrow(axis, window // 2 - slots // 2, slots)
    else:  # (f, D, T) in between
        grid = F.interpolate(grid.movedim(axis, 2), size=slots, mode="linear", align_corners=False).movedim(2, axis)
    return torch.cat([pos_embed[:, :1], grid.flatten(0, 1)[None]], dim=1)
