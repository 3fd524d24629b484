"""Soft prompts in host memory: the tier between the store, which has all of them, and the engine's prefixes.

Least recently used out first, within a budget. A soft prompt that is not here is loaded once, on a thread of its own,
however many requests ask for it meanwhile; nobody else waits.
"""

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from server.executors import Executor
from server.registry.events import VersionContent
from server.soft_prompts.soft_prompt import SoftPrompt

LOADERS = 4
OVERHEAD_BYTES = 4096
"""What a soft prompt's objects take beside its tensor and its manifest."""
PARSED = 8
"""Bytes in memory for a byte of a manifest: short texts and numbers, each an object."""


class HostCache:
    """Soft prompts by digest.

    Attributes:
        budget_bytes: the limit. A dropped soft prompt that a sequence still uses stays in memory and does not count.
        num_bytes: what is kept now.
        hits: requests that found theirs.
        loads: soft prompts that were read from the store.
        failures: those that could not be read, or not be used.
        on_load: called with the seconds that each read took, on the reading thread.
    """

    def __init__(
        self, budget_bytes: int, load: Callable[[VersionContent], SoftPrompt], is_wanted: Callable[[str], bool]
    ) -> None:
        """An empty cache of at most `budget_bytes`; `load` reads a content, or raises.

        `is_wanted` says whether a version with this digest exists: a content whose version was deleted during the load
        is not cached.
        """
        self.budget_bytes, self.num_bytes = budget_bytes, 0
        self.hits = self.loads = self.failures = 0
        self.on_load: Callable[[float], None] = lambda seconds: None
        self._load = load
        self._is_wanted = is_wanted
        self._kept: OrderedDict[str, SoftPrompt] = OrderedDict()
        self._sizes: dict[str, int] = {}  # of those that are kept, by digest
        self._loading: dict[str, Future[SoftPrompt]] = {}  # by blob: another blob of the same content may be intact
        self._lock = threading.Lock()
        self._loaders = Executor("soft-prompts", "soft prompts", threads=LOADERS, most_waiting=sys.maxsize)

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def get(self, digest: str) -> SoftPrompt | None:
        """The soft prompt, now the most recently used one, or None."""
        with self._lock:
            soft_prompt = self._kept.get(digest)
            if soft_prompt is not None:
                self._kept.move_to_end(digest)
                self.hits += 1
            return soft_prompt

    def fetch(self, content: VersionContent) -> Future[SoftPrompt]:
        """The soft prompt from here or from the store; those who ask while it is loaded share one future."""
        with self._lock:
            kept = self._kept.get(content.digest)
            if kept is not None:
                done: Future[SoftPrompt] = Future()
                done.set_result(kept)
                return done
            loading = self._loading.get(content.blob)
            if loading is None:
                loading = self._loading[content.blob] = Future()
                loading.set_running_or_notify_cancel()  # one client's disconnect must not cancel the shared future
                self._loaders.submit(self._load_and_keep, content, loading)
            return loading

    def put(self, soft_prompt: SoftPrompt) -> None:
        """Keep a soft prompt, and drop the least recently used ones beyond the budget; the newest always stays."""
        size = size_of(soft_prompt)
        with self._lock:
            self._drop(soft_prompt.digest)
            if not self._is_wanted(soft_prompt.digest):
                return
            self._kept[soft_prompt.digest] = soft_prompt
            self._sizes[soft_prompt.digest] = size
            self.num_bytes += size
            while self.num_bytes > self.budget_bytes and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))

    def drop(self, digest: str) -> None:
        """Forget a soft prompt; sequences that hold it keep it to their end."""
        with self._lock:
            self._drop(digest)

    def _drop(self, digest: str) -> None:
        if self._kept.pop(digest, None) is not None:
            self.num_bytes -= self._sizes.pop(digest)

    def _load_and_keep(self, content: VersionContent, loading: Future[SoftPrompt]) -> None:
        started = time.perf_counter()
        try:
            soft_prompt = self._load(content)
            self.put(soft_prompt)
        except Exception as exc:  # noqa: BLE001 - the waiting request raises it
            self._end(content, failures=1)
            loading.set_exception(exc)
        else:
            self._end(content, loads=1)
            self.on_load(time.perf_counter() - started)
            loading.set_result(soft_prompt)

    def _end(self, content: VersionContent, loads: int = 0, failures: int = 0) -> None:
        with self._lock:
            self.loads += loads
            self.failures += failures
            del self._loading[content.blob]


def size_of(soft_prompt: SoftPrompt) -> int:
    """Bytes of memory that a soft prompt counts for."""
    return soft_prompt.num_bytes + OVERHEAD_BYTES + PARSED * len(soft_prompt.manifest.to_json())
