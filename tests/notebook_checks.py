"""The notebook contract (DESIGN §3) as plain functions: each takes a path, returns a list of complaints, and can be tried on a bad notebook.

`python tests/notebook_checks.py` is the part that `make test` runs first: every notebook clean, kilobench/ in sync; the checkout is not touched.
"""
import ast
import filecmp
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("data", "model", "train", "evaluate", "counterfactual")
BY_HAND = {"__init__.py", "__main__.py"}  # nbdev cannot export these two


def notebooks(root=ROOT): return sorted(p for p in (root / "nbs").rglob("*.ipynb") if not any(x.startswith(".") for x in p.relative_to(root).parts))
def projects(root=ROOT): return sorted(p.parent.name for p in (root / "kilobench").glob("*/recipe.py") if p.parent.name != "core")
def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def src(cell): return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
def code(path): return [c for c in cells(path) if c["cell_type"] == "code" and src(c).strip()]
def exported(path): return [c for c in code(path) if re.search(r"^#\|\s*exporti?s?\b", src(c), re.M)]
def prose(path): return " ".join(src(c) for c in cells(path) if c["cell_type"] == "markdown")


def tree(cell):
    """The cell's syntax tree, IPython's own lines left out."""
    return ast.parse("\n".join("pass" if re.match(r"\s*[%!?]", line) else line for line in src(cell).splitlines()))


def head(cell): return repr(next((line for line in src(cell).splitlines() if line.strip() and not line.startswith("#|")), "")[:60])


def stage_of(path):
    """'train' for nbs/<project>/02_train.ipynb; '' for library and core notebooks."""
    m = re.fullmatch(r"\d\d_(\w+)", path.stem)
    return m.group(1) if m and m.group(1) in STAGES and path.parent.name not in ("core", "bench", "nbs") else ""


# ---- one notebook ----

def opening(path):
    first = [src(c) for c in cells(path)[:2] if c["cell_type"] == "markdown"]
    out = [] if first and re.match(r"# \S", first[0]) and re.search(r"^> \S", "\n".join(first), re.M) else ["does not open with '# Title' and '> one line'"]
    if exported(path):
        second = code(path)[0]
        if not re.fullmatch(r"#\|\s*default_exp\s+[\w.]+", src(second).strip()): out.append("its first code cell is not `#| default_exp module` alone")
    return out


def imports_apart(path):
    out = []
    for c in code(path):
        if "nbdev_export(" in src(c): continue
        kinds = {isinstance(n, ast.Import | ast.ImportFrom) for n in tree(c).body
                 if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) and not isinstance(n, ast.Pass)}
        if kinds == {True, False}: out.append(f"imports share a cell with other code: {head(c)}")
    return out


def parameters_cell(path):
    tagged = [c for c in code(path) if "parameters" in c["metadata"].get("tags", [])]
    if not stage_of(path) and not tagged: return []
    if len(tagged) != 1: return [f"{len(tagged)} cells tagged parameters; a stage notebook has one"]
    out, values = [], {}
    for n in tree(tagged[0]).body:
        try: values[n.targets[0].id] = ast.literal_eval(n.value)
        except (AttributeError, ValueError): out.append(f"parameters cell: not a flat `name = value`: {ast.unparse(n)[:60]!r}"); continue
        if not isinstance(values[n.targets[0].id], str | int | float | bool): out.append(f"parameters cell: {n.targets[0].id} is no scalar")
    if stage_of(path):
        for name, value in {"preset": "smoke", "run_dir": "", "overrides": ""}.items():
            if values.get(name, 0) != value: out.append(f"parameters cell: {name} must be there and be {value!r}")
    return out


