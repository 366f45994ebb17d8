"""JupyterLab and the apps in a real chromium: notebooks run, controls move, pictures follow, a training stops by its button, and no page asks anybody but this machine.

Screenshots and response times are left in $KILOBENCH_OUTPUTS/browser/. Needs chromium on the PATH (or $KILOBENCH_CHROMIUM) and playwright."""
import json
import re
import shlex
import shutil
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("playwright")

from browser import answer_ms, at_work, chromium, chromium_path, finished, menu, move, pictures, run_all, server, strangers, watch
from kilobench.core.run import outputs_dir, read_json
from project_runs import SERIES, smoke_run

pytestmark = pytest.mark.skipif(not chromium_path(), reason="no chromium on the PATH")
ROOT = Path(__file__).resolve().parents[1]
SHOTS = outputs_dir() / "browser"
MOVES = {"renderer": ["colour", "count"], "kilonerf": ["azimuth", "distance"], "design": ["goal", "seed"], "pbr": ["turn", "material"], "wan": ["colour", "seed", "evaluations"]}
TIMES = {}


@pytest.fixture(scope="module")
def chrome():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with chromium() as open_page: yield open_page
    (SHOTS / "milliseconds.json").write_text(json.dumps(TIMES, indent=1))


@pytest.fixture
def browser(chrome, request):
    """open(url) → page; what a failed test leaves open is photographed."""
    yield chrome
    for k, page in enumerate(chrome.context.pages):
        page.screenshot(path=SHOTS / f"failed-{request.node.name}-{k}.png")
        page.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """One JupyterLab for all, started as `make lab` starts it, over a copy of the notebooks: (folder, first address, path → address)."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns(".*"))
    recipe = shlex.split(re.search(r"^lab:.*\n\t@\$\(BIN\)/(jupyter lab .*)$", (ROOT / "Makefile").read_text(), re.M)[1])
    for_tests = ["--no-browser", "--allow-root", "--ServerApp.port=0", "--LabApp.extension_manager=readonly"]
    with server(*recipe, *for_tests, home=home, says=r"(http://127\.0\.0\.1:\d+)(/lab\S*)\?token=(\w+)", KILOBENCH_OUTPUTS=str(SERIES)) as found:
        base, first, token = found.groups()
        yield home / "nbs", f"{base}{first}?token={token}", lambda path: f"{base}/lab/tree/nbs/{path}?token={token}&reset"


def write(folder, name, *cells):
    spec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": spec}), folder / name)
    return name


def leave(page):
    """The page had no fault of its own and asked nobody but this machine; its kernel is ended."""
    assert not strangers(page) and not page.faults, (strangers(page), page.faults)
    if page.locator(".lm-MenuBar").count(): menu(page, "Kernel", "Shut Down Kernel")
    page.close()


def test_make_lab_opens_the_index(lab, browser):
    page = browser(lab[1])
    page.locator(".jp-Notebook").get_by_role("heading", name="kilobench").first.wait_for()
    assert page.locator(".lm-TabBar-tabLabel", has_text="index.ipynb").count() == 1
    page.screenshot(path=SHOTS / "index.png")
    leave(page)


@pytest.mark.parametrize("project", MOVES)
def test_a_counterfactual_notebook_answers(lab, browser, project, monkeypatch):
    "Open, run all, move controls, see the pictures change; they stay the same elements of the page, so nothing flickers."
    smoke_run(project, monkeypatch)
    page = browser(lab[2](f"{project}/04_counterfactual.ipynb"))
    run_all(page)
    explorer = page.locator(".kilobench-explorer").first
    explorer.locator("img").first.wait_for()
    finished(page)
    assert re.search(r"\[\d+\]", page.locator(".jp-CodeCell .jp-InputPrompt").last.inner_text())      # no error before it
    explorer.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / f"{project}.png")
    watch(explorer)
    for name in MOVES[project]:
        before = pictures(explorer)
        move(explorer, name)
        TIMES[f"{project}: {name}"] = answer_ms(explorer)
        assert len(pictures(explorer)) == len(before) and pictures(explorer) != before
    assert explorer.locator("img[data-first]").count() == explorer.locator("img").count() > 0
    page.screenshot(path=SHOTS / f"{project}-moved.png")
    leave(page)


EXPLORER = """
import threading, time
from pathlib import Path
import numpy as np
from kilobench.core.explore import Explorer
there = []
def render(n): time.sleep(0.15); return {"teacher": np.full((32, 32, 3), 2 * n, np.uint8), "now": n}
e = Explorer({"n": (0, 100)}, render, needs=lambda: "" if there else "no student is trained yet: run 02_train")
e
"""


def test_a_busy_kernel_answers_too_and_the_last_change_wins(lab, browser):
    page = browser(lab[2](write(lab[0], "busy.ipynb", EXPLORER, "there.append(1); begin = time.monotonic()\nwhile not Path('go').exists() and time.monotonic() < begin + 100: time.sleep(0.05)")))
    run_all(page)
    explorer = page.locator(".kilobench-explorer")
    handle = explorer.locator(".noUi-handle")
    explorer.get_by_text("no student is trained yet: run 02_train").wait_for()
    page.screenshot(path=SHOTS / "no-student.png")
    for _ in range(7): handle.press("ArrowRight")
    explorer.get_by_text("now: 7", exact=True).wait_for()                       # while the second cell is still at work
    assert at_work(page) and explorer.locator("img").count() == 1
    page.screenshot(path=SHOTS / "busy.png")
    for _ in range(3): handle.press("ArrowLeft")
    (lab[0] / "go").touch()
    explorer.get_by_text("now: 4", exact=True).wait_for()
    finished(page)
    assert explorer.get_by_text("now: 4", exact=True).count() == 1
    leave(page)


TRAINING = """
from typing import ClassVar
import torch
from torch import nn
from kilobench.core.recipe import Recipe, TrainPart
from kilobench.core.run import Run
from kilobench.core.training import Strips, TensorData, fit
class Toy(Recipe):
    project: ClassVar[str] = "toy"
    presets: ClassVar[dict] = {"smoke": {}, "cpu": {}, "full": {}}
    train: TrainPart = TrainPart(steps=1_000_000, batch=16, log_every=20, save_every=100_000)
