"""The report: figures equal what the metrics say, the page stands alone, and text from files cannot become markup."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.conditions import CONDITIONS
from opensora_fast.errors import UserError
from opensora_fast.profiling.page import CONDITION_WORDS, duration, figure, percent
from opensora_fast.profiling.report import main, write_report
from opensora_fast.profiling.runs import find_runs
from opensora_fast.profiling.svg_chart import MAX_POINTS, Line, line_chart, thin
from opensora_fast.train.config import recipe_to_dict
from opensora_fast.train.recipes import find_recipe
from opensora_fast.video_io import write_video

REFERENCES = {
    "src",
    "href",
    "poster",
    "data",
    "action",
    "srcset",
    "xlink:href",
}  # attributes through which a page loads something


def _step_row(step: int) -> dict:
    seconds = 0.5 + 0.01 * (step % 7)
    return {
        "kind": "step",
        "step": step,
        "loss": 2 / (1 + step / 20) + 0.05 * (step % 3),
        "grad_norm": 3.0 / step,
        "lr": 1e-3,
        "step_seconds": seconds,
        "data_seconds": 0.02 + 0.001 * (step % 5),
        "tokens": 640,
        "tokens_per_second": 640 / seconds,
        "memory_gib": 1 + 0.01 * step,
        "bucket": "64px",
    }


def _write_run(folder: Path, recipe: str, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(recipe_to_dict(find_recipe(recipe))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _heldout(step: int, loss: float, **more: float) -> dict:
    return {"kind": "heldout", "step": step, "loss": loss, **more}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """An autoencoder run, a finished and an unfinished stage, a pair, and two samples, one of them without settings."""
    folder = tmp_path / "demo"
    quality = {"psnr_baseline": 14.3}
    ends = [_heldout(0, 0.5, psnr=9.1, **quality), _heldout(500, 0.125, psnr=21.7, **quality)]
    _write_run(folder / "ae", "demo_ae", [ends[0], *map(_step_row, range(1, 501)), ends[1]])
    _write_run(folder / "stage1", "demo_stage1", [_heldout(0, 2.0), *map(_step_row, range(1, 301)), _heldout(300, 0.5)])
    skipped = {"kind": "skipped", "step": 25, "loss": "nan", "grad_norm": "nan", "paths": ["a.mp4"]}
    _write_run(folder / "stage2", "demo_stage2", [_heldout(0, 0.75), *map(_step_row, range(1, 25)), skipped])
    video_CTHW = torch.linspace(-1, 1, 3 * 5 * 16 * 24).reshape(3, 5, 16, 24)
    for place in ("samples", "reconstructions"):
        (folder / place).mkdir()
    settings = {"prompt": 'a dog <script>alert(1)</script> & a "cat"', "seed": 7, "condition": "<i>t2v</i>"}
    write_video(folder / "samples" / "text.mp4", video_CTHW, 12, {"comment": json.dumps(settings)})
    write_video(folder / "samples" / "unknown.mp4", video_CTHW, 12)
    write_video(folder / "reconstructions" / "bikes-original.mp4", video_CTHW, 12)
    write_video(folder / "reconstructions" / "bikes-reconstruction.mp4", -video_CTHW, 12)
    (folder / "summary.json").write_text(json.dumps({"seconds": 3725.2, "psnr": 22.25, "psnr_baseline": 13.5}))
    return folder


class _Page(HTMLParser):
    """Tags with their attributes, and the text with single spaces."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def _read(folder: Path) -> tuple[str, _Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    return text, _Page(text)


