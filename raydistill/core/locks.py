"""The locks that the calling thread holds: a process that has lost a lock changes nothing.

`artifact.lock` acquires the lock of a folder and writes a random token into the lock file. If a file server gives the
lock to another process meanwhile, the file is deleted or holds the token of that process. Changes of files compare the
tokens of all locks that their thread holds. The module is apart from `artifact`, so that `files` can import it.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from raydistill.core.errors import TransientError


@dataclass(frozen=True)
class HeldLock:
    """A lock that a thread has acquired.

    Attributes:
        display_path: What messages name: the artifact, or the path under which the user knows the artifact.
        file: The absolute path of the lock file.
        token: The token of the owner, the last line of the lock file.
    """

    display_path: Path
    file: Path
    token: str

    def is_lost(self) -> bool:
        """Whether the lock was given to another process, or its file was deleted or cannot be read."""
        try:
            # By path: the file may be another one now, and NFS shows changes by other machines to a file that is opened
            return not self.file.read_bytes().endswith(f"\n{self.token}".encode())
        except OSError:
            return True


held_locks: ContextVar[tuple[HeldLock, ...]] = ContextVar("held_locks", default=())


def check_locks() -> None:
    """Compare the tokens of all locks that the calling thread holds with the tokens in the lock files.

    Raises:
        TransientError: A lock was given to another process, or its file was deleted.
    """
    for lock in held_locks.get():
        if lock.is_lost():
            raise superseded(lock.display_path)


def superseded(folder: Path) -> TransientError:
    """The error of a process whose artifact was changed by another process meanwhile."""
    return TransientError(f"{folder}: was written by another process meanwhile; run the same command again")
