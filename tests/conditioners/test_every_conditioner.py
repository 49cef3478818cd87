"""What every choice of conf/conditioner promises, at reduced size; new ones are found by their files."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf_files import conf_names, conf_node
from ldmlab.app.compose import conf_dir
from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError
from ldmlab.instantiate import accepts, instantiate

LATENT = LatentSpec(channels=4, height=4, width=4, downsampling=4)
REDUCED = {"width": 16, "depth": 1, "heads": 2, "classes": 5, "vocab_size": 200}  # options of one name mean the same
TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 2},
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "##s", ",", "b"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vocabulary") / "words.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return str(path)


def node_of(name: str, vocabulary: str) -> dict[str, Any]:
    """The choice at reduced size, a published network replaced by a small one."""
    config = conf_node("conditioner", name)
    node = config | {name: value for name, value in REDUCED.items() if name in config}
    if "pretrained" in node:
        node = {k: v for k, v in node.items() if k not in ("name", "pretrained", "from_run")} | {"config": TOWER}
    if "clip_2" in node:  # two towers, without T5
        node |= {"width": 40, "clip": TOWER, "clip_2": TOWER, "t5": None, "t5_length": 2, "weights": None}
    if node.get("enlarge"):
        node["enlarge"] = 1  # the batch has images of the latent's size
    if "null_row" in node:
        node["null_row"] = True  # a file without one says so when it is asked for one
    if "vocab" in node and node.get("t5", 1) is not None:
        node["vocab"] = vocabulary
    if accepts(node, "downsampling", where="conditioner"):
        node["downsampling"] = LATENT.downsampling
    return node


@pytest.fixture(params=conf_names("conditioner", "none"))
def conditioner(request: pytest.FixtureRequest, vocabulary: str) -> nn.Module:
    torch.manual_seed(0)
    return instantiate(node_of(request.param, vocabulary), where="conditioner", trust=True)


def make_batch(count: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=generator, dtype=torch.uint8)

    return {
        "caption": ["red apples", "a, b", ""][:count],
        "class_id": torch.tensor([0, 4, 2])[:count],
        "image": numbers(256, 3, 16, 16),
        "low_resolution": numbers(256, 3, 4, 4),
        "reference": numbers(256, 3, 20, 20),
        "mask": numbers(2, 1, 16, 16),
        "segmentation": numbers(5, 16, 16),
        "boxes": [[{"class_id": 1, "box": [0.0, 0.1, 0.5, 1.0]}], [], [{"class_id": 0, "box": [0.2, 0.2, 0.3, 0.4]}]],
        "crop": [[0.0, 0.0, 1.0, 1.0], [0.25, 0.0, 0.75, 0.5], [0.0, 0.5, 0.5, 1.0]],
    }


def encode(pixels: Tensor) -> Tensor:
    """Pixels => four channels at a quarter of the size."""
    small = nn.functional.avg_pool2d(pixels, 4)
    return torch.cat([small, small[:, :1]], dim=1)


def test_slot_and_shape(conditioner: Any) -> None:
    batch = make_batch()
    given, null = conditioner(batch, encode), conditioner.null(batch, encode)
    assert given.shape == null.shape
    assert given.dtype == null.dtype == torch.float32
    assert given.isfinite().all()
    assert null.isfinite().all()
    width = conditioner.width(LATENT)
    assert isinstance(conditioner.reads, frozenset)
    length = given.shape[1] if conditioner.slot == "tokens" else 0
    shapes = {"spatial": (3, width, 4, 4), "vector": (3, width), "tokens": (3, length, width)}
    assert given.shape == shapes[conditioner.slot]


def test_it_tells_images_apart_and_from_nothing(conditioner: Any) -> None:
    batch = make_batch()
    given, null = conditioner(batch, encode), conditioner.null(batch, encode)
    assert not torch.allclose(given[0], given[2])
    assert not torch.allclose(given[0], null[0])


def test_company_does_not_matter(conditioner: Any) -> None:
    batch, alone = make_batch(), {name: value[:1] for name, value in make_batch().items()}
    for say in (conditioner, conditioner.null):
        torch.testing.assert_close(say(alone, encode), say(batch, encode)[:1], atol=2e-6, rtol=0)


def test_it_reads_what_it_says(conditioner: Any) -> None:
    batch = {name: value for name, value in make_batch().items() if name in conditioner.reads}
    conditioner(batch, encode)
    conditioner.null(batch, encode)
    for name in conditioner.reads:
        with pytest.raises(KeyError, match=name):
            conditioner({k: v for k, v in batch.items() if k != name}, encode)


def test_what_can_learn_does(conditioner: Any) -> None:
    batch = make_batch()
    learning = [p for p in conditioner.parameters() if p.requires_grad]
    if learning:
        outputs = conditioner(batch, encode), conditioner.null(batch, encode)  # a learned null is in the second alone
        weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2))
        sum((weights * output).sum() for output in outputs if output.requires_grad).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learning)


@pytest.mark.parametrize("name", conf_names("conditioner", "none"))
def test_every_option_is_in_the_file(name: str, vocabulary: str) -> None:
    with pytest.raises(InputError, match=r"conditioner\.drop=1\.5 is no fraction"):
        instantiate({**node_of(name, vocabulary), "drop": 1.5}, where="conditioner", trust=True)
    assert (conf_dir() / "conditioner" / f"{name}.yaml").read_text().startswith("# @package conditioner.")
