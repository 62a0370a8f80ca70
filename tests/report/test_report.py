"""`dla report`: what the page says about runs of every kind, and the page in a browser."""

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_dla.cli import main
from megatron_dla.report.charts import make_charts, thin
from megatron_dla.report.page import wanted_mix, write_page
from megatron_dla.report.record import read_record
from megatron_dla.report.svg import draw, short, ticks
from tests.support.chromium import needs_chromium, open_page
from tests.support.report_runs import START, log_step, write_run

OLD = Path(__file__).resolve().parents[1] / "fixtures/62bb8a7/trained"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "big <run>")


def lines_run(run: Path, *lines: str) -> Path:
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(lines))
    return run


def test_charts_have_what_the_run_logged(run: Path) -> None:
    charts = {chart.title: chart for chart in make_charts(read_record(run))}
    assert set(charts) == {
        "Loss", "Held-out text", "Held-out loss by source", "Learning rate", "Gradient norm", "Boundary rate by layer",
        "Merges of the newest two slots by layer", "Slots by their tokens", "Readout weight by slot",
        "Speed", "MFU", "Time waiting for data", "Memory", "Data mix", "Padding and cut documents",
    }  # fmt: skip
    raw, smooth, held_out = charts["Loss"].curves
    assert raw.points == [(step, log_step(step)["loss"]) for step in range(2, 401, 2)]
    assert len(smooth.points) == 200 and [x for x, _ in held_out.points] == list(range(0, 401, 50))
    layers = charts["Boundary rate by layer"].curves
    assert [curve.name for curve in layers] == [f"layer {i}" for i in range(8)]
    heads = log_step(100)["boundary_rate_by_head"][3]
    assert dict(layers[3].points)[100] == pytest.approx(sum(heads) / 4)
    assert [curve.name for curve in charts["Data mix"].curves] == ["web", "books", "code & <maths>"]


def test_time_line_tells_all_that_happened(run: Path) -> None:
    events = [(event.kind, event.step) for event in read_record(run).events]
    assert events == [
        ("start", 0), ("save", 60), ("save", 120), ("save", 180), ("hang", 186), ("fallback", 180), ("start", 180),
        ("anomaly", 223), ("save_failed", 240), ("save", 300), ("save", 360), ("save", 400), ("done", 400),
    ]  # fmt: skip
    texts = {event.kind: event.text for event in read_record(run).events}
    assert "steps 181 to 186 are repeated" in texts["start"] and "rank 3 on node02" in texts["hang"]
    assert "loss <spike>" in texts["anomaly"] and "skipped" in texts["anomaly"]
    (anomaly,) = (event for event in read_record(run).events if event.kind == "anomaly")
    assert anomaly.time == log_step(224)["time"]  # the first one logged after it
    assert read_record(run).status == ("good", "done")


def test_a_start_that_another_one_follows_without_a_word_was_killed(tmp_path: Path) -> None:
    run = lines_run(tmp_path / "run", json.dumps(log_step(1)), json.dumps(log_step(3)))
    starts = [{"event": "start", "step": step, "time": START + t, "attempt": str(t)} for step, t in ((0, 0), (2, 999))]
    (run / "events.jsonl").write_text("\n".join(map(json.dumps, starts)))
    found = [(event.kind, event.step, event.time) for event in read_record(run).events]
    assert found == [("start", 0, START), ("lost", 3, START + 210), ("start", 2, START + 999)]
    exits = run / "exits" / "999"
    exits.mkdir(parents=True)
    record = {"rank": 1, "host": "n2", "exitcode": 1, "message": "ZeroDivisionError", "time": START + 2000}
    (exits / "rank1.json").write_text(json.dumps(record))
    last = read_record(run).events[-1]
    assert last.kind == "exit" and "rank 1 on node n2" in last.text and "ZeroDivisionError" in last.text
    assert read_record(run).status[0] == "bad"


