"""The storage shared by machines that share no folder: a bucket, or any other location that pyarrow can write.

With RAYDISTILL_STORAGE (s3://BUCKET/FOLDER, gs://..., file:///...) each machine has its own RAYDISTILL_HOME, at the
same path everywhere, which holds what the machine has downloaded. Without the variable the functions of this module and
of snapshots.py do nothing, and the home must be a folder that all machines see.

This module opens the storage and copies write-once files: outputs of batches, batch plans and parts of the teacher
cache. Their paths determine their content, so a stored file is never replaced. Everything that changes, such as the
folder of a run, is stored by snapshots.py.

Object stores cannot rename. Each file is uploaded atomically, and the files that mark a folder as complete go last.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import OLD_SUFFIX, TEMPORARY_SUFFIX, atomic_path, safe_join
from raydistill.core.paths import raydistill_home
from raydistill.core.secrets import has_credentials, redact

STORAGE_ENV = "RAYDISTILL_STORAGE"
MAX_TRANSFERS = 16  # at the same time
# Files that mark the other files of their folder as complete; transferred last.
COMPLETION_MARKERS = ("manifest.json", "result.json", "sweep.json")
LOCAL_SUFFIXES = (".lock", TEMPORARY_SUFFIX, OLD_SUFFIX, ".ray", ".engine")  # such names are not copied

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Storage:
    """A folder of a pyarrow file system that mirrors a local folder. Names of objects are relative to the folder.

    Attributes:
        filesystem: The pyarrow.fs.FileSystem.
        root: The folder in `filesystem`.
        home: The local folder, RAYDISTILL_HOME.
    """

    filesystem: Any
    root: str
    home: Path

    def name_of(self, path: Path) -> str:
        """The name of the object that mirrors a local path."""
        return path.relative_to(self.home).as_posix()

    def path_of(self, name: str) -> Path:
        """The local path that an object mirrors; UserError if the path is outside the home."""
        try:
            safe_join(self.home, name)
        except ValueError as error:
            raise UserError(f"{STORAGE_ENV}: {error}; delete that object") from None
        return self.home / name

    def list_objects(self, folder: str, *, recursive: bool = True) -> dict[str, int]:
        """The names and sizes of the objects in a folder."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(f"{self.root}/{folder}", recursive=recursive, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return {
            info.path.removeprefix(f"{self.root}/"): info.size
            for info in infos
            if info.type == FileType.File and not info.path.endswith(TEMPORARY_SUFFIX)
        }

    def list_folders(self, folder: str) -> list[str]:
        """The names of the folders in a folder."""
        from pyarrow.fs import FileSelector, FileType

        infos = self.filesystem.get_file_info(FileSelector(f"{self.root}/{folder}", allow_not_found=True))
        return [info.path.removeprefix(f"{self.root}/") for info in infos if info.type == FileType.Directory]

    def upload(self, source: Path, name: str) -> int:
        """Upload a file, and return its size."""
        with source.open("rb") as file:
            return self.write_stream(file, name)

    def write(self, content: bytes, name: str) -> None:
        """Write an object."""
        self.write_stream(BytesIO(content), name)

    def write_stream(self, source: BinaryIO, name: str) -> int:
        """Write an object with the content of a stream, and return its size."""
        from pyarrow.fs import LocalFileSystem

        target = f"{self.root}/{name}"
        if isinstance(self.filesystem, LocalFileSystem):  # unlike an object, a local file is visible while it grows
            with atomic_path(Path(target)) as temporary, temporary.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
        else:
            with self.filesystem.open_output_stream(target) as stream:
                shutil.copyfileobj(source, stream, 2**20)
        return source.tell()

    def read(self, name: str) -> bytes:
        """The content of an object; FileNotFoundError if there is none."""
        with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream:
            return bytes(stream.read())

    def download(self, name: str, path: Path, mtime_ns: int | None = None) -> None:
        """Download an object to a local path, and set the modification time of the file."""
        with self.filesystem.open_input_stream(f"{self.root}/{name}") as source, atomic_path(path) as temporary:
            with temporary.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
            if mtime_ns is not None:
                os.utime(temporary, ns=(mtime_ns, mtime_ns))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; missing objects are skipped."""

        def delete_object(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(f"{self.root}/{name}")

        in_parallel(delete_object, names)

    def delete_folder(self, folder: str) -> None:
        """Delete all objects in a folder."""
        from pyarrow.fs import FileType

        if self.filesystem.get_file_info(f"{self.root}/{folder}").type == FileType.Directory:
            self.filesystem.delete_dir(f"{self.root}/{folder}")

    def push(self, path: Path) -> None:
        """Upload the files at or below a path that are not stored."""
        paths = path.rglob("*") if path.is_dir() else [path]
        files = {self.name_of(file): file for file in paths if file.is_file() and is_synced(file, self.home)}
        missing = sorted(files.keys() - self._stored_sizes(path).keys())
        markers_last(lambda name: self.upload(files[name], name), missing)

    def pull(self, path: Path, names: Collection[str] = ()) -> None:
        """Download the stored files at or below a path that are missing here or have another size; all, or by name."""
        sizes = self._stored_sizes(path)
        files = {name: self.path_of(name) for name in sizes if not names or name.rpartition("/")[2] in names}
        missing = [
            name
            for name, file in sorted(files.items())
            if is_synced(file, self.home) and not (file.is_file() and file.stat().st_size == sizes[name])
        ]
        markers_last(lambda name: self.download(name, files[name]), missing)

    def _stored_sizes(self, path: Path) -> dict[str, int]:
        """The names and sizes of the objects at or below a path."""
        from pyarrow.fs import FileType

        name = self.name_of(path)
        info = self.filesystem.get_file_info(f"{self.root}/{name}")
        return {name: info.size} if info.type == FileType.File else self.list_objects(name)


def push(*paths: Path) -> None:
    """Upload write-once files: the files at or below the paths that the storage lacks.

    Raises:
        TransientError: The storage does not answer.
    """
    for storage, path in synced_paths(paths):
        with transient_errors():
            storage.push(path)


def pull(*paths: Path, names: Collection[str] = ()) -> None:
    """Download write-once files: the files at or below the paths that this machine lacks.

    Args:
        paths: Paths below the home.
        names: Names of files; by default all files.

    Raises:
        TransientError: The storage does not answer.
    """
    for storage, path in synced_paths(paths):
        with transient_errors():
            storage.pull(path, names)


def delete(folder: Path) -> None:
    """Delete a folder of write-once files from the storage. The caller holds the lock of what the folder belongs to."""
    for storage, path in synced_paths([folder]):
        with transient_errors():
            storage.delete_folder(storage.name_of(path))


def ray_storage_options(folder: Path) -> dict[str, Any]:
    """Arguments of Ray's RunConfig that place the state of Ray Tune and Ray Train in `folder`, or in the storage."""
    storage = open_storage()
    if storage is None:
        return {"storage_path": str(folder)}
    return {"storage_path": f"{storage.root}/{storage.name_of(folder)}", "storage_filesystem": storage.filesystem}


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


