"""A sweep checks its settings first, continues after a failure or a kill, and locks its folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from papermill import PapermillExecutionError, execute_notebook

from fade.cli import main
from fade.core import load_json

command = Path(sys.executable).with_name("fade")
parameters = 'x: int = 0\nwait: float = 0.5\nword: str = ""\nout: str = ""'
body = """from fade.tools.sweep import check_known
check_known(globals())
import time
from pathlib import Path
from fade.core import save_json
with open(Path(out) / 'starts', 'a') as f: f.write('x')
time.sleep(wait)
if x == 3: raise ValueError('three is one too many')
save_json(Path(out) / 'metrics.json', dict(schema=1, square=x * x, nested=dict(x=x)))"""


@pytest.fixture
def place(tmp_path):
    "A folder with an experiment of a second and a grid of four, the last of which fails."
    cells = [new_code_cell(parameters, metadata=dict(tags=["parameters"])), new_code_cell(body)]
    kernel = dict(name="python3", language="python", display_name="python3")
    nbformat.write(
        new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), tmp_path / "square.ipynb"
    )
    (tmp_path / "four.yaml").write_text("grid: {x: [0, 1, 2, 3]}\n")
    return tmp_path


def start(place, *words, grid="four.yaml"):
    "The command in a process group of its own, with interrupts even below a shell's `&`."
    return subprocess.Popen(
        [command, "sweep", "square.ipynb", grid, *words],
        cwd=place,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_command(place, *words, grid="four.yaml"):
    running = start(place, *words, grid=grid)
    out, err = running.communicate(timeout=200)
    assert "Traceback" not in err
    return running.returncode, out, err


def folders(place):
    return {p.name.split("_")[0]: p for p in (place / "runs/square-four").glob("x=*")}


def starts(folder):
    return len((folder / "starts").read_text())


def wait_for(what, seconds=60):
    for _ in range(10 * seconds):
        if what():
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing happened in {seconds} seconds")


def test_four_runs_one_of_which_fails(place):
    code, out, err = run_command(place, "--workers", "2")
    assert code == 1
    assert "4 runs, 0 finished" in out and "3 of 4 finished" in out
    assert out.splitlines()[-1].endswith("ValueError: three is one too many")
    made = folders(place)
    assert {k: (p / "metrics.json").exists() for k, p in made.items()} == {
        "x=0": True,
        "x=1": True,
        "x=2": True,
        "x=3": False,
    }
    assert "three is one too many" in (made["x=3"] / "notebook.ipynb").read_text()
    table = pd.read_csv(place / "runs/square-four/sweep.csv")
    assert table.square.tolist() == [0, 1, 4] and {"x", "wait", "nested.x"} <= set(table)
    code, out, err = run_command(place)
    assert code == 1 and "4 runs, 3 finished" in out and "s a run, measured on 3" in out
    assert {k: starts(p) for k, p in made.items()} == {"x=0": 1, "x=1": 1, "x=2": 1, "x=3": 2}
    assert not (place / "runs/square-four/.sweep/jobs").exists()


def test_killed_and_resumed(place):
    "All processes are killed, then only the sweep: the next sweep waits for that one's worker."
    (place / "four.yaml").write_text("shared: {wait: 4}\ngrid: {x: [0, 1, 2]}\n")
    for kill in (os.killpg, os.kill):
        running = start(place)
        had = {k: starts(p) for k, p in folders(place).items() if (p / "starts").exists()}
        wait_for(
            lambda: (
                {k: starts(p) for k, p in folders(place).items() if (p / "starts").exists()} != had
            )
        )
        kill(running.pid, signal.SIGKILL)
        running.communicate()
    code, out, err = run_command(place, "--workers", "3")
    assert code == 0, out + err
    assert "3 of 3 finished" in out
    assert sum(starts(p) for p in folders(place).values()) == 4


def test_interrupted_and_resumed(place):
    (place / "four.yaml").write_text("shared: {wait: 4}\ngrid: {x: [0, 1]}\n")
    running = start(place)
    wait_for(lambda: any(place.glob("runs/*/*/starts")))
    os.kill(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=20)
    assert running.returncode == 130 and "fade: stopped" in err and "Traceback" not in err
    assert not any((p / "metrics.json").exists() for p in folders(place).values())
    assert run_command(place, "--workers", "2")[0] == 0


sbatch = """#!{python}
import os, re, subprocess, sys
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", open(sys.argv[-1]).read()).groups())
for task in range(first, last+1):
    env = dict(os.environ, SLURM_JOB_ID=str(100+task), SLURM_ARRAY_JOB_ID="77")
    env.update(SLURM_ARRAY_TASK_ID=str(task), SLURM_JOB_NODELIST="n1")
    null = subprocess.DEVNULL
    subprocess.Popen(["bash", sys.argv[-1]], env=env, stdout=null, stderr=null)
