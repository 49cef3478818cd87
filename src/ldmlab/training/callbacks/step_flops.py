"""FLOPs of a run's steps, counted beside the run."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ldmlab import distributed


class StepFlops:
    """FLOPs of training on an image, from a program that counts a step without weights.

    The program reads {config, step} as JSON from stdin and prints a number. It runs in a process of its own, so that
    training neither waits for it nor shares its random state, and again when the cost of a step changes.
    """

    def __init__(self, program: Sequence[str], config: Mapping[str, Any]) -> None:
        self.program, self.config = program, config
        self._phase: tuple[Any, ...] | None = None  # of the step that is or was counted
        self._process: subprocess.Popen[str] | None = None
        self._counted: float | None = None

    def of(self, stage: Any) -> float | None:
        """For the stage's running step; None as long as it is not known."""
        if stage.phase != self._phase:
            self.close()
            self._phase, self._counted = stage.phase, None
            self._start(stage.step)
        if self._process is not None and self._process.poll() is not None:
            self._read(self._process)
        return self._counted

    def _start(self, step: int) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self.program, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )  # a session of its own: Ctrl-C is for the run
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as file:  # it ended at once; the reason is in its output
            json.dump({"config": self.config, "step": step}, file)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as file:
            last = (file.read().strip() or "no output").splitlines()[-1]
        self._process = None
        if process.returncode == 0:
            self._counted = float(last)
        else:
            distributed.say(f"speed/tflops_per_device is not logged, since this step cannot be counted: {last[:300]}")

    def close(self) -> None:
        """End the process, if it still runs."""
        if self._process is not None:
            assert self._process.stdout is not None
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._process = None
