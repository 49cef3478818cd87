"""The random draws of one image in a worker process, which needs no torch for them."""

import hashlib
import random


def image_random(seed: int, epoch: int, key: str) -> random.Random:
    """The generator for an image's crops and flips in a loader worker: a function of (seed, epoch, key)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))
