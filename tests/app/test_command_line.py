"""Each kind of slip on a command line of Hydra's is one sentence that names the option in full and the way out."""

import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ldmlab.app import cli
from ldmlab.app.compose import compose, group_choices, groups, plain, searching
from ldmlab.app.wiring import train
from ldmlab.instantiate import instantiate
from ldmlab.training.checkpointing import Checkpoints
from ldmlab.training.fit import explained
from refusals import refusal

ROOT = Path(__file__).parents[2]
RUN = ["experiment=mine/clip", "data.train=/nowhere", "data.val=/nowhere"]


def start(*words: str) -> None:
    train(plain(compose("train", [*RUN, "paths.runs=/nowhere/runs", *words])))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=null"], "seed=null does not fit; give a whole number."),
        (["seed=1.5"], "seed=1.5 does not fit; give a whole number."),
        (["seed=1e3"], "give seed=1000."),
        (["seed=abc"], "seed=abc does not fit"),
        (["seed=true"], "seed=true does not fit"),
        (["seed=[1]"], "seed=[1] does not fit"),
        (["seed='3'"], "seed=3 is text; give a whole number, without quotes: seed=3."),
        (["seed="], "seed= has no value; write seed=VALUE"),
        (["run.name=1e3"], "'run.name=\"1000.0\"'"),
        (["run.name=7"], "'run.name=\"7\"'"),
        (["run.name=null"], "run.name=null is not text"),
        (["run.name=[a]"], "run.name=['a'] is not text"),
        (["init_from=12"], "'init_from=\"12\"'"),
        (["trainer.max_steps=4.5"], "trainer.max_steps=4.5 does not fit; give a whole number."),
        (["trainer.max_steps=1e0"], "give trainer.max_steps=1."),
        (["trainer.max_steps=null"], "trainer.max_steps=null does not fit"),
        (["trainer.max_steps=many"], "trainer.max_steps=many does not fit"),
        (["trainer.max_steps="], "trainer.max_steps= has no value"),
        (["trainer.gradient_clip=nan"], "trainer.gradient_clip=nan is not finite; give a number or null."),
        (
            ["trainer.precision=16"],
            "trainer.precision=16 does not fit; give auto or bf16-mixed or 16-mixed or 32-true or",
        ),
        (["trainer.compile=1"], "trainer.compile=1 does not fit; give true or false or auto or cuda_graphs."),
        (["optimizer.learning_rate=nan"], "optimizer.learning_rate=nan is not finite"),
        (["optimizer.learning_rate=inf"], "optimizer.learning_rate=inf is not finite"),
        (["optimizer.learning_rate=-inf"], "optimizer.learning_rate=-inf is not finite"),
        (["optimizer.learning_rate='1e-4'"], "optimizer.learning_rate=1e-4 is text"),
        (["optimizer.learning_rate=true"], "optimizer.learning_rate=true does not fit"),
        (["optimizer.betas=[0.9]"], "a list of 2"),
        (["optimizer.betas=0.9"], "a list of 2"),
        (["optimizer.betas=[0.9,a]"], "a list of 2"),
        (["optimizer.betas=[0.9,nan]"], "optimizer.betas"),
        (["optimizer.weight_decay=nan"], "optimizer.weight_decay=nan is not finite"),
        (["data.workers=null"], "data.workers=null does not fit"),
        (["data.workers=two"], "data.workers=two does not fit"),
        (["data.image_size=a"], "data.image_size=a does not fit"),
        (["data.fields=caption"], "data.fields=caption does not fit; give a list of texts."),
        (["data.flip=no"], "data.flip=no does not fit; give true or false."),
        (["callbacks.throughput.window=2.5"], "callbacks.throughput.window=2.5 does not fit"),
        (["lr_schedule=cosine", "lr_schedule.warmup_steps=1.5"], "lr_schedule.warmup_steps=1.5 does not fit"),
        (["sampler=3"], "sampler=3: there is no such file in conf/sampler/"),
        (["sampler=[1,2]"], "sampler=1: there is no such file in conf/sampler/"),
        (["sampler={_target_: os.getcwd}"], "a group takes the name of a file"),
        (["trainer=true"], "trainer=true: there is no such file in conf/trainer/"),
        (["+experiment=2"], "experiment=2: there is no such file in conf/experiment/"),
        (["+trainer.max_steps=3"], "+trainer.max_steps: the option exists already"),
        (["trainer.strategy=dp"], "trainer.strategy=dp is unknown; choose auto or ddp or fsdp or hsdp."),
        (["stage.panel_steps=3"], "stage.panel_steps: there is no such option"),
        (["data.train=/x/with=equals"], "write 'data.train=\"/x/with=equals\"'"),
        (
            ["data.train=/x/a,b"],
            "start them with --multirun; one value with a comma is written 'data.train=\"/x/a,b\"'",
        ),
        (["data.train=/x/(a)"], "'data.train=\"/x/(a)\"'"),
        (["data.train=/x/[a"], "'data.train=\"/x/[a\"'"),
        (["data.train=/x/{a"], "'data.train=\"/x/{a\"'"),
        (["data.train=/x/#1"], "data.train"),
        (["data.train=/x/it's"], "data.train=/x/it's cannot be parsed"),
        (["max_steps"], "max_steps is no option; write options as key=value."),
        (["plugins=5"], "plugins=5 does not fit"),
        (["plugins=[no_such_package_here]"], "plugins=no_such_package_here is not installed"),
        (["plugins=[a b]"], "plugins=a b is no package's name"),
    ],
)
def test_one_sentence(words: list[str], expected: str) -> None:
    sentence = refusal(lambda: start(*words))
    assert expected in sentence
    key = words[-1].partition("=")[0].lstrip("+")
    assert f"did you mean {key}?" not in sentence
    assert "Hydra" not in sentence


