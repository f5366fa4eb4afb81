"""Everything that does not generate."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import numpy as np
import openai
import pytest

from tests.conformance.target import Target


def test_models_are_listed(target: Target) -> None:
    assert target.model in [model.id for model in target.client.models.list()]
    assert target.client.models.retrieve(target.model).id == target.model
    with pytest.raises(openai.NotFoundError):
        target.client.models.retrieve("no-such-model")


@pytest.mark.extension
def test_texts_and_tokens_are_turned_into_each_other(target: Target) -> None:
    text = "Größe, 東京 🙂 and café"
    ids = target.tokenize(prompt=text, add_special_tokens=False)
    assert target.text(ids) == text
    answer = target.http.post(
        "/tokenize", json={"model": target.model, "prompt": text, "return_token_strs": True}
    ).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] > 0


@pytest.mark.extension
def test_version_and_health_are_told(target: Target) -> None:
    assert target.http.get("/version").json()["version"]
    assert target.http.get("/health").status_code == 200
    assert target.http.get("/metrics").status_code == 200


@pytest.mark.extension
def test_the_openapi_document_has_what_is_served(target: Target) -> None:
    document = target.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    for path in ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        assert path in document["paths"]
    assert target.http.get("/docs").status_code == 200


@pytest.mark.extension
def test_embeddings_are_one_vector_for_each_input(target: Target) -> None:
    inputs = ["A cat sat on a mat.", "Stock markets fell sharply.", "A cat sat on the mat."]

    def embed(**fields: Any) -> Any:
        extra = {"pooling": "mean"} if target.directory else {}
        return target.client.embeddings.create(model=target.model, extra_body=extra, **fields)

    try:
        answer = embed(input=inputs, encoding_format="float")
    except (openai.BadRequestError, openai.NotFoundError) as refusal:
        if target.directory:
            raise
        pytest.skip(f"the server's model makes no embeddings: {refusal.message}")
    vectors = np.array([each.embedding for each in answer.data])
    assert [each.index for each in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(len(target.tokenize(prompt=text)) for text in inputs)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-4)
    likeness = vectors @ vectors[0]
    assert likeness[2] > likeness[1]
    ids = target.tokenize(prompt=inputs[1])
    np.testing.assert_allclose(
        embed(input=ids, encoding_format="float").data[0].embedding, vectors[1], atol=1e-4
    )
    coded = np.frombuffer(
        b64decode(embed(input=inputs[0], encoding_format="base64").data[0].embedding), "<f4"
    )
    np.testing.assert_allclose(coded, vectors[0], atol=1e-4)
