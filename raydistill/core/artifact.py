"""Artifacts: folders that are complete or absent, never half written.

An artifact is a folder with a manifest, FOLDER/manifest.json. The manifest is written last, after all other files are
on disk. An artifact is created in one of two ways:

    build   writes into a temporary folder next to FOLDER, which then replaces FOLDER
    seal    completes a folder whose parts several processes wrote in place

Temporary folders have random names and the suffix ".tmp"; a folder that is being replaced or deleted has the suffix
".old", and in a replacement the name of the temporary folder. After a kill between the two renames of a replacement,
`is_complete`, `open_artifact` and `build` finish it. `build` removes all other folders that killed processes left, and
no reader touches them. Names that start with a dot are never artifacts.

The lock of FOLDER is the file .NAME.lock next to FOLDER. The system releases the lock when its owner dies. An owner
that is stopped keeps the lock, and others wait. If the connection to a shared file system breaks, the system may give
the lock to another process while the first one still runs. The lock file holds a random token of its owner: `build`,
`seal`, `remove`, `remove_leftovers` and `files.atomic_path` call `locks.check_locks` before they change a file, and
raise a TransientError if a lock of the calling thread is lost. The new owner deletes the temporary folder of the first
one before anything else. The first one then has nothing to publish, and `build` raises a TransientError; so does a
build of an artifact whose generation changed. All this needs a file system on which a change by one machine is seen by
others.
"""

import errno
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import psutil
from filelock import FileLock, Timeout
from pydantic import Field

from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import OLD_SUFFIX, TEMPORARY_SUFFIX, fsync, fsync_folder, make_folder
from raydistill.core.locks import HeldLock, check_locks, held_locks, superseded
from raydistill.core.records import Record

MANIFEST = "manifest.json"
_SIBLING = rf"\.(?P<name>.+)\.[0-9a-f]{{8}}({re.escape(TEMPORARY_SUFFIX)}|{re.escape(OLD_SUFFIX)})"
_OWNER_LINE = re.compile(r"process (?P<pid>\d+) on (?P<host>\S+) since (?P<since>\S+)")
MAX_REPLACEMENTS = 10  # how often `is_complete` looks again after another process replaced the folder


class Manifest(Record):
    """The manifest of an artifact. Subclasses add the fields of their kind.

    Attributes:
        kind: What the artifact is, such as "checkpoint".
        key: The content key: artifacts of one kind with equal keys are interchangeable. "" where the path is the key.
        generation: How often the artifact was built under its path, from 1.
        files: Bytes of every other file, by path relative to the folder; filled in by `seal` and `build`.
    """

    kind: str
    key: str = ""
    generation: int = 1
    files: dict[str, int] = Field(default_factory=dict)


ManifestType = TypeVar("ManifestType", bound=Manifest)


class LockHeld(TransientError):
    """Another process holds the lock of an artifact."""


@contextmanager
def lock(
    folder: Path,
    timeout: float = 0,
    on_wait: Callable[[str], None] | None = None,
    *,
    display_path: Path | None = None,
) -> Iterator[None]:
    """Hold the lock of an artifact. The lock is not reentrant.

    Args:
        folder: The artifact, which need not exist.
        timeout: Seconds to wait for the lock; `math.inf` waits until the lock is free.
        on_wait: Called once with a message before waiting for another process.
        display_path: What messages name if the user knows what is locked under another path than `folder`.

    Raises:
        LockHeld: Another process holds the lock for longer than `timeout`. The message names its host and process.
    """
    path = lock_path(folder)
    make_folder(path.parent)
    token = secrets.token_hex(8)
    owned = HeldLock(display_path or folder, path.absolute(), token)
    descriptor = -1

    def write_owner(acquired: int) -> None:
        nonlocal descriptor
        descriptor = acquired
        _write_owner(acquired, token)

    file_lock = FileLock(path, on_acquired=write_owner, preserve_lock_file=True)
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        message = f"{owned.display_path}: in use by {_read_owner(path)}"
        if timeout > 0 and on_wait is not None:
            on_wait(f"{message}; waiting")
        try:
            file_lock.acquire(timeout=-1 if timeout == float("inf") else timeout)
        except Timeout:
            raise LockHeld(f"{message}; wait until that process ends, or stop it") from None
    held_locks.set((*held_locks.get(), owned))
    try:
        yield
    finally:
        held_locks.set(tuple(other for other in held_locks.get() if other != owned))
        try:
            if not owned.is_lost():  # else the file names another owner
                os.ftruncate(descriptor, 0)
        finally:
            file_lock.release()


