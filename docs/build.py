"""`make docs`: execute the notebooks, turn them into pages, and let Sphinx write the site to outputs/docs/html.

Four steps, each of which keeps what is still valid:
1. the five series at smoke size through papermill, and every other notebook of core and the projects, two at a time;
2. pages: those of docs/pages, filled with figures from the committed references; the executed notebooks (convert.py); a page of API for each module;
3. Sphinx with conf.py, where a warning is an error;
4. every page opened in Chromium, from disk (check.py).
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from check import main as look_at_site  # noqa: E402
from convert import page, plain_title, without_skipped  # noqa: E402
from references import FILLERS, gallery, scorecard_pages  # noqa: E402

from kilobench.core.recipe import UserError, find_projects  # noqa: E402
from kilobench.core.run import atomic_write, reference_dir  # noqa: E402
from kilobench.core.series import execute, find_series  # noqa: E402

OUT = Path(os.environ.get("KILOBENCH_OUTPUTS") or ROOT / "outputs").resolve() / "docs"
EXECUTED, RUNS, SOURCE, HTML = OUT / "executed", OUT / "runs", OUT / "source", OUT / "html"
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "30000"}


# ---- what there is ----

def chapters() -> list[str]:
    """The folders of notebooks that become chapters, core last; bench is left out: its figures mean something at full size only."""
    return [*find_projects(), "core"]


def notebooks(chapter: str) -> list[Path]:
    return sorted(p for p in (ROOT / "nbs" / chapter).glob("*.ipynb"))


def key_of(files: list[Path]) -> str:
    """What an execution depends on: the notebooks and the package."""
    digest = hashlib.sha256()
    for f in [*files, *sorted((ROOT / "kilobench").rglob("*.py"))]: digest.update(f.read_bytes())
    return digest.hexdigest()[:16]


# ---- 1. execute ----

def run_one(notebook: Path) -> str:
    """Execute a library notebook unless its copy is up to date; what was done, as a line."""
    copy, key = EXECUTED / notebook.relative_to(ROOT / "nbs"), key_of([notebook])
    if copy.exists() and nbformat.read(copy, 4).metadata.get("kilobench") == key: return ""
    began, given = time.perf_counter(), copy.with_suffix(".given.ipynb")
    given.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(without_skipped(nbformat.read(notebook, 4)), given)
    execute(given, copy, {}, QUIET | {"KILOBENCH_OUTPUTS": str(RUNS / notebook.stem), "KILOBENCH_RECORD": "1"}, ROOT, say=lambda _: None)
    given.unlink()
    done = nbformat.read(copy, 4)
    done.metadata["kilobench"] = key
    nbformat.write(done, copy)
    return f"{notebook.relative_to(ROOT)}: {time.perf_counter() - began:.0f} s"


def run_stages(project: str) -> str:
    """Run a project's five notebooks at smoke size into outputs/docs/runs/<project>/docs; anew when notebooks or package changed."""
    began, home = time.perf_counter(), RUNS / project / "docs"
    key = key_of([s.notebook for s in find_series(project)])
    kept = home / "docs-key"
    if kept.exists() and kept.read_text() == key: return ""
    shutil.rmtree(home, ignore_errors=True)
    env = os.environ | QUIET | {"KILOBENCH_OUTPUTS": str(RUNS), "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-m", "kilobench", "run", project, "--preset", "smoke", "--name", "docs"], env=env, text=True, capture_output=True)
    if said.returncode: raise UserError(f"{project}: its series stopped: {said.stderr.strip()[-400:]}")
    for s in find_series(project):
        (EXECUTED / project).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(home / "notebooks" / s.notebook.name, EXECUTED / project / s.notebook.name)
    atomic_write(kept, key)
    return f"series {project}: {time.perf_counter() - began:.0f} s"


TAPE = """
import importlib, sys
from pathlib import Path
from kilobench.core.record import recording
from kilobench.core.run import reference_dir
commands = importlib.import_module(f"kilobench.{sys.argv[1]}.commands")
student = reference_dir(sys.argv[1], "cpu") / f"{commands.STUDENTS[0]}.safetensors"
Path(sys.argv[2]).write_text(recording(commands.explore(student)) if student.exists() else "", encoding="utf-8")
"""


