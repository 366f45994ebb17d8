"""Formulas as MathML, made when the site is built: every current browser draws them without a script, MathJax would be fetched from a network."""
from latex2mathml.converter import convert


def _mathml(text: str, display: str) -> str:
    """MathML of a formula; the bar of \\overline is the character that browsers know how to stretch."""
    return convert(text, display=display).replace("&#x02015;", "&#x0203E;").replace("\u2015", "\u203e")


def inline(self, node) -> None:
    """A formula in a line."""
    from docutils import nodes
    self.body.append(f'<span class="math">{_mathml(node.astext().strip(), "inline")}</span>')
    raise nodes.SkipNode


def display(self, node) -> None:
    """A formula of its own, one block for each part that an empty line sets apart."""
    from docutils import nodes
    self.body.append("".join(f'<div class="math">{_mathml(part, "block")}</div>' for part in node.astext().split("\n\n") if part.strip()))
    raise nodes.SkipNode


def setup(app):
    """Sphinx calls it; the renderer's name is what html_math_renderer chooses."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
