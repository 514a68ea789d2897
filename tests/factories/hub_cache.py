"""Writes the cache of `datasets` as if a data set had been loaded from the hub, for tests without a network."""

import json
import re
from pathlib import Path
from typing import Any


def lay_out_dataset(
    cache_home: Path,
    hub: str,
    config: str | None,
    splits: dict[str, list[dict[str, Any]]],
    revision: str | None = None,
) -> Path:
    """Write rows so that `datasets.load_dataset(hub, config, split=...)` finds them without a network.

    The reading process needs `HF_DATASETS_CACHE=cache_home` and `HF_HUB_OFFLINE=1`. Returns the written folder,
    `cache_home/OWNER___NAME/CONFIG/0.0.0/HASH`, with one Arrow file per split and `dataset_info.json`, as written by
    `datasets` 5. Offline, `datasets` reads the newest folder whatever the revision; `revision` only changes the hash.
    """
    from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
    from datasets.arrow_writer import ArrowWriter

    owner, name = hub.split("/")
    snake = re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name).lower()
    config = config or "default"
    digest = f"{abs(hash_of(hub, config, revision)):040x}"
    folder = cache_home / f"{owner}___{snake}" / config / "0.0.0" / digest
    folder.mkdir(parents=True)
    split_infos = SplitDict(dataset_name=snake)
    features = None
    for split, rows in splits.items():
        features = features or Dataset.from_list(rows).features
        with ArrowWriter(path=str(folder / f"{snake}-{split}.arrow"), features=features) as writer:
            for row in rows:
                writer.write(row)
            count, size = writer.finalize()
        split_infos.add(SplitInfo(name=split, num_bytes=size, num_examples=count, dataset_name=snake))
    info = DatasetInfo(
        features=features,
        builder_name="parquet",
        dataset_name=snake,
        config_name=config,
        version="0.0.0",
        splits=split_infos,
    )
    info.write_to_directory(str(folder))
    assert json.loads((folder / "dataset_info.json").read_text())["config_name"] == config
    return folder


def hash_of(*parts: str | None) -> int:
    """Return a hash that is equal in every process, unlike `hash`."""
    import hashlib

    return int(hashlib.sha1("/".join(part or "" for part in parts).encode()).hexdigest(), 16)
