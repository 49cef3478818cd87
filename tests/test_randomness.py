"""Counter-based random numbers: against published values, the distributions, and any splitting of the work."""

import hashlib
import math
import zlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmlab.data.order import image_random
from ldmlab.errors import InputError
from ldmlab.randomness import _crc32, below, draw, integers, normal, philox, uniform


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([v]) for v in values)


# known answers of the authors' library Random123 for philox4x32 with ten rounds: counter, key => words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(counter: tuple[int, ...], key: tuple[int, int], expected: tuple) -> None:
    got = philox(words(*counter), key[0] | key[1] << 32)
    assert tuple(int(w) for w in got) == expected


def test_numbers_belong_to_the_image_not_to_the_batch() -> None:
    index = torch.tensor([5, 2**31 + 7, 0, 123456])
    whole = normal(7, "noise", index, (3, 5, 4))
    for place in range(4):
        assert torch.equal(normal(7, "noise", index[place : place + 1], (3, 5, 4))[0], whole[place])
    assert torch.equal(normal(7, "noise", index.flip(0), (3, 5, 4)).flip(0), whole)


def test_seed_purpose_index_and_step_all_matter() -> None:
    index = torch.arange(3)
    base = normal(1, "noise", index, (8,))
    others = [normal(2, "noise", index, (8,)), normal(1, "time", index, (8,)), normal(1, "noise", index, (8,), step=1)]
    others.append(normal(1 + 2**32, "noise", index, (8,)))
    assert not any(torch.equal(base, other) for other in others)
    assert not torch.equal(base[0], base[1])


def test_distributions() -> None:
    index = torch.arange(4000)
    u, n = uniform(0, "u", index, (25,)), normal(0, "n", index, (25,))
    count = u.numel()
    assert bool(((u > 0) & (u < 1)).all())
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * count)
    assert abs(n.mean()) < 4 / math.sqrt(count)
    assert abs(n.std() - 1) < 4 / math.sqrt(2 * count)
    assert abs((n**4).mean() - 3) < 4 * math.sqrt(96 / count)
    assert abs(torch.corrcoef(n.T.double()[:2])[0, 1]) < 4 / math.sqrt(len(index))
    assert n.dtype == torch.float32
    assert u.dtype == torch.float64


def test_integers_cover_their_range_evenly() -> None:
    counts = torch.bincount(integers(3, "time", torch.arange(20_000), 10), minlength=10)
    assert counts.shape == (10,)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 27.9  # 9 degrees of freedom, one in a thousand


def test_a_images_own_generator_is_a_function_of_seed_epoch_and_key() -> None:
    draws = {(s, e, k): image_random(s, e, k).random() for s in (0, 1) for e in (0, 1) for k in ("a", "b")}
    assert len(set(draws.values())) == 8
    assert draws[0, 1, "a"] == image_random(0, 1, "a").random()


def test_a_seed_that_is_no_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seed=-1 is outside"):
        normal(-1, "noise", torch.arange(2), (2,))


INDEX = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 17, 2**40 + 3, 2**62])


def test_the_bits_are_those_of_the_first_release() -> None:
    """A digest over seeds, purposes, steps and shapes, made by the plain 32-bit arithmetic that came before."""
    digest = hashlib.sha256()
    for seed in (0, 7, 0x5EED, 2**32 + 5, 2**63 + 11, 2**64 - 1):
        for purpose in ("noise", "drop.text", "posterior of the adversary"):
            for step in (0, 1, 1001, 2**31 + 3):
                for shape in ((1,), (3,), (5,), (2, 3, 3), (4, 8, 8)):
                    digest.update(normal(seed, purpose, INDEX, shape, step).numpy().tobytes())
                    digest.update(uniform(seed, purpose, INDEX, shape, step).numpy().tobytes())
                digest.update(integers(seed, purpose, INDEX, 1000, step).numpy().tobytes())
    assert digest.hexdigest() == "e9cc797f7dfe55e5712d4a32dce36d54fa84a4a849c776607f0ee4b103472224"


def test_joint_draws_are_those_of_each_purpose_alone() -> None:
    drawn = draw(3, INDEX, {"posterior": (4, 5, 3), "noise": (2, 5)}, ("time", "drop.a"), step=2)
    for purpose, shape in (("posterior", (4, 5, 3)), ("noise", (2, 5))):
        assert torch.equal(drawn[purpose], normal(3, purpose, INDEX, shape, step=2))
    for purpose in ("time", "drop.a"):
        assert torch.equal(drawn[purpose], uniform(3, purpose, INDEX, step=2))
    assert draw(3, INDEX, {}) == {}
    assert torch.equal(draw(3, INDEX, {}, ["time"])["time"], uniform(3, "time", INDEX))


@pytest.mark.slow
def test_compiled_draws_have_the_same_bits() -> None:
    def numbers(index: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
        drawn = draw(seed, index, {"posterior": (2, 3), "noise": (2, 3)}, ("time",))
        return below(drawn["time"], 1000), drawn["noise"], drawn["posterior"]

    def backend(graph: Any, inputs: list[Any]) -> Any:
        """A graph takes no integer that the compiler of kernels could not hand over."""

        def run(*values: Any) -> Any:
            assert all(value < 2**63 for value in values if isinstance(value, int))
            return made(*values)

        made = aot_eager(graph, inputs)
        return run

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(numbers, backend=backend, fullgraph=True)
    for seed in (3, 2**32 + 5, 2**63 - 1, 2**63 + 11, 2**64 - 1):
        for got, expected in zip(compiled(INDEX, seed), numbers(INDEX, seed), strict=True):
            assert torch.equal(got, expected)


def test_streams_are_numbered_by_crc32() -> None:
    for purpose in ("", "noise", "drop.text", "\u00fcbung"):
        assert _crc32(purpose) == zlib.crc32(purpose.encode())


class Kernels(TorchDispatchMode):
    """Counts what runs on a device: no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_numbers_of_a_step_are_few_kernels_and_nothing_waits() -> None:
    index = torch.arange(6)
    shapes = {"posterior": (4, 8, 8), "noise": (4, 8, 8)}
    draw(0, index, shapes, ["time", "drop.text"])  # what is constant is made once
    with Kernels() as kernels:
        draw(0, index, shapes, ["time", "drop.text"])
    assert len(kernels.names) <= 36, kernels.names
    assert not {"_local_scalar_dense", "nonzero", "lift_fresh", "arange", "full"} & set(kernels.names)


def test_no_images_have_no_numbers() -> None:
    none = torch.empty(0, dtype=torch.int64)
    made = draw(0, none, {"noise": (3, 4)}, ["time"])
    assert (made["noise"].shape, made["noise"].dtype) == ((0, 3, 4), torch.float32)
    assert (made["time"].shape, made["time"].dtype) == ((0,), torch.float64)
    assert uniform(0, "time", none, (2,)).shape == (0, 2)
