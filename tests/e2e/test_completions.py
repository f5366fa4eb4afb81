"""Several completions over gRPC: what each of them cost and how it ranks, which HTTP's forms do not tell.

Every other way to ask for completions is in tests/conformance."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from pagewire.wire.sampling_params import seed_of_completion
from tests.conformance.reference import Reference
from tests.e2e.client import complete_all
from tests.e2e.prompts import STORY
from tools.service import Service

TEXT = "The capital of France is"


def test_beams_have_their_scores_over_grpc(float32_server: Service, smollm2_float32_dir: Path) -> None:
    request = pb.GenerateRequest(
        text=TEXT,
        sampling=pb.SamplingParams(n=2, max_tokens=8, beam_search=pb.BeamSearch(width=3, length_penalty=0.5)),
    )
    with grpc.insecure_channel(float32_server.grpc_target) as channel:
        whole = inference_pb2_grpc.InferenceServiceStub(channel).GenerateOnce(request, timeout=60)
    expected = Reference(smollm2_float32_dir).beams(TEXT, 3, max_new_tokens=8, length_penalty=0.5)[:2]
    assert [list(choice.token_ids) for choice in whole.choices] == [tokens for tokens, _ in expected]
    assert [choice.score for choice in whole.choices] == pytest.approx(
        [score for _, score in expected], abs=1e-4
    )


async def test_samples_differ_by_seed_and_share_the_prompts_blocks(server: Service) -> None:
    request = pb.GenerateRequest(
        text=STORY, sampling=pb.SamplingParams(n=4, seed=11, temperature=1, max_tokens=12)
    )
    cached: dict[int, int] = {}
    tokens: dict[int, list[int]] = {}
    async with grpc.aio.insecure_channel(server.grpc_target) as channel:
        async for event in inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60):
            if event.HasField("delta"):
                cached[event.delta.index] = event.delta.usage.cached_tokens
                tokens.setdefault(event.delta.index, []).extend(event.delta.token_ids)
                num_prompt_tokens = event.delta.usage.prompt_tokens
            usage = event.finished.usage
    assert len({tuple(each) for each in tokens.values()}) == 4
    # Its whole blocks; and all but the last token if the prompt was served before.
    shared = ((num_prompt_tokens - 1) // 16 * 16, num_prompt_tokens - 1)
    assert all(cached[index] in shared for index in (1, 2, 3))
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt_tokens, 48)
    for index in (0, 2):  # each is what its own seed gives alone
        sampling = pb.SamplingParams(seed=seed_of_completion(11, index), temperature=1, max_tokens=12)
        [alone] = await complete_all(
            server.grpc_target, [pb.GenerateRequest(text=STORY, sampling=sampling)], 1
        )
        assert list(alone.token_ids) == tokens[index]