def lock_path(folder: Path) -> Path:
    """The lock file of an artifact."""
    return folder.with_name(f".{folder.name}.lock")


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock, by its lock file."""

    pid: int
    host: str
    since: datetime

    @property
    def may_run(self) -> bool:
        """Whether the process exists; of another machine, where this is unknown, True."""
        if self.host != platform.node():
            return True
        try:
            process = psutil.Process(self.pid)
            # A process that started after the lock was taken has the number of one that ended; seconds are truncated
            return process.create_time() < self.since.timestamp() + 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def lock_owner(folder: Path) -> LockOwner | None:
    """The owner of the lock of an artifact; None if no process holds the lock. The lock is not touched."""
    try:
        line = lock_path(folder).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        match = _OWNER_LINE.fullmatch(line)
        owner = LockOwner(int(match["pid"]), match["host"], datetime.fromisoformat(match["since"])) if match else None
    except (OSError, ValueError):
        return None
    return owner if owner and owner.may_run else None


@contextmanager
def build(folder: Path, make_manifest: Callable[[], Manifest]) -> Iterator[Path]:
    """Yield a temporary folder that becomes the artifact at the end of the block, and replaces an existing one.

    A kill at any moment leaves the existing artifact, the new one, or none if there was none. If the block raises, the
    temporary folder is deleted and an existing artifact is unchanged. The caller holds the lock of the artifact, or of
    an artifact that contains it. The block must not delete the temporary folder itself, not even to create it again.

    Args:
        folder: The artifact. Parent folders are created.
        make_manifest: Called after the block. `files` and `generation` of its result are replaced.

    Raises:
        TransientError: Another process took over before or during the block, so this process has lost the lock.
        OSError: The disk is full, for example.
    """
    remove_leftovers(folder)
    make_folder(folder.parent)
    generation = _generation(folder)
    temporary = _sibling(folder, TEMPORARY_SUFFIX)
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)  # identifies the folder, also after it was deleted or renamed
    try:
        yield temporary
        seal(temporary, make_manifest().model_copy(update={"generation": generation + 1}))
        if _generation(folder) != generation or not _is_same(descriptor, temporary):
            raise superseded(folder)
        publish(temporary, folder, descriptor)
    except Exception as error:
        if isinstance(error, TransientError) or _is_same(descriptor, temporary) or _is_same(descriptor, folder):
            raise
        raise superseded(folder) from error  # the block failed because another process deleted its folder
    finally:
        os.close(descriptor)
        _delete(temporary)


def seal(folder: Path, manifest: Manifest) -> None:
    """Complete a folder: sync all files and folders to disk, then write the manifest with the size of every file.

    Raises:
        TransientError: Another process took over, so this process has lost its lock.
        OSError: The disk is full, for example.
    """
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if name.endswith(TEMPORARY_SUFFIX) or path == folder / MANIFEST:
                continue
            fsync(path)
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        fsync_folder(Path(parent))
    manifest.model_copy(update={"files": dict(sorted(sizes.items()))}).write(folder / MANIFEST)


def is_complete(folder: Path) -> bool:
    """Whether a folder is a complete artifact: its manifest exists. Finishes an interrupted replacement."""
    for _ in range(MAX_REPLACEMENTS):
        if (folder / MANIFEST).is_file():
            return True
        if not _finish_replacement(folder):
            break
    return (folder / MANIFEST).is_file()


def open_artifact(folder: Path, manifest_type: type[ManifestType], kind: str) -> ManifestType:
    """Read the manifest of a complete artifact and check that every file that the manifest lists has its size.

    Raises:
        UserError: The artifact is missing, incomplete, damaged, of another kind or of another schema version.
    """
    if not is_complete(folder):
        raise UserError(f"{folder}: no complete {kind} (no {MANIFEST}); run the command that creates the {kind} again")
    manifest = manifest_type.read(folder / MANIFEST)
    if manifest.kind != kind:
        raise UserError(f"{folder}: holds a {manifest.kind}, not a {kind}")
    if damage := find_damage(folder, manifest):
        remedy = manifest_type.remedy or f"Delete {folder} and run the command again"
        raise UserError(f"{folder}: damaged: {damage}. {remedy}")
    return manifest


def open_if_whole(folder: Path, manifest_type: type[ManifestType], kind: str) -> ManifestType | None:
    """The manifest of an artifact that can be created again; None if the artifact is missing or damaged."""
    try:
        return open_artifact(folder, manifest_type, kind)
    except UserError:
        return None


def find_damage(folder: Path, manifest: Manifest) -> str | None:
    """The first file that is missing or has another size than the manifest says, as text; None if there is none."""
    for name, size in manifest.files.items():
        try:
            size_now = (folder / name).stat().st_size
        except (OSError, ValueError):  # ValueError: no file can have this name
            return f"{name} is missing"
        if size_now != size:
            return f"{name} has {size_now} bytes instead of {size}"
    return None


def remove(folder: Path) -> None:
    """Delete an artifact. A kill leaves either the artifact or nothing under its name. The caller holds the lock.

    Raises:
        TransientError: Another process took over, so this process has lost its lock.
    """
    remove_leftovers(folder)
    if folder.exists():
        old = _sibling(folder, OLD_SUFFIX)
        os.rename(folder, old)
        fsync_folder(folder.parent)
        _delete(old)


def remove_leftovers(folder: Path) -> None:
    """Finish an interrupted replacement and delete the temporary folders of killed processes.

    The caller holds the lock, so that no other process is building the artifact.

    Raises:
        TransientError: Another process took over, so this process has lost its lock.
    """
    check_locks()
    _finish_replacement(folder)
    for path in _siblings(folder, TEMPORARY_SUFFIX, OLD_SUFFIX):
        _delete(path)


def artifacts_with_leftovers(parent: Path) -> list[Path]:
    """The artifacts in a folder that have temporary or replaced folders, of killed processes or of running ones."""
    names = (re.fullmatch(_SIBLING, path.name) for path in parent.glob(".*/"))
    return sorted({parent / match["name"] for match in names if match})


def publish(temporary: Path, folder: Path, descriptor: int) -> None:
    """Move a sealed temporary folder to the path of the artifact. The next access repairs a kill between the renames.

    The first rename is the sign for readers that the temporary folder may replace the artifact. Without an existing
    artifact there is no such sign, so that a reader never publishes what this process may still discard.

    Raises:
        TransientError: Another process, to which the lock was given, deleted the temporary folder.
    """
    old = temporary.with_suffix(OLD_SUFFIX)
    replaces = folder.exists()
    if replaces:
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if temporary.exists():
            if replaces:
                os.rename(old, folder)
            raise
        if not _is_same(descriptor, folder):  # else a reader has finished the replacement
            if replaces and not folder.exists():
                os.rename(old, folder)
            raise superseded(folder) from None
    fsync_folder(folder.parent)
    if replaces:
        _delete(old)


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether a path is the open folder; no if either was deleted."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _finish_replacement(folder: Path) -> bool:
    """If the folder is missing, complete a replacement whose first rename only was done.

    Returns:
        Whether the folder may exist now: this or another process completed the replacement.
    """
    if folder.exists():
        return (folder / MANIFEST).is_file()
    for old in _siblings(folder, OLD_SUFFIX):
        path = old.with_suffix(TEMPORARY_SUFFIX)
        if not (path / MANIFEST).is_file():  # a removal, or a replacement whose temporary folder is being deleted
            continue
        try:
            os.rename(path, folder)
            fsync_folder(folder.parent)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EROFS, errno.EACCES):
                raise
            # the errors above mean that another process was faster or that this process may not write here
        return True
    return folder.exists()


def _delete(folder: Path) -> None:
    """Delete a temporary folder, its manifest first, so that no kill leaves a manifest without its files."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _generation(folder: Path) -> int:
    """The generation of the artifact in a folder; 0 if there is none or its manifest cannot be read."""
    try:
        return int(json.loads((folder / MANIFEST).read_bytes())["generation"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 0


def _sibling(folder: Path, suffix: str) -> Path:
    # A random part and not the process ID: on a shared folder, processes of two machines may have equal IDs.
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{suffix}")


def _siblings(folder: Path, *suffixes: str) -> list[Path]:
    """The temporary and replaced folders of an artifact."""
    try:
        names = os.listdir(folder.parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    prefix = f".{folder.name}."
    return [
        folder.with_name(name)
        for name in sorted(names)
        for suffix in suffixes
        if name.startswith(prefix) and name.endswith(suffix) and len(name) == len(prefix) + 8 + len(suffix)
    ]


def _write_owner(descriptor: int, token: str) -> None:
    """Write who holds a lock into its file: a line for the message of `lock`, and the token."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()} since {since}\n{token}".encode(), 0)


def _read_owner(path: Path) -> str:
    for _ in range(10):  # the owner may have the lock and not yet have written its name
        if owner := path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip():
            return owner[:200]
        time.sleep(0.01)
    return "another process"
