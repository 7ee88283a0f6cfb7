"""Exact frames from every kind of stream, colours and sizes that survive, and errors that name the file.

Frame i of a synthetic video carries i as a row of eight black or white blocks along its top.
"""

import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from opensora_fast.errors import UserError
from opensora_fast.frame_sizes import covering_size
from opensora_fast.video_decoder import choose_decoder
from opensora_fast.video_io import (
    probe,
    read_clip,
    read_image,
    read_image_metadata,
    read_video_metadata,
    resize_crop,
    write_image,
    write_video,
)

FRAMES, HEIGHT, WIDTH = 60, 64, 96


def numbered_frames(count=FRAMES):
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    frames_THWC = np.full((count, HEIGHT, WIDTH, 3), 90, np.uint8)
    frames_THWC[:, 32:, :, 0] = (np.arange(count) * 4)[:, None, None]  # something that moves, so that B-frames are used
    frames_THWC[:, :16] = np.repeat(bits * 255, WIDTH // 8, axis=1)[:, None, :, None]
    return frames_THWC


def numbers(frames_THWC):
    _, _, width, _ = frames_THWC.shape
    blocks = frames_THWC[:, 4:12, :, 1].reshape(len(frames_THWC), 8, 8, width // 8)[..., 3:-3].mean((1, 3)) > 127
    return (blocks << np.arange(8)).sum(1).tolist()


def encode(path, codec="libx264", *, times=range(FRAMES), time_base=Fraction(1, 25), options=None, container=None):
    """A file made with FFmpeg alone, so that reading is not tested against our own writer."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = time_base
        for time, picture in zip(times, numbered_frames(len(times)), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


OPEN_GOP = {"x264-params": "open-gop=1:keyint=20:bframes=3:b-adapt=0:log-level=none"}
STREAMS = {
    "b_frames.mp4": {"options": OPEN_GOP},
    "late_start.mp4": {"options": OPEN_GOP, "times": range(70, 70 + FRAMES)},
    "varying_rate.mp4": {
        "options": OPEN_GOP,
        "times": [40 * i + 17 * (i // 3) for i in range(FRAMES)],
        "time_base": Fraction(1, 1000),
    },
    "fragmented.mp4": {"options": OPEN_GOP, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "late_start.mkv": {"options": OPEN_GOP, "times": range(70, 70 + FRAMES)},
    "transport.ts": {"options": OPEN_GOP},
    "no_display_times.avi": {"options": {"g": "12", "bf": "3"}},
    "program.mpg": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_range_gives_exactly_its_frames(tmp_path, name):
    path = encode(tmp_path / name, **STREAMS[name])
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (FRAMES, HEIGHT, WIDTH)
    everything = read_clip(path, 0, FRAMES)
    assert numbers(everything) == list(range(FRAMES))
    for start in (1, 17, 18, 19, 20, 21, 39, FRAMES - 7):
        np.testing.assert_array_equal(read_clip(path, start, 3, 3), everything[start : start + 7 : 3])


def test_only_the_range_is_decoded(tmp_path, monkeypatch):
    path = encode(tmp_path / "clip.mp4", options={"x264-params": "keyint=20:scenecut=0:bframes=0:log-level=none"})
    damaged = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packets = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    for position, size in packets[:15]:
        damaged[position + 8 : position + size] = bytes(size - 8)
    path.write_bytes(damaged)
    assert numbers(read_clip(path, 25, 10)) == list(range(25, 35))
    with pytest.raises(UserError, match=r"clip\.mp4: .*(cannot be read|damaged|frames decode)"):
        read_clip(path, 3, 4)


def test_written_video_is_read_back(tmp_path):
    video_CTHW = torch.from_numpy(numbered_frames()).permute(3, 0, 1, 2) / 127.5 - 1
    video_CTHW[:, :, 40:, 48:] = torch.tensor([-0.3, 0.25, 0.57])[:, None, None, None]
    metadata = {"comment": '{"prompt": "a café, 猫"}', "title": "cat", "seed": "7"}
    write_video(tmp_path / "a.mp4", video_CTHW, 24000 / 1001, metadata)
    write_video(tmp_path / "b.mp4", video_CTHW, 24000 / 1001, metadata)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert metadata.items() <= read_video_metadata(tmp_path / "a.mp4").items()
    assert probe(tmp_path / "a.mp4").fps == pytest.approx(24000 / 1001)
    frames_THWC = read_clip(tmp_path / "a.mp4", 0, FRAMES)
    assert numbers(frames_THWC) == list(range(FRAMES))
    colour = resize_crop(frames_THWC, (HEIGHT, WIDTH))[:, 30, 50, 70]
    torch.testing.assert_close(colour, torch.tensor([-0.3, 0.25, 0.57]), atol=0.03, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_png_keeps_pixels_and_text(tmp_path):
    picture_CHW = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_image(tmp_path / "a.png", picture_CHW, {"comment": "a café, 猫"})
    frames_THWC = read_image(tmp_path / "a.png")
    assert frames_THWC.shape == (1, 40, 56, 3)
    torch.testing.assert_close(resize_crop(frames_THWC, (40, 56))[:, 0], picture_CHW, atol=0.5 / 127.5 + 1e-6, rtol=0)
    assert probe(tmp_path / "a.png").num_frames == 1
    assert probe(tmp_path / "a.png").fps == 0
    data = (tmp_path / "a.png").read_bytes()
    place = data.index(b"iTXt")
    (length,) = struct.unpack(">I", data[place - 4 : place])
    record = data[place : place + 4 + length]
    assert record[4:] == b"comment\0\0\0\0\0" + "a café, 猫".encode()
    assert struct.unpack(">I", data[place + 4 + length :][:4]) == (zlib.crc32(record),)


def test_the_records_of_a_png_are_read_back(tmp_path):
    path = tmp_path / "a.png"
    records = {"comment": "a café, 猫", "title": ""}
    write_image(path, torch.zeros(3, 16, 16), records)
    assert read_image_metadata(path) == records
    path.write_bytes(path.read_bytes()[:-5])  # within the head of the last chunk
    for broken in (path, tmp_path / "nowhere.png"):
        with pytest.raises(UserError, match=f"{broken.name}: cannot be read"):
            read_image_metadata(broken)
    path.write_text("no picture")
    with pytest.raises(UserError, match=r"a.png: is no \.png"):
        read_image_metadata(path)


@pytest.mark.parametrize("size", [(32, 32), (24, 96), (128, 64), (31, 17)], ids=str)
def test_scaling_while_decoding_agrees_with_scaling_afterwards(tmp_path, size):
    path = encode(tmp_path / "clip.mp4")
    whole = resize_crop(read_clip(path, 3, 2), size)
    covered = resize_crop(read_clip(path, 3, 2, cover=size), size)
    assert whole.shape == covered.shape == (3, 2, *size)
    assert whole.dtype == torch.float32
    assert (whole - covered).abs().mean() < 0.02


@pytest.mark.parametrize("room", ["covering", "size"])
def test_frames_go_where_the_caller_wants_them(tmp_path, room):
    """Into memory of the caller's, all that covers the size or its centre alone; told stage by stage."""
    path, size, stages, asked = encode(tmp_path / "clip.mp4"), (24, 24), [], []
    memory = np.zeros((5, *(covering_size(HEIGHT, WIDTH, size) if room == "covering" else size), 3), np.uint8)

    def allocate(*shape):
        asked.append(shape)
        return memory

    given = read_clip(path, 7, 5, cover=size, allocate=allocate, on_stage=stages.append)
    assert given is memory
    assert asked == [(5, *covering_size(HEIGHT, WIDTH, size))]
    assert stages == ["open", "seek", "decode"]
    assert torch.equal(resize_crop(memory, size), resize_crop(read_clip(path, 7, 5, cover=size), size))


def test_an_image_goes_where_the_caller_wants_it(tmp_path):
    write_image(tmp_path / "a.png", torch.rand(3, 40, 56) * 2 - 1)
    memory, stages = np.zeros((1, 16, 16, 3), np.uint8), []
    read_image(tmp_path / "a.png", cover=(16, 16), allocate=lambda *shape: memory, on_stage=stages.append)
    whole = read_image(tmp_path / "a.png", cover=(16, 16))
    assert torch.equal(resize_crop(memory, (16, 16)), resize_crop(whole, (16, 16)))
    assert stages == ["open", "decode"]


def test_the_choice_of_a_decoder_is_explained():
    choice = choose_decoder()
    assert choice.name in ("torchcodec", "PyAV")
    assert choice.reason.startswith("torchcodec ")


needs_torchcodec = pytest.mark.skipif(choose_decoder().name != "torchcodec", reason=choose_decoder().reason)


@needs_torchcodec
@pytest.mark.parametrize("name", STREAMS)
def test_torchcodec_gives_the_same_frames(tmp_path, name):
    path = encode(tmp_path / name, **STREAMS[name])
    for start in (0, 1, 17, 20, 39, FRAMES - 7):
        assert numbers(read_clip(path, start, 3, 3, decoder="torchcodec")) == list(range(start, start + 9, 3))
    covered = [read_clip(path, 7, 5, cover=(32, 48), decoder=name).astype(int) for name in ("torchcodec", "PyAV")]
    assert np.abs(covered[0] - covered[1]).mean() < 2


@needs_torchcodec
def test_torchcodec_s_frames_of_another_time_are_never_handed_on(tmp_path):
    path = encode(tmp_path / "clip.mp4", options={"x264-params": "keyint=20:scenecut=0:bframes=0:log-level=none"})
    with av.open(str(path)) as file:
        packets = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    damaged = bytearray(path.read_bytes())
    for position, size in packets[:15]:
        damaged[position + 8 : position + size] = bytes(size - 8)
    path.write_bytes(damaged)
    assert numbers(read_clip(path, 25, 10, decoder="torchcodec")) == list(range(25, 35))
    with pytest.raises(UserError, match=r"clip\.mp4: .*(cannot be read|damaged)"):
        read_clip(path, 3, 4, decoder="torchcodec")


def test_shrinking_averages_instead_of_skipping():
    stripes_THWC = np.zeros((1, 64, 64, 3), np.uint8)
    stripes_THWC[:, :, ::2] = 255
    video_CTHW = resize_crop(stripes_THWC, (8, 8))
    assert video_CTHW.abs().max() < 0.05  # grey, where plain bilinear sampling gives stripes or a flat black or white


def test_the_centre_is_cut_out():
    picture_THWC = np.zeros((1, 10, 30, 3), np.uint8)
    picture_THWC[:, :, 10:20] = 255
    assert (resize_crop(picture_THWC, (10, 10)) == 1).all()


@pytest.mark.parametrize(("degrees", "corner"), [(90, (-4, 4)), (-90, (4, -4)), (180, (-4, -4))])
def test_rotated_recordings_are_set_upright(tmp_path, degrees, corner):
    picture_HWC = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture_HWC[:16, :24] = 255  # top left as stored
    with av.open(str(tmp_path / "phone.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(2):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")))
        file.mux(stream.encode())
    shown = (WIDTH, HEIGHT) if degrees % 180 else (HEIGHT, WIDTH)
    info = probe(tmp_path / "phone.mp4")
    assert (info.height, info.width) == shown
    picture_HWC = read_clip(tmp_path / "phone.mp4", 1, 1)[0]
    assert picture_HWC.shape[:2] == shown
    assert picture_HWC[corner].min() > 200
    assert picture_HWC.mean() < 40


def test_unusable_files_are_named_with_the_reason(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    clip = encode(tmp_path / "clip.mp4")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    for path in (tmp_path / "missing.mp4", text, cut, tmp_path):
        for attempt in (lambda path=path: probe(path), lambda path=path: read_clip(path, 0, 1)):
            with pytest.raises(UserError, match=f"{path}: cannot be read: .+;"):
                attempt()
    with pytest.raises(UserError, match=f"clip.mp4: frame {FRAMES + 3} was asked for but it has {FRAMES}"):
        read_clip(clip, FRAMES - 5, 9)


def test_what_cannot_be_written_is_said(tmp_path):
    video_CTHW = torch.zeros(3, 2, 32, 32)
    with pytest.raises(UserError, match=r"\.mp4; change"):
        write_video(tmp_path / "a.avi", video_CTHW, 24)
    with pytest.raises(UserError, match="even height and width"):
        write_video(tmp_path / "a.mp4", video_CTHW[..., :31], 24)
    with pytest.raises(UserError, match=r"none/a\.mp4: cannot be written: No such file"):
        write_video(tmp_path / "none" / "a.mp4", video_CTHW, 24)
    with pytest.raises(UserError, match=r"\.png from \[3, H, W\]"):
        write_image(tmp_path / "a.png", video_CTHW)
    assert list(tmp_path.iterdir()) == []
