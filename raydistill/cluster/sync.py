"""The storage shared by machines that share no folder: a bucket, or any other location that pyarrow can read.

With RAYDISTILL_STORAGE (s3://BUCKET/FOLDER, gs://..., file:///...) each machine has its own RAYDISTILL_HOME, at the
same path everywhere, which holds what the machine has downloaded. Results are uploaded as soon as they are complete, to
the path that they have below the home. Without the variable the functions of this module do nothing, and the home must
be a folder that all machines see.

Object stores cannot rename. Each file is uploaded atomically, and the files that mark a folder as complete go last.
Versions of a file are compared by size and modification time; a local copy takes the time of the stored object. Clocks
of the machines must agree to within a second.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import TEMPORARY_SUFFIX, atomic_path, safe_join
from raydistill.core.paths import raydistill_home
from raydistill.core.secrets import has_credentials, redact

STORAGE_ENV = "RAYDISTILL_STORAGE"
MAX_TRANSFERS = 16  # at the same time
# Files that mark the other files of their folder as complete; transferred last.
COMPLETION_MARKERS = ("state.json", "manifest.json", "result.json")
# Files that describe runs and sweeps, without the weights.
RECORD_PATTERNS = ("*.json", "*.jsonl", "*.npz", "*.yaml", "study.log")
CLOCK_TOLERANCE_NS = 10**9  # accepted difference between the clocks of two machines
LOCAL_SUFFIXES = (".lock", TEMPORARY_SUFFIX, ".ray", ".engine")  # names with these endings are not synced


@dataclass(frozen=True)
class Storage:
    """A folder of a pyarrow file system that mirrors a local folder.

    Attributes:
        filesystem: The pyarrow.fs.FileSystem.
        root: The folder in `filesystem`.
        home: The local folder, RAYDISTILL_HOME.
    """

    filesystem: Any
    root: str
    home: Path

    def pull(self, path: Path, patterns: Iterable[str] = ()) -> None:
        """Download the file or folder `path`: files that are missing here, or newer in the storage.

        Args:
            path: A path below `home`.
            patterns: Glob patterns of file names; by default all files.
        """
        patterns = list(patterns) or ["*"]
        remote = {
            file: info
            for file, info in self.list_files(path).items()
            if any(fnmatch(file.name, pattern) for pattern in patterns)
        }
        self._transfer_all(
            self._download, [(file, info) for file, info in remote.items() if _needs_download(file, info)]
        )

    def push(self, path: Path, *, mirror: bool = False) -> None:
        """Upload the file or folder `path`: files that changed here and are not newer in the storage.

        Args:
            path: A path below `home`.
            mirror: Also delete stored files that no longer exist here, such as replaced checkpoints.
        """
        remote = self.list_files(path)
        candidates = path.rglob("*") if path.is_dir() else [path]
        local = [file for file in candidates if file.is_file() and self._is_synced(file)]
        changed = [
            file
            for file in local
            if not (_is_unchanged(file, remote.get(file)) or _remote_is_newer(file, remote.get(file)))
        ]
        self._transfer_all(self._upload, [(file, None) for file in changed])
        if mirror:
            for stale in remote.keys() - set(local):
                self.filesystem.delete_file(self._remote_path(stale))

    def delete(self, path: Path) -> None:
        """Delete the folder `path` from the storage."""
        from pyarrow.fs import FileType

        if self.filesystem.get_file_info(self._remote_path(path)).type == FileType.Directory:
            self.filesystem.delete_dir(self._remote_path(path))

    def list_files(self, path: Path) -> dict[Path, Any]:
        """The stored files at or below `path`: pyarrow's FileInfo by local path.

        Raises:
            TransientError: The storage does not answer.
        """
        from pyarrow.fs import FileSelector, FileType

        with _transient_errors():
            infos = [self.filesystem.get_file_info(self._remote_path(path))]
            if infos[0].type == FileType.Directory:
                infos = self.filesystem.get_file_info(FileSelector(infos[0].path, recursive=True))
        files = {self._local_path(info.path): info for info in infos if info.type == FileType.File}
        return {file: info for file, info in files.items() if self._is_synced(file)}

    def _download(self, path: Path, info: Any) -> None:
        with self.filesystem.open_input_stream(info.path) as source, atomic_path(path) as temporary:
            with temporary.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
            os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))

    def _upload(self, path: Path, _: None) -> None:
        from pyarrow.fs import LocalFileSystem

        target = self._remote_path(path)
        written = target
        if isinstance(self.filesystem, LocalFileSystem):  # unlike an object, a local file is visible while it grows
            written = f"{target}{TEMPORARY_SUFFIX}"
            self.filesystem.create_dir(target.rpartition("/")[0])
        try:
            source = path.open("rb")
        except FileNotFoundError:  # a checkpoint that was replaced in the meantime
            return
        with source, self.filesystem.open_output_stream(written) as stream:
            shutil.copyfileobj(source, stream, 2**20)
        if written != target:
            self.filesystem.move(written, target)
        mtime_ns = self.filesystem.get_file_info(target).mtime_ns
        os.utime(path, ns=(mtime_ns, mtime_ns))

    def _transfer_all(self, transfer: Callable[[Path, Any], None], files: list[tuple[Path, Any]]) -> None:
        """Run transfers in parallel; completion markers follow when all other files have been transferred."""
        with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
            for markers in (False, True):
                batch = [pair for pair in files if (pair[0].name in COMPLETION_MARKERS) == markers]
                with _transient_errors():
                    list(pool.map(lambda pair: transfer(*pair), batch))

    def _is_synced(self, path: Path) -> bool:
        return not any(part.endswith(LOCAL_SUFFIXES) for part in path.relative_to(self.home).parts)

    def _local_path(self, remote: str) -> Path:
        """The local path of an object; UserError if its name is outside the home."""
        name = remote.removeprefix(f"{self.root}/")
        try:
            safe_join(self.home, name)
        except ValueError as error:
            raise UserError(f"{STORAGE_ENV}: {error}; delete that object") from None
        return self.home / name

    def _remote_path(self, path: Path) -> str:
        return f"{self.root}/{path.relative_to(self.home).as_posix()}"


def pull(*paths: Path, patterns: Iterable[str] = ()) -> None:
    """`Storage.pull` for each path below the home; does nothing without RAYDISTILL_STORAGE."""
    for storage, path in _synced_paths(paths):
        storage.pull(path, patterns)


def push(*paths: Path, mirror: bool = False) -> None:
    """`Storage.push` for each path below the home; does nothing without RAYDISTILL_STORAGE."""
    for storage, path in _synced_paths(paths):
        storage.push(path, mirror=mirror)


def delete(path: Path) -> None:
    """`Storage.delete` for a path below the home; does nothing without RAYDISTILL_STORAGE."""
    for storage, synced_path in _synced_paths([path]):
        storage.delete(synced_path)


def ray_storage_options(folder: Path) -> dict[str, Any]:
    """Arguments of Ray's RunConfig that place the state of Ray Tune and Ray Train in `folder`, or in the storage."""
    storage = open_storage()
    if storage is None:
        return {"storage_path": str(folder)}
    path = f"{storage.root}/{folder.relative_to(storage.home).as_posix()}"
    return {"storage_path": path, "storage_filesystem": storage.filesystem}


