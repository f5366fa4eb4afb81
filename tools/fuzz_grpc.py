"""Sends random and damaged messages to every method of the public gRPC services, ours and Triton's.

python -m tools.fuzz_grpc --seconds 120 --seed 1

Half of the messages are well-formed ones whose fields have random values, extreme ones among them; half are
the bytes of such messages, damaged. A call fails the run if it ends with INTERNAL, UNKNOWN or UNAVAILABLE, or
takes more than 30 s; in a stream of requests none may end with an internal error. At the end a completion
must be what it was at the beginning, and nothing may have been restarted.
Without --target a service of a tiny model is started.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from frontend.triton.inputs import INPUTS
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from pagewire.triton import triton_pb2
from tools.fuzz_service import harm, process_ids, start_service

_CALL_SECONDS = 30.0
_BAD = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
_OURS: list[MethodDescriptor] = list(pb.DESCRIPTOR.services_by_name["InferenceService"].methods)
_TRITONS: list[MethodDescriptor] = list(
    triton_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
)
_GENERATING = ("Generate", "GenerateOnce", "ModelInfer", "ModelStreamInfer")
_METHODS = [*_OURS, *_TRITONS]
_METHODS += [method for method in _METHODS if method.name in _GENERATING for _ in range(4)]
_CONTENTS = {
    "BYTES": "bytes_contents",
    "INT32": "int_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "BOOL": "bool_contents",
}
_MAX_DEPTH = 6
_FEW = 8

_TEXTS = (
    *("", "a", "Once upon a time", "user", "assistant", "system", "tool", "tiny", "\0", "🙂" * 5, "x" * 5000),
    *("[a-z]+", "(", '{"type": "object"}', '{"type": "strin"}', "{", 'root ::= "a"', "[" * 300, "null"),
    *("{{ messages }}", "{% for m in messages %}", "call-1", "f"),
)
_INTEGERS = (
    0,
    1,
    2,
    3,
    7,
    20,
    100,
    129,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    -1,
    -2,
    -(2**31),
    -(2**63),
)
_NUMBERS = (0.0, 1.0, 0.5, -1.0, 2.0, 1e-30, 1e30, math.nan, math.inf, -math.inf, -0.0)
_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def fill(message: Message, random: Random, depth: int = 0) -> None:
    """Sets some of a message's fields, and theirs, to random values."""
    density = random.choice((0.15, 0.4, 0.8)) if depth else 0.7
    for field in message.DESCRIPTOR.fields:
        if random.random() > density:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entries = getattr(message, field.name)
            for _ in range(random.choice((1, 2, 30))):
                key, value = field.message_type.fields
                if value.message_type is None:
                    entries[_scalar(key, random)] = _scalar(value, random)
                else:
                    fill(entries[_scalar(key, random)], random, depth + 1)
        elif field.is_repeated:
            for _ in range(random.choice((0, 1, 2, 3, 20))):
                if field.message_type is None:
                    getattr(message, field.name).append(_scalar(field, random))
                else:
                    fill(getattr(message, field.name).add(), random, depth + 1)
        elif field.message_type is None:
            setattr(message, field.name, _scalar(field, random))
        elif depth < _MAX_DEPTH:
            child = getattr(message, field.name)
            child.SetInParent()
            fill(child, random, depth + 1)


def _scalar(field: FieldDescriptor, random: Random) -> Any:
    kind = field.cpp_type
    if kind in _BITS:
        low, high = _BITS[kind]
        value = random.choice(_INTEGERS) if random.random() < 0.5 else random.randrange(300)
        return min(max(value, low), high)
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return random.choice(_NUMBERS) if random.random() < 0.5 else random.random()
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return random.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return random.choice((0, 1, 2, 3, 4, 99))
    text = random.choice(_TEXTS)
    return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text


def tame(message: Message, random: Random) -> None:
    """Makes most requests sensible in all but a few fields, or hardly any would get far."""
    if "model" in message.DESCRIPTOR.fields_by_name and random.random() < 0.9:
        message.model = ""
    if isinstance(message, pb.EmbedRequest) and random.random() < 0.7:
        message.ClearField(random.choice(("texts", "token_ids")))
        message.pooling = random.choice((pb.POOLING_LAST, pb.POOLING_MEAN, pb.POOLING_CLS))
    if isinstance(message, pb.GenerateRequest) and random.random() < 0.8:
        kept = random.sample([field.name for field in message.sampling.DESCRIPTOR.fields], 2)
        for field, _ in message.sampling.ListFields():
            if field.name not in kept:
                message.sampling.ClearField(field.name)
        for name in ("request_id", "cache_salt", "timeout"):
            message.ClearField(name)
        if random.random() < 0.7:
            message.text = "Once upon a time"
        # A hundred answers as long as the context take longer than a call gets, and are no fault.
        if max(message.sampling.n, message.sampling.best_of) > _FEW:
            message.sampling.max_tokens = min(message.sampling.max_tokens or _FEW, _FEW)


def tame_tensors(message: triton_pb2.ModelInferRequest, random: Random) -> None:
    """Gives most requests a prompt and a few further inputs with values of their type."""
    if random.random() < 0.2:
        return
    message.model_name, message.model_version = random.choice(("ensemble", "tiny", "tensorrt_llm_bls")), ""
    del message.inputs[:], message.outputs[:], message.raw_input_contents[:]
    for name in list(message.parameters):
        if random.random() < 0.9:
            del message.parameters[name]
    num_prompts = random.choice((1, 1, 1, 3))
    for name in ("text_input", "max_tokens", *random.sample(list(INPUTS), random.choice((0, 1, 3)))):
        known = INPUTS[name]
        given = message.inputs.add(name=name, datatype=known.datatype)
        rows = num_prompts if name == "text_input" else random.choice((1, num_prompts))
        given.shape.extend([rows, 1] if random.random() < 0.9 else random.choice(([rows], [], [1, 1, 1])))
        field = given.contents.DESCRIPTOR.fields_by_name[_CONTENTS[known.datatype]]
        value = b"Once" if name == "text_input" else _FEW if name == "max_tokens" else _scalar(field, random)
        getattr(given.contents, field.name).extend([value] * (rows if random.random() < 0.9 else 9))


