"""Sphinx's configuration: myst-nb over notebooks that build.py has executed, the API from docstrings, and nothing from any network."""
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
_ini = ConfigParser(delimiters=["="], interpolation=None)
_ini.read(ROOT / "settings.ini", encoding="utf-8")

project, author, release = "kilobench", _ini["DEFAULT"]["author"], _ini["DEFAULT"]["version"]
copyright = _ini["DEFAULT"]["copyright"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "mathml"]
root_doc, exclude_patterns = "index", ["_static"]      # html_static_path: build.py says it, the folder that it has filled

nb_execution_mode, nb_merge_streams, nb_code_prompt_show, nb_code_prompt_hide = "off", True, "imports", "imports"
nb_mime_priority_overrides = [("html", "text/html", 0), ("html", "image/svg+xml", 5), ("html", "image/png", 10)]
myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_block"]
myst_heading_anchors = 3
myst_title_to_header = False

html_theme, html_title = "pydata_sphinx_theme", "kilobench"
html_css_files, html_js_files = ["kilobench.css"], [("kilobench.js", {"defer": "defer"})]
html_show_sourcelink = html_copy_source = html_show_sphinx = False
html_show_search_summary = False      # it fetches the pages found, which no browser allows from disk
html_context = {"default_mode": "auto"}
html_theme_options = {"logo": {"text": "kilobench"}, "show_prev_next": True, "navbar_align": "left", "header_links_before_dropdown": 9, "navigation_with_keys": False, "secondary_sidebar_items": ["page-toc"],
                      "footer_start": ["copyright"], "footer_end": [], "show_toc_level": 2, "pygments_light_style": "a11y-light", "pygments_dark_style": "a11y-dark"}
html_sidebars = {"index": [], "**": ["sidebar-nav-bs"]}

autodoc_member_order, autodoc_typehints, autodoc_preserve_defaults, autodoc_class_signature = "bysource", "signature", True, "mixed"
autodoc_default_options = {"undoc-members": False, "exclude-members": "model_config, model_post_init, set"}      # `set`: matplotlib writes one into every Figure
maximum_signature_line_length = 100
python_maximum_signature_line_length = 100
suppress_warnings = ["ref.python"]      # `bytes` in a signature is the type, also where a class has a property of that name


def as_rst(lines: list[str]) -> list[str]:
    """Our docstrings are plain text with `code` in single backticks: literals for those, everything else escaped, each line kept as a line."""
    out = []
    for line in lines:
        parts = re.split(r"(`+)(.+?)\1", line.rstrip())
        text = ""
        for i in range(0, len(parts), 3):
            text += re.sub(r"([\\*|_`])", r"\\\1", parts[i])
            if i + 2 < len(parts): text += f"\\ ``{parts[i + 2]}``\\ "
        out.append(text)
    blocks, block = [], []
    for line in [*out, ""]:
        if line: block.append(line)
        elif block:
            blocks += ["| " + b.strip() if len(block) > 1 else b.strip() for b in block] + [""]
            block = []
    return blocks


def setup(app):
    """Docstrings go through `as_rst`."""
    def process(app, what, name, obj, options, lines): lines[:] = as_rst(lines)
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
