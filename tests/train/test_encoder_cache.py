"""Caches: equal to the encoders, whole after any interruption, and named when something is wrong."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from opensora_fast import cli
from opensora_fast.autoencoder import StoredLayout
from opensora_fast.conditions import encoded_pieces, possible
from opensora_fast.config import HunyuanVAEConfig
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT
from opensora_fast.train import cache_encoding, cache_plan, cache_settings, cache_store, diffusion_inputs, encoder_cache
from opensora_fast.train.bucket_sampler import BatchPlan, BucketSampler
from opensora_fast.train.buckets import Draw
from opensora_fast.train.cache_plan import KEY, Clips, plan_cache, prompt_keys
from opensora_fast.train.cache_reader import EncoderCache
from opensora_fast.train.cache_settings import (
    SAMPLE_BYTES,
    AutoencoderRecord,
    CacheSettings,
    TextRecord,
    adopt,
    fingerprint,
    parse_settings,
)
from opensora_fast.train.cache_store import KINDS, RowTable, ShardWriter, open_tables, piece_name, shard_paths
from opensora_fast.train.cached_loader import cached_feeds
from opensora_fast.train.config import DiffusionRecipe
from opensora_fast.train.dataset import decode_clip, exactly, read_request
from opensora_fast.train.diffusion import VelocityTask
from opensora_fast.train.diffusion_inputs import load_encoders
from opensora_fast.train.encoder_cache import cache_encoders
from opensora_fast.train.index import index_folder, read_index
from opensora_fast.train.launch import override, run_recipe
from opensora_fast.train.loader import Batch
from opensora_fast.train.metrics import read_metrics
from opensora_fast.train.recipes import IMAGE_TO_VIDEO, find_recipe
from opensora_fast.video_decoder import Decoder, choose_decoder
from opensora_fast.video_io import to_signed, write_image, write_video

CPU = torch.device("cpu")
SMALL = ["--model.hidden_size", "32", "--model.num_heads", "1", "--model.axes_dim", "8", "12", "12"]
SMALL += ["--model.depth", "1", "--model.depth_single_blocks", "1", "--loop.device", "cpu", "--data.workers", "1"]
BUCKETS = {"64px": {16: ((1.0, 0.5), 1), 8: (1.0, 1), 1: (1.0, 1)}}
HUNYUAN_SECTION = {"kind": "hunyuan", "config": HunyuanVAEConfig(), "untrained_seed": None}


def waves(number: int, frames: int = 34) -> Tensor:
    time, row, column = torch.meshgrid(
        torch.arange(frames) / 4, torch.arange(64) / 20, torch.arange(80) / 20, indexing="ij"
    )
    return torch.stack([torch.sin(row * number + column + time + shade) for shade in range(3)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clips.parquet of three videos and an image (two of equal captions), heldout.parquet of one more video."""
    folder = tmp_path_factory.mktemp("clips")
    for split, numbers in (("clips", range(3)), ("heldout", [3])):
        (folder / split).mkdir()
        for number in numbers:
            write_video(folder / split / f"{number}.mp4", waves(number), 12)
            (folder / split / f"{number}.txt").write_text(f"waves of kind {min(number, 1)}")
    write_image(folder / "clips" / "still.png", waves(5)[:, 0])
    for split in ("clips", "heldout"):
        index_folder(folder / split, folder / f"{split}.parquet")
    return folder


