"""A throw-away project for the tests of series and command line: a checkout of its own with core's modules and five tiny notebooks."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("data", "model", "train", "evaluate", "counterfactual")
PARAMETERS = 'preset = "smoke"\nrun_dir = ""\noverrides = ""'
RECIPE = '''"""The toy's recipe."""
from pydantic import Field
from kilobench.core.recipe import Recipe

class Toy(Recipe):
    """One number."""
    project = "toy"
    presets = {"smoke": {}, "cpu": {"steps": 30}, "full": {"steps": 300}}
    steps: int = Field(3, ge=1, description="steps")
'''
BODY = '''import os, sys
from kilobench.core.run import open_run
run = open_run("toy", preset, run_dir, overrides)
if not run.is_done("{name}"):
    for i in range(run.recipe.steps): print("{name} step", i + 1)
    run.path("{name}.txt").write_text(str(run.recipe.steps))
    run.mark("{name}", seconds=0.1, files=["{name}.txt"])'''


def write_notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(s, metadata={"tags": ["parameters"]} if s.startswith("preset =") else {}) for s in sources]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)
    return path


def write_stage(folder, stage, *sources, parameters=PARAMETERS):
    """A stage notebook: by default one that counts and marks itself done; `sources` come before that cell.

    It defines the recipe for itself, so that it also runs in a kernel that does not see the toy's checkout.
    """
    return write_notebook(folder / f"{STAGES.index(stage):02}_{stage}.ipynb", RECIPE + "print('a lesson cell')", parameters, *sources, BODY.format(name=stage))


class Toy:
    """The checkout in `root`, and the command line in it."""
    def __init__(self, root: Path):
        self.root, self.nbs, self.outputs = root, root / "nbs" / "toy", root / "outputs"
        shutil.copytree(ROOT / "kilobench" / "core", root / "kilobench" / "core", ignore=shutil.ignore_patterns("__pycache__"))
        for f in ("settings.ini", "kilobench/__init__.py", "kilobench/__main__.py"): shutil.copy(ROOT / f, root / f)
        (root / "kilobench" / "toy").mkdir()
        (root / "kilobench" / "toy" / "__init__.py").touch()
        (root / "kilobench" / "toy" / "recipe.py").write_text(RECIPE)
        for stage in STAGES: write_stage(self.nbs, stage)

    def env(self, **more):
        kept = {k: v for k, v in os.environ.items() if k not in ("KILOBENCH_OUTPUTS", "KILOBENCH_LOCK", "FORCE_COLOR")}
        return kept | {"PYTHONPATH": str(self.root), "NO_COLOR": "1", **more}

    def start(self, *args, env=None, **kw):
        """`kilobench ARGS` as a process whose output can be read line by line."""
        return subprocess.Popen([sys.executable, "-m", "kilobench", *args], cwd=self.root, env=self.env(**(env or {})), text=True, bufsize=1,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)

    def __call__(self, *args, env=None, **kw):
        """`kilobench ARGS` to its end."""
        return subprocess.run([sys.executable, "-m", "kilobench", *args], cwd=self.root, env=self.env(**(env or {})), text=True, capture_output=True, **kw)


def read_until(process, text):
    """Lines of a process up to the one that holds `text`; fails when it ends before."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line: return lines
    raise AssertionError(f"{text!r} never came; out: {''.join(lines)} err: {process.stderr.read()}")
