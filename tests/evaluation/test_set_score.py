"""Sets of images against each other: folders, shards and `.npz` give one score; bad ones end in one sentence."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as port
from torchmetrics import Metric

from ldmlab.app.cli import dispatch
from ldmlab.app.compose import compose, group_choices, plain
from ldmlab.app.evaluate import build_metric
from ldmlab.errors import InputError
from ldmlab.evaluation import image_sets
from ldmlab.evaluation.image_sets import ImageSet, score_sets, statistics_of
from ldmlab.evaluation.npz import read_images, read_statistics, write_npz
from ldmlab.metrics.features import Inception2015
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.inception_score import InceptionScore
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import PrecisionRecall

NAME = Inception2015.name
image_set = partial(image_sets.image_set, workers=0)


class MeanColours:
    """Six numbers an image under a name of choice."""

    weights_hash, width, gives = "0", 6, frozenset({"features"})

    def __init__(self, name: str = NAME) -> None:
        self.name = name

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        pixels = images.float()
        return {"features": torch.cat([pixels.mean(dim=(2, 3)), pixels.std(dim=(2, 3))], dim=1)}


def noise(count: int, seed: int, size: int = 16) -> np.ndarray:
    """Smooth coloured noise, uint8 (N, H, W, 3)."""
    random = np.random.RandomState(seed)
    coarse = random.randint(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in coarse])


def folder_of(path: Path, images: np.ndarray) -> Path:
    path.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:05d}.png")
    return path


def scores(samples: ImageSet, reference: ImageSet, **metrics: Any) -> dict[str, float]:
    metrics = metrics or {"fid": FrechetDistance(6), "kid": KernelDistance(5, 20), "pr": PrecisionRecall()}
    found = score_sets(samples, reference, MeanColours(), metrics, batch_size=7)
    return {name: score["value"] for name, score in found["scores"].items()}


def test_every_kind_of_set_gives_one_score(tmp_path: Path) -> None:
    fake, real = noise(50, 0), noise(60, 1)
    sets = {"folder": (folder_of(tmp_path / "fake", fake), folder_of(tmp_path / "real", real))}
    sets["npz"] = (tmp_path / "fake.npz", tmp_path / "real.npz")
    np.savez(sets["npz"][0], arr_0=fake)
    np.savez_compressed(sets["npz"][1], real)
    pack = ["--size", "16", "--format", "png", "--layout", "plain", "--workers", "1"]
    for name in ("fake", "real"):
        assert dispatch(["pack", str(tmp_path / name), str(tmp_path / f"{name}_shards"), *pack]) == 0
    sets["shards"] = (tmp_path / "fake_shards" / "train", tmp_path / "real_shards" / "train")
    found = {kind: [image_set(path) for path in paths] for kind, paths in sets.items()}
    assert [[part.kind for part in pair] for pair in found.values()] == [[kind] * 2 for kind in sets]
    expected = scores(*found["folder"])
    features = [MeanColours()(torch.from_numpy(part).permute(0, 3, 1, 2))["features"] for part in (fake, real)]
    alone = FrechetDistance(6)
    alone.update(features[0], real=False)
    alone.update(features[1], real=True)
    assert expected["fid"] == pytest.approx(float(alone.compute()["fid"]), rel=1e-9)
    assert scores(*found["npz"]) == pytest.approx(expected, rel=1e-9)
    by_shards = scores(*found["shards"])  # in an order of their own, which subsets depend on
    assert {name: by_shards[name] for name in ("fid", "precision", "recall")} == pytest.approx(
        {name: expected[name] for name in ("fid", "precision", "recall")}, rel=1e-9
    )


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_processes_share_a_set(kind: str, tmp_path: Path) -> None:
    images = noise(23, 2)
    path = folder_of(tmp_path / "set", images) if kind == "folder" else tmp_path / "set.npz"
    if kind == "npz":
        np.savez(path, images)
    parts = [part for rank in range(3) for part in image_set(path).batches(4, rank, 3)]
    index = torch.cat([numbers for numbers, _ in parts])
    together = torch.cat([batch for _, batch in parts])
    assert sorted(index.tolist()) == list(range(23))
    assert torch.equal(together[index.argsort()], torch.from_numpy(images).permute(0, 3, 1, 2))


def test_an_npz_comes_out_as_it_goes_in(tmp_path: Path) -> None:
    images, path = noise(11, 3), tmp_path / "deep" / "set.npz"
    mean, covariance = np.arange(6.0), np.eye(6)
    write_npz(path, (11, 16, 16), (images[start : start + 4] for start in (0, 4, 8)), {"fid": (mean, covariance)})
    with np.load(path, allow_pickle=False) as read:  # as ADM's script does
        assert sorted(read.files) == ["arr_0", "mu", "sigma"]
        assert np.array_equal(read["arr_0"], images)
        assert np.array_equal(read["mu"], mean)
    assert np.array_equal(np.concatenate([*read_images(path, 3)]), images)
    assert np.array_equal(read_statistics(path)["fid"][1], covariance)
    assert [file.name for file in path.parent.iterdir()] == ["set.npz"]


def test_given_statistics_replace_the_images(tmp_path: Path) -> None:
    fake, real = noise(50, 0), noise(60, 1)
    np.savez(tmp_path / "fake.npz", fake)
    np.savez(tmp_path / "real.npz", real)
    samples, reference = image_set(tmp_path / "fake.npz"), image_set(tmp_path / "real.npz")
    expected = scores(samples, reference)
    swapped = {"fid": FrechetDistance(6)}
    score_sets(reference, samples, MeanColours(), swapped)
    mean, covariance = statistics_of(swapped)["fid"]  # of the real images, which were the samples
    np.savez(tmp_path / "statistics.npz", mu=mean, sigma=covariance)
    assert scores(samples, image_set(tmp_path / "statistics.npz"), fid=FrechetDistance(6)) == pytest.approx(
        {"fid": expected["fid"]}, rel=1e-9
    )
    np.savez(tmp_path / "both.npz", arr_0=real[:30], mu=mean, sigma=covariance)  # as ADM's reference batches
    both = scores(samples, image_set(tmp_path / "both.npz"))
    assert both["fid"] == pytest.approx(expected["fid"], rel=1e-9)
    assert both["precision"] == scores(samples, image_set(tmp_path / "both.npz"), pr=PrecisionRecall())["precision"]
    with pytest.raises(InputError, match=r"no images, which score pr needs"):
        scores(samples, image_set(tmp_path / "statistics.npz"), fid=FrechetDistance(6), pr=PrecisionRecall())
    with pytest.raises(InputError, match="6 wide where this metric was built for 5"):
        scores(samples, image_set(tmp_path / "statistics.npz"), fid=FrechetDistance(5))
    with pytest.raises(InputError, match="choose --features inception"):
        score_sets(samples, image_set(tmp_path / "both.npz"), MeanColours("other"), {"fid": FrechetDistance(6)})


def test_errors_name_the_options_of_the_command(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", noise(5, 0))
    few = image_set(tmp_path / "set.npz")
    for metrics, message in (
        ({"kid": KernelDistance(subset_size=1000)}, r"metrics\.kid\.subset_size=1000 is more than the 5 real images"),
        ({"is": InceptionScore()}, r"metrics\.is needs logits, which --features .* choose --features inception"),
        ({"fid": FrechetDistance(6)}, r"5 real images are fewer .* set metrics\.fid\.small_sample=true"),
    ):
        with pytest.raises(InputError, match="^" + message):
            scores(few, few, **metrics)


def test_samples_are_scored_without_the_grids_beside_them(tmp_path: Path) -> None:
    samples = folder_of(tmp_path / "samples", noise(5, 0))
    names = ("grid.png", "sweep_steps.png", "000000_trajectory.png", "trajectory.png", "000000_trajectory.webp")
    for name in names:
        Image.new("RGB", (48, 40)).save(samples / name)
    assert image_set(samples).count == 5 + len(names)  # images of the user's own, which are called so
    Image.new("RGB", (48, 40)).save(samples / "000000.png")
    assert image_set(samples).count == 5 + 1


def test_a_pipe_among_images_blocks_nothing(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "images", noise(5, 0))
    os.mkfifo(images / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png cannot be read"):
        scores(image_set(images), image_set(images), pr=PrecisionRecall())


def test_bad_sets_are_one_sentence(tmp_path: Path) -> None:
    good = folder_of(tmp_path / "good", noise(5, 0))
    with pytest.raises(InputError, match="does not exist; give a folder"):
        image_set(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images and no shards"):
        image_set(tmp_path / "empty")
    larger = image_set(folder_of(tmp_path / "larger", noise(5, 0, 24)))
    with pytest.raises(InputError, match=r"16x16 px and .*larger of 24x24"):
        scores(image_set(good), larger)
    Image.new("RGB", (24, 16)).save(good / "00007.png")
    with pytest.raises(InputError, match=r"00007\.png has 16x24 px where 00000\.png has 16x16"):
        scores(image_set(good), image_set(good), pr=PrecisionRecall())
    (good / "00003.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"00003\.png cannot be read"):
        scores(image_set(good), image_set(good), pr=PrecisionRecall())
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"junk\.npz cannot be read as \.npz"):
        image_set(tmp_path / "junk.npz")
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(InputError, match="arr_0 is float64"):
        image_set(tmp_path / "floats.npz")
    np.savez(tmp_path / "other.npz", labels=np.zeros(3))
    with pytest.raises(InputError, match="neither arr_0 nor mu and sigma"):
        image_set(tmp_path / "other.npz")
    np.savez(tmp_path / "misfit.npz", mu=np.zeros(3), sigma=np.zeros((4, 4)))
    with pytest.raises(InputError, match="do not fit"):
        image_set(tmp_path / "misfit.npz")


def scaled_inception(path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of random weights whose features and logits have a variance of about 1 on these images."""
    with monkeypatch.context() as patch:
        patch.setattr(port, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = port.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    features, _ = network(images)
    deviation = features.std(dim=0).mean()
    for name in ("branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool"):
        getattr(network.Mixed_7c, name).bn.weight.data /= deviation
    _, logits = network(images)
    network.fc.weight.data /= logits.std(dim=0).mean()
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_folders_score_as_torch_fidelity_scores_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, real = noise(14, 0, 32), noise(16, 1, 32)
    paths = folder_of(tmp_path / "fake", fake), folder_of(tmp_path / "real", real)
    weights = scaled_inception(tmp_path / "w.pth", torch.from_numpy(real).permute(0, 3, 1, 2), monkeypatch)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(paths[0]),
        input2=str(paths[1]),
        cuda=False,
        isc=True,
        isc_splits=2,
        fid=True,
        kid=True,
        kid_subsets=10,
        kid_subset_size=10,
        prc=True,
        feature_extractor="inception-v3-compat",  # not VGG16, its choice for precision and recall
        feature_layer_prc="2048",
        save_cpu_ram=True,  # no worker processes
        feature_extractor_weights_path=str(weights),
        verbose=False,
        cache=False,
    )
    out = tmp_path / "out" / "scores.json"
    command = ["score", str(paths[0]), "--device", "cpu", "--workers", "0"]
    network = ["metrics.fid.small_sample=true", f"features.weights={weights}"]
    smaller = ["metrics.is.splits=2", "metrics.kid.subsets=10", "metrics.kid.subset_size=10"]
    files = ["--out", str(out), "--npz", str(tmp_path / "o.npz")]
    chosen = ["--metrics", "fid,is,kid,precision_recall"]
    assert dispatch([*command, str(paths[1]), *chosen, *files, *network, *smaller]) == 0
    printed = capsys.readouterr().out.splitlines()
    ours = {line.split()[0]: float(line.split()[1]) for line in printed[3:8]}
    names = {"fid": "frechet_inception_distance", "is": "inception_score_mean"}
    names |= {"kid": "kernel_inception_distance_mean", "precision": "precision", "recall": "recall"}
    assert ours == pytest.approx({name: theirs[key] for name, key in names.items()}, rel=1e-3)
    assert read_statistics(tmp_path / "o.npz")["fid"][0].shape == (2048,)
    assert json.loads(out.read_text())["reference"]["images"] == 16
    assert dispatch([*command, str(tmp_path / "o.npz"), "--metrics", "fid", *network]) == 0
    own = float(capsys.readouterr().out.splitlines()[3].split()[1])
    assert abs(own) < 1e-3 * ours["fid"]  # the samples' own statistics; 2034 of 2048 eigenvalues are rounding's


