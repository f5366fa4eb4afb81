"""From a worker's configuration to an engine without a model."""

from __future__ import annotations

import logging

from engine.config import WorkerConfig
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits, longest_request
from engine.models.families import load_model_config
from engine.models.kv_groups import kv_groups
from engine.null.adapters import NullAdapters
from engine.null.runner import NullRunner
from engine.null.text import NullText, text_token_ids
from engine.step.runner import LoadedWorker
from pagewire.hub import resolve_checkpoint
from pagewire.hub.fingerprint import fingerprint_of

logger = logging.getLogger(__name__)

# Those of a GPU of today.
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 8192
# A million tokens in blocks of 16, in each KV group. The scheduler keeps some hundred bytes for each block.
NUM_BLOCKS = 65_536


def build_null_worker(config: WorkerConfig) -> LoadedWorker:
    """Reads config.json and the tokenizer; no weights. A context may be longer than the model's own.

    Raises:
        ConfigError: a file is missing or wrong.
    """
    directory, _ = resolve_checkpoint(config.model, config.load_format)
    model = load_model_config(directory)
    text = NullText(text_token_ids(directory, frozenset(model.eos_token_ids), model.vocab_size))
    wanted_len = config.max_model_len or model.max_position_embeddings
    windows = kv_groups(tuple(layer.sliding_window for layer in model.layers), wanted_len).windows
    num_blocks = config.num_blocks or NUM_BLOCKS * len(windows)
    facts = WorkerFacts(
        model=config.model,
        limits=EngineLimits(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            max_model_len=longest_request(wanted_len, num_blocks, config.block_size, windows),
            block_size=config.block_size,
            num_blocks=num_blocks,
            max_num_seqs=config.max_num_seqs or MAX_NUM_SEQS,
            max_num_batched_tokens=config.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS,
            kv_windows=windows,
            max_loras=config.max_loras if config.enable_lora else 0,
        ),
        eos_token_ids=model.eos_token_ids,
        dtype="none",
        device="null engine",
        fingerprint=fingerprint_of([directory / "config.json"], "null engine"),
    )
    logger.warning("%s: no model, only its tokenizer: the null engine is for measuring", facts.model)
    runner = NullRunner(
        text,
        max_num_seqs=facts.limits.max_num_seqs,
        vocab_size=facts.limits.vocab_size,
        hidden_size=facts.limits.hidden_size,
        eos_token_ids=facts.eos_token_ids,
        step_seconds=config.null_step_ms / 1e3,
        prompt_token_seconds=config.null_prompt_us / 1e6,
    )
    return LoadedWorker(runner, facts, adapters=NullAdapters() if config.enable_lora else None)
