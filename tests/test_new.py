"""`kilobench new`: a name is checked before anything is written, and what it writes passes the tests as it stands."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import notebook_checks as nc
import pytest

from kilobench.core.new import RESERVED, check_name, in_its_name, write_project
from kilobench.core.recipe import UserError, find_projects

ROOT = nc.ROOT
TEMPLATE = sorted((ROOT / "nbs" / "_template").glob("*.ipynb"))


def module(root, *args):
    """`python -m ARGS` in a checkout of its own."""
    env = {k: v for k, v in os.environ.items() if k != "KILOBENCH_LOCK"} | {"PYTHONPATH": str(root), "NO_COLOR": "1", "KILOBENCH_OUTPUTS": str(root / "outputs")}
    return subprocess.run([sys.executable, "-m", *args], cwd=root, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with core, the template and the tests, and in it a project called `sixth`, written by the command line."""
    root = tmp_path_factory.mktemp("new") / "checkout"
    leave = shutil.ignore_patterns("__pycache__", ".*")
    for d in ("kilobench/core", "nbs/core", "nbs/_template", "tests"): shutil.copytree(ROOT / d, root / d, ignore=leave)
    for f in ("kilobench/__init__.py", "kilobench/__main__.py", "settings.ini", "pyproject.toml", "pytest.ini", "ruff.toml"): shutil.copy(ROOT / f, root / f)
    done = module(root, "kilobench", "new", "sixth")
    assert done.returncode == 0 and "6 notebooks" in done.stdout, done.stderr
    return root


# ---- the name ----

@pytest.mark.parametrize("name, said", [("My-Scenes", "such as 'my_scenes'"), ("2nd", "such as 'my_2nd'"), ("class", "such as 'my_class'"), ("é", "such as 'my_project'"), ("../x", "such as 'x'"),
                                        ("", "such as 'my_project'"), ("a" * 99, "is no name"), *[(r, "a word of kilobench's own") for r in RESERVED], ("renderer", "already there")])
def test_a_name_that_cannot_be_is_one_line(name, said):
    with pytest.raises(UserError, match=said) as e: check_name(name, ROOT)
    assert "\n" not in str(e.value)


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path, monkeypatch):
    (tmp_path / "nbs" / "mine").mkdir(parents=True)
    (tmp_path / "nbs" / "mine" / "thesis.ipynb").write_text("{}")
    with pytest.raises(UserError, match="already there; choose another name, nothing was written"): write_project("mine", tmp_path)
    assert [p.name for p in (tmp_path / "nbs").rglob("*.*")] == ["thesis.ipynb"]
    monkeypatch.setattr("kilobench.core.new.EXPORT", "raise SystemExit('no export today')")
    with pytest.raises(UserError, match="no export today"): write_project("yours", tmp_path)
    assert not (tmp_path / "nbs" / "yours").exists()


def test_an_installed_package_has_no_place_for_it(tmp_path):
    shutil.copytree(ROOT / "kilobench" / "core", tmp_path / "site" / "kilobench" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    for f in ("__init__.py", "__main__.py"): shutil.copy(ROOT / "kilobench" / f, tmp_path / "site" / "kilobench" / f)
    (tmp_path / "elsewhere").mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for cwd in (tmp_path / "elsewhere", ROOT):     # a checkout that one stands in is not the one that runs
        done = subprocess.run([sys.executable, "-c", "from kilobench.core.cli import main; main(['new', 'sixth'])"], cwd=cwd, env=env | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
        assert done.returncode == 2 and "installed package" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (ROOT / "nbs" / "sixth").exists()


# ---- what is written ----

def test_the_template_is_no_project_and_its_word_is_always_the_name():
    assert len(TEMPLATE) == 6 and "_template" not in find_projects() and "_template" not in nc.projects()
    for f in TEMPLATE:
        named = in_its_name(f.read_text(), "my_scenes")
        assert "template" not in named.lower() and json.loads(named)["cells"], f
        assert nc.stage_of(f) == "" or "MyScenesRecipe" in named or "my_scenes" in named


def test_it_is_clean_in_sync_and_passes_ruff(checkout):
    assert nc.projects(checkout) == ["sixth"] and nc.dirty(checkout) == [] and nc.out_of_sync(checkout) == []
    ruff = subprocess.run([str(Path(sys.executable).parent / "ruff"), "check", "kilobench/sixth"], cwd=checkout, capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout


def test_it_passes_the_projects_tests_and_its_series_runs(checkout):
    """The tests that go over all notebooks, library files and projects, run in that checkout: they find `sixth` by themselves."""
    done = module(checkout, "pytest", "tests/test_notebooks.py", "tests/test_projects.py", "-k", "sixth or by_themselves", "-vv")
    assert done.returncode == 0 and "test_series_runs[sixth] PASSED" in done.stdout and done.stdout.count("nbs/sixth/") >= 6, done.stdout[-3000:]
    (file,) = (checkout / "outputs").rglob("sixth/smoke/report.json")
    report = json.loads(file.read_text())
    rows = {r["name"]: r for r in report["rows"]}
    roles = [r["role"] for r in report["rows"]]
    assert report["project"] == "sixth" and not report["collapsed"] and len(report["criteria"]) == 7
    assert {"teacher", "student", "baseline"} <= rows.keys() and roles.count("control") == 4
    controls = max(r["metrics"]["psnr/iid"] for r in rows.values() if r["role"] == "control" and "pixel" not in r["name"])
    assert rows["student"]["metrics"]["psnr/iid"] > controls + 3 and rows["student"]["cost"]["speedup_b1"] > 0
    assert all(c["passed"] for c in report["data"]["checks"]) and report["data"]["ceilings"]["psnr_photo"]["value"] > max(r["metrics"]["psnr_photo"] for r in rows.values())
    assert report["counterfactual"]["student"]["overall"]["edits"] == 40 and report["counterfactual"]["student"]["turn"]["null_edits"] == 8
