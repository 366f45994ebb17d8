"""The notebook contract over every committed notebook; and each check shown to fail on a notebook that breaks it."""
import json
import re
import shutil
import statistics
import subprocess

import notebook_checks as nc
import pytest

ROOT = nc.ROOT
LIBRARY = sorted(p for p in (ROOT / "kilobench").rglob("*.py") if p.name != "_modidx.py")


def name_of(p): return str(p.relative_to(ROOT))


@pytest.mark.parametrize("path", nc.notebooks(), ids=name_of)
def test_notebook_keeps_the_contract(path):
    assert not [f"{path.name}: {said}" for check in nc.NOTEBOOK_CHECKS for said in check(path)]


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_file_keeps_the_rules(path):
    assert not [f"{path.name}: {said}" for check in nc.LIBRARY_CHECKS for said in check(path)]


def test_exported_cells_are_short():
    lengths = [sum(1 for line in nc.src(c).splitlines() if line.strip()) for p in nc.notebooks() for c in nc.exported(p)]
    assert statistics.median(lengths) <= 25


def test_each_module_has_one_home():
    homes = {}
    for p in nc.notebooks():
        for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", "\n".join(nc.src(c) for c in nc.code(p)), re.M): homes.setdefault(m.group(1), []).append(p.name)
    assert not {k: v for k, v in homes.items() if len(v) > 1}


@pytest.mark.parametrize("project", nc.projects())
def test_project_has_all_five_stages(project):
    assert [nc.stage_of(p) for p in nc.notebooks() if p.parent.name == project and nc.stage_of(p)] == list(nc.STAGES)
    for stage in nc.STAGES:
        assert re.search(rf"^def {stage}\(run\b", (ROOT / "kilobench" / project / f"{stage}.py").read_text(), re.M), f"{project}.{stage} has no {stage}(run)"


def test_what_is_committed_is_small():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    sizes = {f: (ROOT / f).stat().st_size for f in tracked if f and (ROOT / f).is_file()}
    assert not {f: n for f, n in sizes.items() if n > (5 << 20 if f.startswith("outputs/reference/") else 1 << 20)}
    assert sum(n for f, n in sizes.items() if f.startswith("outputs/reference/")) <= 25 << 20
    assert not [f for f in sizes if f.startswith("outputs/") and not f.startswith("outputs/reference/")]


# ---- every check can fail ----

def notebook(path, *cells):
    """A notebook from ('md' | 'code' | 'parameters', source) pairs."""
    made = []
    for i, (kind, source) in enumerate(cells):
        c = {"cell_type": "markdown" if kind == "md" else "code", "id": f"c{i}", "metadata": {"tags": ["parameters"]} if kind == "parameters" else {}, "source": source.splitlines(True)}
        if kind != "md": c |= {"execution_count": None, "outputs": []}
        made.append(c)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": made, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
                                "nbformat": 4, "nbformat_minor": 5}, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return path


GOOD = [("md", "# Train\n\n> The student learns."), ("code", "#| default_exp toy.train"), ("code", "#| export\nfrom kilobench.core.run import open_run"),
        ("md", "A sentence that says why the function below is there, what it costs and where the idea was taken from, in about forty words, as a patient "
               "reader would like it: not too short, not too long, and true."), ("code", "#| export\ndef train(run):\n    \"Nothing.\""), ("code", "train(None)"),
        ("md", "## Run\n\nThe stage."), ("parameters", "preset = \"smoke\"\nrun_dir = \"\"\noverrides = \"\""), ("code", "run = open_run('toy', preset, run_dir, overrides)\ntrain(run)")]