print("Submitted batch job 77")
"""
srun = """#!/bin/bash
while [[ "$1" == --* ]]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
"$@"; touch {folder}/ended-$SLURM_ARRAY_TASK_ID
"""
sacct = """#!/bin/bash
echo "JobID|State|NodeList"
for t in 0 1; do [ -e {folder}/ended-$t ] && s=COMPLETED || s=RUNNING; echo "77_$t|$s|n1"; done
"""


def test_the_same_line_on_a_cluster(place, monkeypatch):
    "Slurm's commands are stand-ins that run the jobs here."
    for name, text in dict(sbatch=sbatch, srun=srun, sacct=sacct, scancel="#!/bin/bash\n").items():
        (place / name).write_text(
            text.replace("{python}", sys.executable).replace("{folder}", str(place))
        )
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    (place / "four.yaml").write_text("grid: {x: [0, 3]}\n")
    code, out, err = run_command(
        place, "--executor", "slurm", "--options", "slurm_partition=gpu", "timeout_min=60"
    )
    assert code == 1 and "1 of 2 finished" in out and "three is one too many" in out


def test_two_at_once(place):
    (place / "four.yaml").write_text("shared: {wait: 6}\ngrid: {x: [0]}\n")
    first = start(place)
    wait_for(lambda: any(place.glob("runs/*/*/starts")))
    code, out, err = run_command(place)
    assert code == 2 and "Another sweep is running" in err
    first.communicate(timeout=60)
    assert first.returncode == 0


@pytest.mark.parametrize(
    "grid, words, sentence",
    [
        ("grid: {xx: [1]}", [], "did you mean x?"),
        ("grid: {x: [1, two]}", [], "takes x as int, and this is 'two'"),
        ("grid: {wait: [1e-3]}", [], "with a point"),
        ("x: [1]", [], "below shared, grid or runs"),
        ("grid: [", [], "as YAML"),
        ("grid: {x: [1]}", ["--executor", "slurm"], "choose local (--executor)"),
        ("grid: {x: [1]}", ["--executor", "cloud"], "choose local, slurm or debug"),
        ("grid: {x: [1]}", ["--options", "color=red"], "do not suit local"),
    ],
)
def test_refused_before_anything_starts(place, grid, words, sentence, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (place / "four.yaml").write_text(grid)
    assert main(["sweep", "square.ipynb", "four.yaml", *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1
    assert not list(place.rglob("params.yaml"))


@pytest.mark.parametrize("module", ["papermill", "submitit"])
def test_a_missing_extra_is_named(place, module, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    assert main(["sweep", "square.ipynb", "four.yaml"]) == 2
    err = capsys.readouterr().err
    assert f"{module} is not installed: pip install 'fade-erasure[sweep]'." in err
    assert main(["sweep", "square.ipynb", "four.yaml", "--dry-run"]) == 0


def test_dry_run_leaves_nothing(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["sweep", "square.ipynb", "four.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to do") == 4
    assert not (place / "runs").exists()


def test_papermill_refuses_what_the_notebook_does_not_take(place):
    def papermill(**values):
        execute_notebook(
            place / "square.ipynb",
            place / "out.ipynb",
            {**values, "out": str(place)},
            progress_bar=False,
        )

    with pytest.raises(PapermillExecutionError, match="did you mean wait?"):
        papermill(wiat=1)
    with pytest.raises(PapermillExecutionError, match="takes x as int, and this is 'two'"):
        papermill(x="two")
    assert not (place / "metrics.json").exists()
    papermill(x=2)
    assert load_json(place / "metrics.json")["square"] == 4