def small(folder: Path, **changes) -> DiffusionRecipe:
    """demo_stage2 on the clips of `folder` and a model small enough for a test; `changes` of its data section."""
    recipe = find_recipe("demo_stage2")
    sizes = {"hidden_size": 32, "num_heads": 1, "axes_dim": (8, 12, 12), "depth": 1, "depth_single_blocks": 1}
    data = {"index": str(folder / "clips.parquet"), "heldout_index": str(folder / "heldout.parquet")}
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, **sizes),
        data=dataclasses.replace(recipe.data, **data | {"buckets": BUCKETS, "workers": 1} | changes),
        loop=dataclasses.replace(recipe.loop, device="cpu"),
    )


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of `small`, made with its real encoders, one clip and one prompt at a time."""
    out = tmp_path_factory.mktemp("cache")
    cache_encoders(small(folder), out, shard_bytes=20_000, prompts_at_once=1)
    return out


def feeds(cache: Path, recipe: DiffusionRecipe):
    opened = EncoderCache.open(cache)
    recipe = adopt(recipe, opened.settings, cache)
    return cached_feeds(opened, recipe, multiple=16, device=CPU)


class Cells(nn.Module):
    """An autoencoder of 4 x 8 x 8 whose latent is a cell's mean colour, eight times over; NaN for a black clip."""

    latent_channels, compression, causal = 16, (4, 8, 8), False

    def __init__(self) -> None:
        super().__init__()
        self.encoded = 0

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        self.encoded += len(video_BCTHW)
        frames = min(4, video_BCTHW.shape[2])
        cells = nn.functional.avg_pool3d(video_BCTHW.mean(dim=1, keepdim=True), (frames, 8, 8))
        cells = cells.expand(-1, 16, -1, -1, -1)
        black = video_BCTHW.amax(dim=(1, 2, 3, 4)) < -0.9
        return torch.where(black[:, None, None, None, None], torch.nan, cells)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return max(frames // 4, 1), height // 8, width // 8


class Letters(nn.Module):
    """A text encoder that spells."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.prompts = shape, []

    def forward(self, prompts: list[str]) -> Tensor:
        self.prompts += prompts
        rows = [[float(ord(letter)) for letter in prompt[:32].ljust(32)] for prompt in prompts]
        return torch.tensor(rows).mean(1).view(-1, *[1] * len(self.shape)).expand(-1, *self.shape)


def decode_here(requests, **_):
    """`decode_in_order` without processes."""
    for request in requests:
        try:
            yield read_request(request, decoder=choose_decoder().name, allocate=exactly(request))
        except UserError as error:
            yield error


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Encoders that cost nothing, decoding in this process; the list holds every encoder that is loaded."""
    loaded: list[nn.Module] = []

    def load(make):
        loaded.append(make())
        return loaded[-1]

    for module in (encoder_cache, cache_encoding):
        monkeypatch.setattr(module, "load_autoencoder", lambda *_: load(Cells))
    lengths = {"load_t5": (64, 64), "load_clip": (32,)}
    for name, shape in lengths.items():
        monkeypatch.setattr(cache_encoding, name, lambda *_, shape=shape, **__: load(lambda: Letters(shape)))
    monkeypatch.setattr(cache_encoding, "decode_in_order", decode_here)
    return loaded


@pytest.fixture
def weights(tmp_path: Path) -> dict:
    """Sections that name files which stand for weights."""
    for name in ("ae", "t5", "clip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.bin").write_text(f"those of {name}")
    recipe = find_recipe("demo_stage2")
    return {
        "autoencoder": dataclasses.replace(recipe.autoencoder, weights=str(tmp_path / "ae")),
        "text": dataclasses.replace(recipe.text, t5=str(tmp_path / "t5"), clip=str(tmp_path / "clip")),
    }


def decoded_batch(recipe: DiffusionRecipe, plan: BatchPlan, cache: EncoderCache, *, drawn: bool = True) -> Batch:
    """What an uncached loader would give with the starts that the cache has."""
    sources = plan_cache(recipe.data, multiple=16).sources
    source = sources[0 if drawn else 1]
    keys = source.latent_keys(np.asarray(plan.indices), plan.bucket)
    records = [source.clips[index] for index in plan.indices]
    draw = Draw(seed=cache.settings.seed, epoch=0) if drawn else None
    pixels = [
        decode_clip(record, plan.bucket, draw, *map(int, key.item()), fps_max=recipe.data.fps_max)
        for record, key in zip(records, keys, strict=True)
    ]
    return Batch(
        video_BCTHW=to_signed(torch.stack(pixels)),
        text=[record.text for record in records],
        fps=torch.tensor([record.fps for record in records]),
        motion=[record.score_vmafmotion for record in records],
        paths=[record.path for record in records],
        plan=plan,
    )


def tasks(whole: Path, recipe: DiffusionRecipe, condition: str) -> tuple[VelocityTask, VelocityTask]:
    """(reading, encoding), of one model, with this condition for every clip that is long enough."""
    cache = EncoderCache.open(whole)
    recipe = dataclasses.replace(adopt(recipe, cache.settings, whole), condition_weights={condition: 1.0})
    torch.manual_seed(0)
    model = MMDiT(recipe.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return (
        VelocityTask(recipe, model, None, None, CPU, torch.float32, layout=cache.settings.layout),
        VelocityTask(recipe, model, *load_encoders(recipe, CPU, torch.float32), CPU, torch.float32),
    )


@pytest.mark.parametrize("condition", ["t2v", "i2v_head", "i2v_tail", "i2v_loop"])
def test_a_cached_batch_is_what_the_encoders_give(condition: str, folder: Path, whole: Path) -> None:
    """Bit for bit, since `whole` is made one by one and a batch is of one clip here: equal batches give equal bits.

    But for i2v_loop, whose head and tail are encoded in one call, and in two for the cache: they are equal within
    rounding.
    """
    reading, encoding = tasks(whole, small(folder), condition)
    loader, heldout = feeds(whole, small(folder, pinned_gib=0.01))
    cache = EncoderCache.open(whole)
    batches = {batch.plan.bucket.frames: batch for batch in itertools.islice(loader, 16)}
    assert batches.keys() == {16, 8, 1}
    for frames, batch in batches.items():
        other = decoded_batch(reading.recipe, batch.plan, cache)
        assert other.video_BCTHW.shape == batch.video_BCTHW.shape
        drawn = [condition if possible(condition, frames, causal=False) else "t2v"]
        for keep in (True, False):
            keep_2B = torch.tensor([[keep], [not keep]])
            ours = reading._stored_batch(batch.encoded, drawn, keep_2B)
            theirs = encoding._encode_batch(other, drawn, keep_2B)
            for one, two in zip(ours[:3], theirs[:3], strict=True):
                assert torch.equal(one, two)
            if drawn == ["i2v_loop"]:
                torch.testing.assert_close(ours[3], theirs[3])
            else:
                assert torch.equal(ours[3], theirs[3])
        ours, theirs = (
            task.loss(each, torch.Generator().manual_seed(0)) for task, each in ((reading, batch), (encoding, other))
        )
        assert ours[1] == theirs[1]
        if drawn == ["i2v_loop"]:
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
        else:
            assert ours[0] == theirs[0]
    loader.close()
    if condition == "i2v_head":
        decoded = [decoded_batch(reading.recipe, batch.plan, cache, drawn=False) for batch in heldout]
        assert reading.evaluate(heldout) == encoding.evaluate(decoded)


def csv_index(folder: Path, name: str, rows: list[str], header: str = "path,text,num_frames,height,width,fps") -> Path:
    (folder / name).write_text("\n".join([header, *rows, ""]))
    return folder / name


def test_clips_of_equal_names_in_two_folders_have_keys_of_their_own(tmp_path: Path) -> None:
    keys = []
    for name, content in (("one", b"1234"), ("two", b"12345"), ("three", b"abcd")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.mp4").write_bytes(content)
        asked = csv_index(tmp_path / name, "asked.csv", ["0.mp4,a,33,256,256,24"])
        size = len(content)
        header = "path,text,num_frames,height,width,fps,bytes"
        told = csv_index(tmp_path / name, "told.csv", [f"0.mp4,a,33,256,256,24,{size}"], header)
        keys.append(Clips.read(str(asked), drawn=True).keys_N[0])
        assert Clips.read(str(told), drawn=True).keys_N[0] == keys[-1]  # with the index's column or without
        (tmp_path / name / "0.mp4").unlink()
        assert Clips.read(str(told), drawn=True).keys_N[0] == keys[-1]
        assert Clips.read(str(asked), drawn=True).keys_N[0] != keys[-1]
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]  # equal in name, measures and bytes


def test_keys_do_not_depend_on_how_many_are_made_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan_cache(small(folder).data, multiple=16)
    monkeypatch.setattr(cache_plan, "_AT_ONCE", 3)
    parts = plan_cache(small(folder).data, multiple=16)
    assert whole.sources[0].keys_N.tolist() == parts.sources[0].keys_N.tolist()
    assert whole.prompt_keys_P.tolist() == parts.prompt_keys_P.tolist()
    prompts = [parts.prompt(position) for position in range(len(parts.prompt_keys_P))]
    assert prompts == ["", "waves of kind 0. 12 FPS.", "waves of kind 1. 12 FPS."]
    assert prompt_keys(prompts).tolist() == parts.prompt_keys_P.tolist()


def test_a_file_that_was_replaced_is_left_out_until_it_is_indexed_again(
    folder: Path, weights: dict, tmp_path: Path, stand_ins
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(2):
        write_video(clips / f"{number}.mp4", waves(number), 12)
    index = tmp_path / "clips.parquet"
    index_folder(clips, index)
    recipe = dataclasses.replace(small(folder, index=str(index), heldout_index=None), **weights)
    old = (clips / "1.mp4").stat().st_size
    write_video(clips / "1.mp4", waves(9) / 2, 12)
    new = (clips / "1.mp4").stat().st_size
    assert new != old
    report = cache_encoders(recipe, tmp_path / "cache")
    reason = f"it has {new} bytes, {old} when it was indexed: make the index again"
    assert {(Path(path).name, said) for _, path, said in report.dropped} == {("1.mp4", reason)}
    index_folder(clips, index)
    with pytest.raises(UserError, match=r"lacks 2 of 4 latents .*1\.mp4"):
        feeds(tmp_path / "cache", recipe)
    again = cache_encoders(recipe, tmp_path / "cache")
    assert (again.made, again.dropped) == (2, [])
    write_video(clips / "0.mp4", waves(7) / 2, 12)  # cached, and replaced in place
    index_folder(clips, index)
    assert cache_encoders(recipe, tmp_path / "cache").made == 2


def test_a_file_in_place_of_the_folder_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(UserError, match=f"--out {out}: .* is a file; name a folder for the cache"):
            cache_encoders(small(folder), out)


def test_a_run_from_a_cache_resumes_bitwise_and_loads_no_encoder(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(diffusion_inputs, "load_autoencoder", refuse)
    monkeypatch.setattr(diffusion_inputs, "load_text_encoders", refuse)
    words = ["train", "demo_stage1", *SMALL, "--data.cache", str(whole)]
    words += ["--data.index", str(folder / "clips.parquet"), "--data.heldout_index", str(folder / "heldout.parquet")]
    for run, steps in (("parts", 2), ("parts", 5), ("one", 5)):
        assert cli.main([*words, "--out", str(tmp_path / run), "--steps", str(steps)]) == 0
    one, parts = (
        [row["loss"] for row in read_metrics(tmp_path / run) if row["kind"] == "step"] for run in ("one", "parts")
    )
    assert one == parts
    assert len(set(one)) == 5
    stored = json.loads((tmp_path / "one" / "recipe.json").read_text())
    assert stored["autoencoder"]["weights"].startswith(str(whole))  # the sampler needs to know
    assert Path(stored["text"]["t5"]).is_dir()
    assert stored["data"]["cache"] == str(whole.resolve())


def test_samples_of_a_cached_run_take_the_caches_encoders(folder: Path, whole: Path, tmp_path: Path) -> None:
    words = ["train", "demo_stage1", *SMALL, "--data.cache", str(whole), "--data.index", str(folder / "clips.parquet")]
    words += ["--data.heldout_index", "None", "--steps", "1", "--out", str(tmp_path / "run")]
    words += ["--validation.prompts", "waves", "--validation.sample_every", "1", "--sampling_defaults.steps", "2"]
    assert cli.main(words) == 0
    assert len(list((tmp_path / "run" / "samples").glob("step-1-*.mp4"))) == 1


def test_one_encoder_is_in_memory_at_a_time(folder: Path, weights: dict, tmp_path: Path, stand_ins, monkeypatch):
    alive: list[weakref.ref] = []

    class Watched(list):
        def append(self, encoder: nn.Module) -> None:
            assert [ref() for ref in alive if ref() is not None] == []
            alive.append(weakref.ref(encoder))

    watched = Watched()
    for module, name, make in (
        (encoder_cache, "load_autoencoder", Cells),
        (cache_encoding, "load_autoencoder", Cells),
        (cache_encoding, "load_t5", lambda: Letters((64, 64))),
        (cache_encoding, "load_clip", lambda: Letters((32,))),
    ):

        def load(*_, make=make, **__):
            encoder = make()
            watched.append(encoder)
            return encoder

        monkeypatch.setattr(module, name, load)
    cache_encoders(dataclasses.replace(small(folder), **weights), tmp_path / "cache")
    assert len(alive) == 4


def test_equal_things_are_encoded_once(folder: Path, weights: dict, tmp_path: Path, stand_ins) -> None:
    lines = (tmp_path / "clips.csv").open("w")
    index = read_index(folder / "clips.parquet")
    lines.write("path,text,num_frames,height,width,fps\n")
    for record, text in [(index[0], "one"), (index[0], "two"), (index[1], "one"), (index[1], "one")]:
        lines.write(f"{record.path},{text},{record.num_frames},{record.height},{record.width},{record.fps}\n")
    lines.close()
    recipe = dataclasses.replace(small(folder, index=str(tmp_path / "clips.csv"), heldout_index=None), **weights)
    report = cache_encoders(recipe, tmp_path / "cache", prompts_at_once=3)
    stored = json.loads((tmp_path / "cache" / "report.json").read_text())
    assert stored["versions"] == {"torch": torch.__version__, "decoder": choose_decoder().reason}
    assert (report.pairs, report.latents) == (8, 4)  # of 16 and of 8 frames
    assert (report.prompts_asked, report.prompts) == (4, 3)
    _, autoencoder, t5, clip = stand_ins
    assert autoencoder.encoded == 4 * 3  # the clip, its first and its last frame
    assert t5.prompts == clip.prompts == ["", "one. 12 FPS.", "two. 12 FPS."]
    tables = open_tables(tmp_path / "cache", EncoderCache.open(tmp_path / "cache").settings.identity())
    assert {kind: len(table) for kind, table in tables.items()} == {"latents": 4, "t5": 3, "clip": 3}


def test_what_is_dropped_is_reported_tried_again_and_left_out(
    folder: Path, weights: dict, tmp_path: Path, stand_ins, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    write_video(clips / "good.mp4", waves(1), 12)
    write_video(clips / "black.mp4", torch.full((3, 34, 64, 80), -1.0), 12)
    write_video(clips / "broken.mp4", waves(2), 12)
    write_video(clips / "tiny.mp4", waves(2)[:, :, :16, :16], 12)
    index_folder(clips, tmp_path / "clips.parquet")
    good = (clips / "broken.mp4").read_bytes()
    (clips / "broken.mp4").write_bytes(b"no video")
    recipe = small(folder, index=str(tmp_path / "clips.parquet"), heldout_index=str(tmp_path / "clips.parquet"))
    recipe = dataclasses.replace(recipe, **weights)
    report = cache_encoders(recipe, tmp_path / "cache")
    encoder_cache._print(report, tmp_path / "cache", encoder_cache.Console(width=300))
    reasons = {(Path(path).name, reason) for _, path, reason in report.dropped}
    assert ("black.mp4", "the autoencoder's latent is not finite") in reasons
    assert {name for name, _ in reasons} == {"black.mp4", "broken.mp4"}
    assert [(Path(path).name, reason) for path, reason in report.unplaced] == [
        ("tiny.mp4", "smaller than 0.8 of every resolution's area")
    ] * 2
    stored = json.loads((tmp_path / "cache" / "report.json").read_text())
    assert {Path(item["path"]).name for item in stored["dropped"]} == {"black.mp4", "broken.mp4"}
    assert stored["unplaced"][0]["reason"] == "smaller than 0.8 of every resolution's area"
    printed = capsys.readouterr().out
    assert "the autoencoder's latent is not finite" in printed
    assert "no bucket takes it: smaller than" in printed

    loader, heldout = feeds(tmp_path / "cache", recipe)
    with pytest.warns(UserWarning, match=r"left out of an evaluation: .*(black|broken)\.mp4: "):
        assert [Path(path).name for batch in heldout for path in batch.paths] == ["good.mp4"]
    sampler = BucketSampler(
        read_index(tmp_path / "clips.parquet"), BUCKETS, multiple=16, seed=recipe.loop.seed, fps_max=recipe.data.fps_max
    )
    for _ in range(9):  # three clips, of which one is there: the others' turns are taken by it
        assert [Path(path).name for path in next(loader).paths] == ["good.mp4"]
        next(sampler)
        assert loader.state_dict() == sampler.state_dict()
    assert {Path(path).name for path in loader.skipped} == {"black.mp4", "broken.mp4"}
    loader.close()

    (clips / "broken.mp4").write_bytes(good)
    again = cache_encoders(recipe, tmp_path / "cache")
    assert {Path(path).name for _, path, _ in again.dropped} == {"black.mp4"}
    assert again.made == 3  # 16 and 8 frames from a drawn start, and the evaluation's
    assert cache_encoders(recipe, tmp_path / "cache").made == 0
    assert len(again.shards) == len(cache_encoders(recipe, tmp_path / "cache").shards)


def test_a_cache_of_nothing_is_refused(folder: Path, weights: dict, tmp_path: Path, stand_ins) -> None:
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "black.mp4", torch.full((3, 34, 64, 80), -1.0), 12)
    index_folder(tmp_path / "clips", tmp_path / "clips.parquet")
    recipe = dataclasses.replace(small(folder, index=str(tmp_path / "clips.parquet"), heldout_index=None), **weights)
    assert cache_encoders(recipe, tmp_path / "cache").latents == 0
    with pytest.raises(UserError, match="holds no clip: all were dropped, report.json there says why"):
        feeds(tmp_path / "cache", recipe)


def shards_of(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for kind in KINDS for path in shard_paths(cache, kind)}


class Stop(BaseException):
    """Ends a run at once, as nothing in it may catch."""


class Calls:
    """Counts what makes a file durable, and stops the run when `left` of these calls are done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.left = 0, sys.maxsize
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, functools.partial(self._call, getattr(os, name)))

    def _call(self, call, *arguments):
        if self.left == 0:
            raise Stop
        self.done, self.left = self.done + 1, self.left - 1
        return call(*arguments)


@pytest.fixture
def straight(folder: Path, weights: dict, tmp_path: Path, stand_ins, monkeypatch: pytest.MonkeyPatch):
    """(make(out), the bytes of every shard of an uninterrupted run, its calls)"""
    recipe = dataclasses.replace(small(folder), **weights)
    make = functools.partial(cache_encoders, recipe, shard_bytes=10_000, prompts_at_once=2)
    calls = Calls(monkeypatch)
    make(tmp_path / "straight")
    expected = shards_of(tmp_path / "straight")
    assert len(expected) > 8
    return make, expected, calls


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_at_any_call_goes_on_to_the_same_bytes(every: int, straight, tmp_path: Path) -> None:
    make, expected, calls = straight
    for stop in range(0, calls.done, every):
        out, calls.left = tmp_path / f"stopped-{stop}", stop
        with pytest.raises(Stop):
            make(out)
        assert shards_of(out).items() <= expected.items()  # whole or not at all
        calls.left = sys.maxsize
        make(out)
        assert shards_of(out) == expected
        assert not list(out.glob("*.tmp"))
        assert json.loads((out / "report.json").read_text())["shards"] == {k: len(v) for k, v in expected.items()}


def test_a_run_that_is_stopped_again_and_again_gets_there(straight, tmp_path: Path) -> None:
    make, expected, calls = straight
    for _ in range(len(expected) + 2):  # one file each time, cache.json and the report among them
        calls.left = 3
        try:
            make(tmp_path / "parts")
        except Stop:
            assert shards_of(tmp_path / "parts").items() <= expected.items()
    assert shards_of(tmp_path / "parts") == expected
    assert (tmp_path / "parts" / "report.json").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(
    folder: Path, weights: dict, tmp_path: Path, stand_ins, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, write, left = dataclasses.replace(small(folder), **weights), cache_store.write_file, 1

    def full(path: Path, *arguments) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *arguments)

    monkeypatch.setattr(cache_store, "write_file", full)
    with pytest.raises(OSError, match="No space left on device") as failed:
        cache_encoders(recipe, tmp_path / "cache")
    assert failed.value.filename == str(tmp_path / "cache" / "latents-00001.safetensors")  # what the line begins with
    assert len(shards_of(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


KILLED = """
import os, signal, sys
replace, left = os.replace, int(sys.argv[1])
def counted(*paths):
    global left
    left -= str(paths[1]).endswith(".safetensors")
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = counted
from opensora_fast import cli
cli.main(sys.argv[2:])
"""


def test_a_killed_process_is_gone_on_with(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    buckets = ["--data.index", str(folder / "clips.parquet"), "--data.heldout_index", str(folder / "heldout.parquet")]
    words = ["data", "cache", "demo_stage2", "--out", str(out), "--shard_gib", str(20_000 / 2**30), *SMALL, *buckets]
    words += ["--autoencoder.weights", str(next(whole.glob("untrained_autoencoder-*")))]
    process = subprocess.run([sys.executable, "-P", "-c", KILLED, "1", *words], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    before = shards_of(out)
    assert list(before) == ["latents-00000.safetensors"]
    assert len(list(out.glob("*.safetensors.tmp"))) == 1
    assert not (out / "report.json").exists()
    assert cli.main(words) == 0
    after = shards_of(out)
    assert before.items() < after.items()
    cache = EncoderCache.open(out)
    recipe = adopt(small(folder, buckets={"64px": {16: (1.0, 4)}}), cache.settings, out)
    cache.require(plan_cache(recipe.data, multiple=16), recipe)


def test_two_processes_do_not_make_one_cache(folder: Path, whole: Path, tmp_path: Path) -> None:
    with (
        encoder_cache._alone_in(whole),
        pytest.raises(UserError, match="another process makes this cache: wait for it, or use another --out"),
    ):
        cache_encoders(small(folder), whole)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The cache's own files."""
    out = tmp_path / "copy"
    out.mkdir()
    for path in whole.iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    return out


def test_every_flipped_bit_of_a_value_is_found_and_named(folder: Path, copy: Path) -> None:
    paths = shard_paths(copy, "latents")
    generator = np.random.default_rng(0)
    for trial in range(30):
        path = paths[trial % len(paths)]
        content = path.read_bytes()
        shard = cache_store.open_shard(path, EncoderCache.open(copy).settings.identity())
        name = shard.values[trial % len(shard.values)]
        entry = shard.header.entries[name]
        spoilt = bytearray(content)
        spoilt[entry.start + int(generator.integers(entry.bytes))] ^= 1 << int(generator.integers(8))
        path.write_bytes(spoilt)
        spec, complaints = shard.spec(name), []
        for row in range(len(shard.keys_N)):
            try:
                shard.read(row, name, torch.empty(spec.shape, dtype=spec.dtype))
            except UserError as error:
                complaints.append(str(error).startswith(f"{path} is damaged (row {row}: {name} does not match its"))
        assert complaints == [True]
        path.write_bytes(content)


def test_a_damaged_shard_stops_training_with_its_name_and_can_be_made_again(
    folder: Path, copy: Path, whole: Path, tmp_path: Path
) -> None:
    victim = shard_paths(copy, "t5")[0]
    spoilt = bytearray(victim.read_bytes())
    spoilt[-1] ^= 1
    victim.write_bytes(spoilt)
    loader, _ = feeds(copy, small(folder))
    with pytest.raises(UserError, match=f"{victim} is damaged .* delete it and run `opensora-fast data cache` again"):
        list(itertools.islice(loader, 20))
    state = loader.state_dict()
    for _ in range(3):
        with pytest.raises(UserError, match=f"{victim} is damaged"):
            next(loader)
    assert loader.state_dict() == state
    loader.close()
    with pytest.raises(UserError, match=f"{victim} is damaged"):
        next(loader)
    loader.close()
    victim.unlink()
    with pytest.raises(UserError, match=f"{victim} is missing"):
        feeds(copy, small(folder))
    stored = EncoderCache.open(whole).settings
    recipe = small(folder)
    recipe = dataclasses.replace(
        recipe,
        autoencoder=dataclasses.replace(recipe.autoencoder, weights=stored.autoencoder.weights),
        text=dataclasses.replace(recipe.text, t5=stored.text.t5, clip=stored.text.clip),
    )
    assert cache_encoders(recipe, copy, shard_bytes=20_000, prompts_at_once=1).made > 0
    loader, _ = feeds(copy, small(folder))
    for _ in range(20):
        next(loader)
    loader.close()


@pytest.mark.parametrize("spoil", ["cut", "longer", "other", "header", "no keys"])
def test_a_shard_that_cannot_be_opened_is_named(spoil: str, folder: Path, copy: Path) -> None:
    victim = shard_paths(copy, "latents")[-1]
    content = victim.read_bytes()
    if spoil == "cut":
        victim.write_bytes(content[:-5])
    elif spoil == "longer":
        victim.write_bytes(content + b"12345")
    elif spoil == "header":
        victim.write_bytes(content[:9] + b"}}}" + content[12:])
    elif spoil == "no keys":
        victim.write_bytes(content.replace(b'"keys"', b'"kezs"'))
    else:
        (copy / "report.json").unlink()
        settings = (copy / "cache.json").read_text()
        (copy / "cache.json").write_text(settings.replace('"seed": 42', '"seed": 43'))
    with pytest.raises(UserError, match=r"latents-0000\d\.safetensors") as refused:
        feeds(copy, small(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "change", "complaint"),
    [
        ("data", {"fps_max": 12}, "data.fps_max is 12 here, and the cache .* was made with 30"),
        ("data", {"buckets": {"64px": {12: (1.0, 1)}}}, "lacks 4 of 4 latents that data.index, .*0.mp4 in 64px .* 12f"),
        ("data", {"buckets": BUCKETS | {"48px": {8: (1.0, 1)}}}, None),
        ("data", {"buckets": {"64px": {16: (0.5, 3)}}}, None),
        ("text", {"max_length_t5": 32}, "text.max_length_t5 is 32 here"),
        ("text", {"t5": "MADE"}, "text.t5: the cache .* was made with other weights than those this recipe names"),
        ("autoencoder", {"weights": "MADE"}, "autoencoder.weights: the cache .* was made with other weights"),
        ("autoencoder", {"weights": "nowhere"}, "autoencoder.weights=.*nowhere: No such file"),
        ("autoencoder", HUNYUAN_SECTION, "autoencoder.kind is hunyuan here"),
        ("model", {"in_channels": 32}, "has latents of 16 channels, model.in_channels / patch_size\\^2 is 8"),
        ("model", {"context_in_dim": 48}, r"has txt of shape \(64, 64\), and the model takes \(64, 48\)"),
        (None, {"condition_weights": {"v2v_head": 1.0}}, None),
    ],
    ids=str,
)
def test_a_cache_of_another_recipe_is_refused_in_one_line(
    section: str | None, change: dict, complaint: str | None, folder: Path, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.bin").write_text("other weights")
    change = {name: str(tmp_path / "other.bin") if value == "MADE" else value for name, value in change.items()}
    recipe = small(folder)
    if section is None:
        recipe = dataclasses.replace(recipe, **change)
    else:
        recipe = dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **change)})
    if complaint is None:
        feeds(whole, recipe)
        return
    with pytest.raises(UserError, match=complaint) as refused:
        feeds(whole, recipe)
    assert "\n" not in str(refused.value)


def test_references_that_a_cache_lacks_are_refused(folder: Path, weights: dict, tmp_path: Path, stand_ins) -> None:
    recipe = dataclasses.replace(small(folder), **weights, condition_weights={"t2v": 1.0, "i2v_head": 2.0})
    cache_encoders(recipe, tmp_path / "cache")
    feeds(tmp_path / "cache", dataclasses.replace(recipe, condition_weights={"i2v_head": 1.0, "i2v_tail": 0.0}))
    with pytest.raises(UserError, match="has no references for condition_weights.i2v_tail at 8 frames"):
        feeds(tmp_path / "cache", dataclasses.replace(recipe, condition_weights=IMAGE_TO_VIDEO))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"loop": {"seed": 7}}, "loop.seed is 7 here, and the cache .* was made with 42: use another --out"),
        ({"data": {"fps_max": 24}}, "data.fps_max is 24 here"),
        ({"condition_weights": {"t2v": 1.0}}, "condition_weights is t2v here, .* with i2v_head, i2v_loop"),
        ({"decoder": "another"}, "decoder .by what is installed. is another here, and the cache .* was made with"),
        ({"data": {"cache": "there"}}, "data.cache=there: a cache is made from clips"),
        ({"autoencoder": HUNYUAN_SECTION}, "autoencoder.kind is hunyuan here, and the cache .* with video_dc_ae"),
        ({"autoencoder": HUNYUAN_SECTION | {"weights": None}}, "autoencoder.weights is not set: recipe demo_stage2"),
        ({"data": {"buckets": {"256px": {1: (1.0, 1)}}}}, "clips.parquet: no clip fits a bucket .*4 smaller than"),
        ({"data": {"index": None}}, "data.index is not set"),
    ],
    ids=str,
)
def test_a_cache_is_not_gone_on_with_for_another_recipe(
    change: dict, complaint: str, folder: Path, weights: dict, tmp_path: Path, stand_ins, monkeypatch
) -> None:
    recipe = dataclasses.replace(small(folder), **weights)
    cache_encoders(recipe, tmp_path / "cache")
    before = shards_of(tmp_path / "cache")
    if "decoder" in change:
        other = Decoder(name=change["decoder"], reason="it is installed")
        monkeypatch.setattr(cache_settings, "choose_decoder", lambda: other)
        change = {}
    for section, values in change.items():
        if section != "condition_weights":
            values = dataclasses.replace(getattr(recipe, section), **values)
        recipe = dataclasses.replace(recipe, **{section: values})
    with pytest.raises(UserError, match=complaint) as refused:
        cache_encoders(recipe, tmp_path / "cache")
    assert "\n" not in str(refused.value)
    assert shards_of(tmp_path / "cache") == before