def test_a_step_that_stands_twice_is_the_later_one(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": loss} for step, loss in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 9.0))]
    run = lines_run(tmp_path / "run", *map(json.dumps, lines))
    record = read_record(run)
    assert [(m["step"], m["loss"]) for m in record.metrics] == [(1, 5.0), (2, 9.0)]
    assert [(event.kind, event.step) for event in record.events] == [("repeat", 2)]
    assert "from step 3 back to 2" in write_page(run).read_text()


DAMAGED = [
    "", '{"step": 1', "[]", '{"step": 1, "loss": 2.5}', '{"step": 0, "tokens": 0}', '{"step": "x"}\n{"loss": 1}\nnull',
    '{"step": 1, "loss": NaN, "lr": null, "boundary_rate_by_head": [[null], 3], "mix": {"a": null}, "time": "x"}',
    '{"step": 1, "loss": Infinity, "mix": [], "val_loss_by_source": 3}\n{"step": 2, "loss": 1, "grad_norm": -1}',
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_unfinished_and_damaged_runs_have_a_page(tmp_path: Path, text: str) -> None:
    run = lines_run(tmp_path / "run", text)
    for name in ("config.yaml", "command.json", "events.jsonl", "anomalies.jsonl", "heartbeat.json", "done"):
        assert "</html>" in write_page(run).read_text()
        (run / name).write_text(text or "{")
    assert "</html>" in write_page(run).read_text()


@pytest.mark.parametrize("name", ["mamba2", "gdn", "adapter"])
def test_runs_of_older_versions_have_a_page(tmp_path: Path, name: str) -> None:
    page = write_page(OLD / name, tmp_path / "page.html").read_text()
    assert 'data-title="Loss"' in page and ">save<" in page
    assert ('data-title="Write gate by layer"' in page) == (name == "adapter")


def test_texts_of_a_run_cannot_become_markup_and_secrets_stay_out(run: Path) -> None:
    page = write_page(run).read_text()
    assert "s3cret" not in page and "***" in page
    for text in ("<run>", "<spike>", "<maths>"):
        assert text not in page, text
    assert not re.findall(r"""(?:src|href|xlink:href)\s*=|url\(|@import|fetch\(|XMLHttp|import\(""", page)


def test_what_is_not_a_run_is_one_line(capsys: pytest.CaptureFixture, tmp_path: Path, run: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", run / "metrics.jsonl"):
        assert main(["report", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line and "metrics.jsonl" in line
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")


def test_wanted_mix_is_that_of_the_stage() -> None:
    data = {"sources": {"a": {"weight": 3}, "b": {}}, "stages": [{"from_tokens": 100, "weights": {"b": 2}}]}
    assert wanted_mix(data, 100) == {"a": 0.75, "b": 0.25} and wanted_mix(data, 101) == {"b": 1.0}
    assert wanted_mix({"sources": None, "stages": [3]}, 5) == {}


def test_long_runs_are_thinned_to_their_extremes() -> None:
    points = [(float(x), 1000.0 if x == 5003 else float(x % 7)) for x in range(100_000)]
    kept = thin(points)
    assert len(kept) <= 510 and (5003.0, 1000.0) in kept and kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_axes_have_round_numbers() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and ticks(17, 83, 4) == [20, 40, 60, 80] and ticks(3, 3) == [3]
    assert [short(x) for x in (0, 0.00012, 12.3456, 9999, 12345, 2e6, 3.5e9)] == [
        "0", "1.2e-4", "12.35", "9999", "12.35k", "2M", "3.5B"
    ]  # fmt: skip
    assert short(0.0567, "percent") == "5.67%" and short(3e-4, "power") == "3e-4"


def test_a_chart_of_one_point_and_of_a_spike(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 2.0, "grad_norm": 1e6 if step == 7 else 1.0} for step in range(1, 20)]
    run = lines_run(tmp_path / "run", *map(json.dumps, lines))
    charts = {chart.title: chart for chart in make_charts(read_record(run))}
    assert charts["Gradient norm"].log and "1M" in draw(charts["Gradient norm"], 0)
    one = lines_run(tmp_path / "one", json.dumps(lines[0]))
    assert "<circle" in draw(make_charts(read_record(one))[0], 0)


@needs_chromium
def test_the_page_in_a_browser(run: Path, tmp_path: Path) -> None:
    """It runs without an error, asks for nothing, and shows the curves."""
    opened = open_page(write_page(run, tmp_path / "report.html"), tmp_path)
    assert (opened.error, opened.requests, opened.console) == (None, 0, [])
    dom = opened.dom
    assert 'data-ready="yes"' in dom and "<title>big &lt;run&gt;: training report</title>" in dom
    for chart in make_charts(read_record(run)):
        (figure,) = re.findall(rf'<figure class="chart"[^>]*data-title="{chart.title}">.*?</figure>', dom, re.S)
        drawn = re.findall(r'<path class="curve[^"]*" style="[^"]*" d="M([^"]+)"', figure)
        assert len(drawn) == len(chart.curves) and all(len(path.split("L")) > 1 for path in drawn)
        assert "NaN" not in figure and 'class="tip"' in figure  # the script has found it
    assert dom.count('class="mark') == 13 and "NaN" not in dom


@needs_chromium
def test_the_browser_sees_errors_and_requests(run: Path, tmp_path: Path) -> None:
    """So that the test above can fail."""
    page = write_page(run, tmp_path / "report.html")
    text = page.read_text()
    for added in ("<script>nothing.there()</script>", '<img src="http://example.org/a.png">'):
        work = tmp_path / str(len(added))
        work.mkdir()
        page.write_text(text.replace("</main>", f"</main>{added}"))
        opened = open_page(page, work)
        assert opened.error is not None or opened.console
        assert (opened.requests > 0) == added.startswith("<img")
        shutil.rmtree(work)
