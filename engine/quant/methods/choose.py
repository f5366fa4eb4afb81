"""Which method each linear layer of a quantized model has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.layers.linear_method import LinearMethod, LinearMethods
from engine.quant.methods.at_load import AtLoadMethod
from engine.quant.methods.base import QuantizedMethod
from engine.quant.methods.bytes import BnbInt8Method, Fp8Method, Int8Method
from engine.quant.methods.integers import AwqMethod, GptqMethod, PackedIntsMethod
from engine.quant.methods.tables import BnbTableMethod, SqueezeLlmMethod
from engine.quant.schemes import (
    AtLoad,
    Awq,
    BnbInt8,
    BnbTable,
    Fp8,
    Gptq,
    Int8,
    PackedInts,
    Scheme,
    SqueezeLlm,
)

# Scheme -> what is made of it, a device's products and what the checkpoint has.
METHODS: dict[type[Any], Callable[..., QuantizedMethod[Any]]] = {
    AtLoad: AtLoadMethod,
    Awq: AwqMethod,
    BnbInt8: BnbInt8Method,
    BnbTable: BnbTableMethod,
    Fp8: Fp8Method,
    Gptq: GptqMethod,
    Int8: Int8Method,
    PackedInts: PackedIntsMethod,
    SqueezeLlm: SqueezeLlmMethod,
}


class MethodsByScheme(LinearMethods):
    """A method for each scheme, and the device's own for plain weights.

    Args:
        plain: for matrices in full precision.
        scheme_of: the scheme of a layer's matrix, by the names that `for_matrix` takes; None for full
            precision.
        make: a scheme's method; see METHODS.
    """

    def __init__(
        self,
        plain: LinearMethods,
        scheme_of: Callable[[str, str], Scheme | None],
        make: Callable[[Scheme], LinearMethod],
    ) -> None:
        self._plain, self._scheme_of, self._make = plain, scheme_of, make
        self._made: dict[Scheme, LinearMethod] = {}

    def for_table(self, name: str) -> LinearMethod | None:
        return self._plain.for_table(name)

    def for_matrix(self, layer: str, shard: str, *, changes: bool = False) -> LinearMethod:
        scheme = self._scheme_of(layer, shard)
        if scheme is None:
            return self._plain.for_matrix(layer, shard, changes=changes)
        if scheme not in self._made:
            self._made[scheme] = self._make(scheme)
        return self._made[scheme]
