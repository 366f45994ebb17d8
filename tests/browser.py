"""A real JupyterLab and a real chromium for tests: start them, open a notebook, run it, move a control, look at the picture."""
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
            "docmanager-extension/plugin": {"autosave": False}}


def chromium_path() -> str:
    """The browser: $KILOBENCH_CHROMIUM, or one on the PATH; "" where there is none."""
    named = os.environ.get("KILOBENCH_CHROMIUM", "")
    return named or next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), "")


def settings_in(folder: Path) -> Path:
    """JupyterLab's user settings for tests: no news, no updates, no autosave."""
    for name, values in SETTINGS.items():
        file = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return folder


@contextmanager
def jupyter(*args: str, home: Path, env: dict[str, str] | None = None, says: str = r"(http://127\.0\.0\.1:\d+/\S*)", timeout: float = 90):
    """`python -m ARGS…` with Jupyter folders of its own under `home`; yields the match of `says` in its log. Ended by SIGTERM."""
    own = {f"JUPYTER_{n}_DIR": str(home / n.lower()) for n in ("RUNTIME", "CONFIG", "DATA")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(settings_in(home / "settings")), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "IPYTHONDIR": str(home / "ipython"), "PYTHONUNBUFFERED": "1"}
    log = home / "server.log"
    with log.open("w") as out: p = subprocess.Popen([sys.executable, "-m", *args], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | own | (env or {}), cwd=home)
    try:
        end = time.monotonic() + timeout
        while not (found := re.search(says, log.read_text())):
            if p.poll() is not None or time.monotonic() > end: raise RuntimeError(f"{args}: did not start\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield found
    finally:
        p.terminate()
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill(); p.wait()


@contextmanager
def lab(root: Path, home: Path, **env: str):
    """JupyterLab with `root` as its folder; yields its address with {path} to fill in."""
    token = secrets.token_hex(16)
    with jupyter("jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--LabApp.extension_manager=readonly", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
                 home=home, env=env, says=r"(http://127\.0\.0\.1:\d+)/lab") as found:
        yield lambda path, base=found[1]: f"{base}/lab/tree/{quote(path)}?token={token}&reset"


@contextmanager
def chromium():
    """A headless chromium; yields open(url) → a page that remembers its requests (`.asked`) and its errors (`.faults`)."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox", "--disable-background-networking", "--disable-component-update"])
        def open_page(url: str, width: int = 1400, height: int = 1000):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.asked, page.faults = [], []
            page.on("request", lambda r: page.asked.append(r.url))
            page.on("websocket", lambda w: page.asked.append(w.url))
            page.on("pageerror", lambda e: page.faults.append(str(e)))
            page.goto(url, wait_until="commit", timeout=60_000)
            return page
        try: yield open_page
        finally: browser.close()


def strangers(page) -> list[str]:
    """Requests of a page that did not go to this machine."""
    return [u for u in page.asked if urlsplit(u).scheme not in ("data", "blob") and urlsplit(u).hostname != "127.0.0.1"]


def menu(page, name: str, entry: str) -> None:
    """Click an entry of JupyterLab's menu bar."""
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{name}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()


def kernel_is(page, state: str, timeout: float = 120) -> None:
    """Wait until the status bar says that the kernel is Idle or Busy."""
    page.locator("#jp-main-statusbar").get_by_text(f"| {state}").wait_for(timeout=timeout * 1000)


def run_all(page, timeout: float = 120) -> None:
    """Run All Cells of the open notebook and wait until the kernel is idle again."""
    kernel_is(page, "Idle")
    menu(page, "Run", "Run All Cells")
    kernel_is(page, "Busy", 30)
    kernel_is(page, "Idle", timeout)
