"""Converts EBNF grammars to the Lark dialect that llguidance reads.

llguidance's own conversion supports only llama.cpp's GBNF. Clients of vLLM also send rules that span lines, as xgrammar
accepts them, and Lark, whose first rule may be written `?start`. Rules are renamed where Lark would confuse them: its
first rule is `start`, names must not be numbers, and the converter does not distinguish `itemList` from `item-list`.
"""

import re
from collections.abc import Mapping

from llguidance.gbnf_to_lark import gbnf_to_lark

_LARK = re.compile(r"(?m)^[ \t]*(?:%llguidance\b|[?!]{0,2}start\s*:(?!:=))")
_PARTS = re.compile(
    r"""(?P<kept> "(?:\\.?|[^"\\])*+(?:"|\Z) | \[(?:\\.?|[^\]\\])*+(?:\]|\Z) )  # a text, or a class of characters
      | (?P<space> (?:\s|\#[^\n]*+)++ )                         # with comments
      | (?P<count> \{[^}]*+\}? )
      | (?P<name> [\w-]++ ) (?P<defined> \s*+::= )?+
    """,
    re.VERBOSE | re.DOTALL,
)
_RULE = re.compile(r"[\w-]++\s*+::=|\Z")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def lark_of(text: str) -> str:
    """Convert an EBNF grammar to Lark, and return Lark unchanged; raises any Exception if it cannot be read."""
    if _LARK.search(text):
        return text
    names = _names(text)
    gbnf = _PARTS.sub(lambda part: _gbnf(part, names), text)
    try:
        return gbnf_to_lark(gbnf)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
    except IndexError as exc:
        raise ValueError("it ends within a text or a class of characters") from exc


def _names(text: str) -> dict[str, str]:
    """Map each rule of a grammar to a name that is unique in Lark; the first rule keeps its name."""
    names = {"root": "root"}
    taken = {"root", "start"}
    for part in _PARTS.finditer(text):
        if part["defined"] is not None and part["name"] not in names:
            plain = re.sub(r"[^a-z0-9]", "_", part["name"].lower())
            new = base = plain if plain[0].isalpha() else f"rule_{plain}"
            if new in taken:
                new = f"{base}_{len(taken)}"
            while new in taken:
                new += "_"
            taken.add(new)
            names[part["name"]] = new
    return names


def _gbnf(part: re.Match[str], names: Mapping[str, str]) -> str:
    """Rewrite a part of a grammar for the converter: each rule on one line, characters beyond ASCII unescaped."""
    if part["kept"] is not None:
        return _ESCAPE.sub(_character, part["kept"])
    if (name := part["name"]) is not None:
        if name not in names:
            raise ValueError(f"Rule {name[:80]!r} is not defined")
        return names[name] + (part["defined"] or "")
    if part["count"] is not None:
        return part["count"]
    ends_rule = _RULE.match(part.string, part.end()) is not None
    return part["space"] if ends_rule or "\n" not in part["space"] else " "


def _character(escape: re.Match[str]) -> str:
    """The character of an escape sequence; the converter would drop leading zeros of its number."""
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    return f"\\x{code:02x}" if code < 0x80 else chr(code)
