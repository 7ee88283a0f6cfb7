"""`bench sample`: what is measured and what is modelled cannot be taken for each other, and the model adds up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from opensora_fast import cli
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT
from opensora_fast.profiling import ledger, sample_bench, sample_cases, sample_model
from opensora_fast.profiling.block import forward_traffic
from opensora_fast.profiling.hardware import H200
from opensora_fast.profiling.machine import Machine
from opensora_fast.profiling.sample_cases import MODELS, Result, SampleCase
from opensora_fast.profiling.sample_measurement import Measurement

TINY = ["bench", "sample", "--model", "tiny", "--resolutions", "64px", "--steps", "13"]


def case(model: str = "open-sora-v2", resolution: str = "768px", gpus: int = 1, **more) -> SampleCase:
    sizes = {"frames": MODELS[model].frames, "steps": 50} | more
    return SampleCase(model=model, resolution=resolution, gpus=gpus, **sizes)


def test_a_row_is_measured_and_another_modelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "rows.jsonl"
    assert cli.main([*TINY, "--device", "cpu", "--gpus", "8", "--timed-steps", "2", "--out", str(out)]) == 0
    measured, modelled = ledger.read([out])
    assert measured["status"] == "timed"
    assert measured["case"].endswith("13 steps, 1 GPU")
    assert measured["timed_steps"] == {"1": 2, "2": 2}
    assert measured["steps"] == {"1": 1, "2": 12}
    assert measured["p50"] == pytest.approx(sum(measured["phases"].values()))
    assert all(measured["phases"][phase] > 0 for phase in ("text", "denoise", "decode"))
    assert modelled["status"] == "modelled"
    assert modelled["device"] == H200.name
    assert "p50" not in modelled
    assert "modelled for H200 by profiling.sample_model" in modelled["reason"]
    assert modelled["seconds"] == pytest.approx(sum(modelled["phases"].values()))
    printed = " ".join(capsys.readouterr().out.split())
    assert "measured, 2 x 2 of 13 steps" in printed
    assert "modelled" in printed


def test_a_row_is_there_when_a_later_case_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modelled = sample_bench.modelled_result

    def cut(of: SampleCase) -> Result:
        if of.gpus == 8:
            raise KeyboardInterrupt
        return modelled(of)

    monkeypatch.setattr(sample_bench, "modelled_result", cut)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample_bench.main([*TINY[2:], "--device", "none", "--out", str(out)])
    (row,) = ledger.read([out])
    assert f"{row['case']}: modelled: text " in capsys.readouterr().out


def test_without_a_gpu_everything_is_modelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert cli.main([*TINY, "--device", "none", "--out", str(out)]) == 0
    rows = ledger.read([out])
    assert [row["status"] for row in rows] == ["modelled", "modelled"]
    assert "measured on: nothing" in capsys.readouterr().out


def test_the_released_models_stay_within_the_targets_by_the_model() -> None:
    pytest.importorskip("diffusers")
    one, eight = (sample_bench.modelled_result(case(gpus=gpus)) for gpus in (1, 8))
    assert (one.case.target, eight.case.target) == (900, 130)
    assert [line[-1] for line in sample_bench.table([one, eight])] == ["within, by the model"] * 2
    # 80 passes of 5.09 PFLOP, four fifths of them attention, at the rates of the model: no faster than its products.
    assert 80 * 5.09e15 / H200.matmul_flops < one.seconds["denoise"] < 80 * 5.09e15 / H200.matmul_flops * 1.25
    assert one.seconds["denoise"] / 8 <= eight.seconds["denoise"] < one.seconds["denoise"] / 6
    assert one.seconds["decode"] / 8 <= eight.seconds["decode"] < one.seconds["decode"] / 5  # 18 tiles of four sizes
    assert one.seconds["text"] == eight.seconds["text"] > 0


def test_passes_are_those_of_the_sampler() -> None:
    assert sum(case().passes()) == 80
    assert case().passes()[:12] == [2] * 11 + [1]


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_a_pass_more_is_no_faster(gpus: int) -> None:
    one, two = (sample_model.step_seconds(case(resolution="256px", gpus=gpus), passes) for passes in (1, 2))
    assert one < two


def test_sizes_are_those_of_the_autoencoders() -> None:
    for model, models in MODELS.items():
        if model == "open-sora-v2":
            pytest.importorskip("diffusers")
        of = case(model, "256px")
        autoencoder = of.autoencoder()
        assert models.layout.compression == autoencoder.compression
        assert models.layout.causal == autoencoder.causal
        assert models.layout.latent_channels == autoencoder.latent_channels
        assert of.config.latent_channels == autoencoder.latent_channels
        assert of.latent_thw == autoencoder.latent_shape(of.frames, *of.size)
        assert all(models.layout.frames_of(t) == autoencoder.frames_of(t) for t in (1, 2, 9))
    assert case().video_tokens == 76_032


def test_a_tile_of_a_size_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode in tiles costs each of them, and dealt out to as many ranks as tiles the longest."""
    tiled = sample_cases.VideoDCAEConfig(
        **{
            **{name: getattr(sample_cases.TINY_AUTOENCODER, name) for name in ("latent_channels", "heads_dim")},
            "encoder_widths": (8, 8),
            "decoder_widths": (8, 8),
            "encoder_depths": (1, 1),
            "decoder_depths": (1, 1),
            "encoder_block_types": ("ResBlock",) * 2,
            "decoder_block_types": ("ResBlock",) * 2,
            "temporal_downsample": (True, False),
            "use_spatial_tiling": True,
            "spatial_tile_size": 8,
            "tile_overlap_factor": 0.0,
        }
    )
    models = sample_cases.Models(
        autoencoder=lambda: sample_cases.VideoDCAE(tiled), layout=MODELS["tiny"].layout, frames=8
    )
    monkeypatch.setitem(sample_cases.MODELS, "tiles", models)
    monkeypatch.setitem(sample_cases.MMDIT_PRESETS, "tiles", sample_cases.MMDIT_PRESETS["tiny"])
    tiles, numbers, rest, size = sample_model._decode_tiles("tiles", (2, 8, 8), H200)
    assert len(tiles) == 4
    assert len(set(tiles)) == 1
    assert len(numbers) == 4
    assert rest > 0
    assert size == 3 * 4 * 16 * 16 * 2


