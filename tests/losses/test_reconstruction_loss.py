"""The reconstruction term has the official reductions, and the loss says what it lacks."""

import pytest
import torch
from torch import Tensor, nn

from ldmlab.contracts import Reconstruction
from ldmlab.errors import InputError
from ldmlab.losses.adversary import RiseAlarm
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.reconstruction_loss import ReconstructionLoss


class FakeLPIPS(nn.Module):
    """A distance per image."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).square().mean(dim=(1, 2, 3))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 8, 6, generator=generator), torch.rand(3, 3, 8, 6, generator=generator)


@pytest.mark.parametrize("reduction", ["sum_per_image", "mean"])
def test_official_reductions(reduction: str) -> None:
    """The official losses add LPIPS to every value, scale by the log-variance, then sum over pixels or average."""
    x, y = batch()
    loss = ReconstructionLoss(lpips_weight=0.7, reduction=reduction, lpips=FakeLPIPS())  # type: ignore[arg-type]
    loss.logvar.fill_(0.3)
    ours, terms = loss(x, y)
    per_value = (x - y).abs() + 0.7 * FakeLPIPS()(x, y)[:, None, None, None]
    likelihood = per_value / torch.exp(torch.tensor(0.3)) + 0.3
    expected = likelihood.sum() / len(x) if reduction == "sum_per_image" else likelihood.mean()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(terms["l1"], (x - y).abs().mean())
    torch.testing.assert_close(terms["lpips"], FakeLPIPS()(x, y).mean())


def test_logvar_is_trained_only_when_learned() -> None:
    for choice in ("fixed", "learned"):
        loss = ReconstructionLoss(lpips_weight=0.0, reduction="mean", logvar=choice)  # type: ignore[arg-type]
        assert loss.logvar.requires_grad == (choice == "learned")
    x, y = batch()
    loss(x, y)[0].backward()
    torch.testing.assert_close(loss.logvar.grad, 1 - (x - y).abs().mean())  # d/dv (e exp(-v) + v) at v = 0


def test_lpips_is_not_built_without_weight() -> None:
    assert ReconstructionLoss(lpips_weight=0.0, reduction="mean", lpips=FakeLPIPS()).lpips is None
    with pytest.raises(InputError, match="ldmlab fetch lpips"):
        ReconstructionLoss(lpips_weight=1.0, reduction="mean")
    with pytest.raises(InputError, match=r"loss\.reduction=sum"):
        ReconstructionLoss(lpips_weight=0.0, reduction="sum")  # type: ignore[arg-type]


def test_penalties_enter_with_their_weights() -> None:
    x, y = batch()
    loss = AutoencoderLoss(penalty_weights={"kl": 0.1}, lpips_weight=0.0, reduction="mean")
    total, terms = loss.autoencoder(x, Reconstruction(y, {"kl": torch.tensor(5.0)}), torch.zeros(1), step=0)
    torch.testing.assert_close(total, (x - y).abs().mean() + 0.5)
    assert set(terms) == {"l1", "reconstruction", "kl"}
    with pytest.raises(InputError, match="loss of its kind: loss=kl, vq, fsq"):
        loss.autoencoder(x, Reconstruction(y, {"codebook": torch.tensor(5.0)}), torch.zeros(1), step=0)


def test_rise_alarm() -> None:
    alarm = RiseAlarm(limit=0.25, every_steps=10)
    before = [alarm.update(torch.tensor(1.0), started=False) for _ in range(100)]
    steady = [alarm.update(torch.tensor(1.1), started=True) for _ in range(100)]
    risen = [alarm.update(torch.tensor(2.0), started=True) for _ in range(100)]
    assert before == [None] * 100
    assert steady == [None] * 100
    heard = [rise for rise in risen if rise is not None]
    assert heard
    assert heard[-1] == pytest.approx(1.0, abs=0.2)
    assert RiseAlarm().update(torch.tensor(9.0), started=True) is None  # resumed: nothing to compare with
