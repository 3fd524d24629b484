"""The states of an entry of the inbox: what was last seen of a directory, and what follows from it.

An entry is `Unseen` until it is looked at. Then it is `Settling` as long as somebody may still write to it, and `Read`
once it was published or refused. Whenever it is gone it is `Missing`.
"""

from dataclasses import dataclass, field, replace

from server.registry.inbox_watcher import Signature


@dataclass(frozen=True)
class Files:
    """An entry's files, and since when they are as they are."""

    signature: Signature
    since: float


@dataclass(frozen=True)
class Unseen:
    """An entry that must be looked at: it is new, or somebody wrote to it while it was read."""


@dataclass(frozen=True)
class Read:
    """An entry that was read as its files are now: it is served, or refused.

    Attributes:
        files: what was read.
        failure: the kind of error that it has, already logged; None where it is served.
        may_pass: whether it is read again without a change of its files, because the error may pass.
    """

    files: Files
    failure: type[Exception] | None = None
    may_pass: bool = False


@dataclass(frozen=True)
class Settling:
    """An entry whose files have changed: it is read once nobody has written to them for a moment.

    Attributes:
        files: as they are now.
        last: what they were when it was last read; None if it must be read in any case.
    """

    files: Files
    last: Read | None = None


Present = Unseen | Settling | Read


@dataclass(frozen=True)
class Missing:
    """An entry that was removed, or is being replaced: its tasks retire unless it is put back soon."""

    since: float
    before: Present


@dataclass
class InboxEntry:
    """What is known of a directory of the inbox.

    Attributes:
        state: what was last seen of it.
        tasks: the tasks that were published from it: task -> identity of the content.
        is_put_back: whether it was missing since it was last published.
    """

    state: Present | Missing = Unseen()
    tasks: dict[str, str] = field(default_factory=dict)
    is_put_back: bool = False

    @property
    def is_open(self) -> bool:
        """Whether the entry is about to change state, so that it is checked more often."""
        return not isinstance(self.state, Read)

    def miss(self, now: float) -> Missing:
        """Note that it is missing, if that is not known yet."""
        if not isinstance(self.state, Missing):
            self.state = Missing(now, self.state)
        return self.state

    def find(self) -> Present:
        """Note that it is there; one that was put back must be read."""
        if isinstance(self.state, Missing):
            before = self.state.before
            self.state = before if isinstance(before, Unseen) else Settling(before.files)
            self.is_put_back = True
        return self.state


def changed(state: Present, files: Files) -> Settling | Read:
    """The state that follows when an entry's files have changed."""
    last = state if isinstance(state, Read) else state.last if isinstance(state, Settling) else None
    is_again = last is not None and last.files.signature == files.signature
    return replace(last, files=files) if last is not None and is_again else Settling(files, last)