def test_packages_of_the_variable_are_looked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMLAB_PLUGINS", "json,no_such_package_here")
    for words in (["train"], ["sample", "nowhere", "1"]):
        assert "LDMLAB_PLUGINS=no_such_package_here is not installed" in refusal(lambda: cli.dispatch(words))  # noqa: B023


@pytest.mark.parametrize(
    "path", ["/x/a=b", "/x/a,b", "/x/(a)", "/x/[a]", "/x/{a}", "/x/a#b", "/x/it's", '/x/"a"', "/x/ a"]
)
def test_the_quoted_form_works(path: str) -> None:
    """What the sentence proposes, typed into a shell, is the path that was meant."""
    try:
        assert compose("train", [f"data.train={path}"]).data.train == path
    except Exception as error:
        word = shlex.split(str(error).rpartition("writ")[2].partition(" ")[2].removesuffix("."))[0]
        assert compose("train", [word]).data.train == path


@pytest.mark.parametrize(
    "word",
    [
        *("betas=[2,3]", "betas=[0.9,1]", "betas=[-0.1,0.9]", "epsilon=0", "epsilon=-1e-8", "weight_decay=-1"),
        *("learning_rate=0", "learning_rate=-1"),
    ],
)
def test_optimizers_know_their_ranges(word: str) -> None:
    node = plain(compose("train", [*RUN, f"optimizer.{word}"]))["optimizer"]
    assert f"optimizer.{word.partition('=')[0]}=" in refusal(lambda: instantiate(node, where="optimizer"))


def test_a_missing_option_is_named_in_full() -> None:
    sentence = refusal(lambda: plain(compose("train", ["experiment=mine/first_stage"])))
    assert sentence == "data.train has no value; give it on the command line as data.train=VALUE."
    assert refusal(lambda: plain(compose("evaluate", []))).startswith("model has no value")
    assert refusal(lambda: plain(compose("encode", []))).startswith("from_run has no value")
    assert refusal(lambda: compose("encode", ["from_run=null", "out=x"])).startswith("from_run has no value")
    assert refusal(lambda: compose("encode", ["from_run=x", "out=null"])).startswith("out has no value")
    assert refusal(lambda: compose("evaluate", ["model=null"])).startswith("model has no value")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=3"], "'model=\"3\"'"),
        (["model=x", "batch_size=null"], "batch_size=null"),
        (["model=x", "batch_size=2.5"], "batch_size=2.5"),
        (["model=x", "precision=float16"], "give float32 or bfloat16"),
        (["model=x", "weights=best"], "give averaged or raw"),
        (["model=x", "guiders=3"], "guiders=3: there is no such file in conf/guiders/"),
        (["model=x", "protocol=paper_ffh"], "did you mean paper_ffhq?"),
        (["model=x", "images=5"], "images=5"),
        (["model=x", "wandb=maybe"], "wandb=maybe"),
    ],
)
def test_evaluation_likewise(words: list[str], expected: str) -> None:
    assert expected in refusal(lambda: plain(compose("evaluate", words)))


