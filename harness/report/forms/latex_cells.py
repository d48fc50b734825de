"""What stands in a cell of a LaTeX table, and about how wide it is."""

from __future__ import annotations

import re
import string
import unicodedata
from typing import NamedTuple

from harness.errors import unknown
from harness.report.forms.latex_signs import escape

STYLES = ("subscript", "side", "siunitx")  # of a value with its interval; see `number`
NOTHING = "--"
# Widths of Computer Modern's signs in units of the type's size, or a little more.
WIDTHS = dict.fromkeys(string.ascii_uppercase + "+=<>&~^", 0.79) | dict.fromkeys(" !'(),-.:;I[]`fijlrst|", 0.4)
WIDTHS |= dict.fromkeys(string.digits, 0.5) | dict.fromkeys("mwM@%", 0.92) | {"W": 1.03}
LETTER = 0.56  # any other sign
FOREIGN, STAND_IN = re.compile(r"([^\x00-\x7f]+)"), "[99]"  # what may become a stand-in
FOOTNOTE, SCRIPT, SUBSCRIPT = 8.5, 8.0, 7.4  # points: that unit in \footnotesize, \scriptsize, a subscript
BOLD = 1.16  # wider than upright by this much
LONGEST_WORD, PIECE = 120.0, 13  # points beyond which a word may be broken; signs of what is cut anywhere
BREAKS = r"[^=_/,:.-]*[=_/,:.-]|[^=_/,:.-]+"  # what may end a line within a word


class Text(NamedTuple):
    """A cell: LaTeX, and about how wide it is in points."""

    latex: str
    width: float


def plain(text: str) -> Text:
    """Any text; "-" is a cell without a value."""
    return Text(NOTHING if text == "-" else running(text), points(text))


def small(text: str) -> Text:
    """Any text in smaller type."""
    return Text(rf"{{\scriptsize {running(text)}}}", points(text, SCRIPT))


def joined(texts: list[Text]) -> Text:
    """The texts beside each other."""
    width = sum(text.width for text in texts) + points(" ") * (len(texts) - 1)
    return Text(" ".join(text.latex for text in texts), width)


def number(
    value: str, interval: str | None, style: str, bold: bool = False, underlined: bool = False, tie: bool = False
) -> Text:
    r"""A value and half of its interval, both as printed ("0.801", "0.016"), in one of STYLES: 0.801$_{\pm.016}$,
    0.801 $\pm$ 0.016, or \num{0.801 +- 0.016}. `interval`: None for none. `tie`: with a raised \approx."""
    sign = r"^{\approx}" if tie else ""
    around = r"\textbf{{{}}}" if bold else r"\underline{{{}}}" if underlined else "{}"
    wider = BOLD if bold else 1
    if style == "siunitx":
        whole = value if interval is None else f"{value} +- {interval}"
        return Text(around.format(rf"\num{{{whole}}}") + _math(sign), points(f"{whole}+") * wider)
    shown, width = around.format(value.replace("-", "$-$").replace("+", "$+$")), points(value) * wider
    if interval is None:
        return Text(shown + _math(sign), width + points("+", SUBSCRIPT))
    if style == "side":
        return Text(rf"{shown}{_math(sign)} $\pm$ {interval}", width + points(f"+ + {interval}"))
    short = interval.removeprefix("0") if interval.startswith("0.") else interval
    low = rf"_{{\pm{short}}}" + ("{}" + sign if tie else "")  # beside it, not above, where it would crowd the row
    return Text(shown + _math(low), width + points(f"+{short}" + "+" * tie, SUBSCRIPT))


def checked(style: str) -> str:
    """The style. Raises InputError where there is none of this name."""
    if style not in STYLES:
        raise unknown("--latex-style", style, STYLES)
    return style


def running(text: str) -> str:
    """Text as LaTeX; a word that is too long for a line may be broken."""
    words = unicodedata.normalize("NFC", text).split()
    return " ".join(_breakable(word) if points(word) > LONGEST_WORD else escape(word) for word in words)


def points(text: str, size: float = FOOTNOTE) -> float:
    """About how wide a text is."""
    text = FOREIGN.sub(lambda run: "n" * len(run[0]) if escape(run[0]).isascii() else STAND_IN, text)
    return size * sum(WIDTHS.get(sign, LETTER) for sign in text)


def _breakable(word: str) -> str:
    """The word with places to break it: after signs between names and, of what is longer, anywhere but within what
    becomes a stand-in."""
    pieces: list[str] = []
    for run in filter(None, FOREIGN.split(word)):
        for part in re.findall(BREAKS, run) if run.isascii() else [run]:
            cut = PIECE if part.isascii() and points(part) > LONGEST_WORD else len(part)
            pieces += [part[at : at + cut] for at in range(0, len(part), cut)]
    return r"\allowbreak{}".join(map(escape, pieces))


def _math(text: str) -> str:
    return f"${text}$" if text else ""
