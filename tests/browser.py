"""A real JupyterLab and a real chromium for tests: start them, open a notebook, run it, move a control, wait for the picture."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

WAIT = float(os.environ.get('KILOBENCH_BROWSER_WAIT', 120))     # seconds after which a test that hangs fails
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}, "docmanager-extension/plugin": {"autosave": False}}


def chromium_path() -> str:
    """The browser: $KILOBENCH_CHROMIUM, or one on the PATH; "" where there is none."""
    return os.environ.get("KILOBENCH_CHROMIUM", "") or next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), "")


def settings_in(folder: Path) -> Path:
    """JupyterLab's user settings for tests: nobody asks about news, nothing is saved by itself."""
    for name, values in SETTINGS.items():
        file = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return folder


@contextmanager
def server(*args: str, home: Path, says: str, **env: str):
    """`python -m ARGS…` with Jupyter's folders under `home`; yields the match of `says` in what it prints. Ended by SIGTERM."""
    own = {f"JUPYTER_{n}_DIR": str(home / n.lower()) for n in ("RUNTIME", "CONFIG", "DATA")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(settings_in(home / "settings")), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "IPYTHONDIR": str(home / "ipython")}
    log = home / "server.log"
    with log.open("w") as out:
        p = subprocess.Popen([sys.executable, "-u", "-m", *args], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | own | {"KILOBENCH_HEADLESS": "0"} | env, cwd=home)
    try:
        end = time.monotonic() + WAIT
        while not (found := re.search(says, log.read_text())):
            assert p.poll() is None and time.monotonic() < end, f"{args}: did not start\n{log.read_text()[-2000:]}"
            time.sleep(0.1)
        yield found
    finally:
        p.terminate()
        try: p.wait(30)
        except subprocess.TimeoutExpired: p.kill(); p.wait()


@contextmanager
def chromium():
    """A headless chromium; yields open(url) → a page that remembers its requests (`.asked`) and its errors (`.faults`); `open.context` has the pages."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox", "--disable-background-networking", "--disable-component-update"])
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        context.set_default_timeout(1000 * WAIT)
        def open_page(url: str):
            page = context.new_page()
            page.asked, page.faults = [], []
            page.on("request", lambda r: page.asked.append(r.url))
            page.on("websocket", lambda w: page.asked.append(w.url))
            page.on("pageerror", lambda e: page.faults.append(str(e)))
            page.goto(url, wait_until="commit")
            return page
        open_page.context = context
        try: yield open_page
        finally: browser.close()


def strangers(page) -> list[str]:
    """Requests of a page that did not go to this machine."""
    return [u for u in page.asked if urlsplit(u).scheme not in ("data", "blob") and urlsplit(u).hostname != "127.0.0.1"]


# ---- JupyterLab ----

def kernel_is(page, state: str) -> None:
    """Wait until the status bar says that the kernel is Idle or Busy; with widgets about it may say Idle while a cell runs."""
    page.locator("#jp-main-statusbar").get_by_text(f"| {state}").wait_for()


def at_work(page) -> bool:
    """Is a cell running or waiting, by its prompt?"""
    return page.locator(".jp-InputPrompt", has_text="[*]").count() > 0


def finished(page) -> None:
    """Wait until no cell is running or waiting."""
    page.wait_for_function("() => ![...document.querySelectorAll('.jp-InputPrompt')].some(p => p.textContent.includes('[*]'))")


def menu(page, name: str, entry: str) -> None:
    """Click an entry of JupyterLab's menu bar."""
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{name}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()


def run_all(page) -> None:
    """Run All Cells of the open notebook; returns when one of them is at work."""
    kernel_is(page, "Idle")
    menu(page, "Run", "Run All Cells")
    page.locator(".jp-InputPrompt", has_text="[*]").first.wait_for()


# ---- explorers ----

WATCH = """box => {
  const now = {asked: 0, shown: 0}; box.kilobench = now;
  for (const what of ['change', 'input', 'keydown', 'click']) box.addEventListener(what, () => { now.asked ||= performance.now() }, true);
  box.addEventListener('load', () => { if (now.asked) now.shown = performance.now() }, true);
  for (const img of box.querySelectorAll('img')) img.dataset.first = 1;
}"""
QUIET = "box => box.kilobench.shown && performance.now() - box.kilobench.shown > 250"


def watch(explorer) -> None:
    """From now on note when a control is moved and when the pictures have changed."""
    explorer.evaluate(WATCH)


def move(explorer, name: str) -> None:
    """Move a control by its name: a drop-down to its next choice, a slider by one step."""
    explorer.evaluate("box => Object.assign(box.kilobench, {asked: 0, shown: 0})")
    row = explorer.locator(".widget-inline-hbox", has=explorer.page.locator("label", has_text=re.compile(f"^{name}$")))
    if row.locator("select").count(): row.locator("select").select_option(index=row.locator("select").evaluate("e => (e.selectedIndex + 1) % e.options.length"))
    else: row.locator(".noUi-handle").press("ArrowRight")


def answer_ms(explorer) -> int:
    """Wait until the pictures have changed and stand still; milliseconds from the move to the last of them."""
    handle = explorer.element_handle()
    explorer.page.wait_for_function(QUIET, arg=handle)
    return round(explorer.evaluate("box => box.kilobench.shown - box.kilobench.asked"))


def pictures(explorer) -> list[str]:
    """Addresses of the pictures; an address changes with its picture."""
    return explorer.locator("img").evaluate_all("all => all.map(i => i.src)")
