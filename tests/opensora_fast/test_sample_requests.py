"""Files of requests: what each row means, and what each mistake is called."""

import csv
import io
import json
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.sample_requests import (
    BrokenRow,
    Given,
    SampleRequest,
    condition_of,
    given_files,
    read_requests,
    repeated,
)
from opensora_fast.sampling_settings import SamplingSettings
from opensora_fast.video_io import write_image, write_video


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with two images and a video."""
    monkeypatch.chdir(tmp_path)
    write_image("a.png", torch.zeros(3, 16, 16))
    write_image("b.png", torch.zeros(3, 16, 16))
    write_video("v.mp4", torch.zeros(3, 4, 16, 16), 24)
    return tmp_path


def read(folder, text, suffix=".csv", settings=None, **options):
    path = folder / f"list{suffix}"
    path.write_text(text)
    return read_requests(path, settings or {}, **options)


def test_the_released_columns(folder):
    rain, fox, sea = read(folder, 'text,ref\n"rain, fog",\na fox,a.png\nthe sea,a.png ; b.png\n')
    assert (rain.name, rain.prompt, rain.given, rain.settings) == (
        "list_0001",
        "rain, fog",
        Given(),
        SamplingSettings(),
    )
    assert (fox.given.condition, str(fox.given.image)) == ("i2v_head", "a.png")
    assert (sea.given.condition, str(sea.given.image), str(sea.given.last)) == ("i2v_loop", "a.png", "b.png")


def test_rows_come_before_the_command_line(folder):
    text = "prompt,neg,seed,oscillate_text,motion_score,name\nrain,fog,7,False,2,first\nsnow,,,,,\n"
    first, second = read(folder, text, settings={"seed": 3, "steps": 9}, negative_prompt="dark")
    assert (first.name, first.negative_prompt) == ("first", "fog")
    assert first.settings == SamplingSettings(seed=7, steps=9, oscillate_text=False, motion_score=2.0)
    assert (second.name, second.negative_prompt) == ("list_0002", "dark")
    assert second.settings == SamplingSettings(seed=3, steps=9)


@pytest.mark.parametrize(
    ("ref", "condition", "expected"),
    [
        ("a.png", None, Given(condition="i2v_head", image="a.png")),
        ("a.png", "i2v_tail", Given(condition="i2v_tail", last="a.png")),
        ("a.png;b.png", None, Given(condition="i2v_loop", image="a.png", last="b.png")),
        ("v.mp4", None, Given(condition="v2v_head", video="v.mp4")),
        ("v.mp4", "v2v_tail_easy", Given(condition="v2v_tail_easy", video="v.mp4")),
        ("v.mp4", "i2v_head", Given(condition="i2v_head", image="v.mp4")),
    ],
)
@pytest.mark.parametrize("by_row", [True, False])
def test_what_ref_is(ref, condition, expected, by_row, folder):
    if by_row:
        [request] = read(folder, json.dumps({"text": "x", "ref": ref, "condition": condition}), ".jsonl")
    else:
        [request] = read(folder, f"text,ref\nx,{ref}\n", condition=condition)
    found = request.given
    assert found.condition == expected.condition
    assert {name: str(path) for name, path in found.files().items()} == expected.files()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"seed": 1}, "has no prompt"),
        ({"text": "  "}, "has no prompt"),
        ({"text": 3}, "prompt=3: must be text"),
        ({"text": "x", "prompt": "y"}, "twice under two names"),
        ({"text": "x", "colour": "red"}, "column 'colour' is not known: use one of text, prompt, neg, ref"),
        ({"text": "x", "seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"text": "x", "seed": True}, "seed=True: must be a whole number"),
        ({"text": "x", "guidance": "strong"}, "guidance='strong': must be a number"),
        ({"text": "x", "oscillate_text": "maybe"}, "oscillate_text='maybe': must be true or false"),
        ({"text": "x", "steps": 0}, "steps=0: must be at least 1"),
        ({"text": "x", "height": 32}, "height=32 without width"),
        ({"text": "x", "ref": "no.png"}, "ref=no.png: no such file"),
        ({"text": "x", "ref": "a.png;b.png;a.png"}, "3 files where at most 2 are taken"),
        ({"text": "x", "ref": "a.png;b.png", "last": "b.png"}, "both are the last; keep one"),
        ({"text": "x", "ref": "a.png", "video": "v.mp4"}, "--video cannot be combined"),
        ({"text": "x", "last": "no.png"}, "--last no.png: no such file"),
        ({"text": "x", "condition": "i2v"}, "condition i2v: is not known"),
        ({"text": "x", "condition": "i2v_head"}, "condition i2v_head: is made of image and got no file"),
        ({"text": "x", "name": "../x"}, "must be the name of a file"),
        ({"text": "x", "name": ".x"}, "must be the name of a file"),
        ({"text": "x", "name": "first"}, "is that of row 1; give each row its own"),
        ({"text": "x", "name": "n" * 300}, "has 300 bytes; use at most 200"),
        ({"text": "x", "ref": "n" * 300}, "File name too long"),
        ({"text": "x", "seed": 10**30}, "seed=1000000000000000000000000000000"),
        ([1], "is no JSON object: [1]"),
        ({"text": "\ud800"}, "prompt='\\ud800': is no Unicode text"),
        ({"text": "x", "name": "\ud800"}, "name='\\ud800': is no Unicode text"),
        ({"text": "x", "ref": "\ud800.png"}, "is no Unicode text"),
    ],
)
def test_a_broken_row_is_one_of_its_own(row, message, folder):
    rows = [{"text": "rain", "name": "first"}, row, {"text": "snow"}]
    first, broken, last = read(folder, "\n\n".join(map(json.dumps, rows)), ".jsonl")
    assert (first.prompt, last.prompt, last.name) == ("rain", "snow", "list_0003")
    assert isinstance(broken, BrokenRow)
    assert str(broken.error).startswith(f"{folder / 'list.jsonl'}, row 2: ")
    assert message in str(broken.error)
    assert "\n" not in str(broken.error)


def test_lines_that_are_no_rows(folder):
    first, broken, last = read(folder, '{"text": "x"}\n{"text": \n{"text": "y"}\n', ".jsonl")
    assert "is no JSON" in str(broken.error)
    assert (first.prompt, last.prompt) == ("x", "y")
    for line in ('{"text": "x", "seed": ' + "9" * 5000 + "}", "[" * 100_000):
        first, broken, last = read(folder, f'{{"text": "x"}}\n{line}\n{{"text": "y"}}\n', ".jsonl")
        assert "is no JSON" in str(broken.error)
        assert (first.prompt, last.prompt) == ("x", "y")
    first, broken, last = read(folder, "text,seed\nx,1\nrain, fog, sun\ny\n")
    assert "has 3 cells for 2 columns; put cells with commas in quotes" in str(broken.error)
    assert (first.settings.seed, last.prompt) == (1, "y")
    first, broken = read(folder, 'text\nx\n"rain\nfog\n')
    assert "is no CSV" in str(broken.error)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.csv", None, "No such file"),
        ("list.txt", b"rain", "is read as .csv or .jsonl"),
        ("list.csv", b"text\n\xff\n", "is not UTF-8 (byte 5)"),
        ("list.csv", b"", "names no column text or prompt"),
        ("list.csv", b"text,text\n", "has column 'prompt' twice"),
        ("list.csv", b"text,path\nx,y\n", "column 'path' is not known"),
        ("list.csv", b'"text\n', "its header is no CSV"),
        ("list.csv", b"text\n\n", "holds no row"),
        ("list.jsonl", b"\n", "holds no row"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_requests(tmp_path / name, {})
    assert str(error.value).startswith(f"--prompts {tmp_path / name}: ")
    assert message in str(error.value)


def test_a_file_of_excel_is_read(folder):
    [request] = read(folder, "\ufefftext,seed\r\nnaïve café,4\r\n")
    assert (request.prompt, request.settings.seed) == ("naïve café", 4)


@given(
    prompts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(str.strip), min_size=1
    ),
    seed=st.integers(0, 2**40),
    guidance=st.floats(0, 100),
)
def test_both_formats_say_the_same(prompts, seed, guidance, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    rows = [{"text": prompt, "seed": seed, "guidance": guidance} for prompt in prompts]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["text", "seed", "guidance"])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "list.csv").write_text(table.getvalue(), newline="")
    (folder / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    both = [read_requests(folder / name, {}) for name in ("list.csv", "list.jsonl")]
    assert [request.prompt.strip() for request in both[0]] == [prompt.strip() for prompt in prompts]
    for one, other in zip(*both, strict=True):
        assert one.settings == other.settings == SamplingSettings(seed=seed, guidance=guidance)
        assert one.prompt.strip() == other.prompt.strip()


def test_samples_of_a_request_have_seeds_of_their_own():
    request = SampleRequest(name="a", prompt="x", settings=SamplingSettings(seed=4))
    assert repeated(request, 1) == [request]
    assert [(each.name, each.settings.seed) for each in repeated(request, 3)] == [("a_0", 4), ("a_1", 5), ("a_2", 6)]


def test_flux_is_an_image_that_is_still_to_come(folder):
    assert given_files(None, None, None, None, painted=True) == Given(condition="i2v_head")
    assert given_files(None, None, folder / "b.png", None, painted=True).condition == "i2v_loop"


def test_flux_paints_for_the_rows_that_can_have_an_image_and_give_none(folder):
    rows = [
        {"text": "x"},
        {"text": "x", "last": "b.png"},
        {"text": "x", "ref": "a.png"},
        {"text": "x", "ref": "v.mp4"},
        {"text": "x", "condition": "t2v"},
        {"text": "x", "last": "b.png", "condition": "i2v_tail"},
        {"text": "x", "frames": 1},
    ]
    requests = read(folder, "\n".join(map(json.dumps, rows)), ".jsonl", flux=True)
    conditions = [request.given.condition for request in requests]
    assert conditions == ["i2v_head", "i2v_loop", "i2v_head", "v2v_head", "t2v", "i2v_tail", "t2v"]
    assert [request.given.image is not None for request in requests] == [False, False, True, *[False] * 4]


def test_conditions_of_what_is_there():
    assert condition_of(set(), None) == "t2v"
    assert condition_of({"video"}, "v2v_tail") == "v2v_tail"
    with pytest.raises(UserError, match="a video cannot be combined with an image"):
        condition_of({"video", "image"}, None)
    with pytest.raises(UserError, match="condition t2v: is made of no file and got image and last"):
        condition_of({"image", "last"}, "t2v")


def test_every_setting_is_a_column(folder):
    values = asdict(SamplingSettings(height=32, width=48, motion_score=3.0))
    [request] = read(folder, json.dumps({"text": "x", **values}), ".jsonl")
    assert request.settings == SamplingSettings(**values)
    names = [field.name for field in fields(SamplingSettings)]
    [request] = read(folder, ",".join(["text", *names]) + "\nx," + ",".join(str(values[name]) for name in names) + "\n")
    assert request.settings == SamplingSettings(**values)
