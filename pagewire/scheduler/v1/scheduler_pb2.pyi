from pagewire.inference.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_REASON_UNSPECIFIED: _ClassVar[EndReason]
    END_REASON_STOP: _ClassVar[EndReason]
    END_REASON_LENGTH: _ClassVar[EndReason]
    END_REASON_ABORT: _ClassVar[EndReason]
    END_REASON_ERROR: _ClassVar[EndReason]
END_REASON_UNSPECIFIED: EndReason
END_REASON_STOP: EndReason
END_REASON_LENGTH: EndReason
END_REASON_ABORT: EndReason
END_REASON_ERROR: EndReason

class Submit(_message.Message):
    __slots__ = ("handle", "request_id", "token_ids", "num_prompt_tokens", "sampling", "priority", "timeout", "resumed", "bad_words", "cache_salt", "pooling", "client", "adapter_id", "part", "traceparent", "received")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: _inference_pb2.SamplingParams
    priority: int
    timeout: float
    resumed: bool
    bad_words: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenIds]
    cache_salt: str
    pooling: _inference_pb2.Pooling
    client: str
    adapter_id: int
    part: int
    traceparent: str
    received: float
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., timeout: _Optional[float] = ..., resumed: _Optional[bool] = ..., bad_words: _Optional[_Iterable[_Union[_inference_pb2.TokenIds, _Mapping]]] = ..., cache_salt: _Optional[str] = ..., pooling: _Optional[_Union[_inference_pb2.Pooling, str]] = ..., client: _Optional[str] = ..., adapter_id: _Optional[int] = ..., part: _Optional[int] = ..., traceparent: _Optional[str] = ..., received: _Optional[float] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("handle", "reason")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: EndReason
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[_Union[EndReason, str]] = ...) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("submit", "abort", "changes", "watch_cache")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    WATCH_CACHE_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    abort: Abort
    changes: Changes
    watch_cache: WatchCache
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., changes: _Optional[_Union[Changes, _Mapping]] = ..., watch_cache: _Optional[_Union[WatchCache, _Mapping]] = ...) -> None: ...

