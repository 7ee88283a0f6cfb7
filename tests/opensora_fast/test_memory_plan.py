"""Memory plans: predictions against bytes that are counted in real runs, and the choice under a budget."""

import gc
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from opensora_fast import memory_plan
from opensora_fast.block_streaming import host_model, stream_blocks
from opensora_fast.config import MMDiTConfig, VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.flux import FluxImages
from opensora_fast.memory_plan import (
    GIB,
    budget_for,
    choose_memory,
    copied_bytes,
    every_setting,
    parse_bytes,
    usable_bytes,
)
from opensora_fast.memory_prediction import (
    MemorySettings,
    PictureNeeds,
    SamplingShape,
    TextNeeds,
    activation_bytes,
    add_weights,
    meta_model,
    module_bytes,
    predict,
)
from opensora_fast.mmdit import MMDiT
from opensora_fast.packed_weights import weight_places
from opensora_fast.peak_memory import LiveBytes
from opensora_fast.phases import Phases
from opensora_fast.resolutions import ASPECT_RATIOS
from opensora_fast.sampling import sample
from opensora_fast.sampling_settings import SamplingSettings
from opensora_fast.text import TextEncoders, save_tiny_text_encoders

CPU = torch.device("cpu")
DTYPE = torch.float32
CONFIG = MMDiTConfig(
    in_channels=8,
    patch_size=1,
    vec_in_dim=24,
    context_in_dim=40,
    hidden_size=64,
    num_heads=2,
    depth=3,
    depth_single_blocks=4,
    axes_dim=(4, 14, 14),
)
AUTOENCODER = VideoDCAEConfig(
    latent_channels=8,
    encoder_widths=(8, 16, 32),
    decoder_widths=(8, 16, 32),
    encoder_depths=(1, 1, 1),
    decoder_depths=(1, 1, 1),
    encoder_block_types=("ResBlock", "ResBlock", "EViTS5_GLU"),
    decoder_block_types=("ResBlock", "ResBlock", "EViTS5_GLU"),
    temporal_downsample=(True, True, False),
    heads_dim=16,
    use_spatial_tiling=True,
    spatial_tile_size=32,
)
SETTINGS = SamplingSettings(height=32, width=80, frames=8, steps=3, guidance=4.0)
TOKENS = 24
SMALL = 2**14  # bytes of single small tensors that one of two counts has and the other not
LAYOUT = {"max_length_t5": TOKENS, "max_length_clip": 64}


def shape_of(condition: str, *, previews: bool = False) -> SamplingShape:
    return SamplingShape(settings=SETTINGS, condition=condition, text_tokens=TOKENS, previews=previews)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    save_tiny_text_encoders(folder, t5_dim=40, clip_dim=24, seed=0)
    return folder / "t5", folder / "clip"


@pytest.fixture(scope="module")
def models(folders):
    torch.manual_seed(0)
    model = MMDiT(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    autoencoder = VideoDCAE(AUTOENCODER).channels_last().eval().requires_grad_(False)
    for name, parameter in autoencoder.named_parameters():
        if not name.endswith("bias"):
            parameter.normal_(std=0.2)
    return model, autoencoder, TextEncoders.from_folders(*folders, **LAYOUT)


@pytest.fixture(scope="module")
def activations(models):
    """What is predicted, by condition."""
    return {name: activation_bytes(CONFIG, models[1], shape_of(name), DTYPE) for name in ("t2v", "i2v_head")}


def arguments(condition: str) -> dict:
    pixels = torch.linspace(-1, 1, 3 * 32 * 80).view(1, 3, 1, 32, 80)
    return {"condition": condition, "head_BCFHW": None if condition == "t2v" else pixels}


class Encoded:
    """Embeddings of a prompt, made when they are asked for."""

    def __init__(self, config=CONFIG):
        self.config = config

    def encode(self, prompts):
        config = self.config
        return torch.ones(len(prompts), TOKENS, config.context_in_dim), torch.ones(len(prompts), config.vec_in_dim)

    def null(self):
        return self.encode([""])


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("24GiB", 24 * 2**30),
        (" 24 gib ", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("7KiB", 7168),
        ("100", 100),
        (100, 100),
        ("8b", 8),
    ],
)
def test_budgets_are_read(text, bytes):
    assert parse_bytes(text) == bytes


@pytest.mark.parametrize("text", ["", "GiB", "24 apples", "-3GiB", "1e9", "0GiB", "0.5", "24 GiB please", "nan"])
def test_budgets_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="memory budget"):
        parse_bytes(text)


