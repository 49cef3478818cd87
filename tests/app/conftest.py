"""One walk through the flow for all tests here."""

import pytest
from walk import Flow, walk


@pytest.fixture(scope="session")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """The folders of one finished walk."""
    return walk(tmp_path_factory.mktemp("flow"))
