"""Setup: one version, one list of pins, a Makefile that refuses clearly, and a wheel that works outside a checkout."""
import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import notebook_checks as nc
import pytest
import yaml
from packaging.requirements import Requirement
from toy_project import RECIPE, STAGES, write_stage

import kilobench

ROOT = nc.ROOT


@pytest.fixture(scope="module")
def cfg():
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(cfg["DEFAULT"])


def pins(): return [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip() and not line.startswith("#")]


def test_environment_has_the_pins_of_requirements():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert next(d["pip"] for d in env["dependencies"] if isinstance(d, dict)) == pins()
    assert "python=3.11" in env["dependencies"] and all(re.fullmatch(r"[A-Za-z0-9_.-]+==\S+", p) for p in pins())


def test_one_version(cfg): assert cfg["version"] == kilobench.__version__


OPTIONAL = {"coremltools", "gsplat", "wandb", "voila"}  # imported inside the one function that needs it, which says how to install it
WITH_ANOTHER = {"pydantic-core", "llvmlite", "huggingface-hub", "dask"}  # pydantic, numba, timm and distributed bring their own


def imported():
    """Third-party distributions that any module of the library imports, anywhere in it."""
    owners, found = packages_distributions(), set()
    for f in (ROOT / "kilobench").rglob("*.py"):
        for n in ast.walk(ast.parse(f.read_text(encoding="utf-8"))):
            names = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module] if isinstance(n, ast.ImportFrom) and not n.level else []
            found |= {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"kilobench"}
    return {owners.get(m, [m])[0].lower().replace("_", "-") for m in found}


def test_requirements_name_what_is_imported_and_admit_the_pins(cfg):
    wanted = {r.name.lower().replace("_", "-"): r for r in map(Requirement, cfg["requirements"].split())}
    assert imported() - wanted.keys() - OPTIONAL - WITH_ANOTHER == set()
    pinned = dict(p.lower().split("==") for p in pins())
    assert all(r.specifier.contains(pinned[n]) for n, r in wanted.items() if n in pinned)
    assert wanted.keys() - pinned.keys() <= {"jinja2", "pyyaml", "ipykernel", "ipython", "traitlets", "nbformat",
                                                        "nbclient", "jupyter-client"}, "these come with jupyterlab and papermill"


def test_licence_is_the_whole_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000


# ---- make ----

def make(*args, cwd=ROOT, **env):
    return subprocess.run(["make", *args], cwd=cwd, capture_output=True, text=True, env=os.environ | env)


def test_make_refuses_an_old_python_in_one_line(tmp_path):
    for f in ("Makefile", "requirements.txt", "setup.py", "settings.ini"): shutil.copy(ROOT / f, tmp_path / f)
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\nexit 1\n')  # what `sys.exit(version < 3.11)` says on one
    old.chmod(0o755)
    done = make("install", f"PYTHON={old}", cwd=tmp_path)
    assert done.returncode == 2 and "no Python 3.11 or newer" in done.stderr.splitlines()[0] and not (tmp_path / ".venv").exists()


def test_make_targets(tmp_path):
    said = make("-n", "test", "lab", "run", "docs").stdout
    assert said.index("notebook_checks.py") < said.index("ruff check") < said.index("nbdev_test") < said.index("pytest"), "cheap first, pytest last"
    assert "jupyter lab --ip 127.0.0.1" in said and "kilobench run renderer --preset cpu" in said and "token" not in said
    assert "python docs/build.py" in said
    assert all(t in make().stdout for t in ("make run", "make test", "make lab", "make docs", "make robust", "make install", "make clean"))


def test_ci_runs_the_readmes_command():
    script = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert script[:2] == ["set -eu", 'cd "$(dirname "$0")/.."'] and script[-1] == "make test" and os.access(ROOT / ".ci" / "run", os.X_OK)


