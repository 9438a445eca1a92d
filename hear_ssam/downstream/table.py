"""Scene or window embeddings in memory: read from what `embed` wrote, or computed; the model that belongs to them."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..embedding.inputs import Recording
from ..embedding.shards import parquet_files, provenance, row_groups, same_provenance
from ..embedding.work import Options, Worker, embed_all, share_cpus
from ..errors import HearSsamError
from ..hear import HearModel, load_model


@dataclass(frozen=True)
class Embeddings:
    """Rows of clips: paths (N,), start and end in ms (NaN: whole recordings), x float32 (N, E), what made them."""

    paths: list[str]
    starts: np.ndarray
    ends: np.ndarray
    x: np.ndarray
    made: dict[str, Any]


def read_embeddings(place: str | os.PathLike[str]) -> Embeddings:
    """The scenes, or windows, of a file or folder of `hear-ssam embed`; timestamps are left out.

    Raises HearSsamError where nothing is there, or it is not of one model and one set of options.
    """
    files = parquet_files(place)
    made = provenance(files[0]) if files else None
    if made is None:
        raise HearSsamError(f"{place}: holds no embeddings; write them there with `hear-ssam embed`.")
    same_provenance(Path(place), files, made, "give each model and each set of options a folder of its own")
    if made["kind"] == "timestamps":
        raise HearSsamError(f"{place}: holds timestamp embeddings only; use `hear-ssam embed --kind scene`.")
    tables = (table for file in files for table in row_groups(file))
    if not made["window"]:  # of an hour of timestamps only the scene is kept
        tables = (table.filter(pc.is_null(table["start_ms"])) for table in tables)
    return as_embeddings(tables, made)


def as_embeddings(tables: Iterable[pa.Table], made: dict[str, Any]) -> Embeddings:
    """Rows of one width, as a worker of `embed` gives them."""
    table = pa.concat_tables(tables)
    rows = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    x = rows.astype(np.float32).reshape(table.num_rows, -1)
    none = np.full(len(x), np.nan)
    starts, ends = (table[name].to_numpy() if made["window"] else none for name in ("start_ms", "end_ms"))
    return Embeddings(table["path"].to_pylist(), starts, ends, x, made)


def model_of(made: dict[str, Any], place: object, name: str, device: str) -> HearModel:
    """The model that made these embeddings; `name` says where it is, if not under its name.

    Raises HearSsamError where the weights of that name are others.
    """
    try:
        model = load_model(name or made["model"], **{**made["model_options"], "device": device})
    except HearSsamError as error:
        raise HearSsamError(f"{place}: needs the model {made['model']}: {error} Or name it with --model.") from error
    wanted, found = made["checkpoint_sha256"], model.checkpoint_sha256
    if (wanted or made["model"]) != (found or model.name):  # without a file of weights the name must do
        wanted, found = (digest[:12] or "(none)" for digest in (wanted, found))
        text = f"was made with weights {wanted} of {made['model']}, not {found} of {model.name}"
        raise HearSsamError(f"{place}: {text}; say where those are with --model.")
    return model


def compute(
    recordings: Iterable[Recording], model: HearModel, options: Options, skipped: list[str]
) -> Generator[Embeddings, None, None]:
    """Embeddings of each recording; those that cannot be read are named on stderr and added to `skipped`."""
    for tables in embed_all(recordings, Worker(model, options), share_cpus(recordings), skipped):
        yield as_embeddings(tables, options.made(model))
