"""What models are for: "generate", "classify" or "embed" (WorkerFacts.task). What a model is not for is
refused in the same words everywhere."""

from __future__ import annotations

GENERATE, CLASSIFY, EMBED = "generate", "classify", "embed"


def why_no_generation(task: str) -> str:
    """Why a model of this task generates nothing, and what it is asked for instead."""
    if task == CLASSIFY:
        return (
            "this model has a classification head and no output projection, so it generates no text; "
            "it classifies texts and scores pairs of them (/v1/classify, /v1/score, /v1/rerank; Classify and "
            "Score over gRPC)"
        )
    return (
        "this model has no output projection, so it generates no text; it turns texts into vectors "
        "(/v1/embeddings; Embed over gRPC)"
    )


def why_no_embeddings() -> str:
    """Why a model that classifies embeds nothing."""
    return (
        "this model has a classification head, and answers with what that makes of its hidden states; it "
        "turns no texts into vectors. It classifies texts and scores pairs of them (/v1/classify, /v1/score, "
        "/v1/rerank; Classify and Score over gRPC)"
    )
