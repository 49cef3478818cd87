"""Faults of jobs of two processes: one of them, or both, killed, stopped, or left alone.

The processes are forked with the variables that torchrun gives them. Where its agent is played too, a process that ends
badly makes it end the other, with SIGTERM first and SIGKILL half a minute later.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from faults.base import COMMANDS, PAIR, digest
from faults.cases import GOOD, Case, last_lines
from faults.commands import Beside, Result
from faults.job_faults import any_moment, table_rows

_PATIENCE = 400.0  # s; a process that is left alone at the start waits for the others for five minutes
_BEHIND = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGSTOP, signal.SIGSEGV)
_BOTH = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def environments(world: int = 2) -> list[dict[str, str]]:
    """What torchrun sets for each process of one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def training(case: Case) -> None:
    """A training of two processes loses one, or both; then it goes on, bit for bit the one without the fault."""
    case.copy("packed", "latents")
    run = case.work / "denoiser"
    moment, when = any_moment(case.rng, run, case.base.results["pair"].seconds)
    beside, what, gentle = _fault(case, moment)
    case.outcome.planted = f"{what} {when}"
    results = case.run_group(PAIR, environments(), beside=beside, seconds=_PATIENCE)
    _judge_ends(case, results, gentle)
    if case.outcome.how not in GOOD:
        return
    again = case.run_group(PAIR, environments(), seconds=120.0)
    if case.outcome.how not in GOOD:
        return
    if bad := next((result for result in again if result.code != 0), None):
        case.set("silent", f"does not go on: {bad.sentence or last_lines(bad)}")
    elif digest("denoiser", case.work) != case.base.digests["pair"]:
        case.set("silent", "the last checkpoint differs from that of the run without faults")
    elif table_rows(run) != table_rows(case.base.root.parent / "pair" / "denoiser"):
        case.set("silent", "metrics.csv has other rows than that of the run without faults")


def other_commands(case: Case) -> None:
    """An evaluation, a sampling or an encoding of two processes loses one; one process alone then does it whole."""
    name = case.rng.choice(("evaluate", "sample", "encode"))
    needs = {"evaluate": ["packed", "first_stage", "clip"], "sample": ["model"], "encode": ["packed", "first_stage"]}
    case.copy(*needs[name])
    end = time.monotonic() + case.rng.uniform(0, 1.2 * case.base.results[name].seconds)
    beside, what, gentle = _fault(case, lambda: time.monotonic() > end)
    case.outcome.planted = f"{name}, {what}"
    results = case.run_group(COMMANDS[name], environments(), beside=beside, seconds=_PATIENCE)
    _judge_ends(case, results, gentle)
    if case.outcome.how not in GOOD or all(result.code == 0 for result in results):
        return
    again = case.run(COMMANDS[name])
    if name == "sample" and "samples holds files already" in again.sentence:  # images are never mixed with other ones
        case.set("named", again.sentence)
        return
    finished = name == "evaluate" and "already holds an evaluation" in again.sentence  # before the fault
    if finished and digest(name, case.work) == case.base.digests[name]:
        case.set("named", again.sentence)
        return
    if case.outcome.how in GOOD and again.code != 0:
        case.set("silent", f"cannot be run again: {again.sentence or last_lines(again)}")
    elif case.outcome.how in GOOD and digest(name, case.work) != case.base.digests[name]:
        case.set("silent", "run again, it ends with another result")


def _fault(case: Case, moment: Callable[[], bool]) -> tuple[Beside, str, bool]:
    """What happens to the processes, in words, and whether both may end of themselves."""
    rng = case.rng
    if rng.random() < 0.25:
        number = rng.choice(_BOTH)
        return _at(moment, lambda pids: _send(pids, number)), f"{number.name} to both", number is not signal.SIGKILL
    victim, number = rng.randrange(2), rng.choice(_BEHIND)
    seconds = rng.choice((0.5, 3.0, 35.0)) if number is signal.SIGSTOP else 0.0
    agent = number is not signal.SIGSTOP and rng.random() < 0.5

    def hurt(pids: list[int]) -> None:
        _send([pids[victim]], number)
        if number is signal.SIGSTOP:
            time.sleep(seconds)
            _send([pids[victim]], signal.SIGCONT)
        elif agent:
            time.sleep(0.1)
            _send([pids[1 - victim]], signal.SIGTERM)
            time.sleep(30)
            _send([pids[1 - victim]], signal.SIGKILL)

    how = f" for {seconds} s" if seconds else ", torchrun ends the other" if agent else ""
    return _at(moment, hurt), f"{number.name} to process {victim}{how}", False


def _at(moment: Callable[[], bool], act: Callable[[list[int]], None]) -> Beside:
    def beside(pids: list[int]) -> None:
        while not moment():
            if not any(_running(pid) for pid in pids):
                return
            time.sleep(0.001)
        act(pids)

    return beside


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _judge_ends(case: Case, results: list[Result], gentle: bool) -> None:
    """A process that failed of itself says one sentence; one ended by a signal, or that saved and left, needs none."""
    for rank, result in enumerate(results):
        if result.code is None or result.code <= 0 or result.code in (128 + signal.SIGTERM, 128 + signal.SIGUSR1, 130):
            continue
        if not result.sentence:
            case.set("traceback", f"process {rank} ended with {result.code}: {last_lines(result)}")
        elif gentle:
            case.set("silent", f"both were asked to stop, but process {rank} failed: {result.sentence}")
        else:
            case.set("named", result.sentence)


KINDS = {"jobs: two processes": training, "jobs: two processes, other commands": other_commands}