def test_a_flag_of_another_program() -> None:
    command = [sys.executable, "train.py", "--max-steps", "5"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == (
        "ldmlab: --max-steps: there is no such flag; options are written key=value, such as max_steps=VALUE.\n"
    )


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "my conf, v=1"
    (folder / "backbone").mkdir(parents=True)
    (folder / "trainer").mkdir()
    (folder / "backbone" / "mine.yaml").write_text("defaults: [unet_small]\nmodel_channels: 32\n")
    (folder / "trainer" / "short.yaml").write_text("defaults: [default]\nmax_steps: 7\n")
    return folder


def test_a_folder_of_ones_own_is_searched(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in refusal(lambda: compose("train", ["backbone=mine"]))
    assert cli.dispatch(["config", "train", "--config-dir", str(own), "backbone=mine", "--only", "backbone.model"]) == 0
    out = capsys.readouterr().out
    assert "backbone.model_channels = 32" in out
    assert str(own / "backbone" / "mine.yaml") in out
    with searching(["--config-dir", str(own)]):
        assert "mine" in group_choices("backbone")
        assert "did you mean mine?" in refusal(lambda: compose("train", ["backbone=mine_"]))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("more: [1, 2\n", "expected ',' or ']'"),
        ("\tmore: 1\n", "cannot start any token"),
        ("width: 1\nwidth: 2\n", "duplicate key width"),
        ("more: !!python/name:os.system\n", "could not determine a constructor"),
        ("more: \0\n", "special characters are not allowed"),
        ("[" * 5000, "the configuration file backbone/bad cannot be used: it nests too deeply"),
        ("defaults: [3]\n", "Unsupported type in defaults"),
        ("defaults: 3\n", "defaults must be a list"),
        ("defaults: [bad]\n", "cannot be used: it nests too deeply, or is among its own defaults."),
        ("defaults: [nothing_there]\n", "backbone=nothing_there: there is no such file"),
        ("defaults: [{override /nothing: x}]\n", "nothing: there is no such option"),
        ("more: ${nothing:3}\n", "Unsupported interpolation type nothing"),
        ("more: ${oc.env:NOT_SET_ANYWHERE}\n", "NOT_SET_ANYWHERE"),
        ("more: ${nothing.there}\n", "backbone.more"),
    ],
)
def test_a_file_of_ones_own_with_a_fault_is_refused(own: Path, text: str, reason: str) -> None:
    (own / "backbone" / "bad.yaml").write_text(text)
    with searching(["--config-dir", str(own)]):
        sentence = refusal(lambda: plain(compose("train", ["backbone=bad", "run.name=x", "trainer.max_steps=1"])))
    assert reason in sentence
    assert "\n" not in sentence


@pytest.mark.slow
def test_a_folder_of_ones_own_belongs_to_its_command(own: Path) -> None:
    assert cli.dispatch(["config", "train", "--config-dir", str(own), "backbone=mine", "--only", "seed"]) == 0
    assert compose("train", [f'hydra.searchpath=["{own}"]', "trainer=short"]).trainer.max_steps == 7
    shutil.rmtree(own)
    assert compose("train", []).trainer.max_steps != 7
    assert "mine" not in group_choices("backbone")
    assert cli.dispatch(["config", "train", "--only", "seed"]) == 0


@pytest.mark.parametrize("entry", ["file://{}", "{}"])
def test_hydras_searchpath_is_understood(own: Path, entry: str) -> None:
    word = f'hydra.searchpath=["{entry.format(own)}"]'
    assert compose("train", [word, "backbone=mine", "trainer=short"]).trainer.max_steps == 7
    assert "backbone" in groups()


@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir", "/no/such/folder"],
        ["--config-dir=/no/such/folder"],
        ["--config-dir"],
        ["hydra.searchpath=[pkg://no_such_package.conf]"],
        ["hydra.searchpath=[file:///no/such/folder]"],
        ["hydra.searchpath=[nowhere]"],
    ],
)
def test_a_search_path_that_is_not_there(words: list[str]) -> None:
    refusal(lambda: searching(words).__enter__())


