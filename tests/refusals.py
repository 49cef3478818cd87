"""What a user reads when something is refused."""

from collections.abc import Callable

import pytest

from ldmlab.errors import InputError


def refusal(act: Callable[[], object]) -> str:
    """The sentence with which something was refused: one line, which ends."""
    with pytest.raises(InputError) as caught:
        act()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence
