"""Telling contents of files apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pagewire.hub.fingerprint import BEGINNING, NUM_SAMPLES, fingerprint_of


def test_copies_are_the_same_whenever_they_were_made(tmp_path: Path) -> None:
    original = tmp_path / "model.safetensors"
    original.write_bytes(os.urandom(1 << 20))
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / original.name
    shutil.copyfile(original, copy)
    os.utime(copy, (0, 0))
    assert fingerprint_of([original]) == fingerprint_of([copy])
    assert fingerprint_of([original]) != fingerprint_of([original], "seed 1")
    assert fingerprint_of([original]) != fingerprint_of([original, copy])


def test_weights_that_were_trained_on_differ_though_nothing_else_does(tmp_path: Path) -> None:
    """The same tensors of the same sizes: only most of the numbers have changed."""
    path, size = tmp_path / "model.safetensors", BEGINNING + (1 << 20)
    path.write_bytes(bytes(size))
    before = fingerprint_of([path])
    data = bytearray(size)
    data[BEGINNING:] = bytes([1, 0, 0, 0]) * ((size - BEGINNING) // 4)
    path.write_bytes(data)
    assert fingerprint_of([path]) != before


def test_a_file_of_any_size_is_read_in_bounded_time(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert fingerprint_of([path])
    assert NUM_SAMPLES < 1000