def test_more_clips_are_added_to_a_cache(folder: Path, weights: dict, tmp_path: Path, stand_ins) -> None:
    recipe = dataclasses.replace(small(folder, heldout_index=None), **weights)
    few = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, buckets={"64px": {8: (1.0, 2)}}))
    made = cache_encoders(few, tmp_path / "cache").made
    with pytest.raises(UserError, match="run `opensora-fast data cache` with the same options, which adds"):
        feeds(tmp_path / "cache", recipe)
    report = cache_encoders(recipe, tmp_path / "cache")
    assert report.made > 0
    feeds(tmp_path / "cache", recipe)
    feeds(tmp_path / "cache", few)
    assert cache_encoders(recipe, tmp_path / "all").made == made + report.made


def test_the_order_is_the_samplers_and_a_state_resumes_it(folder: Path, whole: Path) -> None:
    recipe = small(folder)
    sampler = BucketSampler(
        read_index(folder / "clips.parquet"), BUCKETS, multiple=16, seed=recipe.loop.seed, fps_max=recipe.data.fps_max
    )
    straight, _ = feeds(whole, recipe)
    states, plans = [straight.state_dict()], []
    for _ in range(12):
        plans.append(next(straight).plan)
        states.append(straight.state_dict())
    assert plans == [next(sampler) for _ in range(12)]
    plans.append(next(sampler))
    resumed, _ = feeds(whole, small(folder, prefetch=5))
    for begun in (0, 3, 7):
        resumed.load_state_dict(json.loads(json.dumps(states[begun])))
        assert [next(resumed).plan for _ in range(5)] == plans[begun : begun + 5]
        assert resumed.state_dict() == states[begun + 5]
        resumed.close()
        assert next(resumed).plan == plans[begun + 5]
    for loader in (straight, resumed):
        loader.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a CUDA device need one")
