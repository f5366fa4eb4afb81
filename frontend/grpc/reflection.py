"""What clients may ask by reflection."""

from __future__ import annotations

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool


def reflection_pool(*files: FileDescriptor) -> DescriptorPool:
    """A pool that has these files and what they import.

    The files may come from several pools: the stubs of Triton's protocol have one of their own (see
    tools/stubs.py).
    """
    pool = DescriptorPool()
    added: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name not in added:
            added.add(file.name)
            for imported in file.dependencies:
                add(imported)
            pool.AddSerializedFile(file.serialized_pb)

    for file in files:
        add(file)
    return pool
