"""The docs site's own parts: what a page keeps of a notebook, docstrings as reStructuredText, figures from references. The whole site is built and looked at by `make docs`."""
import ast
import base64
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from docutils.core import publish_doctree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import conf  # noqa: E402
import references  # noqa: E402
from convert import FIRST, LAST, linked, log_lines, outputs, page, without_skipped  # noqa: E402

from kilobench.core.recipe import UserError, find_projects  # noqa: E402
from kilobench.core.scorecard import Report  # noqa: E402

new, code, prose = nbformat.v4.new_output, nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell


def page_of(*cells, names=frozenset({"core/05_training"})): return page(nbformat.v4.new_notebook(cells=list(cells)), Path("core/00_x.ipynb"), names)


def test_a_page_keeps_what_is_read():
    injected = code("preset = 'smoke'\nrun_dir = '/tmp/x'")
    injected.metadata["tags"] = ["injected-parameters"]
    shown = page_of(prose("# Title\n\n> line"), code("#| default_exp core.x"), code("#| export\nimport json\nfrom os import (path,\n  sep)"), code("#| export\ndef f(): return 1"), code("f()"),
                    code("#| hide\nassert f()"), injected, code("#| hide\nimport nbdev; nbdev.nbdev_export()")).cells
    assert [c.source.splitlines()[0] for c in shown] == ["# Title", "import json", "def f(): return 1", "f()"]
    assert [c.metadata.get("tags", []) for c in shown] == [[], ["exported", "hide-input"], ["exported"], []]
    assert "[`kilobench.core.x`](/api/kilobench.core.x)" in shown[0].source


def test_cells_that_nbdev_test_leaves_out_are_left_out():
    nb = nbformat.v4.new_notebook(cells=[code("#| cuda\nrun()"), code("#| eval: false\nrun()"), code("run()")])
    assert [c.metadata.get("tags", []) for c in without_skipped(nb).cells] == [["skip-execution"], ["skip-execution"], []] and "tags" not in nb.cells[0].metadata


def test_prose_links_to_pages_that_are_there():
    names = {"core/05_training", "core/04a_muon"}
    assert linked("see `core/05_training` and `04a_muon`, not `core/99_none`", Path("core/06_metrics.ipynb"), names) == \
        "see [`core/05_training`](/core/05_training.ipynb) and [`04a_muon`](/core/04a_muon.ipynb), not `core/99_none`"
    assert linked("`05_training`", Path("core/05_training.ipynb"), names) == "`05_training`", "no page links to itself"
    assert linked("[speed](../bench/x_speed.ipynb), [home](../index.ipynb), [muon](04a_muon.ipynb)", Path("core/06_metrics.ipynb"), names) == \
        "speed (`nbs/bench/x_speed.ipynb`), [home](/index.md), [muon](04a_muon.ipynb)", "bench is no part of the site"
    assert linked("[`core/05_training`](x)", Path("core/06_metrics.ipynb"), names) == "[`core/05_training`](x)"


def test_a_log_is_what_a_terminal_shows_in_the_end():
    assert log_lines("10 %\r50 %\r100 %\n\x1b[31mred\x1b[0m\n\n/tmp/tmpab12/x\n") == ["100 %", "red", "/tmp/…/x"]
    long = log_lines("\n".join(f"line {i}" for i in range(40)))
    assert len(long) == FIRST + LAST + 1 and long[FIRST] == f"… {40 - FIRST - LAST} lines more …" and long[-1] == "line 39"


