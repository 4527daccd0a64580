"""Pages: what the checker of pages finds, and that text cannot become markup."""

import pytest
from pages import faults, text_of

from ptq.document import document, element, markup, table


def test_a_page_is_sound_and_shows_its_text():
    page = document("a < b", element("p", "1 & 2 <script>", class_="quiet"), table(["", "n"], [("x", ["a", "<b>"])]))
    assert not faults(page)
    assert "1 & 2 <script>" in text_of(page) and "<script>" not in page and "a &lt; b</title>" in page


def test_markup_is_not_escaped_twice():
    inner = element("b", "x")
    assert markup(inner) is inner and element("p", inner, title='"') == '<p title="&quot;"><b>x</b></p>'


@pytest.mark.parametrize(
    "fault",
    [
        '<script src="x.js"></script>',
        '<img src="https://example.org/x.png" />',
        '<link rel="stylesheet" href="x.css" />',
        "<style>@import 'x.css';</style>",
        '<p style="background: url(x.png)"></p>',
        "<p><b></p></b>",
        '<p onclick="x()"></p>',
        '<a href="#nowhere">x</a>',
        '<p id="a"></p><p id="a"></p>',
        "<div>",
    ],
)
def test_faults_are_seen(fault):
    assert faults(fault)