def test_train_py_takes_a_folder_of_ones_own(own: Path) -> None:
    command = [sys.executable, "train.py", "--config-dir", str(own), "backbone=mine", "--cfg", "job"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "model_channels: 32" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_the_verbs_are_the_programs(verb: str) -> None:
    words = ["--cfg", "job", "seed=5"]
    both = [[sys.executable, f"{verb}.py", *words], [sys.executable, "-m", "ldmlab", verb, *words]]
    results = [subprocess.run(c, cwd=ROOT, capture_output=True, text=True, check=False) for c in both]
    assert results[0].returncode == 0, results[0].stderr
    assert results[0].stdout == results[1].stdout
    assert "seed: 5" in results[0].stdout


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "memory ran out (MemoryError); use a smaller batch size, or smaller images."),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
            "memory ran out ([enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: "
            "you tried); use a smaller batch size, or smaller images.",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "a loader process ended (DataLoader worker (pid 7) is killed by signal: Killed); run the command again, "
            "with fewer workers if memory ran out.",
        ),
        (
            BrokenProcessPool("A process in the process pool was terminated abruptly."),
            "a loader process ended (A process in the process pool was terminated abruptly); run the command again, "
            "with fewer workers if memory ran out.",
        ),
    ],
)
def test_faults_of_the_machine_are_sentences(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command(raises(error)) == 2
    assert capsys.readouterr().err == f"ldmlab: {sentence}\n"


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_loader_that_dies_while_it_hands_over_a_batch_is_a_sentence(
    how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch names no process then, and the connection to it breaks; other broken connections stay what they are."""
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    if how == "reset":
        monkeypatch.setattr(Connection, "_recv", raises(ConnectionResetError(104, "Connection reset by peer")))
    assert cli.run_command(ours.recv) == 2
    assert "a loader process ended (it was killed or has exited: " in capsys.readouterr().err
    with pytest.raises(ConnectionResetError):
        cli.run_command(raises(ConnectionResetError(104, "Connection reset by peer")))


class Faulty(torch.utils.data.Dataset[int]):
    """Somebody's data set: its bug is hers to see."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: int) -> int:
        raise self.error

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ConnectionResetError(104, "Connection reset")])
def test_an_error_that_a_loader_process_passes_on_is_not_its_end(
    error: Exception, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(type(error), match=error.args[-1]) as caught:
        cli.run_command(lambda: len(list(DataLoader(Faulty(error), num_workers=1))))
    assert not capsys.readouterr().err
    assert explained(caught.value, Checkpoints(tmp_path)) is None


def raises(error: Exception) -> Callable[..., int]:
    """A function that ends so."""

    def function(*_: Any, **__: Any) -> int:
        raise error

    return function


@pytest.mark.parametrize(
    ("variable", "way_out"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "start with torchrun or srun"),
        ({"OMP_NUM_THREADS": "x"}, "give a number of threads, or unset it"),
        ({"OMP_NUM_THREADS": "0"}, "give a number of threads, or unset it"),
        ({"OMP_NUM_THREADS": "99999999999"}, "give a number of threads, or unset it"),
        ({"OMP_NUM_THREADS": "4,0"}, "give a number of threads, or unset it"),
        ({"MKL_NUM_THREADS": "2.5"}, "give a number of threads, or unset it"),
    ],
)
def test_a_variable_that_is_no_number_is_named_before_a_library_reads_it(variable, way_out) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ldmlab", "train", "experiment=demo/cpu_first_stage"],
        env={**os.environ, **variable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    (name, value), *_ = variable.items()
    sentence = f"ldmlab: the environment variable {name}={value} is no number; {way_out}."
    assert result.stderr.splitlines()[-1] == sentence


@pytest.mark.slow
def test_a_fault_of_the_disk_while_a_run_starts_is_one_sentence(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ldmlab", "train", "experiment=demo/cpu_first_stage", f"run.dir={'x' * 300}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    *before, last = result.stderr.splitlines()
    assert re.fullmatch(r"ldmlab: File name too long \(x+/provenance\.json\); choose another path\.", last)
    assert not any("Traceback" in line for line in before), before


def test_a_part_that_no_memory_can_hold_is_named_with_its_size() -> None:
    node = {"_target_": "ldmlab.conditioners.class_label.ClassEmbedder", "classes": 10**12, "width": 512}
    sentence = refusal(lambda: instantiate(node, where="conditioner.x", trust=True))
    assert sentence == (
        "conditioner.x.classes=1000000000000: there is no memory for a part of this size; choose a smaller one."
    )


def test_an_option_cannot_be_left_out() -> None:
    sentence = refusal(lambda: compose("train", ["~seed"]))
    assert sentence == "~seed: only a group or its entry can be left out (~logger); give seed=VALUE."
    assert "panels" not in compose("train", ["~callbacks.panels"]).callbacks


def test_any_other_fault_keeps_its_traceback() -> None:
    def command() -> int:
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.run_command(command)
