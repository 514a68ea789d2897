"""The layout of a teacher cache: which arrays some runs read, where they are on disk, and what is missing.

Encoder states are one array per set of sources. Decoder states are one array per layer and label set, so that missing
layers can be added later. All arrays are divided into the same parts of sources.
"""

import math
import shutil
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from raydistill.core import artifact
from raydistill.core.console import print_progress
from raydistill.core.errors import TransientError, UserError
from raydistill.core.hashing import content_hash
from raydistill.data.batching import Examples
from raydistill.teacher_cache import store
from raydistill.teacher_cache.storage_dtypes import vector_bytes

ENCODER_ARRAY = "states"
MAX_DISK_FRACTION = 0.9


@dataclass(frozen=True)
class CacheDtypes:
    """The data types in which states are stored and computed. Part of the key of a store."""

    storage: store.StorageDtype = "bf16"
    compute: store.ComputeDtype = "fp32"


@dataclass(frozen=True)
class CacheLayout:
    """The arrays of a teacher cache under `root`.

    Args:
        root: The folder of all stores.
        teacher_key: The content key of the teacher.
        source_examples: Examples that hold the sources.
        width: The size of a state vector.
        encoder: Whether encoder states are part of the cache.
        label_sets: Per label set, its examples and the decoder layers whose states are part of the cache.
        dtypes: The data types of the states.
        names: Teacher and data set, as `raydistill cache list` shows them.
        max_bytes: The maximum size of all arrays together, None for no limit.
    """

    root: Path
    teacher_key: str
    source_examples: Examples
    width: int
    encoder: bool = True
    label_sets: list[tuple[Examples, list[int]]] = field(default_factory=list)
    dtypes: CacheDtypes = CacheDtypes()
    names: tuple[str, str] = ("", "")
    max_bytes: float | None = None

    @property
    def sources(self) -> list[list[int]]:
        """The token ids of each source."""
        return self.source_examples.sources

    @cached_property
    def parts(self) -> list[list[int]]:
        """The source rows of each part."""
        return store.plan_parts([len(source) for source in self.sources])

    @cached_property
    def encoder_store(self) -> Path:
        """The folder of the encoder states; its name is also the lock group of all stores of the layout."""
        layout = (store.FORMAT_VERSION, store.PART_TOKENS, store.WINDOW_ROWS)
        key = content_hash([layout, self.teacher_key, self.source_examples.sources_key, asdict(self.dtypes)])
        return self.root / f"encoder-{key}"

    @cached_property
    def decoder_stores(self) -> list[Path]:
        """The folders of the decoder states, one per label set."""
        keys = [content_hash([self.encoder_store.name, e.targets_key]) for e, _ in self.label_sets]
        return [self.root / f"decoder-{key}" for key in keys]

    @property
    def stores(self) -> list[Path]:
        """The folders of all stores that have arrays."""
        return sorted({array.parent for array in self.array_sizes})

    @property
    def encoder_array(self) -> Path:
        """The folder of the array of encoder states."""
        return self.encoder_store / ENCODER_ARRAY

    @cached_property
    def array_sizes(self) -> dict[Path, int]:
        """The bytes of every array, by its folder."""
        bytes_per_token = vector_bytes(self.dtypes.storage, self.width)
        sizes = {self.encoder_array: bytes_per_token * sum(map(len, self.sources))} if self.encoder else {}
        for folder, (examples, layers) in zip(self.decoder_stores, self.label_sets, strict=True):
            size = bytes_per_token * sum(map(len, examples.targets))
            sizes |= {folder / layer_array_name(layer): size for layer in layers}
        return sizes

    @cached_property
    def examples_by_source(self) -> list[list[list[int]]]:
        """By label set and source row: the numbers of the examples of that source."""
        by_label_set: list[list[list[int]]] = []
        for examples, _ in self.label_sets:
            by_row: list[list[int]] = [[] for _ in self.sources]
            for i, row in enumerate(examples.source_indices):
                by_row[row].append(i)
            by_label_set.append(by_row)
        return by_label_set

    def examples_in_part(self, number: int, folder: Path) -> list[int]:
        """The examples of a part of a decoder store, in storage order."""
        by_row = self.examples_by_source[self.decoder_stores.index(folder)]
        return [i for row in self.parts[number] for i in by_row[row]]

    def missing_parts(self) -> list[int]:
        """The numbers of the parts that at least one array lacks."""
        return sorted({n for array in self.array_sizes for n in store.missing_parts(array, len(self.parts))})

    def missing_bytes(self) -> int:
        """Bytes to be written: the size of the incomplete arrays without their finished parts."""
        return sum(
            size - store.parts_size_bytes(array)
            for array, size in self.array_sizes.items()
            if not artifact.is_complete(array)
        )

    def is_incomplete(self) -> bool:
        """Whether an array is incomplete."""
        return any(not artifact.is_complete(array) for array in self.array_sizes)

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the process that builds the stores of this layout; waits until no other process holds it."""
        return artifact.lock(self.encoder_store, math.inf, print_progress)

    def prepare(self) -> None:
        """Create the folders and records of the stores.

        Raises:
            UserError: The arrays are larger than `max_bytes` or than the free disk space.
        """
        total_bytes = sum(self.array_sizes.values())
        if self.max_bytes is not None and total_bytes > self.max_bytes:
            raise UserError(
                f"{self.root}: the teacher cache takes {total_bytes / 1e9:.3g} GB, more than training.cache_gb allows "
                f"({self.max_bytes / 1e9:.3g}); raise training.cache_gb, or set training.teacher_cache to auto or off"
            )
        check_disk_space(self.root, self.missing_bytes())
        record = self._make_record()
        for folder in self.stores:
            record.write(folder / store.ABOUT_FILE)
            store.remove_partial_files(folder)

    def _make_record(self) -> store.StoreRecord:
        teacher, data = self.names
        return store.StoreRecord(
            teacher=teacher,
            data=data,
            teacher_key=self.teacher_key,
            storage_dtype=self.dtypes.storage,
            compute_dtype=self.dtypes.compute,
            width=self.width,
            lock_group=self.encoder_store.name,
        )

    def finish(self) -> None:
        """Mark all arrays as complete.

        Raises:
            TransientError: Parts were removed during the build.
        """
        for array, size in self.array_sizes.items():
            if not artifact.is_complete(array):
                if store.missing_parts(array, len(self.parts)):
                    raise TransientError(f"{array.parent}: was removed during the build; run the same command again")
                store.finish_array(array, len(self.parts), size)

    @property
    def device_seconds(self) -> dict[str, float]:
        """The device-seconds of each complete array by store and array ("encoder-KEY/states")."""
        complete = (array for array in self.array_sizes if artifact.is_complete(array))
        return {f"{array.parent.name}/{array.name}": store.read_device_seconds(array) for array in complete}


def layer_array_name(layer: int) -> str:
    """The name of the array with the output of a decoder layer."""
    return f"layer-{layer:02d}"


def check_disk_space(root: Path, needed_bytes: int) -> None:
    """Raise a UserError if `needed_bytes` exceed the free disk space."""
    free_bytes = shutil.disk_usage(root).free
    if needed_bytes > free_bytes * MAX_DISK_FRACTION:
        raise UserError(
            f"{root}: the teacher cache needs {needed_bytes / 1e9:.1f} GB and {free_bytes / 1e9:.1f} GB are free. Free "
            f"disk space (`raydistill cache` lists stores), set RAYDISTILL_HOME to a larger disk, or set "
            f"training.teacher_cache to auto or off"
        )
