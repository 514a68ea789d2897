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

from raydistill.core.console import home
from raydistill.core.errors import PassingError, UserError
from raydistill.core.files import appearing, inside
from raydistill.core.secrets import hidden, places_of_credentials

STORAGE = "RAYDISTILL_STORAGE"
TRANSFERS = 16  # at a time
# What says that the files beside it are whole, so that nobody who finds it misses one of them.
LAST = ("state.json", "manifest.json", "result.json")
# What is known of runs and sweeps without their weights.
RECORDS = ("*.json", "*.jsonl", "*.npz", "*.yaml", "study.log")
CLOCKS_NS = 10**9  # by how much the clocks of two machines may differ
PRIVATE = (".lock", ".making", ".ray", ".engine")  # ends of names that stay on their machine


@dataclass(frozen=True)
class Storage:
    """A folder of a file system: `files` is pyarrow's, `root` the folder in it, `home` the folder here."""

    files: Any
    root: str
    home: Path

    def fetch(self, place: Path, names: Iterable[str] = ()) -> None:
        """Bring the file or folder `place` here as far as the storage has it, newer or where nothing is.

        `names`: only files whose names fit one of these patterns.
        """
        patterns = list(names) or ["*"]
        found = self.listed(place)
        there = {path: info for path, info in found.items() if any(fnmatch(path.name, each) for each in patterns)}
        self._in_order(self._bring, [(path, info) for path, info in there.items() if _is_news(path, info)])

    def keep(self, place: Path, *, mirror: bool = False) -> None:
        """Put the file or folder `place` into the storage, as far as it is not there as it is here, or newer.

        `mirror`: delete there what is not here, as checkpoints that made way for a later one.
        """
        there = self.listed(place)
        here = [p for p in (place.rglob("*") if place.is_dir() else [place]) if p.is_file() and self._is_shared(p)]
        changed = [path for path in here if not (_is_same(path, there.get(path)) or _is_old(path, there.get(path)))]
        self._in_order(self._put, [(path, None) for path in changed])
        if mirror:
            for path in there.keys() - set(here):
                self.files.delete_file(self._there(path))

    def drop(self, place: Path) -> None:
        """Delete the folder `place` from the storage."""
        from pyarrow.fs import FileType

        if self.files.get_file_info(self._there(place)).type == FileType.Directory:
            self.files.delete_dir(self._there(place))

    def listed(self, place: Path) -> dict[Path, Any]:
        """What the storage has at `place` or under it, by the path here."""
        from pyarrow.fs import FileSelector, FileType

        with _plain_errors():
            infos = [self.files.get_file_info(self._there(place))]
            if infos[0].type == FileType.Directory:
                infos = self.files.get_file_info(FileSelector(infos[0].path, recursive=True))
        paths = {self._here(info.path): info for info in infos if info.type == FileType.File}
        return {path: info for path, info in paths.items() if self._is_shared(path)}

    def _bring(self, path: Path, info: Any) -> None:
        with self.files.open_input_stream(info.path) as source, appearing(path) as place:
            with place.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
            os.utime(place, ns=(info.mtime_ns, info.mtime_ns))

    def _put(self, path: Path, _: None) -> None:
        from pyarrow.fs import LocalFileSystem

        place = self._there(path)
        written = place
        if isinstance(self.files, LocalFileSystem):  # here a file grows while it is written
            written = f"{place}.making"
            self.files.create_dir(place.rpartition("/")[0])
        try:
            source = path.open("rb")
        except FileNotFoundError:  # a checkpoint that made way meanwhile
            return
        with source, self.files.open_output_stream(written) as target:
            shutil.copyfileobj(source, target, 2**20)
        if written != place:
            self.files.move(written, place)
        stamp = self.files.get_file_info(place).mtime_ns
        os.utime(path, ns=(stamp, stamp))

    def _in_order(self, transfer: Callable[[Path, Any], None], files: list[tuple[Path, Any]]) -> None:
        """Carry out transfers, several at a time; what says that the others are whole comes when they are."""
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for last in (False, True):
                wanted = [pair for pair in files if (pair[0].name in LAST) == last]
                with _plain_errors():
                    list(pool.map(lambda pair: transfer(*pair), wanted))

    def _is_shared(self, path: Path) -> bool:
        return not any(part.endswith(PRIVATE) for part in path.relative_to(self.home).parts)

    def _here(self, there: str) -> Path:
        """UserError for an object whose name leads out of the home."""
        name = there.removeprefix(f"{self.root}/")
        try:
            inside(self.home, name)
        except ValueError as error:
            raise UserError(f"{STORAGE}: {error}; delete that object") from None
        return self.home / name

    def _there(self, path: Path) -> str:
        return f"{self.root}/{path.relative_to(self.home).as_posix()}"


