"""Formulas as MathML, made when the site is built: every current browser draws them without a script, MathJax would be fetched from a network."""
from latex2mathml.converter import convert


def _say(node) -> str: return node.astext().strip()


def inline(self, node) -> None:
    """A formula in a line."""
    from docutils import nodes
    self.body.append(f'<span class="math">{convert(_say(node))}</span>')
    raise nodes.SkipNode


def display(self, node) -> None:
    """A formula of its own, one block for each part that an empty line sets apart."""
    from docutils import nodes
    self.body.append("".join(f'<div class="math">{convert(part, display="block")}</div>' for part in _say(node).split("\n\n") if part.strip()))
    raise nodes.SkipNode


def setup(app):
    """Sphinx calls it; the renderer's name is what html_math_renderer chooses."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
