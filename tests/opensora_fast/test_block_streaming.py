"""Streamed weights: the same bits as resident ones, no copy that races with a use, and the bytes that were said."""

import copy
import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opensora_fast import block_streaming, host_memory
from opensora_fast.block_streaming import host_model, stream_blocks, weight_bytes
from opensora_fast.config import MMDiTConfig
from opensora_fast.copy_stream import ImmediateCopies
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT
from opensora_fast.packed_weights import PackedWeights, weight_places
from opensora_fast.peak_memory import LiveBytes
from opensora_fast.weight_ring import Unit, WeightRing

CPU = torch.device("cpu")
CONFIG = MMDiTConfig(
    in_channels=16,
    vec_in_dim=24,
    context_in_dim=40,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 14, 14),
)
PLACEMENTS = [
    {"blocks": blocks, "modulation": modulation}
    for blocks in ("resident", "streamed")
    for modulation in ("resident", "streamed")
]


def random_model(config: MMDiTConfig = CONFIG, dtype: torch.dtype = torch.float32) -> MMDiT:
    torch.manual_seed(3)
    model = MMDiT(config).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    return model


def random_inputs(device: torch.device = CPU) -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    B, N, L = 2, 20, 6
    inputs = {
        "img": torch.randn(B, N, CONFIG.in_channels),
        "img_ids": torch.randint(0, 5, (B, N, 3)).float(),
        "txt": torch.randn(B, L, CONFIG.context_in_dim),
        "txt_ids": torch.zeros(B, L, 3),
        "timesteps": torch.rand(B),
        "y_vec": torch.randn(B, CONFIG.vec_in_dim),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def values(model: MMDiT) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(model: MMDiT, inputs: dict[str, torch.Tensor], *, precomputed: bool) -> torch.Tensor:
    with torch.no_grad():
        modulation = model.modulation(inputs["timesteps"], inputs["y_vec"]) if precomputed else None
        return model(**inputs, modulation=modulation)


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_any_placement_gives_the_same_bits_call_after_call(placement, precomputed):
    model, inputs = random_model(), random_inputs()
    expected, before = run(model, inputs, precomputed=precomputed), values(model)
    streamed = stream_blocks(model, CPU, **placement)
    assert streamed.fp8_error is None
    for _ in range(3):
        assert run(model, inputs, precomputed=precomputed).equal(expected)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    streamed.close()
    streamed.close()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    stream_blocks(model, CPU)  # another time, from where it lies
    assert run(model, inputs, precomputed=precomputed).equal(expected)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_model_filled_in_place_is_streamed_from_there(placement, fp8):
    source, inputs = random_model(), random_inputs()
    model = host_model(CONFIG, torch.float32, CPU, fp8=fp8, **placement)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    model.load_state_dict(source.state_dict())
    where = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    streamed = stream_blocks(model, CPU, fp8=fp8, **placement)
    if fp8:
        assert (run(model, inputs, precomputed=True) - run(source, inputs, precomputed=True)).norm() > 0
        assert 0.01 < streamed.fp8_error.relative < 0.04
    else:
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == where, "moved"
        assert run(model, inputs, precomputed=True).equal(run(source, inputs, precomputed=True))


def test_8_bits_give_the_same_wherever_they_are_kept_and_that_of_the_rounded_weights():
    inputs = random_inputs()
    results = []
    for placement in PLACEMENTS:
        model = random_model()
        streamed = stream_blocks(model, CPU, fp8=True, **placement)
        results.append(run(model, inputs, precomputed=True))
        assert run(model, inputs, precomputed=True).equal(results[-1])
        assert "the video differs" in str(streamed.fp8_error)
        assert streamed.fp8_error.worst_name in dict(model.named_parameters())
    rounded = random_model()
    for name, parameter in rounded.named_parameters():
        if "blocks" in name and "modulation" not in name and name.endswith("weight"):
            scale = parameter.abs().amax(dim=1, keepdim=True) / 448
            parameter.copy_((parameter / scale).to(torch.float8_e4m3fn).float() * scale)
    results.append(run(rounded, inputs, precomputed=True))
    assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_call_in_inference_mode_hinders_none_after_it(fp8):
    model, inputs = random_model(), random_inputs()
    stream_blocks(model, CPU, fp8=fp8)
    with torch.inference_mode():
        expected = model(**inputs)
    assert run(model, inputs, precomputed=False).equal(expected)


def test_exact_weights_are_let_go_as_they_become_8_bits():
    model = random_model()
    weights = [weakref.ref(block.qkv_mlp.weight) for block in model.single_blocks]
    stream_blocks(model, CPU, fp8=True)
    gc.collect()
    assert all(weight() is None for weight in weights)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_device_bytes_are_as_told(placement, fp8):
    """Counted: what streaming makes on the device, beside the weights that are there already."""
    model, inputs = random_model(dtype=torch.bfloat16), random_inputs()
    told = weight_bytes(model, fp8=fp8, **placement)
    with torch.device("meta"):
        assert weight_bytes(MMDiT(CONFIG).to(torch.bfloat16), fp8=fp8, **placement) == told
    stays = [
        tensor
        for name, tensor in model.named_parameters()
        if not ("blocks" in name and placement["modulation" if "modulation" in name else "blocks"] == "streamed")
        and not (fp8 and "blocks" in name and "modulation" not in name)
    ]
    with LiveBytes() as live:
        # On the CPU host memory comes from HostMemory, which makes no storage that counts: it is mapped, not allocated.
        streamed = stream_blocks(model, CPU, fp8=fp8, **placement)
        with torch.no_grad():
            modulation = model.modulation(inputs["timesteps"], inputs["y_vec"])
            result = model(**inputs, modulation=modulation)
        del modulation, result
        gc.collect()
        kept = live.now
        streamed.close()
    resident = sum(tensor.nbytes for tensor in stays)
    assert told.resident <= kept + resident <= told.resident + 512 * (len(stays) + 8)
    assert told.host == sum(
        unit.stored.numel() for ring in streamed._rings for unit in ring._units if unit.stored.data_ptr() % 2**21 == 0
    )


@dataclass
class Copy:
    begins: int  # the computing stream's time that it waits for
    slot: int
    source: int
    waited: int | None = None  # the computing stream's time from which on it is done


class RecordedCopies:
    """Copies and the order that events give them, with the computing stream's operations numbered."""

    def __init__(self) -> None:
        self.now = 0
        self.copies: list[Copy] = []
        self.uses: list[tuple[int, int, int]] = []  # time, slot, what should be in it
        self.blind = False

    def mark(self) -> int:
        self.now += 1
        return 0 if self.blind else self.now

    def copy(self, destination, source, *, after):
        destination.copy_(source)
        self.copies.append(Copy(after, destination.data_ptr(), source.data_ptr()))
        return self.copies[-1]

    def wait(self, event):
        self.now += 1
        event.waited = self.now if event.waited is None else event.waited

    def drain(self):
        pass

    def use(self, slot: int, source: int) -> None:
        self.now += 1
        self.uses.append((self.now, slot, source))

    def races(self) -> list[str]:
        found = []
        for time, slot, source in self.uses:
            waited = [i for i, each in enumerate(self.copies) if each.waited is not None and each.waited < time]
            ended = max(waited, default=-1)  # one copy ends before the next one begins: they are on one stream
            to_slot = [each for each in self.copies if each.slot == slot]
            done = [each for each in self.copies[: ended + 1] if each.slot == slot]
            if not done or done[-1].source != source:
                found.append(f"use {time} without its weights")
            for each in to_slot:
                if each not in done and each.begins < time:
                    found.append(f"use {time} while a copy that began after {each.begins} may write")
        return found


def ring_of(count: int, copies, *, wrap: bool) -> tuple[list[nn.Module], WeightRing]:
    """Linear layers whose calls report which memory they read."""

    class Layer(nn.Linear):
        def forward(self, x):
            if isinstance(copies, RecordedCopies):
                copies.use(self.weight.data_ptr(), self.source)
            return super().forward(x)

    layers, units = [], []
    for i in range(count):
        layer = Layer(3, 3 + i % 2).requires_grad_(False)
        weights = PackedWeights(weight_places(layer))
        stored = torch.empty(weights.bytes, dtype=torch.uint8)
        weights.pack(stored)
        layer.source = stored.data_ptr()
        layers.append(layer)
        units.append(Unit(layer, weights, stored))
    return layers, WeightRing(units, CPU, copies, wrap=wrap)


@given(st.integers(1, 6), st.booleans(), st.lists(st.integers(0, 5), max_size=20))
def test_no_copy_races_with_a_use_in_any_order(count, wrap, order):
    copies = RecordedCopies()
    layers, ring = ring_of(count, copies, wrap=wrap)
    expected = [copy.deepcopy(layer.weight) for layer in layers]
    x = torch.randn(2, 3)
    for i in [*range(count), *range(count), *(i % count for i in order), *range(count)]:
        assert layers[i](x).equal(x @ expected[i].T + layers[i].bias)
    assert copies.races() == []
    ring.close()


def test_the_races_would_be_seen():
    copies = RecordedCopies()
    copies.blind = True  # a copy that waits for nothing
    layers, _ = ring_of(3, copies, wrap=True)
    for layer in (*layers, *layers):
        layer(torch.randn(2, 3))
    assert any("may write" in race for race in copies.races())


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_weight_is_copied_once_a_call_and_one_ahead(count):
    copies = RecordedCopies()
    layers, _ = ring_of(count, copies, wrap=True)
    for _ in range(4):
        for layer in layers:
            layer(torch.randn(2, 3))
            # Behind this layer's own copy the next one's is on its way.
            assert len({each.source for each in copies.copies}) >= min(2, count)
    if count == 2:
        assert len(copies.copies) == 2, "both fit the slots"
    else:
        assert len(copies.copies) == 4 * count + 1  # and the first for a fifth call
    unconsumed = [each for each in copies.copies if each.waited is None]
    assert [each.source for each in unconsumed] == ([] if count == 2 else [layers[0].source])


def test_a_ring_that_does_not_wrap_gives_up_its_slots():
    layers, ring = ring_of(3, ImmediateCopies(), wrap=False)
    with LiveBytes() as live:
        for _ in range(2):
            layers[0](torch.randn(2, 3))
            assert live.now >= 2 * 512
            layers[1](torch.randn(2, 3))
            layers[2](torch.randn(2, 3))
            assert live.now == 0
    ring.close()


def test_slots_go_when_nothing_is_on_its_way_to_them():
    """The first asks for the second; the last runs instead, and the slots go."""
    copies = RecordedCopies()
    layers, ring = ring_of(4, copies, wrap=False)
    layers[0](torch.randn(2, 3))
    layers[3](torch.randn(2, 3))
    assert [each.waited is not None for each in copies.copies] == [True] * 3
    layers[3](torch.randn(2, 3))  # alone: nothing ever came to the other slot
    ring.close()


def test_a_copy_that_fails_leaves_no_weights_behind(monkeypatch):
    copies = ImmediateCopies()
    layers, ring = ring_of(3, copies, wrap=True)
    x = torch.randn(2, 3)
    expected = [x @ layer.weight.T + layer.bias for layer in layers]
    layers[0](x)
    with monkeypatch.context() as patch:
        patch.setattr(copies, "copy", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layers[2](x)
    for i in (2, 1, 0):
        assert layers[i](x).equal(expected[i])
    ring.close()


def test_a_block_that_fails_leaves_everything_in_order(monkeypatch):
    model, inputs = random_model(), random_inputs()
    expected, before = run(model, inputs, precomputed=False), values(model)
    stream_blocks(model, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(model.single_blocks[1], "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, inputs, precomputed=False)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert run(model, inputs, precomputed=False).equal(expected)


def test_a_closed_model_and_its_host_memory_go():
    model = random_model()
    streamed = stream_blocks(model, CPU)
    run(model, random_inputs(), precomputed=False)
    stored = weakref.ref(model.single_blocks[0].qkv_mlp.weight.untyped_storage())
    streamed.close()
    del model, streamed
    gc.collect()
    assert stored() is None


def test_too_little_host_memory_is_told_before_any_is_taken(monkeypatch):
    monkeypatch.setattr(block_streaming, "available_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"--memory-budget: .* would be streamed from host memory"):
        host_model(CONFIG, torch.float32, CPU)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1000)
    with pytest.raises(UserError, match="--memory-budget"):
        stream_blocks(random_model(), CPU)


def test_weights_in_another_memory_format_and_shared_ones_stay_so():
    conv = nn.Conv3d(3, 4, 3).to(memory_format=torch.channels_last_3d)
    module = nn.ModuleList([conv, nn.Linear(2, 2), nn.BatchNorm1d(3)])
    module.append(nn.Linear(2, 2))
    module[3].weight = module[1].weight
    before = copy.deepcopy(module.state_dict())
    packed = PackedWeights(weight_places(module))
    packed.pack(torch.empty(packed.bytes, dtype=torch.uint8))
    assert module[3].weight is module[1].weight
    assert module[0].weight.stride() == conv.weight.stride() == before["0.weight"].stride()
    assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items())
    assert packed.memory().numel() == packed.bytes
    module[1].bias = nn.Parameter(torch.zeros(2))
    assert PackedWeights(weight_places(module)).memory() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: copies on a stream of their own")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_any_placement_gives_the_same_bits_on_a_gpu(placement, fp8):
    device = torch.device("cuda", torch.cuda.current_device())
    source, inputs = random_model(dtype=torch.bfloat16), random_inputs(device)
    other = copy.deepcopy(source).to(device)
    if fp8:
        stream_blocks(other, device, fp8=True, blocks="resident", modulation="resident")
    expected = run(other, inputs, precomputed=True)
    model = host_model(CONFIG, torch.bfloat16, device, fp8=fp8, **placement)
    model.load_state_dict(source.state_dict())
    streamed = stream_blocks(model, device, fp8=fp8, **placement)
    assert model.device == device
    for _ in range(20):
        torch.empty(2**24, device=device).fill_(float("nan"))  # what freed memory would hold
        assert run(model, inputs, precomputed=True).equal(expected)
    streamed.close()
