"""Times of a discrete schedule in sections, as DiT's `timestep_respacing` visits them."""

from itertools import accumulate

from ldmlab.errors import InputError


def sectioned(total: int, steps: int, text: str) -> list[int]:
    """Times of T, noisiest first; text: a count for each of equal sections, low noise first ("10,15,20").

    Within a section times are even and include both its ends; the first sections are the longer ones where their number
    does not divide T. Sums are rounded as in the official program.
    """
    counts = [int(count) for count in text.split(",") if count.isdecimal()]
    if len(counts) != len(text.split(",")) or min(counts) < 1 or sum(counts) != steps:
        raise InputError(
            f"spacing=linspace:{text} with steps={steps}: give a count of 1 or more for each section, which make "
            f"the steps together, for instance linspace:10,15,20 with steps=45."
        )
    size, longer = divmod(total, len(counts))
    times, start = list[int](), 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if count > length:
            raise InputError(f"spacing=linspace:{text}: a section of {length} noise levels has no {count} of them.")
        stride = (length - 1) / max(count - 1, 1)
        times += [start + round(place) for place in accumulate([0.0] + [stride] * (count - 1))]
        start += length
    return times[::-1]
