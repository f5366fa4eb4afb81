"""What the frameworks are pointed at."""

from __future__ import annotations

import os

import pytest
from pydantic import BaseModel, Field

from tools.service import Service

# litellm looks for prices on the network when it is imported, and langchain's tracing would call home.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("LANGSMITH_TRACING", "false")


class City(BaseModel):
    """What structured answers are to be: as users write it, without additionalProperties."""

    name: str = Field(max_length=20)
    country: str = Field(max_length=20)
    population: int = Field(ge=0, le=100_000_000)


@pytest.fixture(scope="session")
def base_url(server: Service) -> str:
    return f"{server.http_url}/v1"


def get_weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"It is sunny in {city}."
