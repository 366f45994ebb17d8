"""What the tests of every project do with its stages: finish a tiny run, kill one and go on, say a mistake on the command line."""
import fcntl
import importlib
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nbformat
import torch
from safetensors.torch import load_file

from kilobench.core.run import open_run
from kilobench.core.series import find_series, run_series

SERIES = Path(os.environ["KILOBENCH_OUTPUTS"]) / "series"     # outputs that all test processes share: a smoke run of each project

KILL = """
import importlib, sys
from kilobench.core import training
from kilobench.core.run import open_run
from kilobench.core.series import find_series, run_series
project, values = sys.argv[1:]
run = open_run(project, "smoke", "", values)
step = training.Progress.on_step
def on_step(self, state):
    print("step", state.name, state.step, flush=True)
    sys.stdin.readline()
    step(self, state)
training.Progress.on_step = on_step
importlib.import_module(f"kilobench.{project}.train").train(run)
"""


def finished_run(project, values, folder):
    """One run of a project at smoke size with `values`, everything done, under an outputs folder of its own; for a module's fixture (`yield from`)."""
    old = os.environ["KILOBENCH_OUTPUTS"]
    os.environ["KILOBENCH_OUTPUTS"] = str(folder)
    run = open_run(project, "smoke", "", values)
    for stage in ("evaluate", "counterfactual"): getattr(importlib.import_module(f"kilobench.{project}.{stage}"), stage)(run)
    yield run
    os.environ["KILOBENCH_OUTPUTS"] = old


def kill_in_training(start, outputs, project, values, name, at):
    """SIGKILL a process that trains, at step `at` of the training `name`."""
    p = start(KILL, project, values, env={"KILOBENCH_OUTPUTS": str(outputs)}, before="")
    for line in p.stdout:
        if not line.startswith("step"): continue
        if line.split()[1] == name and int(line.split()[2]) >= at: break
        p.stdin.write("\n")
        p.stdin.flush()
    p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL


def assert_same_training(run, whole, name):
    """Two runs have bit-equal averaged weights of a training, and a log with the same steps."""
    a, b = (load_file(r.path("checkpoints", name, "last", f"{name}.ema.safetensors")) for r in (run, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    mine, theirs = ([line.split(",")[0] for line in r.path(f"metrics-{name}.csv").read_text().splitlines()] for r in (run, whole))
    assert mine == theirs and len(mine) > 1


def assert_one_line(outputs, args, said):
    """A mistake on the command line is exit code 2 and one line that says what is meant."""
    p = subprocess.run([sys.executable, "-m", "kilobench", *args], capture_output=True, text=True, env=os.environ | {"KILOBENCH_OUTPUTS": str(outputs)})
    assert p.returncode == 2 and said in p.stderr and "Traceback" not in p.stderr and len(p.stderr.strip().splitlines()) == 1, p.stderr


@contextmanager
def shared_outputs(project, monkeypatch):
    """SERIES as the outputs folder, and this process the only one at work on the project's smoke run there."""
    SERIES.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(SERIES))
    with open(SERIES / f".{project}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def assert_series_runs(project, monkeypatch):
    """All five notebooks of a project run headlessly at smoke size, show pictures, and have nothing to do the second time."""
    with shared_outputs(project, monkeypatch):
        run = run_series(project)
        assert list(run.seconds) == ["data", "model", "train", "evaluate", "counterfactual"] and run.path("report.json").exists() and run.path("index.html").exists()
        outputs = lambda file: [o for c in nbformat.read(file, 4).cells if c.cell_type == "code" for o in c.outputs]
        copies = [run.path("notebooks", s.notebook.name) for s in find_series(project)]
        assert all(any("image/png" in o.get("data", {}) for o in outputs(c)) for c in copies[1:]), "each executed copy has pictures"
        heard = []
        run_series(project, say=heard.append)
    assert [h.endswith("done before") for h in heard[1:]] == [True] * 5


def smoke_run(project, monkeypatch):
    """The finished smoke run of a project in SERIES: of its series, else made now, without notebooks."""
    with shared_outputs(project, monkeypatch):
        run = open_run(project)
        if not run.is_done("counterfactual"): importlib.import_module(f"kilobench.{project}.counterfactual").counterfactual(run)
    return run
