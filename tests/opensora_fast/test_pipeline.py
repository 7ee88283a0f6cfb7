"""`VideoPipeline`: called from Python with whatever its users have."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import opensora_fast
from opensora_fast.errors import UserError
from opensora_fast.pipeline import VideoPipeline, nearest_ratio
from opensora_fast.reference_pixels import clip_pixels, image_pixels
from opensora_fast.resolutions import ASPECT_RATIOS, video_size
from opensora_fast.sampling_settings import SamplingSettings
from opensora_fast.video_io import write_image, write_video

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

SMALL = {"resolution": "32px", "aspect_ratio": "1:1", "num_frames": 5, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe(released_folder):
    return VideoPipeline.from_pretrained(released_folder("open-sora-v2"))


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def test_it_is_found_where_users_look():
    assert opensora_fast.VideoPipeline is VideoPipeline


def test_the_forms_of_a_result_are_one_video(pipe):
    video = pipe("rain", seed=1, **SMALL).frames
    assert video.shape == (1, 5, 32, 32, 3)
    assert video.dtype == np.float32
    assert 0 <= video.min() < video.max() <= 1
    tensor = pipe("rain", seed=1, output_type="pt", **SMALL).frames
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), video)
    [pictures] = pipe("rain", seed=1, output_type="pil", **SMALL).frames
    assert [each.size for each in pictures] == [(32, 32)] * 5
    assert np.array_equal(np.stack([np.asarray(each) for each in pictures]), (video[0] * 255).round().astype(np.uint8))


def test_several_prompts_are_several_videos(pipe):
    videos = pipe(["rain", "snow"], seed=1, **SMALL).frames
    alone = pipe("snow", seed=2, **SMALL).frames
    np.testing.assert_allclose(videos[1], alone[0], atol=1e-4)
    other = pipe(["rain", "snow"], negative_prompt=["", "fog"], seed=1, **SMALL).frames
    np.testing.assert_allclose(videos[0], other[0], atol=1e-4)
    assert np.abs(videos[1] - other[1]).max() > 1e-3


def test_one_picture_for_each_prompt(pipe, picture):
    other = np.roll(picture, 20, 1)
    both = pipe(["rain", "snow"], image=[picture, Image.fromarray(other)], seed=1, **SMALL).frames
    alone = pipe("snow", image=other, seed=2, **SMALL).frames
    np.testing.assert_allclose(both[1], alone[0], atol=1e-4)
    same = pipe(["rain", "snow"], image=picture, seed=1, **SMALL).frames
    np.testing.assert_allclose(both[0], same[0], atol=1e-4)
    assert np.abs(both[1] - same[1]).max() > 1e-3


def test_what_users_of_diffusers_write(pipe, released_folder):
    assert pipe.to("cpu") is pipe
    assert pipe.device == torch.device("cpu")
    with pytest.raises(UserError, match="device meta: the weights are on cpu; load with from_pretrained"):
        pipe.to("meta")
    result = pipe("rain", seed=1, **SMALL)
    assert result[0] is result.frames
    folder = released_folder("open-sora-v2")
    half = VideoPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert half.models.model.dtype == torch.bfloat16
    for arguments, message in (
        ({"dtype": "bfloat16"}, "dtype='bfloat16': pass a torch.dtype"),
        ({"dtype": torch.float32, "torch_dtype": torch.float32}, "give one of them"),
        ({"device": "gpu"}, "device='gpu': is none"),
        ({"device": "cuda:99"}, "device='cuda:99': this machine has"),
    ):
        with pytest.raises(UserError, match=message):
            VideoPipeline.from_pretrained(folder, **arguments)


def test_a_generator_draws_the_seed_and_goes_on(pipe):
    def pair(seed):
        generator = torch.Generator().manual_seed(seed)
        return [pipe("rain", generator=generator, **SMALL).frames for _ in range(2)]

    first, again = pair(0), pair(0)
    assert np.array_equal(first, again)
    assert not np.array_equal(*first)


def test_settings_are_those_of_the_call_then_of_the_pipeline(pipe):
    small = replace(pipe.defaults, resolution="32px", aspect_ratio="1:1", frames=5, steps=2, motion_score=None)
    video = pipe("rain", settings=small).frames
    assert video.shape == (1, 5, 32, 32, 3)
    assert pipe("rain", settings=small, height=32, width=48).frames.shape == (1, 5, 32, 48, 3)
    sized = replace(small, height=32, width=48)
    assert pipe("rain", settings=sized).frames.shape == (1, 5, 32, 48, 3)
    assert pipe("rain", settings=sized, resolution="32px").frames.shape == (1, 5, 32, 32, 3)
    assert not np.array_equal(video, pipe("rain", settings=small, motion_score=4).frames)


def test_pictures_in_every_form(pipe, picture, tmp_path):
    write_image(tmp_path / "a.png", torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    forms = [Image.fromarray(picture), picture, picture / np.float32(255), tensor, tensor / 255]
    expected = image_pixels(picture, (32, 32))
    assert expected.shape == (3, 1, 32, 32)
    for form in forms:
        assert torch.equal(image_pixels(form, (32, 32)), expected)
    assert (image_pixels(tmp_path / "a.png", (32, 32)) - expected).abs().max() < 0.1  # swscale's filter
    videos = [pipe("rain", image=form, **SMALL).frames for form in (forms[0], forms[4])]
    assert np.array_equal(*videos)
    assert not np.array_equal(videos[0], pipe("rain", **SMALL).frames)
    assert not np.array_equal(videos[0], pipe("rain", last_image=picture, **SMALL).frames)


def test_videos_in_every_form(picture, tmp_path):
    frames = np.stack([np.roll(picture, shift, 1) for shift in range(12)])
    pictures = [Image.fromarray(each) for each in frames]
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    for end in ("head", "tail"):
        expected = clip_pixels(frames, 8, 24, (32, 32), end)
        assert expected.shape == (3, 8, 32, 32)
        for form in (pictures, tensor, list(frames)):
            assert torch.equal(clip_pixels(form, 8, 24, (32, 32), end), expected)
    assert torch.equal(clip_pixels(frames, 8, 24, (32, 32), "tail")[:, -1:], image_pixels(frames[-1], (32, 32)))
    write_video(tmp_path / "v.mp4", tensor.permute(1, 0, 2, 3).float() / 127.5 - 1, 24)
    thinned = clip_pixels(tmp_path / "v.mp4", 3, 12, (32, 32), "tail")
    all_frames = clip_pixels(tmp_path / "v.mp4", 12, 24, (32, 32), "head")
    assert torch.equal(thinned, all_frames[:, [7, 9, 11]])
    with pytest.raises(UserError, match="12 frames at 24 per second are not the 7 at 12"):
        clip_pixels(tmp_path / "v.mp4", 7, 12, (32, 32), "tail")


@pytest.mark.parametrize(
    ("rate", "taken"),
    [
        (24, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (24000 / 1001, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (25, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (30000 / 1001, [0, 1, 2, 4, 5, 6, 7, 9, 10]),
        (30, [0, 1, 3, 4, 5, 6, 8, 9, 10]),
        (60, [0, 3, 5, 8, 10, 13, 15, 18, 20]),
        (12, [0, 1, 1, 2, 2, 3, 3, 4, 4]),
    ],
)
def test_a_file_of_any_rate_keeps_its_speed(rate, taken, tmp_path):
    greys = torch.linspace(-1, 1, 24)[None, :, None, None].expand(3, 24, 32, 32)
    write_video(tmp_path / "v.mp4", greys, rate)
    for end, start in (("head", 0), ("tail", 23 - taken[-1])):
        pixels = clip_pixels(tmp_path / "v.mp4", 9, 24, (32, 32), end)
        found = ((pixels.mean((0, 2, 3)) + 1) * 23 / 2).round().int()
        assert found.tolist() == [start + index for index in taken]


def test_a_picture_is_no_video(tmp_path):
    write_image(tmp_path / "a.png", torch.zeros(3, 16, 16))
    with pytest.raises(UserError, match="1 frames at 0 per second are not the 5 at 24"):
        clip_pixels(tmp_path / "a.png", 5, 24, (32, 32), "head")


@pytest.mark.parametrize(
    ("visual", "message"),
    [
        (np.zeros((4, 4)), r"pixels of shape \[4, 4\]"),
        (np.zeros((4, 4, 3), np.int64), "pixels of type int64"),
        (np.full((4, 4, 3), 2.0), "lie in \\[0, 1\\]"),
        (np.full((4, 4, 3), np.nan), "lie in \\[0, 1\\]"),
        (torch.zeros(4, 4, 3), "pixels of shape"),
        (np.zeros((2, 4, 4, 3), np.uint8), "the image is 2 frames"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "differ in size"),
        (7, "a int is no picture"),
        ([], "a list is no picture"),
    ],
)
def test_what_is_no_picture_is_named(visual, message):
    with pytest.raises(UserError, match=message):
        image_pixels(visual, (4, 4))


def test_the_callback_sees_every_step(pipe):
    seen = []

    def watch(called, step, time, tensors):
        assert called is pipe
        seen.append((step, time, tuple(tensors["latents"].shape)))

    video = pipe("rain", callback_on_step_end=watch, **SMALL).frames
    assert [(step, shape) for step, _, shape in seen] == [(0, (1, 16, 2, 4, 4)), (1, (1, 16, 2, 4, 4))]
    assert seen[0][1] == 1
    assert 0 < seen[1][1] < 1
    assert np.array_equal(video, pipe("rain", **SMALL).frames)


def test_flux_paints_what_a_prompt_begins_with(pipe, released_folder):
    models = VideoPipeline.from_pretrained(
        released_folder("open-sora-v2"), flux=released_folder("diffusers-flux"), flux_resolution="32px"
    )
    plain, painted = (each("rain", **SMALL).frames for each in (pipe, models))
    assert not np.array_equal(plain, painted)
    assert np.array_equal(plain, models("rain", condition="t2v", **SMALL).frames)
    assert models("rain", **SMALL | {"num_frames": 1}).frames.shape == (1, 1, 32, 32, 3)


def test_a_budget_is_for_the_largest_video(released_folder):
    small = SamplingSettings(height=32, width=32, frames=9, steps=2)
    pipe = VideoPipeline.from_pretrained(released_folder("open-sora-v2"), memory_budget="2GiB", largest=small)
    assert pipe("rain", settings=small).frames.shape == (1, 9, 32, 32, 3)
    with pytest.raises(UserError, match="13 frames of 32 x 32: the memory budget is for one video of 9216 pixels"):
        pipe("rain", settings=small, num_frames=13)
    with pytest.raises(UserError, match="^2 x 9 frames"):
        pipe(["rain", "snow"], settings=small)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 6}, "frames=6"),
        ({"height": 32}, "height=32 without width"),
        ({"height": 32, "width": 40}, "width=40: must be a multiple of 16"),
        ({"condition": "i2v_head"}, "is made of image and got no file"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator: give one"),
        ({"output_type": "mp4"}, "output_type='mp4': use 'np', 'pt' or 'pil'"),
        ({"negative_prompt": ["a", "b"]}, "negative"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": None}, "prompt=None: must be text"),
        ({"prompt": [1]}, "prompt=1: must be text"),
        ({"negative_prompt": [None]}, "negative_prompt=None: must be text"),
        ({"num_frames": 5.0}, "frames=5.0: must be a whole number"),
        ({"num_inference_steps": "1"}, "steps='1': must be a whole number"),
        ({"guidance_scale": "7"}, "guidance='7': must be a number"),
        ({"generator": [torch.Generator()]}, "generator: pass one for the call"),
        ({"image": [np.zeros((4, 4, 3), np.uint8)] * 2}, "image: 2 pictures for 1 prompts"),
        ({"video": "v.mp4", "image": "a.png"}, "a video cannot be combined"),
    ],
)
def test_wrong_calls_are_named(arguments, message, pipe):
    with pytest.raises(UserError, match=message):
        pipe(**{"prompt": "rain"} | SMALL | arguments)


def test_a_folder_without_parts_is_named(released_folder, tmp_path):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        VideoPipeline.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").symlink_to(released_folder("open-sora-v2") / "Open_Sora_v2.safetensors")
    parts = released_folder("open-sora-v2")
    with pytest.raises(UserError, match="no autoencoder of 16 latent channels lies beside it"):
        VideoPipeline.from_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="t5-v1_1-xxl: no such folder; put the text encoder there, or name it with --t5"
    ):
        VideoPipeline.from_pretrained(tmp_path, autoencoder=parts / "hunyuan_vae.safetensors")
    pipe = VideoPipeline.from_pretrained(
        tmp_path / "model.safetensors",
        autoencoder=parts / "hunyuan_vae.safetensors",
        t5=parts / "google/t5-v1_1-xxl",
        clip=parts / "openai/clip-vit-large-patch14",
    )
    assert pipe("rain", **SMALL).frames.shape == (1, 5, 32, 32, 3)


@pytest.mark.parametrize("resolution", ["256px", "768px"])
@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_the_ratio_of_a_size_is_found_again(resolution, ratio):
    height, width = video_size(resolution, ratio, 16, training=False)
    found = video_size(resolution, nearest_ratio(height, width), 16, training=False)
    assert found == (height, width)
