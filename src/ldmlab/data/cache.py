"""Decoded images kept in memory that all loader workers share."""

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ImageCache:
    """Room for `count` uint8 images of one size, filled as they are first read.

    An anonymous map: forked workers fill and read the same pages, nothing is left on disk after a kill. A spawned
    worker cannot inherit it and fills its own.
    """

    def __init__(self, count: int, size: int) -> None:
        self._count, self._size = count, size
        self._map()

    @staticmethod
    def bytes_needed(count: int, size: int) -> int:
        """Pixels and one flag per image."""
        return count * (3 * size * size + 1)

    def _map(self) -> None:
        pixels = np.frombuffer(mmap.mmap(-1, self.bytes_needed(self._count, self._size)), np.uint8)
        self._filled = pixels[: self._count]
        self._images = pixels[self._count :].reshape(self._count, 3, self._size, self._size)

    def get(self, index: int) -> NDArray[np.uint8] | None:
        """A copy of image `index`, (3, H, W), once it was put."""
        return self._images[index].copy() if self._filled[index] else None

    def put(self, index: int, image: NDArray[np.uint8]) -> None:
        """The flag comes after the pixels, so that another worker never reads half an image."""
        self._images[index] = image
        self._filled[index] = 1

    def __getstate__(self) -> dict[str, Any]:
        return {"_count": self._count, "_size": self._size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()
