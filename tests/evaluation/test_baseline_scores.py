"""Answers without a model: what they see, what they give, and that they are scored exactly as a model would be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answering_models import SIZE, Answers, evaluate, originals, scene_data
from PIL import Image

from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.task_baselines import Bicubic, MeanFill, NearestPatch
from ldmlab.tasks.inpainting import Inpainting
from ldmlab.tasks.super_resolution import SuperResolution

PROTOCOL = Protocol(name="holes", reference="val", metrics={}, steps=1, guidance_scale=1.0, shown=4, pairs=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardData:
    return scene_data(tmp_path_factory.mktemp("scenes"), 30, 14, Inpainting(SIZE, held_out_masks="medium_256"))


def values(scores: dict[str, Any]) -> dict[str, float]:
    return {name: score["value"] for name, score in scores.items()}


def requests(data: ShardData) -> list[dict[str, Any]]:
    return [{"image": s["image"].transpose(1, 2, 0), "mask": s["mask"][0]} for s in held_out(data)]


def held_out(data: ShardData) -> list[dict[str, Any]]:
    dataset = data.val_dataset("images", "val")
    return [sample for sample in (dataset[i] for i in range(len(dataset))) if "key" in sample]


def test_a_baseline_is_scored_as_a_model_that_answers_the_same(data: ShardData, tmp_path: Path) -> None:
    real = torch.stack([torch.as_tensor(sample["image"]) for sample in held_out(data)])
    perfect = Answers({"image", "mask"}, lambda conditions, numbers: real[numbers])
    filler = Answers({"image", "mask"}, lambda conditions, numbers: MeanFill()(conditions))
    baselines = {"mean_fill": MeanFill(), "nearest_patch": NearestPatch()}
    beside = evaluate(perfect, data, PROTOCOL, tmp_path / "perfect", baselines=baselines)
    alone = evaluate(filler, data, PROTOCOL, tmp_path / "filler")
    found = values(beside["baselines"]["mean_fill"]["scores"])
    assert found == pytest.approx(values(alone["scores"]), rel=1e-9)
    assert found.keys() == {"fid", "kid", "precision", "recall", "psnr", "ssim"}
    assert found["fid"] > 1e-4
    assert beside["scores"]["fid"]["value"] == pytest.approx(0, abs=1e-9)
    assert beside["scores"]["psnr"]["value"] == pytest.approx(100)
    assert len(beside["given"]) == 4
    page, text = ((tmp_path / "perfect" / name).read_text() for name in ("report.html", "report.md"))
    assert "From left to right: input, mean fill, nearest training patch, generated, real." in page
    assert "**this model**" in text
    assert "| nearest training patch |" in text


def test_baselines_do_not_look_into_the_hole(data: ShardData) -> None:
    conditions = requests(data)[:6]
    spoiled = [
        {**one, "image": np.where(one["mask"][..., None] > 0, 77, one["image"]).astype(np.uint8)} for one in conditions
    ]
    for baseline in (MeanFill(), NearestPatch(border=3)):
        baseline.learn(data.eval_loader("train", 8, kind="images"))
        answers = baseline(conditions)
        assert torch.equal(answers, baseline(spoiled))
        holes = torch.stack([torch.from_numpy(one["mask"]) for one in conditions])[:, None] > 0
        known = torch.stack([torch.from_numpy(one["image"].copy()) for one in conditions]).permute(0, 3, 1, 2)
        assert torch.equal(torch.where(holes, 0, answers), torch.where(holes, 0, known))


def test_mean_fill_by_hand() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = (30, 60, 90)
    image[1, 0] = (0, 0, 3)
    answer = MeanFill()([{"image": image, "mask": np.array([[0, 0], [0, 1]])}])
    assert answer[0, :, 1, 1].tolist() == [20, 40, 61]


def test_the_nearest_patch_of_a_known_image_is_itself(data: ShardData) -> None:
    baseline = NearestPatch(border=4)
    train = list(data.eval_loader("train", 8, kind="images"))
    baseline.learn(train)
    images = torch.cat([batch["image"] for batch in train])
    masks = torch.cat([batch["mask"] for batch in train])
    conditions = [
        {"image": image.permute(1, 2, 0).numpy(), "mask": mask[0].numpy()}
        for image, mask in zip(images, masks, strict=True)
    ]
    error = (baseline(conditions).float() - images.float()).abs().flatten(1).amax(1)
    assert (error == 0).float().mean() > 0.8  # others have a twin around the hole
    with pytest.raises(InputError, match="to copy patches from"):
        NearestPatch().learn([])


def test_bicubic_is_pillows_and_is_set_beside_super_resolution(tmp_path: Path) -> None:
    data = scene_data(tmp_path / "scenes", 6, 10, SuperResolution(SIZE, factor=4))
    real = originals(data)
    model = Answers({"low_resolution"}, lambda conditions, numbers: real[numbers])
    found = evaluate(model, data, PROTOCOL, tmp_path / "out", baselines={"bicubic": Bicubic()})
    small = held_out(data)[0]["low_resolution"].transpose(1, 2, 0)
    large = np.asarray(Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    assert np.array_equal(Bicubic()([{"low_resolution": small}])[0].permute(1, 2, 0).numpy(), large)
    scores = values(found["baselines"]["bicubic"]["scores"])
    assert 15 < scores["psnr"] < 40
    assert scores["fid"] > found["scores"]["fid"]["value"]
    with Image.open(tmp_path / "out" / found["given"][0]) as given:
        assert np.array_equal(np.asarray(given)[::4, ::4], small)
