"""An executed notebook as a page: nbdev's directives taken out, exported code marked, outputs trimmed, plotly drawn from the site itself."""
import base64
import copy
import html
import json
import os
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = re.compile(r"^#\|\s*(?:slow|cuda|network|eval:\s*false)\b", re.M)      # nbdev_test leaves these out, so does the site
HIDDEN = re.compile(r"^#\|\s*(?:hide|default_exp)\b", re.M)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
EXPORTED = re.compile(r"^#\|\s*exporti?s?\b", re.M)
IMPORTS = re.compile(r"\A(?:\s*(?:from\s+\S+\s+import\s+(?:\([^)]*\)|[^\n]*(?:\\\n[^\n]*)*)|import\s+[^\n]+|#[^\n]*)(?:\n|\Z))+\s*\Z")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FIRST, LAST = 4, 10     # lines of a long log that stay


def without_skipped(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook in which the cells that nbdev_test would leave out are left out by papermill as well."""
    nb = copy.deepcopy(nb)
    for c in nb.cells:
        if c.cell_type == "code" and NOT_RUN.search(c.source): c.metadata.setdefault("tags", []).append("skip-execution")
    return nb


def plain_title(notebook: Path) -> str:
    """'Recipe' for nbs/core/00_recipe.ipynb: what its first heading says."""
    return heading(nbformat.read(notebook, 4)) or notebook.stem


def heading(nb: nbformat.NotebookNode) -> str:
    found = (re.match(r"#\s+(.+)", c.source) for c in nb.cells if c.cell_type == "markdown")
    return next((m.group(1).strip() for m in found if m), "")


def page(nb: nbformat.NotebookNode, where: Path, names: set[str]) -> nbformat.NotebookNode:
    """The notebook as the site shows it. where: its path under nbs/; names: all pages, 'core/05_training', that prose may name."""
    cells = [shown for c in nb.cells if (shown := _cell(c, where, names))]
    out = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}, "language_info": {"name": "python"}})
    module = next((m.group(1) for c in nb.cells if (m := re.match(r"#\|\s*default_exp\s+(\S+)", c.source))), "")
    if out.cells and module:
        out.cells[0].source = re.sub(r"\A(#\s.+)", rf"\1\n\n{{.kb-made}}\n[`kilobench.{module}`](/api/kilobench.{module}) is exported from this notebook, `nbs/{where.as_posix()}`.", out.cells[0].source, count=1)
    return out


def _cell(cell: nbformat.NotebookNode, where: Path, names: set[str]) -> nbformat.NotebookNode | None:
    """One cell of the page, or None where there is nothing to show."""
    if cell.cell_type != "code":
        cell = copy.deepcopy(cell)
        cell.source = linked(cell.source, where, names)
        return cell
    tags = cell.metadata.get("tags", [])
    if HIDDEN.search(cell.source) or "nbdev_export(" in cell.source or "injected-parameters" in tags: return None
    source = DIRECTIVE.sub("", cell.source).strip("\n")
    if not source: return None
    out = nbformat.v4.new_code_cell(source, id=cell.id, execution_count=None)
    kind = (["exported"] if EXPORTED.search(cell.source) else []) + (["hide-input"] if IMPORTS.match(source) else []) + (["parameters"] if "parameters" in tags else [])
    if kind: out.metadata["tags"] = kind
    out.outputs = outputs(cell.get("outputs", []))
    return out


# ---- prose ----

def linked(text: str, where: Path, names: set[str]) -> str:
    """Prose in which `core/05_training` and `01a_scores` are links to those pages, and a link to a notebook that is no page is its name."""
    def link(m: re.Match) -> str:
        said = m.group(1)
        word = said.removeprefix("nbs/").removesuffix(".ipynb")
        page = next((w for w in (word, f"{where.parent.as_posix()}/{word}") if w in names and w != where.with_suffix("").as_posix()), None)
        return f"[`{said}`](/{page}.ipynb)" if page else m.group(0)
    text = re.sub(r"(?<![\[`])`((?:[a-z]+/)*\d\d[a-z]?_\w+(?:\.ipynb)?)`(?![`\]])", link, text)
    def elsewhere(m: re.Match) -> str:
        target = os.path.normpath(where.parent / m.group(2))
        if target == "index": return f"[{m.group(1)}](/index.md)"
        return m.group(0) if target in names else f"{m.group(1)} (`nbs/{target}.ipynb`)"
    text = re.sub(r"\[([^\]\n]+)\]\((?!/|\w+:)([^)\s#]+)\.ipynb\)", elsewhere, text)
    return re.sub(r"^> (?=\S)", "> ", text, flags=re.M)


# ---- outputs ----

def outputs(given: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Printed lines in one block, trimmed; pictures, tables and plotly figures as they are; machine paths made short."""
    printed, out = "", []
    for o in given:
        if o.output_type == "stream": printed += o.text
        elif o.output_type == "error": out.append(o)
        elif data := _data(o.data): out.append(nbformat.v4.new_output("display_data", data=data))
    if lines := log_lines(printed): out.insert(0, nbformat.v4.new_output("stream", name="stdout", text="\n".join(lines) + "\n"))
    return out


def log_lines(printed: str) -> list[str]:
    """What a terminal would show in the end: carriage returns obeyed, escapes dropped, a long middle replaced by its number of lines."""
    lines = [shorter(ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2].rstrip())) for line in printed.split("\n")]
    lines = [line for line in lines if line]
    if len(lines) > FIRST + LAST + 1: lines = [*lines[:FIRST], f"… {len(lines) - FIRST - LAST} lines more …", *lines[-LAST:]]
    return lines


def shorter(text: str) -> str:
    """Without the folder of this checkout and the names of temporary folders."""
    text = text.replace(f"{ROOT}/outputs/docs/runs/", "outputs/").replace(f"{ROOT}/", "")
    return re.sub(r"/tmp/(?:tmp\w+|kilobench-[\w-]+)", "/tmp/…", text)


def _data(data: dict) -> dict:
    """The MIME bundle of an output for the site; plotly's own type becomes a block that kilobench.js draws."""
    if figure := data.get("application/vnd.plotly.v1+json"):
        packed = base64.b64encode(json.dumps({k: figure[k] for k in ("data", "layout") if k in figure}).encode()).decode()
        still = f'<img src="data:image/png;base64,{data["image/png"]}" alt="the figure, still">' if "image/png" in data else ""
        return {"text/html": f'<div class="kb-plotly" data-figure="{packed}">{still}</div>'}
    data = {k: v for k, v in data.items() if k in ("text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/plain")}
    if "text/plain" in data: data["text/plain"] = shorter(str(data["text/plain"]))
    if "text/html" in data: data["text/html"] = shorter(str(data["text/html"]))
    return data


def escaped(text: str) -> str: return html.escape(text, quote=True)
