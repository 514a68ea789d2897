"""The storage that a cluster's machines share where they share no folder: a bucket, or any place that pyarrow reads.

With RAYDISTILL_STORAGE (s3://BUCKET/FOLDER, gs://..., file:///...) RAYDISTILL_HOME is each machine's own, at the same
path on all, and holds what the machine has fetched. What is made is kept in the storage as soon as it is whole, under
the path that it has below the home. Without the variable all of this does nothing, and the home is a folder that all
machines see.

An object store has no rename: files are whole each by itself, and those that say that a folder is finished go last.
Files are told apart by size and time, which a file here takes over from the storage; clocks must agree to a second.
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

from raydistill.core.console import raydistill_home
from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import atomic_path, safe_join
from raydistill.core.secrets import find_credentials, redact

STORAGE_ENV = "RAYDISTILL_STORAGE"
MAX_TRANSFERS = 16  # at a time
# What says that the files beside it are whole, so that nobody who finds it misses one of them.
COMPLETION_MARKERS = ("state.json", "manifest.json", "result.json")
# What is known of runs and sweeps without their weights.
RECORD_PATTERNS = ("*.json", "*.jsonl", "*.npz", "*.yaml", "study.log")
CLOCK_TOLERANCE_NS = 10**9  # by how much the clocks of two machines may differ
LOCAL_SUFFIXES = (".lock", ".making", ".ray", ".engine")  # ends of names that stay on their machine


@dataclass(frozen=True)
class Storage:
    """A folder of a file system: `files` is pyarrow's, `root` the folder in it, `home` the folder here."""

    filesystem: Any
    root: str
    home: Path

    def pull(self, place: Path, names: Iterable[str] = ()) -> None:
        """Bring the file or folder `place` here as far as the storage has it, newer or where nothing is.

        `names`: only files whose names fit one of these patterns.
        """
        patterns = list(names) or ["*"]
        found = self.list_files(place)
        there = {path: info for path, info in found.items() if any(fnmatch(path.name, each) for each in patterns)}
        self._transfer_all(
            self._download, [(path, info) for path, info in there.items() if _needs_download(path, info)]
        )

    def push(self, place: Path, *, mirror: bool = False) -> None:
        """Put the file or folder `place` into the storage, as far as it is not there as it is here, or newer.

        `mirror`: delete there what is not here, as checkpoints that made way for a later one.
        """
        there = self.list_files(place)
        here = [p for p in (place.rglob("*") if place.is_dir() else [place]) if p.is_file() and self._is_synced(p)]
        changed = [
            path
            for path in here
            if not (_is_unchanged(path, there.get(path)) or _remote_is_newer(path, there.get(path)))
        ]
        self._transfer_all(self._upload, [(path, None) for path in changed])
        if mirror:
            for path in there.keys() - set(here):
                self.filesystem.delete_file(self._remote_path(path))

    def delete(self, path: Path) -> None:
        """Delete the folder `path` from the storage."""
        from pyarrow.fs import FileType

        if self.filesystem.get_file_info(self._remote_path(path)).type == FileType.Directory:
            self.filesystem.delete_dir(self._remote_path(path))

    def list_files(self, place: Path) -> dict[Path, Any]:
        """What the storage has at `place` or under it, by the path here."""
        from pyarrow.fs import FileSelector, FileType

        with _transient_errors():
            infos = [self.filesystem.get_file_info(self._remote_path(place))]
            if infos[0].type == FileType.Directory:
                infos = self.filesystem.get_file_info(FileSelector(infos[0].path, recursive=True))
        paths = {self._local_path(info.path): info for info in infos if info.type == FileType.File}
        return {path: info for path, info in paths.items() if self._is_synced(path)}

    def _download(self, path: Path, info: Any) -> None:
        with self.filesystem.open_input_stream(info.path) as source, atomic_path(path) as place:
            with place.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
            os.utime(place, ns=(info.mtime_ns, info.mtime_ns))

    def _upload(self, path: Path, _: None) -> None:
        from pyarrow.fs import LocalFileSystem

        place = self._remote_path(path)
        written = place
        if isinstance(self.filesystem, LocalFileSystem):  # here a file grows while it is written
            written = f"{place}.making"
            self.filesystem.create_dir(place.rpartition("/")[0])
        try:
            source = path.open("rb")
        except FileNotFoundError:  # a checkpoint that made way meanwhile
            return
        with source, self.filesystem.open_output_stream(written) as target:
            shutil.copyfileobj(source, target, 2**20)
        if written != place:
            self.filesystem.move(written, place)
        stamp = self.filesystem.get_file_info(place).mtime_ns
        os.utime(path, ns=(stamp, stamp))

    def _transfer_all(self, transfer: Callable[[Path, Any], None], files: list[tuple[Path, Any]]) -> None:
        """Carry out transfers, several at a time; what says that the others are whole comes when they are."""
        with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
            for last in (False, True):
                wanted = [pair for pair in files if (pair[0].name in COMPLETION_MARKERS) == last]
                with _transient_errors():
                    list(pool.map(lambda pair: transfer(*pair), wanted))

    def _is_synced(self, path: Path) -> bool:
        return not any(part.endswith(LOCAL_SUFFIXES) for part in path.relative_to(self.home).parts)

    def _local_path(self, remote: str) -> Path:
        """UserError for an object whose name leads out of the home."""
        name = remote.removeprefix(f"{self.root}/")
        try:
            safe_join(self.home, name)
        except ValueError as error:
            raise UserError(f"{STORAGE_ENV}: {error}; delete that object") from None
        return self.home / name

    def _remote_path(self, path: Path) -> str:
        return f"{self.root}/{path.relative_to(self.home).as_posix()}"


