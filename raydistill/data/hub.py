"""Rows of data sets on the Hugging Face hub or in its local cache. Code from the hub is never run."""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from raydistill.core.console import print_progress
from raydistill.core.errors import UserError


def hub_rows(
    repo_id: str, config: str | None, split: str, revision: str | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(row, record)` of one split, rows counted from 1.

    Raises:
        UserError: The data set, configuration or split does not exist, or the hub is unreachable and the data set is
            not in the cache.
    """
    with _as_user_errors(repo_id, config), _offline_when_unreachable():
        from datasets import load_dataset

        rows = load_dataset(repo_id, config, split=split, revision=revision)
    yield from enumerate(rows, 1)


def hub_splits(repo_id: str, config: str | None, revision: str | None) -> list[str]:
    """Names of the splits in the order of the hub; UserError as in `hub_rows`."""
    with _as_user_errors(repo_id, config), _offline_when_unreachable():
        from datasets import load_dataset_builder

        splits = load_dataset_builder(repo_id, config, revision=revision).info.splits
    # The card of a data set need not list its splits; the usual names are assumed then.
    return list(splits) if splits else ["train", "validation", "test"]


@contextlib.contextmanager
def _as_user_errors(repo_id: str, config: str | None) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"{repo_id}: reading from the hub needs `datasets` ({error}): pip install datasets") from None
    except ConnectionError:
        raise UserError(
            f"{repo_id}: the Hugging Face hub cannot be reached and the data set is not in the cache "
            f"({_cache_dir()}). Check the name and the network "
            f"(HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')}), "
            "copy the data set into the cache, or use a file or folder as the data set"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        name = f"{repo_id} ({config})" if config else repo_id
        raise UserError(
            f"{name}: cannot be loaded from the Hugging Face hub: {error}. Check the name, `dataset.config` and "
            "the split; set HF_TOKEN for a private or gated data set"
        ) from None


@contextlib.contextmanager
def _offline_when_unreachable() -> Iterator[None]:
    """Use only the cache if the hub is unreachable; without this, `datasets` first tries the hub for 23 s."""
    from datasets import config
    from datasets.utils import logging

    was_offline, verbosity = config.HF_HUB_OFFLINE, logging.get_verbosity()
    if not was_offline and not _is_reachable(config.HF_ENDPOINT):
        print_progress(f"{config.HF_ENDPOINT} is unreachable; using the local cache only")
        config.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()  # in offline mode, every call warns twice that it reads the cache
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = was_offline
        logging.set_verbosity(verbosity)


def _is_reachable(endpoint: str) -> bool:
    proxies = ("https_proxy", "http_proxy", "all_proxy")
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in proxies):
        return True  # only the proxy knows whether the hub is reachable
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "huggingface.co", port), timeout=5).close()
    except OSError:
        return False
    return True


def _cache_dir() -> str:
    from datasets import config

    return str(config.HF_DATASETS_CACHE)
