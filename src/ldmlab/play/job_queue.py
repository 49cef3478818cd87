"""One request at a time on one model: a queue, its thread, and what each request shows while it waits and runs."""

import base64
import io
import math
import secrets
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.inference.model import LoadedModel
from ldmlab.nn.pixels import as_images

_KEPT = 200  # requests whose state is remembered
_SHARE = 4  # decoding previews takes at most one part in `_SHARE` + 1 of the time
_SHOWN = 4  # images in a preview


class Stopped(Exception):
    """By the person who asked, or because the server ends."""


@dataclass
class Request:
    """The state of one request; its thread writes, the page reads."""

    work: Callable[["Request"], dict[str, Any]] | None  # None after it: it holds images
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: str = "waiting"  # waiting | running | done | failed | stopped
    done: int = 0  # image steps
    total: int = 1
    previews: dict[int, str] = field(default_factory=dict)  # by model, data URLs
    result: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    stop: Event = field(default_factory=Event)

    def shown(self) -> dict[str, Any]:
        """For the page."""
        known = {"id": self.id, "state": self.state, "done": self.done, "total": self.total}
        return {**known, "previews": dict(self.previews), **self.result}


class Live:
    """An `after_step` that counts, keeps a preview of the clean estimates, and ends a stopped request."""

    def __init__(
        self,
        request: Request,
        model: LoadedModel,
        number: int = 0,
        size: tuple[int, int] | None = None,
        previews: bool = True,
    ) -> None:
        self.request, self.model, self.number, self.size = request, model, number, size
        self._next = 0.0 if previews else math.inf

    def __call__(self, step: int, x: Tensor, clean: Tensor) -> Tensor:
        """x is returned unchanged."""
        if self.request.stop.is_set():
            raise Stopped
        self.request.done += len(x)
        began = time.monotonic()
        if began >= self._next:
            self.request.previews[self.number] = self._decoded(clean[:_SHOWN])
            self._next = time.monotonic() + _SHARE * (time.monotonic() - began)
        return x

    @torch.no_grad()
    def _decoded(self, clean: Tensor) -> str:
        height, width = self.size or self.model.image_size
        images = as_images(self.model.diffusion.decode(clean))[:, :height, :width].numpy()
        file = io.BytesIO()
        Image.fromarray(np.concatenate(list(images), axis=1)).save(file, format="PNG", compress_level=1)
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class JobQueue:
    """Requests in their order, one at a time."""

    def __init__(self, most_waiting: int) -> None:
        self._known: OrderedDict[str, Request] = OrderedDict()
        self._waiting: Queue[Request | None] = Queue()
        self._most, self._lock = most_waiting, Lock()
        self._thread = Thread(target=self._run, name="sampling", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[Request], dict[str, Any]]) -> Request:
        """Queue it; InputError if too many wait."""
        with self._lock:
            ahead = sum(one.state in ("waiting", "running") for one in self._known.values())
            if ahead > self._most:
                raise InputError(f"{ahead} requests are before yours, the most that wait here; try again in a while.")
            request = Request(work)
            self._known[request.id] = request
            ended = [key for key, one in self._known.items() if one.state not in ("waiting", "running")]
            for key in ended[: max(len(self._known) - _KEPT, 0)]:
                del self._known[key]
        self._waiting.put(request)
        return request

    def get(self, name: str) -> Request | None:
        return self._known.get(name)

    def before(self, request: Request) -> int:
        """Requests that come first."""
        with self._lock:
            names = list(self._known)
            earlier = [self._known[name] for name in names[: names.index(request.id)]] if request.id in names else []
        return sum(one.state in ("waiting", "running") for one in earlier)

    def close(self) -> None:
        """Stop what runs and what waits."""
        with self._lock:
            for request in self._known.values():
                request.stop.set()
        self._waiting.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while (request := self._waiting.get()) is not None:
            request.state = "running"
            try:
                if request.stop.is_set():
                    raise Stopped
                assert request.work is not None
                request.result = request.work(request)
                request.state = "done"
            except Stopped:
                request.state = "stopped"
            except InputError as error:
                request.result, request.state = {"error": str(error)}, "failed"
            except Exception as error:
                traceback.print_exc()
                sentence = f"a fault in ldmlab ({type(error).__name__}); the terminal of `ldmlab play` shows it."
                request.result, request.state = {"error": sentence}, "failed"
            finally:
                request.work = None
                request.previews.clear()
