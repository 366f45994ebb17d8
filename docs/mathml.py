"""Formulas as MathML, made when the site is built: every current browser draws them without a script, MathJax would be fetched from a network."""
from xml.etree import ElementTree

from latex2mathml.converter import convert

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
ElementTree.register_namespace("", NAMESPACE)
BAR, OVERLINE = "\u2015", "border-top: .06em solid; padding-top: .15em"


def _mathml(text: str, display: str) -> str:
    """MathML of a formula; the bar of \\overline is drawn as a border, because without a mathematical font no browser stretches the character."""
    root = ElementTree.fromstring(convert(text, display=display))
    for over in [e for e in root.iter(f"{{{NAMESPACE}}}mover") if len(e) == 2 and e[1].text == BAR]:
        over.tag = f"{{{NAMESPACE}}}mrow"
        over.set("style", OVERLINE)
        over.remove(over[1])
    return ElementTree.tostring(root, encoding="unicode")


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
