"""A served study for the tests: two folders of images, the command in a process, requests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmlab.app.cli import dispatch


def image_folder(folder: Path, names: range, base: int) -> Path:
    """Images of random colours."""
    folder.mkdir(parents=True)
    for number in names:
        pixels = np.random.default_rng(base + number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")
    return folder


def made_study(folder: Path, *more: str) -> Path:
    """A study of task 2 with eight pairs."""
    for number, name in enumerate(("a", "b")):
        image_folder(folder / name, range(8), 100 * number)
    words = ["study", "make", str(folder / "a"), str(folder / "b"), "--task", "2", "--out", str(folder / "study")]
    dispatch([*words, *more])
    return folder / "study"


class Served:
    """`ldmlab study serve` until it is killed."""

    def __init__(self, study: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.study = study
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "ldmlab", "study", "serve", str(self.study), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(600):
            try:
                self.get("/")
                return
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None, self.process.communicate()
                time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as response:
            return bytes(response.read())

    def next(self, session: str) -> dict[str, Any]:
        return dict(json.loads(self.get(f"/next?session={session}")))

    def post(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"{self.url}{path}", data=data, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def lines(self) -> list[str]:
        return (self.study / "answers.jsonl").read_text().splitlines()