def damage(data: bytes, random: Random) -> bytes:
    """The bytes with some of them changed, left out, doubled or added."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        place = random.randrange(len(changed) + 1)
        match random.randrange(4):
            case 0:
                changed[place : place + 1] = random.randbytes(1)
            case 1:
                del changed[place : place + random.choice((1, 2, 20))]
            case 2:
                changed[place:place] = changed[place : place + random.choice((1, 8, 50))]
            case 3:
                changed[place:place] = random.choice(
                    (b"\xff" * 10, b"\x80" * 11, b"\x0a\xff\xff\xff\xff\x0f")
                )
    return bytes(changed)


def one_call(channel: grpc.Channel, seed: int) -> tuple[str, str, str]:
    """Makes a call: its method, how it ended, and what was wrong with that, if anything was."""
    random = Random(seed)
    method = random.choice(_METHODS)
    damaged = random.random() < 0.5
    if method.client_streaming:
        return one_stream(channel, method, random, seed)
    message = random_message(method, random)
    data = message.SerializeToString()
    if damaged:
        data = damage(data, random)
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    try:
        answer = kind(path)(data, timeout=_CALL_SECONDS)
        if method.server_streaming:
            for number, _ in enumerate(answer):
                if random.random() < 0.02 and number:
                    answer.cancel()  # clients go
        status = grpc.StatusCode.OK
    except grpc.RpcError as error:
        status = error.code()
        late = status is grpc.StatusCode.DEADLINE_EXCEEDED and "deadline had passed" not in error.details()
        if status in _BAD or (late and not damaged and not message_has_timeout(message)):
            return method.name, status.name, f"seed {seed}: {method.name}: {status.name}: {error.details()}"
    return method.name, status.name, ""


def random_message(method: MethodDescriptor, random: Random) -> Message:
    """A message for a method."""
    message = GetMessageClass(method.input_type)()
    fill(message, random)
    tame(message, random)
    if isinstance(message, triton_pb2.ModelInferRequest):
        tame_tensors(message, random)
    return message


def one_stream(
    channel: grpc.Channel, method: MethodDescriptor, random: Random, seed: int
) -> tuple[str, str, str]:
    """Sends several requests on one stream. Their own failures do not end it; see `one_call`."""
    data = [random_message(method, random).SerializeToString() for _ in range(random.choice((1, 4, 12)))]
    data = [damage(each, random) if random.random() < 0.3 else each for each in data]
    path = f"/{method.containing_service.full_name}/{method.name}"
    call = channel.stream_stream(path, response_deserializer=triton_pb2.ModelStreamInferResponse.FromString)
    fault = ""
    try:
        answer = call(iter(data), timeout=_CALL_SECONDS)
        for response in answer:
            if response.error_message.startswith("internal error"):
                fault = f"seed {seed}: {method.name}: {response.error_message}"
            if random.random() < 0.005:
                answer.cancel()  # clients go
        status = grpc.StatusCode.OK
    except grpc.RpcError as error:
        status = error.code()
        if status is not grpc.StatusCode.CANCELLED:
            fault = f"seed {seed}: {method.name}: {status.name}: {error.details()}"
    return method.name, status.name, fault


def message_has_timeout(message: Message) -> bool:
    """Whether the request says itself when it is to end."""
    return isinstance(message, pb.GenerateRequest) and message.HasField("timeout")


def fuzz(target: str, seconds: float, seed: int, concurrency: int) -> int:
    """Calls until the time is over; 0 if nothing was wrong."""
    probe = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=pb.SamplingParams(temperature=0, max_tokens=8)
    )
    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    with grpc.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        before = list(stub.GenerateOnce(probe, timeout=60).token_ids)
        end = time.monotonic() + seconds

        def keep_calling(number: int) -> None:
            for offset in range(number, sys.maxsize, concurrency):
                if time.monotonic() > end:
                    return
                method, status, fault = one_call(channel, (seed << 32) + offset)
                counts[method, status] += 1
                if fault:
                    wrong.append(fault)

        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(keep_calling, range(concurrency)))
        after = list(stub.GenerateOnce(probe, timeout=60).token_ids)
    if after != before:
        wrong.append(f"a completion is not what it was before: {before}, {after}")
    for (method, status), count in sorted(counts.items()):
        print(f"{method:28} {status:20} {count}")
    print(f"{counts.total()} calls, {len(wrong)} wrong", *wrong[:20], sep="\n")
    return 1 if wrong else 0


def main() -> int:
    """The exit status: 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--target", help="such as 127.0.0.1:50051")
    arguments = parser.parse_args()
    if arguments.target:
        return fuzz(arguments.target, arguments.seconds, arguments.seed, arguments.concurrency)
    with tempfile.TemporaryDirectory() as name, start_service(Path(name)) as service:
        before = process_ids(service)
        status = fuzz(service.grpc_target, arguments.seconds, arguments.seed, arguments.concurrency)
        suffered = harm(service, before)
    print("\n".join(suffered) or "no process was restarted, no traceback was logged")
    return 1 if suffered else status


if __name__ == "__main__":
    sys.exit(main())
