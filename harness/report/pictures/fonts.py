"""Names in any script in pictures: with a font that has them where there is one, else by number with a key."""

from __future__ import annotations

import functools
import re
import textwrap
import unicodedata

from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from harness.report.names import StandIns, lines_of

FAMILY = "DejaVu Sans"  # comes with matplotlib
NO_HELP = re.compile(r"DejaVu|STIX|cm[a-z]+10|Last ?Resort|Emoji", re.IGNORECASE)  # less than FAMILY, or no outlines
SHAPES = hasattr(ft2font, "__libraqm_version__")  # matplotlib 3.11: joins letters, and runs from right to left
UNFIT = ("Cc", "Cn", "Co", "Cs", "Zl", "Zp")  # control signs, what Unicode does not know, ends of lines
REGULAR = 400  # weight
LINE_HEIGHT = 0.12  # inches, of the caption's text
SIGN_WIDTH = 0.068  # inches, of a panel's title


def settle(figure: Figure) -> bool:
    """Change the figure's texts so that a font has every sign of them. Whether another font than DejaVu Sans is used.

    What no font has is replaced by numbers, with a key in the caption. Panels' titles are broken to the panel's width.
    """
    _break_titles(figure)
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and _unusual(text.get_text())]
    families, left = families_for("".join(text.get_text() for text in texts))
    stand_ins = StandIns(f"[{''.join(map(re.escape, sorted(left)))}]") if left else None
    for text in texts:
        if families:
            text.set_fontfamily([FAMILY, *families])
        if stand_ins:
            text.set_text(stand_ins.put(text.get_text()))
    if stand_ins:
        _tell(figure, "; ".join(stand_ins.key))
    return bool(families)


def families_for(text: str) -> tuple[list[str], set[str]]:
    """(families of installed fonts that have what DejaVu Sans lacks, signs that no font has)."""
    unusual = _unusual(text)
    unfit = {sign for sign in unusual if unicodedata.category(sign) in UNFIT or not (SHAPES or _stands_alone(sign))}
    own = _signs_of(font_manager.findfont(FAMILY))
    missing = {sign for sign in unusual - unfit if ord(sign) not in own}
    families = []
    for family, path in _others() if missing else ():
        found = {sign for sign in missing if ord(sign) in _signs_of(path)}
        if found:
            families.append(family)
            missing -= found
        if not missing:
            break
    return families, missing | unfit


def _unusual(text: str) -> set[str]:
    return {sign for sign in text if not " " <= sign <= "~" and sign != "\n"}


def _stands_alone(sign: str) -> bool:
    """Whether it is drawn right without knowing its neighbours: no right-to-left script, no marks beside letters."""
    return unicodedata.bidirectional(sign) not in ("R", "AL", "AN") and unicodedata.category(sign) != "Mc"


@functools.cache
def _others() -> list[tuple[str, str]]:
    """(family, its most regular file) of the installed fonts, sans-serif ones first."""
    best: dict[str, tuple[float, str]] = {}
    for entry in font_manager.fontManager.ttflist:
        if NO_HELP.match(entry.name) or "Emoji" in entry.name or entry.style != "normal":
            continue
        weight = entry.weight if isinstance(entry.weight, (int, float)) else REGULAR
        best[entry.name] = min(best.get(entry.name, (1e9, "")), (abs(weight - REGULAR), entry.fname))

    def order(family: str) -> tuple[bool, ...]:
        signs = ("Noto Sans CJK" in family, "Noto Sans" in family, "Sans" in family, "Mono" not in family)
        return tuple(not sign for sign in signs)

    return [(family, best[family][1]) for family in sorted(best, key=lambda name: (order(name), name))]


@functools.cache
def _signs_of(path: str) -> frozenset[int]:
    """The code points that a font file has outlines for; none of one that cannot be read."""
    try:
        font = ft2font.FT2Font(path)
        scalable = (
            bool(font.face_flags & ft2font.FaceFlags.SCALABLE) if hasattr(ft2font, "FaceFlags") else font.scalable
        )
        return frozenset(font.get_charmap()) if scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()


def _break_titles(figure: Figure) -> None:
    """Titles of panels in lines that are no longer than a panel is wide."""
    for panel in figure.axes:
        title, width = panel.get_title(), figure.get_figwidth() / _across(panel)
        if "\n" not in title:
            panel.title.set_text("\n".join(lines_of(title, int(width / SIGN_WIDTH))))


def _across(panel: Axes) -> int:
    """Panels in a row of the figure."""
    spec = panel.get_subplotspec()
    return 1 if spec is None else int(spec.get_gridspec().ncols)


def _tell(figure: Figure, key: str) -> None:
    """Put a line below the caption, and make room for it."""
    lines = textwrap.wrap(key, int(figure.get_figwidth() * 17), break_on_hyphens=False)
    caption = figure.get_suptitle()
    figure.suptitle("\n".join([*filter(None, [caption]), *lines]), fontsize=6, color="#555555")
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * len(lines))
