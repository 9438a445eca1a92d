"""`hear-ssam map`: all clips of a collection on one page, where near means similar; a click plays one."""

from __future__ import annotations

import argparse
import html
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..errors import HearSsamError
from ..paths import atomic_write

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

    from ..embedding.inputs import read_manifest
    from .table import read_embeddings

    table = read_embeddings(args.embeddings)
    labels = {}
    if args.labels:
        labels = {os.path.abspath(row["path"]): row["label"] for row in read_manifest(args.labels, "label")}
    chosen = np.sort(np.random.default_rng(0).permutation(len(table.x))[:MOST])
    if len(chosen) < 3:
        raise HearSsamError(f"{args.embeddings}: {len(chosen)} rows make no map; embed at least three clips.")
    places = _places(table.x[chosen], args.method)
    folder, points = Path(args.output).resolve().parent, []
    for index, (across, up) in zip(chosen, places, strict=True):
        path = os.path.abspath(table.paths[index])
        label = labels.get(path, "") if labels else os.path.basename(os.path.dirname(path))
        times = [] if np.isnan(table.starts[index]) else [table.starts[index] / 1000, table.ends[index] / 1000]
        points.append(
            [round(float(across), 4), round(float(up), 4), label, table.paths[index], _link(path, folder), *times]
        )
    words = (
        f"{len(chosen):,} of {len(table.x):,} clips of {Path(args.embeddings).name}, embedded by {table.made['model']}"
    )
    with atomic_write(args.output) as temporary:
        temporary.write_text(page(points, f"{words}; {args.method.upper()}"), "utf-8")
    print(f"{args.output}: {len(points):,} clips")
    return 0


def _places(x: np.ndarray, method: str) -> np.ndarray:
    """Rows (N, E) → (N, 2) in [0, 1]."""
    import numpy as np
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    x = StandardScaler().fit_transform(x)
    x = PCA(min(2 if method == "pca" else 50, *x.shape), random_state=0).fit_transform(x)
    if method == "tsne":
        x = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=0).fit_transform(x)
    x = np.pad(x, ((0, 0), (0, 2 - x.shape[1]))) if x.shape[1] < 2 else x
    return np.asarray((x - x.min(0)) / np.maximum(np.ptp(x, axis=0), 1e-30))


def _link(path: str, folder: Path) -> str:
    """The address of a file as seen from the page, empty where it is not there (members of tars)."""
    if not os.path.isfile(path):
        return ""
    try:
        return quote(Path(os.path.relpath(path, folder)).as_posix())
    except ValueError:  # another drive
        return Path(path).as_uri()


def page(points: list[list[object]], words: str) -> str:
    """The HTML page of points [x, y, label, name, address(, start, end in s)]."""
    count: dict[str, int] = {}
    for point in points:
        count[str(point[2])] = count.get(str(point[2]), 0) + 1
    shown = sorted(sorted(count, key=lambda label: -count[label])[:MOST_LABELS])
    hues = {label: f"hsl({360 * index // len(shown)} 70% 50%)" for index, label in enumerate(shown)}
    # "<" would end the script where a file is called </script>
    data = json.dumps({"points": points, "hues": hues}, ensure_ascii=False).replace("<", "\\u003c")
    keys = "".join(
        f'<button data-label="{html.escape(label)}"><i style="background: {hue}"></i>{html.escape(label or "(none)")} '
        f"{count[label]}</button>"
        for label, hue in hues.items()
    )
    body = f'<h1>{html.escape(words)}</h1><p id="now">Click a point to hear it.</p><audio id="audio" controls></audio>'
    drawing = f'<div id="map"><canvas id="canvas"></canvas><div id="tip" hidden></div></div><div id="keys">{keys}</div>'
    head = '<meta charset="utf-8"><title>Map of clips</title><meta name="viewport" content="width=device-width">'
    script = f"const data = {data};\n{_SCRIPT}"
    return (
        f'<!doctype html><html lang="en">{head}<style>{_STYLE}</style>{body}{drawing}<script>{script}</script></html>\n'
    )


