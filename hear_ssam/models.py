"""`hear-ssam models list` and `hear-ssam convert`: which models there are, and official weights in our format."""

from __future__ import annotations

import argparse
import json


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

    rows = available_models()
    if args.json:
        table = {name: row._asdict() | {"weights": row.weights and str(row.weights)} for name, row in rows.items()}
        print(json.dumps(table, indent=2))
        return 0
    cells = [("name", "system", "parameters", "scene", "timestamp", "window", "weights", "licence")]
    for name, row in rows.items():
        sizes = f"{row.parameters:,}", str(row.scene_embedding_size), str(row.timestamp_embedding_size)
        window = f"{row.window_seconds:g} s" if row.window_seconds else "-"
        weights = "here" if row.weights else "official" if row.parameters else "none needed"
        cells.append((name, row.system, *sizes, window, weights, row.licence))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print("\nofficial: fetch the file, then load_model(FILE) or `hear-ssam convert FILE OUT`:")
    elsewhere = {row.system: row.source for row in rows.values() if row.parameters and not row.weights}
    for system, source in elsewhere.items():
        print(f"  {system:<8}{source}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .checkpoint import convert
    from .paths import sha256

    config, info = convert(args.input, args.output)
    print(f"{args.output}: {config.system}, width {config.embed_dim}, depth {config.depth}")
    print(f"  token order  {config.token_order} (load_model(..., token_order=...) overrides)")
    for key, value in info.items():
        print(f"  {key.replace('_', ' '):<13}{', '.join(value) or 'nothing' if isinstance(value, list) else value}")
    print(f"  sha256       {sha256(args.output)}")
    return 0
