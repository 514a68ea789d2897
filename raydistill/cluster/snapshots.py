"""Folders that change, such as runs and sweeps, in the storage (sync.py) of machines that share no folder.

Such a folder has one writer at a time. The storage holds the folder as snapshots:

    .objects/FOLDER/NAME/PATH      the content of a file, uploaded for the snapshot NAME
    .snapshots/FOLDER/NAME.json    the object of each file of the folder; written after all of its objects

NAME is CLAIM-TOKEN-SEQUENCE. A writer first claims the folder: its claim is one higher than the highest claim so far.
The writer publishes the newest snapshot again under its claim, so that no file of that snapshot is deleted from then
on, and downloads the files. Objects and snapshots are never overwritten, and files that did not change refer to the
objects of earlier snapshots. Readers take the snapshot with the highest name.

A worker that was cut off and comes back has a lower claim than its successor. Its snapshots are ignored, and a writer
deletes objects of its own and of lower claims only, so the worker can neither overwrite nor delete what its successor
wrote. Before and after every upload, the worker looks for a higher claim, and stops with a TransientError.

The local copy of the last snapshot that a machine wrote or downloaded is HOME/.storage/FOLDER/snapshot.json. A folder
whose last snapshot is still the newest one is not downloaded again, so changes that are not yet uploaded are kept.
"""

import json
import math
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from raydistill.cluster.sync import (
    LOCAL_SUFFIXES,
    Storage,
    in_parallel,
    is_completion_marker,
    markers_last,
    synced_paths,
    transient_errors,
)
from raydistill.core import artifact
from raydistill.core.artifact import LockHeld
from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import corrupt_file_error, safe_join
from raydistill.core.records import Record

SNAPSHOTS, OBJECTS = ".snapshots", ".objects"
LOCAL_STATE = ".storage"
EXPORTS = "exports"  # a folder of this name in a stored folder holds what can be made again from the other files
RUN_FOLDERS = ("trials", "seeds")  # folders of these names in a stored folder hold further stored folders
LOCK_TIMEOUT_S = 60.0
MAX_ATTEMPTS = 10  # to read a snapshot that its writer replaces meanwhile

NAME_PATTERN = re.compile(r"\d{8}-[0-9a-f]{8}-\d{8}")
FileVersion = tuple[int, int]  # size in bytes, modification time in nanoseconds


class StoredFile(BaseModel):
    """A file of a snapshot.

    Attributes:
        object: The name of the object below .objects/FOLDER/.
        size: Bytes.
        mtime_ns: Modification time of the file on the machine that uploaded the file, in nanoseconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    object: str
    size: int
    mtime_ns: int

    @property
    def version(self) -> FileVersion:
        """Identifies the content of the file. Times are only compared for equality, so clocks need not agree."""
        return self.size, self.mtime_ns


class Snapshot(Record):
    """All files of a stored folder at a moment.

    Attributes:
        name: CLAIM-TOKEN-SEQUENCE; "" before the first snapshot.
        files: The files by path relative to the folder; the path of a stored file that is not a folder is ".".
        records_only: Whether the local copy of the folder lacks the files that are not records.
    """

    remedy: ClassVar[str] = "Delete this object from the storage"

    name: str = ""
    files: dict[str, StoredFile] = Field(default_factory=dict)
    records_only: bool = False

    @property
    def claim(self) -> int:
        """The number of the writer's claim."""
        return int(self.name.partition("-")[0] or 0)

    @property
    def versions(self) -> dict[str, FileVersion]:
        """The version of each file."""
        return {path: file.version for path, file in self.files.items()}


def is_record(path: str) -> bool:
    """Whether a file of a run or a sweep is needed for tables: a file that is not in a checkpoint or a saved state."""
    return "/" not in path


