"""A stand-in for SLURM on one machine, behind the names of its commands: sbatch, srun, scontrol, sacct, scancel.

Nodes are loopback addresses. A job is a controller process of its own: it runs the batch script with SLURM's
variables, delivers signals to the tasks of srun (each is a session, as slurmstepd starts them), and requeues. What a
scheduler decides is asked for by a further command: `preempt`, `time_limit` or `node_fail` JOB.

As in SLURM: unknown options are refused; the command line overrides #SBATCH lines; `--signal` without B: reaches the
tasks only; a job that ends by its time limit is not requeued by itself, a preempted one is, if --requeue was given;
`scontrol requeue` ends the job at once, the batch script included.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

ROOT = Path(os.environ["SLURM_STAND_IN"])
KILL_WAIT = float(os.environ.get("SLURM_STAND_IN_KILL_WAIT", "60"))  # seconds from SIGTERM to SIGKILL
_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
_SIGNAL = re.compile(r"(?P<batch>B:)?(?P<name>[A-Z0-9]+)@(?P<seconds>\d+)")


def options_of_a_job(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    for name in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "gpus-per-task"):
        parser.add_argument(f"--{name}", type=int)
    for name in (
        "job-name",
        "output",
        "error",
        "array",
        "time",
        "signal",
        "open-mode",
        "partition",
        "account",
        "mem",
        "wckey",
    ):
        parser.add_argument(f"--{name}")
    for name in ("requeue", "exclusive", "parsable", "unbuffered", "wait"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--kill-on-bad-exit", nargs="?", const="1")
    return parser


def sbatch(words: list[str]) -> int:
    parser = options_of_a_job(argparse.ArgumentParser("sbatch", allow_abbrev=False))
    place = next(i for i, word in enumerate(words) if not word.startswith("-"))
    script, arguments = Path(words[place]), words[place + 1 :]
    head = takewhile(lambda line: line.startswith("#") or not line.strip(), script.read_text().splitlines())
    lines = [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")]
    written = [word for line in lines for word in shlex.split(line, comments=True)]
    options = vars(parser.parse_args([*written, *words[:place]]))
    if options["time"] and not _TIME.fullmatch(options["time"]):
        parser.error("Invalid --time specification")
    if options["signal"] and not _SIGNAL.fullmatch(options["signal"]):
        parser.error("Invalid --signal specification")
    first = random.randrange(100_000, 900_000)
    tasks = array_tasks(options["array"])
    for place, task in enumerate(tasks):
        job = {"id": str(first + place), "task": task, "array": str(first), "state": "PENDING", "restarts": 0}
        job |= {"options": options, "arguments": arguments, "folder": os.getcwd(), "name": script.name, "code": None}
        (ROOT / f"{job['id']}.steps").touch()
        shutil.copy(script, ROOT / f"{job['id']}.sh")  # SLURM keeps a copy too
        keep(job)
        log = open(ROOT / f"{job['id']}.controller", "w")  # noqa: SIM115  the controller's own
        subprocess.Popen(
            [sys.executable, __file__, "control", job["id"]],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    print(first if options["parsable"] else f"Submitted batch job {first}")
    return 0


def array_tasks(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    ranges = [part.split("-") for part in text.split("%")[0].split(",")]
    return [task for ends in ranges for task in range(int(ends[0]), int(ends[-1]) + 1)]


def keep(job: dict[str, Any]) -> None:
    part = ROOT / f".{job['id']}.{os.getpid()}"
    part.write_text(json.dumps(job))
    part.replace(ROOT / f"{job['id']}.json")


def read(name: str) -> dict[str, Any]:
    """The job of an id, `ARRAY_TASK` included."""
    if "_" in name:
        array, task = name.split("_")
        jobs = (json.loads(path.read_text()) for path in ROOT.glob("*.json"))
        return next(job for job in jobs if (job["array"], str(job["task"])) == (array, task))
    return dict(json.loads((ROOT / f"{name}.json").read_text()))


def named(pattern: str, job: dict[str, Any], rank: int = 0) -> str:
    """A file name with %j, %A, %a, %t and %x filled in."""
    values = {"j": job["id"], "A": job["array"], "a": str(job["task"]), "t": str(rank), "x": job["name"]}
    return re.sub(r"%([jAatx])", lambda match: values[match[1]], pattern)


def control(words: list[str]) -> int:
    """One job, until it ends for good."""
    limit = re.search(r"%(\d+)", read(words[0])["options"]["array"] or "")
    while limit and unfinished_before(read(words[0])) >= int(limit[1]):
        time.sleep(0.1)
    while run_once(job := read(words[0])):
        keep({**job, "state": "PENDING", "restarts": job["restarts"] + 1})
        time.sleep(0.5)
    return 0


def unfinished_before(job: dict[str, Any]) -> int:
    """Tasks of the same array with lower numbers that have not ended."""
    tasks = (json.loads(path.read_text()) for path in ROOT.glob("*.json"))
    tasks = [task for task in tasks if task["array"] == job["array"] and task["task"] < job["task"]]
    return sum(task["state"] in ("PENDING", "RUNNING", "REQUEUED") for task in tasks)


def run_once(job: dict[str, Any]) -> bool:
    """Run the batch script; whether the job goes back into the queue."""
    options, events = job["options"], ROOT / f"{job['id']}.event"
    events.unlink(missing_ok=True)
    (ROOT / f"{job['id']}.steps").write_text("")
    keep({**job, "state": "RUNNING"})
    output = Path(
        job["folder"], named(options["output"] or ("slurm-%A_%a.out" if options["array"] else "slurm-%j.out"), job)
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a" if options["open_mode"] == "append" else "w") as log:
        batch = subprocess.Popen(
            ["bash", str(ROOT / f"{job['id']}.sh"), *job["arguments"]],
            env=batch_variables(job), cwd=job["folder"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    ended, due = "", list[tuple[float, str]]()
    while batch.poll() is None:
        time.sleep(0.05)
        if events.exists() and (now := events.read_text()) != ended:
            ended, due = now, [(time.monotonic() + after, name) for after, name in signals_of(now, options)]
        while due and due[0][0] <= time.monotonic():
            send(job, batch.pid, due.pop(0)[1])
    end_all(job["id"])  # SLURM leaves no process of a job behind
    again = ended in ("requeue", "preempt", "node_fail") and (options["requeue"] or ended == "requeue")
    state = {"": "COMPLETED" if batch.returncode == 0 else "FAILED", "time_limit": "TIMEOUT"}.get(ended, "CANCELLED")
    keep({**job, "state": "REQUEUED" if again else state, "code": batch.returncode})
    return again


def signals_of(why: str, options: dict[str, Any]) -> list[tuple[float, str]]:
    """Seconds from now and what is sent then."""
    asked = _SIGNAL.fullmatch(options["signal"] or "")
    first = [(0.0, asked[0].partition("@")[0])] if why == "time_limit" and asked else []
    if why in ("node_fail", "requeue"):
        return [(0.0 if why == "node_fail" else 0.5, "KILL")]
    begin = KILL_WAIT if first else 0.0
    return [*first, (begin, "TERM"), (begin + KILL_WAIT, "KILL")]


def send(job: dict[str, Any], batch: int, name: str) -> None:
    """A signal to the tasks of srun, or to the batch script where the name begins with B:."""
    if name == "KILL":
        end_all(job["id"])
    elif name.startswith("B:"):
        os.kill(batch, signal.Signals[f"SIG{name[2:]}"])
    else:
        to_tasks(job, signal.Signals[f"SIG{name}"])


def end_all(job: str) -> None:
    """SIGKILL to every process with the job's number in its environment."""
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"\0SLURM_JOB_ID={job}\0".encode() in b"\0" + (place / "environ").read_bytes():
                os.kill(int(place.name), signal.SIGKILL)


