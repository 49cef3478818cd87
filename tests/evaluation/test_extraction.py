"""The audit finds what a model has memorised and accuses nothing else; intervals and cliques are those of others."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from answering_models import Answers
from blobs import SIZE, blob, blob_data
from scipy.stats import binomtest
from torch import Tensor

from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation import extraction
from ldmlab.evaluation.extraction import Extraction
from ldmlab.evaluation.memorisation import Proportion, largest_clique, least_difference, medoid
from ldmlab.evaluation.protocol import Protocol
from ldmlab.metrics.features import Pixels
from ldmlab.report.audit_page import stopping_advice, write_audit

TRAIN, VAL = [*range(40), 7, 7], range(1000, 1060)  # blob 7 lies there three times
MEMORISED, CONSTANT = {3, 7, 21}, 30  # a constant image of its own is a candidate and no copy


class Partly(Answers):
    """Gives the memorised blobs back with a little noise, one image for CONSTANT, and new blobs for the rest."""

    image_size = (SIZE, SIZE)
    info: Mapping[str, Any] = {"path": "runs/partly", "weights": "averaged", "step": 5}

    def __init__(self) -> None:
        super().__init__({"caption"}, self.image_of)
        self.made: list[int] = []

    def image_of(self, requests: Sequence[Mapping[str, Any]], numbers: list[int]) -> Tensor:
        self.made += numbers
        return torch.stack([self._one(request, number) for request, number in zip(requests, numbers, strict=True)])

    def _one(self, request: Mapping[str, Any], number: int) -> Tensor:
        seed = int(str(request["caption"]).split()[1])
        if seed not in MEMORISED:
            return blob(5000 if seed == CONSTANT else 10_000 + number)
        noise = torch.randint(-3, 4, (3, SIZE, SIZE), generator=torch.Generator().manual_seed(number))
        return (blob(seed) + noise).clamp(0, 255).to(torch.uint8)

    def encode(self, images: Tensor) -> Tensor:
        return images

    decode = encode


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardData:
    return blob_data(tmp_path_factory.mktemp("blobs"), TRAIN, VAL, ("caption",))


def audit(data: ShardData, out: Path, model: Answers | None = None, **options: Any) -> dict[str, Any]:
    protocol = Protocol(name="audit", reference="train", metrics={}, steps=1, copy_quantile=0.05)
    made = {"each": 6, "clique": 3, **options}
    return Extraction(model or Partly(), data, Pixels(8), protocol, out, **made).run()  # type: ignore[arg-type]


def test_memorised_images_are_extracted_and_nothing_else(data: ShardData, tmp_path: Path) -> None:
    found = audit(data, tmp_path)
    extracted = {one["caption"]: one for one in found["candidate_list"] if one["extracted"]}
    assert extracted.keys() == {f"blob {seed}" for seed in MEMORISED}
    assert all(one["train_caption"] == one["caption"] and one["agree"] == 6 for one in extracted.values())
    assert {caption: one["duplicates"] for caption, one in extracted.items()} == {
        "blob 3": 1,
        "blob 7": 3,
        "blob 21": 1,
    }
    assert [one["caption"] for one in found["candidate_list"] if not one["extracted"]] == [f"blob {CONSTANT}"]
    assert found["conditions"] == 40  # one of each caption
    assert found["extracted"]["value"] == pytest.approx(3 / 40)
    expected = 3 / 40 + 37 / 40 * 0.05  # new blobs are copies as rarely as held-out ones
    assert found["copies"]["value"] == pytest.approx(expected, abs=0.06)  # two deviations of 5 % of 60 images
    assert found["held_out_copies"]["value"] == pytest.approx(0.05, abs=0.02)
    assert found["sensitivity"]["value"] == 1
    assert all((tmp_path / one["sample_file"]).is_file() for one in extracted.values())


def test_a_stopped_audit_goes_on(data: ShardData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "_CHUNK", 50)
    plain = audit(data, tmp_path / "plain")

    class Killed(Partly):
        def image_of(self, requests: Sequence[Mapping[str, Any]], numbers: list[int]) -> Tensor:
            if numbers[-1] >= 100:
                raise KeyboardInterrupt
            return super().image_of(requests, numbers)

    with pytest.raises(KeyboardInterrupt):
        audit(data, tmp_path / "killed", Killed())
    model = Partly()
    again = audit(data, tmp_path / "killed", model)
    assert set(model.made) >= set(range(100, 240))
    assert not set(model.made) & set(range(100)) - {one["sample"] for one in plain["candidate_list"]}  # shown again
    assert {k: v for k, v in again.items() if k != "provenance"} == {
        k: v for k, v in plain.items() if k != "provenance"
    }


def _process(rank: int, folder: str, data: ShardData, expected: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = audit(data, Path(folder) / "two")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    for name in ("copies", "held_out_copies", "extracted", "sensitivity", "training"):
        assert found[name] == expected[name]
    names = ("sample", "duplicates", "train_caption")  # of equal training images either may be the twin
    for one, other in zip(found["candidate_list"], expected["candidate_list"], strict=True):
        assert [one[name] for name in names] == [other[name] for name in names]


@pytest.mark.slow
def test_two_processes_find_what_one_does(data: ShardData, tmp_path: Path) -> None:
    mp.spawn(_process, args=(str(tmp_path), data, audit(data, tmp_path / "one")), nprocs=2)


def test_captions_are_a_random_part(data: ShardData, tmp_path: Path) -> None:
    assert audit(data, tmp_path, captions=9)["conditions"] == 9


def test_a_model_without_captions_is_refused(data: ShardData, tmp_path: Path) -> None:
    for reads in (set(), {"caption", "mask"}):
        with pytest.raises(InputError, match=r"protocol\.neighbours"):
            audit(data, tmp_path, Answers(reads, lambda requests, numbers: torch.zeros(1)))


def test_weak_features_are_named(data: ShardData, tmp_path: Path) -> None:
    class Blind(Pixels):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            noise = torch.randn(len(images), self.width, generator=torch.Generator().manual_seed(int(images.sum())))
            return {"features": noise + 0 * super().forward(images)["features"]}

    class Blurred(Partly):
        def encode(self, images: Tensor) -> Tensor:
            return images // 2

    protocol = Protocol(name="audit", reference="train", metrics={}, steps=1)
    found = Extraction(Blurred(), data, Blind(8), protocol, tmp_path, each=2, clique=2).run()  # type: ignore[arg-type]
    assert any(text.startswith("weak features") for text in found["warnings"])
    assert any("60 held-out" in text for text in found["warnings"])


def test_the_page_says_when_to_stop(data: ShardData, tmp_path: Path) -> None:
    one = audit(data, tmp_path / "a") | {"label": "a", "run": "runs/partly"}
    audits = [
        {**one, "model": {**one["model"], "step": step}, "exceeds": step > 20, "label": "a"} for step in (30, 10, 20)
    ]
    assert stopping_advice(audits)[0].startswith("partly on 42 images: stop at step 20; at step 30 copies exceed")
    assert "up to step 20" in stopping_advice(audits[1:])[0]
    assert "the first audited" in stopping_advice([{**point, "exceeds": True} for point in audits])[0]
    other = {**one, "run": "runs/other", "training": {**one["training"], "images": 300}}
    text = write_audit(tmp_path, [*audits, other])
    page = (tmp_path / "report.html").read_text()
    assert "7.5 (2.6 .. 19.9)" in text  # 3 of 40, Wilson
    assert "cannot be read" not in page
    assert page.count("<img") >= 4 * 2 * len(MEMORISED)
    assert "over steps" in page
    assert "at the last checkpoint" in page
    assert json.dumps(audits)  # plain data


def test_intervals_are_those_of_scipy_and_of_newcombe() -> None:
    for hits, count in ((0, 10), (5, 10), (3, 40), (40, 40)):
        ours = Proportion.of(torch.arange(count) < hits)
        theirs = binomtest(hits, count).proportion_ci(method="wilson")
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    a, b = Proportion.of(torch.arange(70) < 56), Proportion.of(torch.arange(80) < 48)
    assert least_difference(a, b) == pytest.approx(0.0524, abs=1e-4)  # table II of Newcombe (1998), (a), method 10


def test_samples_of_one_caption_count_as_far_as_they_differ() -> None:
    drawn = torch.rand(400, 8, generator=torch.Generator().manual_seed(0)) < 0.2
    assert Proportion.of_groups(drawn).count == pytest.approx(3200, rel=0.15)
    same = drawn[:, :1].expand(-1, 8)
    assert Proportion.of_groups(same).count == pytest.approx(400, rel=0.01)
    assert Proportion.of_groups(torch.zeros(50, 8, dtype=torch.bool)).high == Proportion.of(torch.zeros(50) > 0).high


def test_the_largest_clique_is_the_one_of_all_subsets() -> None:
    for seed in range(30):
        half = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed)) < 0.55
        joined = half.triu(1) | half.triu(1).T
        found = largest_clique(joined)
        assert all(joined[i, j] for i, j in itertools.combinations(found, 2))
        every = itertools.combinations(range(9), len(found) + 1)
        assert not any(all(joined[i, j] for i, j in itertools.combinations(some, 2)) for some in every)


def test_the_medoid_is_in_the_middle() -> None:
    places = torch.tensor([0.0, 1.0, 5.0, 2.0])
    assert medoid((places[:, None] - places).abs(), [0, 1, 3]) == 1
