"""FLUX's autoencoder: released names to diffusers' and back, the released network's images, and wrong files."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from opensora_fast import flux_autoencoder
from opensora_fast.errors import UserError
from opensora_fast.flux_autoencoder import FluxAutoencoder
from opensora_fast.weight_files import WeightFiles

diffusers = pytest.importorskip("diffusers")

WIDTHS, BLOCKS, CHANNELS = (32, 64, 64), 2, 4


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released layout, written down from its network and not from the translation."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, kernel, kernel), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def middle(name: str, width: int) -> None:
        block(f"{name}.block_1", width, width)
        norm(f"{name}.attn_1.norm", width)
        for layer in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{layer}", width, width, 1)
        block(f"{name}.block_2", width, width)

    top = WIDTHS[-1]
    conv("encoder.conv_in", 3, WIDTHS[0])
    width = WIDTHS[0]
    for level, wide in enumerate(WIDTHS):
        for number in range(BLOCKS):
            block(f"encoder.down.{level}.block.{number}", width, wide)
            width = wide
        if level < len(WIDTHS) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder.mid", top)
    norm("encoder.norm_out", top)
    conv("encoder.conv_out", top, 2 * CHANNELS)
    conv("decoder.conv_in", CHANNELS, top)
    middle("decoder.mid", top)
    for level in reversed(range(len(WIDTHS))):
        for number in range(BLOCKS + 1):
            block(f"decoder.up.{level}.block.{number}", width, WIDTHS[level])
            width = WIDTHS[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", WIDTHS[0])
    conv("decoder.conv_out", WIDTHS[0], 3)
    return shapes


def released_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in released_shapes().items():
        fan = max(1, torch.Size(shape[1:]).numel())
        weights[name] = (torch.randn(shape, generator=generator) / fan**0.5 + 0.1 * name.endswith("weight")).to(dtype)
    return weights


def save(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> WeightFiles:
    save_file(weights, path, metadata)
    return WeightFiles.open(path)


class ReleasedNetwork:
    """The network that the released names belong to, as functions of its weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def conv(self, name: str, x: Tensor, **more) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], **({"padding": weight.shape[-1] // 2} | more))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.weights else x)

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.block(f"{name}.block_1", x)
        q, k, v = (
            self.conv(f"{name}.attn_1.{layer}", self.norm(f"{name}.attn_1.norm", x)).flatten(2).transpose(1, 2)
            for layer in "qkv"
        )
        mixed = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1) @ v
        x = x + self.conv(f"{name}.attn_1.proj_out", mixed.transpose(1, 2).view_as(x))
        return self.block(f"{name}.block_2", x)

    def end(self, side: str, x: Tensor) -> Tensor:
        return self.conv(f"{side}.conv_out", F.silu(self.norm(f"{side}.norm_out", x)))

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for level in range(len(WIDTHS)):
            for number in range(BLOCKS):
                x = self.block(f"encoder.down.{level}.block.{number}", x)
            if level < len(WIDTHS) - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        mean, _ = self.end("encoder", self.middle("encoder.mid", x)).chunk(2, dim=1)
        return 0.3611 * (mean - 0.1159)

    def decode(self, z: Tensor) -> Tensor:
        x = self.middle("decoder.mid", self.conv("decoder.conv_in", z / 0.3611 + 0.1159))
        for level in reversed(range(len(WIDTHS))):
            for number in range(BLOCKS + 1):
                x = self.block(f"decoder.up.{level}.block.{number}", x)
            if level:
                x = self.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2.0))
        return self.end("decoder", x)


def test_images_and_latents_are_those_of_the_released_network(tmp_path: Path) -> None:
    weights = released_weights()
    model = FluxAutoencoder.from_released(save(tmp_path / "ae.safetensors", weights))
    released = ReleasedNetwork(weights)
    generator = torch.Generator().manual_seed(1)
    image_BCHW = torch.rand(2, 3, 24, 32, generator=generator) * 2 - 1
    latent_BChw = torch.randn(2, CHANNELS, 6, 8, generator=generator)
    assert (model.latent_channels, model.compression) == (CHANNELS, 4)
    torch.testing.assert_close(model.encode(image_BCHW), released.encode(image_BCHW), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.decode(latent_BChw), released.decode(latent_BChw), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_weights_come_back_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = released_weights(dtype)
    model = FluxAutoencoder.from_released(save(tmp_path / "ae.safetensors", weights), dtype=dtype)
    back = model.released_state_dict()
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) and back[name].dtype == dtype for name in weights)


