"""`.npz` batches of ADM's evaluation script: arr_0 uint8 (N, H, W, 3), and mu, sigma, mu_s, sigma_s if given.

Images are streamed, so a batch of 50,000 is never in memory at once.
"""

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ldmlab.errors import InputError
from ldmlab.files import write_atomically

_STATISTICS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # by score: names of mean and covariance
_BROKEN = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)


def images_shape(path: Path) -> tuple[int, int, int] | None:
    """Images, height and width of arr_0; None for a file of statistics alone."""
    with _opened(path) as file:
        if "arr_0.npy" not in file.namelist():
            return None
        with file.open("arr_0.npy") as stream:
            shape, order, kind = _header(stream)
    if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or order:
        raise InputError(f"{path}: arr_0 is {kind} of shape {shape} where uint8 of (N, height, width, 3) is expected.")
    return shape[0], shape[1], shape[2]


def read_images(path: Path, batch_size: int) -> Iterator[NDArray[np.uint8]]:
    """Batches (B, H, W, 3) of arr_0 in order."""
    shape = images_shape(path)
    assert shape is not None
    count, height, width = shape
    with _opened(path) as file, file.open("arr_0.npy") as stream:
        _header(stream)
        for start in range(0, count, batch_size):
            rows = min(batch_size, count - start)
            try:
                data = stream.read(rows * height * width * 3)
            except _BROKEN as error:
                raise InputError(f"{path}: arr_0 cannot be read ({error}); make or download the file again.") from error
            if len(data) < rows * height * width * 3:
                raise InputError(f"{path}: arr_0 ends before its {count} images; make or download the file again.")
            yield np.frombuffer(data, np.uint8).reshape(rows, height, width, 3)


def read_statistics(path: Path) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Mean and covariance by score, fid from mu and sigma, sfid from mu_s and sigma_s, if present."""
    found = {}
    with _opened(path) as file:
        for score, names in _STATISTICS.items():
            if {f"{name}.npy" for name in names} <= set(file.namelist()):
                mean, covariance = (_array(path, file, name) for name in names)
                if mean.shape != (mean.size,) or covariance.shape != (mean.size, mean.size):
                    raise InputError(f"{path}: {names[0]} {mean.shape} and {names[1]} {covariance.shape} do not fit.")
                found[score] = mean, covariance
    return found


def write_npz(
    path: Path,
    shape: tuple[int, int, int],  # images, height, width
    batches: Iterable[NDArray[np.uint8]],  # (B, H, W, 3), all of them in order
    statistics: Mapping[str, tuple[NDArray[Any], NDArray[Any]]] | None = None,  # mean and covariance: fid, sfid
) -> None:
    """A file for ADM's evaluation script and numpy; written atomically."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as stream:
                npy.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (*shape, 3)})
                for batch in batches:
                    stream.write(np.ascontiguousarray(batch, np.uint8).tobytes())
            for score, arrays in (statistics or {}).items():
                for name, array in zip(_STATISTICS[score], arrays, strict=True):
                    with file.open(f"{name}.npy", "w", force_zip64=True) as stream:
                        npy.write_array(stream, np.asarray(array, np.float64), allow_pickle=False)

    write_atomically(path, write)


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except _BROKEN as error:
        raise InputError(f"{path} cannot be read as .npz ({error}); make or download the file again.") from error


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type of a .npy inside."""
    version = npy.read_magic(stream)
    return npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)


def _array(path: Path, file: zipfile.ZipFile, name: str) -> NDArray[Any]:
    try:
        with file.open(f"{name}.npy") as stream:
            return np.asarray(npy.read_array(stream, allow_pickle=False), np.float64)
    except _BROKEN as error:
        raise InputError(f"{path}: {name} cannot be read ({error}); make or download the file again.") from error