class WatchCache(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Changes(_message.Message):
    __slots__ = ("aborts", "submits")
    ABORTS_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    aborts: _containers.RepeatedCompositeFieldContainer[Abort]
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    def __init__(self, aborts: _Optional[_Iterable[_Union[Abort, _Mapping]]] = ..., submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("model", "deltas", "cache")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    model: GetModelResponse
    deltas: StepDeltas
    cache: CacheChanges
    def __init__(self, model: _Optional[_Union[GetModelResponse, _Mapping]] = ..., deltas: _Optional[_Union[StepDeltas, _Mapping]] = ..., cache: _Optional[_Union[CacheChanges, _Mapping]] = ...) -> None: ...

class CacheChanges(_message.Message):
    __slots__ = ("cleared", "stored", "removed", "num_requests", "num_own_requests")
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_OWN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    cleared: bool
    stored: bytes
    removed: bytes
    num_requests: int
    num_own_requests: int
    def __init__(self, cleared: _Optional[bool] = ..., stored: _Optional[bytes] = ..., removed: _Optional[bytes] = ..., num_requests: _Optional[int] = ..., num_own_requests: _Optional[int] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("handle", "num_cached_tokens")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    num_cached_tokens: int
    def __init__(self, handle: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("handle", "first", "logprobs")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    first: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, handle: _Optional[int] = ..., first: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class PooledState(_message.Message):
    __slots__ = ("handle", "values")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, handle: _Optional[int] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("handle", "reason", "stop_token_id", "status", "error", "num_cached_tokens", "num_output_tokens", "param", "retry_after")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: EndReason
    stop_token_id: int
    status: int
    error: str
    num_cached_tokens: int
    num_output_tokens: int
    param: str
    retry_after: float
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[_Union[EndReason, str]] = ..., stop_token_id: _Optional[int] = ..., status: _Optional[int] = ..., error: _Optional[str] = ..., num_cached_tokens: _Optional[int] = ..., num_output_tokens: _Optional[int] = ..., param: _Optional[str] = ..., retry_after: _Optional[float] = ...) -> None: ...

class StepDeltas(_message.Message):
    __slots__ = ("step_id", "handles", "token_ids", "logprob_indices", "logprobs", "admitted", "ended", "prompt_logprobs", "pooled_states")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_INDICES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    POOLED_STATES_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    handles: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprob_indices: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    admitted: _containers.RepeatedCompositeFieldContainer[Admitted]
    ended: _containers.RepeatedCompositeFieldContainer[Ended]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    pooled_states: _containers.RepeatedCompositeFieldContainer[PooledState]
    def __init__(self, step_id: _Optional[int] = ..., handles: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprob_indices: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., admitted: _Optional[_Iterable[_Union[Admitted, _Mapping]]] = ..., ended: _Optional[_Iterable[_Union[Ended, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ..., pooled_states: _Optional[_Iterable[_Union[PooledState, _Mapping]]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "sampling", "priority", "client")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.SamplingParams
    priority: int
    client: str
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("token", "ended")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    token: Token
    ended: Ended
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("token_id", "logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprobs: TokenLogprobs
    def __init__(self, token_id: _Optional[int] = ..., logprobs: _Optional[_Union[TokenLogprobs, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "vocab_size", "max_model_len", "eos_token_ids", "block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "dtype", "device", "ready", "hidden_size", "takes_changes", "task", "labels", "kernels", "weights", "quantization", "kv_cache_dtype", "fingerprint", "adapters", "max_loras", "allows_runtime_lora")
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
    READY_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    TAKES_CHANGES_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_LORAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWS_RUNTIME_LORA_FIELD_NUMBER: _ClassVar[int]
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
    ready: bool
    hidden_size: int
    takes_changes: bool
    task: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    kernels: str
    weights: str
    quantization: str
    kv_cache_dtype: str
    fingerprint: str
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    max_loras: int
    allows_runtime_lora: bool
    def __init__(self, model: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., ready: _Optional[bool] = ..., hidden_size: _Optional[int] = ..., takes_changes: _Optional[bool] = ..., task: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., kernels: _Optional[str] = ..., weights: _Optional[str] = ..., quantization: _Optional[str] = ..., kv_cache_dtype: _Optional[str] = ..., fingerprint: _Optional[str] = ..., adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., max_loras: _Optional[int] = ..., allows_runtime_lora: _Optional[bool] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("adapter_id", "name", "path", "created")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    adapter_id: int
    name: str
    path: str
    created: int
    def __init__(self, adapter_id: _Optional[int] = ..., name: _Optional[str] = ..., path: _Optional[str] = ..., created: _Optional[int] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "path", "in_place")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    IN_PLACE_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    in_place: bool
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., in_place: _Optional[bool] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("num_requests_running", "num_requests_waiting", "num_used_blocks", "num_blocks", "max_num_seqs", "max_num_waiting", "num_steps_in_flight", "num_clients_waiting")
    NUM_REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_CLIENTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    num_requests_running: int
    num_requests_waiting: int
    num_used_blocks: int
    num_blocks: int
    max_num_seqs: int
    max_num_waiting: int
    num_steps_in_flight: int
    num_clients_waiting: int
    def __init__(self, num_requests_running: _Optional[int] = ..., num_requests_waiting: _Optional[int] = ..., num_used_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_waiting: _Optional[int] = ..., num_steps_in_flight: _Optional[int] = ..., num_clients_waiting: _Optional[int] = ...) -> None: ...

class GetMetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetMetricsResponse(_message.Message):
    __slots__ = ("exposition",)
    EXPOSITION_FIELD_NUMBER: _ClassVar[int]
    exposition: bytes
    def __init__(self, exposition: _Optional[bytes] = ...) -> None: ...

class GetTimelineRequest(_message.Message):
    __slots__ = ("request_id", "client")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    client: str
    def __init__(self, request_id: _Optional[str] = ..., client: _Optional[str] = ...) -> None: ...

class GetTimelineResponse(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[Timeline]
    def __init__(self, parts: _Optional[_Iterable[_Union[Timeline, _Mapping]]] = ...) -> None: ...

class Timeline(_message.Message):
    __slots__ = ("part", "received", "queued", "scheduled", "first_token", "last_token", "ended", "reason", "error", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "num_preemptions", "num_worker_losses", "running", "trace_id", "events")
    PART_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKER_LOSSES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    part: int
    received: float
    queued: float
    scheduled: float
    first_token: float
    last_token: float
    ended: float
    reason: EndReason
    error: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    num_worker_losses: int
    running: bool
    trace_id: str
    events: _containers.RepeatedCompositeFieldContainer[TimelineEvent]
    def __init__(self, part: _Optional[int] = ..., received: _Optional[float] = ..., queued: _Optional[float] = ..., scheduled: _Optional[float] = ..., first_token: _Optional[float] = ..., last_token: _Optional[float] = ..., ended: _Optional[float] = ..., reason: _Optional[_Union[EndReason, str]] = ..., error: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_output_tokens: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_worker_losses: _Optional[int] = ..., running: _Optional[bool] = ..., trace_id: _Optional[str] = ..., events: _Optional[_Iterable[_Union[TimelineEvent, _Mapping]]] = ...) -> None: ...

class TimelineEvent(_message.Message):
    __slots__ = ("time", "name", "detail")
    TIME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    time: float
    name: str
    detail: str
    def __init__(self, time: _Optional[float] = ..., name: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class ObserveRequest(_message.Message):
    __slots__ = ("interval",)
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    interval: float
    def __init__(self, interval: _Optional[float] = ...) -> None: ...

class ObserveResponse(_message.Message):
    __slots__ = ("ready", "time", "load", "totals", "time_to_first_token", "inter_token_latency", "steps", "num_steps_left_out", "requests", "blocks", "prefixes")
    READY_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    INTER_TOKEN_LATENCY_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    time: float
    load: GetLoadResponse
    totals: ObservedTotals
    time_to_first_token: ObservedLatency
    inter_token_latency: ObservedLatency
    steps: _containers.RepeatedCompositeFieldContainer[ObservedStep]
    num_steps_left_out: int
    requests: _containers.RepeatedCompositeFieldContainer[ObservedRequest]
    blocks: ObservedBlocks
    prefixes: ObservedPrefixes
    def __init__(self, ready: _Optional[bool] = ..., time: _Optional[float] = ..., load: _Optional[_Union[GetLoadResponse, _Mapping]] = ..., totals: _Optional[_Union[ObservedTotals, _Mapping]] = ..., time_to_first_token: _Optional[_Union[ObservedLatency, _Mapping]] = ..., inter_token_latency: _Optional[_Union[ObservedLatency, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[ObservedStep, _Mapping]]] = ..., num_steps_left_out: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[ObservedRequest, _Mapping]]] = ..., blocks: _Optional[_Union[ObservedBlocks, _Mapping]] = ..., prefixes: _Optional[_Union[ObservedPrefixes, _Mapping]] = ...) -> None: ...

class ObservedTotals(_message.Message):
    __slots__ = ("steps", "computed_tokens", "generated_tokens", "prefix_queries", "prefix_hits", "preemptions", "evictions", "ended_requests", "worker_losses")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    ENDED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WORKER_LOSSES_FIELD_NUMBER: _ClassVar[int]
    steps: int
    computed_tokens: int
    generated_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    evictions: int
    ended_requests: int
    worker_losses: int
    def __init__(self, steps: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., prefix_queries: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., preemptions: _Optional[int] = ..., evictions: _Optional[int] = ..., ended_requests: _Optional[int] = ..., worker_losses: _Optional[int] = ...) -> None: ...

class ObservedLatency(_message.Message):
    __slots__ = ("count", "p50", "p95")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    P50_FIELD_NUMBER: _ClassVar[int]
    P95_FIELD_NUMBER: _ClassVar[int]
    count: int
    p50: float
    p95: float
    def __init__(self, count: _Optional[int] = ..., p50: _Optional[float] = ..., p95: _Optional[float] = ...) -> None: ...

class ObservedStep(_message.Message):
    __slots__ = ("step_id", "ended", "execute_us", "num_decodes", "num_prompt_tokens", "failed")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_US_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODES_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    ended: float
    execute_us: _containers.RepeatedScalarFieldContainer[int]
    num_decodes: int
    num_prompt_tokens: int
    failed: bool
    def __init__(self, step_id: _Optional[int] = ..., ended: _Optional[float] = ..., execute_us: _Optional[_Iterable[int]] = ..., num_decodes: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., failed: _Optional[bool] = ...) -> None: ...

class ObservedRequest(_message.Message):
    __slots__ = ("number", "request_id", "client", "running", "num_prompt_tokens", "num_cached_tokens", "num_computed_tokens", "num_output_tokens", "max_total_tokens", "num_blocks", "age", "num_preemptions", "adapter_id")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    number: int
    request_id: str
    client: str
    running: bool
    num_prompt_tokens: int
    num_cached_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    max_total_tokens: int
    num_blocks: int
    age: float
    num_preemptions: int
    adapter_id: int
    def __init__(self, number: _Optional[int] = ..., request_id: _Optional[str] = ..., client: _Optional[str] = ..., running: _Optional[bool] = ..., num_prompt_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., num_output_tokens: _Optional[int] = ..., max_total_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., age: _Optional[float] = ..., num_preemptions: _Optional[int] = ..., adapter_id: _Optional[int] = ...) -> None: ...

class ObservedBlocks(_message.Message):
    __slots__ = ("stride", "ref_counts", "cached", "owners")
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    REF_COUNTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    stride: int
    ref_counts: bytes
    cached: bytes
    owners: bytes
    def __init__(self, stride: _Optional[int] = ..., ref_counts: _Optional[bytes] = ..., cached: _Optional[bytes] = ..., owners: _Optional[bytes] = ...) -> None: ...

class ObservedPrefixes(_message.Message):
    __slots__ = ("nodes", "num_left_out", "roots")
    NODES_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[ObservedPrefix]
    num_left_out: int
    roots: bytes
    def __init__(self, nodes: _Optional[_Iterable[_Union[ObservedPrefix, _Mapping]]] = ..., num_left_out: _Optional[int] = ..., roots: _Optional[bytes] = ...) -> None: ...

class ObservedPrefix(_message.Message):
    __slots__ = ("first_block", "parent", "num_blocks", "num_hits", "num_held")
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    parent: int
    num_blocks: int
    num_hits: int
    num_held: int
    def __init__(self, first_block: _Optional[int] = ..., parent: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_hits: _Optional[int] = ..., num_held: _Optional[int] = ...) -> None: ...