def test_a_diffusers_folder_holds_the_same_autoencoder(tmp_path: Path) -> None:
    ours = FluxAutoencoder.from_released(save(tmp_path / "ae.safetensors", released_weights()))
    ours.network.save_pretrained(tmp_path / "vae")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    model = FluxAutoencoder.from_diffusers(tmp_path / "vae")
    latent_BChw = torch.randn(1, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs.decode(latent_BChw / 0.3611 + 0.1159).sample
    assert torch.equal(model.decode(latent_BChw), expected)
    assert torch.equal(ours.decode(latent_BChw), expected)


def test_the_files_metadata_may_say_what_tensors_do_not(tmp_path: Path) -> None:
    told = {"config": '{"norm_num_groups": 16, "scaling_factor": 0.5}'}
    model = FluxAutoencoder.from_released(save(tmp_path / "ae.safetensors", released_weights(), told))
    config = model.network.config
    assert (config.norm_num_groups, config.scaling_factor, config.shift_factor) == (16, 0.5, 0.1159)


@pytest.mark.parametrize(
    "field",
    [
        '"norm_num_groups": 0',
        '"norm_num_groups": -32',
        '"norm_num_groups": "a"',
        '"scaling_factor": null',
        '"scaling_factor": 0',
        '"scaling_factor": Infinity',
        '"scaling_factor": "a"',
        '"shift_factor": NaN',
        '"shift_factor": "a"',
        '"block_out_channels": 64',
        '"layers_per_block": []',
        '"nested": ' + "[" * 100_000,
    ],
    ids=lambda field: field[:25],
)
def test_a_damaged_configuration_is_refused_with_the_files_name(tmp_path: Path, field: str) -> None:
    """Said in the metadata of a released file, and in the config.json of diffusers' folder."""
    files = save(tmp_path / "ae.safetensors", released_weights(), {"config": "{" + field + "}"})
    with pytest.raises(UserError, match=r"ae\.safetensors"):
        FluxAutoencoder.from_released(files)
    whole = '{"_class_name": "AutoencoderKL", "shift_factor": 0.1, "block_out_channels": [32, 32], '
    whole += '"down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"], '
    whole += '"up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], '
    (tmp_path / "config.json").write_text(whole + field + "}")
    with pytest.raises(UserError, match=tmp_path.name):
        FluxAutoencoder.from_diffusers(tmp_path)


def test_every_name_of_the_released_sizes_is_there() -> None:
    config = {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    with torch.device("meta"):
        weights = FluxAutoencoder(config).released_state_dict()
    assert sum(tensor.numel() for tensor in weights.values()) == 83_819_683
    assert weights["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert weights["encoder.mid.attn_1.proj_out.weight"].shape == (512, 512, 1, 1)
    assert "decoder.up.0.upsample.conv.weight" not in weights


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop("decoder.mid.attn_1.k.bias"), "1 missing: decoder.mid.attn_1.k.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (
            lambda weights: weights.update({"encoder.mid.attn_1.q.weight": torch.zeros(64, 64)}),
            "encoder.mid.attn_1.q.weight is [64, 64], expected [64, 64, 1, 1]",
        ),
        (lambda weights: weights.pop("encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
    ],
)
def test_wrong_weights_are_refused_by_name(tmp_path: Path, change, named: str) -> None:
    weights = released_weights()
    change(weights)
    files = save(tmp_path / "ae.safetensors", weights)
    with pytest.raises(UserError) as refusal:
        FluxAutoencoder.from_released(files)
    assert named in str(refusal.value)
    assert "ae.safetensors" in str(refusal.value)


@pytest.mark.parametrize(
    "content", ["{", '{"_class_name": "AutoencoderKLWan"}', "[]", '{"_class_name": "AutoencoderKL"}']
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        FluxAutoencoder.from_diffusers(tmp_path)


def test_without_diffusers_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(flux_autoencoder, "import_module", absent)
    with pytest.raises(UserError, match=r"pip install 'opensora-fast\[diffusers\]'"):
        FluxAutoencoder({})
