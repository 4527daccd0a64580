"""What every page must be: well-formed, and complete without a single request."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}
FETCHING = {"script", "link", "iframe", "object", "embed", "base", "video", "audio", "source"}
ADDRESSES = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background", "formaction"}


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.faults, self.text, self.ids, self.links = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag in FETCHING:
            self.faults.append(f"<{tag}>")
        for name, value in attributes:
            if name in ADDRESSES and not (value or "").startswith("#"):
                self.faults.append(f"{name}={value}")
            if name.startswith("on"):
                self.faults.append(name)
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href"):
                self.links.append((value or "").removeprefix("#"))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")

    def handle_data(self, data):
        self.text.append(data)


def faults(page: str) -> list[str]:
    """Tags that do not match, ids that are twice there, links that lead nowhere, and whatever would be fetched."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    twice = [f"id {name} twice" for name in set(parser.ids) if parser.ids.count(name) > 1]
    dead = [f"link to {name}" for name in parser.links if name and name not in parser.ids]
    fetched = re.findall(r"@import[^;]*|url\((?!#)[^)]*\)", page)
    return [*parser.faults, *(f"open <{tag}>" for tag in parser.open), *twice, *dead, *fetched]


def text_of(page: str) -> str:
    """What a reader sees, and the style."""
    parser = _Page()
    parser.feed(page)
    return "".join(parser.text)
