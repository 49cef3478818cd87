"""Tiny random models on disk, by what they read, and `ldmlab play` on them, in this process or one of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import uvicorn

from ldmlab.app.cli import Parser
from ldmlab.app.commands import play
from ldmlab.build import build_latent_diffusion
from ldmlab.model_files import write_model_folder
from ldmlab.play.playground import Playground, application
from sampling_models import CLIP
from tiny_models import spec_with

HOME = "ldmlab.conditioners"
CONDITIONERS: dict[str, dict[str, Any]] = {
    "class_id": {"class_label": {"_target_": f"{HOME}.class_label.ClassEmbedder", "classes": 10, "width": 16}},
    "caption": {"text": {"_target_": f"{HOME}.text.open_clip_text", "config": CLIP}},
    "boxes": {
        "layout": {
            **{"_target_": f"{HOME}.layout_tokens.LayoutTokens", "width": 16, "depth": 1, "heads": 2, "objects": 4},
            **{"vocab_size": 257, "classes": 3, "names": ["dog", "cat", "tree"]},
        }
    },
    "segmentation": {
        "semantic": {"_target_": f"{HOME}.semantic_map.SpatialRescaler", "classes": 4, "channels": 3, "stages": 1}
    },
    "low_resolution": {"low_resolution": {"_target_": f"{HOME}.low_resolution.LowResolution"}},
    "reference": {"image": {"_target_": f"{HOME}.image_embedding.open_clip_image", "config": CLIP}},
    "mask": {
        "masked": {"_target_": f"{HOME}.mask.MaskedLatent"},
        "mask": {"_target_": f"{HOME}.mask.Mask", "downsampling": 2},
    },
}
_SPATIAL = {"segmentation": 3, "low_resolution": 3, "mask": 3}  # channels beside the latent


def write_model(folder: Path, reads: str | None, seed: int = 0, size: int = 64) -> Path:
    """A model folder that takes one kind of input; its weights are drawn, none is zero."""
    more = _SPATIAL.get(reads or "", 0)
    told = reads is not None and not more
    backbone = {
        **spec_with()["backbone"],
        **{"in_channels": 2 + more, "context_width": 16 if told else None},
    }
    spec = spec_with(
        backbone=backbone, conditioners=CONDITIONERS[reads] if reads else {}, guidance_trained=told, image_size=size
    )
    torch.manual_seed(seed)
    model = build_latent_diffusion(spec)
    for parameter in model.backbone.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    parts = {"first_stage": model.first_stage, "denoiser": model.backbone, "conditioner": model.conditioners}
    write_model_folder(folder, spec, {name: part.state_dict() for name, part in parts.items()})
    return folder


def playground(out: Path, *words: str) -> tuple[Playground, str | None]:
    """What `ldmlab play WORDS` serves, and its password."""
    parser = Parser()
    play.add_arguments(parser)
    args = parser.parse_args([*words, "--out", str(out)])
    out.mkdir(parents=True, exist_ok=True)
    return play.playground_of(args, out), play.chosen_password(args)


class Served:
    """A playground in a thread of this process."""

    def __init__(self, out: Path, *words: str) -> None:
        self.out = out
        self.server = uvicorn.Server(uvicorn.Config(application(*playground(out, *words)), log_level="warning"))
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.thread = Thread(target=self.server.run, args=([listening],))
        self.thread.start()

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join()


class Playing:
    """`ldmlab play` until it is ended."""

    def __init__(self, folder: Path, *words: str, environment: dict[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.out, self.words, self.environment = folder, words, environment or {}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "ldmlab", "play", *self.words, "--out", str(self.out)]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
            env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
        )
        for _ in range(1200):
            try:
                self.get("/able")
                return
            except urllib.error.HTTPError as error:
                if error.code == 401:
                    return
                raise
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None, self.process.communicate()
                time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def end(self, sign: int = signal.SIGTERM) -> str:
        """What it printed."""
        os.kill(self.process.pid, sign)
        return str(self.process.communicate()[0])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> bytes:
        asked = urllib.request.Request(f"{self.url}{path}", headers=headers)
        with urllib.request.urlopen(asked, timeout=60) as response:
            return bytes(response.read())
