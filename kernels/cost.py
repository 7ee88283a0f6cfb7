"""What one call of an op costs: the only numbers that a roofline may be drawn from."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Arithmetic and unavoidable memory traffic of one call, counted by the op's own `cost()`.

    flops: floating-point operations, a multiply-add counted as two.
    bytes: bytes that must be read plus bytes that must be written, each tensor once.
    """

    flops: int
    bytes: int
