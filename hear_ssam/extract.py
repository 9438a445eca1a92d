"""`hear-ssam embed`: audio files → one Parquet file of scene and timestamp embeddings."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import HearSsamError, about
from .options import add_model, add_model_options, parse_options

if TYPE_CHECKING:
    import pyarrow as pa

    from .hear import HearModel

ROW_GROUP = 8192  # rows that are collected before they are written
KINDS = {"both": ("scene", "timestamps"), "scene": ("scene",), "timestamps": ("timestamps",)}

EXAMPLES = """examples:
  hear-ssam embed recordings/ -o embeddings.parquet
  hear-ssam embed a.wav b.flac -o scenes.parquet --kind scene
  hear-ssam embed recordings/ -o embeddings.parquet --model official/ssam_base.pth --precision bf16 --workers 4

columns of the output, in the order of the input files:
  path               as given, or as found below a folder
  start_ms           time of a timestamp embedding, milliseconds; null: the embedding of the whole file (scene)
  model              name of the model
  checkpoint_sha256  of its file of weights; empty where it has none
  embedding          list of float32, of fixed size where scenes and timestamps are as wide

  pandas.read_parquet("embeddings.parquet").query("start_ms.isnull()")    only the scenes
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "embed",
        help="audio files of any rate and channel count to a Parquet file of embeddings",
        description="Write the scene and timestamp embeddings of audio files to one Parquet file. Files that cannot be "
        "read are named and skipped; the exit code is then 1. The output appears only when it is complete.",
        epilog=EXAMPLES,
    )
    parser.add_argument("inputs", nargs="+", metavar="FILE_OR_FOLDER", help="audio files; folders are searched")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the Parquet file to write")
    add_model(parser)
    parser.add_argument("--kind", choices=KINDS, default="both", help="default: both")
    parser.add_argument("--workers", type=int, metavar="N", help="files embedded at the same time; default: CPU cores")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    add_model_options(parser)
    parser.set_defaults(run=run)


class NothingEmbeddedError(HearSsamError):
    """Every file was skipped."""


def run(args: argparse.Namespace) -> int:
    """`hear-ssam embed`; exit code 1 if a file was skipped."""
    import torch

    from .audio import find_audio
    from .hear import load_model
    from .machine import usable_cpus

    files = find_audio(args.inputs)
    cores = usable_cpus()
    workers = min(cores if args.workers is None else args.workers, len(files))
    if workers < 1:
        raise HearSsamError(f"--workers must be at least 1, not {args.workers}.")
    torch.set_num_threads(max(1, cores // workers))  # of this process; 1 unless there are fewer files than cores
    model = load_model(
        args.model, **{"precision": args.precision, "device": args.device, **parse_options(args.model_options)}
    )
    try:
        return 1 if embed_files(files, args.output, model, kind=args.kind, workers=workers) else 0
    except NothingEmbeddedError as error:
        print(error, file=sys.stderr)
        return 1


def embed_files(
    files: Sequence[Path], output: str | os.PathLike[str], model: HearModel, *, kind: str = "both", workers: int = 1
) -> list[Path]:
    """Embed files and write them to the Parquet file `output` in their order; returns the files that were skipped.

    kind     a key of KINDS
    workers  files embedded at the same time, each by one thread; twice as many are kept in memory

    Skipped files are named on stderr. Raises HearSsamError where `output` cannot be written or every file is skipped;
    an older `output` is then left as it was.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    from .machine import work_ahead
    from .paths import atomic_write

    schema = _schema(model, kind)
    skipped: list[Path] = []
    pending: list[pa.Table] = []
    work = functools.partial(_embed, model=model, kind=kind, schema=schema)
    with (
        atomic_write(output) as temporary,
        pq.ParquetWriter(temporary, schema, use_dictionary=["path", "model", "checkpoint_sha256"]) as writer,
        contextlib.closing(work_ahead(work, files, workers, 2 * workers)) as outcomes,
    ):
        for file, outcome in tqdm(outcomes, total=len(files), unit="file", disable=None):
            try:
                pending.append(outcome.result())
            except Exception as error:  # one file in ten thousand that trips over a defect spoils no other
                tqdm.write(f"skipped {about(file, error)}", file=sys.stderr)
                skipped.append(file)
            if sum(table.num_rows for table in pending) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(pending), ROW_GROUP)
                pending.clear()
        if len(skipped) == len(files):
            raise NothingEmbeddedError(f"{output}: not written: none of {len(files)} files could be embedded.")
        if pending:
            writer.write_table(pa.concat_tables(pending), ROW_GROUP)
    print(f"{output}: {len(files) - len(skipped)} of {len(files)} files", file=sys.stderr)
    return skipped


def _embed(file: Path, model: HearModel, kind: str, schema: pa.Schema) -> pa.Table:
    """The rows of one file; the scene comes first and has no time."""
    import numpy as np
    import pyarrow as pa
    import torch

    from .audio import read_audio

    audio = read_audio(file, model.sample_rate)
    with torch.no_grad():
        scene, rows = model.scene_and_rows(torch.from_numpy(audio)[None].to(model.device))  # (1, E), (1, T, E)
    parts = {"scene": scene, "timestamps": rows[0]}
    times = {"scene": [None], "timestamps": model.timestamps(len(audio)).tolist()}
    embeddings = [row for part in KINDS[kind] for row in parts[part].cpu().numpy()]
    values, column = np.concatenate(embeddings), schema.field("embedding").type
    path = os.fsencode(file).decode(errors="replace")  # names that are not UTF-8 have no place in Parquet
    columns = [
        [path] * len(embeddings),
        [time for part in KINDS[kind] for time in times[part]],
        [model.name] * len(embeddings),
        [model.checkpoint_sha256] * len(embeddings),
        pa.FixedSizeListArray.from_arrays(values, column.list_size)
        if pa.types.is_fixed_size_list(column)
        else pa.ListArray.from_arrays(np.cumsum([0, *map(len, embeddings)], dtype=np.int32), values),
    ]
    return pa.table(columns, schema=schema)


def _schema(model: HearModel, kind: str) -> pa.Schema:
    import pyarrow as pa

    widths = {"scene": model.scene_embedding_size, "timestamps": model.timestamp_embedding_size}
    first, *others = {widths[part] for part in KINDS[kind]}
    columns = {"path": pa.string(), "start_ms": pa.float64(), "model": pa.string(), "checkpoint_sha256": pa.string()}
    return pa.schema(columns | {"embedding": pa.list_(pa.float32(), -1 if others else first)})
