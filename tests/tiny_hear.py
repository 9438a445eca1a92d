"""A tiny module with the HEAR API, so that the driver is tested without our encoders: band energies of 50 ms frames."""

import torch

HOP_MS = 50.0


class Bands(torch.nn.Module):
    sample_rate = 16000

    def __init__(self, bands: int, broken: str) -> None:
        super().__init__()
        self.scene_embedding_size = self.timestamp_embedding_size = bands
        self.broken = broken


def load_model(model_file_path: str = "", bands: int = 40, broken: str = "") -> Bands:
    """`broken` makes one fault on purpose: nan, seconds, shape, batch, drift, silence, rate or short."""
    model = Bands(bands, broken).eval()
    if broken == "rate":
        model.sample_rate = 12345
    return model


def get_timestamp_embeddings(audio: torch.Tensor, model: Bands) -> tuple[torch.Tensor, torch.Tensor]:
    if audio.shape[1] < 800 and model.broken != "short":
        audio = torch.nn.functional.pad(audio, (0, 800 - audio.shape[1]))
    frames = audio.unfold(1, 800, 800)  # (clips, frames, samples)
    power = torch.fft.rfft(frames, dim=-1).abs()[..., 1:].unflatten(-1, (model.scene_embedding_size, -1)).mean(-1)
    times = (torch.arange(frames.shape[1]) * HOP_MS + HOP_MS / 2).expand(len(audio), -1)
    times = times * {"seconds": 1e-3, "drift": 0.9998}.get(model.broken, 1)
    embedding = torch.log(power + (0 if model.broken == "silence" else 1e-3))
    return embedding - embedding.mean(0) * (model.broken == "batch"), times


def get_scene_embeddings(audio: torch.Tensor, model: Bands) -> torch.Tensor:
    embedding = get_timestamp_embeddings(audio, model)[0].mean(1)
    if model.broken == "nan":
        embedding[0, 0] = float("nan")
    return embedding[:, 1:] if model.broken == "shape" else embedding