def test_budget_for_is_the_least_that_is_usable():
    for bytes in (1, 10**9, 17 * GIB + 3):
        budget = budget_for(bytes)
        assert usable_bytes(budget) >= bytes
        assert usable_bytes(budget - 2**20) < bytes
    assert usable_bytes(2**20) == 0


@pytest.mark.parametrize("condition", ["t2v", "i2v_head"])
def test_activations_are_those_of_a_real_run(models, activations, condition, monkeypatch):
    """Counted in a real `sample`, whose weights were there before."""
    model, autoencoder, _ = models
    predicted, real = activations[condition], arguments(condition)
    peaks: dict[str, int] = {}
    with LiveBytes() as live:

        def lap(name):
            if name not in peaks:
                peaks[name] = live.peak
                live.peak = live.now

        decode = autoencoder.decode
        monkeypatch.setattr(autoencoder, "decode", lambda latent: (lap("denoise"), decode(latent))[1], raising=False)
        handles = [
            model.time_in.register_forward_pre_hook(lambda *_: lap("encode")),
            model.final_layer.modulation.register_forward_hook(lambda *_: lap("modulation")),
        ]
        if condition != "t2v":
            live.hold([real["head_BCFHW"]])
        sample(model, autoencoder, Encoded(), ["a ship"], SETTINGS, **real)
        lap("decode")
    for handle in handles:
        handle.remove()
    assert set(peaks) == {"encode", "modulation", "denoise", "decode"}
    for name, bytes in peaks.items():
        assert bytes * 0.97 - SMALL <= predicted[name] <= bytes * 1.1 + SMALL, (name, bytes, predicted)


def test_previews_are_predicted(models, activations):
    """A preview is decoded while the steps hold what they hold, and may bring the autoencoder for it."""
    model, autoencoder, _ = models
    previews = activation_bytes(CONFIG, autoencoder, shape_of("t2v", previews=True), DTYPE)
    assert activations["t2v"]["preview"] == 0
    assert previews | {"preview": 0} == activations["t2v"]
    peaks = []
    with LiveBytes() as live:

        def preview(step, latent):
            live.peak = live.now
            autoencoder.decode(latent[:, :, [1]])
            peaks.append(live.peak)

        sample(model, autoencoder, Encoded(), ["a ship"], SETTINGS, on_latent=preview)
    assert max(peaks) * 0.97 - SMALL <= previews["preview"] <= max(peaks) * 1.1 + SMALL
    many = previews | {"preview": 10**9}
    for settings in (MemorySettings(), MemorySettings(autoencoder="while_used")):
        with_it, without = (
            add_weights(each, meta_model(CONFIG, DTYPE), autoencoder, TextNeeds(0, 0), settings)
            for each in (many, activations["t2v"])
        )
        weights = add_weights(dict.fromkeys(many, 0), meta_model(CONFIG, DTYPE), autoencoder, TextNeeds(0, 0), settings)
        brought = module_bytes(autoencoder) * (settings.autoencoder == "while_used")
        assert with_it["denoise"] == weights["denoise"] + 10**9 + brought
        assert {name: bytes for name, bytes in with_it.items() if name != "denoise"} == {
            name: bytes for name, bytes in without.items() if name != "denoise"
        }


@pytest.mark.parametrize("what", ["open-sora-v2", "diffusers-flux"])
def test_a_picture_of_flux_is_predicted(what, models, activations, released_folder):
    """Counted in a real `FluxImages.image`: blocks streamed, the autoencoder there while it is used."""
    pytest.importorskip("diffusers")
    folder = released_folder(what)
    needs = PictureNeeds.of_folder(folder, DTYPE, resolution="256px", steps=3, text_tokens=TOKENS)
    flux = FluxImages.from_folder(folder, text=None)
    flux.text = Encoded(flux.model.config)
    rest = sum(parameter.nbytes for name, parameter in flux.model.named_parameters() if "blocks" not in name)
    rest -= sum(parameter.nbytes for parameter in flux.model.final_layer.modulation.parameters())
    flux.autoencoder = Phases(CPU).autoencoder(flux.autoencoder)
    stream_blocks(flux.model, CPU)
    ratio = max(ASPECT_RATIOS, key=lambda ratio: math.prod(flux.size("256px", ratio)))
    with LiveBytes() as live:
        flux.image(["a ship"], resolution="256px", aspect_ratio=ratio, steps=3)
    counted = live.peak + rest
    assert counted * 0.97 - SMALL <= needs.resident + needs.work <= counted * 1.1 + SMALL
    text, settings = TextNeeds(10**6, 0), MemorySettings()
    without, with_it = (
        add_weights(activations["t2v"], meta_model(CONFIG, DTYPE), models[1], text, settings, picture)
        for picture in (None, needs)
    )
    weights = add_weights(
        dict.fromkeys(activations["t2v"], 0), meta_model(CONFIG, DTYPE), models[1], text, settings, needs
    )
    assert with_it.pop("picture") == weights["picture"] == weights["encode"] + needs.work
    assert with_it == {name: bytes + needs.resident for name, bytes in without.items()}


