"""What clients send and get: the types of both, and requests as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from pagewire.base.errors import InvalidRequest
from pagewire.inference.v1 import inference_pb2
from pagewire.wire.chat_messages import ConversationFields, Message, to_chat_messages
from pagewire.wire.sampling_messages import to_message
from pagewire.wire.sampling_params import SamplingParams

Completion = inference_pb2.GenerateOnceResponse
"""A whole completion: `request_id`, `token_ids`, `text`, `logprobs` and `finished` (reason and usage). Where
there are several they are in `choices`; `prompt` is there if it was asked for."""

Event = inference_pb2.Delta
"""A piece of a streamed completion: `token_ids`, `text`, `logprobs` and `usage` so far, and the `index` of
the completion that it belongs to."""

Classes = inference_pb2.ClassifyResponse
"""The names of the classes (`labels`), and for each text the likeliest (`label`) and a number for each
(`probs`), in `classifications`."""

Model = inference_pb2.Model
"""A model that requests may name: its `id`, `max_model_len`, `vocab_size` and so on."""

Vectors = npt.NDArray[np.float32]
"""[inputs, numbers of a vector]"""

Sampling = SamplingParams | Mapping[str, Any]
"""SamplingParams decide every field; a mapping of some of its fields leaves the others to the model's own
defaults (generation_config.json), as does None for all of them."""


class RequestFields(ConversationFields, total=False):
    """What a request may have besides a text prompt and sampling parameters.

    token_ids: the prompt as token ids. messages: the prompt as a conversation, as OpenAI's API writes it; see
    `Message`, and `ConversationFields` for what goes with it. model: one of `list_models()`; empty means the
    server's only one. request_id: a name for logs.
    priority: lower goes first. user: the caller's end user, with whom it shares fairly what it gets.
    cache_salt: cached prefixes are shared only with requests of the same one.
    truncate_prompt_tokens: keeps this many tokens at the prompt's end. echo: returns the prompt too.
    """

    token_ids: Sequence[int]
    messages: Sequence[Message]
    model: str
    request_id: str
    priority: int
    user: str
    cache_salt: str
    truncate_prompt_tokens: int
    echo: bool


class ScoringFields(TypedDict, total=False):
    """What a request to classify or score may have besides its texts.

    use_activation: false for the logits instead of probabilities or scores. truncate_prompt_tokens: keeps
    this many tokens of each input, from its beginning. The others are those of `RequestFields`.
    """

    use_activation: bool
    truncate_prompt_tokens: int
    model: str
    request_id: str
    priority: int
    user: str


class EmbeddingFields(TypedDict, total=False):
    """What a request to embed may have besides its inputs.

    pooling: how a vector is made of the tokens' states: "last", "mean" or "cls"; left out for the model's own
    way. normalize: whether vectors are scaled to length 1; left out for the model's own way. dimensions:
    keeps this many numbers of each vector, from its beginning. truncate_prompt_tokens: keeps this many tokens
    of each input, from its beginning. The others are those of `RequestFields`.
    """

    pooling: Literal["last", "mean", "cls"]
    normalize: bool
    dimensions: int
    truncate_prompt_tokens: int
    model: str
    request_id: str
    priority: int
    user: str


_POOLINGS = {
    "last": inference_pb2.POOLING_LAST,
    "mean": inference_pb2.POOLING_MEAN,
    "cls": inference_pb2.POOLING_CLS,
}


def generate_request(
    prompt: str | None,
    sampling_params: Sampling | None,
    *,
    token_ids: Sequence[int] | None = None,
    messages: Sequence[Message] | None = None,
    model: str = "",
    request_id: str = "",
    priority: int = 0,
    user: str = "",
    cache_salt: str = "",
    truncate_prompt_tokens: int | None = None,
    echo: bool = False,
    **conversation: Unpack[ConversationFields],
) -> inference_pb2.GenerateRequest:
    """What `Client.generate` was asked for.

    Raises:
        InvalidRequest: there is no prompt, there are two, or a field is not known.
    """
    if [prompt, token_ids, messages].count(None) != 2:
        raise InvalidRequest("give exactly one of prompt, token_ids and messages", param="prompt")
    _check_conversation(messages, conversation)
    request = inference_pb2.GenerateRequest(
        model=model,
        request_id=request_id,
        priority=priority,
        user=user,
        cache_salt=cache_salt,
        truncate_prompt_tokens=truncate_prompt_tokens,
        echo=echo,
    )
    if prompt is not None:
        request.text = prompt
    elif token_ids is not None:
        request.token_ids.ids.extend(token_ids)
        request.token_ids.SetInParent()
    else:
        request.messages.CopyFrom(to_chat_messages(messages or (), **conversation))
    if sampling_params is not None:
        request.sampling.CopyFrom(_sampling(sampling_params))
    return request


def listed(texts: str | Sequence[str]) -> Sequence[str]:
    """One text as a list of it."""
    return [texts] if isinstance(texts, str) else texts


def embed_request(
    inputs: str | Sequence[str] | Sequence[Sequence[int]], fields: EmbeddingFields
) -> inference_pb2.EmbedRequest:
    """What `Client.embed` was asked for.

    Raises:
        InvalidRequest: there is no such pooling.
    """
    values: dict[str, Any] = dict(fields)
    pooling = values.pop("pooling", None)
    if pooling is not None and pooling not in _POOLINGS:
        raise InvalidRequest(
            f"pooling is {pooling!r}; it must be one of {', '.join(_POOLINGS)}", param="pooling"
        )
    each = listed(inputs) if isinstance(inputs, str) else inputs
    if each and not isinstance(each[0], str):
        values["token_ids"] = [inference_pb2.TokenIds(ids=ids) for ids in each]  # type: ignore[arg-type]
    else:
        values["texts"] = each
    return inference_pb2.EmbedRequest(pooling=_POOLINGS.get(pooling), **values)


def vectors_of(response: inference_pb2.EmbedResponse) -> Vectors:
    """The vectors of an answer."""
    return np.array([each.values for each in response.embeddings], dtype=np.float32)


def tokenize_request(
    prompt: str | None, messages: Sequence[Message] | None, conversation: ConversationFields
) -> inference_pb2.TokenizeRequest:
    """What `Client.tokenize` was asked for.

    Raises:
        InvalidRequest: there is no prompt, there are two, or a field is not known.
    """
    if (prompt is None) == (messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    _check_conversation(messages, conversation)
    if messages is None:
        return inference_pb2.TokenizeRequest(text=prompt)
    return inference_pb2.TokenizeRequest(messages=to_chat_messages(messages, **conversation))


def _check_conversation(messages: Sequence[Message] | None, conversation: ConversationFields) -> None:
    """Refuses what would be lost, and what is misspelt."""
    for field in conversation:
        if field not in ConversationFields.__annotations__:
            raise InvalidRequest(f"{field} is not known; see RequestFields for what is", param=field)
        if messages is None:
            raise InvalidRequest(f"{field} is for conversations; give messages with it", param=field)


def _sampling(sampling: Sampling) -> inference_pb2.SamplingParams:
    params = sampling if isinstance(sampling, SamplingParams) else SamplingParams(**sampling)
    return to_message(params, None if isinstance(sampling, SamplingParams) else sampling)
