"""What a word is, in any script: letters with the marks that belong to them."""

import re
import unicodedata
from functools import cache


@cache
def marks() -> str:
    """Combining marks as the inside of a character class: vowel signs, accents apart from their
    letter, which `\\w` leaves out."""
    ranges: list[list[int]] = []
    for code in range(0x300, 0x20000):  # above there are none but selectors of glyphs
        if unicodedata.category(chr(code))[0] == "M":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


@cache
def _last_word() -> re.Pattern[str]:
    return re.compile(rf"[\w{marks()}]*[^\w{marks()}]*$")


def without_last_word(text: str) -> str:
    """The text before its last word, which may still grow."""
    return _last_word().sub("", text)
