"""Fair sharing: how much service each client has received, and how many requests it has.

Clients share the engine, and the users of a client share that client's part, so that nobody gains by
inventing users. Of the waiting clients, the one with the least service goes first. Service is counted in
tokens: prompt tokens that had to be computed, and generated tokens. When a client begins to wait, its service
is raised to that of the client chosen last: idleness earns no credit, and nobody pays for service received
while nobody else waited. (Start-time fair queueing: Goyal, Vin and Cheng 1996; with tokens counted as they
come: Sheng et al., "Fairness in Serving Large Language Models", 2024.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_MAX_IDLE = 1024
"""The most members without requests that a group remembers, in addition to as many as have requests."""


class Share:
    """The account of one member of a group: a client, or a user of a client.

    Attributes:
        served: service received, in tokens of the group's virtual time; it only grows.
        group: the group of its users, if it is a client.
    """

    __slots__ = ("_owner", "group", "name", "served")

    def __init__(self, name: str, owner: Group, *, has_users: bool) -> None:
        self.name = name
        self.served = owner.virtual_time
        self._owner = owner
        self.group = Group(self) if has_users else None

    @property
    def client(self) -> Share:
        """The client whose user this is."""
        assert self._owner.client is not None
        return self._owner.client

    @property
    def path(self) -> Iterator[tuple[Group, Share]]:
        """(group, member) pairs from the user up to its client."""
        share: Share | None = self
        while share is not None:
            yield share._owner, share
            share = share._owner.client


class Tally:
    """Counts requests per share and knows which share has the most; every operation takes constant time."""

    def __init__(self) -> None:
        self._counts: dict[Share, int] = {}
        self._with: dict[int, dict[Share, None]] = {}
        self._highest = 0

    def __getitem__(self, share: Share) -> int:
        return self._counts.get(share, 0)

    def __len__(self) -> int:
        """Number of shares with a count above 0."""
        return len(self._counts)

    def add(self, share: Share) -> None:
        """Increments the share's count."""
        count = self._move(share, 1)
        self._highest = max(self._highest, count)

    def remove(self, share: Share) -> None:
        """Decrements the share's count."""
        count = self._move(share, -1)
        if count + 1 == self._highest and count + 1 not in self._with:
            self._highest = count

    def most(self) -> Share | None:
        """The share with the highest count; None if all are 0."""
        return next(iter(self._with[self._highest])) if self._highest else None

    def _move(self, share: Share, change: int) -> int:
        before = self[share]
        count = before + change
        assert count >= 0
        if before:
            peers = self._with[before]
            del peers[share]
            if not peers:
                del self._with[before]
        if count:
            self._with.setdefault(count, {})[share] = None
            self._counts[share] = count
        else:
            del self._counts[share]
        return count


