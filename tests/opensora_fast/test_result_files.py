"""Results that are there: whole, and of which request."""

import json
import os

import pytest
import torch

from opensora_fast.errors import UserError
from opensora_fast.result_files import digest, is_there, is_whole, weights_state
from opensora_fast.video_io import write_image, write_video

RECORD = {"prompt": "rain", "seed": 1, "scale": 7.5}


@pytest.fixture(params=["a.png", "a.mp4"])
def result(request, tmp_path):
    path = tmp_path / request.param
    pixels = torch.rand(3, 5, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    comment = {"comment": json.dumps(RECORD)}
    write_image(path, pixels[:, 0], comment) if path.suffix == ".png" else write_video(path, pixels, 24, comment)
    return path


def test_a_result_is_there_for_its_own_request(result):
    assert is_there(result, RECORD)
    with pytest.raises(UserError, match=r"is there of another request \(seed=1, not 2\)"):
        is_there(result, RECORD | {"seed": 2})
    with pytest.raises(UserError, match=r"\(image=None, not 'b.png'\)"):
        is_there(result, RECORD | {"image": "b.png"})
    assert not is_there(result.with_name("b.mp4"), RECORD)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_a_cut_result_is_not(share, result):
    data = result.read_bytes()
    result.write_bytes(data[: int(len(data) * share)])
    assert not is_whole(result)
    with pytest.raises(UserError, match=f"{result.name}: is there"):
        is_there(result, RECORD)


def test_every_length_but_the_whole_is_cut(result):
    data = result.read_bytes()
    assert is_whole(result)
    for length in {*range(0, len(data), 97), *range(64), *range(len(data) - 64, len(data))}:
        result.write_bytes(data[:length])
        assert not is_whole(result), length
    result.write_bytes(data + b"x")
    assert not is_whole(result)


def test_a_damaged_picture_is_not_whole(tmp_path):
    write_image(tmp_path / "a.png", torch.rand(3, 48, 48))
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    assert not is_whole(tmp_path / "a.png")


def test_a_file_of_somebody_else_is_told(result):
    result.write_bytes(b"no picture")
    with pytest.raises(UserError, match="does not say of which request"):
        is_there(result, RECORD)


def test_contents_are_told_apart(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b != c


def test_weights_that_are_written_anew_are_told(tmp_path):
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "w.safetensors"
    file.write_bytes(b"weights")
    os.utime(file, ns=(0, 10))
    states = [weights_state(path) for path in (file, file.parent)]
    assert states == [weights_state(path) for path in (file, file.parent)]
    os.utime(file, ns=(0, 20))
    assert all(weights_state(path) != state for path, state in zip((file, file.parent), states, strict=True))
