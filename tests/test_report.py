"""Tables are views of records: means over seeds, intervals, directions, formats."""

import base64
import csv
import io
import json
import math
import pickle
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from hear_ssam import cli
from hear_ssam.evaluation import report
from hear_ssam.evaluation.records import append, embeddings_folder, predictions_file, read
from hear_ssam.evaluation.report import confusion_matrix, page, principal_components, read_predictions
from hear_ssam.evaluation.tables import (
    aggregates,
    comma_separated,
    interval,
    latex,
    markdown,
    tables,
    terminal,
)
from hear_ssam.evaluation.tasks import read_task

from .chromium import BROWSER, Chromium
from .tiny_tasks import write_task


def record(model, task, seed, score, *, metric="top1_acc", fold=None, maximize=True, digest="", protocol="ssam"):
    return {
        "model": model, "checkpoint_sha256": digest, "task": task, "version": "1", "protocol": protocol,
        "probe": "exact", "seed": seed, "fold": fold, "metric": metric, "score": score,
        "primary": metric != "mAP", "maximize": maximize,
    }  # fmt: skip


RECORDS = [
    *(record("ours", "birds", seed, score) for seed, score in enumerate((0.80, 0.84, 0.82))),
    *(record("ours", "birds", seed, 0.99, fold="fold00") for seed in range(3)),
    record("ours", "birds", 0, 0.11, metric="mAP"),
    record("theirs", "birds", 0, 0.79),
    record("ours", "doors", 0, 0.5, metric="segment_1s_er", maximize=False),
    record("theirs", "doors", 0, 0.25, metric="segment_1s_er", maximize=False),
    record("theirs", "waves", 0, 0.33),
    record("theirs", "waves", 1, None),
]


def test_interval_is_students():
    # t(0.975; 2) = 4.302653
    assert interval([0.80, 0.84, 0.82]) == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-6)
    assert interval([0.8]) is None


def test_what_was_judged_before_a_task_was_changed_is_no_seed_of_it():
    """Of another version, or by another score that led; whatever their order in the store."""
    older = [record(model, "birds", seed, 0.9) | {"time": "2026-01"} for model in ("ours", "theirs") for seed in (0, 1)]
    newer = record("ours", "birds", 0, 0.2) | {"version": "2", "time": "2026-02"}
    newest = record("ours", "birds", 0, 0.1, metric="chroma_acc") | {"version": "2", "time": "2026-03"}
    for records, score in (([newer, *older], 0.2), ([newest, newer, *older], 0.1)):
        (table,) = tables([*records, record("theirs", "doors", 0, 0.5)])
        assert table.cells["birds", "ours"].scores == (score,) and ("birds", "theirs") not in table.cells
        assert "results from before birds was changed are left out" in markdown(records)


def test_what_a_model_reached_before_it_was_changed_is_no_seed_of_it():
    """Two seeds of its earlier code, one of an edited task's labels, then one seed that is its own."""

    def made(seed, score, time, **origin):
        return record("ours", "birds", seed, score) | {"time": time, "embeddings": {"dim": 3, **origin}}

    older = [made(seed, 0.9, "2026-01", module_sha256="a", task_sha256="a") for seed in (1, 2)]
    edited = made(3, 0.5, "2026-02", module_sha256="b", task_sha256="a")
    newest = [made(seed, 0.1, "2026-03", module_sha256="b", task_sha256="b", seconds=seed) for seed in (4, 5)]
    (table,) = tables([*newest, edited, *older, record("theirs", "birds", 0, 0.5)])
    assert table.cells["birds", "ours"].scores == (0.1, 0.1) and ("birds", "theirs") in table.cells
    assert "results from before ours was changed are left out" in markdown([*older, *newest])