BREAKS = {
    "opening": lambda cs: [("md", "Train, no title"), *cs[1:]],
    "imports_apart": lambda cs: [*cs[:5], ("code", "import math\nmath.pi"), *cs[5:]],
    "parameters_cell": lambda cs: [*cs[:7], ("parameters", "preset = \"smoke\"\nrun_dir = \"\"\noverrides = \"\"\nsteps = 2 * 10\nsizes = [1, 2]"), *cs[8:]],
    "run_section": lambda cs: [*cs[:6], ("md", "## The end"), *cs[7:]],
    "headless": lambda cs: [*cs[:5], ("code", "if IN_TEST: steps = 2"), *cs[5:]],
    "no_working_directory": lambda cs: [*cs[:5], ("code", "Path('../outputs/x').exists()"), *cs[5:]],
    "rhythm": lambda cs: [*cs[:4], ("code", "#| export\ndef train(run):\n" + "    x = 1\n" * 61), *cs[5:]],
    "names_used": lambda cs: [*cs[:5], ("code", "#| export\ndef forgotten():\n    \"Never shown.\""), *cs[5:]],
}


def complaints(path): return {check.__name__: check(path) for check in nc.NOTEBOOK_CHECKS}


def test_a_good_notebook_has_no_complaints(tmp_path):
    assert not any(complaints(notebook(tmp_path / "nbs" / "toy" / "02_train.ipynb", *GOOD)).values())


@pytest.mark.parametrize("check", BREAKS)
def test_check_can_fail(tmp_path, check):
    assert complaints(notebook(tmp_path / "nbs" / "toy" / "02_train.ipynb", *BREAKS[check](GOOD)))[check]


def test_missing_parameter_and_wrong_default_are_seen(tmp_path):
    cs = [*GOOD[:7], ("parameters", "preset = \"full\"\nrun_dir = \"\""), *GOOD[8:]]
    said = nc.parameters_cell(notebook(tmp_path / "nbs" / "toy" / "02_train.ipynb", *cs))
    assert len(said) == 2 and "preset" in said[0] and "overrides" in said[1]


def test_output_is_seen(tmp_path):
    p = notebook(tmp_path / "nbs" / "toy" / "02_train.ipynb", *GOOD)
    nb = json.loads(p.read_text())
    nb["cells"][-1] |= {"execution_count": 3}
    p.write_text(json.dumps(nb))
    assert nc.no_output(p)


@pytest.mark.parametrize("check, room, text", [
    (nc.floors, "core", "from ..toy.data import data\n"), (nc.floors, "core", "import kilobench.toy.data\n"), (nc.floors, "other", "from ..toy import data\n"),
    (nc.plain_code, "core", "x = torch.load(f)\n"), (nc.plain_code, "core", "try: f()\nexcept Exception: pass\n"), (nc.docstrings, "core", "def f(x): return x\n")])
def test_library_check_can_fail(tmp_path, check, room, text):
    for p in ("toy", "other"): (tmp_path / "kilobench" / p).mkdir(parents=True); (tmp_path / "kilobench" / p / "recipe.py").write_text("")
    (tmp_path / "kilobench" / "core").mkdir()
    (f := tmp_path / "kilobench" / room / "thing.py").write_text(text)
    assert check(f, root=tmp_path)


def test_clean_and_sync_see_a_change_and_touch_nothing(tmp_path):
    """A tiny project of its own: in sync after nbdev_export; then a kernel's traces in the notebook and a hand edit in the module are both named."""
    root = tmp_path / "checkout"
    notebook(root / "nbs" / "toy" / "02_train.ipynb", *GOOD[:6])
    shutil.copy(ROOT / "settings.ini", root / "settings.ini")
    (root / "kilobench").mkdir()
    (root / "kilobench" / "__init__.py").write_text((ROOT / "kilobench" / "__init__.py").read_text())
    nc.nbdev("nbdev_export", root)
    assert nc.dirty(root) == [] and nc.out_of_sync(root) == []

    nb = json.loads((root / "nbs/toy/02_train.ipynb").read_text())
    nb["cells"][-1]["execution_count"] = 7
    (root / "nbs/toy/02_train.ipynb").write_text(before := json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    with open(root / "kilobench/toy/train.py", "a") as f: f.write("# by hand\n")
    assert nc.dirty(root) == ["nbs/toy/02_train.ipynb"] and nc.out_of_sync(root) == ["kilobench/toy/train.py"]
    assert (root / "nbs/toy/02_train.ipynb").read_text() == before