def test_on_the_device_batches_have_the_same_values(folder: Path, whole: Path) -> None:
    recipe = adopt(small(folder, prefetch=4), EncoderCache.open(whole).settings, whole)
    here, _ = feeds(whole, recipe)
    there, _ = cached_feeds(EncoderCache.open(whole), recipe, multiple=16, device=torch.device("cuda"))
    for _ in range(40):
        one, other = next(here), next(there)
        assert other.encoded.latent_BCTHW.is_cuda
        assert all(torch.equal(a, b.cpu()) for a, b in zip(one.encoded.tensors(), other.encoded.tensors(), strict=True))
    for loader in (here, there):
        loader.close()


def test_batches_that_are_kept_keep_their_values(folder: Path, whole: Path) -> None:
    loader, _ = feeds(whole, small(folder, pinned_gib=0.01))
    kept = [next(loader).encoded for _ in range(4)]
    before = [[tensor.clone() for tensor in encoded.tensors()] for encoded in kept]
    for _ in range(20):
        next(loader)
    loader.close()
    for encoded, values in zip(kept, before, strict=True):
        assert all(map(torch.equal, encoded.tensors(), values))


def test_memory_for_too_few_batches_is_refused(folder: Path, whole: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.pinned_gib=1e-06: the largest batch .* raise --data.pinned_gib to"
    ) as no:
        feeds(whole, small(folder, pinned_gib=1e-6))
    enough = re.search(r"to ([0-9.]+) or more", str(no.value))[1]
    feeds(whole, small(folder, pinned_gib=float(enough)))


