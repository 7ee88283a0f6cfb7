"""A correction of Triton's interpreter, which is how kernels run on a machine without a GPU.

Up to 3.9 it truncates float32 to bfloat16 where the hardware rounds to the nearest, ties to even, and loses the
smallest bfloat16 numbers. It also multiplies bfloat16 numbers as if their bits were integers: our kernels convert what
they load, so that they never do that.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def convert_bfloat16_as_hardware_does() -> None:
    """Make every conversion between float32 and bfloat16 in the interpreter what the hardware's is."""
    original = InterpreterBuilder.cast_impl

    def cast_impl(self, source, target):
        types = source.dtype.scalar, target.scalar
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(_nearest_bfloat16(source.data), target.scalar)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), target.scalar)
        return original(self, source, target)

    InterpreterBuilder.cast_impl = cast_impl


def _nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, uint16, of the bfloat16 numbers nearest to float32 values of any shape."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))
