"""Renders a template that came with a request, in a process that renders nothing else.

What the model's own template renders shares processes. This one is anybody's: should it break out of the
sandbox, it finds no other request's data. Starting a process takes about a tenth of a second.
"""

from __future__ import annotations

from typing import Any

from frontend.text.template_protocol import PromptTooLong
from frontend.text.template_renderer import RenderProcess, TemplateFailed, TemplateWrong, TooMuch
from pagewire.base.errors import InvalidRequest

MAX_TEMPLATE_CHARACTERS = 128 * 1024


def render_untrusted(source: str, variables: dict[str, Any]) -> str:
    """What the template writes. Blocks; not for the event loop.

    Args:
        variables: data that JSON can say.

    Raises:
        InvalidRequest: the template is wrong, refuses the conversation, or takes too much time or memory.
        Overloaded: templates of other requests take long already.
    """
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise InvalidRequest(
            f"chat_template has {len(source)} characters; at most {MAX_TEMPLATE_CHARACTERS} are taken",
            param="chat_template",
        )
    process = RenderProcess()
    try:
        return process.ask(source, variables)
    except TooMuch as error:
        message = f"the request's chat_template took {error}"
    except PromptTooLong as error:
        message = f"the request's chat_template failed: {error}"
    except TemplateWrong as error:
        message = f"chat_template has an error: {error}"
    except TemplateFailed as error:
        message = f"the request's chat_template failed: {error}"
    finally:
        process.close()
    raise InvalidRequest(message, param="chat_template")
