"""Guided sampling: the released result, with no pass that is not needed; and whole videos of a small model."""

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora_fast.conditions import condition_tokens
from opensora_fast.config import MMDIT_PRESETS
from opensora_fast.errors import UserError
from opensora_fast.flow import sampling_schedule
from opensora_fast.mmdit import MMDiT
from opensora_fast.positions import patchify, unpatchify
from opensora_fast.released import load_released_mmdit
from opensora_fast.sampling import denoise, sample
from opensora_fast.sampling_settings import SamplingSettings, output_size


@pytest.fixture(scope="module")
def golden_model(golden):
    config, groups = golden("mmdit_tiny_split")
    return load_released_mmdit(groups["weight"], config)


class LinearModel:
    """Cheap and sensitive to all its inputs; has no `config` and no `modulation`. Counts the rows it is given."""

    def __init__(self):
        self.rows = 0

    def __call__(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, guidance=None):
        self.rows += len(img)
        position = img_ids.sum(-1, keepdim=True) / 10
        text = txt.mean((1, 2)) + y_vec.mean(1) + timesteps
        given = 0 if cond is None else cond.mean(-1, keepdim=True)
        return 0.5 * img + 0.1 * position + text.view(-1, 1, 1) + given


def inputs(batch=2, conditioned=True, steps=50):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.zeros(batch, 1, 3, 4, 6, dtype=torch.float64)
    mask[:, :, 0] = 1
    return {
        "noise": draw(batch, 4, 3, 4, 6),
        "timesteps": sampling_schedule(steps, 6, 3).double(),
        "txt": draw(batch, 5, 8),
        "vec": draw(batch, 7),
        "null_txt": draw(1, 5, 8),
        "null_vec": draw(1, 7),
        "mask": mask if conditioned else None,
        "reference": draw(batch, 4, 3, 4, 6) * mask if conditioned else None,
    }


GUIDANCE = {
    "guidance_txt": 7.5,
    "guidance_img": 3.0,
    "oscillate_txt": True,
    "oscillate_img": True,
    "dynamic_img_guidance": True,
}


