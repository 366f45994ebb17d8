"""Shared by all tests. They never write to the checkout's outputs/: kilobench's outputs go to a temporary folder, here and in children."""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("KILOBENCH_OUTPUTS", tempfile.mkdtemp(prefix="kilobench-pytest-"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
for name in ("KILOBENCH_LOCK", "RANK", "LOCAL_RANK", "WORLD_SIZE"): os.environ.pop(name, None)  # a test run inside a run is not part of it

# What a child process needs to know of the imaginary project that tests use.
TOY = """
import os, sys, json, signal
from pathlib import Path
from pydantic import Field
from kilobench.core.recipe import *
from kilobench.core.run import *
class Toy(Recipe):
    "The recipe of an imaginary project."
    project = "toy"
    presets = {"smoke": {}, "cpu": {"n": 600}, "full": {"n": 60_000, "train.steps": 100_000}}
    n: int = Field(6, ge=1, description="images")
    train: TrainPart = TrainPart(steps=5)
"""


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    "An outputs folder of the test's own, also for the processes it starts."
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture
def start():
    "start(code, *args, env={}) → a Python process with text pipes; `TOY` is run first. All are killed when the test ends."
    started = []

    def start(code: str, *args, env: dict | None = None, cwd=None, before: str = TOY) -> subprocess.Popen:
        p = subprocess.Popen([sys.executable, "-u", "-c", before + code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}), cwd=cwd)
        started.append(p)
        return p

    yield start
    for p in started:
        if p.poll() is None: p.kill()
        p.wait()
        for pipe in (p.stdin, p.stdout, p.stderr): pipe.close()


@pytest.fixture
def small_disk(tmp_path):
    "A folder on a disk of 1 MiB: a tmpfs where this user may mount one, else the test is skipped and says so."
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not (mount and os.geteuid() == 0): pytest.skip("a small disk needs the right to mount a tmpfs")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True)
    if made.returncode: pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