def test_a_cell_is_the_mean_over_seeds_of_the_task_score():
    (table,) = tables(RECORDS)
    assert table.tasks == {"birds": "top1_acc", "doors": "segment_1s_er", "waves": "top1_acc"}
    cell = table.cells["birds", "ours"]
    assert (cell.mean, len(cell.scores)) == (pytest.approx(0.82), 3)
    assert cell.half_width == interval([0.80, 0.84, 0.82])
    assert ("waves", "ours") not in table.cells
    assert table.cells["waves", "theirs"].scores == (0.33,)  # the score that is not finite does not count


def test_the_best_follows_the_direction_of_the_metric():
    (table,) = tables(RECORDS)
    assert table.best("birds") == "ours"
    assert table.best("doors") == "theirs"  # an error rate
    assert table.best("waves") is None  # no rival


def test_significance_is_welchs_test_against_the_best():
    scores = {"best": (0.80, 0.82, 0.84), "near": (0.79, 0.80, 0.84), "far": (0.50, 0.52, 0.51), "once": (0.83,)}
    records = [record(model, "birds", seed, s) for model, seeds in scores.items() for seed, s in enumerate(seeds)]
    (table,) = tables(records)
    assert table.best("birds") == "once"  # but one run says nothing about the spread
    assert not any(table.close_to_best("birds", model) for model in scores)
    (table,) = tables([r for r in records if r["model"] != "once"])
    assert [table.close_to_best("birds", model) for model in table.models] == [False, True, False]
    assert "≈ 81.0 ± " in markdown(records[:9])
    (table,) = tables([r for r in records if r["model"] in ("best", "near") and r["seed"] < 2])  # two are enough
    assert table.close_to_best("birds", "near")


def test_aggregates_follow_their_definitions():
    scores = {"logmel": (0.2, 0.4, 0.9), "a": (0.6, 0.3, 0.5), "b": (0.4, 0.8, 0.7)}
    (table,) = tables([record(m, f"t{i}", 0, s) for m, row in scores.items() for i, s in enumerate(row)])
    # task by task: a 1, 0 (below the baseline), 0; b 0.5, 1, 0 (nobody beats the baseline on the last)
    below = aggregates(table)
    assert below["s(m)"] == pytest.approx([0, 100 / 3, 50])
    assert below["rank"] == pytest.approx([(3 + 2 + 1) / 3, (1 + 3 + 3) / 3, (2 + 1 + 2) / 3])
    assert "baseline logmel, best of logmel, a, b" in terminal([*table.records])
    (table,) = tables([record(m, "t0", 0, score) for m, score in (("a", 0.6), ("b", 0.4))])
    assert list(aggregates(table)) == ["rank"]  # nobody is the baseline


def test_equal_means_share_their_mean_rank():
    scores = {"a": (0.5, 0.2), "b": (0.9, 0.2), "c": (0.5, 0.2), "d": (0.1, 0.7)}
    (table,) = tables([record(m, f"t{i}", 0, s) for m, row in scores.items() for i, s in enumerate(row)])
    # b, then a and c on places 2 and 3, then d; and d, then three on places 2 to 4
    assert aggregates(table)["rank"] == [(2.5 + 3) / 2, (1 + 3) / 2, (2.5 + 3) / 2, (4 + 1) / 2]


UNDEFINED = [record(model, "birds", seed, None) for model in ("ours", "theirs") for seed in (0, 1)]


@pytest.mark.parametrize("render", [terminal, markdown, latex])
def test_a_table_of_undefined_scores_is_shown(render):
    text = render(UNDEFINED)
    (row,) = (line for line in text.splitlines() if "birds" in line)
    assert row.count("--" if render is latex else "–") == 2
    assert "2 seeds" in text and "scores that are not finite are left out" in text and "rank" not in text


def test_an_undefined_task_stands_beside_the_others_and_counts_in_no_aggregate():
    waves = [record("ours", "waves", 0, None), record("theirs", "waves", 0, 0.3)]
    text = markdown([RECORDS[0], RECORDS[7], *waves])
    assert "| waves | top1_acc | – | 30.0 |" in text and "| rank | 1 task | 1.0 | 2.0 |" in text


