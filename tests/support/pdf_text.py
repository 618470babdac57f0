"""The words of a PDF that chromium printed: its streams inflated, its glyphs by each font's own table."""

from __future__ import annotations

import re
import unicodedata
import zlib


def pages_of(pdf: bytes) -> list[str]:
    """The text of each page in the order in which it is drawn, without spaces: a PDF places words, and often letters."""
    bodies = {
        int(number): body
        for number, body in re.findall(rb"(\d+) 0 obj\n(.*?)\nendobj", pdf, re.DOTALL)
    }
    texts = []
    for body in bodies.values():
        if not re.search(rb"/Type /Page\b(?!s)", body):
            continue
        contents = _reference(rb"/Contents", body)
        fonts = {
            name: _table(bodies, int(number))
            for name, number in re.findall(rb"/(F\d+) (\d+) 0 R", body)
        }
        texts.append(_shown(_stream(bodies[contents]), fonts))
    return texts


def _reference(name: bytes, body: bytes) -> int:
    return int(re.search(name + rb" (\d+) 0 R", body)[1])


def _stream(body: bytes) -> bytes:
    return zlib.decompress(body[body.index(b"stream\n") + 7 :])


def _table(bodies: dict[int, bytes], font: int) -> dict[int, str]:
    """What each glyph of a font says."""
    if b"/ToUnicode" not in bodies[font]:
        return {}
    text = _stream(bodies[_reference(rb"/ToUnicode", bodies[font])]).decode("latin-1")
    said = {}
    for block in re.findall(r"beginbfchar\n(.*?)endbfchar", text, re.DOTALL):
        for glyph, sign in re.findall(r"<(\w+)> <(\w+)>", block):
            said[int(glyph, 16)] = bytes.fromhex(sign).decode("utf-16-be")
    for block in re.findall(r"beginbfrange\n(.*?)endbfrange", text, re.DOTALL):
        for first, last, sign in re.findall(r"<(\w+)> <(\w+)> <(\w+)>", block):
            for n in range(int(first, 16), int(last, 16) + 1):
                said[n] = chr(int(sign, 16) + n - int(first, 16))
    return said


def _shown(content: bytes, fonts: dict[bytes, dict[int, str]]) -> str:
    font: dict[int, str] = {}
    text = ""
    for name, shown in re.findall(
        rb"/(F\d+) [\d.]+ Tf|((?:<[0-9A-Fa-f]+>|\[.*?\]) T[jJ])", content
    ):
        if name:
            font = fonts[name]
            continue
        for glyphs in re.findall(rb"<([0-9A-Fa-f]+)>", shown):
            codes = (int(glyphs[n : n + 4], 16) for n in range(0, len(glyphs), 4))
            text += "".join(font.get(code, "") for code in codes)
    return "".join(unicodedata.normalize("NFKC", text).split())
