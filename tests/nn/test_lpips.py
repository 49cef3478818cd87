"""Our LPIPS against torchmetrics' own, on VGG weights drawn at random: no download."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchmetrics.functional.image import lpips as theirs

from ldmlab.errors import InputError
from ldmlab.nn import compiling
from ldmlab.nn.lpips import LPIPS


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A VGG16 as torchvision builds it, and the file of its convolutions."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = torchvision.models.vgg16(weights=None)
    network.classifier = nn.Identity()  # the large part; LPIPS does not use it
    network = network.to_empty(device="cpu")
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.normal_(parameter, 0.0, 0.1)
    path = tmp_path_factory.mktemp("lpips") / "vgg16.pth"
    torch.save(network.state_dict(), path)
    return network, path


def images(seed: int, size: int = 48) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equals_torchmetrics(vgg: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    network, path = vgg
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *args, **options: network.features)
    reference = theirs._LPIPS(net="vgg")  # with the published channel weights that come with torchmetrics
    ours = LPIPS(path)
    one, other = images(1), images(2)
    expected = reference(one, other).flatten()
    assert expected.min() > 0.05
    torch.testing.assert_close(ours(one, other), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(one, other), expected, atol=0.0, rtol=0.02)


def test_without_the_learned_weights(vgg: tuple[nn.Module, Path]) -> None:
    one, other = images(1), images(2)
    network, path = vgg
    expected, ours = torch.zeros(2), LPIPS(path)
    mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((part - mean[:, None, None]) / deviation[:, None, None] for part in (one, other))
    with torch.no_grad():
        for number, layer in enumerate(network.features):
            x, y = layer(x), layer(y)
            if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                cosine = torch.nn.functional.cosine_similarity(x, y, dim=1)
                expected += (2 - 2 * cosine).mean(dim=(1, 2))  # |a - b|^2 of unit vectors
    torch.testing.assert_close(ours(one, other, weighted=False), expected, atol=1e-4, rtol=1e-4)


def test_constants_and_gradients(vgg: tuple[nn.Module, Path]) -> None:
    ours = LPIPS(vgg[1])
    assert not list(ours.parameters())
    assert not ours.state_dict()  # never in a checkpoint
    one = images(1, 32)
    torch.testing.assert_close(ours(one, one), torch.zeros(2))
    two = one.clone().requires_grad_(True)  # equal images are where a square root's gradient would be NaN
    ours(two, one).sum().backward()
    assert two.grad is not None
    assert two.grad.isfinite().all()


def test_missing_or_wrong_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ldmlab fetch lpips"):
        LPIPS(tmp_path / "nothing.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(InputError, match=r"features\.0\.weight"):
        LPIPS(tmp_path / "wrong.pth")


@pytest.mark.slow
def test_is_one_graph(vgg: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    compiled, plain = LPIPS(vgg[1]), LPIPS(vgg[1])
    assert compiling.compile_regions(compiled) == 1
    one, other = images(1), images(2)
    assert torch.equal(compiled(one, other), plain(one, other))
    compiled(torch.cat([one, other]), torch.cat([other, one]))
    assert counter.frame_count == 1
