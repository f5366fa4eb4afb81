"""Requests over the public gRPC API whose tokens are known before they are sent."""

from __future__ import annotations

from pagewire.inference.v1 import inference_pb2 as pb


def prompt(length: int, salt: int) -> list[int]:
    """Token ids that no other salt begins with."""
    return [(salt * 7919 + index * 31) % 40_000 + 100 for index in range(length)]


def greedy(token_ids: list[int], max_tokens: int, *, user: str = "") -> pb.GenerateRequest:
    """A request that generates exactly `max_tokens`."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids), sampling=sampling, user=user)
