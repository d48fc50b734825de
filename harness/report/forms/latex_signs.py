"""Text as LaTeX that any pdflatex can set."""

from __future__ import annotations

import re
import unicodedata

SIGNS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    **{sign: f"\\{sign}" for sign in "$&#_%"},
}
LETTERS = {
    "±": r"$\pm$",
    "\u00d7": r"$\times$",
    "·": r"$\cdot$",
    "≈": r"$\approx$",
    "\u2013": "--",
    "—": "---",
    "…": r"\ldots{}",
    "\u2018": "`{}",
    "\u2019": "'{}",
    "“": "``",
    "”": "''",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "\u0131": r"\i{}",
    "\u0237": r"\j{}",
}
ACCENTS = {  # those of OT1, the encoding that is there without a package
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0323": "d",
    "\u0327": "c",
    "\u0331": "b",
}
BELOW = "\u0323\u0327\u0331"
DOTLESS = {"i": r"\i", "j": r"\j"}  # beneath an accent
GREEK = {
    sign: unicodedata.name(sign).rpartition(" ")[2].lower().replace("lamda", "lambda")
    for sign in "αβγδζηθικλμνξπρστυφχψω"
}


def escape(text: str) -> str:
    """Any text as LaTeX. Words with letters that LaTeX may not know stay as they are, in letters beyond ASCII."""
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    pieces = re.split(r"([^\x00-\x7f]+)", re.sub(r"[\x00-\x1f\x7f]", "?", text))
    return "".join(_other(piece) if place % 2 else _ascii(piece) for place, piece in enumerate(pieces))


def _ascii(text: str) -> str:
    apart = re.sub(r"(?<=[-'`?!\"])(?=[-'`\"])", "\0", text)  # two hyphens make no dash, two quotes no other sign
    return "".join(SIGNS.get(sign, sign) for sign in apart).replace("\0", "{}")


def _other(run: str) -> str:
    """Signs beyond ASCII as LaTeX where all of them can be, else as they are."""
    if run in GREEK:  # a single one, as in formulas
        return rf"$\{GREEK[run]}$"
    made = [_letter(sign) for sign in run]
    return run if None in made else "".join(filter(None, made))


def _letter(sign: str) -> str | None:
    """A sign beyond ASCII as LaTeX; None where LaTeX may not have it."""
    if sign in LETTERS:
        return LETTERS[sign]
    base, marks = (parts := unicodedata.normalize("NFD", sign))[0], parts[1:]
    if marks not in ACCENTS or not (base.isascii() and base.isalpha()):
        return None
    return rf"\{ACCENTS[marks]}{{{base if marks in BELOW else DOTLESS.get(base, base)}}}"
