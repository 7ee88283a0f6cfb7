"""The released models' outputs with every op on one kind of kernel: all Triton, in the interpreter, and all native."""

import pytest
import torch

from opensora_fast.kernels import backend, extension, gated_linear, launch
from opensora_fast.released import load_released_dc_ae, load_released_mmdit, to_released_state_dict

TRITON = dict.fromkeys(
    (
        "attention",
        "modulated_norm",
        "gated_residual",
        "gated_linear",
        "qk_norm_rope",
        "gelu",
        "rms_norm_act",
        "pixel_shuffle",
        "flow_mix",
    ),
    "triton",
)
HOST = {"pixel_shuffle": "host"}


@pytest.fixture(params=[TRITON, HOST], ids=["triton", "host"])
def forced(request, monkeypatch):
    if request.param is TRITON and (reason := launch.missing("cpu")):
        pytest.skip(reason)
    if request.param is HOST and (reason := extension.load().missing["host"]):
        pytest.skip(reason)
    if request.param is TRITON:  # also the form that long sequences take
        monkeypatch.setattr(gated_linear, "LONG_TOKENS", 0)
    with backend.forced(request.param):
        yield


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_mmdit_velocity_and_gradients(forced, golden):
    config, tensors = golden("mmdit_tiny_split")
    model = load_released_mmdit(tensors["weight"], config)
    target = tensors["input"].pop("target")
    velocity = model(**tensors["input"])
    (velocity - target).square().mean().backward()
    assert relative(velocity.detach(), tensors["output"]["velocity"]) < 1e-4
    holder = type(model)(model.config)
    holder.load_state_dict({name: parameter.grad for name, parameter in model.named_parameters()})
    gradients = to_released_state_dict(holder, config)
    for key, expected in tensors["grad"].items():
        assert relative(gradients[key], expected) < 1e-3, key


def test_dc_ae_latent_and_reconstruction(forced, golden):
    config, tensors = golden("dcae_tiny")
    model = load_released_dc_ae(tensors["weight"], config)
    with torch.no_grad():
        assert relative(model.encode(tensors["input"]["video"]), tensors["output"]["latent"]) < 1e-4
        assert relative(model.decode(tensors["output"]["latent"]), tensors["output"]["reconstruction"]) < 1e-4
