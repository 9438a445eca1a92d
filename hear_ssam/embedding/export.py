"""`hear-ssam export`: a model as ONNX, for machines without torch; of one length of clips, 2 s unless told."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HearSsamError
from ..options import parse_options
from ..paths import atomic_write

if TYPE_CHECKING:
    from ..hear import HearModel

EXAMPLES = """examples:
  hear-ssam export -o ssam_tiny.onnx
  hear-ssam export ssamba_tiny -o ssamba.onnx --seconds 10.24
  hear-ssam export -o encoder.onnx --input spectrogram

inputs:  audio (clips, samples) float32, 16 kHz mono, or with --input spectrogram (clips, frames, bands), normalised
outputs: scene (clips, E), rows (clips, T, E'), as get_scene_embeddings and get_timestamp_embeddings give them
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "export",
        help="a model as an ONNX file, for onnxruntime",
        description="Write a model as ONNX. Needs the extra [onnx]; onnxruntime then runs the file without torch.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", nargs="?", default="", metavar="NAME|FILE|FOLDER|REPO", help="default: ssam_tiny")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the ONNX file to write")
    text = "what the file reads: audio (default), or normalised spectrograms, without the front end"
    parser.add_argument("--input", choices=("audio", "spectrogram"), default="audio", help=text)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the clips (default 2)")
    parser.add_argument("--clips", type=int, default=1, metavar="N", help="how many at once (default 1)")
    parser.add_argument("--model-options", default="{}", metavar="JSON", help="further arguments of load_model")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..hear import load_model

    model = load_model(args.model, **{"backend": "torch", **parse_options(args.model_options)})
    spectrogram = args.input == "spectrogram"
    path = export_onnx(model, args.output, spectrogram=spectrogram, seconds=args.seconds, clips=args.clips)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def export_onnx(
    model: HearModel, output: str | os.PathLike[str], *, spectrogram: bool = False, seconds: float = 2.0, clips: int = 1
) -> Path:
    """Write `model` as ONNX for `clips` clips of `seconds` at a time; returns the path.

    Its input is `audio` (clips, samples) float32, or `spectrogram` (clips, frames, mels), what `model.spectrogram`
    gives; its outputs are `scene` (clips, E) and `rows` (clips, T, E'). The metadata hold the model's name, the hash of
    its weights, and the times of the rows in milliseconds.
    Raises HearSsamError without the extra [onnx], for clips that are too short, and for the model without an encoder.
    """
    import torch

    from ..hear import EncoderModel

    try:
        from . import onnx_ops
    except ImportError as error:
        raise HearSsamError(f"export: needs {error.name}; pip install 'hear-ssam[onnx]'.") from error
    if not isinstance(model, EncoderModel):
        raise HearSsamError(f"export: {model.name} has no encoder; name another model.")
    if any(getattr(module, "bf16", False) for module in model.encoder.modules()):
        raise HearSsamError(f"export: onnxruntime runs {model.name} in float32 only; leave away precision bf16.")

    class Scenes(torch.nn.Module):
        def __init__(self, model: EncoderModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            computed = torch.stack(self.model.rows_of_each(given if spectrogram else self.model.spectrogram(given)))
            rows = computed[:, : len(times)]
            return self.model.scene(rows, computed), rows

    if clips < 1 or not 0 < seconds < 3600:
        raise HearSsamError(f"--clips {clips} --seconds {seconds:g}: take one clip or more, of up to an hour each.")
    size = clips, round(seconds * model.sample_rate)
    audio = model.check(torch.zeros(size, dtype=torch.float32, device=model.device))
    times = model.timestamps(audio.shape[1])
    example = model.spectrogram(audio) if spectrogram else audio
    table: dict[Any, Any] = {
        torch.ops.hear_ssam.selective_scan.default: onnx_ops.selective_scan,
        torch.ops.hear_ssam.causal_conv1d.default: onnx_ops.causal_conv1d,
        torch.ops.aten._fft_r2c.default: onnx_ops.fourier,
    }
    with torch.no_grad(), warnings.catch_warnings(), atomic_write(output) as temporary:
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            torch.export.export(Scenes(model), (example,), strict=False),
            dynamo=True,
            input_names=["spectrogram" if spectrogram else "audio"],
            output_names=["scene", "rows"],
            custom_translation_table=table,
            verbose=False,
        )
        assert program is not None
        facts = {"name": model.name, "checkpoint_sha256": model.facts()[2], "milliseconds": str(times.tolist())}
        program.model.metadata_props.update(facts)
        program.save(temporary, external_data=False)
    return Path(output)
