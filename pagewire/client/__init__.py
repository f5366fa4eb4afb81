"""Clients of the public gRPC service, for programs that want more than OpenAI's API and less than stubs.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("The capital of France is", SamplingParams(max_tokens=8)).text)
        for event in client.generate(messages=[{"role": "user", "content": "Hi"}], stream=True):
            print(event.text, end="", flush=True)

Errors are those of `pagewire.base.errors`, by the status the server answered.
"""

from pagewire.client.asynchronous import AsyncClient
from pagewire.client.blocking import Client
from pagewire.client.requests import (
    Classes,
    Completion,
    EmbeddingFields,
    Event,
    Model,
    RequestFields,
    Sampling,
    ScoringFields,
    Vectors,
)

__all__ = [
    "AsyncClient",
    "Classes",
    "Client",
    "Completion",
    "EmbeddingFields",
    "Event",
    "Model",
    "RequestFields",
    "Sampling",
    "ScoringFields",
    "Vectors",
]
