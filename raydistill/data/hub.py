"""Rows of a data set on the Hugging Face hub, or of its copy in the cache. Code from the hub is never run."""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from raydistill.core.console import progress
from raydistill.core.errors import UserError


def hub_rows(hub: str, config: str | None, split: str, revision: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(row, record)` of one split, counted from 1; UserError if it is not there or the hub out of reach."""
    with _plain_errors(hub, config), _offline_when_unreachable():
        from datasets import load_dataset

        rows = load_dataset(hub, config, split=split, revision=revision)
    yield from enumerate(rows, 1)


def hub_splits(hub: str, config: str | None, revision: str | None) -> list[str]:
    """Names of the splits, in the hub's order; UserError as in `hub_rows`."""
    with _plain_errors(hub, config), _offline_when_unreachable():
        from datasets import load_dataset_builder

        splits = load_dataset_builder(hub, config, revision=revision).info.splits
    # The card of a data set need not list its splits; then these are tried.
    return list(splits) if splits else ["train", "validation", "test"]


@contextlib.contextmanager
def _plain_errors(hub: str, config: str | None) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"{hub}: reading from the hub needs `datasets` ({error}): pip install datasets") from None
    except ConnectionError:
        raise UserError(
            f"{hub}: the Hugging Face hub cannot be reached and the data set is not in the cache "
            f"({_cache()}). Check the name and the network (HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')}), "
            "copy a filled cache there, or give a file or folder as the data set"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        named = f"{hub} ({config})" if config else hub
        raise UserError(
            f"{named}: cannot be loaded from the Hugging Face hub: {error}. Check the name, `dataset.config` and "
            "the split; for a private or gated data set set HF_TOKEN"
        ) from None


@contextlib.contextmanager
def _offline_when_unreachable() -> Iterator[None]:
    """Without a way to the hub, ask the cache only: `datasets` alone would try for 23 s before it does."""
    from datasets import config
    from datasets.utils import logging

    before, verbosity = config.HF_HUB_OFFLINE, logging.get_verbosity()
    if not before and not _reachable(config.HF_ENDPOINT):
        progress(f"{config.HF_ENDPOINT} cannot be reached: looking in the cache only")
        config.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()  # offline, every call would warn twice that it reads the cache
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
        logging.set_verbosity(verbosity)


def _reachable(endpoint: str) -> bool:
    proxies = ("https_proxy", "http_proxy", "all_proxy")
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in proxies):
        return True  # only the proxy knows
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "huggingface.co", port), timeout=5).close()
    except OSError:
        return False
    return True


def _cache() -> str:
    from datasets import config

    return str(config.HF_DATASETS_CACHE)
