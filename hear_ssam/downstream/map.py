"""`hear-ssam map`: all clips of a collection on one page, where near means similar; a click plays one."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HearSsamError
from ..paths import link, write_whole

if TYPE_CHECKING:
    import numpy as np

MOST = 20_000  # points that a browser draws without delay
MOST_LABELS = 24


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "map",
        help="a page that shows a collection as points and plays what is clicked",
        description="One HTML file that loads nothing but the clip that is clicked, from where it lies.",
        epilog="examples:\n  hear-ssam map embeddings.parquet -o map.html\n"
        "  hear-ssam map windows -o map.html --method tsne --labels list.csv",
    )
    parser.add_argument("embeddings", metavar="EMBEDDINGS", help="a file or folder of `hear-ssam embed`")
    parser.add_argument("-o", "--output", required=True, metavar="PAGE.html")
    parser.add_argument("--method", choices=("pca", "tsne"), default="pca", help="default: pca; tsne takes minutes")
    parser.add_argument("--labels", metavar="CSV", help="colours by its columns path and label; default: by folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from ..embedding.inputs import identity, read_manifest
    from .table import read_embeddings

    table = read_embeddings(args.embeddings)
    labels = {}
    if args.labels:
        rows = read_manifest(args.labels, "label", known=set(table.paths))
        labels = {identity(row["path"]): row["label"] for row in rows}
        if labels.keys().isdisjoint(map(identity, set(table.paths))):
            raise HearSsamError(f"--labels {args.labels}: names none of the clips; its column path is to be theirs.")
    chosen = np.sort(np.random.default_rng(0).permutation(len(table.x))[:MOST])
    if len(chosen) < 3:
        raise HearSsamError(f"{args.embeddings}: {len(chosen)} rows make no map; embed at least three clips.")
    places = _places(table.x[chosen], args.method)
    folder, points = Path(args.output).resolve().parent, []
    for index, (across, up) in zip(chosen, places, strict=True):
        path = os.path.abspath(table.paths[index])
        label = labels.get(identity(path), "") if labels else os.path.basename(os.path.dirname(path))
        times = [] if np.isnan(table.starts[index]) else [table.starts[index] / 1000, table.ends[index] / 1000]
        place = round(float(across), 4), round(float(up), 4)
        points.append([*place, label, table.paths[index], link(path, folder), *times])
    words = f"{len(chosen):,} of {len(table.x):,} clips of {Path(args.embeddings).name}"
    words += f", embedded by {table.made['model']}; {args.method.upper()}"
    write_whole(args.output, page(points, words))
    silent = sum(not point[4] for point in points)
    note = f", {silent:,} of them silent: no files of these names are found from this folder" if silent else ""
    print(f"{args.output}: {len(points):,} clips{note}")
    return 0


def _places(x: np.ndarray, method: str) -> np.ndarray:
    """Rows (N, E) → (N, 2) in [0, 1]."""
    import numpy as np
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    if not np.ptp(x, axis=0).any():
        return np.full((len(x), 2), 0.5)  # all alike: scikit-learn would divide by their spread
    x = StandardScaler().fit_transform(x)
    x = PCA(min(2 if method == "pca" else 50, *x.shape), random_state=0).fit_transform(x)
    if method == "tsne":
        x = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=0).fit_transform(x)
    return np.asarray((x - x.min(0)) / np.maximum(np.ptp(x, axis=0), 1e-30))


def page(points: list[list[object]], words: str) -> str:
    """The HTML page (`map.html.j2`) of points [x, y, label, name, address(, start, end in s)]."""
    import jinja2

    count = Counter(str(point[2]) for point in points)
    shown = sorted(label for label, _ in count.most_common(MOST_LABELS))
    hues = {label: f"hsl({360 * index // len(shown)} 70% 50%)" for index, label in enumerate(shown)}
    text = Path(__file__).with_name("map.html.j2").read_text("utf-8")
    template = jinja2.Environment(autoescape=True).from_string(text)
    return template.render(words=words, count=count, hues=hues, data={"points": points, "hues": hues})
