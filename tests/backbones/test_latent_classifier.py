"""The classifier of noisy latents: size, any latent, gradients, and every file of conf/classifier."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldmlab.backbones.latent_classifier import LatentClassifier
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate

CONF = Path(__file__).parents[2] / "conf" / "classifier"


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small(**options: Any) -> LatentClassifier:
    torch.manual_seed(0)
    base: dict[str, Any] = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "head_channels": 16}
    return LatentClassifier(**{"latent_channels": 2, "classes": 5, "attention_downsampling": [2], **base, **options})


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_builds(path: Path) -> None:
    node = yaml.safe_load(path.read_text())
    with torch.device("meta"):
        module = instantiate(node, where="classifier", latent_channels=4)
        logits = module(torch.empty(2, 4, 32, 32), torch.empty(2))
    assert logits.shape == (2, node["classes"])


def test_the_papers_fits_into_what_the_table_leaves_it() -> None:
    """LDM-8-G is printed as 506M; its LDM-8 alone counts 394.98M and is printed as 395M."""
    with torch.device("meta"):
        module = instantiate(
            yaml.safe_load((CONF / "imagenet_f8.yaml").read_text()), where="classifier", latent_channels=4
        )
    assert parameters(module) == 111_537_640
    assert abs(parameters(module) + 394.98e6 - 506e6) < 1e6


@pytest.mark.parametrize("options", [{}, {"scale_shift": True}, {"attention_downsampling": [], "dropout": 0.1}])
def test_any_size_any_batch_and_gradients_everywhere(options: dict[str, Any]) -> None:
    module = small(**options)
    for parameter in module.parameters():  # residual branches start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    module.eval()
    x, t = torch.randn(3, 2, 6, 10), torch.tensor([0.0, 10.5, 999.0])
    leaf = x.clone().requires_grad_()
    logits = module(leaf, t)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(module(x[1:2], t[1:2]), logits[1:2], atol=1e-5, rtol=1e-5)
    assert (module(x, t.flip(0))[0] - logits[0]).abs().max() > 1e-3  # the time is heard
    logits.square().sum().backward()
    assert leaf.grad is not None
    for name, gradient in [("x", leaf.grad), *((n, p.grad) for n, p in module.named_parameters())]:
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
    assert module(torch.randn(1, 2, 5, 7), torch.zeros(1)).shape == (1, 5)  # two need not divide the size


def test_bad_choices() -> None:
    with pytest.raises(InputError, match=r"classifier.classes=1 leaves nothing"):
        small(classes=1)
    with pytest.raises(InputError, match=r"classifier.head_channels=24 does not divide a level of 64"):
        small(head_channels=24)
