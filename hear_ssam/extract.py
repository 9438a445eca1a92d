"""`hear-ssam embed`: collections of audio → a Parquet file, or a folder of them, of embeddings."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import HearSsamError
from .options import add_model, add_model_options, add_scale, parse_options, parse_shard

if TYPE_CHECKING:
    from .embedding.inputs import Recording
    from .embedding.work import Options
    from .hear import HearModel
    from .machine import Cluster

ROW_GROUP = 8192  # rows that are collected before they are written, fewer where they have more than these bytes
ROW_BYTES = 4 << 20
SAFE = 10.0  # seconds of work after which a shard is closed: no more is lost, whatever happens

EXAMPLES = """examples:
  hear-ssam embed recordings/ -o embeddings.parquet
  hear-ssam embed a.wav b.flac -o scenes.parquet --kind scene
  hear-ssam embed list.csv 'field/**/*.flac' shards/a-000001.tar -o embeddings      a folder of shards
  hear-ssam embed - -o windows --window 2 --hop 1 --dtype float16                   paths on stdin, one a line
  hear-ssam embed recordings/ -o embeddings --shard 3/8                             third of eight jobs, same folder
  hear-ssam embed /shared/recordings -o /shared/embeddings --engine ray             on all nodes of a Ray cluster
  hear-ssam embed recordings/ -o embeddings.parquet --model official/ssam_base.pth --precision bf16 --workers 4

columns of the output, in the order of the input files (--engine ray: in that in which they are finished):
  path               as given, or as found below a folder; TAR:MEMBER; of a CSV: its folder and its column path
  start_ms           time of a timestamp embedding, milliseconds; null: the embedding of the whole file (scene)
  end_ms             with --window: where the window ends; start_ms is where it starts
  model              name of the model
  checkpoint_sha256  of its file of weights; empty where it has none
  embedding          list of float32, of fixed size where scenes and timestamps are as wide

  pandas.read_parquet("embeddings.parquet").query("start_ms.isnull()")    only the scenes

Run the same command again after whatever stopped it: files that are there already, made with the same weights and
options, are skipped. At most ten seconds of work are lost, or the one file that takes longer. The metadata of each
Parquet file says what made it.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "embed",
        help="audio files of any rate, length and number to Parquet files of embeddings",
        description="Write the scene and timestamp embeddings of audio files to Parquet. Files that cannot be read are "
        "named and skipped; the exit code is then 1.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders, 'patterns', tars, CSV with a column path; -: stdin")
    add("-o", "--output", required=True, metavar="OUT", help="NAME.parquet: one file; other names: a folder of shards")
    add_model(parser)
    add("--kind", choices=("both", "scene", "timestamps"), help="default: both; with --window: scenes of the windows")
    add("--window", type=float, metavar="S", help="one row per window of so many seconds, as if it were cut out")
    add("--hop", type=float, metavar="S", help="seconds from window to window; default: one window")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the embeddings; default: float32")
    add_scale(parser, "file")
    add("--workers", type=int, metavar="N", help="threads that read and embed; default: CPU cores")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`hear-ssam embed`; exit code 1 if a file was skipped."""
    from .embedding.inputs import find_recordings
    from .embedding.work import Options, share_cpus
    from .hear import load_model
    from .machine import engine_named

    if args.window is not None and args.kind not in (None, "scene"):
        raise HearSsamError(f"--kind {args.kind}: --window writes scenes of windows only; leave one of them away.")
    if args.window == 0:
        raise HearSsamError("--window 0: take seconds, from 0.02 to 600.")
    if args.workers is not None and args.workers < 1:
        raise HearSsamError(f"--workers must be at least 1, not {args.workers}.")
    window, hop = args.window or 0.0, args.hop if args.hop is not None else args.window or 0.0
    kind, load = "scene" if window else args.kind or "both", parse_options(args.model_options)
    options = Options(kind, window, hop, args.dtype, {"precision": args.precision, **load})
    shard = parse_shard(args.shard)
    recordings = find_recordings(args.inputs)
    with engine_named(args.engine, args.device, args.workers) as cluster:
        model = load_model(args.model, **{"device": "cpu" if cluster else args.device, **options.model_options})
        workers = share_cpus(recordings, args.workers)
        return 1 if embed_files(recordings, args.output, model, options, shard, workers, cluster) else 0


def embed_files(
    recordings: Iterable[Recording], output: str | os.PathLike[str], model: HearModel,
    options: Options, shard: tuple[int, int] = (1, 1), workers: int = 1, cluster: Cluster | None = None,
) -> list[str]:  # fmt: skip
    """Embed recordings and write them to `output` in their order; returns the files that were skipped.

    output         NAME.parquet: one file; any other name: a folder of shards. What is there already is kept
    shard          (i, n): every n-th file from the i-th (from 1), into a folder that n processes share
    workers        threads, each with a batch of files, and with one more that waits
    cluster        that works instead of threads here; the files are then written in the order in which they are done

    Skipped files are named on stderr, and how many have changed since. Raises HearSsamError where `output` cannot be
    written, holds embeddings of other weights or options or of other files of the same names, or every file is skipped;
    what was there is then left as it was.
    """
    from .embedding.shards import Output
    from .embedding.work import Worker, embed_all

    part, parts = shard
    if parts > 1 and Path(output).suffix == ".parquet":
        raise HearSsamError(f"{output}: is one file, and --shard jobs write to a folder; name one (without .parquet).")
    group = min(ROW_GROUP, 1 + ROW_BYTES // (4 * model.scene_embedding_size))
    target = Output(output, options.schema(model), "part" if parts == 1 else f"part-{part}-of-{parts}", group)
    skipped: list[str] = []
    newer: list[str] = []
    embedded = there = 0

    def wanted() -> Iterator[Recording]:
        nonlocal there
        for recording in itertools.islice(recordings, part - 1, None, parts):
            if recording.label not in target.done:
                yield recording
            else:
                there += 1
                newer.extend([recording.label] * target.newer(recording))

    with target.opened():
        todo = list(wanted()) if isinstance(recordings, list) else wanted()
        worker = Worker(model, options, target.folder)
        found = embed_all(todo, worker, workers, skipped, lambda: target.close_if(SAFE), cluster)
        with contextlib.closing(found) as results:
            for tables in results:
                target.write(tables)
                embedded += 1
        if skipped and not embedded and not there:
            raise HearSsamError(f"{output}: not written: none of {len(skipped)} files could be embedded; name others.")
        target.finish()
    already = f", {there} were there already" if there else ""
    print(f"{output}: {embedded} of {embedded + len(skipped)} files{already}", file=sys.stderr)
    if newer:
        text = f"{len(newer)} files are newer than their embeddings, which were kept, {newer[0]} first"
        print(f"{output}: {text}; delete it to embed all again.", file=sys.stderr)
    return skipped