def test_the_command_shows_undefined_scores(tmp_path, capsys):
    append(tmp_path / "records.jsonl", UNDEFINED)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "birds" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path), "--format", "html", "-o", str(tmp_path / "page.html")]) == 0
    assert "birds" in (tmp_path / "page.html").read_text()


def test_aggregates_count_only_tasks_that_every_model_has():
    (table,) = tables([record("logmel", "t0", 0, 0.5), record("a", "t0", 0, 0.6), record("a", "t1", 0, 0.9)])
    assert table.common_tasks == ["t0"]
    assert aggregates(table) == {"s(m)": [0, 100], "rank": [2, 1]}


def test_formats_mark_the_best_and_state_the_protocol():
    text = markdown(RECORDS)
    assert "| birds | top1_acc | **82.0 ± 5.0** | 79.0 |" in text
    assert "| doors | segment_1s_er | 0.50 | **0.25** |" in text
    assert "| waves | top1_acc | – | 33.0 |" in text
    text = terminal(RECORDS)
    assert "*82.0 ± 5.0*" in text and "Protocol ssam, probe exact, 1–3 seeds" in text
    assert "mean ± 95 % t-interval over seeds" in text and "scores that are not finite are left out" in text
    text = latex(RECORDS)
    assert r"birds & top1\_acc & \textbf{82.0 $\pm$ 5.0} & 79.0 \\" in text
    assert text.count("&") == 5 * 3
    odd = [record(model, "birds", 0, 0.5) for model in ("a|b", r"c\^<d>")]
    assert r"| task | metric | a\|b |" in markdown(odd)
    assert r"a|b & c\textbackslash{}\textasciicircum{}\textless{}d\textgreater{} \\" in latex(odd)
    equal = markdown([record(model, "birds", 0, 0.5) for model in ("ours", "theirs")])
    assert "| birds | top1_acc | **50.0** | **50.0** |" in equal  # whoever comes first is not the better one


def test_published_scores_stand_apart():
    records = [record("ours", "esc50-v2.0.0-full", 0, 0.99), record("theirs", "esc50-v2.0.0-full", 0, 0.1)]
    records.append(record("ours", "of one's own", 0, 0.5))
    text = markdown(records, published=True)
    header, _, row, *below = (line.split(" | ") for line in text.splitlines()[2:])
    assert row[header.index("SSAM-B †")] == "82.9" and row[2] == "**99.0**"
    assert "† published, not measured here" in text and "GRAM" in text
    assert all(line[header.index("SSAM-B †")] == "–" for line in below)


def test_published_scores_of_every_task_are_shown_and_change_nothing():
    names = [("maestro-v3.0.0-5h", "GURA Cat HuBERT+w2v2+CREPE", "46.9"), ("tfds_gtzan-1.0.0-full", "CED-mini", "90.3")]
    names += [("vocal_imitation-v1.1.3-full", "CED-base (supervised)", "22.7")]
    for task, model, score in names:
        records = [record(name, task, 0, value) for name, value in (("ours", 0.01), ("theirs", 0.005))]
        plain, beside = (markdown(records, published=shown) for shown in (False, True))
        header, _, row, *below = (line.split(" | ") for line in beside.splitlines()[2:])
        assert row[header.index(f"{model} †")] == score
        assert [line[:4] for line in (row, *below)] == [
            line.rstrip(" |").split(" | ") for line in plain.splitlines()[4:]
        ]


def test_checkpoints_of_one_name_and_protocols_are_kept_apart():
    records = [record("m", "birds", 0, 0.5, digest=letter * 64) for letter in "ab"]
    first, second = tables([*records, record("m", "birds", 0, 0.6, protocol="heareval")])
    assert first.models == ["m@aaaaaaaa", "m@bbbbbbbb"]
    assert (first.protocol, second.protocol) == ("ssam", "heareval")


