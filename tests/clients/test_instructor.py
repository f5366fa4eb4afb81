"""instructor: answers as models of pydantic, by tool calls and by JSON schemas, whole and partial."""

from __future__ import annotations

import openai
import pytest

from tests.clients.conftest import City
from tools.service import Service

instructor = pytest.importorskip("instructor")

ASKED = [{"role": "user", "content": "Describe Paris, the capital of France."}]


@pytest.fixture(params=["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def client(request: pytest.FixtureRequest, base_url: str):
    plain = openai.OpenAI(base_url=base_url, api_key="-", max_retries=0)
    return instructor.from_openai(plain, mode=instructor.Mode[request.param])


def test_an_answer_is_of_its_model_at_the_first_try(client, server: Service) -> None:
    city = client.create(
        model=server.model, messages=ASKED, response_model=City, max_retries=0, temperature=0, max_tokens=96
    )
    assert isinstance(city, City)


def test_a_partial_answer_grows(server: Service, base_url: str) -> None:
    plain = openai.OpenAI(base_url=base_url, api_key="-", max_retries=0)
    client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
    parts = list(
        client.create_partial(
            model=server.model, messages=ASKED, response_model=City, temperature=0, max_tokens=96
        )
    )
    assert len(parts) > 3
    City.model_validate(parts[-1].model_dump())