class StoredFolder:
    """A folder, or a single file, that the storage holds as snapshots."""

    def __init__(self, storage: Storage, path: Path) -> None:
        self.storage, self.path = storage, path
        self.name = storage.name_of(path)
        self.state = storage.home / LOCAL_STATE / self.name
        self.marker = self.state / "snapshot.json"

    def pull(self) -> None:
        """Replace the local files by the files of the newest snapshot, as the function `pull` does."""
        self._pull(self.snapshot_names()[-1], records_only=False)

    def pull_records(self, newest: str) -> None:
        """Download the records, if the newest snapshot has not been downloaded yet; `newest` is its name."""
        self._pull(newest, records_only=True)

    def _pull(self, newest: str, records_only: bool) -> None:
        if self._is_current(newest, records_only):
            return
        with self.lock("transfer", math.inf):
            try:
                with self.lock("writer"):
                    self._pull_newest(records_only)
            except LockHeld:
                return  # a process of this machine writes the folder: its local files are the newest

    def lock(self, purpose: Literal["transfer", "writer"], timeout: float = 0) -> AbstractContextManager[None]:
        """A lock of the processes of this machine: to download the folder, or to change it."""
        return artifact.lock(self.state / purpose, timeout, display_path=self.path)

    def snapshot_names(self) -> list[str]:
        """The names of all snapshots in ascending order, after "" for the state before the first snapshot."""
        objects = self.storage.list_objects(f"{SNAPSHOTS}/{self.name}", recursive=False)
        return ["", *sorted(Path(name).stem for name in objects)]

    def read(self, name: str) -> Snapshot:
        """Read a snapshot; FileNotFoundError if it was deleted."""
        if not name:
            return Snapshot()
        content = self.storage.read(self.snapshot_object(name))
        path = Path(self.snapshot_object(name))
        with corrupt_file_error(path, Snapshot.remedy):
            record = dict(json.loads(content))
            if not NAME_PATTERN.fullmatch(name) or record["name"] != name:
                raise ValueError("not a snapshot of this folder")
        return Snapshot.from_json(record, path)

    def snapshot_object(self, name: str) -> str:
        """The name of the object of a snapshot."""
        return f"{SNAPSHOTS}/{self.name}/{name}.json"

    def file_object(self, file: StoredFile) -> str:
        """The name of the object of a file."""
        return f"{OBJECTS}/{self.name}/{file.object}"

    def scan(self) -> dict[str, FileVersion]:
        """The versions of the local files."""
        if self.path.is_file():
            return {".": _version(self.path)}
        versions = {}
        for parent, folders, names in os.walk(self.path):
            folders[:] = [name for name in folders if not name.endswith(LOCAL_SUFFIXES)]
            if Path(parent) == self.path:
                folders[:] = [name for name in folders if name not in RUN_FOLDERS]
            for path in (Path(parent, name) for name in names if not name.endswith(LOCAL_SUFFIXES)):
                with suppress(FileNotFoundError):  # replaced meanwhile
                    versions[path.relative_to(self.path).as_posix()] = _version(path)
        return versions

    def base(self) -> Snapshot | None:
        """The snapshot that the local files come from; None if there is none, or if the local files were deleted."""
        try:
            base = Snapshot.read_if_present(self.marker)
        except UserError:  # damaged: as after a first download, all files are compared
            return None
        if base and base.files and not any((self.path / path).exists() for path in base.files):
            return None
        return base

    def download(self, snapshot: Snapshot, *, records_only: bool = False) -> None:
        """Replace the local files by the files of a snapshot; FileNotFoundError if an object was deleted.

        Completion markers that differ are deleted first and written last, so that a kill leaves no complete folder with
        files of two snapshots. With `records_only`, only records are downloaded, and other local files are kept.
        """
        self.marker.unlink(missing_ok=True)
        local = self.scan()
        wanted = {path: file for path, file in snapshot.files.items() if not records_only or is_record(path)}
        with corrupt_file_error(self.path, "Delete this folder from the storage"):
            targets = {path: safe_join(self.path, path) for path in wanted}
        outdated = [path for path, file in wanted.items() if local.get(path) != file.version]
        unwanted = (
            []
            if records_only
            else [path for path in local if path not in wanted and not self._is_new_export(path, wanted)]
        )
        removed = {*unwanted, *(path for path in outdated if is_completion_marker(path) and path in local)}
        for path in sorted(removed, key=is_completion_marker, reverse=True):
            _delete_file(self.path, path)
        markers_last(
            lambda path: self.storage.download(self.file_object(wanted[path]), targets[path], wanted[path].mtime_ns),
            outdated,
        )
        self.write_marker(snapshot.model_copy(update={"records_only": records_only}))

    def _is_new_export(self, path: str, wanted: Collection[str]) -> bool:
        """Whether a file belongs to an export that the snapshot lacks: `choose` exports without saving the sweep."""
        export = "/".join(Path(path).parts[:2])
        return path.startswith(f"{EXPORTS}/") and not any(name.startswith(f"{export}/") for name in wanted)

    def write_marker(self, snapshot: Snapshot) -> None:
        """Record the snapshot that the local files come from."""
        snapshot.write(self.marker)

    def is_saved(self) -> bool:
        """Whether the local files are the files of the last snapshot that this machine wrote or downloaded."""
        base = self.base()
        return base is not None and base.versions == self.scan()

    def save(self) -> None:
        """Publish a snapshot of the local files, if they changed since the last snapshot of this machine.

        Raises:
            UserError: The local files changed, and only the records were downloaded.
        """
        base, local = self.base(), self.scan()
        if base is not None and base.versions == local:
            return
        if base is not None and base.records_only:
            raise UserError(
                f"{self.path}: a file was changed here, but only the records of the folder were downloaded; delete the "
                f"folder and run the same command again"
            )
        with self.lock("writer", LOCK_TIMEOUT_S):
            newest = self.read_newest()
            if newest.name and newest.versions == local:
                self.write_marker(newest)
            elif local:
                FolderWriter(self).save()

    def read_newest(self, other_than: str = "-") -> Snapshot:
        """The newest snapshot whose name does not start with `other_than`; default: a prefix that no name has."""
        for _ in range(MAX_ATTEMPTS):
            with suppress(FileNotFoundError):  # its writer has published a newer one
                return self.read([name for name in self.snapshot_names() if not name.startswith(other_than)][-1])
        raise TransientError(f"{self.path}: the snapshots in the storage change too fast; run the same command again")

    def _pull_newest(self, records_only: bool) -> None:
        for _ in range(MAX_ATTEMPTS):
            newest = self.read_newest()
            if self._is_current(newest.name, records_only):
                return
            with suppress(FileNotFoundError):  # its writer has published a newer one
                return self.download(newest, records_only=records_only)
        raise TransientError(f"{self.path}: the snapshots in the storage change too fast; run the same command again")

    def _is_current(self, newest: str, records_only: bool) -> bool:
        """Whether the local files come from the newest snapshot, or there is no snapshot."""
        base = self.base()
        return not newest or (base is not None and base.name == newest and (records_only or not base.records_only))