def test_a_batch_that_never_comes_is_explained(folder: Path, whole: Path) -> None:
    loader, _ = feeds(whole, small(folder, slow_batch_s=0.01, batch_timeout_s=0.5))
    said: list[str] = []
    loader._say = said.append
    with pytest.raises(UserError, match=r"no batch came within data.batch_timeout_s=0.5: waiting for memory"):
        list(loader)
    assert "a batch is late, 0.01 s so far: waiting for memory" in said[-1]
    loader.close()


def test_a_loader_may_be_collected_in_its_own_thread(folder: Path, whole: Path) -> None:
    loader, _ = feeds(whole, small(folder))
    next(loader)
    reader, closed = loader._reader, []

    def close(path: Path) -> None:
        reader.close()
        closed.append(path)

    reader._tell = close
    first, second = (loader._planned(next(loader._sampler), {}) for _ in range(2))
    reader.submit(first)
    reader.submit(second)
    reader._thread.join(30)
    assert closed
    assert not reader._thread.is_alive()
    assert second.done.is_set()
    with pytest.raises(RuntimeError, match="the loader was closed before the batch was read"):
        second.result()
    loader.close()


HUNYUAN = StoredLayout(latent_channels=16, compression=(4, 8, 8), causal=True)


def test_a_stage_of_the_paper_trains_from_a_cache_made_elsewhere(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    out.mkdir()
    settings = CacheSettings(
        recipe="stage2",
        dtype="bfloat16",
        decoder=None,
        seed=1,
        fps_max=24,
        conditions=tuple(sorted(IMAGE_TO_VIDEO)),
        autoencoder=AutoencoderRecord(
            kind="hunyuan",
            latent_channels=16,
            compression=(4, 8, 8),
            causal=True,
            weights=None,
            fingerprint=None,
            config=None,
        ),
        text=TextRecord(
            t5=None, t5_fingerprint=None, max_length_t5=8, clip=None, clip_fingerprint=None, max_length_clip=8
        ),
    )
    (out / "cache.json").write_text(settings.to_text())
    assert parse_settings(settings.to_text(), out) == settings
    recipe = find_recipe("stage2")
    buckets = {"64px": {1: (1.0, 1), 9: (1.0, 2), 33: (1.0, 1)}}
    data = dataclasses.replace(recipe.data, index=str(folder / "clips.parquet"), buckets=buckets)
    plan = plan_cache(data, multiple=16)
    latents = ShardWriter(out, "latents", settings.identity())
    torch.manual_seed(0)
    for group in plan.groups:
        bucket, count = group.bucket, len(group.keys_P)
        sizes = {"latent": (bucket.frames - 1) // 4 + 1}
        sizes |= {piece_name(piece): 1 for piece in encoded_pieces(IMAGE_TO_VIDEO, HUNYUAN, bucket.frames)}
        values = {
            name: torch.randn(count, 16, frames, bucket.height // 8, bucket.width // 8).bfloat16()
            for name, frames in sizes.items()
        }
        latents.publish(group.keys_P, values)
    keys = plan.prompt_keys_P
    ShardWriter(out, "t5", settings.identity()).publish(keys, {"txt": torch.randn(len(keys), 8, 48).bfloat16()})
    ShardWriter(out, "clip", settings.identity()).publish(keys, {"vec": torch.randn(len(keys), 24).bfloat16()})

    tiny = [*SMALL, "--model.context_in_dim", "48", "--model.vec_in_dim", "24", "--text.max_length_t5", "8"]
    tiny += ["--text.max_length_clip", "8", "--data.index", str(folder / "clips.parquet"), "--data.cache", str(out)]
    for name in ("stage1", "stage2", "stage3"):
        run = tmp_path / name
        recipe = override(find_recipe(name), [*tiny, "--parallel.context_parallel", "1", "--loop.steps", "4"])
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, buckets=buckets), follows=None)
        assert run_recipe(recipe, run) == 0
        losses = [row["loss"] for row in read_metrics(run) if row["kind"] == "step"]
        assert len(losses) == 4
        assert np.isfinite(losses).all()


SETTINGS = CacheSettings(
    recipe="r",
    dtype="float32",
    decoder="PyAV",
    seed=1,
    fps_max=24,
    conditions=("t2v",),
    autoencoder=AutoencoderRecord(
        kind="video_dc_ae",
        latent_channels=1,
        compression=(1, 1, 1),
        causal=False,
        weights="w",
        fingerprint="f",
        config={"latent_channels": 1},
    ),
    text=TextRecord(t5="a", t5_fingerprint="b", max_length_t5=1, clip="c", clip_fingerprint="d", max_length_clip=1),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_no_text_in_place_of_the_settings_gives_anything_but_a_usererror(data: st.DataObject) -> None:
    values = json.loads(SETTINGS.to_text())
    inner = data.draw(st.sampled_from([values, values["autoencoder"], values["text"]]))
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(json_values)
    for text in (json.dumps(values), json.dumps(values)[: data.draw(st.integers(0, 300))], data.draw(st.text())):
        complaint = ""
        try:
            parsed = parse_settings(text, Path("DIR/cache.json"))
        except UserError as error:
            complaint = str(error)
        else:
            assert parse_settings(parsed.to_text(), Path("DIR/cache.json")) == parsed
        assert complaint.startswith("DIR/cache.json" if complaint else "")
        assert "\n" not in complaint


def test_a_newer_format_is_told() -> None:
    with pytest.raises(UserError, match="format 2 is newer than this version reads"):
        parse_settings(SETTINGS.to_text().replace('"format": 1', '"format": 2'), Path("cache.json"))


def test_a_fingerprint_is_of_the_files_wherever_they_lie(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(content)
        (tmp_path / name / ".hidden").write_text(name)
    one, two = (fingerprint("text.t5", tmp_path / name) for name in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "weights").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint("text.t5", tmp_path / "two") != one
    spoilt = bytearray(content)
    spoilt[SAMPLE_BYTES + 1] ^= 1  # between two samples
    (tmp_path / "two" / "weights").write_bytes(spoilt)
    assert fingerprint("text.t5", tmp_path / "two") == one
    both = [fingerprint("text.t5", tmp_path / name, whole=True) for name in ("one", "two")]
    assert both[0] != both[1]
    assert {each.partition("-")[0] for each in both} == {one}
    (tmp_path / "two" / "weights").write_bytes(content[:-1])
    assert fingerprint("text.t5", tmp_path / "two") != one
    with pytest.raises(UserError, match=r"text.t5=.*nowhere: No such file or directory"):
        fingerprint("text.t5", tmp_path / "nowhere")


@given(st.lists(st.integers(0, 2**128 - 1), max_size=30), st.lists(st.integers(0, 2**128 - 1), max_size=10))
def test_rows_are_found_by_key(there: list[int], others: list[int]) -> None:
    def keys(numbers: list[int]) -> np.ndarray:
        return np.frombuffer(b"".join(number.to_bytes(16, "little") for number in numbers), KEY)

    halves = [keys(there[: len(there) // 2]), keys(there[len(there) // 2 :])]
    table = RowTable([cache_store.Shard(Path("x"), None, half, []) for half in halves])
    asked = there + others
    expected = [there.index(number) if number in there else -1 for number in asked]
    assert table.find(keys(asked)).tolist() == expected
    assert len(table) == len(set(there))
