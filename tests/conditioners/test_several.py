"""Several conditioners at once: all slots of one U-Net, each filled twice."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.backbones.unet import UNet
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout_tokens import LayoutTokens
from ldmlab.conditioners.low_resolution import LowResolution
from ldmlab.conditioners.mask import Mask, MaskedLatent
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from ldmlab.samplers.ddim import Ddim

WIDTH, VECTOR, SIDE = 16, 12, 8


def conditioners() -> dict[str, nn.Module]:
    return {
        "layout": LayoutTokens(width=WIDTH, depth=1, objects=2, heads=1, vocab_size=200, drop=0.2),
        "class_label": ClassEmbedder(5, WIDTH, drop=0.2),
        "masked_latent": MaskedLatent(),
        "mask": Mask(downsampling=1),
        "semantic": SpatialRescaler(classes=6, channels=2, stages=0),
        "style": ClassEmbedder(5, VECTOR, drop=0.2, slot="vector"),
        "century": ClassEmbedder(5, VECTOR, drop=0.0, slot="vector", null_row=False),
    }


def make(parts: dict[str, nn.Module] | None = None, extra: int = 6) -> LatentDiffusion:
    torch.manual_seed(0)
    parts = conditioners() if parts is None else parts
    told = {"context_width": WIDTH, "vector_width": VECTOR} if "style" in parts else {}
    options: dict[str, Any] = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "heads": 2, **told}
    unet = UNet(in_channels=3 + extra, out_channels=3, attention_downsampling=[2], **options)
    for parameter in unet.parameters():  # a fresh U-Net ends in zeros and would hear nothing
        nn.init.normal_(parameter, std=0.05)
    return LatentDiffusion(
        first_stage=Identity(),
        latent_scale=LatentScale(),
        backbone=unet,
        conditioners=parts,
        schedule=Schedule(),
        prediction=EpsPrediction(),
        guidance_trained=True,
    )


def make_batch(count: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=generator, dtype=torch.uint8)

    return {
        "position": torch.arange(count),
        "image": numbers(256, 3, SIDE, SIDE),
        "mask": numbers(2, 1, SIDE, SIDE),
        "segmentation": numbers(6, SIDE, SIDE),
        "class_id": torch.arange(count) % 5,
        "boxes": [[{"class_id": i, "box": [0.0, 0.0, 0.5, 1.0]}] for i in range(count)],
    }


def test_slots_are_filled_in_the_order_of_the_configuration() -> None:
    model, batch = make(), make_batch()
    told = model.conditioning(batch)
    parts = {name: c(batch, model.encode) for name, c in model.conditioners.items()}
    assert told.tokens is not None
    assert told.spatial is not None
    assert torch.equal(told.tokens, torch.cat([parts["layout"], parts["class_label"]], dim=1))
    assert told.tokens.shape == (4, 8 + 1, WIDTH)
    assert torch.equal(told.spatial, torch.cat([parts[n] for n in ("masked_latent", "mask", "semantic")], dim=1))
    assert told.spatial.shape == (4, 6, SIDE, SIDE)
    assert torch.equal(told.vector, parts["style"] + parts["century"])


def test_every_conditioner_learns_with_the_network() -> None:
    model = make().train()
    loss, _ = model.loss(make_batch(16), seed=0)
    loss.mean().backward()
    learning = dict(model.backbone.named_parameters()) | dict(model.conditioners.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning.values())  # none unused, as DDP wants
    assert all(c.embedding.weight.grad.any() for c in model.conditioners.values() if isinstance(c, ClassEmbedder))
    assert model.conditioners["semantic"].channels.weight.grad.any()
    assert model.conditioners["layout"].transformer.tokens.weight.grad.any()


def test_a_frozen_one_stays_as_it_is() -> None:
    parts = conditioners()
    parts["layout"].requires_grad_(False)
    model = make(parts).train()
    model.loss(make_batch(), seed=0)[0].mean().backward()
    assert all(p.grad is None for p in model.conditioners["layout"].parameters())
    assert model.conditioners["class_label"].embedding.weight.grad is not None


@pytest.mark.parametrize("field", ["boxes", "class_id", "mask", "segmentation", "image"])
@torch.no_grad()
def test_the_network_hears_each_of_them(field: str) -> None:
    model, batch = make(), make_batch()
    other = {**batch, field: batch[field][::-1] if isinstance(batch[field], list) else batch[field].flip(0)}
    x, t = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)), torch.full((4,), 300.0)
    given, changed = (model.backbone(x, t, model.conditioning(b)) for b in (batch, other))
    assert (given - changed).abs().max() > 1e-4


def test_guidance_drops_what_training_dropped() -> None:
    model, batch = make(), make_batch()
    given, null = model.conditioning(batch), model.null(batch)
    assert torch.equal(given.spatial, null.spatial)  # never dropped in training
    assert not torch.allclose(given.tokens, null.tokens)
    century = model.conditioners["century"](batch, model.encode)
    style = model.conditioners["style"].null(batch, model.encode)
    assert torch.equal(null.vector, style + century)
    fields = {name: value for name, value in batch.items() if name != "position"}
    grid = ddim_grid(model.schedule, 2)
    images = model.sample(
        fields, sampler=Ddim(), grid=grid, index=torch.arange(4), size=(SIDE, SIDE), guidance=Guidance(3.0)
    )
    assert images.shape == (4, 3, SIDE, SIDE)
    assert images.isfinite().all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    batch = make_batch()
    with pytest.raises(InputError, match="come at 4 x 4 and 8 x 8"):
        make().conditioning(batch | {"segmentation": batch["segmentation"][:, :4, :4]})
    model = make({"low_resolution": LowResolution()}, extra=3)
    with pytest.raises(InputError, match="spatial conditions are 4 x 4, the latent 8 x 8"):
        model.loss(batch | {"low_resolution": batch["image"][:, :, :4, :4]}, seed=0)