def test_tiles_are_dealt_out_as_the_sampler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large and small ones in turn none has all the large: two ranks take as long as half of the whole."""
    monkeypatch.setattr(sample_model, "_decode_tiles", lambda *_: ((4.0, 1.0) * 2, (40, 10) * 2, 0.0, 0))
    monkeypatch.setattr(sample_model, "_gather_seconds", lambda *_: 0.0)
    assert sample_model.decode_seconds(case(gpus=2)) == 5.0


@pytest.mark.parametrize(("kernel", "rate"), [(3, H200.convolution_flops), (1, H200.matmul_flops)])
def test_convolutions_have_a_rate_of_their_own(kernel: int, rate: float) -> None:
    with FakeTensorMode(), torch.no_grad(), forward_traffic() as traffic:
        x = torch.empty(1, 4096, 8, 16, 16, dtype=torch.bfloat16)
        weight = torch.empty(4096, 4096, kernel, kernel, kernel, dtype=torch.bfloat16)
        F.conv3d(x, weight, padding=kernel // 2)
    assert traffic.kernels == 1
    assert traffic.seconds == pytest.approx(2 * 4096**2 * kernel**3 * 8 * 16 * 16 / rate)


def test_every_kind_of_step_is_timed_and_the_modulation_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart by their passes: steps of two stand for the steps of two alone, and those of one likewise."""
    bench = Measurement(torch.device("cpu"), None)
    of = case("tiny", "64px", steps=13)
    rows: list[int] = []
    forward = MMDiT.forward

    def counted(model: MMDiT, img: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        rows.append(len(img))
        return forward(model, img, *rest, **more)

    monkeypatch.setattr(MMDiT, "forward", counted)
    times = {1: [5.0, 1.0, 2.0], 2: [3.0, 9.0, 4.0]}
    measure = Measurement.step_seconds

    def told(self: Measurement, model: MMDiT, of: SampleCase, passes: int, timed_steps: int) -> list[float]:
        assert len(measure(self, model, of, passes, timed_steps)) == timed_steps == 3
        return times[passes]

    monkeypatch.setattr(Measurement, "step_seconds", told)
    monkeypatch.setattr(Measurement, "_seconds", lambda self, work: 100.0)
    assert bench.denoise_seconds(of, 3) == pytest.approx(100 + 12 * 4.0 + 1 * 2.0)
    assert sorted(rows) == [1] * 4 + [2] * 4  # one of each warms up


def test_what_has_no_figure_is_told_and_no_row_has_one(tmp_path: Path) -> None:
    result = Result(case("tiny", "64px"), {"text": 1.0}, {"decode": "needs a package"}, timed_steps=3)
    (line,) = sample_bench.table([result])
    assert line[2:6] == ["1", "-", "-", "-"]
    machine = Machine(cpu="a CPU", gpu=None, torch="2", commit=None)
    (row,) = sample_bench.rows([result], machine, torch.device("cpu"))
    ledger.append(tmp_path / "rows.jsonl", [row])
    assert (row["status"], row["reason"]) == ("failed", "decode: needs a package")
    assert "p50" not in row


def test_a_missed_target_is_told() -> None:
    slow = Result(case(), {"text": 1.0, "denoise": 1000.0, "decode": 1.0}, {}, timed_steps=14)
    assert sample_bench.table([slow])[0][-2:] == ["900", "OVER"]
    machine = Machine(cpu="a CPU", gpu="NVIDIA H200", torch="2", commit=None)
    (row,) = sample_bench.rows([slow], machine, torch.device("cuda"))
    ledger.check(row)
    assert json.loads(json.dumps(row))["claims"][0]["aim"] == 900


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "none"], "--model none"),
        (["--gpus", "0"], "--gpus 0"),
        (["--frames", "7"], "--frames 7"),
        (["--timed-steps", "0"], "--timed-steps 0"),
        (["--resolutions", "big"], "resolution 'big'"),
    ],
)
def test_bad_options_are_one_line(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TINY, "--device", "none", *words]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_no_silent_model() -> None:
    with pytest.raises(UserError, match="--device cuda: PyTorch finds no GPU"):
        sample_bench.main(["--device", "cuda"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to measure on")
def test_a_gpu_is_measured_where_one_is(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "rows.jsonl"
    assert cli.main([*TINY, "--gpus", "8", "--out", str(out)]) == 0
    measured, modelled = ledger.read([out])
    assert (measured["status"], modelled["status"]) == ("timed", "modelled")
    assert measured["device"].startswith("GPU")