class Group:
    """All clients, or all users of one client.

    Attributes:
        client: the client whose users these are; None for the group of clients.
        virtual_time: the `served` of the member chosen last.
        waiting: number of waiting requests per member.
        running: number of running requests per member.
    """

    def __init__(self, client: Share | None = None) -> None:
        self.client = client
        self.virtual_time = 0
        self.waiting, self.running = Tally(), Tally()
        self._members: dict[str, Share] = {}

    def member(self, name: str) -> Share:
        """The member of this name. A new member starts at the group's virtual time."""
        share = self._members.get(name)
        if share is None:
            self._forget_some()
            share = self._members[name] = Share(name, self, has_users=self.client is None)
        return share

    def forget_if_idle(self) -> None:
        """Forgets all accounts once no member has a request: there is nobody to be fair to."""
        if not self.waiting and not self.running:
            self._members.clear()
            self.virtual_time = 0

    def _forget_some(self) -> None:
        """If there are too many members, forgets those without requests that were served the least."""
        if len(self._members) <= _MAX_IDLE + 2 * (len(self.waiting) + len(self.running)):
            return
        idle = [each for each in self._members.values() if not self.waiting[each] and not self.running[each]]
        idle.sort(key=lambda share: share.served)
        for share in idle[: len(idle) - _MAX_IDLE // 2]:
            del self._members[share.name]

    def has_much_more(self, share: Share, tally: Tally) -> Share | None:
        """The member with the highest count, if it has at least 2 more than `share`: it could then pass one
        on and still have no fewer. Else None.
        """
        most = tally.most()
        return most if most is not None and tally[most] >= tally[share] + 2 else None


class Shares:
    """The accounts of all clients and their users."""

    def __init__(self) -> None:
        self.clients = Group()
        self._is_contended: bool | None = False

    def of(self, client: str) -> Share:
        """The share of a client's user, named "client/user". Without a slash it is the client's nameless
        user.
        """
        name, _, user = client.partition("/")
        group = self.clients.member(name).group
        assert group is not None
        return group.member(user)

    @property
    def is_contended(self) -> bool:
        """Whether more than one client, or more than one user of the only client, has requests."""
        if self._is_contended is None:
            self._is_contended = _is_contended(self.clients)
        return self._is_contended

    def num_parties(self, share: Share) -> int:
        """The number n such that a share gets about 1/n of the service while it waits."""
        parts = 1
        for group, member in share.path:
            parts *= len(group.waiting) + (not group.waiting[member])
        return parts

    def begin_to_wait(self, share: Share) -> None:
        """Counts one more waiting request of a share."""
        self._is_contended = None
        for group, member in share.path:
            if not group.waiting[member]:
                member.served = max(member.served, group.virtual_time)
            group.waiting.add(member)

    def wait_no_more(self, share: Share) -> None:
        """Counts one waiting request less."""
        self._is_contended = None
        for group, member in share.path:
            group.waiting.remove(member)
            group.forget_if_idle()

    def run(self, share: Share, num_tokens: int) -> None:
        """Counts one more running request of a share and charges the `num_tokens` that it has to compute."""
        self._is_contended = None
        for group, member in share.path:
            group.virtual_time = max(group.virtual_time, member.served)
            member.served += num_tokens
            group.running.add(member)

    def run_no_more(self, share: Share) -> None:
        """Counts one running request less."""
        self._is_contended = None
        for group, member in share.path:
            group.running.remove(member)
            group.forget_if_idle()

    def charge(self, share: Share, num_tokens: int) -> None:
        """Charges a share, and its client, for `num_tokens`."""
        for _, member in share.path:
            member.served += num_tokens

    def is_behind(self, share: Share, other: Share) -> bool:
        """Whether `share` was served less than `other`. Compares their clients, or the users themselves if
        they have the same client.
        """
        if share.client is other.client:
            return share.served < other.served
        return share.client.served < other.client.served

    def most_waiting(self, share: Share) -> Share | None:
        """The share that should give up a waiting request for one of `share`; None if that has its part."""
        return self._to_make_room(share, lambda group: group.waiting)

    def most_running(self, share: Share) -> Share | None:
        """The share that should give up a running request for one of `share`; None if that has its part."""
        return self._to_make_room(share, lambda group: group.running)

    def _to_make_room(self, share: Share, tally_of: Callable[[Group], Tally]) -> Share | None:
        user, client = (member for _, member in share.path)
        rich = self.clients.has_much_more(client, tally_of(self.clients))
        group = (rich or client).group
        assert group is not None
        return tally_of(group).most() if rich else group.has_much_more(user, tally_of(group))

    def surplus(self, rich: Share, share: Share) -> int:
        """How many rows can move from `rich` to `share` without `share` ending up with more."""
        user, client = (member for _, member in share.path)
        if rich.client is client:
            assert client.group is not None
            return (client.group.running[rich] - client.group.running[user]) // 2
        running = self.clients.running
        return (running[rich.client] - running[client]) // 2


def _is_contended(group: Group) -> bool:
    waiting, running = group.waiting.most(), group.running.most()
    if len(group.waiting) > 1 or len(group.running) > 1:
        return True
    if waiting is not None and running is not None and waiting is not running:
        return True
    only = waiting or running
    return only is not None and only.group is not None and _is_contended(only.group)