def test_the_command_refuses_wrong_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--metrics fit: there is no such score"):
        dispatch(["score", str(tmp_path), str(tmp_path), "--metrics", "fit"])
    with pytest.raises(InputError, match="inceptoin"):
        dispatch(["score", str(tmp_path), str(tmp_path), "--features", "inceptoin"])
    with pytest.raises(InputError, match="small_sampel"):
        dispatch(["score", str(tmp_path), str(tmp_path), "metrics.fid.small_sampel=true"])


def test_every_score_is_built_from_its_file() -> None:
    names = group_choices("metric")
    nodes = plain(compose("score", [f"+metric@metrics.{name}={name}" for name in names]))["metrics"]
    metrics = {name: build_metric(name, nodes[name], 6) for name in names}
    assert {"fid", "sfid", "is", "kid", "precision_recall", "density_coverage", "cmmd", "clip_score"} <= metrics.keys()
    assert all(isinstance(metric, Metric) for metric in metrics.values())


def test_too_few_images_are_refused_before_any_is_looked_at(tmp_path: Path) -> None:
    class Blind(MeanColours):
        def __call__(self, images: Tensor) -> dict[str, Tensor]:
            raise AssertionError("looked at images that cannot be scored")

    few = image_set(folder_of(tmp_path / "few", noise(4, 0)))
    many = image_set(folder_of(tmp_path / "many", noise(8, 1)))
    with pytest.raises(InputError, match="4 generated images are fewer than the 6 features"):
        score_sets(few, many, Blind(), {"fid": FrechetDistance(6)})
    with pytest.raises(InputError, match=r"metrics\.kid\.subset_size=6 is more than the 4 real images"):
        score_sets(many, few, Blind(), {"kid": KernelDistance(5, subset_size=6)})
