"""8-bit weights: each value within half a step of its row's grid, the error as it is told, nothing lost on the way."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.fp8_weights import FP8, ErrorSum, Fp8Form, dequantise, quantise


def round_trip(weight: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    quantised, scale = torch.empty(weight.shape, dtype=FP8), torch.empty(len(weight))
    errors = quantise(weight, quantised, scale, name="w")
    back = torch.full_like(weight, float("nan"))
    dequantise(quantised, scale, back)
    return back, errors


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 40), st.floats(-60, 60))
def test_every_value_is_within_half_a_step(seed, rows, columns, exponent):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    back, _ = round_trip(weight)
    # E4M3 after scaling to 448: 3 bits behind the leading one, and steps of 2**-9 below 2**-6.
    largest = weight.abs().amax(dim=1, keepdim=True)
    bound = torch.maximum(weight.abs() / 16, largest / 448 * 2**-10) * (1 + 1e-5)
    assert ((back - weight).abs() <= bound).all()
    assert back.abs().amax(dim=1).allclose(largest[:, 0], rtol=1e-6, atol=0), "the largest of a row is kept"


def test_the_error_is_what_was_told():
    weight = torch.randn(70, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    back, (error, total) = round_trip(weight)
    assert error == pytest.approx((back.double() - weight.double()).square().sum().item(), rel=1e-6)
    assert total == pytest.approx(weight.double().square().sum().item(), rel=1e-6)
    assert 0.02 < math.sqrt(error / total) < 0.03


def test_large_matrices_are_converted_piece_by_piece_to_the_same(monkeypatch):
    weight = torch.randn(11, 8)
    whole, _ = round_trip(weight)
    monkeypatch.setattr("opensora_fast.fp8_weights._ROWS_AT_ONCE", 24)
    pieces, _ = round_trip(weight)
    assert pieces.equal(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once(dtype):
    weight = torch.randn(6, 32).to(dtype)
    quantised, scale = torch.empty(6, 32, dtype=FP8), torch.empty(6)
    quantise(weight, quantised, scale, name="w")
    out = torch.empty_like(weight)
    dequantise(quantised, scale, out)
    assert out.equal((quantised.double() * scale.double()[:, None]).float().to(dtype))


def test_rows_of_zeros_and_of_the_smallest_numbers():
    weight = torch.zeros(3, 4)
    weight[1] = 1e-42
    weight[2] = 3e38
    back, _ = round_trip(weight)
    assert back.isfinite().all()
    assert back[0].eq(0).all()
    assert back[2].allclose(weight[2], rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    weight = torch.ones(2, 2)
    weight[1, 0] = value
    with pytest.raises(UserError, match="weight w is not finite"):
        round_trip(weight)


def test_a_form_keeps_what_is_no_matrix_bit_for_bit():
    weights = [torch.randn(5, 7), torch.randn(5), torch.randn(2, 3).bfloat16(), torch.randn(4, 6).T]
    form = Fp8Form([weight.to("meta") for weight in weights], [True, False, False, False])
    stored = torch.empty(form.bytes, dtype=torch.uint8)
    errors = [form.store(i, weight, stored, name=str(i)) for i, weight in enumerate(weights)]
    back = [torch.empty_like(weight) for weight in weights]
    form.expand(stored, back)
    assert errors[1:] == [(0.0, 0.0)] * 3
    assert all(there.equal(weight) for there, weight in zip(back[1:], weights[1:], strict=True))
    assert back[0].equal(round_trip(weights[0])[0])
    assert form.bytes < sum(weight.nbytes for weight in weights) + 8 * 256


def test_errors_of_several_matrices():
    errors = ErrorSum()
    errors.add("a", 1.0, 100.0)
    errors.add("b", 3.0, 100.0)
    errors.add("zeros", 0.0, 0.0)
    total = errors.total()
    assert total.relative == pytest.approx(math.sqrt(4 / 200))
    assert (total.worst_name, total.worst) == ("b", pytest.approx(math.sqrt(0.03)))
    assert "14.14%" in str(total)
    assert "b" in str(total)
    assert ErrorSum().total().relative == 0