def test_models_stand_in_one_order_in_all_tables():
    order = [("a", "ssam"), ("b", "ssam"), ("b", "heareval"), ("a", "heareval")]  # by who was finished first
    both = tables([record(model, "birds", 0, 0.5, protocol=protocol) for model, protocol in order])
    assert [table.models for table in both] == [["a", "b"]] * 2
    (table,) = tables([record("a", task, 0, 0.5) for task in ("waves", "birds", "doors")])
    assert list(table.tasks) == ["birds", "doors", "waves"]


def test_csv_has_fractions_and_marks_folds():
    rows = list(csv.DictReader(io.StringIO(comma_separated(RECORDS))))
    assert len(rows) == len(RECORDS)
    assert {"model", "task", "protocol", "seed", "metric", "score"} <= rows[0].keys()
    assert float(rows[0]["score"]) == 0.8
    assert [row["fold"] for row in rows[2:4]] == ["", "fold00"]
    assert rows[-1]["score"] == ""


# ---- what pictures show


def test_principal_components():
    rows = np.random.default_rng(0).standard_normal((40, 7)) @ np.diag([9, 5, 3, 1, 1, 0, 0]) + 100
    projected, shares = principal_components(rows, 3)
    np.testing.assert_allclose(projected.mean(0), 0, atol=1e-9)
    variance = rows.var(0, ddof=0).sum()
    np.testing.assert_allclose(projected.var(0) / variance, shares)
    np.testing.assert_allclose(np.corrcoef(projected.T), np.eye(3), atol=1e-9)
    assert (projected.max(0) == np.abs(projected).max(0)).all()
    again, _ = principal_components(-rows, 3)
    np.testing.assert_allclose(np.abs(again), np.abs(projected), atol=1e-9)


@pytest.mark.parametrize("rows", [np.ones((5, 4)), np.ones((1, 4)), np.arange(3.0)[:, None]])
def test_components_that_the_rows_do_not_have_are_zero(rows):
    projected, shares = principal_components(rows, 3)
    assert projected.shape == (len(rows), 3) and shares.shape == (3,)
    assert not projected[:, 1:].any() and not shares[1:].any()


def test_the_confusion_matrix_counts_every_test_clip(tmp_path):
    generator = np.random.default_rng(0)
    arrays, expected = {"labels": list("abcd"), "histories": "[]"}, np.zeros((4, 4), int)
    for fold in ("fold0", "fold1"):
        true, said = generator.integers(0, 4, (2, 30))
        arrays[f"{fold}/target"] = np.eye(4, dtype=np.float32)[true]
        arrays[f"{fold}/prediction"] = np.eye(4, dtype=np.float32)[said]
        for t, s in zip(true, said, strict=True):
            expected[t, s] += 1
    np.savez(tmp_path / "p.npz", **arrays)
    np.testing.assert_array_equal(confusion_matrix(read_predictions(tmp_path / "p.npz")), expected)


# ---- the page


@pytest.fixture
def results(tmp_path):
    """Records of two models on three tasks; for one task also what the pictures are drawn from."""
    rows = {"ours": (0.9, 0.2, 0.5), "theirs": (0.1, 0.8, 0.6)}
    tasks = ("birds", "doors", "waves")
    records = [
        record(model, task, seed, score + seed / 50)
        for model, row in rows.items()
        for task, score in zip(tasks, row, strict=True)
        for seed in (0, 1)
    ]
    append(tmp_path / "records.jsonl", records)
    generator = np.random.default_rng(0)
    histories = [[{"epoch": e, "val_loss": 1.0, "val_score": score} for e, score in ((2, 0.5), (5, math.nan))]]
    target = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    stored = predictions_file(tmp_path, records[0])
    stored.parent.mkdir(parents=True)
    arrays = {"test/target": target, "test/prediction": np.roll(target, 1, axis=1)}
    np.savez(stored, labels=["<a>", "b", "c"], histories=json.dumps(histories), **arrays)
    embeddings_folder(tmp_path, "ours", "", "doors").mkdir(parents=True)  # an unfinished one
    folder = write_task(embeddings_folder(tmp_path, "ours", "", "birds"), clips=7)
    (folder / ".done.embeddings").touch()
    for split in ("train", "valid", "test"):
        generator.random((7, 4), np.float32).tofile(folder / f"{split}.embeddings.npy")
        (folder / f"{split}.embedding-dimensions.json").write_text("[7, 4]")
        labels = json.loads((folder / f"{split}.json").read_text()).values()
        (folder / f"{split}.target-labels.pkl").write_bytes(pickle.dumps(list(labels)))
    return tmp_path