def three_passes_per_step(
    model,
    noise,
    *,
    timesteps,
    txt,
    vec,
    null_txt,
    null_vec,
    mask,
    reference,
    guidance_txt,
    guidance_img,
    oscillate_txt,
    oscillate_img,
    dynamic_img_guidance,
):
    """The released sampler, written down step by step."""
    batch, _, frames, rows, columns = noise.shape
    ids = torch.cartesian_prod(*(torch.arange(n).to(noise) for n in (frames, rows // 2, columns // 2)))
    mask = torch.zeros_like(noise[:, :1]) if mask is None else mask
    given = condition_tokens(mask, torch.zeros_like(noise) if reference is None else reference, 2)
    steps = len(timesteps) - 1
    for i in range(steps):

        def predict(text, vector, cond, latent=noise, time=timesteps[i]):
            text, vector = text.expand(batch, -1, -1), vector.expand(batch, -1)
            tokens = model(patchify(latent, 2), ids.expand(batch, -1, -1), text, None, time.expand(batch), vector, cond)
            return unpatchify(tokens, 2, (frames, rows, columns))

        full = i < 10 or i % 2 == 0
        g_txt = guidance_txt if full or not oscillate_txt else 1.0
        g_img = guidance_img if full or not oscillate_img else 1.0
        if dynamic_img_guidance and g_img > 1:
            upper = torch.linspace(g_img, 1, steps + 1)[i].item()
            g_img = torch.linspace(1, upper, frames).to(noise).view(-1, 1, 1)
        c, u1 = predict(txt, vec, given), predict(null_txt, null_vec, given)
        u2 = predict(null_txt, null_vec, torch.zeros_like(given))
        noise = noise + (timesteps[i + 1] - timesteps[i]) * (u2 + g_img * (u1 - u2) + g_txt * (c - u1))
    return noise


def test_released_result(golden, golden_model):
    config, groups = golden("denoise_tiny")
    latent = denoise(
        golden_model,
        **groups["input"],
        guidance_txt=config["guidance"],
        guidance_img=config["guidance_img"],
        oscillate_txt=config["text_osci"],
        oscillate_img=config["image_osci"],
        dynamic_img_guidance=config["scale_temporal_osci"],
    )
    expected = groups["output"]["latent"]
    assert (latent - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("conditioned", "passes"), [(False, 80), (True, 110)])
def test_fifty_steps_take_no_needless_pass(conditioned, passes):
    model, steps = LinearModel(), []
    denoise(model, **inputs(batch=2, conditioned=conditioned), **GUIDANCE, on_step=steps.append)
    assert model.rows == 2 * passes
    assert steps == list(range(1, 51))


def test_an_empty_mask_is_no_condition():
    counted, plain = LinearModel(), LinearModel()
    arguments = inputs(conditioned=True)
    arguments["mask"] = torch.zeros_like(arguments["mask"])
    latent = denoise(counted, **arguments, **GUIDANCE)
    assert counted.rows == 2 * 80
    assert torch.equal(latent, denoise(plain, **arguments | {"mask": None, "reference": None}, **GUIDANCE))


@settings(max_examples=30)
@given(
    guidance_txt=st.sampled_from([1.0, 3.0, 7.5]),
    guidance_img=st.sampled_from([0.0, 1.0, 3.0]),
    oscillate_txt=st.booleans(),
    oscillate_img=st.booleans(),
    dynamic_img_guidance=st.booleans(),
    conditioned=st.booleans(),
)
def test_skipping_changes_nothing(conditioned, **guidance):
    arguments = inputs(conditioned=conditioned, steps=14)
    latent = denoise(LinearModel(), **arguments, **guidance)
    torch.testing.assert_close(latent, three_passes_per_step(LinearModel(), **arguments, **guidance))


def test_each_item_may_have_its_own_negative_prompt():
    arguments = inputs(steps=3)
    both = denoise(LinearModel(), **arguments | {"null_vec": arguments["vec"].flip(0)}, **GUIDANCE)
    for item in range(2):
        alone = {
            key: value if key == "timesteps" else value[item % len(value)][None] for key, value in arguments.items()
        }
        alone["null_vec"] = arguments["vec"][[1 - item]]
        torch.testing.assert_close(both[[item]], denoise(LinearModel(), **alone, **GUIDANCE))


class HostTensors(TorchDispatchMode):
    """Notes the operations of the steps that read a tensor of the host: on a GPU each is a copy that waits for it.

    The device is "meta" here. The steps begin with the model's first call.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.calls, self.found = model, 0, []
        self.config = getattr(model, "config", MMDIT_PRESETS["tiny"])
        if hasattr(model, "modulation"):
            self.modulation = model.modulation

    def __call__(self, *args, **options):
        self.calls += 1
        return self.model(*args, **options)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if self.calls and any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class GivenFirstFrame(torch.Tensor):
    """A mask without data that is known to be one."""

    def any(self):
        return True


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("kind", [LinearModel, MMDiT])
def test_no_step_reads_a_tensor_of_the_host(kind, conditioned, model):
    arguments = {key: value if value is None else value.to("meta") for key, value in inputs(conditioned=False).items()}
    if kind is MMDiT:
        arguments |= {"txt": torch.empty(2, 5, 48, device="meta"), "null_txt": torch.empty(1, 5, 48, device="meta")}
        arguments |= {"vec": torch.empty(2, 32, device="meta"), "null_vec": torch.empty(1, 32, device="meta")}
    if conditioned:
        mask = torch.empty(2, 1, 3, 4, 6, device="meta").as_subclass(GivenFirstFrame)
        arguments |= {"mask": mask, "reference": torch.empty(2, 4, 3, 4, 6, device="meta")}
    arguments["timesteps"] = torch.linspace(1, 0, 15)  # of the host, as the sampler passes it
    watched = HostTensors(deepcopy(model).to("meta") if kind is MMDiT else LinearModel())
    with watched:
        denoise(watched, **arguments, **GUIDANCE)
    assert watched.calls == 14
    assert watched.found == []


def test_modulation_is_computed_once_and_for_distinct_prompts_only(golden, golden_model, monkeypatch):
    rows = []
    modulation = type(golden_model).modulation

    def counting(model, timesteps, y_vec, guidance=None):
        rows.append(len(timesteps))
        return modulation(model, timesteps, y_vec, guidance)

    monkeypatch.setattr(type(golden_model), "modulation", counting)
    denoise(golden_model, **golden("denoise_tiny")[1]["input"], **GUIDANCE)
    assert rows == [14 * 2]


class Straight:
    """Knows the data: its velocity leads straight there."""

    def __init__(self, data):
        self.data_BNC = patchify(data, 2)

    def __call__(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None):
        repeats = len(img) // len(self.data_BNC)
        return (img - self.data_BNC.repeat(repeats, 1, 1)) / timesteps.view(-1, 1, 1)


def test_previews_are_the_clean_latents_that_the_steps_predict():
    arguments = inputs(conditioned=False, steps=5)
    data = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    told = []
    latent = denoise(
        Straight(data), **arguments, **GUIDANCE, on_latent=lambda step, clean: told.append((step, clean.clone()))
    )
    assert [step for step, _ in told] == [1, 2, 3, 4, 5]
    for _, clean in told:
        torch.testing.assert_close(clean, data)
    torch.testing.assert_close(latent, told[-1][1])


@pytest.mark.parametrize("precomputed", [True, False])
def test_a_distilled_model_takes_its_scale_as_an_input(precomputed):
    config = replace(MMDIT_PRESETS["tiny"], guidance_embed=True, cond_embed=False)
    distilled = MMDiT(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in distilled.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    noise, txt, vec = (torch.randn(shape, generator=generator) for shape in ((1, 4, 1, 4, 6), (1, 5, 48), (1, 32)))
    times = sampling_schedule(3, 6, 1)
    latent = denoise(
        distilled if precomputed else lambda *args, **options: distilled(*args, **options),
        noise,
        timesteps=times,
        txt=txt,
        vec=vec,
        null_txt=txt,
        null_vec=vec,
        mask=None,
        reference=None,
        guidance_txt=1.0,
        guidance_img=1.0,
        oscillate_txt=False,
        oscillate_img=False,
        dynamic_img_guidance=False,
        embedded_guidance=4.0,
    )
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3))[None]
    scale = torch.tensor([4.0])
    for now, then in pairwise(times):
        tokens = distilled(patchify(noise, 2), ids, txt, torch.zeros(1, 5, 3), now[None], vec, guidance=scale)
        noise = noise + (then - now) * unpatchify(tokens, 2, (1, 4, 6))
    torch.testing.assert_close(latent, noise)


def test_half_a_condition_is_refused():
    with pytest.raises(UserError, match="mask and reference belong together"):
        denoise(LinearModel(), **inputs() | {"mask": None}, **GUIDANCE)


def test_a_schedule_without_a_step_is_refused():
    with pytest.raises(UserError, match="timesteps has length 1: pass at least 2"):
        denoise(LinearModel(), **inputs() | {"timesteps": torch.ones(1)}, **GUIDANCE)


class Blocks:
    """An autoencoder that averages blocks of 4 frames (a lone frame: 1) x 8 x 8 pixels; latents keep the colours."""

    causal = False
    latent_channels = 4
    compression = (4, 8, 8)

    def latent_shape(self, frames, height, width):
        return max(frames // 4, 1), height // 8, width // 8

    def frames_of(self, latent_frames):
        return 1 if latent_frames == 1 else latent_frames * 4

    def encode(self, video):
        size = (1 if video.shape[2] == 1 else 4, 8, 8)
        colours = torch.nn.functional.avg_pool3d(video, size)
        return torch.cat([colours, colours[:, :1]], dim=1)

    def decode(self, latent):
        self.decoded = latent
        time = 1 if latent.shape[2] == 1 else 4
        return torch.nn.functional.interpolate(latent[:, :3], scale_factor=(time, 8, 8))


class Letters:
    """Text encoders that know a prompt by its length."""

    def encode(self, prompts):
        generator = torch.Generator()
        drawn = [torch.randn(4, 48, generator=generator.manual_seed(len(prompt))) for prompt in prompts]
        return torch.stack(drawn), torch.stack([txt[0, :32] for txt in drawn])

    def null(self):
        return self.encode([""])


@pytest.fixture(scope="module")
def model():
    model = MMDiT(MMDIT_PRESETS["tiny"]).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


SMALL = SamplingSettings(resolution="64px", aspect_ratio="1:1", frames=16, steps=3)


def test_videos_have_the_asked_size_and_their_own_seeds(model):
    video = sample(model, Blocks(), Letters(), ["rain", "a storm"], SMALL)
    assert video.shape == (2, 3, 16, 64, 64)
    assert video.abs().max() <= 1
    alone = sample(model, Blocks(), Letters(), ["a storm"], replace(SMALL, seed=1))
    torch.testing.assert_close(video[1:], alone, rtol=0, atol=1e-4)
    again = sample(model, Blocks(), Letters(), ["rain", "a storm"], SMALL)
    assert torch.equal(video, again)
    image = sample(model, Blocks(), Letters(), ["rain"], replace(SMALL, frames=1))
    assert image.shape == (1, 3, 1, 64, 64)


@pytest.mark.parametrize(
    ("condition", "given"),
    [("i2v_head", {0: "head"}), ("i2v_tail", {-1: "tail"}), ("i2v_loop", {0: "head", -1: "tail"})],
)
def test_given_frames_are_kept_for_every_item(model, condition, given):
    autoencoder = Blocks()
    pixels = {
        end: torch.rand(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(len(end))) for end in ("head", "tail")
    }
    pixels["tail"] = -pixels["tail"]
    sample(
        model,
        autoencoder,
        Letters(),
        ["rain", "a storm"],
        SMALL,
        condition=condition,
        head_BCFHW=pixels["head"],
        tail_BCFHW=pixels["tail"],
    )
    for frame, end in given.items():
        assert torch.equal(autoencoder.decoded[:, :, [frame]], autoencoder.encode(pixels[end]))
    assert not torch.equal(autoencoder.decoded[:, :, 1], torch.zeros_like(autoencoder.decoded[:, :, 1]))


def test_previews_show_the_given_frames(model):
    autoencoder, head = Blocks(), torch.rand(1, 3, 1, 64, 64)
    shown = []

    def on_latent(step, latent):
        shown.append(latent)

    options = {"condition": "i2v_head", "head_BCFHW": head, "on_latent": on_latent}
    sample(model, autoencoder, Letters(), ["rain"], SMALL, **options)
    assert len(shown) == SMALL.steps
    for latent in shown:
        assert torch.equal(latent[:, :, [0]], autoencoder.encode(head))
    torch.testing.assert_close(shown[-1], autoencoder.decoded)


def test_the_given_frame_changes_the_rest(model):
    autoencoder = Blocks()
    rest = []
    for colour in (-1.0, 1.0):
        head = torch.full((1, 3, 1, 64, 64), colour)
        sample(model, autoencoder, Letters(), ["rain"], SMALL, condition="i2v_head", head_BCFHW=head)
        rest.append(autoencoder.decoded[:, :, 1:])
    assert (rest[0] - rest[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "condition", "message"),
    [
        ({"frames": 4}, "t2v", "frames=4: the autoencoder decodes them to 1; use 1, or at least 8"),
        ({"frames": 1}, "i2v_head", "frames=1: an image cannot"),
        ({"frames": 32}, "v2v_head", "'v2v_head' gives 8 latent frames of a clip that has 8"),
        ({"resolution": "big"}, "t2v", "'big'"),
        ({"aspect_ratio": "7:1"}, "t2v", "'7:1'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, condition, message):
    with pytest.raises(UserError, match=message):
        output_size(MMDIT_PRESETS["tiny"], Blocks(), replace(SMALL, **changes), condition)


def test_a_model_without_condition_embedding_takes_no_image():
    config = replace(MMDIT_PRESETS["tiny"], cond_embed=False)
    with pytest.raises(UserError, match="'i2v_head': this model takes no image"):
        output_size(config, Blocks(), SMALL, "i2v_head")


@pytest.mark.parametrize("changes", [{"frames": 0}, {"steps": 0}, {"fps": 0}, {"seed": -1}, {"motion_score": -1}])
def test_settings_out_of_range_are_named(changes):
    ((name, value),) = changes.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        SamplingSettings(**changes)
