"""What an MMDiT promises beside the recorded outputs (tests/interop/test_diffusers_transformers.py)."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ldmlab.backbones.mmdit import MMDiT
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.nn.compiling import compile_regions


def small(**options: Any) -> MMDiT:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "out_channels": 4, "width": 32, "depth": 3, "heads": 4, "context_width": 12}
    network = MMDiT(**{**sizes, "position_grid": 6, "position_base": 4, **options})
    for parameter in network.parameters():  # gates and output start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, Any]:
    torch.manual_seed(1)
    conditioning = Conditioning(tokens=torch.randn(2, 5, 12), vector=torch.randn(2, 7))
    return torch.randn(2, 4, 8, 16), torch.tensor([3.0, 900.5]), conditioning


@torch.no_grad()
def test_every_input_matters_and_texts_are_prepared_once() -> None:
    """Sides of 4 and 8 patches: the second goes beyond the grid of 6."""
    network, (x, t, conditioning) = small(vector_width=7, dual_attention=[0, 2]), inputs()
    out = network(x, t, conditioning)
    assert out.shape == x.shape
    assert torch.equal(network(x, t, network.prepare(conditioning)), out)
    for slot in ("tokens", "vector"):
        other = replace(conditioning, **{slot: getattr(conditioning, slot) + 1})
        assert not torch.allclose(network(x, t, other), out)
    order = replace(conditioning, tokens=conditioning.tokens[:, torch.tensor([1, 0, 2, 3, 4])])
    assert torch.allclose(network(x, t, order), out, atol=1e-5)  # a set: places are the encoder's
    assert not torch.allclose(network(x.roll(2, 2), t, conditioning), out.roll(2, 2), atol=1e-3)
    one = Conditioning(tokens=conditioning.tokens[1:], vector=conditioning.vector[1:])
    assert torch.allclose(network(x[1:], t[1:], one), out[1:], atol=1e-5)


def test_a_new_network_predicts_zero_and_every_parameter_learns() -> None:
    x, t, conditioning = inputs()
    torch.manual_seed(0)
    network = MMDiT(4, 4, width=32, depth=2, heads=4, context_width=12, vector_width=7, dual_attention=[0])
    assert not network(x, t, conditioning).any()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network(x, t, conditioning).square().mean().backward()
    last: Any = network.blocks[1].get_submodule("text.attention")  # its queries give outputs that nothing reads
    unread = {id(last.norm_q.weight)}
    assert all(p.grad is not None and (p.grad.any() or id(p) in unread) for p in network.parameters())


def test_recomputed_blocks_give_the_same() -> None:
    x, t, conditioning = inputs()
    plain, again = small(vector_width=7), small(vector_width=7, gradient_checkpointing=True)
    for network in (plain, again):
        network(x, t, conditioning).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(torch.as_tensor(a.grad), torch.as_tensor(b.grad))


@pytest.mark.slow
def test_compiled_blocks_give_the_same() -> None:
    (x, t, conditioning), plain = inputs(), small(vector_width=7)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        out = plain(x, t, conditioning)
        patch.setattr("ldmlab.nn.compiling.BACKEND", "aot_eager")
        assert compile_regions(plain) == 3
        assert torch.allclose(plain(x, t, conditioning), out, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="backbone MMDiT needs tokens"):
        small(context_width=None)
    with pytest.raises(InputError, match=r"width=32, heads=5, depth=3, dual_attention=\[\]: heads"):
        small(heads=5)
    with pytest.raises(InputError, match="dual_attention names blocks from 0"):
        small(dual_attention=[3])
    x, t, conditioning = inputs()
    with pytest.raises(InputError, match="the MMDiT does not take vector conditioning"):
        small()(x, t, conditioning)
