"""Twenty prompts of many kinds and lengths, and requests made of them."""

from __future__ import annotations

from pathlib import Path

from frontend.text.tokenizer import TextTokenizer
from pagewire.inference.v1 import inference_pb2 as pb

CODE = """def fibonacci(n: int) -> list[int]:
    numbers = [0, 1]
    while len(numbers) < n:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers[:n]
"""
STORY = (
    "The lighthouse keeper had not spoken to anyone for eleven days when the storm began. Waves climbed the "
    "rocks and broke against the door, and the lamp above him turned as it always had. He wrote in his book: "
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    CODE + "\nprint(fibonacci(",
    "List the first ten prime numbers: 2, 3, 5,",
    "Translate to French: 'Good morning, how are you?' ->",
    "<|im_start|>user\nWhat is photosynthesis?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nName three colours.<|im_end|>\n"
    "<|im_start|>assistant\n",
    STORY,
    STORY * 3 + "The end of the story is that",
    "Q: If a train travels 60 km in 45 minutes, what is its speed in km/h?\nA:",
    "The chemical symbol for gold is",
    "Größe, naïve, café, 東京, Привет, 🙂🙃: these words are",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    '{"name": "Ada", "age": 36, "languages": [',
    "SELECT name, COUNT(*) FROM orders",
    "a",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "In machine learning, attention is a mechanism that",
    "To be, or not to be, that is the question:",
    "    \n\n\t1. First item\n\t2. Second item\n",
)
MAX_TOKENS = 64


def prompt_ids(model_dir: Path) -> list[list[int]]:
    """The prompts as token ids."""
    tokenizer = TextTokenizer.load(model_dir)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


def greedy(ids: list[int], max_tokens: int = MAX_TOKENS) -> pb.GenerateRequest:
    """A greedy request that does not end before `max_tokens`."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
    )


def seeded(ids: list[int], seed: int, max_tokens: int = 40) -> pb.GenerateRequest:
    """A request with every kind of random choice, made reproducible by its seed."""
    sampling = pb.SamplingParams(
        temperature=0.9,
        top_p=0.95,
        top_k=50,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        seed=seed,
        max_tokens=max_tokens,
        ignore_eos=True,
    )
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling)
