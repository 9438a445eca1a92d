"""hear_ssam as an X-ARES encoder, for `example/hear_ssam/` there: 16 kHz, one row per 40 ms."""

import torch

import hear_ssam


class HearSsamEncoder(torch.nn.Module):
    def __init__(self, model: str = "ssam_tiny"):
        super().__init__()
        self.model = hear_ssam.load_model(model)
        self.sampling_rate = self.model.sample_rate
        self.output_dim = self.model.timestamp_embedding_size
        self.hop_size_in_ms = 40

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Audio (clips, samples), or (samples,) → (clips, rows, output_dim)."""
        audio = audio[None] if audio.ndim == 1 else audio
        with torch.inference_mode():
            return hear_ssam.get_timestamp_embeddings(audio, self.model)[0]


if __name__ == "__main__":
    from xares.audio_encoder_checker import check_audio_encoder

    assert check_audio_encoder(HearSsamEncoder())