_STYLE = """
:root { color-scheme: light dark; --bg: light-dark(#fff, #15181c); --fg: light-dark(#1c2024, #e6e8ea);
  --line: light-dark(#d5d8dc, #3c4148) }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 1100px; padding: 0 1rem;
  background: var(--bg); color: var(--fg) }
h1 { font-size: 1.1rem } #now { overflow-wrap: anywhere; margin: .3rem 0 } audio { width: 100%; height: 2.2rem }
#map { position: relative; height: min(75vh, 800px); border: 1px solid var(--line); margin: .7rem 0 }
canvas { width: 100%; height: 100%; display: block; cursor: pointer }
#tip { position: absolute; pointer-events: none; background: var(--fg); color: var(--bg); padding: .1rem .5rem;
  border-radius: 4px; font-size: .85rem; white-space: nowrap }
button { font: inherit; color: inherit; background: none; border: 0; margin-right: .7rem; cursor: pointer }
button.off { opacity: .3 } i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin: 0 .3em }
"""

_SCRIPT = """
const canvas = document.getElementById("canvas"), tip = document.getElementById("tip");
const audio = document.getElementById("audio"), now = document.getElementById("now"), hidden = new Set();
let chosen = null, until = Infinity;
const place = point => [10 + point[0] * (canvas.clientWidth - 20), 10 + (1 - point[1]) * (canvas.clientHeight - 20)];
function draw() {
  const scale = devicePixelRatio, pen = canvas.getContext("2d");
  canvas.width = canvas.clientWidth * scale; canvas.height = canvas.clientHeight * scale;
  pen.scale(scale, scale);
  for (const point of data.points) if (!hidden.has(point[2])) {
    const [x, y] = place(point), size = point === chosen ? 8 : data.points.length > 3000 ? 2 : 4;
    pen.fillStyle = data.hues[point[2]] ?? "#888";
    pen.beginPath(); pen.arc(x, y, size, 0, 7); pen.fill();
  }
}
function near(event) {
  let best = null, least = 15 ** 2;
  for (const point of data.points) if (!hidden.has(point[2])) {
    const [x, y] = place(point), far = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
    if (far < least) [best, least] = [point, far];
  }
  return best;
}
const words = point => point[3] + (point.length > 5 ? ` ${point[5].toFixed(2)}-${point[6].toFixed(2)} s` : "");
canvas.addEventListener("mousemove", event => {
  const point = near(event);
  tip.hidden = !point;
  if (!point) return;
  tip.textContent = (point[2] ? point[2] + ": " : "") + words(point).split("/").pop();
  const right = event.offsetX > canvas.clientWidth / 2;
  tip.style.left = right ? "auto" : event.offsetX + 12 + "px";
  tip.style.right = right ? canvas.clientWidth - event.offsetX + 12 + "px" : "auto";
  tip.style.top = Math.max(0, event.offsetY - 12) + "px";
});
canvas.addEventListener("mouseleave", () => tip.hidden = true);
canvas.addEventListener("click", event => {
  const point = near(event);
  if (!point) return;
  chosen = point; draw();
  now.textContent = words(point) + (point[4] ? "" : " (not a file of its own, cannot be played)");
  until = point[6] ?? Infinity;
  if (point[4]) { audio.src = point[4] + (point.length > 5 ? `#t=${point[5]},${point[6]}` : ""); audio.play(); }
});
audio.addEventListener("error", () => now.textContent += " (the browser cannot play it, or it was moved)");
audio.addEventListener("timeupdate", () => { if (audio.currentTime >= until) { audio.pause(); until = Infinity; } });
for (const button of document.querySelectorAll("#keys button")) button.addEventListener("click", () => {
  const label = button.dataset.label;
  if (!hidden.delete(label)) hidden.add(label);
  button.classList.toggle("off", hidden.has(label)); draw();
});
addEventListener("resize", draw); draw();
"""
