"""The random draws of one picture in a worker process, which needs no torch for them."""

import hashlib
import random


def picture_random(seed: int, epoch: int, key: str) -> random.Random:
    """The generator for a picture's crops and flips in a loader worker: a function of (seed, epoch, key)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))
