"""Kept reference statistics give the scores that looking gives, and only for the set they were made from."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation import reference_statistics
from ldmlab.evaluation.reference_statistics import ReferenceKey, load, see_reference
from ldmlab.evaluation.scoring import EvaluationPass, Numbered
from ldmlab.metrics.clip_scores import ClipDistance
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import PrecisionRecall

KEY = ReferenceKey("a" * 64, '{"rule": "centre"}', 4, "", None, "means", "w" * 16)
IMAGES = torch.randint(0, 256, (40, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Means:
    """Features of an image: the means of its channels and their squares."""

    name, weights_hash, width, has_logits = "means", "w" * 16, 6, False
    gives = frozenset({"features"})

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        pixels = images.float().flatten(2) / 255
        return {"features": torch.cat([pixels.mean(-1), pixels.square().mean(-1)], dim=1)}


class Stream:
    """The images in batches, and how often they were asked for."""

    def __init__(self) -> None:
        self.looked = 0

    def __call__(self) -> Iterable[Numbered]:
        self.looked += 1
        for start in (0, 16, 32):
            yield torch.arange(start, min(start + 16, 40)), IMAGES[start : start + 16]


def scores(folder: Path | None, stream: Stream, *, only_frechet: bool = False, key: ReferenceKey = KEY) -> dict:
    metrics = {"fid": FrechetDistance(6, small_sample=True)}
    if not only_frechet:
        metrics |= {"kid": KernelDistance(subsets=3, subset_size=10), "precision_recall": PrecisionRecall()}
    seen = EvaluationPass(Means(), metrics)
    see_reference(seen, key, folder, stream, len(IMAGES))
    seen.add(255 - IMAGES[:24], False, torch.arange(24))
    assert seen.counts == {True: 40, False: 24}
    return {name: score.value for name, score in seen.compute().items()}


def test_kept_features_give_the_same_scores_without_a_look(tmp_path: Path) -> None:
    stream = Stream()
    plain = scores(None, stream)
    first = scores(tmp_path, stream)
    again = scores(tmp_path, stream)
    assert stream.looked == 2
    assert first == plain
    assert again == pytest.approx(plain, rel=1e-9)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_large_sets_keep_sums_that_serve_the_frechet_distance_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_statistics, "LARGEST_SET", 10)
    stream = Stream()
    plain = scores(tmp_path, stream, only_frechet=True)
    assert scores(tmp_path, stream, only_frechet=True) == pytest.approx(plain, rel=1e-9)
    assert stream.looked == 1
    scores(tmp_path, stream)  # precision needs every feature
    assert stream.looked == 2
    assert (load(tmp_path, KEY) or {}).keys() == {"count", "sum", "outer"}


@pytest.mark.parametrize(
    "change",
    [
        {"manifest_hash": "b" * 64},
        {"transform": "{}"},
        {"image_size": 8},
        {"task": "LamaTest(image_size=4)"},
        {"limit": 20},
        {"weights_hash": "v" * 16},
    ],
)
def test_another_set_is_another_file(tmp_path: Path, change: dict[str, object]) -> None:
    other = replace(KEY, **change)  # type: ignore[arg-type]
    assert other.digest != KEY.digest
    stream = Stream()
    scores(tmp_path, stream)
    scores(tmp_path, stream, key=other)
    assert stream.looked == 2


def test_a_file_under_a_strange_name_and_a_torn_one_are_refused(tmp_path: Path) -> None:
    scores(tmp_path, Stream())
    other = replace(KEY, manifest_hash="b" * 64)
    kept = tmp_path / f"{KEY.digest}.safetensors"
    strange = kept.rename(tmp_path / f"{other.digest}.safetensors")
    with pytest.raises(InputError, match=r"another set \(manifest_hash differ"):
        load(tmp_path, other)
    strange.write_bytes(strange.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path, other)


def test_features_of_a_set_with_lost_images_are_neither_kept_nor_used(tmp_path: Path) -> None:
    stream = Stream()
    seen = EvaluationPass(Means(), {"fid": FrechetDistance(6, small_sample=True)})
    assert see_reference(seen, KEY, tmp_path, stream, len(IMAGES) + 1) is False
    assert not any(tmp_path.iterdir())
    scores(tmp_path, stream)  # all are there: kept
    seen = EvaluationPass(Means(), {"fid": FrechetDistance(6, small_sample=True)})
    assert see_reference(seen, KEY, tmp_path, stream, len(IMAGES) + 1) is False
    assert stream.looked == 3


def test_a_task_that_does_not_say_what_it_does_keeps_nothing(tmp_path: Path) -> None:
    key = replace(KEY, task="<somewhere.Task object at 0x7f00>")
    stream = Stream()
    scores(tmp_path, stream, key=key)
    assert not any(tmp_path.iterdir())


class MeansAndMore(Means):
    """Says the mean of each channel in the place of CLIP's embedding too."""

    gives = frozenset({"features", "clip"})

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features = super().__call__(images)["features"]
        return {"features": features, "clip": features[:, :3] + 1}


def test_what_else_scores_look_at_is_kept_too_and_added_to_an_older_file(tmp_path: Path) -> None:
    def found(*names: str) -> dict[str, float]:
        metrics = {"fid": FrechetDistance(6, small_sample=True), "cmmd": ClipDistance()}
        seen = EvaluationPass(MeansAndMore(), {name: metrics[name] for name in names})
        see_reference(seen, KEY, tmp_path, stream, len(IMAGES))
        seen.add(255 - IMAGES[:24], False, torch.arange(24))
        return {name: score.value for name, score in seen.compute().items()}

    stream = Stream()
    alone = found("fid")
    both = found("fid", "cmmd")
    assert stream.looked == 2  # the first file did not hold what CMMD looks at
    assert found("fid", "cmmd") == pytest.approx(both, rel=1e-9)
    assert found("fid") == pytest.approx(alone, rel=1e-9)
    assert stream.looked == 2
    assert (load(tmp_path, KEY) or {}).keys() == {"features", "clip", "index"}


def _process(rank: int, folder: str, limit: int) -> None:
    torch.set_num_threads(1)
    reference_statistics.LARGEST_SET = limit
    where = f"file://{folder}/meet{limit}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    for _ in range(2):  # looking, then reading
        seen = EvaluationPass(Means(), {"fid": FrechetDistance(6, small_sample=True)})
        mine = slice(rank, None, 2)
        stream = partial(lambda part: [(torch.arange(40)[part], IMAGES[part])], mine)
        see_reference(seen, KEY, Path(folder) / str(limit), stream, len(IMAGES))
        seen.add(255 - IMAGES[:24][mine], False, torch.arange(24)[mine])
        found = seen.compute((40, 24))["fid"].value
        torch.save(found, Path(folder) / f"{limit}_{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10, 100])
def test_two_processes_keep_and_read_as_one(tmp_path: Path, limit: int) -> None:
    mp.spawn(_process, args=(str(tmp_path), limit), nprocs=2)
    expected = scores(None, Stream(), only_frechet=True)["fid"]
    for rank in range(2):
        assert torch.load(tmp_path / f"{limit}_{rank}.pt") == pytest.approx(expected, rel=1e-9)
    kept = load(tmp_path / str(limit), KEY) or {}
    assert kept.keys() == ({"count", "sum", "outer"} if limit == 10 else {"features", "index"})
    assert limit == 10 or torch.equal(kept["index"], torch.arange(40))
