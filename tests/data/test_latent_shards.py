"""Statistics of latents against sampled ones, and shards written and read back."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from ldmlab.data.decode import decode_moments
from ldmlab.data.latent_shards import Statistics, npy_bytes
from ldmlab.data.manifest import Manifest
from ldmlab.data.output_folder import ShardFile
from ldmlab.data.shards import ShardReader
from ldmlab.data.tars import tar_bytes
from ldmlab.errors import InputError


def moments(number: int, channels: int = 3, with_logvar: bool = True, views: int = 2) -> np.ndarray:
    random = np.random.default_rng(number)
    offset = np.arange(channels)[:, None, None]
    mean = random.normal(offset, 1 + offset, (views, channels, 4, 4))
    logvar = random.normal(-1, 1, (views, channels, 4, 4))
    return np.concatenate([mean, logvar] if with_logvar else [mean], axis=1).astype(np.float32)


@pytest.mark.parametrize("with_logvar", [True, False])
def test_statistics_are_those_of_drawn_latents(with_logvar: bool) -> None:
    statistics, samples = Statistics(), []
    noise = np.random.default_rng(0)
    for number in range(400):
        m = moments(number, with_logvar=with_logvar)
        statistics.add_moments(m, channels=3)
        spread = np.exp(m[:, 3:] / 2) if with_logvar else 0.0
        samples.append(m[:, :3] + spread * noise.standard_normal((2, 3, 4, 4)))
    summary, z = statistics.summary(), np.stack(samples)
    # 12,800 values per channel: a standard error of 0.03 for the mean of the widest channel
    assert np.allclose(summary["mean"], z.mean((0, 1, 3, 4)), atol=0.1)
    assert np.allclose(summary["std"], z.std((0, 1, 3, 4)), rtol=0.03)
    assert np.isclose(summary["overall_std"], z.std(), rtol=0.02)
    assert summary["images"] == 400
    if not with_logvar:  # nothing is sampled: exact
        assert np.allclose(summary["std"], z.std((0, 1, 3, 4)), rtol=1e-9)
        assert np.isclose(summary["overall_std"], z.std(), rtol=1e-9)


def test_statistics_of_parts_add_up() -> None:
    whole, left, right = Statistics(), Statistics(), Statistics()
    for number in range(10):
        whole.add_moments(moments(number), 3)
        (left if number < 4 else right).add_moments(moments(number), 3)
    left.add(right)
    left.add(Statistics())  # a shard without a readable image
    assert np.allclose(left.summary()["std"], whole.summary()["std"], rtol=1e-12)
    assert left.images == 10


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_written_moments_are_read_back(tmp_path: Path, dtype: str) -> None:
    shard = ShardFile(tmp_path / "00000.tar")
    for number in range(3):
        fields = json.dumps({"caption": str(number)}).encode()
        npy = npy_bytes(f"moments of {number:03}", moments(number), dtype, "")
        shard.append(tar_bytes(f"{number:03}.json", fields) + tar_bytes(f"{number:03}.npy", npy))
    assert not (tmp_path / "00000.tar").exists()
    info = shard.finish()
    ShardFile(tmp_path / "00001.tar").abandon()
    assert info is not None
    assert [path.name for path in tmp_path.glob("*.t*")] == ["00000.tar"]
    manifest = Manifest("latents", "train", [info], ["caption"], 8, {}, "", "", {})
    key, files = ShardReader(tmp_path, manifest).read(0, 2)
    assert key == "002"
    assert sorted(files) == ["json", "npy"]
    stored = np.load(io.BytesIO(files["npy"]), allow_pickle=False)
    assert stored.dtype == dtype
    assert np.allclose(
        stored, moments(2), rtol=2**-11 if dtype == "float16" else 0, atol=1e-7
    )  # half of float16's step


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(InputError, match=r"moments of 000 do not fit float16 .*; use dtype=float32\."):
        npy_bytes("moments of 000", moments(0) * 1e6, "float16", "use dtype=float32")


@pytest.mark.parametrize("array", [np.array([{}], object), np.zeros((1, 2, 2)), np.zeros((1, 2, 2, 2), int)])
def test_arrays_that_are_no_moments_are_bad_samples(array: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)
    with pytest.raises(ValueError, match="moments"):
        decode_moments({"npy": data.getvalue()}, 0)


def test_a_view_that_is_not_there_and_a_cut_array() -> None:
    data = io.BytesIO()
    np.save(data, moments(0, views=1))
    with pytest.raises(ValueError, match="have no view 1"):
        decode_moments({"npy": data.getvalue()}, 1)
    with pytest.raises(ValueError, match="does not fill"):
        decode_moments({"npy": data.getvalue()[:-4]}, 0)
