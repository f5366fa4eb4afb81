"""Requests that go on differently in the middle of a block: beams, later samples, the next turn of a chat.

The miniature worker refuses a plan that reads KV which was not computed for the very tokens before it.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan
from engine.dispatch.sampling import SamplingRecord
from pagewire.wire.sampling_params import StructuredOutput
from scheduler.core import Scheduler
from scheduler.request import Request
from scheduler.settings import CoreSettings
from tests.unit.scheduler.executor import MiniatureWorker, continuation

VOCAB = 50
LIMITS = EngineLimits(
    num_blocks=64,
    block_size=8,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=128,
    vocab_size=VOCAB,
)
PROMPT = list(range(21))


class Service:
    """The core and its worker."""

    def __init__(self, limits: EngineLimits = LIMITS, settings: CoreSettings | None = None) -> None:
        self.scheduler = Scheduler(limits, settings)
        self.worker = MiniatureWorker(limits.block_size, VOCAB, limits.max_num_batched_tokens, 8)
        self.num_copied = 0

    def add(
        self, tokens: list[int], max_tokens: int = 1, constraint: StructuredOutput | None = None
    ) -> Request:
        request = Request(
            f"{len(tokens)} tokens",
            array("I", tokens),
            len(tokens),
            SamplingRecord(),
            max_total_tokens=len(tokens) + max_tokens,
            constraint=constraint,
        )
        self.scheduler.add(request)
        return request

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.num_copied += len(plan.copied_blocks)
        self.scheduler.update(self.worker.execute(plan))
        self.scheduler.pool.check()
        return plan

    def finish(self) -> None:
        while self.scheduler.num_running + self.scheduler.num_waiting:
            self.step()
        assert self.scheduler.pool.num_used == 0


def test_beams_compute_nothing_but_their_last_token() -> None:
    service = Service()
    first = service.add(PROMPT)
    service.finish()
    beams = [[*PROMPT, token] for token in (31, 32, 33)]
    for _ in range(12):
        requests = [service.add(beam) for beam in beams]
        plan = service.step()
        assert plan.counts.tolist() == [1, 1, 1]
        assert plan.starts.tolist() == [len(beam) - 1 for beam in beams]
        assert [request.token_ids[-1] for request in requests] == [
            continuation(beam, 1, VOCAB)[0] for beam in beams
        ]
        # The first goes on twice, as the likeliest beam does, and the last not at all.
        beams = [beams[0] + [41], beams[0] + [42], beams[1] + [43]]
    assert first.token_ids[-1] == continuation(PROMPT, 1, VOCAB)[0]
    assert service.num_copied > 24
    service.finish()


def test_a_prompt_that_comes_again_computes_its_last_token() -> None:
    for length in (21, 24, 25):  # within a block, at its end, one behind it
        service = Service()
        prompt = PROMPT + [7] * (length - len(PROMPT))
        first = service.add(prompt, max_tokens=30)
        service.step()
        again = service.add(prompt, max_tokens=30)
        plan = service.step()
        assert plan.counts.tolist() == [1, 1]
        assert again.num_cached_tokens == length - 1
        service.finish()
        assert first.token_ids == again.token_ids
        assert first.token_ids.tolist() == prompt + continuation(prompt, 30, VOCAB)


def test_what_a_step_computes_is_not_copied_in_it() -> None:
    service = Service()
    requests = [service.add(PROMPT, max_tokens=5) for _ in range(3)]
    plan = service.step()
    assert plan.counts.tolist() == [21, 5, 5], "whole blocks are shared at once"
    assert not len(plan.copied_blocks)
    service.finish()
    assert all(request.token_ids == requests[0].token_ids for request in requests)


def test_the_next_turn_of_a_chat_computes_what_is_new() -> None:
    service = Service()
    first = service.add(PROMPT, max_tokens=6)
    service.finish()
    turn = [*first.token_ids.tolist(), 9, 8, 7]
    second = service.add(turn, max_tokens=4)
    plan = service.step()
    # The last token of an answer is never computed.
    assert (plan.starts.tolist(), plan.counts.tolist()) == ([26], [4])
    service.finish()
    assert second.token_ids.tolist() == turn + continuation(turn, 4, VOCAB)


def test_a_few_tokens_are_computed_and_not_copied() -> None:
    service = Service()
    service.add([1] * 20)
    service.finish()
    service.add([1, 2] * 10)
    assert not len(service.step().copied_blocks)


def test_a_salt_keeps_what_is_copied_apart() -> None:
    service = Service()
    service.add(PROMPT)
    service.finish()
    request = service.add([*PROMPT, 3])
    request.root_hash = b"salted"
    plan = service.step()
    assert (plan.starts.tolist(), plan.counts.tolist()) == ([0], [22])


def test_what_one_client_sent_is_not_copied_for_another() -> None:
    service = Service()
    service.add(PROMPT)
    service.finish()
    request = service.add([*PROMPT, 3])
    request.client = "another"
    plan = service.step()
    assert plan.starts.tolist() == [16], "whole blocks are shared"
    assert not len(plan.copied_blocks)


def test_what_is_remembered_holds_no_prompts() -> None:
    service = Service(replace(LIMITS, max_num_batched_tokens=128))
    for number in range(20):
        service.add([*range(40), *[number] * 40])
        service.finish()
    remembered = service.scheduler.pool.partial._tokens
    assert max(map(len, remembered)) == LIMITS.block_size


def test_a_request_that_waits_for_its_mask_leaves_a_token_that_needs_none() -> None:
    service = Service()
    service.add(PROMPT)
    service.finish()
    request = service.add([*PROMPT, 3, 4], constraint=StructuredOutput(regex="x"))
    plan = service.step()
    assert (plan.starts.tolist(), plan.counts.tolist(), plan.samples.tolist()) == ([21], [1], [0])
    other = service.add([*PROMPT, 3], constraint=StructuredOutput(regex="x"))
    service.step()
    assert other.num_cached_tokens < 21
    service.scheduler.abort(request)
    service.scheduler.abort(other)


def test_where_no_block_is_left_to_copy_from_it_is_computed() -> None:
    service = Service(replace(LIMITS, num_blocks=3, max_model_len=24))
    service.add(PROMPT)
    service.finish()
    request = service.add([*PROMPT, 3])
    plan = service.step()
    assert (plan.starts.tolist(), plan.counts.tolist()) == ([16], [6])
    assert request.token_ids[-1] == continuation([*PROMPT, 3], 1, VOCAB)[0]


def test_without_prefix_caching_nothing_is_copied() -> None:
    service = Service(settings=CoreSettings(enable_prefix_caching=False))
    service.add(PROMPT)
    service.finish()
    service.add([*PROMPT, 3])
    assert service.step().counts.tolist() == [22]


def test_forks_of_forks_in_little_memory() -> None:
    generator = random.Random(5)
    service = Service(replace(LIMITS, num_blocks=24, block_size=5, max_model_len=100))
    requests: list[tuple[Request, list[int], int]] = []
    for _ in range(1500):
        if service.scheduler.num_waiting < 3:
            known = generator.choice(requests)[0].token_ids.tolist() if requests else PROMPT
            prompt = [*known[: generator.randint(1, min(len(known), 60))], generator.randrange(VOCAB)]
            count = generator.randint(1, 9)
            requests.append((service.add(prompt, max_tokens=count), prompt, count))
            if len(requests) > 30:
                del requests[generator.randrange(20)]
        if generator.random() < 0.05:
            service.scheduler.abort(generator.choice(requests)[0])
        if service.scheduler.num_running + service.scheduler.num_waiting:
            service.step()
    service.finish()
    assert service.num_copied > 200
    for request, prompt, count in requests:
        expected = prompt + continuation(prompt, count, VOCAB)
        assert request.token_ids.tolist() == expected[: len(request.token_ids)]
