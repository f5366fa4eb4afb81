"""Ways to damage a file: at random in its bytes, and with a knowledge of its format where that gets further.

Every function takes a `random.Random` and changes nothing but what it returns, so that a seed is a case.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

_DEEP = "DEEPLY-NESTED-"
_BIG = "VERY-LONG-NUMBER"

NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 255, 65535, 65537, 10**6, 10**9, 10**12, 10**100, True, False),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    *(-(2**31), -(2**63), 0.5, -0.0, 1.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", "x", "1", "null", "\0", "é日本🦊", "\x1b[31mred\nline", "a b", "<0x41>", "<0xGG>", "x" * 200_000),
    *("../../etc/passwd", "/etc/passwd", "..", ".", "model.safetensors", "\ud800"),
)
OTHERS: tuple[Any, ...] = (
    *(None, [], {}, [[]], [None], {"": None}, {"type": "Sequence"}, [1, "a", None], [0] * 10_000),
    *(f"{_DEEP}20", f"{_DEEP}200", f"{_DEEP}900", f"{_DEEP}100000", _BIG),
)
WORDS = (
    *(0, 1, 2, 3, 4, 5, 8, 9, 12, 30, 31, 32, 64, 255, 4096, 65535, 2**20, 2**24, 2**28, 2**30),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1),
)


def damage_bytes(data: bytes, random: Random, *, within: int | None = None) -> bytes:
    """One to four damages, most of them in the first `within` bytes."""
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        if not damaged:
            break
        limit = len(damaged) if within is None or random.random() < 0.1 else min(within, len(damaged))
        at = random.randrange(limit)
        random.choice(_BYTE_DAMAGES)(damaged, at, random)
    return bytes(damaged)


def _flip(data: bytearray, at: int, random: Random) -> None:
    data[at] ^= 1 << random.randrange(8)


def _set(data: bytearray, at: int, random: Random) -> None:
    data[at] = random.randrange(256)


def _word(data: bytearray, at: int, random: Random) -> None:
    size = random.choice((1, 2, 4, 8))
    word = random.choice(WORDS) % (1 << 8 * size)
    data[at : at + size] = word.to_bytes(size, "little")


def _cut(data: bytearray, at: int, random: Random) -> None:
    del data[at:]


def _remove(data: bytearray, at: int, random: Random) -> None:
    del data[at : at + random.choice((1, 8, 100, 5000))]


def _repeat(data: bytearray, at: int, random: Random) -> None:
    data[at:at] = data[at : at + random.choice((1, 8, 100, 5000))]


def _insert(data: bytearray, at: int, random: Random) -> None:
    data[at:at] = random.randbytes(random.choice((1, 8, 100)))


def _clear(data: bytearray, at: int, random: Random) -> None:
    end = min(len(data), at + random.choice((8, 100, 5000)))
    data[at:end] = random.choice((b"\0", b"\xff", b"[", b'"', b"{")) * (end - at)


_BYTE_DAMAGES: tuple[Callable[[bytearray, int, Random], None], ...] = (
    *(_flip, _set, _word, _word, _cut, _remove, _repeat, _insert, _clear),
)


def hostile_value(random: Random) -> Any:
    """What a JSON file might hold where something else is expected."""
    return deepcopy(random.choice(random.choice((NUMBERS, TEXTS, OTHERS))))


def damage_json(document: Any, random: Random) -> bytes:
    """A JSON document with one to three of its values changed, or else its text damaged."""
    if random.random() < 0.15:
        return damage_bytes(dump(document), random)
    document = json.loads(dump(document))
    for _ in range(random.choice((1, 1, 2, 3))):
        document = _damage_node(document, random)
    text = dump(document)
    if random.random() < 0.05:
        text = random.choice((b"\xef\xbb\xbf", b" " * 100_000, b"[" * 100_000, text)) + text
    return text


def dump(document: Any) -> bytes:
    """JSON as UTF-8; also of what json.dumps cannot write itself."""
    text = json.dumps(document, ensure_ascii=True)
    for depth in (20, 200, 900, 100_000):
        text = text.replace(f'"{_DEEP}{depth}"', "[" * depth + "]" * depth)
    return text.replace(f'"{_BIG}"', "9" * 10_000).encode()


def _damage_node(document: Any, random: Random) -> Any:
    """Walks down at random and changes what it finds there."""
    parent, key = None, None
    node = document
    while isinstance(node, (dict, list)) and node and (parent is None or random.random() < 0.85):
        parent, key = node, random.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
    if parent is None:
        return hostile_value(random)
    action = random.randrange(14)
    if action >= 8:
        parent[key] = _same_type(node, random)
    elif action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        name = random.choice((*parent, *TEXTS[:10]))
        parent[name] = parent.pop(key)
    elif action == 2 and isinstance(parent, list):
        parent.insert(key, deepcopy(node))
    elif action == 3 and isinstance(node, (int, float)) and not isinstance(node, bool):
        parent[key] = node + random.choice((-1, 1, 8, 1000)) if random.random() < 0.7 else -node
    elif action == 4 and isinstance(parent, dict):
        parent[key] = deepcopy(parent[random.choice(list(parent))])
    else:
        parent[key] = hostile_value(random)
    return document


def _same_type(value: Any, random: Random) -> Any:
    """Another value of the same type, which a parser takes and its user may not."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return random.choice([number for number in NUMBERS if type(number) is type(value)])
    if isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        return random.choice((*TEXTS, value * 2, value[:cut], value[cut:], value.upper()))
    if isinstance(value, list):
        return random.choice((value * 2, value[::-1], value[:1] * 1000, value[1:], []))
    if isinstance(value, dict):
        return random.choice(({}, dict.fromkeys(value, 0), dict.fromkeys(value)))
    return hostile_value(random)


_DTYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64"),
    *("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "F128", "f32", ""),
)


def damage_safetensors(data: bytes, random: Random) -> bytes:
    """A safetensors file with a damaged header, or damaged bytes."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.2:
        return damage_bytes(data, random, within=8 + length)
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = header[name]
    action = random.randrange(9)
    text = None
    if action == 0:
        entry["dtype"] = random.choice(_DTYPES)
    elif action == 1:
        entry["data_offsets"] = list(header[other]["data_offsets"])
    elif action == 2:
        entry["data_offsets"][random.randrange(2)] = random.choice(NUMBERS)
    elif action == 3:
        entry["shape"] = _other_shape(entry["shape"], random)
    elif action == 4:  # the name twice: JSON says nothing about what that means
        text = dump(header)[:-1] + b"," + dump({name: header[other]})[1:]
    elif action == 5:  # the same bytes as another type of the same width
        same = {"F32": ("I32", "U32"), "F16": ("I16", "BF16"), "I64": ("F64", "U64")}
        entry["dtype"] = random.choice(same.get(entry["dtype"], ("U8",)))
    else:
        text = damage_json(header, random)
    text = dump(header) if text is None else text
    claimed = len(text) if random.random() < 0.85 else random.choice(WORDS)
    return claimed.to_bytes(8, "little") + text + body


def _other_shape(shape: list[int], random: Random) -> Any:
    count = 1
    for size in shape:
        count *= size
    choices: tuple[Any, ...] = (
        *([count], [1, count], shape[::-1], [count, 1], [2**63, 2], [2**32, 2**32], [-1, -count]),
        *([1] * 1000 + [count], [1] * 100_000, [0], [0, 2**63], [], [2**62, 4, count], [float(count)]),
    )
    return random.choice(choices)


def damage_gguf(data: bytes, random: Random, fields: list[tuple[int, int]]) -> bytes:
    """A GGUF file with one to three of its `fields` overwritten, or damaged bytes in its header."""
    end = fields[-1][0] + 8
    if random.random() < 0.25:
        return damage_bytes(data, random, within=end)
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        at, size = random.choice(fields)
        old = int.from_bytes(data[at : at + size], "little")
        word = old + random.choice((-1, 1, 32, -32)) if random.random() < 0.3 else random.choice(WORDS)
        damaged[at : at + size] = (word % (1 << 8 * size)).to_bytes(size, "little")
    if random.random() < 0.1:
        damaged = bytearray(damage_bytes(bytes(damaged), random, within=end))
    return bytes(damaged)


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def gguf_fields(data: bytes) -> list[tuple[int, int]]:
    """Offset and width of every number in a valid GGUF file's header that says how the rest is to be read,
    and of every scalar; of arrays, the first few elements."""
    fields: list[tuple[int, int]] = [(0, 4)]
    at = 4

    def number(width: int) -> int:
        nonlocal at
        fields.append((at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def string() -> None:
        nonlocal at
        length = number(8)
        at += length

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            string()
        elif kind == 9:
            inner, count = number(4), number(8)
            for index in range(count):
                before = len(fields)
                value(inner)
                if index > 20:
                    del fields[before:]
        else:
            number(_WIDTHS[kind])

    number(4)
    num_tensors, num_keys = number(8), number(8)
    for _ in range(num_keys):
        string()
        value(number(4))
    for _ in range(num_tensors):
        string()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return fields
