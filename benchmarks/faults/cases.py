"""One planted fault: its folder, the commands run on it, and how their end is judged."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from faults.base import Base, digest, said
from faults.commands import Beside, Limits, Result, run_group

GOOD = ("harmless", "named", "said")


@dataclass
class Outcome:
    """What came of a fault; `how` is one of GOOD, or silent, traceback, hang, ran, outside."""

    kind: str
    number: int
    planted: str
    how: str = "harmless"
    detail: str = ""
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """For the log."""
        return asdict(self)


class Case:
    """A folder for one fault: `work`, where commands run; beside it `outside`, which nothing may touch."""

    def __init__(self, base: Base, folder: Path, rng: random.Random, kind: str, number: int) -> None:
        self.base, self.folder, self.rng = base, folder, rng
        self.work, self.outside, self.canary = folder / "work", folder / "outside", folder / "canary"
        self.outcome = Outcome(kind, number, "")
        self._runs = 0
        self.work.mkdir(parents=True)
        self.outside.mkdir()
        (self.outside / "kept.txt").write_text("kept")
        self._programs()

    def _programs(self) -> None:
        """A stand-in for Ghostscript that leaves a canary."""
        programs = self.folder / "bin"
        programs.mkdir()
        for name in ("gs", "gswin32c", "gswin64c"):
            (programs / name).write_text(f"#!/bin/sh\ntouch {self.canary}\nexit 1\n")
            (programs / name).chmod(0o755)

    def copy(self, *names: str) -> None:
        """Folders of the flow without faults, into `work`."""
        self.base.copy(list(names), self.work)

    def run(self, argv: list[str], *, beside: Beside | None = None, **limits: Any) -> Result:
        """A command in `work`; tracebacks, hangs, code that ran and files outside are noted."""
        return self.run_group(argv, [limits.pop("environment", {})], beside=beside, **limits)[0]

    def run_group(
        self, argv: list[str], environments: list[dict[str, str]], *, beside: Beside | None = None, **limits: Any
    ) -> list[Result]:
        """The same command in a process for each environment, noted likewise."""
        path = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        self._runs += 1
        each = [Limits(environment={**path, **environment}, **limits) for environment in environments]
        results = run_group(argv, self.work, each, f"run{self._runs}", beside)
        self.outcome.seconds += max(result.seconds for result in results)
        for result in results:
            self._note(result)
        return results

    def _note(self, result: Result) -> None:
        command = result.argv[0]
        if self.canary.exists():
            self.set("ran", f"{command} ran code")
        elif self._touched():
            self.set("outside", f"{command} wrote {self._touched()}")
        elif result.code is None:
            self.set("hang", f"{command} ran for {result.seconds:.0f} s")
        elif result.traceback:
            self.set("traceback", f"{command}: {last_lines(result)}")

    def _touched(self) -> list[str]:
        usual = {"work", "outside", "bin", "canary"}
        more = [p.name for p in self.folder.iterdir() if p.name not in usual and not p.name.startswith("run")]
        inside = [p.name for p in self.outside.iterdir() if p.name != "kept.txt"]
        changed = [] if (self.outside / "kept.txt").read_text() == "kept" else ["kept.txt"]
        return more + inside + changed

    def set(self, how: str, detail: str = "") -> None:
        """The worst of what happened stays."""
        order = ["harmless", "said", "named", "silent", "traceback", "hang", "outside", "ran"]
        if order.index(how) > order.index(self.outcome.how):
            self.outcome.how, self.outcome.detail = how, detail[:600]

    def classify(self, result: Result, name: str, *, same: Callable[[], bool] | None = None) -> None:
        """A command of the flow (`name`) after a fault: refused in a sentence, said, without effect, or silent."""
        if self.outcome.how not in GOOD:
            return
        if result.code != 0:
            if result.sentence:
                self.set("named", result.sentence)
            else:
                self.set("traceback", f"{result.argv[0]} ended with {result.code}: {last_lines(result)}")
            return
        lines = said(result, self.base.results[name])
        if lines:
            self.set("said", lines[0])
            return
        try:
            equal = digest(name, self.work) == self.base.digests[name] if same is None else same()
        except Exception as error:  # what was made cannot be read
            equal = False
            self.outcome.detail = repr(error)[:300]
        if not equal:
            self.set("silent", f"{name}: another result than without the fault, and not a word")

    def close(self, keep: bool) -> Outcome:
        """Remove the folder, unless the outcome is bad and is to be looked at."""
        if not (keep and self.outcome.how not in GOOD):
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.outcome


def last_lines(result: Result) -> str:
    """The end of what a failed command printed."""
    return " | ".join(line.strip() for line in result.err.strip().splitlines()[-2:])[-500:]
