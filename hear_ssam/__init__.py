"""hear_ssam: audio embeddings from self-supervised masked-spectrogram encoders, and the HEAR probe that judges them.

Contents, in reading order:

    hear            the HEAR API: load_model, get_scene_embeddings, get_timestamp_embeddings, available_models
    frontend        waveform → log-mel (80 bands) or Kaldi filterbank (128 bands)
    config          what differs between SSAM, SSAMBA, SSAST and AxLSTM, as data
    encoder         patches, positions, masking, blocks, heads: the one encoder
    blocks          Mamba, bidirectional Mamba, Transformer, mLSTM
    scan/           the selective scan and the causal convolution: the choice of a backend, the reference
                    implementation, the backends torch, cpu (written in simd) and triton
    checkpoint      our safetensors and the official files
    container, audio, extract  how much audio a file holds; reading it; audio files → Parquet
    corpus, pretrain, pretraining/  pre-training data and loop
    evaluation/     the HEAR protocol: tasks, embeddings, probe, scores, jobs, records, evaluate, tables, report;
                    check, the HEAR contract explained, for any module
    heareval        hear-validator and heareval, unmodified, on a current Python
    models, demo, doctor, cli   the commands
    paths, errors, machine   shipped files, atomic writes; the one error class; what this process has of the machine
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import HearSsamError as HearSsamError
    from .hear import available_models as available_models
    from .hear import get_scene_embeddings as get_scene_embeddings
    from .hear import get_timestamp_embeddings as get_timestamp_embeddings
    from .hear import load_model as load_model

__version__ = "0.1.0"
BASELINE = "logmel"  # the model without weights that counts as zero in tables
__all__ = [
    "HearSsamError",
    "available_models",
    "get_scene_embeddings",
    "get_timestamp_embeddings",
    "load_model",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    # torch is imported with the first use, so that `hear-ssam --help` answers at once (PEP 562).
    if name in __all__:
        from . import errors, hear

        return getattr(errors if name == "HearSsamError" else hear, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
