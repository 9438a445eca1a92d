"""hear_ssam: audio embeddings from self-supervised masked-spectrogram encoders, and the HEAR probe that judges them.

Contents, in reading order:

    hear                    the HEAR API: load_model, get_scene_embeddings, get_timestamp_embeddings, available_models
    frontend                waveform → log-mel (80 bands) or Kaldi filterbank (128 bands)
    config                  what differs between SSAM, SSAMBA, SSAST and AxLSTM, as data
    encoder                 patches, positions, blocks, heads: the one encoder
    blocks                  Mamba, bidirectional Mamba, Transformer, mLSTM
    scan                    selective scan and causal convolution: chooses a backend
    scan.reference          the reference implementation, plain loops
    scan.torch_backend      in PyTorch, always there
    scan.cpu_backend        on a CPU: cpu_kernels (what it runs), simd (what compiles them, with LLVM)
    scan.triton_backend     on a GPU
    checkpoint              our safetensors and the official files; nothing in them is executed
    download                files from the network: resumed, checked, whole
    hub.weights             where published weights lie, and how they come here
    hub.layout              models as folders of Hugging Face's layout; hub.modeling_hear_ssam goes into them
    embedding.export        a model as ONNX; embedding.onnx_ops is what ONNX lacks
    models                  the table of models; official files → ours
    container, audio        how much audio a file holds; any file → float32 mono
    embedding.clips         hear_ssam.embed: clips of unequal length together, long ones in bounded memory
    embedding.inputs        files, folders, patterns, CSV, tars → recordings
    embedding.work          recordings → rows, many at a time
    embedding.shards        rows → Parquet files that are whole or absent, resumed
    extract                 `hear-ssam embed`: collections → Parquet
    downstream.labels       a folder per class, or a CSV → labelled recordings
    downstream.table        embeddings read or computed, with the model that belongs to them
    downstream.classify     `hear-ssam classify`: logistic regression, one JSON file (search, map: the other uses)
    downstream.estimator    HearEmbedder, for scikit-learn
    pretrain                audio → a store → its cluster codes → an encoder: the commands
    pretraining.corpus      the corpus of the shipped encoders, and what of it is missing
    pretraining.store       16 kHz audio on disk, spectrogram frames of it for any front end
    pretraining.recipe      what a training depends on, as typed values; the recipes that ship
    pretraining.codes       cluster codes of a store from a teacher
    pretraining.leaks       which clips of a store are recordings of an evaluation: acoustic fingerprints
    pretraining.windows     training windows drawn from a store, and the patches to hide in them
    pretraining.learner     decoder, heads, objectives around the encoder
    pretraining.loop        steps, processes, saved states, the checkpoint (card: its model card; watch: its picture)
    evaluation.module       any module with the HEAR API: imported, loaded, called
    evaluation.hf, .xares   models of transformers and of X-ARES as HEAR modules
    evaluation.tasks        HEAR's task folders, checked
    evaluation.folders      where tasks and their audio lie, archives among them
    evaluation.embeddings   such a module on a task → a folder of embeddings, as heareval lays it out
    evaluation.rows         such a folder read: rows, targets, what scores predictions
    evaluation.probe        rows → trained heads, as heareval trains them
    evaluation.quick        rows → probes of seconds: neighbours, few clips, logistic regression
    evaluation.scores       HEAR's metrics
    evaluation.preview      a few clips of a task; how long all will take; a checkpoint while it is trained
    evaluation.jobs         heads in parallel processes
    evaluation.records      one JSON line per result
    evaluation.tables       records as tables
    evaluation.library      HEAR's tasks fetched and listed; tasks made of labelled recordings
    evaluation.evaluate     the driver of all that
    evaluation.report       results on screen, as CSV, LaTeX, HTML
    evaluation.check        the HEAR contract, explained, for any module
    heareval                the unmodified hear-validator and heareval on a current Python
    demo, doctor            a small task, drawn; what runs on this machine
    cli                     the commands
    options                 what several commands share: how a model and a device are named
    paths, machine, errors  files, shipped and atomic; CPUs, threads, memory, Ray clusters; the one error class
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .downstream.estimator import HearEmbedder as HearEmbedder
    from .embedding.clips import embed as embed
    from .errors import HearSsamError as HearSsamError
    from .evaluation.evaluate import evaluate as evaluate
    from .hear import HearModel as HearModel
    from .hear import available_models as available_models
    from .hear import get_scene_embeddings as get_scene_embeddings
    from .hear import get_timestamp_embeddings as get_timestamp_embeddings
    from .hear import load_model as load_model

__version__ = "0.1.0"
# The API and where it lives; imported, torch with it, at its first use: `hear-ssam --help` answers at once (PEP 562).
PLACES = {
    "HearEmbedder": "downstream.estimator", "HearModel": "hear", "HearSsamError": "errors", "available_models": "hear",
    "embed": "embedding.clips", "evaluate": "evaluation.evaluate", "get_scene_embeddings": "hear",
    "get_timestamp_embeddings": "hear", "load_model": "hear",
}  # fmt: skip
__all__ = [*PLACES]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    if name in PLACES:
        return getattr(importlib.import_module(f".{PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
