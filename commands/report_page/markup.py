"""HTML that is escaped by construction: texts are texts, only tag() makes markup."""

import html
import re
from collections.abc import Iterable

from data_utils.sources import printable

_VOID = {"meta", "br", "input"}
_NOT_IN_HTML = re.compile(r"[\ufdd0-\ufdef\ufffe\uffff]")  # code points that a parser of HTML reports


class Markup(str):
    """Markup, from tag(); every other str is text."""

    __slots__ = ()


Content = str | None | Iterable["Content"]


def tag(name: str, /, *contents: Content, **attributes: str | float | bool | None) -> Markup:
    """An element. contents: texts, which are escaped, and elements. attributes: None and False leave one out.

    Example: tag("p", "a < b", class_="note", data_step=3) -> <p class="note" data-step="3">a &lt; b</p>
    """
    shown = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        shown += f" {key}" if value is True else f' {key}="{escape(str(value))}"'
    opening = f"<{name}{shown}>"
    return Markup(opening if name in _VOID else f"{opening}{join(contents)}</{name}>")


def join(contents: Content) -> Markup:
    """Texts and elements, one behind the other."""
    if contents is None:
        return Markup("")
    if isinstance(contents, Markup):
        return contents
    if isinstance(contents, str):
        return escape(contents)
    return Markup("".join(map(join, contents)))


def escape(text: str) -> Markup:
    """A text as HTML. What no page can hold, or what changes the direction of what follows, is an escape of JSON."""
    text = _NOT_IN_HTML.sub(lambda match: f"\\u{ord(match.group()):04x}", printable(text))
    return Markup(html.escape(text))


def table(headings: Iterable[Content], rows: Iterable[Iterable[Content]], *, class_: str | None = None) -> Markup:
    """A table."""
    head = tag("tr", [tag("th", each) for each in headings])
    body = [tag("tr", [tag("td", cell) for cell in row]) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body), class_=class_), class_="wide")
