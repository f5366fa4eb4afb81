"""The HTTP shim: OpenAI's API and the operational endpoints over the generation pipeline."""