def test_figures_are_those_of_the_metrics(demo: Path) -> None:
    rows = [_step_row(step) for step in range(1, 501)]
    losses = [row["loss"] for row in rows]
    seconds = sum(row["step_seconds"] for row in rows)
    run = find_runs(demo)[0]
    assert run.loss.start == pytest.approx(mean(losses[:10]))
    assert run.loss.end == pytest.approx(mean(losses[-50:]))
    assert run.loss.percent == pytest.approx(100 * (mean(losses[-50:]) / mean(losses[:10]) - 1))
    assert run.heldout_change("loss").percent == pytest.approx(-75)
    assert run.step_seconds == pytest.approx(median(row["step_seconds"] for row in rows))
    assert run.tokens_per_second == pytest.approx(500 * 640 / seconds)
    assert run.data_share == pytest.approx(sum(row["data_seconds"] for row in rows) / seconds)
    assert run.memory_gib == 6

    _, page = _read(demo)
    loss = f"{figure(run.loss.start)} → {figure(run.loss.end)} {percent(run.loss.percent)}".replace("\u00a0", " ")
    shown = [
        loss,
        "0.500 → 0.125 −75.0 %",
        "2.00 → 0.500 −75.0 %",
        figure(run.step_seconds),
        figure(run.tokens_per_second),
    ]
    shown += [
        f"{run.data_share:.1%}".replace("%", " %"),
        "6.00",
        "9.10 → 21.7 dB",
        "22.2 dB",
        "13.5 dB",
        "1 h 2 min 5 s",
    ]
    for words in shown:
        assert words in page.text, words


def test_every_run_clip_and_setting_is_on_the_page(demo: Path) -> None:
    _, page = _read(demo)
    for words in (
        "ae",
        "stage1",
        "stage2",
        "bikes",
        "text",
        "a dog",
        "encoder_widths [8, 32, 64, 64]",
        "hidden_size 192",
        "seed 7",
    ):
        assert words in page.text, words
    tags = [tag for tag, _ in page.tags]
    assert tags.count("video") == 4
    assert tags.count("img") == 4 * 5
    assert page.text.count("The file holds no settings.") == 1
    assert tags.count("svg") == 3 * 5  # loss, step time, throughput, gradient norm and learning rate of every run


def test_page_refers_to_nothing_outside_itself(demo: Path) -> None:
    text, page = _read(demo)
    loads = [value or "" for _, attributes in page.tags for name, value in attributes.items() if name in REFERENCES]
    assert len(loads) > 20
    assert all(value.startswith(("data:", "#")) for value in loads)
    anchors = {attributes.get("id") for _, attributes in page.tags}
    assert all(value[1:] in anchors for value in loads if value.startswith("#"))
    outside_data = re.sub(r"data:[^\"]*", "", text)
    assert not re.search(r"https?:|url\(|@import|<script|<link(?! rel=\"icon\")", outside_data)


def test_text_from_files_is_escaped(demo: Path) -> None:
    text, page = _read(demo)
    assert 'a dog <script>alert(1)</script> & a "cat"' in page.text
    assert not {"script", "i"} & {tag for tag, attributes in page.tags if "class" not in attributes}
    assert "&lt;i&gt;t2v" in text


def test_figures_from_a_cpu_say_so(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text, page = _read(demo)
    assert "CPU figures." in page.text
    assert text.count("seconds, CPU</text>") == text.count("tokens per second, CPU</text>") == 3
    assert f"torch {torch.__version__}" in page.text

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    text, page = _read(demo)
    assert "CPU figures." not in page.text
    assert "GPU (NVIDIA H200)" in page.text
    assert text.count("seconds, GPU</text>") == 3


def test_unfinished_runs_show_what_there_is(demo: Path) -> None:
    with open(demo / "stage2" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 26, "lo')  # a killed run
    _write_run(demo / "stage3", "demo_stage3", [])
    _, page = _read(demo)
    assert "unfinished: 25 of 100 steps" in page.text
    assert "1 of 25 steps, non-finite loss or gradient: 25" in page.text
    assert "0.750 → –" in page.text
    assert "unfinished: 0 of 300 steps" in page.text
    assert "No step has been recorded yet." in page.text


def test_folder_that_is_a_run_is_reported_alone(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(demo / "stage1")]) == 0
    assert capsys.readouterr().out == f"report {demo / 'stage1' / 'report.html'}\n"
    page = _Page((demo / "stage1" / "report.html").read_text())
    assert "shows the run in stage1 ." in page.text
    assert "Samples" not in page.text


def test_same_files_give_the_same_page(demo: Path) -> None:
    assert _read(demo)[0] == _read(demo)[0]


@pytest.mark.parametrize(
    "make", [lambda folder: None, lambda folder: folder.mkdir(), lambda folder: _recipe_alone(folder)]
)
def test_folder_without_a_run_is_a_user_error(tmp_path: Path, make) -> None:
    make(tmp_path / "empty")
    with pytest.raises(UserError, match=r"empty: .*name a run, or the folder that holds runs"):
        write_report(tmp_path / "empty")


def _recipe_alone(folder: Path) -> None:
    (_write_run(folder / "stage1", "demo_stage1", []) / "metrics.jsonl").unlink()


def test_pair_without_reconstruction_is_a_user_error(demo: Path) -> None:
    (demo / "reconstructions" / "bikes-reconstruction.mp4").unlink()
    with pytest.raises(UserError, match=r"bikes-reconstruction\.mp4"):
        write_report(demo)


def test_conditions_all_have_words() -> None:
    assert CONDITION_WORDS.keys() == CONDITIONS.keys()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(4, 50))