class FolderWriter:
    """A claim to a stored folder; see the description of this module.

    Raises:
        TransientError: Another worker claimed the folder at the same time or later.
    """

    def __init__(self, folder: StoredFolder) -> None:
        self.folder = folder
        adopted = folder.read_newest()
        self.prefix = f"{adopted.claim + 1:08d}-{secrets.token_hex(4)}"
        self.sequence = 0
        self.published: list[Snapshot] = []  # the last two; readers and successors may be reading the last but one
        while True:
            self._publish(adopted.files)
            newest = folder.read_newest(other_than=self.prefix)
            self._check_not_superseded(newest.name)
            if newest.name == adopted.name:
                break
            adopted = newest  # the predecessor published a snapshot before it could see this claim
        self.adopted = adopted
        self._delete_older()

    def pull(self) -> None:
        """Download the adopted files, unless the local files come from the adopted snapshot or there was none."""
        base = self.folder.base()
        if self.adopted.name and (base is None or base.records_only or base.name != self.adopted.name):
            self.folder.download(self.published[-1])
        else:
            self.folder.write_marker(self.published[-1])

    def save(self) -> None:
        """Publish a snapshot of the local files, if they changed.

        Raises:
            TransientError: Another worker claimed the folder meanwhile.
        """
        names = self.check()
        last = self.published[-1]
        stored = last.files if last.name in names else {}  # else the storage was emptied
        local = self.folder.scan()
        files = {path: stored[path] for path in local if path in stored and stored[path].version == local[path]}
        if files.keys() != local.keys() or files.keys() != stored.keys():
            new = in_parallel(lambda path: self._upload(path, local[path]), local.keys() - files.keys())
            snapshot = self._publish(files | dict(filter(None, new)))
            self.check()  # a claim during the upload has not adopted this snapshot, so the folder is not saved
            self.folder.write_marker(snapshot)

    def check(self) -> list[str]:
        """Check that this claim is the highest one, and return the names of all snapshots.

        Raises:
            TransientError: Another worker claimed the folder meanwhile.
        """
        names = self.folder.snapshot_names()
        self._check_not_superseded(self._newest_other(names))
        return names

    def _upload(self, path: str, version: FileVersion) -> tuple[str, StoredFile] | None:
        """Upload a file for the next snapshot; None if the file was deleted meanwhile."""
        source = self.folder.path / path
        file = StoredFile(
            object=f"{self._next_name}/{source.name if path == '.' else path}", size=0, mtime_ns=version[1]
        )
        try:
            size = self.folder.storage.upload(source, self.folder.file_object(file))
        except FileNotFoundError:
            if source.exists():  # the error of a storage whose bucket or folder is missing
                raise
            return None
        return path, file.model_copy(update={"size": size})

    @property
    def _next_name(self) -> str:
        return f"{self.prefix}-{self.sequence:08d}"

    def _publish(self, files: dict[str, StoredFile]) -> Snapshot:
        """Write a snapshot, and delete the third newest snapshot with the objects that only that snapshot uses."""
        folder = self.folder
        snapshot = Snapshot(name=self._next_name, files=files)
        self.sequence += 1
        content = json.dumps(snapshot.to_json(), ensure_ascii=False).encode()
        folder.storage.write(content, folder.snapshot_object(snapshot.name))
        self.published.append(snapshot)
        if len(self.published) > 2:
            oldest = self.published.pop(0)
            unused = {folder.file_object(file) for file in oldest.files.values()} - self._used_objects()
            folder.storage.delete([folder.snapshot_object(oldest.name), *unused])
        return snapshot

    def _used_objects(self) -> set[str]:
        return {self.folder.file_object(file) for snapshot in self.published for file in snapshot.files.values()}

    def _newest_other(self, names: list[str]) -> str:
        """The newest of the snapshots that other workers published."""
        return next(name for name in reversed(names) if not name.startswith(self.prefix))

    def _check_not_superseded(self, newest_other: str) -> None:
        """Check the name of the newest snapshot of other workers."""
        if newest_other > self.prefix:
            raise TransientError(f"{self.folder.path}: another worker has taken over; this one stops")

    def _delete_older(self) -> None:
        """Delete snapshots of lower claims, and their objects that the adopted snapshot does not use."""
        folder, storage = self.folder, self.folder.storage
        older = [folder.snapshot_object(name) for name in folder.snapshot_names() if "" < name < self.prefix]
        parents = [name for name in storage.list_folders(f"{OBJECTS}/{folder.name}") if _is_older(name, self.prefix)]
        objects = {name for parent in parents for name in storage.list_objects(parent)}
        storage.delete([*older, *(objects - self._used_objects())])


