from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("dispatch_version", "pid")
    DISPATCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    dispatch_version: int
    pid: int
    def __init__(self, dispatch_version: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("dispatch_version", "pid", "model", "vocab_size", "max_model_len", "eos_token_ids", "block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "dtype", "device", "rank", "world_size", "hidden_size", "num_kv_groups", "max_tokens_per_step", "max_loras", "fingerprint", "more_ahead", "kv_windows", "task", "labels", "num_labels", "kernels", "weights", "quantization", "kv_cache_dtype", "num_stages", "adapters")
    DISPATCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_GROUPS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_LORAS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MORE_AHEAD_FIELD_NUMBER: _ClassVar[int]
    KV_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NUM_LABELS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    dispatch_version: int
    pid: int
    model: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str
    device: str
    rank: int
    world_size: int
    hidden_size: int
    num_kv_groups: int
    max_tokens_per_step: int
    max_loras: int
    fingerprint: str
    more_ahead: bool
    kv_windows: _containers.RepeatedScalarFieldContainer[int]
    task: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    num_labels: int
    kernels: str
    weights: str
    quantization: str
    kv_cache_dtype: str
    num_stages: int
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, dispatch_version: _Optional[int] = ..., pid: _Optional[int] = ..., model: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., hidden_size: _Optional[int] = ..., num_kv_groups: _Optional[int] = ..., max_tokens_per_step: _Optional[int] = ..., max_loras: _Optional[int] = ..., fingerprint: _Optional[str] = ..., more_ahead: _Optional[bool] = ..., kv_windows: _Optional[_Iterable[int]] = ..., task: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., num_labels: _Optional[int] = ..., kernels: _Optional[str] = ..., weights: _Optional[str] = ..., quantization: _Optional[str] = ..., kv_cache_dtype: _Optional[str] = ..., num_stages: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("adapter_id", "name", "path", "digest", "retired")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RETIRED_FIELD_NUMBER: _ClassVar[int]
    adapter_id: int
    name: str
    path: str
    digest: str
    retired: bool
    def __init__(self, adapter_id: _Optional[int] = ..., name: _Optional[str] = ..., path: _Optional[str] = ..., digest: _Optional[str] = ..., retired: _Optional[bool] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("vocab_size", "hidden_size", "max_model_len", "block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "num_kv_groups", "max_tokens_per_step", "max_loras", "kv_windows", "num_labels")
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_GROUPS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_LORAS_FIELD_NUMBER: _ClassVar[int]
    KV_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    NUM_LABELS_FIELD_NUMBER: _ClassVar[int]
    vocab_size: int
    hidden_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_groups: int
    max_tokens_per_step: int
    max_loras: int
    kv_windows: _containers.RepeatedScalarFieldContainer[int]
    num_labels: int
    def __init__(self, vocab_size: _Optional[int] = ..., hidden_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., num_kv_groups: _Optional[int] = ..., max_tokens_per_step: _Optional[int] = ..., max_loras: _Optional[int] = ..., kv_windows: _Optional[_Iterable[int]] = ..., num_labels: _Optional[int] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("plan_ring", "plan_reader", "result_ring", "limits", "rendezvous")
    PLAN_RING_FIELD_NUMBER: _ClassVar[int]
    PLAN_READER_FIELD_NUMBER: _ClassVar[int]
    RESULT_RING_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    plan_ring: str
    plan_reader: int
    result_ring: str
    limits: Limits
    rendezvous: str
    def __init__(self, plan_ring: _Optional[str] = ..., plan_reader: _Optional[int] = ..., result_ring: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., rendezvous: _Optional[str] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Control(_message.Message):
    __slots__ = ("hello", "welcome", "attach", "attached", "refused")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    attach: Attach
    attached: Attached
    refused: Refused
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., attached: _Optional[_Union[Attached, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ...) -> None: ...