def test_thinned_lines_keep_order_and_extremes(values: list[float], limit: int) -> None:
    points = list(enumerate(values))
    kept = thin(points, limit)
    assert len(kept) <= limit
    assert all(a[0] < b[0] for a, b in pairwise(kept))
    assert set(kept) <= set(points)
    assert {min(values), max(values)} <= {y for _, y in kept}


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40), st.booleans())
def test_chart_is_xml_with_every_point_inside(values: list[float], from_zero: bool) -> None:
    line = Line(name="a < b", style="main", points=list(enumerate(values, 1)))
    chart = ElementTree.fromstring(line_chart([line], x_label="step", y_label="s", height=170, from_zero=from_zero))
    drawn = [path.get("d", "") for path in chart.iter("path") if path.get("class") == "line main"]
    places = [(float(x), float(y)) for path in drawn for x, y in re.findall(r"([\d.-]+) ([\d.-]+)", path)]
    places += [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in chart.iter("circle")]
    assert len(places) == len(values)
    assert all(0 <= x <= 460 and 0 <= y <= 170 for x, y in places)
    by_value = [y for _, (_, y) in sorted(zip(values, places, strict=True))]
    assert by_value == sorted(by_value, reverse=True)  # a larger value stands higher, and y grows downwards


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.53, 1.03], ["0.5", "0.6", "0.7", "0.8", "0.9", "1", "1.1"]),
        ([0.5, 30.0], ["0.5", "1", "2", "5", "10", "20"]),
        ([1.9999, 2.0], ["0", "0.5", "1", "1.5", "2"]),
        ([1e-5, 4.1e-5], ["1e-5", "2e-5", "3e-5", "4e-5", "5e-5"]),
        ([9_000, 31_000], ["5000", "10k", "15k", "20k", "25k", "30k", "35k"]),
    ],
)
def test_ticks_are_round_numbers(values: list[float], labels: list[str]) -> None:
    line = Line(name="loss", style="main", points=list(enumerate(values)))
    chart = ElementTree.fromstring(line_chart([line], x_label="step", y_label="loss", height=170))
    left = [text.text for text in chart.iter("text") if text.get("class") == "end" and text.get("x") == "48"]
    assert left == labels


def test_long_runs_stay_small() -> None:
    line = Line(name="loss", style="main", points=[(step, 1 / (step + 1)) for step in range(100_000)])
    assert line_chart([line], x_label="step", y_label="loss", height=300).count("L") < MAX_POINTS


def test_words_for_figures() -> None:
    assert [figure(value) for value in (None, 0.5, 12.345, 123.4, 1418.2, 0.0)] == [
        "–",
        "0.500",
        "12.3",
        "123",
        "1,418",
        "0.00",
    ]
    assert [percent(value) for value in (None, -81.94, 3.0, -0.01)] == [
        "–",
        "−81.9\u00a0%",
        "+3.0\u00a0%",
        "+0.0\u00a0%",
    ]
    assert [duration(value) for value in (0.2, 59.6, 3725.2)] == ["0 s", "1 min", "1 h 2 min 5 s"]
