"""How float32 is multiplied: fast in training and sampling, exactly where images are measured, or without autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.backends import cuda, cudnn


def fast() -> None:
    """Products and convolutions of float32 in TF32 (10 bits of 23), and convolutions by the algorithm tried fastest."""
    cuda.matmul.allow_tf32 = True  # float32_matmul_precision "high", for GPUs alone
    cudnn.allow_tf32 = True
    cudnn.benchmark = True


def full_precision(values: Tensor) -> AbstractContextManager[object]:
    """No autocast: half precision would confuse neighbouring codes. Meta tensors know none."""
    device = values.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@contextmanager
def exact() -> Iterator[None]:
    """Inside, or in the function so decorated, float32 with all its bits."""
    before = cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
