"""Alignment with a frozen encoder: its three kinds, the middles of the backbones, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.app.alignment_plan import alignment_of
from ldmlab.app.compose import compose, plain
from ldmlab.app.conditioning import encoders_of
from ldmlab.backbones.dit import DiT
from ldmlab.backbones.edm2_unet import EDM2UNet
from ldmlab.backbones.edm_unet import EdmUNet
from ldmlab.backbones.mmdit import MMDiT
from ldmlab.backbones.unet import UNet
from ldmlab.contracts import Conditioning
from ldmlab.diffusion.alignment import Alignment, likeness
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate

BACKBONES: dict[str, tuple[Any, tuple[int, ...]]] = {  # and the features of 8 x 8 latents
    "dit": (lambda: DiT(3, 3, 16, 4, 2, context_width=6, context="in_context"), (16, 4, 4)),
    "mmdit": (lambda: MMDiT(3, 3, 16, 4, 2, context_width=6), (16, 4, 4)),
    "unet": (lambda: UNet(3, 3, 32, [1, 2], 1, [], heads=2, context_width=6), (64, 4, 4)),
    "edm2": (lambda: EDM2UNet(3, 3, 16, [1, 2], 1, [2], head_channels=16), (32, 4, 4)),
}


def group(name: str) -> dict[str, Any]:
    return plain(compose("train", ["data.train=x", "data.val=x", f"alignment={name}", "encoder=clip"]))["alignment"]


def batch(**features: Tensor) -> dict[str, Tensor]:
    return {f"states.encoder.{name}": value.half() for name, value in features.items()}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_middle_of_a_backbone(name: str) -> None:
    torch.manual_seed(0)
    make, shape = BACKBONES[name]
    network = make()
    alignment = Alignment(network, {"a": 5}, (8, 8), hidden=8)
    tokens = torch.randn(2, 3, 6) if "tokens" in network.accepts else None
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.9])
    before = network(x, t, Conditioning(tokens=tokens))
    with alignment.watching() as seen:
        assert torch.equal(network(x, t, Conditioning(tokens=tokens)), before)
    assert [part.shape for part in seen] == [(2, *shape)]
    assert alignment(seen[0], batch(a=torch.randn(2, 5, 6, 6))).abs() < 1  # another grid
    assert not network._forward_hooks


def test_blocks_of_the_papers() -> None:
    for depth, block in ((28, 8), (12, 4), (4, 2)):
        network = DiT(3, 3, 16, depth, 2)
        assert network.aligned(None)[0] is network.blocks[block - 1]
    routed = DiT(3, 3, 16, 4, 2, route=(2, 3))
    with pytest.raises(InputError, match=r"alignment\.block=3 is inside backbone\.route=\[2, 3\]"):
        Alignment(routed, {"a": 5}, (8, 8), block=3)
    assert routed.aligned(1)[0] is routed.blocks[0]
    with pytest.raises(InputError, match=r"alignment\.block=5 is no block of 1 \.\. 4"):
        Alignment(DiT(3, 3, 16, 4, 2), {"a": 5}, (8, 8), block=5)
    with pytest.raises(InputError, match="of a U-Net its middle is aligned"):
        Alignment(BACKBONES["unet"][0](), {"a": 5}, (8, 8), block=2)
    with pytest.raises(InputError, match="EdmUNet names no middle features"):
        Alignment(EdmUNet(3, 3, 16, "song", [1, 2], 1, [], head_channels=16), {"a": 5}, (8, 8))


def test_irepa() -> None:
    """A convolution of 3 x 3, targets less 0.6 of their mean over places, by their deviation."""
    torch.manual_seed(0)
    node = group("irepa")
    made = instantiate(node, where="alignment", backbone=DiT(3, 3, 16, 4, 2), widths={"a": 5}, size=(8, 8))
    layer = made.projectors.parts["a"]
    assert isinstance(layer, nn.Conv2d)
    assert (layer.kernel_size, layer.padding, made.manifold) == ((3, 3), (1, 1), 0)
    features, seen = torch.randn(2, 5, 4, 4).half() + 3, torch.randn(2, 16, 4, 4)
    target = (features.float() - 0.6 * features.float().mean((2, 3), keepdim=True)) / (
        features.float().flatten(2).std(2)[:, :, None, None] + 1e-6
    )
    expected = -torch.cosine_similarity(layer(seen), target, dim=1).mean()
    torch.testing.assert_close(made(seen, batch(a=features)), expected)


def test_urepa() -> None:
    """Enlarged after the projection, and three times the mean square between likenesses of places."""
    torch.manual_seed(0)
    made = instantiate(group("urepa"), where="alignment", backbone=BACKBONES["unet"][0](), widths={"a": 5}, size=(8, 8))
    features, seen = torch.randn(2, 5, 8, 8).half(), torch.randn(2, 64, 4, 4)
    guess = made.projectors.parts["a"](seen.movedim(1, 3)).movedim(3, 1)
    guess = nn.functional.interpolate(guess, (8, 8), mode="bilinear")
    a, b = (nn.functional.normalize(part.float(), dim=1) for part in (guess, features))
    apart = torch.einsum("bcij,bckl->bijkl", a, a) - torch.einsum("bcij,bckl->bijkl", b, b)
    assert torch.allclose(likeness(guess, features.float()), apart.square().mean(), atol=1e-6)
    expected = -(a * b).sum(1).mean() + 3 * apart.square().mean()
    torch.testing.assert_close(made(seen, batch(a=features)), expected)


@pytest.mark.parametrize("wrong", [{"until_step": 0}, {"until_step": -3}, {"normalise": 7.0}, {"normalise": -1.0}])
def test_steps_and_shares_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}.*; give a step of 1"):
        Alignment(BACKBONES["unet"][0](), {"a": 5}, (8, 8), **wrong)


def test_an_alignment_and_an_encoder_need_each_other(tmp_path: Path) -> None:
    def config(*words: str) -> dict[str, Any]:
        return plain(compose("train", ["data.train=x", "data.val=x", *words]))

    with pytest.raises(InputError, match="alignment has no encoder to align with; add encoder=dinov2"):
        encoders_of(config("alignment=repa"))
    with pytest.raises(InputError, match="VisionAlignment aligns first stages; choose alignment=repa"):
        alignment_of(config("alignment=va_vae", "encoder=dinov2"), *3 * [None])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="encoder=clip is not used; add alignment=repa"):
        encoders_of(config("encoder=clip"))
    assert encoders_of(config("alignment=repa", "encoder=[clip,dinov2]")).keys() == {"clip", "dinov2"}
    assert not encoders_of(config("alignment=repa", "encoder=clip", "alignment.weight=0"))
    assert not encoders_of(config())
