"""Configurations: what they accept, what they refuse, and that JSON keeps them."""

import json
import math
from dataclasses import asdict

import pytest

from opensora_fast.config import MMDIT_PRESETS, HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig, config_from_dict
from opensora_fast.errors import UserError

TWO_STAGES = {
    "encoder_widths": [32, 64],
    "decoder_widths": [32, 64],
    "encoder_depths": [1, 1],
    "decoder_depths": [1, 2],
    "encoder_block_types": ["ResBlock", "EViTS5_GLU"],
    "decoder_block_types": ["ResBlock", "ResBlock"],
    "temporal_downsample": [True, False],
    "latent_channels": 4,
}


@pytest.mark.parametrize(
    "config", [*MMDIT_PRESETS.values(), HunyuanVAEConfig(), VideoDCAEConfig(), VideoDCAEConfig(**TWO_STAGES)]
)
def test_json_keeps_every_field(config):
    assert config_from_dict(type(config), json.loads(json.dumps(asdict(config)))) == config
    assert len({config, config}) == 1  # hashable, although JSON gave lists


def test_derived_sizes():
    released = MMDiTConfig()
    assert (released.head_dim, released.mlp_size, released.latent_channels) == (128, 12288, 16)
    assert released.cond_channels == 68
    assert MMDIT_PRESETS["open-sora-v2-dcae"].cond_channels == 129
    assert (VideoDCAEConfig().spatial_compression, VideoDCAEConfig().temporal_compression) == (32, 4)
    small = VideoDCAEConfig(**TWO_STAGES)
    assert (small.spatial_compression, small.temporal_compression) == (2, 2)


@pytest.mark.parametrize(
    ("config_class", "values", "named"),
    [
        (MMDiTConfig, {"hidden_dim": 64}, "hidden_dim"),
        (MMDiTConfig, {"hidden_size": 100}, "hidden_size"),
        (MMDiTConfig, {"hidden_size": 0}, "hidden_size"),
        (MMDiTConfig, {"depth": -1}, "depth"),
        (MMDiTConfig, {"axes_dim": [16, 56]}, "axes_dim"),
        (MMDiTConfig, {"axes_dim": [15, 57, 56]}, "axes_dim"),
        (MMDiTConfig, {"axes_dim": [16, 56, 54]}, "axes_dim"),
        (MMDiTConfig, {"in_channels": 62}, "in_channels"),
        (VideoDCAEConfig, {"width_list": [1]}, "width_list"),
        (VideoDCAEConfig, {"encoder_widths": [128]}, "encoder_widths"),
        (VideoDCAEConfig, {"decoder_depths": [3, 3, 3]}, "decoder_depths"),
        (VideoDCAEConfig, {"encoder_block_types": ["Conv"] * 6}, "encoder_block_types"),
        (VideoDCAEConfig, {"temporal_downsample": [True] * 6}, "temporal_downsample"),
        (VideoDCAEConfig, {"latent_channels": 96}, "encoder_widths"),
        (VideoDCAEConfig, TWO_STAGES | {"encoder_widths": [32, 48]}, "encoder_widths"),
        (VideoDCAEConfig, TWO_STAGES | {"decoder_widths": [24, 64], "temporal_downsample": [0, 0]}, "decoder_widths"),
        (VideoDCAEConfig, {"scaling_factor": 0.0}, "scaling_factor"),
        (VideoDCAEConfig, {"scaling_factor": math.inf}, "scaling_factor"),
        (HunyuanVAEConfig, {"scaling_factor": math.inf}, "scaling_factor"),
        (HunyuanVAEConfig, {"scaling_factor": math.nan}, "scaling_factor"),
        (HunyuanVAEConfig, {"shift_factor": math.nan}, "shift_factor"),
        (HunyuanVAEConfig, {"shift_factor": -math.inf}, "shift_factor"),
        (VideoDCAEConfig, {"tile_overlap_factor": 1.0}, "tile_overlap_factor"),
        (VideoDCAEConfig, {"use_spatial_tiling": True, "spatial_tile_size": 100}, "spatial_tile_size"),
    ],
)
def test_bad_values_are_refused_by_name(config_class, values, named):
    with pytest.raises(UserError, match=named) as refusal:
        config_from_dict(config_class, values)
    assert "\n" not in str(refusal.value)
    assert config_class.__name__ in str(refusal.value)
