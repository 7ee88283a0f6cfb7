"""Where models wait and compute, as the options say, in one process and in several."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opensora_fast import cli, loaded_models
from opensora_fast.errors import UserError
from opensora_fast.flux_autoencoder import FluxAutoencoder
from opensora_fast.loaded_models import LoadOptions, choose, load_models
from opensora_fast.memory_plan import GIB, MemoryPlan, choose_memory, every_setting, usable_bytes
from opensora_fast.memory_prediction import MemorySettings, activation_bytes, add_weights, meta_model
from opensora_fast.model_folder import find_model
from opensora_fast.pipeline import VideoPipeline
from opensora_fast.sampling_ranks import SamplingRanks
from opensora_fast.sampling_settings import SamplingSettings

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SMALL = SamplingSettings(height=32, width=48, frames=5, steps=1, guidance=1.0)
STREAMED = MemorySettings(text="while_used", autoencoder="while_used", blocks="streamed", modulation="precomputed")


def test_8_bits_alone_send_nothing_away(released_folder):
    folder = released_folder("open-sora-v2")
    models = VideoPipeline.from_pretrained(folder, flux=folder, fp8=True).models
    assert models.flux is not None
    assert isinstance(models.flux.autoencoder, FluxAutoencoder)
    assert not any(module._forward_pre_hooks for module in models.flux.model.modules())
    assert any(module._forward_pre_hooks for module in models.model.modules())


def test_previews_and_the_pictures_of_flux_are_planned_for(released_folder, monkeypatch):
    folder = released_folder("open-sora-v2")
    plans = []

    def plan(budget, config, autoencoder, text, shapes, dtype, *, fp8, picture, on_gpu):
        assert not on_gpu
        plans.append((shapes, picture))
        return MemoryPlan(budget, STREAMED, {"denoise": 1}, "as the test says")

    monkeypatch.setattr(loaded_models, "choose_memory", plan)
    options = LoadOptions(memory_budget="2GiB")
    wanted = [(SMALL, "t2v"), (replace(SMALL, seed=2), "t2v")]
    choose(find_model(folder), options, wanted)
    for resolution in ("64px", "128px"):
        choose(find_model(folder, flux=folder), replace(options, previews=True, flux_resolution=resolution), wanted)
    (plain, without), (previewed, small), (_, large) = plans
    assert [shape.previews for shape in plain] == [False]
    assert [shape.previews for shape in previewed] == [True]
    assert without is None
    assert 0 < small.resident == large.resident
    assert 0 < small.work < large.work


def test_a_budget_that_flux_alone_breaks_names_what_would_do(released_folder):
    folder = released_folder("open-sora-v2")
    with pytest.raises(UserError, match="memory budget 0.01 GiB: the request needs .* GiB at least"):
        choose(find_model(folder, flux=folder), LoadOptions(memory_budget="1MiB"), [(SMALL, "t2v")])


def file_in_memory(address):
    """The number of the file that memory is mapped from; 0: from none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, _, _, _, number, *_ = line.split()
        begin, end = (int(each, 16) for each in extent.split("-"))
        if begin <= address < end:
            return int(number)
    raise AssertionError(f"nothing is mapped at {address}")


def video(folder, ranks=None):
    """From FLUX's picture; transformers streamed, all else on the device only while it is used."""
    with pytest.MonkeyPatch.context() as patch:
        plan = MemoryPlan(2**31, STREAMED, {"denoise": 1}, "as the test says")
        patch.setattr(loaded_models, "choose_memory", lambda *_, **__: plan)
        pipe = VideoPipeline.from_pretrained(
            folder, flux=folder, flux_resolution="64px", memory_budget="2GiB", largest=SMALL, ranks=ranks
        )
    streamed = [model.double_blocks[0].img.qkv.weight for model in (pipe.models.model, pipe.models.flux.model)]
    files = [file_in_memory(weight.data_ptr()) for weight in streamed]
    frames = pipe("fog", settings=SMALL, output_type="pt").frames
    return frames, files


def video_of_rank(folder):
    return video(folder, SamplingRanks(torch.device("cpu")))