def to_tasks(job: dict[str, Any], number: signal.Signals) -> None:
    for pid in (ROOT / f"{job['id']}.steps").read_text().split():
        with suppress(ProcessLookupError):
            os.killpg(int(pid), number)


def batch_variables(job: dict[str, Any]) -> dict[str, str]:
    options = job["options"]
    nodes = options["nodes"] or 1
    per_node = options["ntasks_per_node"] or (options["ntasks"] or nodes) // nodes
    names = ",".join(f"127.0.0.{1 + node}" for node in range(nodes))
    values = {
        "JOB_ID": job["id"], "JOB_NAME": options["job_name"] or job["name"], "JOB_NODELIST": names, "NODELIST": names,
        "NNODES": nodes, "JOB_NUM_NODES": nodes, "NODEID": 0, "PROCID": 0, "LOCALID": 0, "NTASKS": nodes * per_node,
        "TASKS_PER_NODE": f"{per_node}(x{nodes})", "SUBMIT_DIR": job["folder"],
        "NTASKS_PER_NODE": options["ntasks_per_node"], "CPUS_PER_TASK": options["cpus_per_task"],
        "GPUS_ON_NODE": options["gpus_per_node"], "GPUS_PER_NODE": options["gpus_per_node"],
        "RESTART_COUNT": job["restarts"] or None, "ARRAY_TASK_ID": job["task"],
        "ARRAY_JOB_ID": job["array"] if job["task"] is not None else None,
    }  # fmt: skip
    return os.environ | {f"SLURM_{name}": str(value) for name, value in values.items() if value is not None}


