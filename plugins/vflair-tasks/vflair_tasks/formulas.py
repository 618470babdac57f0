r"""When two answers in LaTeX are the same: the equivalence of MATH.

Follows the definition published with the data set (Hendrycks et al., arXiv 2103.03874, appendix B): both are brought to
one notation and compared as strings, so ``\dfrac12`` is ``\frac{1}{2}``, but ``2/4`` is not ``1/2``.
"""

from __future__ import annotations

import re

_NOTHING = ("\\!", "\\ ", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "$", "\\%", "%", " ")
_UNIT = re.compile(r"\\text\{ [^}]*\}$")
_NAMED = re.compile(r"^[A-Za-z]{1,2}=(?=.)")
_BARE_POINT = re.compile(r"(?<!\d)\.(?=\d)")
_BARE_ROOT = re.compile(r"\\sqrt(?=[^{\[])(.)")
_SLASH = re.compile(r"^(-?)(\d+)/(\d+)$")


def boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{}`` (or ``\fbox{}``, or behind ``\boxed`` and a space); None if nowhere."""
    found = list(re.finditer(r"\\(?:boxed|fbox)(\{| )", text))
    if not found:
        return None
    last = found[-1]
    if last[1] == " ":
        return text[last.end() :].split("$", maxsplit=1)[0].strip() or None
    depth = 1
    for place in range(last.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[last.end() : place]
    return None


def same_formula(left: str | None, right: str | None) -> bool:
    r"""Tell whether two answers are written alike in one notation; None is like nothing.

    An answer of which the notation leaves nothing, such as ``\%``, is like what is written as it is.
    """
    if left is None or right is None:
        return False
    ours, theirs = in_one_notation(left), in_one_notation(right)
    return ours == theirs if ours and theirs else left.strip() == right.strip()


def in_one_notation(text: str) -> str:
    """Return the answer without what does not matter: space, units, dollars, degrees, ways to write fractions."""
    text = _UNIT.sub("", text.replace("\n", "").strip())
    for sign in _NOTHING:
        text = text.replace(sign, "")
    text = text.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac").replace("\\\\", "\\")
    text = _NAMED.sub("", text)
    text = _BARE_POINT.sub("0.", text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    text = _with_braces(text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    return _SLASH.sub(r"\1\\frac{\2}{\3}", text)


def _with_braces(text: str) -> str:
    r"""Write ``\frac12``, ``\frac1{2}`` and ``\frac{1}2`` as ``\frac{1}{2}``."""
    places = [match.end() for match in re.finditer(r"\\frac", text)]
    for place in reversed(places):  # from the last: the fractions within one are done before it
        above, rest = _argument(text[place:])
        below, rest = _argument(rest)
        text = text[:place] + above + below + rest
    return text


def _argument(text: str) -> tuple[str, str]:
    """Return the next argument in braces, and what follows it."""
    if not text or text[0] == "}":
        return "", text
    if text[0] != "{":
        return f"{{{text[0]}}}", text[1:]
    depth = 0
    for place, sign in enumerate(text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if not depth:
            return text[: place + 1], text[place + 1 :]
    return text, ""
