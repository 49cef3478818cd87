"""Stop signals: the step is finished, a checkpoint saved, and the exit code identifies the signal."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import pytorch_lightning as pl
import torch

from ldmlab import distributed
from ldmlab.errors import InputError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_AGREE_EVERY_SECONDS = 5.0  # between two questions to the other processes, each of which waits for the device


class Interrupted(Exception):
    """A stop signal arrived and the state is saved."""


class StopRequest(pl.Callback):
    """Context that notes the first signal and saves before what else is due; a second Ctrl-C stops at once."""

    def __init__(self, save_every_minutes: float | None = None) -> None:
        self.signal: int | None = None
        self.stopping = False  # all processes know
        self.save_due = False  # by the clock of any process, agreed upon
        self._before: dict[int, Any] = {}
        self._interval = (save_every_minutes or float("inf")) * 60
        self._saved = self._agreed = time.monotonic()
        self._ask_at = self._agreed_step = 0  # steps of the next and the latest question

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.getsignal(number) for number in STOPPING}
        for number in STOPPING:
            signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.signal is None:
            self.signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """A signal may not wait for an evaluation: the state is saved before anything else that is due."""
        if not pl_module.step_complete:
            return
        self._agree(pl_module.step, pl_module.device)
        if self.stopping:
            trainer.checkpoint_callbacks[0].save(trainer, pl_module)  # type: ignore[attr-defined]

    def _agree(self, step: int, device: torch.device) -> None:
        """All processes get the same answers at the same step; on a GPU they ask every few seconds."""
        now = time.monotonic()
        due, number = now - self._saved >= self._interval, self.signal or 0
        if distributed.world_size() > 1:
            if step < self._ask_at:
                self.save_due = False
                return
            pace = (step - self._agreed_step) / max(now - self._agreed, 1e-3)  # steps a second
            ahead = 1 if device.type == "cpu" else max(int(pace * _AGREE_EVERY_SECONDS), 1)
            answer = torch.tensor([number, int(due), -ahead], device=device)
            number, due, negative = distributed.largest_(answer).tolist()
            self.signal = number or self.signal  # one may have arrived while this process waited for the others
            self._ask_at, self._agreed_step, self._agreed = step - negative, step, now
        self.stopping, self.save_due = bool(number), bool(due)
        if due:
            self._saved = now

    @property
    def interrupted(self) -> bool:
        """Whether training ended by a signal; several processes must have agreed on it."""
        return self.stopping or (self.signal is not None and distributed.world_size() == 1)

    def lost_workers(self, pl_module: Any, error: BaseException) -> bool:
        """Whether the fault is that loader workers died of the signal, between two complete steps."""
        fault = isinstance(error, Exception) and not isinstance(error, Interrupted | InputError)
        return fault and self.signal is not None and not pl_module.updating and not distributed.joined()

    def pass_on(self) -> None:
        """Call the handler that waited during training: submitit's puts the job into the queue again."""
        handler = self._before.get(self.signal or 0)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.signal, None)

    @property
    def exit_code(self) -> int:
        """As shells count."""
        return 128 + (self.signal or 0)
