"""The site in a real browser, from disk: nothing is asked of a network, no script fails, every picture is there, search finds, figures and recordings answer, light and dark."""
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

from playwright.sync_api import Page, sync_playwright

BROWSER = next((b for name in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(name))), None)
LOOK = """() => ({ lost: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 120)),
  wide: document.documentElement.scrollWidth - innerWidth, title: document.title, drawn: document.querySelectorAll(".kb-plotly").length, taped: document.querySelectorAll(".kb-recording").length,
  links: [...new Set([...document.links].map(a => a.href.split("#")[0].split("?")[0]))].filter(h => h.startsWith("file:")) })"""


class Watch:
    """What a page asked for and complained of since the last look."""
    def __init__(self, page: Page):
        self.outside, self.faults = [], []
        page.on("request", lambda r: r.url.split(":")[0] in ("file", "data", "blob") or self.outside.append(r.url))
        page.on("pageerror", lambda e: self.faults.append(str(e)[:200]))
        page.on("console", lambda m: m.type == "error" and self.faults.append(m.text[:200]))

    def complaints(self, at: str) -> list[str]:
        out = [f"{at}: asks a network for {u}" for u in self.outside] + [f"{at}: {f}" for f in self.faults]
        self.outside, self.faults = [], []
        return out


def look(page: Page, watch: Watch, html: Path, file: Path) -> tuple[list[str], dict]:
    """One page opened and read; (complaints, what it holds)."""
    at = file.relative_to(html).as_posix()
    page.goto(file.as_uri(), wait_until="load")
    seen = page.evaluate(LOOK)
    dead = [u for u in seen["links"] if not Path(unquote(urlparse(u).path)).exists()]
    said = [f"{at}: picture is lost: {s}" for s in seen["lost"]] + [f"{at}: leads nowhere: {u}" for u in dead] + ([f"{at}: {seen['wide']} px wider than the window"] if seen["wide"] > 1 else [])
    return said + watch.complaints(at), seen


def search(page: Page, html: Path, word: str) -> list[str]:
    """Sphinx's own search, which has to work from disk."""
    page.goto((html / "search.html").as_uri() + f"?q={word}")
    try: page.wait_for_selector("#search-results li a", timeout=15_000)
    except Exception: return [f"search.html: finds nothing for {word!r}"]
    return []


def answers(page: Page, file: Path) -> list[str]:
    """The first recording of a page: another position, another picture or another line."""
    page.goto(file.as_uri())
    inside = lambda: page.locator(".kb-recording").first.locator(".kb-stage, .kb-lines").evaluate_all("n => n.map(x => x.innerHTML).join()")
    before, select = inside(), page.locator(".kb-recording").first.locator("select").first
    others = select.evaluate("s => [...s.options].map(o => o.value).filter(v => v !== s.value)")
    for value in others:
        select.select_option(value)
        if inside() != before: return []
    return [f"{file.name}: its recording does not answer"]


def draws(page: Page, file: Path) -> list[str]:
    """The first plotly figure of a page is drawn when one comes to it."""
    page.goto(file.as_uri())
    page.locator(".kb-plotly").first.scroll_into_view_if_needed()
    try: page.wait_for_selector(".kb-plotly[data-drawn] .main-svg, .kb-plotly[data-drawn] canvas", timeout=20_000, state="attached")
    except Exception: return [f"{file.name}: its plotly figure is not drawn"]
    return []


def check(html: Path, shots: Path) -> list[str]:
    """All complaints about the site; pictures of a few pages, light and dark, go to `shots`."""
    shots.mkdir(parents=True, exist_ok=True)
    files = sorted(f for f in html.rglob("*.html") if "_static" not in f.parts)
    said, plotly, taped = [], None, None
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        watch = Watch(page)
        for f in files:
            complaints, seen = look(page, watch, html, f)
            said += complaints
            plotly, taped = plotly or (f if seen["drawn"] else None), taped or (f if seen["taped"] else None)
        for f in sorted((html / "_static" / "scorecards").glob("*.html")): said += look(page, watch, html, f)[0]
        said += search(page, html, "hold_norms") + search(page, html, "Shards") + (answers(page, taped) if taped else []) + (draws(page, plotly) if plotly else [])
        said += watch.complaints("search, figures and recordings")
        for theme in ("light", "dark"):
            for name in ("index", "renderer/index", "core/05_training", "api/kilobench.core.recipe"):
                page.goto((html / f"{name}.html").as_uri())
                page.evaluate("t => { document.documentElement.dataset.theme = t; document.documentElement.dataset.mode = t }", theme)
                page.screenshot(path=shots / f"{name.replace('/', '-')}-{theme}.png", full_page=name == "index")
        browser.close()
    return said


def main(html: Path, shots: Path) -> int:
    """0 where the site stands; 1 with its complaints printed; says so where there is no Chromium to look with."""
    if BROWSER is None:
        print("the site was not looked at: no chromium on the PATH (Debian: apt-get install chromium)")
        return 0
    said = check(html, shots)
    for line in said: print(line, file=sys.stderr)
    print(f"looked at in Chromium, offline: {len(said)} complaints; pictures in {shots}")
    return bool(said)


if __name__ == "__main__": sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
