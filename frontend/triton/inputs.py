"""The tensors that the served model takes, and how they are read. A test holds the table of docs/triton.md to
INPUTS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from frontend.triton.tensors import Tensor
from pagewire.base.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Input:
    """One of the tensors.

    Attributes:
        datatype: what the metadata say. Any whole numbers are taken for whole numbers, any numbers for FP32.
        several: whether a prompt may have several values.
        required: whether each request must have it.
        harmless: for what is not served: the values that ask for nothing.
    """

    datatype: str
    several: bool = False
    required: bool = False
    harmless: tuple[object, ...] = ()

    @property
    def served(self) -> bool:
        return not self.harmless

    @property
    def dims(self) -> tuple[int, ...]:
        """Its shape without the batch."""
        return (-1,) if self.several else (1,)


INPUTS: Mapping[str, Input] = {
    "text_input": Input("BYTES", required=True),
    "max_tokens": Input("INT32", required=True),
    "bad_words": Input("BYTES", several=True),
    "stop_words": Input("BYTES", several=True),
    "end_id": Input("INT32"),
    "pad_id": Input("INT32"),
    "top_k": Input("INT32"),
    "top_p": Input("FP32"),
    "temperature": Input("FP32"),
    "length_penalty": Input("FP32"),
    "repetition_penalty": Input("FP32"),
    "presence_penalty": Input("FP32"),
    "frequency_penalty": Input("FP32"),
    "min_tokens": Input("INT32"),
    "min_length": Input("INT32"),
    "seed": Input("UINT64"),
    "random_seed": Input("UINT64"),
    "beam_width": Input("INT32"),
    "num_return_sequences": Input("INT32"),
    "stream": Input("BOOL"),
    "exclude_input_in_output": Input("BOOL"),
    "return_log_probs": Input("BOOL"),
    "return_num_input_tokens": Input("BOOL"),
    "return_num_output_tokens": Input("BOOL"),
    "guided_decoding_guide_type": Input("BYTES"),
    "guided_decoding_guide": Input("BYTES"),
    # What clients of TensorRT-LLM's models may send although it is not served.
    "return_context_logits": Input("BOOL", harmless=(False,)),
    "return_generation_logits": Input("BOOL", harmless=(False,)),
    "return_perf_metrics": Input("BOOL", harmless=(False,)),
    "return_encoder_output": Input("BOOL", harmless=(False,)),
    "return_kv_cache_reuse_stats": Input("BOOL", harmless=(False,)),
    "use_draft_logits": Input("BOOL", harmless=(False,)),
    "num_draft_tokens": Input("INT32", harmless=(0,)),
    "lora_task_id": Input("UINT64", harmless=(0,)),
    "decoder_text_input": Input("BYTES", harmless=("",)),
    "embedding_bias_words": Input("BYTES", several=True, harmless=("",)),
    "embedding_bias_weights": Input("FP32", several=True, harmless=(0.0,)),
}
"""By name."""

OUTPUTS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    # datatype, shape without the batch
    "text_output": ("BYTES", (-1,)),
    "cum_log_probs": ("FP32", (-1,)),
    "output_log_probs": ("FP32", (-1, -1)),
    "sequence_index": ("INT32", (1,)),
    "batch_index": ("INT32", (1,)),
    "num_input_tokens": ("INT32", (1,)),
    "num_output_tokens": ("INT32", (-1,)),
}
"""By name."""


@dataclass(frozen=True, slots=True)
class InputValues:
    """What was sent, by name. A value that was not sent is None or a list of none.

    Attributes:
        texts: the prompts.
        rows: the values of every other input, which are the same for all prompts.
    """

    texts: Sequence[str]
    rows: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, tensors: Sequence[Tensor], model: str) -> InputValues:
        """Reads what was sent.

        Raises:
            InvalidRequest: an input is missing, unknown or there twice, of another type or shape, or asks for
                something that is not served.
        """
        rows: dict[str, Sequence[Any]] = {}
        texts: Sequence[str] = ()
        num_prompts = _num_prompts(tensors)
        for tensor in tensors:
            known = INPUTS.get(tensor.name)
            if known is None:
                taken = ", ".join(name for name, each in INPUTS.items() if each.served)
                raise InvalidRequest(
                    f"unexpected inference input {tensor.name!r} for model {model!r}; it takes {taken}",
                    param=tensor.name,
                )
            if tensor.name in rows:
                raise InvalidRequest(f"input {tensor.name} is there twice", param=tensor.name)
            _check_type(tensor, known)
            if tensor.name == "text_input":
                rows[tensor.name] = texts = _prompts(tensor)
            else:
                rows[tensor.name] = _row(tensor, known, num_prompts)
            _check_served(tensor, known)
        for name, known in INPUTS.items():
            if known.required and name not in rows:
                raise InvalidRequest(f"the model {model!r} needs the input {name}", param=name)
        return cls(texts, rows)

    def one(self, *names: str) -> Any:
        """The value of an input by any of its names, None if it was not sent."""
        for name in names:
            if row := self.rows.get(name):
                return row[0]
        return None

    def flag(self, name: str) -> bool:
        """Whether a truth value was sent and is true."""
        return bool(self.one(name))

    def words(self, name: str) -> list[str]:
        """A list of words. "" stands for none."""
        return [word for word in self.rows.get(name, ()) if word]


def _num_prompts(tensors: Sequence[Tensor]) -> int:
    texts = next((tensor for tensor in tensors if tensor.name == "text_input"), None)
    return 1 if texts is None else max(1, len(texts.values))


def _check_type(tensor: Tensor, known: Input) -> None:
    datatype, wanted = tensor.datatype, known.datatype
    whole = datatype.startswith(("INT", "UINT"))
    if wanted.startswith(("INT", "UINT")):
        fits = whole
    elif wanted == "FP32":
        fits = whole or datatype.startswith("FP")
    else:
        fits = datatype == wanted
    if not fits:
        raise InvalidRequest(
            f"input {tensor.name} has the datatype {datatype}; it must be {wanted}", param=tensor.name
        )


def _prompts(tensor: Tensor) -> Sequence[str]:
    """One text for each row; a shape of one dimension is one row."""
    if (tensor.shape[-1] if tensor.shape else 1) != 1 or not tensor.values:
        raise InvalidRequest(
            f"text_input has the shape {list(tensor.shape)}; it must be [1], or [n, 1] for n prompts",
            param="text_input",
        )
    return tensor.values


def _row(tensor: Tensor, known: Input, num_prompts: int) -> Sequence[Any]:
    """The values for each prompt, which must be the same for all."""
    num_rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    if num_rows not in (1, num_prompts) or (not known.several and len(tensor.values) != num_rows):
        allowed = "[n]" if known.several else "[1]"
        raise InvalidRequest(
            f"input {tensor.name} has the shape {list(tensor.shape)}; it must be {allowed}, with a dimension "
            "for the prompts before it where there are several",
            param=tensor.name,
        )
    width = len(tensor.values) // num_rows
    rows = [tensor.values[start : start + width] for start in range(0, width * num_rows, width or 1)]
    if any(row != rows[0] for row in rows):
        raise InvalidRequest(
            f"input {tensor.name} is not the same for all prompts; send requests of their own for those that "
            "differ",
            param=tensor.name,
        )
    return rows[0] if rows else ()


def _check_served(tensor: Tensor, known: Input) -> None:
    if not known.served and any(value not in known.harmless for value in tensor.values):
        raise InvalidRequest(
            f"{tensor.name} is not supported by this server; leave it out", param=tensor.name
        )
