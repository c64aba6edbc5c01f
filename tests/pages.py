"""Pages for a browser, as their reader has them."""

from __future__ import annotations

import re
from html import unescape


def words(page: str) -> str:
    """The words that a reader sees: no tags, one space between words."""
    body = re.sub(r"<(style|svg)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())
