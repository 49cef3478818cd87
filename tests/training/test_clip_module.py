"""Contrastive training: pairs meet, also those of other processes."""

import math
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import nn
from toy_stages import options

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.nn.openclip import build_clip
from ldmlab.training.clip_module import ClipStage

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 1},
}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


def make(**changes: Any) -> ClipStage:
    torch.manual_seed(0)
    return ClipStage(model=build_clip(config=CONFIG, image_size=16), **options(**changes))


def pairs() -> dict[str, Any]:
    """Eight images: a colour above or below grey."""
    names, images = [], []
    for name, colour in COLOURS.items():
        for half in ("top", "bottom"):
            image = torch.full((3, 16, 16), 128, dtype=torch.uint8)
            rows = slice(0, 8) if half == "top" else slice(8, 16)
            image[:, rows] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
            names.append(f"{name} {half}")
            images.append(image)
    return {
        "key": [f"k{i}" for i in range(8)],
        "position": torch.arange(8),
        "image": torch.stack(images),
        "caption": names,
    }


def part(batch: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    size = 8 // world
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


class Loss(nn.Module):
    """The stage's loss as a forward pass, so that DDP can wrap it."""

    def __init__(self, stage: ClipStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.stage.losses("clip", batch).total


def gradients(rank: int, world: int, folder: Path) -> None:
    """What one of `world` processes ends up with."""
    distributed.join()
    stage = make()
    loss = Loss(stage)
    wrapped = nn.parallel.DistributedDataParallel(loss) if world > 1 else loss
    wrapped(part(pairs(), rank, world)).backward()
    held_out = stage.validate([part(pairs(), rank, world)])
    grads = {name: p.grad for name, p in stage.clip.named_parameters()}
    torch.save({"gradients": grads, "val": held_out}, folder / f"{world}_{rank}.pt")
    distributed.leave()


def test_two_processes_of_four_are_one_of_eight(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, gradients, tmp_path, log=log)) == [0, 0], log.read_text()
    gradients(0, 1, tmp_path)
    one, *two = (torch.load(tmp_path / name) for name in ("1_0.pt", "2_0.pt", "2_1.pt"))
    for other in two:
        assert other["val"] == pytest.approx(one["val"], abs=1e-5)
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(other["gradients"][name], gradient, atol=1e-5, rtol=0, msg=name)
    assert max(g.abs().max() for g in one["gradients"].values()) > 1e-2


@pytest.mark.slow
def test_pairs_become_similar_and_others_do_not() -> None:
    stage, batch = make(), pairs()
    before = stage.validate([part(batch, 0, 2), part(batch, 1, 2)])
    optimizer = torch.optim.Adam(stage.groups()["clip"], lr=1e-3)
    for _ in range(80):
        optimizer.zero_grad()
        stage.losses("clip", batch).total.backward()
        optimizer.step()
    after = stage.validate([part(batch, 0, 2), part(batch, 1, 2)])
    assert after["recall_1_of_50"] == 1 > before["recall_1_of_50"]
    assert after["similarity_matched"] > after["similarity_mismatched"] + 0.2
    assert stage.monitor in after
    assert list(stage.saved()) == ["clip"]


def test_the_scale_of_the_logits_is_bounded() -> None:
    stage = make()
    stage.clip.logit_scale.data.fill_(7.0)
    assert stage.losses("clip", pairs()).metrics["logit_scale"].item() == pytest.approx(100)
    assert stage.clip.logit_scale.item() == pytest.approx(math.log(100))


def test_nothing_held_out() -> None:
    nothing = {"position": torch.zeros(0, dtype=torch.int64), "image": pairs()["image"][:0], "caption": [], "key": []}
    assert make().validate([]) == make().validate([nothing]) == {}


@torch.no_grad()
def test_panels() -> None:
    panels = make().panels([pairs()])
    assert panels["found_by_caption"].shape == (8, 16, 5 * 16, 3)
    assert panels["similarities"].shape == (1, 64, 64, 3)
    assert {p.dtype for p in panels.values()} == {torch.uint8}
    assert torch.equal(panels["found_by_caption"][0, :, :16].permute(2, 0, 1), pairs()["image"][0])


def test_accumulation_is_refused() -> None:
    with pytest.raises(InputError, match="accumulate=2"):
        make(accumulate=2)
