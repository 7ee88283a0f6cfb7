"""Without a GPU, Triton kernels run in Triton's interpreter; that is decided when the first of them is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
