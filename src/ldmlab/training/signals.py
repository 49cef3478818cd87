"""Stop signals: the step is finished, a checkpoint saved, and the exit code identifies the signal."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch

from ldmlab import distributed

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_AGREE_EVERY_ON_GPU = 10  # steps between two questions to the other processes, each of which waits for the GPU


class StopRequest:
    """Context that notes the first signal; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

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

    def agreed(self, step: int, device: torch.device) -> bool:
        """Whether any process received a signal; all processes get the same answer at the same step."""
        if distributed.world_size() == 1:
            return self.signal is not None
        if device.type != "cpu" and step % _AGREE_EVERY_ON_GPU:
            return False
        flag = distributed.largest_(torch.tensor(self.signal or 0, device=device))
        self.signal = int(flag) or None
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells count."""
        return 128 + (self.signal or 0)