def srun(words: list[str]) -> int:
    """Start the tasks of a step and wait for all; the largest exit code."""
    parser = options_of_a_job(argparse.ArgumentParser("srun", allow_abbrev=False))
    place, values = 0, {"--output", "--error"}
    while words[place].startswith("-"):  # submitit writes `--output FILE`
        place += 2 if words[place] in values else 1
    options, command = parser.parse_args(words[:place]), words[place:]
    job = read(os.environ["SLURM_JOB_ID"])
    nodes = options.nodes or int(os.environ["SLURM_NNODES"])
    per_node = options.ntasks_per_node or int(os.environ.get("SLURM_NTASKS_PER_NODE", "0"))
    tasks = options.ntasks or (per_node * nodes if per_node else int(os.environ["SLURM_NTASKS"]))
    step = len([*ROOT.glob(f"{job['id']}.{job['restarts']}.step_*")])
    (ROOT / f"{job['id']}.{job['restarts']}.step_{step}").touch()
    names = os.environ["SLURM_JOB_NODELIST"].split(",")[:nodes]
    running = []
    for rank in range(tasks):
        node, local = divmod(rank, tasks // nodes)
        variables = {
            "PROCID": rank, "LOCALID": local, "NODEID": node, "NTASKS": tasks, "STEP_ID": step,
            "STEP_NUM_TASKS": tasks, "STEP_NODELIST": ",".join(names),
            "STEP_TASKS_PER_NODE": f"{tasks // nodes}(x{nodes})",
        }  # fmt: skip
        environment = os.environ | {f"SLURM_{name}": str(value) for name, value in variables.items()}
        files = [named(name, job, rank) if name else None for name in (options.output, options.error)]
        out = open(files[0], "a") if files[0] else None  # noqa: SIM115  the task's own
        error = open(files[1], "a") if files[1] else out  # noqa: SIM115
        running.append(
            subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=error, start_new_session=True
            )
        )
        with open(ROOT / f"{job['id']}.steps", "a") as steps:
            steps.write(f"{running[-1].pid}\n")
    while any(task.poll() is None for task in running):
        time.sleep(0.05)
        if options.kill_on_bad_exit == "1" and any(task.poll() for task in running):
            for task in running:
                with suppress(ProcessLookupError):
                    os.killpg(task.pid, signal.SIGTERM)
            options.kill_on_bad_exit = "0"
    codes = [task.wait() for task in running]
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(words[2].split(",")))
        return 0
    assert words[0] == "requeue"
    return event("requeue", words[1])


def event(what: str, name: str) -> int:
    """What happens to a running job from outside of it."""
    job = read(name)
    if job["state"] != "RUNNING":
        print(f"slurm_update error: Invalid job id specified: {name} is {job['state']}", file=sys.stderr)
        return 1
    (ROOT / f"{job['id']}.event").write_text(what)
    return 0


def sacct(words: list[str]) -> int:
    """`sacct -o JobID,State,NodeList --parsable2 -j ID ...`, as submitit asks."""
    asked = {words[place + 1] for place, word in enumerate(words) if word == "-j"}
    print("JobID|State|NodeList")
    for path in sorted(ROOT.glob("*.json")):
        job = json.loads(path.read_text())
        if {job["id"], job["array"]} & asked:
            name = job["id"] if job["task"] is None else f"{job['array']}_{job['task']}"
            print(f"{name}|{job['state']}|127.0.0.1")
    return 0


def main() -> int:
    name, *words = sys.argv[1:]
    if name in ("preempt", "time_limit", "node_fail", "scancel"):
        return event(name, words[-1])
    return {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "sacct": sacct, "control": control}[name](words)


if __name__ == "__main__":
    sys.exit(main())