def test_ranks_stream_one_copy_and_make_the_video_of_one_process(released_folder, ranks):
    folder = released_folder("open-sora-v2")
    expected, alone = video(folder)
    assert alone == [0, 0]
    (first, files), (second, others) = ranks(2).run("opensora_fast/test_loaded_models.py:video_of_rank", folder)
    assert files == others
    assert 0 not in files
    assert first.equal(second)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


def readings_of_rank(folder):
    readings = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded_models, "load_mmdit_from", lambda *_, **more: readings.append(1) or fill(*_, **more))
        pipe = VideoPipeline.from_pretrained(folder, ranks=SamplingRanks(torch.device("cpu")))
    return pipe("fog", settings=SMALL, output_type="pt").frames, readings


fill = loaded_models.load_mmdit_from


def test_without_a_budget_too_one_rank_reads_the_transformer(released_folder, ranks):
    folder = released_folder("open-sora-v2")
    expected = VideoPipeline.from_pretrained(folder)("fog", settings=SMALL, output_type="pt").frames
    (first, readings), (second, none) = ranks(2).run("opensora_fast/test_loaded_models.py:readings_of_rank", folder)
    assert (readings, none) == ([1], [])
    assert first.equal(second)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


def test_a_budget_that_needs_streaming_makes_the_same_file(released_folder, tmp_path, monkeypatch, capsys):
    """From the command line, by the real plan: the smallest budget that does leaves nothing on the device."""
    seen = []

    def spied(budget, *arguments, **options):
        seen.append(arguments)
        return choose_memory(budget, *arguments, **options)

    monkeypatch.setattr(loaded_models, "choose_memory", spied)
    words = ["sample", "--checkpoint", str(released_folder("open-sora-v2")), "--prompt", "fog", "--frames", "1"]
    words += ["--height", "32", "--width", "48", "--steps", "2", "--out"]
    assert cli.main([*words, str(tmp_path / "large.png"), "--memory-budget", "1GiB"]) == 0
    assert "blocks resident" in capsys.readouterr().err
    config, autoencoder, text, [shape], dtype = seen[0]
    activations, model = activation_bytes(config, autoencoder, shape, dtype), meta_model(config, dtype)
    ways = [add_weights(activations, model, autoencoder, text, each) for each in every_setting(fp8=False)]
    least = min(max(predicted.values()) for predicted in ways)
    budget = next(bytes for bytes in range(least, 2 * least) if usable_bytes(bytes, on_gpu=False) >= least)
    assert cli.main([*words, str(tmp_path / "small.png"), "--memory-budget", str(budget)]) == 0
    assert f"memory: {STREAMED}: " in capsys.readouterr().err
    assert (tmp_path / "small.png").read_bytes() == (tmp_path / "large.png").read_bytes()
    assert cli.main([*words, str(tmp_path / "none.png"), "--memory-budget", str(budget - 2)]) == 2


class Card:
    """One of two GPUs of 141 GiB, the second the current one, and the limits that PyTorch's allocator is given."""

    def __init__(self, monkeypatch):
        self.limits: list[tuple[float, int]] = []
        properties = SimpleNamespace(total_memory=141 * GIB)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
        set_fraction = lambda fraction, device: self.limits.append((fraction, device))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", set_fraction, raising=False)


@pytest.mark.parametrize("name", [None, "cuda"])
def test_the_gpu_has_its_number(name, monkeypatch):
    """Without it PyTorch refuses to limit the allocator."""
    Card(monkeypatch)
    device, dtype = loaded_models._place(LoadOptions(device=name), None)
    assert (device, dtype) == (torch.device("cuda", 1), torch.bfloat16)


def test_a_budget_limits_the_allocator_until_there_is_none(released_folder, monkeypatch):
    """What the context takes is not the allocator's."""
    card, parts = Card(monkeypatch), find_model(released_folder("open-sora-v2"))

    class Enough(Exception):
        pass

    def no_further(*_):
        raise Enough

    plan = MemoryPlan(24 * GIB, STREAMED, {"denoise": 1}, "as the test says")
    monkeypatch.setattr(loaded_models, "choose_memory", lambda *_, **__: plan)
    monkeypatch.setattr(loaded_models, "load_text_encoders", no_further)
    for budget in ("24GiB", None):
        with pytest.raises(Enough):
            load_models(parts, LoadOptions(memory_budget=budget), [(SMALL, "t2v")])
    assert card.limits == [(23 / 141, 1), (1.0, 1)]