def synced_paths(paths: Iterable[Path]) -> list[tuple[Storage, Path]]:
    """The paths below the home, as absolute paths with the storage; none without a storage."""
    storage = open_storage()
    if storage is None:
        return []
    absolute = dict.fromkeys(path.absolute() for path in paths)
    return [(storage, path) for path in absolute if path.is_relative_to(storage.home)]


def is_synced(path: Path, folder: Path) -> bool:
    """Whether a file below a folder is copied: no part of its path is a lock, temporary or local to the machine."""
    return not any(part.endswith(LOCAL_SUFFIXES) for part in path.relative_to(folder).parts)


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results of a function for several items, computed in threads; raises the first error."""
    with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
        return list(pool.map(function, items))


def is_completion_marker(name: str) -> bool:
    """Whether the file of a name marks the other files of its folder as complete."""
    return name.rpartition("/")[2] in COMPLETION_MARKERS


def markers_last(transfer: Callable[[str], Any], names: Collection[str]) -> None:
    """Transfer files by name in parallel; completion markers follow when all other files have been transferred."""
    markers = [name for name in names if is_completion_marker(name)]
    in_parallel(transfer, [name for name in names if name not in markers])
    in_parallel(transfer, markers)


@contextlib.contextmanager
def transient_errors() -> Iterator[None]:
    """Context in which an OSError of the storage or of a disk becomes a TransientError."""
    try:
        yield
    except OSError as error:
        raise TransientError(
            f"{STORAGE_ENV}: {redact(str(error))[:300]}. Nothing is lost: run the same command again"
        ) from None
