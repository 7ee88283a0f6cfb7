"""The table of predicted memory: its sizes are those of the release, and it says what the settings save."""

import pytest
import torch

from opensora_fast.memory_prediction import TextNeeds
from opensora_fast.memory_table import RELEASED_TEXT, SETTINGS, memory_markdown, memory_table

pytest.importorskip("diffusers", reason="the Hunyuan autoencoder is made of diffusers' parts")
GIB = 2**30


@pytest.fixture(scope="module")
def rows():
    return {(row.resolution, row.name): row for row in memory_table()}


def test_there_is_a_row_for_every_setting_and_resolution(rows):
    assert list(rows) == [(resolution, name) for resolution in ("256px", "768px") for name in SETTINGS]
    for row in rows.values():
        assert list(row.predicted) == ["text", "encode", "denoise", "decode"]
        assert row.peak == max(row.predicted.values()) < row.budget


def test_each_setting_takes_less_than_the_one_before(rows):
    for resolution in ("256px", "768px"):
        peaks = [rows[resolution, name].peak for name in SETTINGS]
        assert peaks == sorted(peaks, reverse=True)
        assert len(set(peaks)) == len(peaks)


def test_768px_fits_24_gib_with_streamed_blocks(rows):
    assert rows["768px", "these (no fp8) and blocks streamed"].budget <= 24 * GIB
    everything = rows["768px", "everything on the GPU"]
    # 11.9B and 5.1B parameters and the autoencoder, in bfloat16.
    assert everything.predicted["text"] > 2 * (11.8e9 + 4.8e9 + 0.24e9)


def test_the_table_as_text(rows):
    lines = memory_markdown(list(rows.values())).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 256px | everything on the GPU | ")


def test_the_text_encoders_have_the_released_sizes():
    transformers = pytest.importorskip("transformers", reason="T5 and CLIP are transformers' models")
    t5 = transformers.T5Config(
        d_model=4096,
        d_kv=64,
        num_heads=64,
        d_ff=10240,
        num_layers=24,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
    )
    clip = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12
    )
    with torch.device("meta"):
        models = [transformers.T5EncoderModel(t5), transformers.CLIPTextModel(clip)]
    models = [model.to(torch.bfloat16).eval() for model in models]
    counted = TextNeeds.of(*models, videos=1, max_length_t5=512, max_length_clip=77)
    assert counted.weights == pytest.approx(RELEASED_TEXT.weights, rel=1e-4)
    assert counted.work == pytest.approx(RELEASED_TEXT.work, rel=0.05)
