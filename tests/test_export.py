"""ONNX files give what the model gives; torch.export takes it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hear_ssam import HearSsamError, cli, load_model
from hear_ssam.embedding.export import export_onnx
from hear_ssam.encoder import Encoder
from hear_ssam.hear import EncoderModel
from tests.test_checkpoint import small_config


def small(system: str) -> EncoderModel:
    torch.manual_seed(0)
    config = small_config(system, pooling="mean_std")
    return EncoderModel(f"small_{system}", config, Encoder(config), "torch", "").eval()


def noise(clips: int, seconds: float) -> torch.Tensor:
    return torch.rand(clips, round(16_000 * seconds), generator=torch.Generator().manual_seed(0)) - 0.5


@pytest.mark.parametrize(
    ("system", "spectrogram"), [("ssam", False), ("ssast", True), ("axlstm", True), ("ssamba", False)]
)
def test_onnxruntime_gives_the_same_embeddings(system: str, spectrogram: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'hear-ssam[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'hear-ssam[onnx]'")
    model, audio, spectrogram = small(system), noise(2, 1.0), system in ("ssast", "axlstm")
    session = runtime.InferenceSession(
        export_onnx(model, tmp_path / "model.onnx", spectrogram=spectrogram, seconds=1.0, clips=2)
    )
    with torch.no_grad():
        wanted = model.scene_and_rows(audio)
        given = model.spectrogram(audio) if spectrogram else audio
    found = session.run(["scene", "rows"], {"spectrogram" if spectrogram else "audio": given.numpy()})
    for ours, theirs in zip(wanted, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-4)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["name"] == model.name and facts["milliseconds"] == str(model.timestamps(16_000).tolist())


def test_torch_export_takes_the_model() -> None:
    model, audio = small("ssam"), noise(1, 0.5)
    program = torch.export.export(model, (audio,))
    torch.testing.assert_close(program.module()(audio), model(audio))
    with pytest.raises(HearSsamError, match="NaN"):
        model(audio.new_full((1, 8000), torch.nan))


def test_what_cannot_be_exported_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'hear-ssam[onnx]'")
    with pytest.raises(HearSsamError, match="logmel has no encoder"):
        export_onnx(load_model("logmel"), tmp_path / "a.onnx")
    assert cli.main(["export", "-o", str(tmp_path / "a.onnx"), "--seconds", "0.001"]) == 2
    assert "audio has 16 samples" in capsys.readouterr().err
    for wrong in (["--clips", "0"], ["--seconds", "-1"], ["--seconds", "nan"]):
        assert cli.main(["export", "-o", str(tmp_path / "a.onnx"), *wrong]) == 2
        assert f"{' '.join(wrong)}" in (said := capsys.readouterr().err) and "take one clip or more" in said
    assert cli.main(["export", "ssam_tinny", "-o", str(tmp_path / "a.onnx")]) == 2
    assert "Did you mean 'ssam_tiny'" in capsys.readouterr().err
    assert cli.main(["export", "-o", str(tmp_path / "a.onnx"), "--model-options", '{"precision": "bf16"}']) == 2
    assert "onnxruntime runs ssam_tiny in float32 only" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