x = torch.linspace(-1, 1, 64)[:, None]
fit(Run.open(Toy.make(), RUN), "net", nn.Linear(1, 1), lambda m, b, step: {"l2": (m["net"](b["x"]) - b["y"]).square().mean()}, TensorData(x=x, y=x.sin()), Toy.make().train,
    callbacks=[Strips(400, lambda m: torch.cat([x, m["net"](x)], 1).T.repeat_interleave(8, 0).expand(3, -1, -1) / 2 + 0.5)])
"""


def test_a_training_is_watched_and_stopped_by_its_button(lab, browser, tmp_path):
    page = browser(lab[2](write(lab[0], "training.ipynb", f"RUN = {str(tmp_path / 'run')!r}" + TRAINING, "'never run'")))
    run_all(page)
    view = page.locator(".kilobench-training")
    for k in range(2): view.locator("img").nth(k).wait_for()                     # the curve, and a strip
    view.get_by_text(re.compile(r"net: step \d+ of 1000000, .* a second, .* left, loss")).wait_for()
    page.screenshot(path=SHOTS / "training.png")
    view.get_by_role("button", name="Stop").click()
    finished(page)
    said = page.locator(".jp-OutputArea-output").get_by_text(re.compile("stopped by the Stop button"))
    text = said.inner_text()
    step = int(re.fullmatch(r"net: stopped by the Stop button at step (\d+) of 1000000, checkpoint saved; start again to go on", text.strip())[1])      # and no traceback
    assert read_json(tmp_path / "run" / "checkpoints" / "net" / "last" / "state.json")["step"] == step
    assert not view.count() and page.locator(".jp-OutputArea .jp-RenderedImage img").count() == 1       # what stays is a still picture
    page.screenshot(path=SHOTS / "training-stopped.png")
    menu(page, "Run", "Run All Cells")                                           # and it goes on
    page.get_by_text(re.compile(r"net: step \d{3,} of 1000000")).first.wait_for()
    view.get_by_role("button", name="Stop").click()
    finished(page)
    assert int(re.search(r"step (\d+)", said.inner_text())[1]) > step
    leave(page)


def test_an_app_is_the_explorer_of_the_reference(browser, tmp_path):
    with server("kilobench", "app", "renderer", "--no-browser", home=tmp_path, says=r"student: (\S+)\n(http://127\.0\.0\.1:\d+/)", KILOBENCH_OUTPUTS=str(tmp_path / "outputs")) as found:
        assert found[1].endswith("outputs/reference/renderer/cpu/slots.safetensors")
        for _ in range(100):
            try: page = browser(found[2]); break
            except Exception as e: refused = e; assert "ERR_CONNECTION_REFUSED" in str(e)
        else: raise refused
        explorer = page.locator(".kilobench-explorer")
        explorer.locator("img").first.wait_for()
        watch(explorer)
        before = pictures(explorer)
        move(explorer, "shape")
        TIMES["app renderer: shape"] = answer_ms(explorer)
        assert len(before) == 3 and pictures(explorer) != before and "procedural teacher" in page.inner_text("body")
        page.screenshot(path=SHOTS / "app-renderer.png")
        leave(page)
