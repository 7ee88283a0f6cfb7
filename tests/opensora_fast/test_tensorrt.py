"""TensorRT engines through a stand-in for Torch-TensorRT that records its calls and runs the exported programs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from opensora_fast import tensorrt
from opensora_fast.config import HunyuanVAEConfig, VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.hunyuan_vae import HunyuanVAE
from opensora_fast.tensorrt import Engines, compile_decoder, compile_text_encoder
from opensora_fast.text import TextEncoders, save_tiny_text_encoders

AUTOENCODER = VideoDCAEConfig(
    latent_channels=8,
    encoder_widths=(8, 16),
    decoder_widths=(8, 16),
    encoder_depths=(1, 1),
    decoder_depths=(1, 1),
    encoder_block_types=("ResBlock", "EViTS5_GLU"),
    decoder_block_types=("ResBlock", "EViTS5_GLU"),
    temporal_downsample=(True, False),
    heads_dim=8,
    use_spatial_tiling=True,
    spatial_tile_size=8,
)


class TorchTensorRT:
    """What Torch-TensorRT is asked for: `compiled` holds the shape of every program's input."""

    def __init__(self) -> None:
        self.compiled: list[tuple[int, ...]] = []
        self.dynamo = SimpleNamespace(compile=self._compile)

    def _compile(self, program: torch.export.ExportedProgram, *, arg_inputs: tuple, **options: bool):
        assert isinstance(program, torch.export.ExportedProgram)
        # The weights' dtype is the engine's, and an engine that cannot be built is not replaced by PyTorch.
        assert options == {"use_explicit_typing": True, "pass_through_build_failures": True}
        (x,) = arg_inputs
        self.compiled.append(tuple(x.shape))
        return program.module()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> TorchTensorRT:
    stand_in = TorchTensorRT()
    monkeypatch.setattr(tensorrt, "import_module", lambda name: {"torch_tensorrt": stand_in}[name])
    return stand_in


@pytest.fixture
def autoencoder() -> VideoDCAE:
    model = VideoDCAE(AUTOENCODER)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("text")
    save_tiny_text_encoders(folder, t5_dim=48, clip_dim=32, seed=0)
    return folder


def test_decoding_by_engines_gives_the_same_video(autoencoder: VideoDCAE, compiler: TorchTensorRT) -> None:
    latent_BCTHW = torch.randn(1, 8, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = autoencoder.decode(latent_BCTHW)
    compile_decoder(autoencoder, latents=[latent_BCTHW.shape])
    built = list(compiler.compiled)
    assert (1, 8, 2, 4, 4) in built
    assert len(set(built)) == len(built)
    torch.testing.assert_close(autoencoder.decode(latent_BCTHW), expected)
    assert compiler.compiled == built  # none was left to build
    compile_decoder(autoencoder)
    assert isinstance(autoencoder.decoder, Engines)
    assert not isinstance(autoencoder.decoder.network, Engines)


def test_the_hunyuan_decoder_is_compiled_too(compiler: TorchTensorRT) -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = HunyuanVAEConfig(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        use_spatial_tiling=True,
        sample_size=32,
    )
    autoencoder = HunyuanVAE(config).eval().requires_grad_(False)
    latent_BCTHW = torch.randn(1, 4, 2, 4, 6)
    expected = autoencoder.decode(latent_BCTHW)
    compile_decoder(autoencoder, latents=[latent_BCTHW.shape])
    assert len(compiler.compiled) == 4  # tiles of 4 latents every 3, and what is left of both sides
    assert torch.equal(autoencoder.decode(latent_BCTHW), expected)


def test_another_shape_is_another_engine(autoencoder: VideoDCAE, compiler: TorchTensorRT) -> None:
    compile_decoder(autoencoder)
    assert compiler.compiled == []
    for frames in (1, 2, 1, 2):
        autoencoder.decode(torch.zeros(1, 8, frames, 4, 4))
    assert compiler.compiled == [(1, 8, 1, 4, 4), (1, 8, 2, 4, 4)]


def test_prompts_are_encoded_as_before(text_folder: Path, compiler: TorchTensorRT) -> None:
    text = TextEncoders.from_folders(text_folder / "t5", text_folder / "clip", max_length_t5=16, max_length_clip=20)
    expected = text.encode(["a boat", "a hill"])
    compile_text_encoder(text)
    assert compiler.compiled == [(1, 16), (1, 20)]
    for ours, theirs in zip(text.encode(["a boat", "a hill"]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert compiler.compiled == [(1, 16), (1, 20), (2, 16), (2, 20)]
    compile_text_encoder(text)
    assert len(compiler.compiled) == 4


def test_without_the_package_the_install_command_is_named(
    autoencoder: VideoDCAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file\nno such file")

    monkeypatch.setattr(tensorrt, "import_module", absent)
    decoder = autoencoder.decoder
    with pytest.raises(UserError, match=r"pip install 'opensora-fast\[tensorrt\]'") as refusal:
        compile_decoder(autoencoder)
    assert "\n" not in str(refusal.value)
    assert autoencoder.decoder is decoder


def test_what_cannot_be_compiled_is_an_error_and_no_fallback(
    autoencoder: VideoDCAE, compiler: TorchTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no converter\nfor this")

    monkeypatch.setattr(compiler.dynamo, "compile", fail)
    with pytest.raises(
        UserError, match=r"decoder cannot be compiled for input \[1, 8, 1, 4, 4\].*no converter for this"
    ):
        compile_decoder(autoencoder, latents=[(1, 8, 1, 4, 4)])


def test_an_autoencoder_without_a_decoder_is_refused(compiler: TorchTensorRT) -> None:
    with pytest.raises(UserError, match="Linear has no decoder"):
        compile_decoder(nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="TensorRT needs a GPU")
def test_engines_of_tensorrt_itself(autoencoder: VideoDCAE) -> None:
    pytest.importorskip("torch_tensorrt")
    autoencoder = autoencoder.cuda()
    latent_BCTHW = torch.randn(1, 8, 2, 4, 6, device="cuda")
    with torch.no_grad():
        expected = autoencoder.decode(latent_BCTHW)
    compile_decoder(autoencoder, latents=[latent_BCTHW.shape])
    torch.testing.assert_close(autoencoder.decode(latent_BCTHW), expected, atol=1e-2, rtol=1e-2)