def fetch(*places: Path, names: Iterable[str] = ()) -> None:
    """`Storage.fetch` of each place, where there is a storage; places outside the home are each machine's own."""
    for storage, place in _shared(places):
        storage.fetch(place, names)


def keep(*places: Path, mirror: bool = False) -> None:
    """`Storage.keep` of each place, where there is a storage."""
    for storage, place in _shared(places):
        storage.keep(place, mirror=mirror)


def drop(place: Path) -> None:
    """`Storage.drop`, where there is a storage."""
    for storage, shared in _shared([place]):
        storage.drop(shared)


def for_ray(folder: Path) -> dict[str, Any]:
    """Where Ray's Tune and Train keep their own state, as the arguments of their RunConfig."""
    storage = opened()
    if storage is None:
        return {"storage_path": str(folder)}
    place = f"{storage.root}/{folder.relative_to(storage.home).as_posix()}"
    return {"storage_path": place, "storage_filesystem": storage.files}


def opened() -> Storage | None:
    """The storage that RAYDISTILL_STORAGE names; None without it."""
    address = os.environ.get(STORAGE)
    return _open(address, home()) if address else None


@lru_cache(maxsize=4)
def _open(address: str, here: Path) -> Storage:
    """UserError for an address that holds a secret, or that pyarrow cannot read."""
    if list(places_of_credentials(address)):
        raise UserError(f"{STORAGE} holds a password; give it by the environment, such as AWS_SECRET_ACCESS_KEY")
    from pyarrow.fs import FileSystem, FileType

    try:
        files, root = FileSystem.from_uri(address)
        found = files.get_file_info(root)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(
            f"{STORAGE}={hidden(address)}: cannot be read: {hidden(str(error))[:300]}. Expected an address such as "
            f"s3://BUCKET/FOLDER?region=eu-central-1 or file:///mnt/FOLDER"
        ) from None
    if found.type == FileType.File:
        raise UserError(f"{STORAGE}={hidden(address)}: is a file; give a folder")
    return Storage(files, root.rstrip("/"), here)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """A block in which an error of the storage or of a disk is a PassingError."""
    try:
        yield
    except OSError as error:
        raise PassingError(
            f"{STORAGE}: {hidden(str(error))[:300]}. Nothing is lost: run the same command again"
        ) from None


def _shared(places: Iterable[Path]) -> list[tuple[Storage, Path]]:
    storage = opened()
    if storage is None:
        return []
    found = [place.absolute() for place in places]
    return [(storage, place) for place in found if place.is_relative_to(storage.home)]


def _is_same(path: Path, there: Any) -> bool:
    try:
        here = path.stat()
    except FileNotFoundError:
        return True
    return there is not None and (here.st_size, here.st_mtime_ns) == (there.size, there.mtime_ns)


def _is_news(path: Path, there: Any) -> bool:
    """Whether the storage's file is another than the one here, and not an older one."""
    return not path.is_file() or (not _is_same(path, there) and there.mtime_ns >= path.stat().st_mtime_ns)


def _is_old(path: Path, there: Any) -> bool:
    """Whether the storage has a file that another machine kept after the one here was fetched or kept."""
    # By when it came to be here, not by the time that it carries, which copying and unpacking keep.
    return there is not None and path.is_file() and there.mtime_ns > path.stat().st_ctime_ns + CLOCKS_NS