def run_section(path):
    if not (stage := stage_of(path)): return []
    at = [i for i, c in enumerate(cells(path)) if c["cell_type"] == "markdown" and re.search(r"^## Run\b", src(c), re.M)]
    if len(at) != 1: return [f"{len(at)} '## Run' sections; a stage notebook has one"]
    rest = cells(path)[at[0] + 1:]
    out = [] if any("parameters" in c["metadata"].get("tags", []) for c in rest) else ["the parameters cell is not in '## Run'"]
    called = {n.func.id for c in rest if c["cell_type"] == "code" for n in ast.walk(tree(c)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    if not {"open_run", stage} <= called: out.append(f"'## Run' does not call open_run(…) and {stage}(run)")
    if any("#| export" in src(c) for c in rest): out.append("exports code after '## Run'")
    return out


def no_output(path):
    out = [f"holds output or an execution count: {head(c)}" for c in code(path) if c["outputs"] or c["execution_count"] is not None]
    if path.stat().st_size > 300_000: out.append(f"{path.stat().st_size // 1000} kB; pictures belong in outputs/")
    return out


def headless(path):
    """A stage notebook runs under papermill, which knows no nbdev directive: the smoke preset runs the very same path."""
    out = [f"a test branch: {head(c)}" for c in code(path) if re.search(r"\bif\s+(not\s+)?(IN_)?(TEST|SMOKE)\b", src(c))]
    if stage_of(path):
        out += [f"a flag that papermill ignores: {head(c)}" for c in code(path) if re.search(r"^#\|\s*(slow|cuda|network|eval:\s*false)\b", src(c), re.M)]
        out += [f"a cell that writes kilobench/ from a stage: {head(c)}" for c in code(path) if "nbdev_export(" in src(c)]
    return out


def no_working_directory(path):
    """Paths resolve from the project root or the run folder (exported core code is free: the command line takes relative paths)."""
    out = []
    for c in code(path):
        if path.parent.name == "core" and c in exported(path): continue
        for n in ast.walk(tree(c)):
            if not isinstance(n, ast.Call): continue
            if re.fullmatch(r"(Path|os)\.(cwd|getcwd|chdir)|getcwd|chdir", ast.unparse(n.func)): out.append(f"depends on the working directory: {ast.unparse(n)[:60]!r}")
            elif ast.unparse(n.func) in ("Path", "open", "pathlib.Path") and n.args and isinstance(n.args[0], ast.Constant) \
                    and isinstance(n.args[0].value, str) and re.match(r"(\.{1,2}/|outputs\b|nbs\b|shared\b|tests\b|/work\b|/home\b|/root\b)", n.args[0].value):
                out.append(f"a path from the working directory or one machine: {ast.unparse(n)[:60]!r}")
    return out


def rhythm(path):
    """A thought, a short exported cell, a lesson: lengths and proportions."""
    exp, all_code = exported(path), code(path)
    out = [f"an exported cell of {n} lines, 60 is the limit: {head(c)}" for c in exp if (n := sum(1 for line in src(c).splitlines() if line.strip())) > 60]
    if exp and len(all_code) - len(exp) < len(exp) / 2: out.append(f"{len(exp)} exported cells and only {len(all_code) - len(exp)} that use or show them")
    if exp and len(prose(path).split()) < 12 * len(exp): out.append(f"{len(prose(path).split())} words of prose for {len(exp)} exported cells")
    out += [f"a magic in exported code: {head(c)}" for c in exp if re.search(r"^\s*[%!]", src(c), re.M)]
    return out


def words(text): return set(re.findall(r"\w+", text))


def definitions(path):
    """Public and private functions and classes of the exported cells, as syntax trees."""
    return [n for c in exported(path) for n in tree(c).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]


@functools.cache
def shown(nbs):
    """Every name that a lesson cell uses, over all notebooks under `nbs`; itself, or through something that it uses."""
    lessons, inner = set(), {}
    for p in notebooks(nbs.parent):
        for c in code(p):
            if c not in exported(p): lessons |= words(src(c))
            else: lessons |= {w for n in tree(c).body if not isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom) for w in words(ast.unparse(n))}
        for n in definitions(p): inner.setdefault(n.name, set()).update(words(ast.unparse(n)))
    seen, todo = set(), lessons & inner.keys()
    while todo:
        seen |= todo
        todo = {w for name in todo for w in inner[name]} & inner.keys() - seen
    return seen


def names_used(path):
    """Each public name is shown used, by a lesson cell or through something that a lesson cell uses; a command registers itself."""
    nbs = next(p for p in path.parents if p.name == "nbs")
    names = [n.name for n in definitions(path) if not n.name.startswith("_")
             and not any(re.search(r"\bpatch|\.command\(|\.callback\(", ast.unparse(d)) for d in n.decorator_list)]
    return [f"{name} is public, and no lesson cell uses it or anything that uses it" for name in names if name not in shown(nbs)]


NOTEBOOK_CHECKS = (opening, imports_apart, parameters_cell, run_section, no_output, headless, no_working_directory, rhythm, names_used)


# ---- the library ----

def floors(path, root=ROOT):
    """core imports no project, no project another."""
    room, out, text = path.relative_to(root / "kilobench").parts[0], [], path.read_text(encoding="utf-8")
    for n in ast.walk(ast.parse(text)):
        names = [a.name for a in n.names] if isinstance(n, ast.Import) else []
        if isinstance(n, ast.ImportFrom):  # from ..renderer.data import x, written relative by nbdev
            base = list(path.relative_to(root).with_suffix("").parts[:-n.level]) if n.level else []
            names = [".".join(base + [n.module or a.name]) for a in n.names]
        for other in {m.group(1) for name in names if (m := re.match(r"kilobench\.(\w+)", name))}:
            if other in projects(root) and other != room: out.append(f"{room} imports the project {other}")
    return out


def plain_code(path, root=ROOT):
    """No leftovers, no swallowed errors, no unsafe loading."""
    out = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", line): out.append(f"line {i}: unfinished: {line.strip()[:60]!r}")
        if re.search(r"except(\s+Exception)?\s*:\s*(pass|continue)?\s*$", line) and "noqa" not in line: out.append(f"line {i}: a broad except: {line.strip()[:60]!r}")
        if re.search(r"torch\.load\((?!.*weights_only\s*=\s*True)|\bpickle\.load|\byaml\.load\((?!.*\b(_|Safe|CSafe)Loader\b)|allow_pickle\s*=\s*True", line):
            out.append(f"line {i}: unsafe loading: {line.strip()[:60]!r}")
    return out


def docstrings(path, root=ROOT):
    top = ast.parse(path.read_text(encoding="utf-8")).body
    public = [n for n in top if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    inner = [m for n in public if isinstance(n, ast.ClassDef) for m in ast.walk(n)
             if isinstance(m, ast.ClassDef) or isinstance(m, ast.FunctionDef) and not m.name.startswith("_") and len(m.body) > 4]
    return [f"{n.name} has no docstring" for n in [*public, *inner] if not ast.get_docstring(n)]


LIBRARY_CHECKS = (floors, plain_code, docstrings)


# ---- clean and in sync, on a copy ----

def copy_sources(root, goal):
    shutil.copytree(root / "nbs", goal / "nbs", ignore=shutil.ignore_patterns(".*"))
    (goal / "kilobench").mkdir(parents=True)
    for name in ("settings.ini", "kilobench/__init__.py"): shutil.copy(root / name, goal / name)
    return goal


def nbdev(command, cwd):
    done = subprocess.run([str(Path(sys.executable).parent / command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{command} failed: {(done.stderr or done.stdout)[-400:]}")


def dirty(root=ROOT):
    """Notebooks that nbdev_clean would change."""
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_sources(root, Path(tmp) / "copy")
        nbdev("nbdev_clean", copy)
        return [str(p.relative_to(root)) for p in notebooks(root) if p.read_bytes() != (copy / p.relative_to(root)).read_bytes()]


def out_of_sync(root=ROOT):
    """Files under kilobench/ that a fresh nbdev_export writes otherwise, misses or would not write at all."""
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_sources(root, Path(tmp) / "copy")
        nbdev("nbdev_export", copy)
        ours, fresh = ({str(p.relative_to(d)) for p in (d / "kilobench").rglob("*.py")} for d in (root, copy))
        differ = {f for f in ours & fresh if not filecmp.cmp(root / f, copy / f, shallow=False)}
        return sorted(differ | (fresh - ours) | {f for f in ours - fresh if Path(f).name not in BY_HAND})


def main():
    bad = [f"{f}: not clean; run nbdev_clean" for f in dirty()] + [f"{f}: not what the notebooks export; run nbdev_export" for f in out_of_sync()]
    for line in bad: print(line, file=sys.stderr)
    if not bad: print(f"{len(notebooks())} notebooks clean, kilobench/ in sync")
    return 1 if bad else 0


if __name__ == "__main__": sys.exit(main())
