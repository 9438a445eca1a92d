"""`hear-ssam models` and `hear-ssam convert`: which models there are, published weights here and in our format."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from .errors import HearSsamError, unknown_name


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = "The models that load_model and --model-options know by name."
    models = subparsers.add_parser("models", help="the table of models", description=description)
    commands = models.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = commands.add_parser(
        "list",
        help="name, size, embedding widths, window, licence, whether weights are here",
        epilog="examples:\n  hear-ssam models list\n  hear-ssam models list --json",
    )
    listing.add_argument("--json", action="store_true", help="one JSON object, name → row")
    listing.set_defaults(run=_list)
    fetching = commands.add_parser(
        "fetch",
        help="download published weights, check and convert them, once",
        description="Bring published weights into the cache folder, where load_model finds them by name ever after, "
        "without a network.",
        epilog="examples:\n  hear-ssam models fetch ssamba_tiny\n  hear-ssam models fetch ssamba_tiny.300 ssamba_base\n"
        "  hear-ssam models fetch all\n  hear-ssam models fetch ssam_base --from ssam_base_200_16x4_4x256_fp16_r1/",
    )
    fetching.add_argument("names", nargs="+", metavar="NAME", help="NAME or NAME.TAG, or all: every NAME on a server")
    text = "published weights that are on this machine already: a file or folder of the one NAME"
    fetching.add_argument("--from", dest="source", metavar="PATH", help=text)
    fetching.set_defaults(run=_fetch)
    for command in (listing, fetching):
        command.add_argument("--cache", metavar="DIR", help="default: $HEAR_SSAM_CACHE, else ~/.cache/hear_ssam")

    convert = subparsers.add_parser(
        "convert",
        help="official weights → one safetensors file",
        description="Write any readable checkpoint as safetensors with its config, source and licence inside. "
        "Nothing in the input is executed; embeddings stay bit-identical.",
        epilog="examples:\n"
        "  hear-ssam convert ssam_base_200_16x4_4x256_fp16_r1/ ssam_base.safetensors\n"
        "  hear-ssam convert ssamba_tiny_400.pth ssamba_tiny.safetensors",
    )
    convert.add_argument("input", metavar="IN", help="an official .pth file or weights folder, or one of our files")
    convert.add_argument("output", metavar="OUT", help="the safetensors file to write")
    convert.set_defaults(run=_convert)


def _list(args: argparse.Namespace) -> int:
    from .hear import available_models
    from .hub.weights import PUBLISHED, here

    rows = available_models(args.cache)
    if args.json:
        table = {name: row._asdict() for name, row in rows.items()}
        print(json.dumps(table, indent=2, default=lambda x: str(x) if isinstance(x, Path) else asdict(x)))
        return 0
    cells = [("name", "system", "parameters", "scene", "timestamp", "window", "weights", "licence")]
    drives = {}
    for name, row in rows.items():
        sizes = f"{row.parameters:,}", str(row.scene_embedding_size), str(row.timestamp_embedding_size)
        window = f"{row.window_seconds:g} s" if row.window_seconds else "-"
        weights, licence = "none needed", "-"
        if row.published:
            weights = "here" if row.weights else "download" if row.published.downloadable else "web drive"
            licence = row.published.origin.licence or "unknown"
            if weights == "web drive":
                drives[row.system] = row.published.origin.page
        cells.append((name, row.system, *sizes, window, weights, licence))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    others = [entry for entry in PUBLISHED if all(entry != row.published for row in rows.values())]
    labels = [entry.label + " (here)" * (here(entry, args.cache) is not None) for entry in others]
    print(f"\nother weights of these models: {', '.join(labels)}")
    print("download: `hear-ssam models fetch NAME`, or load_model(NAME), which fetches them")
    print("web drive: a browser fetches it; then load_model(FOLDER), or `hear-ssam models fetch NAME --from FOLDER`:")
    for system, page in drives.items():
        print(f"  {system:<8}{page}")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from .checkpoint import convert
    from .config import CONFIGS
    from .hub.weights import PUBLISHED, here, named, obtain

    every = "all" in args.names
    names = list(CONFIGS) if every else args.names
    if args.source and len(names) > 1:
        raise HearSsamError("--from: holds the weights of one model; give one NAME.")
    failed = 0
    for name in names:
        weights = named(name)
        if weights is None:
            raise unknown_name("weights", name, ["all", *CONFIGS, *(entry.label for entry in PUBLISHED)])
        if every and not weights.downloadable:
            print(f"{name}: {here(weights, args.cache) or weights.origin.page}")
            continue
        try:
            print(f"{name}: {obtain(weights, convert, args.cache, args.source)}")
        except HearSsamError as error:
            if len(names) == 1:
                raise
            print(f"hear-ssam: error: {error}", file=sys.stderr)
            failed = 1
    return failed


def _convert(args: argparse.Namespace) -> int:
    from .checkpoint import convert
    from .paths import sha256

    config, info = convert(args.input, args.output)
    print(f"{args.output}: {config.system}, width {config.embed_dim}, depth {config.depth}")
    print(f"  token order   {config.token_order} (load_model(..., token_order=...) overrides)")
    for key, value in info.items():
        if key not in ("data", "training"):  # pages, in files of ours
            print(f"  {key.replace('_', ' '):<14}{', '.join(value) or 'nothing' if isinstance(value, list) else value}")
    print(f"  sha256        {sha256(args.output)}")
    return 0
