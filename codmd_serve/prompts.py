"""Cleans prompts as Wan does; knows nothing of tensors or tokenizers."""

import html
import re
import unicodedata

import ftfy

# Letters and symbols of Unicode that have no shape: Hangul fillers and the empty Braille pattern.
_SHAPELESS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
# Spaces, control and format characters, surrogates, code points without a character, and marks, which need a letter.
_UNSEEN_CATEGORIES = frozenset(("Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Cn", "Mn", "Mc", "Me"))


def clean_prompt(prompt: str) -> str:
    """Repair mojibake, undo HTML entities, also doubly escaped ones, and collapse white space, as Wan does."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", repaired.strip()).strip()


def is_blank(prompt: str) -> bool:
    """Return whether a prompt is empty after cleaning.

    The tokenizers of Wan drop control and format characters such as U+FEFF and U+200B, so a prompt of those alone
    has as little to say as an empty one.
    """
    return all(char in _SHAPELESS or unicodedata.category(char) in _UNSEEN_CATEGORIES for char in clean_prompt(prompt))


def lone_surrogate(prompt: str) -> str | None:
    """Return the first half of a character that stands alone, which no encoding can store; None when there is none."""
    return next((char for char in prompt if unicodedata.category(char) == "Cs"), None)
