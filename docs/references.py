"""What the pages show of the committed references: a picture, a few rows of the bench, the whole scorecard. No figure is typed by hand."""
import html
import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from kilobench.core.recipe import UserError, find_projects, load_recipe_class
from kilobench.core.run import reference_dir
from kilobench.core.scorecard import Picture, Report, finite, full_label, headlines, load_picture, number, render_page, unit

PRESET = "cpu"


def _home(project: str) -> Path: return reference_dir(project, PRESET)


class _Folder:
    """As much of a run folder as `load_picture` asks for."""
    def __init__(self, home: Path): self.home = home
    def path(self, *parts: str) -> Path: return self.home.joinpath(*parts)


def scorecard_pages(cards: Path, pictures: Path) -> None:
    """Each reference's scorecard as the page that a run writes, and its pictures, into two folders of static files."""
    cards.mkdir(parents=True, exist_ok=True)
    for project in find_projects():
        home = _home(project)
        if not (home / "report.json").exists(): continue
        found = [load_picture(_Folder(home), Picture(title=_words(f), path=f"figures/{f.name}", hero=False)) for f in sorted((home / "figures").glob("*.png"))]
        (cards / f"{project}.html").write_text(render_page(Report.load(home), found, json.loads((home / "manifest.json").read_text()), name=PRESET), encoding="utf-8")
        shutil.copytree(home / "figures", pictures / project)


def _words(file: Path) -> str: return file.stem.replace("-", " ").capitalize()


def picture(project: str, name: str, caption: str) -> str:
    """A picture of a reference as a figure; a name that is not there stops the build."""
    if not (_home(project) / "figures" / name).is_file(): raise UserError(f"docs/pages: the reference of {project} has no picture {name}")
    return f":::{{figure}} /_static/references/{project}/{name}\n:alt: {caption}\n:class: kb-wide\n\n{caption}\n:::"


def gallery(project: str, stage: str, source: str = "") -> str:
    """For the pages of 03_evaluate and 04_counterfactual: what the committed run drew there and the notebook's own cells (source) do not show, as a last section; '' elsewhere."""
    if not stage.endswith(("evaluate", "counterfactual")): return ""
    drawn = [f for f in sorted((_home(project) / "figures").glob("*.png")) if f.name.startswith("what-if") == stage.endswith("counterfactual")]
    named = re.findall(r"[\"']([\w*.-]+\.png)[\"']", source)
    found = [f for f in drawn if not any(fnmatch(f.name, n) for n in named)]
    if not found: return ""
    head, line = (("The committed run", "The same pictures from the reference of the `{}` preset, in place of the toy's above.") if len(found) == len(drawn)
                  else ("More of the committed run", "What else the reference of the `{}` preset drew."))
    return "\n\n".join([f"## {head}", line.format(PRESET), *(picture(project, f.name, _words(f)) for f in found)])


def verdict(project: str) -> str: return Report.load(_home(project)).verdict


def tiles(project: str) -> str:
    """The four large numbers of a scorecard."""
    lines = [f"<div><dt>{html.escape(h['label'])}<span>{html.escape(h['beside'])}</span></dt><dd>{html.escape(h['value'])}</dd></div>" for h in headlines(Report.load(_home(project)))]
    return '<dl class="kb-tiles">' + "".join(lines) + "</dl>"


def board(project: str, rows: list[str], metrics: list[str], up: str = "") -> str:
    """A few rows and metrics of a reference as a table, its ceilings below, and the way to the whole card. up: '../' from a page one folder down."""
    report = Report.load(_home(project))
    known = {r.name: r for r in report.rows}
    if unknown := [r for r in rows if r not in known] + [m for m in metrics if not any(m in r.metrics or m in r.cost for r in report.rows)]:
        raise UserError(f"docs/pages: the reference of {project} has no {unknown[0]!r}")
    value = lambda r, m: number(r.metrics.get(m, r.cost.get(m)), suffix=unit(m)) if (m in r.metrics or m in r.cost) else "–"
    head = "".join(f"<th>{html.escape(full_label(m))}</th>" for m in metrics)
    body = "".join(f'<tr class="kb-{known[n].role}"><th><i></i>{html.escape(n)}<span>{known[n].role}</span></th>' + "".join(f"<td>{value(known[n], m)}</td>" for m in metrics) + "</tr>" for n in rows)
    tops = [(m, c) for m in metrics if (c := report.data.ceilings.get(m) or report.data.ceilings.get(m.split("/")[0])) and finite(c.value) is not None]
    foot = f'<tr class="kb-ceiling"><th>ceiling</th>{"".join("<td>" + next((number(c.value, suffix=unit(k)) for k, c in tops if k == m), "") + "</td>" for m in metrics)}</tr>' if tops else ""
    good = "kb-good" if report.good else "kb-bad"
    return (f'<div class="kb-board"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}{foot}</tbody></table>'
            f'<p><b class="{good}">{html.escape(report.verdict)}</b> · <a href="{up}_static/scorecards/{project}.html">the whole scorecard</a>, with controls, costs, what-ifs and protocol</p></div>')


def recipe_table(project: str) -> str:
    """Every field of a recipe: its value in each preset, and what it means."""
    made = {p: {name: (value, about) for name, value, _, about in load_recipe_class(project).make(p, {}).table()} for p in load_recipe_class(project).presets}
    cell = lambda v: html.escape(str(v))
    lines = [f"<tr><th><code>{cell(name)}</code></th>{''.join(f'<td>{cell(made[p][name][0])}</td>' for p in made)}<td>{cell(about)}</td></tr>" for name, (_, about) in next(iter(made.values())).items()]
    return '<div class="kb-recipe"><table><thead><tr><th>field</th>' + "".join(f"<th>{cell(p)}</th>" for p in made) + '<th>meaning, unit</th></tr></thead><tbody>' + "".join(lines) + "</tbody></table></div>"


FILLERS = {"picture": picture, "tiles": tiles, "board": board, "verdict": verdict, "recipe_table": recipe_table}
