"""Shared by all tests: one thread, and no network."""

import io
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails; loopback and unix sockets (process groups) stay open."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="session")
def _parsed_once() -> None:
    """Hydra parses every file of conf/ again for each composition; here each text is parsed once."""
    load, parsed = OmegaConf.load, dict[str, Any]()

    def cached(file: Any) -> Any:
        if not hasattr(file, "read"):
            return load(file)
        if (text := file.read()) not in parsed:
            parsed[text] = OmegaConf.to_container(load(io.StringIO(text)))
        return OmegaConf.create(parsed[text])

    setattr(OmegaConf, "load", staticmethod(cached))  # noqa: B010  for the whole session


@pytest.fixture(autouse=True)
def _kept_references(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Reference statistics of tests do not lie among a person's own."""
    folder: Path = tmp_path_factory.getbasetemp() / "references"
    monkeypatch.setenv("LDMLAB_REFERENCES", str(folder))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A playwright Browser; skipped where no chromium is installed, unless LDMLAB_NEEDS_BROWSER is set."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None and not os.environ.get("LDMLAB_NEEDS_BROWSER"):
        pytest.skip("no chromium is installed; apt-get install chromium")
    with sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()