@pytest.mark.parametrize("settings", [each for fp8 in (False, True) for each in every_setting(fp8=fp8)], ids=str)
def test_predictions_follow_the_settings(models, activations, settings):
    model, autoencoder, _ = models
    weights = sum(parameter.nbytes for parameter in model.parameters())
    text = TextNeeds(10**6, 3000)
    activations = activations["t2v"]
    predicted = add_weights(activations, meta_model(CONFIG, DTYPE), autoencoder, text, settings)
    if settings in (MemorySettings(), MemorySettings(fp8=True)):
        assert predict(CONFIG, autoencoder, text, settings, shape_of("t2v"), DTYPE) == predicted
    assert list(predicted) == ["text", "encode", "denoise", "decode"]
    outside = predicted["denoise"] - (settings.text == "resident") * text.weights
    outside -= (settings.autoencoder == "resident") * module_bytes(autoencoder)
    if settings == MemorySettings():
        assert outside == activations["denoise"] + weights
    elif settings.blocks == "streamed" or settings.modulation == "precomputed":
        assert outside < activations["denoise"] + weights
    assert predicted["text"] - predicted["encode"] == (
        text.work
        + activations["text"]
        - activations["encode"]
        + (settings.text == "while_used") * text.weights
        - (settings.autoencoder == "while_used") * module_bytes(autoencoder)
    )


def test_predicting_leaves_the_autoencoder_as_it_was(models):
    _, autoencoder, _ = models
    before = [place.tensor for place in weight_places(autoencoder)]
    runner = autoencoder.run_tiles
    activation_bytes(CONFIG, autoencoder, shape_of("t2v"), DTYPE)
    assert all(place.tensor is tensor for place, tensor in zip(weight_places(autoencoder), before, strict=True))
    assert autoencoder.run_tiles is runner


def test_more_tiles_in_a_call_take_more(models, activations):
    four = activation_bytes(CONFIG, models[1], shape_of("t2v"), DTYPE, tile_batch=4)
    assert four["decode"] > 1.2 * activations["t2v"]["decode"]


def test_requests_that_sample_refuses_are_refused(models):
    _, autoencoder, _ = models
    shape = SamplingShape(settings=replace(SETTINGS, frames=17))
    with pytest.raises(UserError, match="frames=17"):
        activation_bytes(CONFIG, autoencoder, shape, DTYPE)


@pytest.fixture
def choose(models, activations, monkeypatch):
    """choose(budget): with activations that were predicted before, and no memory left to a GPU's libraries, which is
    more than these models take."""
    monkeypatch.setattr(memory_plan, "CONTEXT", 0)
    monkeypatch.setattr(memory_plan, "activation_bytes", lambda *arguments: activations[arguments[2].condition])

    def choose(budget, **options):
        shapes = [shape_of("i2v_head"), shape_of("t2v")]
        return choose_memory(budget, CONFIG, models[1], TextNeeds(3 * 10**6, 10**5), shapes, DTYPE, **options)

    return choose