# ---- the wheel ----

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The unpacked wheel, made from the source archive of a clean copy that has a reference result and things that must not travel."""
    tmp = tmp_path_factory.mktemp("wheel")
    copy = tmp / "copy"
    copy.mkdir()
    for d in ("kilobench", "nbs"): shutil.copytree(ROOT / d, copy / d, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for f in ("settings.ini", "setup.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "MANIFEST.in"):
        if (ROOT / f).exists(): shutil.copy(ROOT / f, copy / f)
    for init in copy.glob("kilobench/*/"): (init / "__init__.py").touch()
    (copy / "kilobench" / "toy").mkdir()
    (copy / "kilobench" / "toy" / "__init__.py").touch()
    (copy / "kilobench" / "toy" / "recipe.py").write_text(RECIPE)
    for f in ("outputs/reference/toy/cpu/report.json", "outputs/toy/cpu/secret.json", "nbs/.ipynb_checkpoints/x.ipynb", "nbs/toy/picture.png"):
        (copy / f).parent.mkdir(parents=True, exist_ok=True)
        (copy / f).write_text("{}")
    archive = subprocess.run([sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('../dist')"], cwd=copy, capture_output=True, text=True)
    assert archive.returncode == 0, archive.stderr[-2000:]
    (source,) = (tmp / "dist").glob("*.tar.gz")
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", str(tmp), str(source)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp.glob("*.whl")
    with zipfile.ZipFile(file) as z: z.extractall(tmp / "unpacked")
    return tmp / "unpacked"


def outside(wheel, tmp_path, *args):
    """A Python that finds kilobench in the unpacked wheel first, far from any checkout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("KILOBENCH_")} | {"PYTHONPATH": str(wheel), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True)


def test_wheel_holds_notebooks_and_references_and_nothing_else(wheel):
    held = {str(p.relative_to(wheel / "kilobench")) for p in (wheel / "kilobench").rglob("*") if p.is_file()}
    assert {f"_notebooks/{p.relative_to(ROOT / 'nbs')}" for p in nc.notebooks()} == {h for h in held if h.startswith("_notebooks/")}
    assert [h for h in held if h.startswith("_reference/")] == ["_reference/toy/cpu/report.json"]
    assert not [h for h in held if "secret" in h or "checkpoint" in h and h.endswith(".ipynb") or "__pycache__" in h]
    (info,) = wheel.glob("*.dist-info")
    assert "kilobench=kilobench.core.cli:main" in (info / "entry_points.txt").read_text().replace(" ", "") and list(info.rglob("LICENSE"))


def test_wheel_works_outside_a_checkout(wheel, tmp_path):
    code = "import kilobench.core.metrics, kilobench; from kilobench.core.run import *; print(kilobench.__file__, project_root(), reference_dir('toy', 'cpu'), outputs_dir())"
    done = outside(wheel, tmp_path, "-c", code)
    assert done.stdout.split() == [str(wheel / "kilobench/__init__.py"), "None", str(wheel / "kilobench/_reference/toy/cpu"), str(tmp_path / "outputs")], done.stderr
    copied = outside(wheel, tmp_path, "-m", "kilobench", "notebooks", "mine", "--project", "core")
    assert copied.returncode == 0 and (tmp_path / "mine/core/13_cli.ipynb").read_bytes() == (ROOT / "nbs/core/13_cli.ipynb").read_bytes(), copied.stderr
    assert "steps\t3\t" in outside(wheel, tmp_path, "-m", "kilobench", "recipe", "toy").stdout


def test_a_series_of_the_wheel_keeps_its_caches_beside_its_runs(wheel, tmp_path):
    for stage in STAGES: write_stage(tmp_path / "mine", stage, *["from kilobench.core.run import outputs_dir\nprint(outputs_dir())"] * (stage == "data"))
    done = outside(wheel, tmp_path, "-m", "kilobench", "run", "toy", "--only", "data", "--notebooks", "mine")
    assert done.returncode == 0, done.stderr
    assert f'"{tmp_path / "outputs"}\\n"' in (tmp_path / "outputs" / "toy" / "smoke" / "notebooks" / "00_data.ipynb").read_text()


@pytest.mark.parametrize("project", nc.projects())
def test_wheel_knows_the_real_projects(wheel, tmp_path, project):
    done = outside(wheel, tmp_path, "-m", "kilobench", "recipe", project)
    assert done.returncode == 0 and "train.steps\t" in done.stdout, done.stderr
