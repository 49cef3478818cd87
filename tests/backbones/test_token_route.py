"""Token routing: patches that skip blocks come back as they were, and only while training."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.backbones.dit import DiT
from ldmlab.backbones.tokens import TokenRoute, returned, taken
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError


def network(**options: Any) -> DiT:
    torch.manual_seed(0)
    made = DiT(3, 3, 16, 4, 2, context_width=6, context="both", rotary_positions=True, **options)
    with torch.no_grad():
        for parameter in made.parameters():  # outputs and gates that start at zero hide everything
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def inputs() -> tuple[Tensor, Tensor, Conditioning]:
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7]), Conditioning(tokens=torch.randn(2, 3, 6))


def test_tokens_that_leave_and_come_back() -> None:
    torch.manual_seed(0)
    h, rotation = torch.randn(2, 7, 4), (torch.randn(1, 1, 7, 2), torch.randn(1, 1, 7, 2))
    kept = TokenRoute(1, 2, 0.5).kept(h, joined=3)
    assert kept.shape == (2, 5)
    assert all(set(range(3)) <= set(row.tolist()) for row in kept)
    parts, turns = taken(h, rotation, kept)
    assert turns is not None
    for i in range(2):
        assert torch.equal(parts[i], h[i, kept[i]])
        assert torch.equal(turns[1][i, 0], rotation[1][0, 0, kept[i]])
    assert torch.equal(returned(h, parts, kept), h)
    assert (returned(h, parts + 1, kept) != h).any(2).sum() == 2 * 5


@pytest.mark.parametrize("recompute", [False, True])
def test_a_route_is_of_training_alone(recompute: bool) -> None:
    """Blocks of the route see fewer tokens; every image its own; a state of torch's numbers gives the same bits."""
    routed, plain = network(route=(2, 3), gradient_checkpointing=recompute), network()
    given, sizes = inputs(), list[int]()
    for block in routed.blocks:
        block.register_forward_pre_hook(lambda module, parts: sizes.append(parts[0].shape[1]))
    assert torch.equal(routed.eval()(*given), plain(*given))
    assert sizes == [19] * 4
    sizes.clear()
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(routed.train()(*given))
    assert sizes[:4] == [19, 11, 11, 19]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    found[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routed.blocks.parameters())


def test_what_is_no_route() -> None:
    for options in ({"route": (0, 2)}, {"route": (3, 2)}, {"route": (2, 5)}, {"route": (2, 3), "route_share": 1.0}):
        with pytest.raises(InputError, match=r"give two blocks of 1 \.\. 4, the first one first"):
            network(**options)