def pull(*paths: Path, patterns: Iterable[str] = ()) -> None:
    """`Storage.fetch` of each place, where there is a storage; places outside the home are each machine's own."""
    for storage, place in _synced_paths(paths):
        storage.pull(place, patterns)


def push(*paths: Path, mirror: bool = False) -> None:
    """`Storage.keep` of each place, where there is a storage."""
    for storage, place in _synced_paths(paths):
        storage.push(place, mirror=mirror)


def delete(path: Path) -> None:
    """`Storage.drop`, where there is a storage."""
    for storage, shared in _synced_paths([path]):
        storage.delete(shared)


def ray_storage_options(folder: Path) -> dict[str, Any]:
    """Where Ray's Tune and Train keep their own state, as the arguments of their RunConfig."""
    storage = open_storage()
    if storage is None:
        return {"storage_path": str(folder)}
    place = f"{storage.root}/{folder.relative_to(storage.home).as_posix()}"
    return {"storage_path": place, "storage_filesystem": storage.filesystem}


def open_storage() -> Storage | None:
    """The storage that RAYDISTILL_STORAGE names; None without it."""
    address = os.environ.get(STORAGE_ENV)
    return _open_uri(address, raydistill_home()) if address else None


@lru_cache(maxsize=4)
def _open_uri(uri: str, local_home: Path) -> Storage:
    """UserError for an address that holds a secret, or that pyarrow cannot read."""
    if list(find_credentials(uri)):
        raise UserError(f"{STORAGE_ENV} holds a password; give it by the environment, such as AWS_SECRET_ACCESS_KEY")
    from pyarrow.fs import FileSystem, FileType

    try:
        files, root = FileSystem.from_uri(uri)
        found = files.get_file_info(root)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(
            f"{STORAGE_ENV}={redact(uri)}: cannot be read: {redact(str(error))[:300]}. Expected an address such as "
            f"s3://BUCKET/FOLDER?region=eu-central-1 or file:///mnt/FOLDER"
        ) from None
    if found.type == FileType.File:
        raise UserError(f"{STORAGE_ENV}={redact(uri)}: is a file; give a folder")
    return Storage(files, root.rstrip("/"), local_home)


@contextlib.contextmanager
def _transient_errors() -> Iterator[None]:
    """A block in which an error of the storage or of a disk is a PassingError."""
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
    found = [place.absolute() for place in paths]
    return [(storage, place) for place in found if place.is_relative_to(storage.home)]


def _is_unchanged(path: Path, remote: Any) -> bool:
    try:
        here = path.stat()
    except FileNotFoundError:
        return True
    return remote is not None and (here.st_size, here.st_mtime_ns) == (remote.size, remote.mtime_ns)


def _needs_download(path: Path, remote: Any) -> bool:
    """Whether the storage's file is another than the one here, and not an older one."""
    return not path.is_file() or (not _is_unchanged(path, remote) and remote.mtime_ns >= path.stat().st_mtime_ns)


def _remote_is_newer(path: Path, remote: Any) -> bool:
    """Whether the storage has a file that another machine kept after the one here was fetched or kept."""
    # By when it came to be here, not by the time that it carries, which copying and unpacking keep.
    return remote is not None and path.is_file() and remote.mtime_ns > path.stat().st_ctime_ns + CLOCK_TOLERANCE_NS
