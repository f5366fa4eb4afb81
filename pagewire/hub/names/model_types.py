"""The words by which ms-swift's guides, of its versions 1 and 2, call models (`--model_type qwen-7b-chat`).

They are those of its register of models (swift/llm/utils/model.py), for the families that are served here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelType:
    """Attributes:
    huggingface, modelscope: owner/name of the model on each hub.
    """

    huggingface: str
    modelscope: str


# Whose models ModelScope has under another owner. The names are the same unless a line below gives both.
_MODELSCOPE_OWNERS = {
    "01-ai": "01ai",
    "THUDM": "ZhipuAI",
    "google": "LLM-Research",
    "internlm": "Shanghai_AI_Laboratory",
    "meta-llama": "LLM-Research",
    "microsoft": "LLM-Research",
    "mistralai": "AI-ModelScope",
    "study-hjt": "huangjintao",
}

# model_type, owner/name on the Hugging Face Hub, and owner/name on ModelScope where it does not follow from
# that.
_TABLE = """
baichuan-7b baichuan-inc/Baichuan-7B baichuan-inc/baichuan-7B
baichuan-13b baichuan-inc/Baichuan-13B-Base
baichuan-13b-chat baichuan-inc/Baichuan-13B-Chat
baichuan2-7b baichuan-inc/Baichuan2-7B-Base
baichuan2-7b-chat baichuan-inc/Baichuan2-7B-Chat
baichuan2-7b-chat-int4 baichuan-inc/Baichuan2-7B-Chat-4bits
baichuan2-13b baichuan-inc/Baichuan2-13B-Base
baichuan2-13b-chat baichuan-inc/Baichuan2-13B-Chat
baichuan2-13b-chat-int4 baichuan-inc/Baichuan2-13B-Chat-4bits
chatglm3-6b-base THUDM/chatglm3-6b-base
chatglm3-6b THUDM/chatglm3-6b
chatglm3-6b-32k THUDM/chatglm3-6b-32k
chatglm3-6b-128k THUDM/chatglm3-6b-128k
glm4-9b THUDM/glm-4-9b
glm4-9b-chat THUDM/glm-4-9b-chat
glm4-9b-chat-1m THUDM/glm-4-9b-chat-1m
codeqwen1half-7b Qwen/CodeQwen1.5-7B
codeqwen1half-7b-chat Qwen/CodeQwen1.5-7B-Chat
codeqwen1half-7b-chat-awq Qwen/CodeQwen1.5-7B-Chat-AWQ
deepseek-7b deepseek-ai/deepseek-llm-7b-base
deepseek-7b-chat deepseek-ai/deepseek-llm-7b-chat
deepseek-67b deepseek-ai/deepseek-llm-67b-base
deepseek-67b-chat deepseek-ai/deepseek-llm-67b-chat
deepseek-coder-1_3b deepseek-ai/deepseek-coder-1.3b-base
deepseek-coder-1_3b-instruct deepseek-ai/deepseek-coder-1.3b-instruct
deepseek-coder-6_7b deepseek-ai/deepseek-coder-6.7b-base
deepseek-coder-6_7b-instruct deepseek-ai/deepseek-coder-6.7b-instruct
deepseek-coder-33b deepseek-ai/deepseek-coder-33b-base
deepseek-coder-33b-instruct deepseek-ai/deepseek-coder-33b-instruct
deepseek-math-7b deepseek-ai/deepseek-math-7b-base
deepseek-math-7b-instruct deepseek-ai/deepseek-math-7b-instruct
deepseek-math-7b-chat deepseek-ai/deepseek-math-7b-rl
gemma-2b google/gemma-2b AI-ModelScope/gemma-2b
gemma-7b google/gemma-7b AI-ModelScope/gemma-7b
gemma-2b-instruct google/gemma-2b-it AI-ModelScope/gemma-2b-it
gemma-7b-instruct google/gemma-7b-it AI-ModelScope/gemma-7b-it
gemma2-2b google/gemma-2-2b
gemma2-9b google/gemma-2-9b
gemma2-27b google/gemma-2-27b
gemma2-2b-instruct google/gemma-2-2b-it
gemma2-9b-instruct google/gemma-2-9b-it
gemma2-27b-instruct google/gemma-2-27b-it
llama2-7b meta-llama/Llama-2-7b-hf modelscope/Llama-2-7b-ms
llama2-7b-chat meta-llama/Llama-2-7b-chat-hf modelscope/Llama-2-7b-chat-ms
llama2-13b meta-llama/Llama-2-13b-hf modelscope/Llama-2-13b-ms
llama2-13b-chat meta-llama/Llama-2-13b-chat-hf modelscope/Llama-2-13b-chat-ms
llama2-70b meta-llama/Llama-2-70b-hf modelscope/Llama-2-70b-ms
llama2-70b-chat meta-llama/Llama-2-70b-chat-hf modelscope/Llama-2-70b-chat-ms
llama3-8b meta-llama/Meta-Llama-3-8B
llama3-8b-instruct meta-llama/Meta-Llama-3-8B-Instruct
llama3-8b-instruct-int4 study-hjt/Meta-Llama-3-8B-Instruct-GPTQ-Int4
llama3-8b-instruct-int8 study-hjt/Meta-Llama-3-8B-Instruct-GPTQ-Int8
llama3-8b-instruct-awq study-hjt/Meta-Llama-3-8B-Instruct-AWQ
llama3-70b meta-llama/Meta-Llama-3-70B
llama3-70b-instruct meta-llama/Meta-Llama-3-70B-Instruct
llama3-70b-instruct-int4 study-hjt/Meta-Llama-3-70B-Instruct-GPTQ-Int4
llama3-70b-instruct-int8 study-hjt/Meta-Llama-3-70B-Instruct-GPTQ-Int8 huangjintao/Meta-Llama-3-70b-Instruct-GPTQ-Int8
llama3-70b-instruct-awq study-hjt/Meta-Llama-3-70B-Instruct-AWQ
llama3_1-8b meta-llama/Meta-Llama-3.1-8B
llama3_1-8b-instruct meta-llama/Meta-Llama-3.1-8B-Instruct
llama3_1-70b meta-llama/Meta-Llama-3.1-70B
llama3_1-70b-instruct meta-llama/Meta-Llama-3.1-70B-Instruct
llama3_2-1b meta-llama/Llama-3.2-1B
llama3_2-1b-instruct meta-llama/Llama-3.2-1B-Instruct
llama3_2-3b meta-llama/Llama-3.2-3B
llama3_2-3b-instruct meta-llama/Llama-3.2-3B-Instruct
chinese-llama-2-1_3b hfl/chinese-llama-2-1.3b AI-ModelScope/chinese-llama-2-1.3b
chinese-llama-2-7b hfl/chinese-llama-2-7b AI-ModelScope/chinese-llama-2-7b
chinese-llama-2-7b-16k hfl/chinese-llama-2-7b-16k AI-ModelScope/chinese-llama-2-7b-16k
chinese-llama-2-7b-64k hfl/chinese-llama-2-7b-64k AI-ModelScope/chinese-llama-2-7b-64k
chinese-llama-2-13b hfl/chinese-llama-2-13b AI-ModelScope/chinese-llama-2-13b
chinese-llama-2-13b-16k hfl/chinese-llama-2-13b-16k AI-ModelScope/chinese-llama-2-13b-16k
chinese-alpaca-2-1_3b hfl/chinese-alpaca-2-1.3b AI-ModelScope/chinese-alpaca-2-1.3b
chinese-alpaca-2-7b hfl/chinese-alpaca-2-7b AI-ModelScope/chinese-alpaca-2-7b
chinese-alpaca-2-7b-16k hfl/chinese-alpaca-2-7b-16k AI-ModelScope/chinese-alpaca-2-7b-16k
chinese-alpaca-2-7b-64k hfl/chinese-alpaca-2-7b-64k AI-ModelScope/chinese-alpaca-2-7b-64k
chinese-alpaca-2-13b hfl/chinese-alpaca-2-13b AI-ModelScope/chinese-alpaca-2-13b
chinese-alpaca-2-13b-16k hfl/chinese-alpaca-2-13b-16k AI-ModelScope/chinese-alpaca-2-13b-16k
llama-3-chinese-8b hfl/llama-3-chinese-8b ChineseAlpacaGroup/llama-3-chinese-8b
llama-3-chinese-8b-instruct hfl/llama-3-chinese-8b-instruct ChineseAlpacaGroup/llama-3-chinese-8b-instruct
atom-7b FlagAlpha/Atom-7B
atom-7b-chat FlagAlpha/Atom-7B-Chat
mistral-7b mistralai/Mistral-7B-v0.1
mistral-7b-v2 alpindale/Mistral-7B-v0.2-hf AI-ModelScope/Mistral-7B-v0.2-hf
mistral-7b-instruct mistralai/Mistral-7B-Instruct-v0.1
mistral-7b-instruct-v2 mistralai/Mistral-7B-Instruct-v0.2
mistral-7b-instruct-v3 mistralai/Mistral-7B-Instruct-v0.3 LLM-Research/Mistral-7B-Instruct-v0.3
mistral-nemo-base-2407 mistralai/Mistral-Nemo-Base-2407
mistral-nemo-instruct-2407 mistralai/Mistral-Nemo-Instruct-2407
mistral-small-instruct-2409 mistralai/Mistral-Small-Instruct-2409
mistral-large-instruct-2407 mistralai/Mistral-Large-Instruct-2407 LLM-Research/Mistral-Large-Instruct-2407
mixtral-moe-7b mistralai/Mixtral-8x7B-v0.1
mixtral-moe-7b-instruct mistralai/Mixtral-8x7B-Instruct-v0.1
mixtral-moe-8x22b-v1 mistral-community/Mixtral-8x22B-v0.1 AI-ModelScope/Mixtral-8x22B-v0.1
zephyr-7b-beta-chat HuggingFaceH4/zephyr-7b-beta modelscope/zephyr-7b-beta
phi3-4b-4k-instruct microsoft/Phi-3-mini-4k-instruct
phi3-4b-128k-instruct microsoft/Phi-3-mini-128k-instruct
phi3-medium-4k-instruct microsoft/Phi-3-medium-4k-instruct
phi3-medium-128k-instruct microsoft/Phi-3-medium-128k-instruct
phi3_5-mini-instruct microsoft/Phi-3.5-mini-instruct
sus-34b-chat SUSTech/SUS-Chat-34B SUSTC/SUS-Chat-34B
tongyi-finance-14b-chat jxy/Tongyi-Finance-14B-Chat TongyiFinance/Tongyi-Finance-14B-Chat
tongyi-finance-14b-chat-int4 jxy/Tongyi-Finance-14B-Chat-Int4 TongyiFinance/Tongyi-Finance-14B-Chat-Int4
yi-6b 01-ai/Yi-6B
yi-6b-200k 01-ai/Yi-6B-200K
yi-6b-chat 01-ai/Yi-6B-Chat
yi-6b-chat-awq 01-ai/Yi-6B-Chat-4bits
yi-6b-chat-int8 01-ai/Yi-6B-Chat-8bits
yi-9b 01-ai/Yi-9B
yi-9b-200k 01-ai/Yi-9B-200K
yi-34b 01-ai/Yi-34B
yi-34b-200k 01-ai/Yi-34B-200K
yi-34b-chat 01-ai/Yi-34B-Chat
yi-34b-chat-awq 01-ai/Yi-34B-Chat-4bits
yi-34b-chat-int8 01-ai/Yi-34B-Chat-8bits
yi-1_5-6b 01-ai/Yi-1.5-6B
yi-1_5-6b-chat 01-ai/Yi-1.5-6B-Chat
yi-1_5-6b-chat-awq-int4 modelscope/Yi-1.5-6B-Chat-AWQ AI-ModelScope/Yi-1.5-6B-Chat-AWQ
yi-1_5-6b-chat-gptq-int4 modelscope/Yi-1.5-6B-Chat-GPTQ AI-ModelScope/Yi-1.5-6B-Chat-GPTQ
yi-1_5-9b 01-ai/Yi-1.5-9B
yi-1_5-9b-chat 01-ai/Yi-1.5-9B-Chat
yi-1_5-9b-chat-16k 01-ai/Yi-1.5-9B-Chat-16K
yi-1_5-9b-chat-awq-int4 modelscope/Yi-1.5-9B-Chat-AWQ AI-ModelScope/Yi-1.5-9B-Chat-AWQ
yi-1_5-9b-chat-gptq-int4 modelscope/Yi-1.5-9B-Chat-GPTQ AI-ModelScope/Yi-1.5-9B-Chat-GPTQ
yi-1_5-34b 01-ai/Yi-1.5-34B
yi-1_5-34b-chat 01-ai/Yi-1.5-34B-Chat
yi-1_5-34b-chat-16k 01-ai/Yi-1.5-34B-Chat-16K
yi-1_5-34b-chat-awq-int4 modelscope/Yi-1.5-34B-Chat-AWQ AI-ModelScope/Yi-1.5-34B-Chat-AWQ
yi-1_5-34b-chat-gptq-int4 modelscope/Yi-1.5-34B-Chat-GPTQ AI-ModelScope/Yi-1.5-34B-Chat-GPTQ
yi-coder-1_5b 01-ai/Yi-Coder-1.5B
yi-coder-1_5b-chat 01-ai/Yi-Coder-1.5B-Chat
yi-coder-9b 01-ai/Yi-Coder-9B
yi-coder-9b-chat 01-ai/Yi-Coder-9B-Chat
qwen1half-moe-a2_7b Qwen/Qwen1.5-MoE-A2.7B
qwen1half-moe-a2_7b-chat Qwen/Qwen1.5-MoE-A2.7B-Chat
qwen1half-moe-a2_7b-chat-int4 Qwen/Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4
qwen2-57b-a14b Qwen/Qwen2-57B-A14B
qwen2-57b-a14b-instruct Qwen/Qwen2-57B-A14B-Instruct
qwen2-57b-a14b-instruct-int4 Qwen/Qwen2-57B-A14B-Instruct-GPTQ-Int4
qwen2_5-coder-1_5b Qwen/Qwen2.5-Coder-1.5B
qwen2_5-coder-1_5b-instruct Qwen/Qwen2.5-Coder-1.5B-Instruct
qwen2_5-coder-7b Qwen/Qwen2.5-Coder-7B
qwen2_5-coder-7b-instruct Qwen/Qwen2.5-Coder-7B-Instruct
"""  # noqa: E501

# Qwen's generations, each with a model for each size, and with each of the endings: of the model_type, of the
# name.
_QWEN_GENERATIONS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "qwen",
        "Qwen",
        "1_8b 7b 14b 72b",
        {"": "", "-chat": "-Chat", "-chat-int4": "-Chat-Int4", "-chat-int8": "-Chat-Int8"},
    ),
    (
        "qwen1half",
        "Qwen1.5",
        "0_5b 1_8b 4b 7b 14b 32b 72b 110b",
        {
            "": "",
            "-chat": "-Chat",
            "-chat-int4": "-Chat-GPTQ-Int4",
            "-chat-int8": "-Chat-GPTQ-Int8",
            "-chat-awq": "-Chat-AWQ",
        },
    ),
    (
        "qwen2",
        "Qwen2",
        "0_5b 1_5b 7b 72b",
        {
            "": "",
            "-instruct": "-Instruct",
            "-instruct-int4": "-Instruct-GPTQ-Int4",
            "-instruct-int8": "-Instruct-GPTQ-Int8",
            "-instruct-awq": "-Instruct-AWQ",
        },
    ),
    (
        "qwen2_5",
        "Qwen2.5",
        "0_5b 1_5b 3b 7b 14b 32b 72b",
        {
            "": "",
            "-instruct": "-Instruct",
            "-instruct-gptq-int4": "-Instruct-GPTQ-Int4",
            "-instruct-gptq-int8": "-Instruct-GPTQ-Int8",
            "-instruct-awq": "-Instruct-AWQ",
        },
    ),
    ("qwen2-math", "Qwen2-Math", "1_5b 7b 72b", {"": "", "-instruct": "-Instruct"}),
    ("qwen2_5-math", "Qwen2.5-Math", "1_5b 7b 72b", {"": "", "-instruct": "-Instruct"}),
)
# Combinations of the above that were never published.
_UNPUBLISHED = {"qwen1half-32b-chat-int8", "qwen1half-110b-chat-int8"}


def _qwen_lines() -> list[str]:
    lines = []
    for generation, name, sizes, endings in _QWEN_GENERATIONS:
        for size in sizes.split():
            # Only the first generation's names are written with an underscore.
            written = size.replace("b", "B") if name == "Qwen" else size.replace("_", ".").replace("b", "B")
            for ending, named in endings.items():
                model_type = f"{generation}-{size}{ending}"
                if model_type not in _UNPUBLISHED:
                    lines.append(f"{model_type} Qwen/{name}-{written}{named}")
    return lines


def _read(lines: list[str]) -> dict[str, ModelType]:
    types = {}
    for line in lines:
        model_type, huggingface, *modelscope = line.split()
        owner, _, name = huggingface.partition("/")
        elsewhere = modelscope[0] if modelscope else f"{_MODELSCOPE_OWNERS.get(owner, owner)}/{name}"
        types[model_type] = ModelType(huggingface, elsewhere)
    return types


MODEL_TYPES = _read([*_TABLE.strip().splitlines(), *_qwen_lines()])
