"""One HTML file that needs nothing else: style inside, no scripts, no requests; light and dark as the reader has it."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files


class Markup(str):
    """Text that is HTML already."""


def markup(text: str) -> Markup:
    """Text as HTML; markup stays as it is."""
    return text if isinstance(text, Markup) else Markup(escape(str(text)))


def element(tag: str, *content: str, **attributes: str) -> Markup:
    """A tag around content, which is escaped unless it is markup; `class_` stands for class."""
    named = "".join(f' {key.rstrip("_")}="{escape(str(value))}"' for key, value in attributes.items() if value)
    return Markup(f"<{tag}{named}>{''.join(map(markup, content))}</{tag}>")


def table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], *, text_columns: int = 1) -> Markup:
    """A table that scrolls sideways where it is too wide; the first column stays.

    Args:
        heads: Of the columns.
        rows: The class of each row, and its cells.
        text_columns: Leading columns of words; the others hold figures, to the right.
    """
    kinds = ["" if i < text_columns else "figure" for i in range(len(heads))]
    head = element("tr", *(element("th", text, class_=kind) for text, kind in zip(heads, kinds, strict=True)))
    body = [
        element("tr", *(element("td", text, class_=kind) for text, kind in zip(cells, kinds, strict=True)), class_=name)
        for name, cells in rows
    ]
    whole = element("table", element("thead", head), element("tbody", *body))
    return element("div", whole, class_="wide", tabindex="0")


def document(title: str, *content: Markup) -> str:
    """The whole file."""
    style = (files(__package__) / "document.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8" />\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(content)
        + "\n</main>\n</body>\n</html>\n"
    )
