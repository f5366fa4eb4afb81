"""Bodies of /tokenize, /detokenize and of what loads and unloads adapters."""

from __future__ import annotations

from frontend.generation.request import Conversation, TextPrompt
from frontend.http.body import Body, TokenIdList
from frontend.http.openai.schemas.conversation import ConversationFields, Message
from pagewire.base.errors import InvalidRequest


class TokenizeBody(ConversationFields):
    """POST /tokenize: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    def to_tokenize(self) -> TextPrompt | Conversation:
        """The prompt in the pipeline's form.

        Raises:
            InvalidRequest: there is none, or there are two.
        """
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send either prompt or messages", param="prompt")
        if self.prompt is not None:
            return TextPrompt(text=self.prompt, add_special_tokens=self.add_special_tokens)
        return self.conversation(self.messages or [])


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIdList
    skip_special_tokens: bool = False


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None
