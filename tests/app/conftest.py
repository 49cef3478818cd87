"""One walk through the flow for all tests here."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from walk import Flow, walk


@pytest.fixture(scope="session")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flow]:
    """The folders of one finished walk, beside which tests put theirs: no test changes what others start from."""
    made = walk(tmp_path_factory.mktemp("flow"))
    before = contents(made.root)
    yield made
    after = contents(made.root)
    changed = [str(path) for path, content in before.items() if after.get(path) != content]
    assert not changed, f"a test changed what all tests start from: {', '.join(changed)}"


def contents(folder: Path) -> dict[Path, str]:
    """File => hash of what it holds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