def test_the_page_finds_embeddings_that_were_given(results, tmp_path):
    folder = embeddings_folder(results, "ours", "", "birds").rename(tmp_path / "elsewhere")
    given = [{**r, "embeddings": {"folder": str(folder)}} for r in read(results) if r["task"] == "birds"]
    assert page(given, results).count("two principal components") == 2  # of both models


def test_the_page_draws_what_the_results_hold(results):
    assert cli.main(["report", str(results), "--format", "html", "-o", str(results / "page.html")]) == 0
    page = (results / "page.html").read_text()
    assert "http" not in page  # nothing is loaded
    assert "&lt;a&gt; → b: 1" in page and "<a>" not in page
    assert page.count("confusion matrix") == page.count("two principal components") == 1
    assert page.count("mean, 95 % interval") == 3
    assert "nan" not in page.partition("<script>")[0].lower()


def test_heads_of_a_single_epoch_are_drawn(results):
    stored = predictions_file(results, read(results)[0])
    histories = [[{"epoch": 0, "val_loss": 1.0, "val_score": 0.5}]]
    np.savez(stored, labels=["a"], histories=json.dumps(histories))
    assert "validation score of 1 heads" in page(read(results), results)


@pytest.fixture
def heard(results):
    """The results, with predictions of every test clip and the note of where the clips lie."""
    folder = embeddings_folder(results, "ours", "", "birds")
    (folder / "embeddings.json").write_text(json.dumps({"audio": {"test": str(folder / "16000" / "test")}}))
    clips = dict(read_task(folder).shuffled_clips())["test"]
    kinds = ["high", "low", "mid"]
    true = [kinds.index(kind) for clip in clips for kind in json.loads((folder / "test.json").read_text())[clip]]
    said = [2 if clip == "test-0.wav" else kind for clip, kind in zip(clips, true, strict=True)]
    arrays = {"test/target": np.eye(3, dtype=np.float32)[true], "test/prediction": np.eye(3, dtype=np.float32)[said]}
    np.savez(predictions_file(results, read(results / "records.jsonl")[0]), labels=kinds, histories="[]", **arrays)
    return results


def heard_in(page):
    """Title of each cell that plays → file names and addresses of its clips."""
    clips = json.loads(re.search(r"const clips = (.*?), player", page)[1])
    cells = re.findall(r'data-clips="([\d ]+)"[^>]*><title>([^<]*)', page)
    return {title: [clips[int(number)] for number in numbers.split()] for numbers, title in cells}


def test_what_cannot_be_read_is_left_out_of_the_page_and_said(heard, capsys):
    (embeddings_folder(heard, "ours", "", "birds") / "test.embeddings.npy").unlink()
    stored = predictions_file(heard, read(heard)[0])
    stored.write_bytes(stored.read_bytes()[:100])
    assert cli.main(["report", str(heard), "--format", "html", "-o", str(heard / "page.html")]) == 0
    assert "<figure>" not in (heard / "page.html").read_text()
    first, second = capsys.readouterr().err.splitlines()
    assert "test.embeddings.npy: cannot be read" in first and second.startswith(f"{stored}: BadZipFile")