def test_the_fastest_that_fits_is_chosen(models, activations, choose):
    _, autoencoder, _ = models
    largest = {phase: max(each[phase] for each in activations.values()) for phase in activations["t2v"]}
    predictions = {
        settings: max(
            add_weights(largest, meta_model(CONFIG, DTYPE), autoencoder, TextNeeds(3 * 10**6, 10**5), settings).values()
        )
        for settings in every_setting(fp8=False)
    }
    cost = {
        settings: copied_bytes(
            settings, meta_model(CONFIG, DTYPE), module_bytes(autoencoder), 3 * 10**6, SETTINGS.steps
        )
        for settings in predictions
    }
    assert cost[MemorySettings()] == 0
    seen = set()
    for budget in range(budget_for(min(predictions.values())), budget_for(max(predictions.values())) + 2**21, 2**20):
        plan = choose(budget)
        fitting = [each for each, peak in predictions.items() if peak <= usable_bytes(budget)]
        assert plan.settings in fitting
        assert cost[plan.settings] == min(cost[each] for each in fitting)
        assert plan.peak == predictions[plan.settings]
        assert str(plan.settings) in plan.reason
        seen.add(plan.settings)
    assert MemorySettings() in seen
    assert len(seen) > 1
    assert choose(10**12, fp8=True).settings == MemorySettings(fp8=True)


def test_what_does_not_fit_is_told_with_what_would(choose):
    with pytest.raises(UserError, match=r"memory budget 0\.01 GiB: the request needs .* GiB at least") as failure:
        choose(2**20)
    assert "\n" not in str(failure.value)


WAYS = every_setting(fp8=False)
SINGLE = [
    each
    for each in WAYS
    if sum(part != "resident" for part in (each.text, each.autoencoder, each.blocks, each.modulation)) in (1, 4)
]


@pytest.fixture(scope="module")
def expected(models):
    return sample(*models, ["a ship"], SETTINGS, **arguments("i2v_head"))


@pytest.mark.parametrize(
    "settings",
    [pytest.param(each, marks=[] if each in SINGLE else pytest.mark.slow, id=str(each)) for each in WAYS],
)
def test_every_setting_gives_the_same_video(models, expected, settings):
    model, autoencoder, text = models
    placed = host_model(CONFIG, DTYPE, CPU, **settings.stream_arguments())
    placed.load_state_dict(model.state_dict())
    streamed = stream_blocks(placed, CPU, **settings.stream_arguments())
    phases = Phases(CPU)
    video = sample(
        placed,
        phases.autoencoder(autoencoder) if settings.autoencoder == "while_used" else autoencoder,
        phases.text(text) if settings.text == "while_used" else text,
        ["a ship"],
        SETTINGS,
        **arguments("i2v_head"),
    )
    streamed.close()
    assert expected.std() > 0.01
    assert video.equal(expected)


def test_text_encoders_need_what_they_are_counted_to_need(folders, models):
    told = TextNeeds.of_folders(*folders, DTYPE, videos=2, **LAYOUT)
    text = models[2]
    assert told.weights == sum(module_bytes(encoder.model) for encoder in (text.t5, text.clip))
    with LiveBytes() as live:
        text.encode(["a ship", "a whale"])
    assert live.peak * 0.9 <= told.work <= live.peak * 1.1 + 2**12


def test_text_folders_without_a_configuration_are_refused(tmp_path, folders):
    with pytest.raises(UserError, match="no config.json: name one that holds a T5"):
        TextNeeds.of_folders(tmp_path, folders[1], DTYPE, videos=1, **LAYOUT)


def test_a_module_is_on_the_device_only_while_it_is_used():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(3, 4)
    expected, before = module(x), [place.tensor.clone() for place in weight_places(module)]
    phases = Phases(CPU)
    phases.keep_away(module)
    phases.keep_away(module)
    at_home = module[0].weight.data_ptr()
    with LiveBytes() as live:
        for _ in range(2):
            with phases.use(module, nn.Linear(2, 2)), phases.use(module):
                there = module[0].weight.data_ptr()
                assert there != at_home
                assert live.now >= 2 * module_bytes(module) // 2
                assert module(x).equal(expected)
            assert module[0].weight.data_ptr() == at_home
        gc.collect()
        assert live.now <= 1024
    with pytest.raises(ZeroDivisionError), phases.use(module):
        _ = 1 / 0
    assert module[0].weight.data_ptr() == at_home
    after = [place.tensor for place in weight_places(module)]
    assert all(one.equal(other) for one, other in zip(before, after, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: modules that move there and back")
def test_a_module_moves_to_the_gpu_and_back():
    device = torch.device("cuda", torch.cuda.current_device())
    module, x = nn.Linear(64, 64), torch.randn(3, 64, device=device)
    expected = nn.functional.linear(x, module.weight.to(device), module.bias.to(device))
    phases = Phases(device)
    phases.keep_away(module)
    for _ in range(5):
        with phases.use(module):
            assert module.weight.device == device
            assert module(x).equal(expected)
        assert module.weight.is_pinned()