_writers: dict[Path, FolderWriter] = {}  # of this process


@contextmanager
def writer(path: Path) -> Iterator[None]:
    """Claim a folder for this process, download its newest snapshot, and let `save` publish under the claim.

    Local files that are newer than the newest snapshot, and come from it, are kept. Without a storage, and for paths
    outside the home, nothing happens.

    Raises:
        TransientError: A process of this machine holds the folder, another worker claimed the folder at the same time,
            or the storage does not answer.
    """
    folders = _stored_folders([path])
    if not folders:
        yield
        return
    [folder] = folders
    with folder.lock("writer", LOCK_TIMEOUT_S):
        with transient_errors():
            folder_writer = FolderWriter(folder)
            folder_writer.pull()
        _writers[folder.path] = folder_writer
        try:
            yield
        finally:
            del _writers[folder.path]


def save(*paths: Path) -> None:
    """Publish a snapshot of each folder or file that changed. A folder that no `writer` holds is claimed first.

    Raises:
        TransientError: Another worker has claimed a folder that `writer` holds, or the storage does not answer.
    """
    for folder in _stored_folders(paths):
        with transient_errors():
            (_writers.get(folder.path) or folder).save()


def is_saved(path: Path) -> bool:
    """Whether a folder did not change here since the last snapshot that this machine wrote or downloaded.

    True without a storage, and for paths outside the home.
    """
    return all(folder.is_saved() for folder in _stored_folders([path]))


