"""How a layer receives its weights from a checkpoint."""

from __future__ import annotations

import torch
from torch import nn


class ShardError(ValueError):
    """A checkpoint tensor does not fit the parameter it is meant for."""


class LoadableModule(nn.Module):
    """A layer that loads its own parameters.

    Attributes:
        checkpoint_shards: the checkpoint tensors that a fused parameter is made of, in order, such as
            ("q", "k", "v"); empty where a parameter comes from one tensor of the same name.
        layer_name: the layer's full name, such as "model.layers.3.self_attn.qkv_proj"; empty where a layer
            need not know it.
    """

    checkpoint_shards: tuple[str, ...] = ()
    layer_name: str = ""

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        """Copies a whole checkpoint tensor, or this rank's part of it, into the parameter. Is called with a
        tensor of the meta device first, to check its shape.

        Raises:
            ShardError: the tensor's shape is not what the parameter needs.
        """
        copy_checked(getattr(self, name), tensor)

    def finish_loading(self) -> None:
        """Called once when every parameter is loaded; a layer may now change their layout for speed."""


def copy_checked(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies with a change of dtype and device but never of shape. Of a source on the meta device, which has
    no numbers, the shape is checked."""
    if target.shape != source.shape:
        raise ShardError(f"has shape {list(source.shape)}; {list(target.shape)} is needed")
    if source.is_meta:
        return
    with torch.no_grad():
        target.copy_(source)


def take_part(tensor: torch.Tensor, dim: int, first: int, size: int, total: int) -> torch.Tensor:
    """`size` elements from `first` on along `dim` of a checkpoint tensor, which must have `total` there."""
    if dim >= tensor.dim() or tensor.shape[dim] != total:
        raise ShardError(f"has shape {list(tensor.shape)}; {total} is needed in dimension {dim}")
    return tensor.narrow(dim, first, size)
