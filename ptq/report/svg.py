"""Matplotlib figures as SVG inside a page: the page's own colours and font, no ids that two figures share.

Matplotlib is imported where a plot is drawn: commands that draw none start half a second sooner.
"""

import io
import re
from functools import wraps
from xml.etree import ElementTree

from ptq.document import Markup

# What plots are drawn in, and what it stands for; no plot uses these colours for anything else.
INK, QUIET, RULE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "ink", QUIET: "quiet", RULE: "rule", ACCENT: "accent", SECOND: "second"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ptq",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
_LINKED = re.compile(r"#([\w-]+)")


def styled(draw):
    """Makes a function draw in the page's style."""

    @wraps(draw)
    def drawn(*arguments, **options):
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)

    return drawn


def new_figure(width: float, height: float):
    """An empty figure of so many inches, laid out so that nothing is cut off."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def inline(figure, name: str, title: str, class_: str = "") -> Markup:
    """A figure as an svg element.

    Args:
        figure: Drawn in the colours above, in a styled function, which this is called in too.
        name: Goes before the ids that the figure refers to; one a page.
        title: Read out instead of the picture.
        class_: Of the element.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})  # savefig draws it twice
    root = ElementTree.fromstring(text.getvalue())
    _without(root, ("metadata", "style"))
    linked = {found for node in root.iter() for value in node.attrib.values() for found in _LINKED.findall(value)}
    for node in root.iter():
        node.tag = node.tag.partition("}")[2]
        node.attrib = dict(_attributes(node, linked, name))
    root.attrib |= {"role": "img", "aria-label": title} | ({"class": class_} if class_ else {})
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _without(root, tags):
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.partition("}")[2] in tags:
                parent.remove(child)


def _attributes(node, linked, name):
    for key, value in node.attrib.items():
        key = key.partition("}")[2] or key
        if key == "id" and value not in linked:
            continue
        if key == "id":
            value = f"{name}-{value}"
        if key in ("href", "clip-path"):
            value = value.replace("#", f"#{name}-")
        if key == "style":
            value = _style(value)
        yield key, value


def _style(value):
    for color, variable in VARIABLES.items():
        value = value.replace(color, f"var(--{variable})")
    return re.sub(r"font-family: [^;]*;? ?", "", re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value))