def check_claim(path: Path) -> None:
    """Check that no other worker has claimed a folder that `writer` holds.

    Raises:
        TransientError: Another worker has, or the storage does not answer.
    """
    for folder in _stored_folders([path]):
        with transient_errors():
            _writers[folder.path].check()


def pull(*paths: Path) -> None:
    """Download the newest snapshot of each folder or file; local files that the snapshot lacks are deleted,
    except exports that were made on this machine only.

    Nothing happens if the local files come from the newest snapshot, even if they changed since, or if a process of
    this machine is writing the folder.

    Raises:
        TransientError: The storage does not answer.
    """
    for folder in _stored_folders(paths):
        with transient_errors():
            folder.pull()


def pull_records(*folders: Path) -> None:
    """Download the records of all runs and sweeps in folders: the files that tables and early stopping read.

    Checkpoints are not downloaded, not even in part. The storage is listed once per folder.

    Raises:
        TransientError: The storage does not answer.
    """
    for folder in _stored_folders(folders):
        with transient_errors():
            _pull_records(folder.storage, folder.name)


def _pull_records(storage: Storage, parent: str) -> None:
    newest: dict[str, str] = {}  # by folder
    for name in sorted(storage.list_objects(f"{SNAPSHOTS}/{parent}")):
        folder, _, snapshot = name.removeprefix(f"{SNAPSHOTS}/").rpartition("/")
        newest[folder] = snapshot.removesuffix(".json")
    # A checkpoint or an export that other runs read as their teacher is stored once more under its own path
    runs = [name for name in newest if name == parent or Path(name).parent.name in RUN_FOLDERS]
    in_parallel(lambda name: StoredFolder(storage, storage.path_of(name)).pull_records(newest[name]), runs)


def _stored_folders(paths: Iterable[Path]) -> list[StoredFolder]:
    return [StoredFolder(storage, path) for storage, path in synced_paths(paths)]


def _version(path: Path) -> FileVersion:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _is_older(object_folder: str, prefix: str) -> bool:
    """Whether a folder of objects was written under a lower claim; folders of other names hold nested folders."""
    name = object_folder.rpartition("/")[2]
    return name < prefix and NAME_PATTERN.fullmatch(name) is not None


def _delete_file(folder: Path, path: str) -> None:
    """Delete a file, and the folders that it leaves empty."""
    file = folder / path
    file.unlink(missing_ok=True)
    for parent in file.parents:
        if parent == folder or not parent.is_relative_to(folder) or any(parent.iterdir()):
            break
        parent.rmdir()
