"""Copies of the input that a request's first choice has computed, until its other choices have slots.

A request reserves the bytes of its copy before it starts, so all copies together stay within the budget. One copy alone
may exceed the budget, if no other copy exists.
"""


class SharedInputs:
    """Bytes of copies, by request."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        """What the copies take, or will take once their requests' first choices have computed the input."""
        self._bytes: dict[str, int] = {}
        self._waiting: dict[str, int] = {}  # request -> choices that wait with a copy, once there is one

    def __len__(self) -> int:
        return len(self._bytes)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._bytes

    def has_room(self, num_bytes: int) -> bool:
        """Whether another copy may be made."""
        return not self._bytes or self.num_bytes + num_bytes <= self.budget_bytes

    def reserve(self, request_id: str, num_bytes: int) -> None:
        """Reserve the bytes of a copy for a request that starts and will make it."""
        assert request_id not in self._bytes, "a request makes one copy"
        self._bytes[request_id] = num_bytes
        self.num_bytes += num_bytes

    def made(self, request_id: str, choices: int) -> None:
        """Note that the copy exists, and that this many choices wait for slots with it."""
        self._waiting[request_id] = choices

    def release_share(self, request_id: str) -> None:
        """A choice no longer needs the copy; the last one releases it."""
        if request_id in self._waiting:
            self._waiting[request_id] -= 1
            if not self._waiting[request_id]:
                self.release(request_id)

    def release_unmade(self, request_id: str) -> None:
        """Release the reservation of a request whose first choice has ended without making a copy."""
        if request_id not in self._waiting:
            self.release(request_id)

    def release(self, request_id: str) -> None:
        """Release the request's copy or reservation, if it has one."""
        self.num_bytes -= self._bytes.pop(request_id, 0)
        self._waiting.pop(request_id, None)

    def check_integrity(self) -> None:
        """Assert that the bytes are those of the requests."""
        assert self.num_bytes == sum(self._bytes.values())
        assert self._waiting.keys() <= self._bytes.keys()
