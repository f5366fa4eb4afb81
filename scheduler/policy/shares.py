"""What each client has been served, and holds now: what fairness between them is decided by.

Clients share the engine, and the users of a client share what that client gets, so that nobody gains by
inventing users. Of those that wait, the one that was served the least goes first. Tokens are the measure:
those of a prompt that had to be computed, and those generated. Whoever begins to wait is counted as served
as much as the one that was last chosen: idleness earns no credit, and nobody pays for what was served while
nobody else waited. (Start-time fair queueing: Goyal, Vin and Cheng 1996; with tokens counted as they come:
Sheng et al., "Fairness in Serving Large Language Models", 2024.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_MAX_IDLE = 1024
"""Members without a request that a group remembers, beyond as many as have one."""


class Share:
    """One member of a group: a client, or a user of one.

    Attributes:
        served: tokens, on the group's scale; it only grows.
        group: of its users, if it is a client.
    """

    __slots__ = ("_owner", "group", "name", "served")

    def __init__(self, name: str, owner: Group, *, has_users: bool) -> None:
        self.name = name
        self.served = owner.virtual_time
        self._owner = owner
        self.group = Group(self) if has_users else None

    @property
    def client(self) -> Share:
        """Whose user it is."""
        assert self._owner.client is not None
        return self._owner.client

    @property
    def path(self) -> Iterator[tuple[Group, Share]]:
        """The groups that it is in and its place there, innermost first."""
        share: Share | None = self
        while share is not None:
            yield share._owner, share
            share = share._owner.client


class Tally:
    """How many of something each share has, and who has the most; every operation takes the same time."""

    def __init__(self) -> None:
        self._counts: dict[Share, int] = {}
        self._with: dict[int, dict[Share, None]] = {}
        self._highest = 0

    def __getitem__(self, share: Share) -> int:
        return self._counts.get(share, 0)

    def __len__(self) -> int:
        """Shares that have any."""
        return len(self._counts)

    def add(self, share: Share) -> None:
        """It has one more."""
        count = self._move(share, 1)
        self._highest = max(self._highest, count)

    def remove(self, share: Share) -> None:
        """It has one less."""
        count = self._move(share, -1)
        if count + 1 == self._highest and count + 1 not in self._with:
            self._highest = count

    def most(self) -> Share | None:
        """Whoever has the most, if anybody has one."""
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
    """Clients, or the users of one.

    Attributes:
        client: whose users they are, if they are.
        virtual_time: how much the member was served that was last chosen.
        waiting: requests of each that wait.
        running: requests of each that hold a row.
    """

    def __init__(self, client: Share | None = None) -> None:
        self.client = client
        self.virtual_time = 0
        self.waiting, self.running = Tally(), Tally()
        self._members: dict[str, Share] = {}

    def member(self, name: str) -> Share:
        """The member of this name, new ones served as much as the last chosen."""
        share = self._members.get(name)
        if share is None:
            self._forget_some()
            share = self._members[name] = Share(name, self, has_users=self.client is None)
        return share

    def forget_if_idle(self) -> None:
        """Forgets who was served what once nobody has a request: it will compete with nobody's."""
        if not self.waiting and not self.running:
            self._members.clear()
            self.virtual_time = 0

    def _forget_some(self) -> None:
        """Forgets those that have no request and were served the least, if there are too many."""
        if len(self._members) <= _MAX_IDLE + 2 * (len(self.waiting) + len(self.running)):
            return
        idle = [each for each in self._members.values() if not self.waiting[each] and not self.running[each]]
        idle.sort(key=lambda share: share.served)
        for share in idle[: len(idle) - _MAX_IDLE // 2]:
            del self._members[share.name]

    def has_much_more(self, share: Share, tally: Tally) -> Share | None:
        """Who has so many more than a share that one less would still be no less than the share's and one."""
        most = tally.most()
        return most if most is not None and tally[most] >= tally[share] + 2 else None


class Shares:
    """All clients, and their users."""

    def __init__(self) -> None:
        self.clients = Group()
        self._is_contended: bool | None = False

    def of(self, client: str) -> Share:
        """The share of a client's user: "client/user". What has no slash is a client's nameless user."""
        name, _, user = client.partition("/")
        group = self.clients.member(name).group
        assert group is not None
        return group.member(user)

    @property
    def is_contended(self) -> bool:
        """Whether more than one, of clients or of a client's users, have requests."""
        if self._is_contended is None:
            self._is_contended = _is_contended(self.clients)
        return self._is_contended

    def num_parties(self, share: Share) -> int:
        """Of how many parts of what is served a share gets one while it waits."""
        parts = 1
        for group, member in share.path:
            parts *= len(group.waiting) + (not group.waiting[member])
        return parts

    def begin_to_wait(self, share: Share) -> None:
        """One more of its requests waits."""
        self._is_contended = None
        for group, member in share.path:
            if not group.waiting[member]:
                member.served = max(member.served, group.virtual_time)
            group.waiting.add(member)

    def wait_no_more(self, share: Share) -> None:
        """One less does."""
        self._is_contended = None
        for group, member in share.path:
            group.waiting.remove(member)
            group.forget_if_idle()

    def run(self, share: Share, num_tokens: int) -> None:
        """One of its requests was chosen to run, and `num_tokens` of it are to be computed."""
        self._is_contended = None
        for group, member in share.path:
            group.virtual_time = max(group.virtual_time, member.served)
            member.served += num_tokens
            group.running.add(member)

    def run_no_more(self, share: Share) -> None:
        """One of its requests lost its row."""
        self._is_contended = None
        for group, member in share.path:
            group.running.remove(member)
            group.forget_if_idle()

    def charge(self, share: Share, num_tokens: int) -> None:
        """It was served."""
        for _, member in share.path:
            member.served += num_tokens

    def is_behind(self, share: Share, other: Share) -> bool:
        """Whether one was served less than another: its client or, if they have the same, itself."""
        if share.client is other.client:
            return share.served < other.served
        return share.client.served < other.client.served

    def most_waiting(self, share: Share) -> Share | None:
        """Whose waiting request is to make room for one of a share's; None if it has its own part already."""
        return self._to_make_room(share, lambda group: group.waiting)

    def most_running(self, share: Share) -> Share | None:
        """Whose running request is to make room for one of a share's; None if it has its own part already."""
        return self._to_make_room(share, lambda group: group.running)

    def _to_make_room(self, share: Share, tally_of: Callable[[Group], Tally]) -> Share | None:
        user, client = (member for _, member in share.path)
        rich = self.clients.has_much_more(client, tally_of(self.clients))
        group = (rich or client).group
        assert group is not None
        return tally_of(group).most() if rich else group.has_much_more(user, tally_of(group))

    def surplus(self, rich: Share, share: Share) -> int:
        """How many rows may go from one to the other before that has more of them."""
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
