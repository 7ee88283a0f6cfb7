"""Several ranks of a machine stream one copy of the weights, which the first alone reads; each computes with the bits
that a lone process has."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from opensora_fast import block_streaming, shared_streaming
from opensora_fast.block_streaming import host_model, weight_bytes
from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT
from opensora_fast.sampling_ranks import AgreedError, SamplingRanks
from opensora_fast.shared_streaming import load_streamed

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
WAYS = [
    {"blocks": blocks, "modulation": modulation, "fp8": fp8}
    for fp8 in (False, True)
    for blocks in ("resident", "streamed")
    for modulation in ("resident", "streamed")
]
THIS = "opensora_fast/test_shared_streaming.py"


def output(model: MMDiT) -> torch.Tensor:
    torch.manual_seed(4)
    B, N, L = 2, 20, 6
    img, ids = torch.randn(B, N, CONFIG.in_channels), torch.randint(0, 5, (B, N, 3)).float()
    txt, times, vec = torch.randn(B, L, CONFIG.context_in_dim), torch.rand(B), torch.randn(B, CONFIG.vec_in_dim)
    with torch.no_grad():
        return model(img, ids, txt, torch.zeros(B, L, 3), times, vec, modulation=model.modulation(times, vec))


def load(ranks: SamplingRanks | None, dtype: torch.dtype, in_place: bool, way: dict) -> tuple[MMDiT, list[int], str]:
    """The model, how often it was read here, and what is said of its 8 bits."""
    read = []

    def fill(pieces: block_streaming.PinnedPieces) -> MMDiT:
        read.append(1)
        with torch.device("meta"):
            elsewhere = MMDiT(CONFIG).to(dtype)
        model = host_model(CONFIG, dtype, CPU, pieces=pieces, **way) if in_place else elsewhere.to_empty(device=CPU)
        torch.manual_seed(3)
        for parameter in model.eval().requires_grad_(False).parameters():
            parameter.normal_(std=0.1)
        return model

    model, fp8_error = load_streamed(fill, CONFIG, dtype, CPU, ranks, **way)
    return model, read, str(fp8_error)


def resting_files(model: MMDiT) -> list[int]:
    """The files in memory, by their number, that the weights between two calls are mapped from; 0: from none."""
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, _, _, _, number, *_ = line.split()
        begin, end = (int(each, 16) for each in extent.split("-"))
        regions.append((begin, end, int(number)))
    return [
        next((number for begin, end, number in regions if begin <= parameter.data_ptr() < end), 0)
        for parameter in model.parameters()
    ]


def on_a_rank(dtype: torch.dtype, in_place: bool, ways: list[dict]) -> list:
    ranks = SamplingRanks(CPU)
    results = []
    for way in ways:
        model, read, told = load(ranks, dtype, in_place, way)
        files = resting_files(model)
        dist.barrier()  # a file's number is its own only while it is there
        results.append((output(model), output(model), read, told, files))
    return results


@pytest.mark.parametrize(("dtype", "in_place"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_have_the_bits_of_one_process_in_one_copy(size, dtype, in_place, ranks):
    by_rank = ranks(size).run(f"{THIS}:on_a_rank", dtype, in_place, WAYS)
    for way, *results in zip(WAYS, *by_rank, strict=True):
        alone, _, told = load(None, dtype, in_place, way)
        expected = output(alone)
        assert [read for _, _, read, _, _ in results] == [[1]] + [[]] * (size - 1), "only the first reads"
        assert {said for _, _, _, said, _ in results} == {told}
        for first, second, *_ in results:
            assert first.equal(expected)
            assert second.equal(expected)
        names = [name for name, _ in alone.named_parameters()]
        for name, *files in zip(names, *[files for *_, files in results], strict=True):
            modulation = "modulation" in name
            home = way["modulation" if modulation else "blocks"] if "blocks" in name else "resident"
            if home == "resident":
                assert set(files) == {0}, (name, files)
            elif modulation or not way["fp8"]:  # in 8 bits the weights themselves rest nowhere
                assert set(files) == {files[0]} != {0}, (name, files)


def failing_rank(where: str) -> str:
    ranks = SamplingRanks(CPU)

    def fill(pieces: block_streaming.PinnedPieces) -> MMDiT:
        if where == "load":
            raise UserError("weights a.safetensors: cut")
        return host_model(CONFIG, torch.float32, CPU, pieces=pieces)

    with pytest.MonkeyPatch.context() as patch:
        if where == "map" and ranks.rank == 1:
            patch.setattr(shared_streaming.os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no")))
        if where == "host":
            patch.setattr(block_streaming, "available_bytes", lambda: 1000)
        with pytest.raises(AgreedError) as failure:
            load_streamed(fill, CONFIG, torch.float32, CPU, ranks)
    return str(failure.value)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("load", "weights a.safetensors: cut"),
        ("host", "would be streamed from host memory"),
        ("map", "cannot map the first rank's memory"),
    ],
)
def test_what_fails_on_one_rank_is_told_by_all(where, message, ranks):
    told = ranks(2).run(f"{THIS}:failing_rank", where)
    assert message in told[0]
    assert told[0] == told[1]


def on_a_rank_of_another_machine(enough: bool) -> list | str:
    ranks = SamplingRanks(CPU)
    way = {"blocks": "streamed", "modulation": "streamed", "fp8": False}
    needed = weight_bytes(MMDiT(CONFIG)).host
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_streaming, "_ranks_here", lambda ranks: 2)
        ranks.size = 4  # two on each of two machines
        patch.setattr(block_streaming, "available_bytes", lambda: needed * 2 - (not enough))
        patch.setattr(ranks, "agree", lambda error: None if error is None else (_ for _ in ()).throw(error))
        try:
            model, read, _ = load(ranks, torch.float32, True, way)
        except UserError as error:
            return str(error)
        return [output(model), read, resting_files(model)]


def test_across_machines_each_rank_has_its_copy_and_all_of_a_machine_are_counted(ranks):
    expected = output(load(None, torch.float32, True, WAYS[3])[0])
    for result, read, files in ranks(2).run(f"{THIS}:on_a_rank_of_another_machine", True):
        assert result.equal(expected)
        assert read == [1]
        assert set(files) == {0}
    for told in ranks(2).run(f"{THIS}:on_a_rank_of_another_machine", False):
        assert "would be streamed from host memory" in told
