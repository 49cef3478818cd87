"""The sweepers of train.py: every combination of listed values, or a search with Optuna; each names its best run.

Hydra takes sweepers only from the package hydra_plugins, and imports this file at every start: nothing heavy here.
"""

import shlex
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from ldmlab.app.compose import parse_override, quoted
from ldmlab.app.hydra_main import chooses_a_sweep
from ldmlab.errors import InputError

_SHOWN = 10  # of the best runs
Job = tuple[int, list[str]]  # number of a trial and its options


class GridSweeper(BasicSweeper):
    """Every combination of the listed values, as Hydra's own sweeper, and a summary."""

    def __init__(
        self,
        metric: str | None = None,
        direction: str | None = None,
        params: dict[str, str] | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.metric, self.direction = metric, direction

    def sweep(self, arguments: list[str]) -> None:
        """Launch the batches; InputError at the end when a run has failed."""
        items = [parse_override(word) for word in [*self._parse_config(), *arguments]]
        if interval := next((item for item in items if item.is_interval_sweep()), None):
            raise InputError(f"{interval.input_line}: an interval needs sweeper=optuna; or list its values.")
        self.check(items)
        outcomes = [job.return_value for batch in super().sweep(arguments) for job in batch]
        jobs = [[*words] for batch in self.overrides or [] for words in batch]
        values = [self.value(outcome) if isinstance(outcome, str) else None for outcome in outcomes]
        if len(jobs) > 1:
            self.summarise([(v, o, w) for v, o, w in zip(values, outcomes, jobs, strict=True) if v is not None])
        failures = [(w, o) for w, o in zip(jobs, outcomes, strict=True) if isinstance(o, InputError)]
        if len(jobs) == 1 and failures:
            raise failures[0][1]
        if failures:
            raise InputError(
                f"{len(failures)} of {len(jobs)} runs failed; {shlex.join(failures[0][0])}: {failures[0][1]}"
            )

    def check(self, items: Sequence[Any]) -> None:
        """Check all listed values, and derive the metric and its direction from the first run."""
        from ldmlab.app.commands.sweep_file import GOALS, check_options, checked_metric, goal_of, whole_number

        if self.direction not in (None, *GOALS):
            raise InputError(f"hydra.sweeper.direction={self.direction} is unknown; choose {' or '.join(GOALS)}.")
        whole_number("hydra.sweeper.max_batch_size", 1 if self.max_batch_size is None else self.max_batch_size, 1)
        config = self._composed(first := [_first(item) for item in items])
        if "Slurm" in config.hydra.launcher._target_ and not shutil.which("srun"):
            raise InputError(
                "launcher=slurm: srun is not found; start on a machine of a SLURM cluster, or leave it out."
            )
        self.runs = Path(config.paths.runs)
        if config.stage.name == "all":  # the latent spaces of its runs differ: `ldmlab report` compares them
            self.metric = None
            return
        self.metric = checked_metric(config, self.metric, "hydra.sweeper.metric=")
        self.direction = self.direction or goal_of(self.metric)
        check_options(config)
        for at, item in enumerate(items):  # a typo among the values is found now
            values = [*item.sweep_string_iterator()][1:] if item.is_choice_sweep() else []
            for value in [item.value().end] if item.is_interval_sweep() else values:
                check_options(self._composed([*first[:at], f"{item.key_or_group}={value}", *first[at + 1 :]]))

    def _composed(self, words: list[str]) -> Any:
        return self.hydra_context.config_loader.load_sweep_config(self.config, words)  # type: ignore

    def value(self, run: str) -> float | None:
        """The run's best value of the metric; None where it was never logged."""
        from ldmlab.app.commands.sweep_file import best_value

        return best_value(Path(run), self.metric, str(self.direction)) if self.metric else None

    def summarise(self, runs: list[tuple[float, str, list[str]]]) -> None:
        """The best runs, and the command that trains the best one longer."""
        from ldmlab import distributed

        shared = set.intersection(*({*words} for _, _, words in runs)) if runs else set()
        runs = sorted(runs, key=lambda run: run[0], reverse=self.direction == "maximize")
        for place, (value, run, words) in enumerate(runs[:_SHOWN]):
            own = shlex.join(word for word in words if word not in shared and not word.startswith("run.dir="))
            distributed.say(f"{'      ' if place else 'best: '}{self.metric} {value:.5g}  {run}  {own}")
        for _, run, words in runs[:1]:
            steps = yaml.safe_load((Path(run) / "config.yaml").read_text())["trainer"]["max_steps"]
            same = [w for w in words if not chooses_a_sweep(w) and not w.startswith(("run.dir=", "trainer.max_steps="))]
            command = shlex.join(["ldmlab", "train", *same, f"trainer.max_steps={2 * steps}", f"run.dir={quoted(run)}"])
            distributed.say(f"to train it for twice as many steps: {command}")


class OptunaSweeper(GridSweeper):
    """A search with Optuna; trial n is the run paths.runs/STUDY-n, where it is resumed."""

    def __init__(self, search: Any, **options: Any) -> None:
        super().__init__(**options)
        self.search, self.failures = search, list[str]()

    def sweep(self, arguments: list[str]) -> None:
        """Resume the unfinished trials of an earlier start, then sample new ones up to `n_trials`."""
        from ldmlab import distributed
        from ldmlab.app.commands.sweep_file import check_search

        items = [parse_override(word) for word in [*self._parse_config(), *arguments]]
        check_search(self.search)
        self.check(items)
        self.fixed = [item.input_line for item in items if not item.is_sweep_override()]
        if self.metric is None or any(word.startswith("run.dir=") for word in self.fixed):
            raise InputError("sweeper=optuna sets run.dir and takes a run of one stage; leave out run.dir, stage=all.")
        if distributed.world_size() > 1:
            distributed.join()  # each of torchrun's processes runs the sweep; only the first one uses the study
        distributed.shared(lambda: self._open([item for item in items if item.is_sweep_override()]))
        left: list[Job] = distributed.shared(self._unfinished)
        while left or (left := distributed.shared(self._ask)):
            batch, left = left[: self.search.n_jobs], left[self.search.n_jobs :]
            jobs = [words for _, words in batch]
            try:
                results = self.launcher.launch(jobs, initial_job_idx=batch[0][0])  # type: ignore[union-attr]
            except BaseException:
                distributed.say("the sweep has stopped; the same command continues it, unfinished trials first.")
                raise
            outcomes = [result.return_value for result in results]
            distributed.shared(partial(self._tell, batch, outcomes))
        distributed.shared(self._end)

    def _open(self, swept: list[Any]) -> None:
        """Create or load the study."""
        from hydra.utils import instantiate

        from ldmlab.app.commands.sweep_file import distribution
        from ldmlab.disks import open_regular

        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise InputError("sweeper=optuna needs optuna; install it: pip install 'ldmlab[cluster]'.") from error
        if not swept:
            raise InputError("sweeper=optuna needs an option with an interval or values, such as seed=0,1,2.")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = {item.key_or_group: distribution(item) for item in swept}
        name, place = self.search.study, str(self.search.storage)
        goal: Any = self.direction
        try:
            instantiate(self.search.sampler, seed=self.search.seed)
        except Exception as error:
            raise InputError(f"hydra.sweeper.search.sampler: {_reason(error)}; name a sampler of Optuna.") from error
        try:
            if "://" not in place:
                Path(place).parent.mkdir(parents=True, exist_ok=True)
                if Path(place).exists():
                    open_regular(Path(place)).close()  # a pipe would block
            storage = place if "://" in place else optuna.storages.JournalStorage(JournalFileBackend(place))
            self.study = optuna.create_study(storage=storage, study_name=name, direction=goal, load_if_exists=True)
        except Exception as error:  # of any class: a file's or a database's
            raise InputError(
                f"hydra.sweeper.search.storage={place} cannot hold the study ({_reason(error)}); name another place."
            ) from error
        self._check_same(swept)

    def _check_same(self, swept: list[Any]) -> None:
        """InputError if the study's trials had other options, which it keeps."""
        now = [*(word for word in self.fixed if not chooses_a_sweep(word)), *(item.input_line for item in swept)]
        now = sorted([*now, f"metric={self.metric}", f"direction={self.direction}"])
        before = self.study.user_attrs.get("options", now)
        if changed := sorted({*before} ^ {*now}):
            raise InputError(
                f"the study {self.search.study} was started with other options ({changed[0]}); set "
                "hydra.sweeper.search.study=NAME."
            )
        self.study.set_user_attr("options", now)

    def _job(self, number: int, params: dict[str, Any]) -> Job:
        return number, [
            *self.fixed,
            *(f"{k}={v}" for k, v in params.items()),
            f"run.dir={quoted(self._folder(number))}",
        ]

    def _folder(self, number: int) -> str:
        return str(self.runs / f"{self.search.study}-{number:04d}")

    def _unfinished(self) -> list[Job]:
        """Trials without a value whose folders are not locked; the value of a finished run is recorded."""
        from ldmlab.disks import FileLock
        from ldmlab.training.run_folder import FINISHED

        left = []
        for trial in self.study.trials:
            job, folder = self._job(trial.number, trial.params), Path(self._folder(trial.number))
            lock = FileLock(folder / ".lock")
            if trial.state.is_finished():
                continue
            if (folder / FINISHED).exists():
                self._tell([job], [str(folder)])
            elif not folder.exists() or lock.take():
                lock.release()
                left.append(job)
        return left

    def _ask(self) -> list[Job]:
        """The next trials; the sampler's seed depends on the trial, so a resumed sweep has the same trials."""
        from hydra.utils import instantiate

        jobs = []
        for number in range(len(self.study.trials), self.search.n_trials)[: self.search.n_jobs]:
            self.study.sampler = instantiate(self.search.sampler, seed=self.search.seed + number)
            trial = self.study.ask(self.space)
            jobs.append(self._job(trial.number, trial.params))
        return jobs

    def _tell(self, batch: list[Job], outcomes: list[Any]) -> None:
        """Record the value of each trial in the study; a failed one has none."""
        from optuna.trial import TrialState

        for (number, _), outcome in zip(batch, outcomes, strict=True):
            value = self.value(outcome) if isinstance(outcome, str) else None
            if value is None:
                why = f"{outcome} logged no {self.metric}" if isinstance(outcome, str) else str(outcome)
                self.failures.append(f"trial {number} failed: {why}")
                print(self.failures[-1], flush=True)
            self.study.tell(number, value, state=TrialState.FAIL if value is None else None)
        if len(self.failures) > self.search.max_failures:
            raise InputError(f"{len(self.failures)} trials failed, so the sweep stops; {self.failures[-1]}")

    def _end(self) -> None:
        done = [(t.value, t) for t in self.study.trials if t.value is not None]
        self.summarise([(value, self._folder(t.number), self._job(t.number, t.params)[1]) for value, t in done])
        if not done:
            why = [*self.failures, "all failed earlier, so name a new one: hydra.sweeper.search.study=NAME"][0]
            raise InputError(f"no trial of the study {self.search.study} has a value; {why.rstrip('.')}.")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")


def _first(item: Any) -> str:
    """An override with its first value."""
    if not item.is_sweep_override():
        return str(item.input_line)
    return (
        f"{item.key_or_group}={item.value().start if item.is_interval_sweep() else next(item.sweep_string_iterator())}"
    )