def open_storage() -> Storage | None:
    """The storage that RAYDISTILL_STORAGE names; None without the variable.

    Raises:
        UserError: The address contains a secret, is not readable or is a file.
    """
    address = os.environ.get(STORAGE_ENV)
    return _open_uri(address, raydistill_home()) if address else None


@lru_cache(maxsize=4)
def _open_uri(uri: str, local_home: Path) -> Storage:
    if has_credentials(uri):
        raise UserError(
            f"{STORAGE_ENV} holds a password; pass it in an environment variable such as AWS_SECRET_ACCESS_KEY"
        )
    from pyarrow.fs import FileSystem, FileType

    try:
        filesystem, root = FileSystem.from_uri(uri)
        info = filesystem.get_file_info(root)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(
            f"{STORAGE_ENV}={redact(uri)}: cannot be read: {redact(str(error))[:300]}. Expected an address such as "
            f"s3://BUCKET/FOLDER?region=eu-central-1 or file:///mnt/FOLDER"
        ) from None
    if info.type == FileType.File:
        raise UserError(f"{STORAGE_ENV}={redact(uri)}: is a file; give a folder")
    return Storage(filesystem, root.rstrip("/"), local_home)


@contextlib.contextmanager
def _transient_errors() -> Iterator[None]:
    """Context in which an OSError of the storage or of a disk becomes a TransientError."""
    try:
        yield
    except OSError as error:
        raise TransientError(
            f"{STORAGE_ENV}: {redact(str(error))[:300]}. Nothing is lost: run the same command again"
        ) from None


def _synced_paths(paths: Iterable[Path]) -> list[tuple[Storage, Path]]:
    storage = open_storage()
    if storage is None:
        return []
    absolute = [path.absolute() for path in paths]
    return [(storage, path) for path in absolute if path.is_relative_to(storage.home)]


def _is_unchanged(path: Path, remote: Any) -> bool:
    """Whether the local file is the stored one, or has been deleted."""
    try:
        local = path.stat()
    except FileNotFoundError:
        return True
    return remote is not None and (local.st_size, local.st_mtime_ns) == (remote.size, remote.mtime_ns)


def _needs_download(path: Path, remote: Any) -> bool:
    """Whether the stored file differs from the local one and is not older, or there is no local file."""
    return not path.is_file() or (not _is_unchanged(path, remote) and remote.mtime_ns >= path.stat().st_mtime_ns)


def _remote_is_newer(path: Path, remote: Any) -> bool:
    """Whether another machine uploaded the file after the local one was written or downloaded."""
    # st_ctime is when the local file was created or last changed; st_mtime survives copying and unpacking.
    return remote is not None and path.is_file() and remote.mtime_ns > path.stat().st_ctime_ns + CLOCK_TOLERANCE_NS