def test_outputs_are_one_log_and_then_what_was_shown():
    figure = {"data": [{"type": "bar"}], "layout": {}, "config": {"plotlyServerURL": "https://plot.ly"}}
    given = [new("stream", text="a\n"), new("display_data", data={"image/png": "QUJD", "text/plain": "x"}), new("stream", text="b\n"),
             new("display_data", data={"application/vnd.plotly.v1+json": figure, "text/html": "<script src='https://cdn'></script>"}),
             new("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "1"}})]
    log, picture, drawn = outputs(given)
    assert log.text == "a\nb\n" and picture.data["image/png"] == "QUJD" and "https" not in drawn.data["text/html"]
    packed = drawn.data["text/html"].split('data-figure="')[1].split('"')[0]
    assert json.loads(base64.b64decode(packed)) == {"data": [{"type": "bar"}], "layout": {}}


@pytest.mark.parametrize("text", ["One line: `a*b*c` and 2*x_ |y| `k`s.", "First.\n\n`x`: [B, 3]\nname_: a *star and a `literal``", "{dice, colour}, `part.teach` of *all*_", "a \\ back `slash`"])
def test_docstrings_become_text_without_a_complaint(text):
    lines = conf.as_rst(text.split("\n"))
    tree = publish_doctree("\n".join(lines), settings_overrides={"report_level": 5, "halt_level": 5})
    assert not [n for n in tree.findall() if n.tagname in ("system_message", "problematic", "emphasis", "reference", "substitution_reference")]


def test_every_docstring_of_the_package_does():
    bad = []
    for f in sorted((ROOT / "kilobench").glob("*/*.py")):
        nodes = [n for n in ast.walk(ast.parse(f.read_text(encoding="utf-8"))) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        lines = [line for n in nodes for line in [*conf.as_rst((ast.get_docstring(n) or "").split("\n")), ""]]
        tree = publish_doctree("\n".join(lines), settings_overrides={"report_level": 5, "halt_level": 5})
        bad += [f"{f.stem}: {n.astext()[:200]}" for n in tree.findall() if n.tagname in ("system_message", "problematic")]
    assert not bad


def test_figures_come_from_reports_and_nowhere_else():
    with pytest.raises(UserError, match="'no such row'"): references.board("renderer", ["no such row"], ["psnr/iid"])
    with pytest.raises(UserError, match="'no_metric'"): references.board("renderer", ["slots"], ["no_metric"])
    with pytest.raises(UserError, match="no picture x.png"): references.picture("renderer", "x.png", "")
    shown = references.board("renderer", ["teacher", "slots"], ["psnr/iid"])
    value = Report.load(references._home("renderer")).values("slots")["psnr/iid"]
    assert f"{value:.1f} dB" in shown and 'class="kb-student"' in shown


def test_pages_are_filled_without_a_gap(tmp_path, monkeypatch):
    import build
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    build.write_pages()
    home = (tmp_path / "index.md").read_text()
    assert "{{" not in home and home.count("kb-board") == len(find_projects()) and all(f"{p}/index" in home for p in find_projects())
    assert set((tmp_path / "howto" / "index.md").read_text().split("```")[1].split("\n\n")[1].split()) == {p.stem for p in (tmp_path / "howto").glob("*.md")} - {"index"}


def test_the_scorecards_of_the_site_are_whole(tmp_path):
    references.scorecard_pages(tmp_path / "cards", tmp_path / "pictures")
    assert {f.stem for f in (tmp_path / "cards").glob("*.html")} == set(find_projects())
    assert all("data:image/png" in (text := f.read_text()) and "cannot be shown" not in text for f in (tmp_path / "cards").glob("*.html"))


def test_every_formula_becomes_mathml():
    """A macro that the converter does not know stays in the output as text with a backslash."""
    import mathml
    bad = []
    for f in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for c in nbformat.read(f, 4).cells:
            if c.cell_type != "markdown" or ".ipynb_checkpoints" in f.parts: continue
            text = re.sub(r"```.*?```|`[^`]*`", "", c.source, flags=re.S)
            bad += [f"{f.name}: {formula}" for formula in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, flags=re.S) for said in [mathml._mathml("".join(formula), "inline")] if "\\" in said or "<math" not in said]
    assert not bad


def test_a_picture_that_the_notebook_shows_is_not_shown_again():
    whole = references.gallery("design", "03_evaluate")
    some = references.gallery("design", "03_evaluate", 'Image(filename=home / "figures" / "the-four-scores.png"); next(home.glob("designs-*.png"))')
    assert all(n in whole for n in ("the-four-scores.png", "designs-taken-apart.png", "searching-the-noise.png")) and "more" not in whole.lower().splitlines()[0]
    assert "searching-the-noise.png" in some and "the-four-scores" not in some and "designs-taken" not in some and some.startswith("## More")
    assert references.gallery("design", "03_evaluate", '"*.png"') == references.gallery("design", "02_train") == ""