def test_cells_play_the_clips_that_they_count(heard, monkeypatch):
    def command(output):
        assert cli.main(["report", str(heard), "--format", "html", "-o", str(output)]) == 0
        return heard_in(output.read_text())

    inside = command(heard / "page.html")
    audio = embeddings_folder(heard, "ours", "", "birds") / "16000" / "test"
    assert [name for name, _ in inside["high → mid: 1"]] == ["test-0.wav"]
    assert {name for name, _ in inside["high → high: 2"]} == {"test-3.wav", "test-6.wav"}  # 0, 3, 6 are high
    monkeypatch.setattr("mimetypes.guess_type", lambda path: (None, None))  # as for .ogg where no system file tells
    assert "data:None" not in str(command(heard / "page.html")) and command(heard / "page.html").keys() == inside.keys()
    for name, source in (clip for clips in inside.values() for clip in clips):
        assert base64.b64decode(source.partition(";base64,")[2]) == (audio / name).read_bytes()
    monkeypatch.setattr(report, "MOST_MB", 0.1)  # less than seven clips of 32 kB
    linked = command(heard / "below" / "page.html")
    for name, source in (clip for clips in linked.values() for clip in clips):
        assert (heard / "below" / source).resolve() == (audio / name).resolve()
    (audio / "test-1.wav").unlink()
    assert command(heard / "page.html") == {}


def test_the_page_shows_published_scores_and_where_results_come_from():
    made = {"module": "some.module", "audio_hz": [16000], "dim": 7, "dtype": "float32", "device": "cpu"}
    given = {**record("ours", "esc50-v2.0.0-full", 0, 0.99, digest="ab" * 32), "embeddings": made}
    text = page([given, record("theirs", "esc50-v2.0.0-full", 0, 0.1)], Path("nowhere"), published=True)
    (row,) = (part for part in text.split("<tr>") if "<td" in part and ">SSAM-B †<" in part)
    assert ">82.9<svg" in row and text.count("† published, not measured here: HEAR leaderboard CSV") == 1
    (row,) = (part for part in text.split("<tr>") if "some.module" in part)
    assert all(f">{value}<" in row for value in ("ours", "ab" * 32, "[16000]", "7", "float32"))


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium to open the page with")
def test_a_browser_sorts_plays_and_photographs_the_page(heard):
    """A click on a model's header puts the tasks in order of its scores, best first; one on a cell plays its clips."""
    assert cli.main(["report", str(heard), "--format", "html", "-o", str(heard / "page.html")]) == 0
    with Chromium(heard / "profile") as browser:
        browser.open(heard / "page.html")
        photos = [heard / "light.png", heard / "dark.png"]
        for photo in photos:
            browser.photograph(photo, photo.stem)
        light, dark = (plt.imread(photo)[-1, 0, :3] for photo in photos)  # the background
        assert light.min() > 0.9 and dark.max() < 0.2 and plt.imread(photos[0]).std() > 0.05

        def order():
            return browser.run("[...document.querySelector('tbody').rows].map(row => row.cells[0].textContent)")

        def heard_now():
            browser.run("new Promise(done => document.querySelector('audio').onplaying = done)")
            return browser.run("document.querySelector('output').textContent")

        browser.click("document.querySelectorAll('th button')[2]")
        assert order() == ["birds", "waves", "doors"]
        browser.press("Enter")  # the header that was clicked has the focus
        assert order() == ["doors", "waves", "birds"]
        assert browser.run("document.querySelectorAll('[aria-sort]').length") == 1
        browser.click("document.querySelector('[data-clips]')")
        first = heard_now()
        browser.press("ArrowRight")
        browser.press("ArrowLeft")
        browser.press("Enter")
        again = heard_now()
    assert first.startswith("high → high: 2, test-") and first.endswith("(1 of 2)") and again.endswith("(2 of 2)")


def test_the_command(tmp_path, capsys):
    append(tmp_path / "records.jsonl", RECORDS)
    assert cli.main(["report", str(tmp_path), "--format", "csv"]) == 0
    assert capsys.readouterr().out == comma_separated(RECORDS)
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "new" / "table.txt")]) == 0
    assert (tmp_path / "new" / "table.txt").read_text() == terminal(RECORDS)
    assert cli.main(["report", str(tmp_path), "--protocol", "heareval"]) == 2
    assert "holds no results of protocol heareval" in capsys.readouterr().err
