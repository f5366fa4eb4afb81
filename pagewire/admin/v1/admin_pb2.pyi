from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("ready", "draining", "num_open_requests")
    READY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    draining: bool
    num_open_requests: int
    def __init__(self, ready: _Optional[bool] = ..., draining: _Optional[bool] = ..., num_open_requests: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout", "replica")
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    timeout: float
    replica: str
    def __init__(self, timeout: _Optional[float] = ..., replica: _Optional[str] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: str
    def __init__(self, replica: _Optional[str] = ...) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_open_requests", "drained", "num_aborted")
    NUM_OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    NUM_ABORTED_FIELD_NUMBER: _ClassVar[int]
    num_open_requests: int
    drained: bool
    num_aborted: int
    def __init__(self, num_open_requests: _Optional[int] = ..., drained: _Optional[bool] = ..., num_aborted: _Optional[int] = ...) -> None: ...