def record(project: str) -> str:
    """The explorer of the reference's student, recorded: what its smoke-size sibling shows is a toy's guess."""
    began, file, kept = time.perf_counter(), EXECUTED / project / "explorer.html", EXECUTED / project / "explorer.key"
    key = key_of(sorted(reference_dir(project, "cpu").glob("*.safetensors")))
    if kept.exists() and kept.read_text() == key: return ""
    file.parent.mkdir(parents=True, exist_ok=True)
    said = subprocess.run([sys.executable, "-c", TAPE, project, str(file)], env=os.environ | QUIET | {"KILOBENCH_HEADLESS": "1", "PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    if said.returncode: raise UserError(f"{project}: its explorer could not be recorded: {said.stderr.strip()[-400:]}")
    atomic_write(kept, key)
    return f"explorer {project}: {time.perf_counter() - began:.0f} s"


def execute_all(jobs: int) -> None:
    """All series and notebooks, the long ones first."""
    stages = {s.notebook for p in find_projects() for s in find_series(p)}
    tasks = [(run_stages, p) for p in find_projects()] + [(record, p) for p in find_projects()] + [(run_one, n) for c in chapters() for n in notebooks(c) if n not in stages]
    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(lambda t: t[0](t[1]), tasks):
            if line: print(f"  {line}", flush=True)


# ---- 2. pages ----

SMOKE = ":::{note}\nExecuted at `smoke` size: the path of a real run in seconds, with figures and pictures of a toy. What the committed `cpu` run reached is on [the project's page](index.md).\n:::"


def write_notebook(notebook: Path, names: set[str]) -> None:
    """The page of one notebook, from its executed copy where there is one."""
    where = notebook.relative_to(ROOT / "nbs")
    copy = EXECUTED / where
    (SOURCE / where).parent.mkdir(parents=True, exist_ok=True)
    shown = page(nbformat.read(copy if copy.exists() else notebook, 4), where, names)
    if notebook in {s.notebook for s in (find_series(where.parts[0]) if where.parts[0] in find_projects() else [])}:
        shown.cells.insert(1, nbformat.v4.new_markdown_cell(SMOKE))
        if said := gallery(where.parts[0], where.stem, "\n".join(c.source for c in shown.cells)): shown.cells.append(nbformat.v4.new_markdown_cell(said))
        tape = EXECUTED / where.parent / "explorer.html"
        if where.stem.endswith("counterfactual") and tape.exists() and (played := tape.read_text(encoding="utf-8")):
            out = nbformat.v4.new_output("display_data", data={"text/html": played})
            shown.cells.append(nbformat.v4.new_code_cell("", metadata={"tags": ["remove-input"]}, outputs=[out]))
    nbformat.write(shown, SOURCE / where)


def write_api() -> None:
    """One page for each module that nbdev exports, and an index of them by package."""
    packages: dict[str, list[str]] = {}
    for f in sorted((ROOT / "kilobench").glob("*/*.py")):
        if f.stem != "__init__": packages.setdefault(f.parent.name, []).append(f.stem)
    lines = ["# API", "", "Each module is exported from the notebook that explains it; `from kilobench.core.scorecard import Report` and so on.", ""]
    for package in ("core", *(p for p in packages if p != "core")):
        lines += [f"## kilobench.{package}", "", "```{toctree}", ":maxdepth: 1", "", *(f"kilobench.{package}.{m}" for m in packages[package]), "```", ""]
        for m in packages[package]:
            text = f"# kilobench.{package}.{m}\n\n```{{eval-rst}}\n.. automodule:: kilobench.{package}.{m}\n   :members:\n```\n"
            atomic_write(SOURCE / "api" / f"kilobench.{package}.{m}.md", text)
    atomic_write(SOURCE / "api" / "index.md", "\n".join(lines))


def toctree(chapter: str) -> str:
    """The notebooks of a chapter with the titles they give themselves; stages and library notebooks in reading order."""
    lines = [f"{plain_title(n)} <{n.stem}>" for n in notebooks(chapter)]
    return "\n".join(["```{toctree}", ":maxdepth: 1", "", *lines, "```"])


PLAIN = """# {{ project }}

## The notebooks

{{ toctree(project) }}

## The recipe

{{ recipe_table(project) }}
"""


def write_pages() -> None:
    """docs/pages through Jinja: prose by hand, every figure from a committed report."""
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(ROOT / "docs" / "pages"), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.globals |= FILLERS | {"toctree": toctree, "projects": find_projects()}
    for f in sorted((ROOT / "docs" / "pages").rglob("*.md")):
        name = f.relative_to(ROOT / "docs" / "pages").as_posix()
        atomic_write(SOURCE / name, env.get_template(name).render() + "\n")
    for project in find_projects():      # one that nobody has written a page for has its notebooks and its recipe
        if not (SOURCE / project / "index.md").exists(): atomic_write(SOURCE / project / "index.md", env.from_string(PLAIN).render(project=project) + "\n")


def assemble() -> None:
    """The whole source folder anew; executed copies stay where they are."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "_static", SOURCE / "_static")
    import plotly
    shutil.copyfile(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", SOURCE / "_static" / "plotly.min.js")
    names = {n.relative_to(ROOT / "nbs").with_suffix("").as_posix() for c in chapters() for n in notebooks(c)}
    for c in chapters():
        for n in notebooks(c): write_notebook(n, names)
    scorecard_pages(SOURCE / "_static" / "scorecards", SOURCE / "_static" / "references")
    write_api()
    write_pages()


# ---- 3. and 4. Sphinx, and a look ----

def sphinx(fresh: bool) -> int:
    """sphinx-build with docs/conf.py; the number it exits with."""
    if fresh: shutil.rmtree(HTML, ignore_errors=True)
    return subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "2", "-c", str(ROOT / "docs"), "-D", f"html_static_path={SOURCE / '_static'}", "-d", str(OUT / "doctrees"), *(["-E"] if fresh else []),
                           str(SOURCE), str(HTML)], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--jobs", type=int, default=2, help="notebooks executed at the same time")
    ask.add_argument("--as-is", action="store_true", help="execute nothing; notebooks without an executed copy are shown without results")
    ask.add_argument("--fresh", action="store_true", help="let Sphinx read everything anew")
    asked = ask.parse_args()
    try:
        if not asked.as_is: execute_all(asked.jobs)
        assemble()
    except UserError as e:
        print(f"make docs: {e}", file=sys.stderr)
        return 2
    code = sphinx(asked.fresh) or look_at_site(HTML, OUT / "pictures")
    if not code: print(f"the site: {HTML / 'index.html'}")
    return code


if __name__ == "__main__": sys.exit(main())
