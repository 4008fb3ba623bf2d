"""Tokens as HTML in which everything is seen: spaces, line ends, control characters, and bytes that
are half a character."""

import html
import re
import unicodedata

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of SentencePiece's byte fallback
_SPACE = "▁"  # SentencePiece's
_HALF = range(0xDC80, 0xDD00)  # what surrogateescape makes of bytes that are no text


class TokenTexts:
    """Returns the text of single tokens.

    A tokenizer's own ``decode`` drops the space in front of a token, or replaces bytes that are not
    a whole character. Here such a byte is a lone surrogate, as ``surrogateescape`` writes it.

    Attributes:
        special: ids of special tokens.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self.special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special |= {*tokenizer.all_special_ids}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._spelled = _spelled_by(decoder)
        self._known = {}

    def __call__(self, token):
        if token not in self._known:
            self._known[token] = self._text(token)
        return self._known[token]

    def _text(self, token):
        if token in self.added:
            return self.added[token]
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return ""
        if self._spelled is None:
            return self.tokenizer.decode([token], skip_special_tokens=False)
        return self._spelled(name).decode(errors="surrogateescape")


def _spelled_by(decoder):
    """The function from a token's name to its bytes, found by what ``decoder`` makes of names; None
    if it is neither a byte-level nor a SentencePiece decoder."""
    if decoder is None:
        return None
    if decoder.decode(["Ġa"]).lstrip() == "a":
        return _of_byte_level
    if decoder.decode(["a", f"{_SPACE}b"]) == "a b":
        falls_back = decoder.decode(["a", "<0x42>"]) == "aB"
        return _of_byte_fallback if falls_back else _of_sentence_piece
    return None


def _byte_names():
    """The characters of byte-level BPE and their bytes.

    A byte that prints in Latin-1 stands for itself; the others are numbered from 256 on.
    """
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (byte for byte in range(256) if byte not in prints)
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_NAMES = _byte_names()


def _of_byte_level(name):
    if not all(character in _BYTE_NAMES for character in name):
        return name.encode(errors="surrogatepass")
    return bytes(_BYTE_NAMES[character] for character in name)


def _of_sentence_piece(name):
    return name.replace(_SPACE, " ").encode(errors="surrogatepass")


def _of_byte_fallback(name):
    found = _BYTE.fullmatch(name)
    return bytes.fromhex(found[1]) if found else _of_sentence_piece(name)


def plain(text):
    """Returns a token's text in one line, with escapes for what does not print."""

    def escaped(character):
        if (code := ord(character)) in _HALF:
            return f"\\x{code - 0xDC00:02x}"
        return character if character.isprintable() else ascii(character)[1:-1]

    return "".join(map(escaped, text))


def visible(text):
    """Returns a token's text as HTML in which everything is seen.

    ``<i>`` holds a space, ``<b>`` a sign that stands for something else. A line breaks behind the
    sign of its end. A combining character that begins a token stands on a circle.
    """
    if not text:
        return "<b>empty</b>"
    circle = "◌" if unicodedata.category(text[0]).startswith("M") else ""
    return circle + "".join(map(_visible, text))


def _visible(character):
    code = ord(character)
    if character == " ":
        return "<i> </i>"
    if character.isprintable():
        return html.escape(character)
    if character == "\n":
        return "<b>⏎</b>\n"
    if character == "\t":
        return "<b>⇥</b>"
    return f"<b>0x{code - 0xDC00:02X}</b>" if code in _HALF else f"<b>U+{code:04X}</b>"
