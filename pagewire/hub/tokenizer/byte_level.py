"""The letters that byte-level tokenizers write bytes in, and the ids that tokens may have."""

from __future__ import annotations

MAX_TOKEN_ID = 2**22 - 1


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, every other byte for a letter from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | letters


_BYTE_OF_CHARACTER = _byte_of_character()
_CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}


def byte_level_bytes(token: str) -> bytes:
    """An added token may hold characters outside the alphabet; then it is plain text."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def byte_level_token(data: bytes) -> str:
    """Bytes as a vocabulary spells them."""
    return "".join([_CHARACTER_OF_BYTE[byte] for byte in data])
