"""A tiny module with the HEAR API, so that the driver is tested without our encoders: band energies of 50 ms frames."""

import sys

import torch

HOP_MS = 50.0


class Bands(torch.nn.Module):
    sample_rate = 16000

    def __init__(self, bands: int, broken: str, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.scene_embedding_size = self.timestamp_embedding_size = bands
        self.broken = broken


def load_model(model_file_path: str = "", bands: int = 40, broken: str = "", pool: str = "mean") -> Bands:
    """`pool` is mean, mean+max or mean/max. `broken` makes one fault on purpose.

    Of embeddings: nan, seconds, shape, batch, drift, silence, rate, short, empty, tolist, meta or exit (sys.exit); of
    loading: exit at once, no model. bfloat16, numpy and conjugate are odd, but no faults.
    """
    if broken == "exit at once":
        sys.exit("no licence")
    model = Bands(bands, broken, pool).eval()
    if broken == "no model":
        return model.broken
    if broken == "rate":
        model.sample_rate = 12345
    return model


def _frames(audio: torch.Tensor, model: Bands) -> tuple[torch.Tensor, torch.Tensor]:
    if audio.shape[1] < 800 and model.broken != "short":
        audio = torch.nn.functional.pad(audio, (0, 800 - audio.shape[1]))
    frames = audio.unfold(1, 800, 800)  # (clips, frames, samples)
    power = torch.fft.rfft(frames, dim=-1).abs()[..., 1:].unflatten(-1, (model.scene_embedding_size, -1)).mean(-1)
    times = (torch.arange(frames.shape[1]) * HOP_MS + HOP_MS / 2).expand(len(audio), -1)
    times = times * {"seconds": 1e-3, "drift": 0.9998}.get(model.broken, 1)
    if model.broken == "exit":
        sys.exit(3)
    embedding = torch.log(power + (0 if model.broken == "silence" else 1e-3))
    if model.broken == "empty":
        return embedding[:, :0], times[:, :0]
    return embedding - embedding.mean(0) * (model.broken == "batch"), times


def _as(kind, tensor):
    if kind in ("bfloat16", "numpy", "tolist"):
        return getattr(tensor, kind)()
    if kind == "conjugate":  # whose imaginary part torch keeps with a note to negate it
        return torch.complex(tensor, -tensor).conj().imag
    return tensor.to("meta") if kind == "meta" else tensor


def get_timestamp_embeddings(audio: torch.Tensor, model: Bands) -> tuple[torch.Tensor, torch.Tensor]:
    embedding, times = _frames(audio, model)
    return _as(model.broken, embedding), _as(model.broken, times)


def get_scene_embeddings(audio: torch.Tensor, model: Bands) -> torch.Tensor:
    frames, _ = _frames(audio, model)
    embedding = frames.mean(1)
    if "max" in model.pool:
        most = frames.amax(1)
        embedding = embedding + most if "+" in model.pool else embedding / most
    if model.broken == "nan":
        embedding[0, 0] = float("nan")
    return embedding[:, 1:] if model.broken == "shape" else _as(model.broken, embedding)
