"""`hear-ssam search`: the clips of a collection that sound most like a recording."""

from __future__ import annotations

import argparse

from ..errors import HearSsamError
from ..options import add_device, add_model


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "search",
        help="the clips of a collection that are most like a recording",
        description="Rank the scenes, or windows, that `hear-ssam embed` wrote by their cosine to a recording's scene.",
        epilog="examples:\n  hear-ssam embed recordings/ -o windows --window 2\n"
        "  hear-ssam search windows call.wav\n  hear-ssam search embeddings.parquet call.wav -k 50",
    )
    parser.add_argument("embeddings", metavar="EMBEDDINGS", help="a file or folder of `hear-ssam embed`")
    parser.add_argument("query", metavar="QUERY", help="an audio file")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="how many (default 10)")
    add_model(parser, "where the model that made them is, if not under its name")
    add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print score, time and path, best first."""
    import numpy as np

    from ..embedding.clips import embed
    from .table import model_of, read_embeddings

    if args.k < 1:
        raise HearSsamError(f"-k {args.k}: asks for nothing; take 1 or more.")
    table = read_embeddings(args.embeddings)
    query = embed(args.query, model_of(table.made, args.embeddings, args.model, args.device))[0]
    cosine = table.x @ query / np.maximum(np.linalg.norm(table.x, axis=1) * np.linalg.norm(query), 1e-30)
    for index in np.argsort(-cosine, kind="stable")[: args.k]:
        start, end = table.starts[index] / 1000, table.ends[index] / 1000
        window = "" if np.isnan(start) else f"{start:.2f}-{end:.2f} s  "
        print(f"{cosine[index]:.4f}  {window}{table.paths[index]}")
    return 0
