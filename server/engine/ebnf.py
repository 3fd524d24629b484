"""EBNF grammars as the Lark that llguidance reads.

llguidance's own conversion knows llama.cpp's GBNF alone. Clients of vLLM also send rules that span lines, which
xgrammar reads, and Lark, whose first rule may be written `?start`.
"""

from __future__ import annotations

import re

from llguidance.gbnf_to_lark import gbnf_to_lark

_LARK = re.compile(r"(?m)^[ \t]*(?:%llguidance\b|[?!]{0,2}start\s*:(?!:=))")
_PARTS = re.compile(
    r"""(?P<kept> "(?:\\.?|[^"\\])*+(?:"|\Z) | \[(?:\\.?|[^\]\\])*+(?:\]|\Z) )  # a text, or a class of characters
      | (?P<space> (?:\s|\#[^\n]*+)++ )                         # with comments
    """,
    re.VERBOSE | re.DOTALL,
)
_RULE = re.compile(r"[\w-]++\s*+::=|\Z")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def lark_of(text: str) -> str:
    """An EBNF grammar as Lark, or a Lark grammar as it is.

    Raises:
        Exception: the grammar cannot be read; llguidance's converter raises nothing narrower.
    """
    return text if _LARK.search(text) else gbnf_to_lark(_PARTS.sub(_gbnf, text))


def _gbnf(part: re.Match[str]) -> str:
    """A part of a grammar as the converter reads it: a rule on one line, characters beyond ASCII as they are."""
    if part["kept"] is not None:
        return _ESCAPE.sub(_character, part["kept"])
    ends_rule = _RULE.match(part.string, part.end()) is not None
    return part["space"] if ends_rule or "\n" not in part["space"] else " "


def _character(escape: re.Match[str]) -> str:
    """The character that an escape names; the converter drops leading zeros of its number."""
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    return f"\\x{code:02x}" if code < 0x80 else chr(code)
