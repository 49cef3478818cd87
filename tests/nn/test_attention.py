"""Attention in half precision on a CPU is the fused one up to rounding."""

import pytest
import torch
from torch.nn import functional as F

from ldmlab.nn import attention
from ldmlab.nn.attention import attend


@pytest.mark.parametrize("products", [0, 2**19], ids=["fused", "products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attend(products: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_PRODUCTS_UP_TO", {"cpu": products})
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator).to(dtype).requires_grad_() for n in (40, 7, 7))
    exact = [part.detach().double().requires_grad_() for part in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact).transpose(1, 2).flatten(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = attend(q, k, v)
    assert found.dtype == dtype
    gradient = torch.randn(found.shape, generator=generator).to(dtype)
    found.backward(gradient)
    expected.backward(gradient.double())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5  # bfloat16 has eight bits: steps of 0.4 %
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    for part, reference in zip((q, k, v), exact, strict=True):
        assert part.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(part.grad.double(), reference.grad, atol=2 * tolerance, rtol=2 * tolerance)
