"""What is known of a data set for a model card: its name on the hub, its languages and its licence."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raydistill.config.presets import DATASETS
from raydistill.config.run import Dataset


@dataclass(frozen=True)
class DataCard:
    """A data set as the hub's metadata describe it.

    Attributes:
        name: Name for readers, without a local path.
        hub: Name on the hub; None for files and the demo.
        languages: ISO 639-1 codes of source and target, without repetition; empty if unknown.
        licence: The hub's identifier of the licence; None if unknown.
    """

    name: str
    hub: str | None
    languages: list[str]
    licence: str | None


def describe_data(dataset: Dataset) -> DataCard:
    """The data card of a data set.

    Named data sets are described by their preset. A folder may have a README.md with the hub's metadata, of which
    `language` and `license` are read. Languages of the run (`dataset.languages`) come before the languages of the data.
    """
    preset, path = DATASETS.get(dataset.name), Path(dataset.name)
    metadata = _read_metadata(path / "README.md") if preset is None and path.is_dir() else {}
    pair = dataset.languages or (preset.languages if preset else None)
    if pair:
        languages = [language.split("_")[0] for language in pair]
    elif preset and preset.text_language:
        languages = [preset.text_language]
    else:
        known = metadata.get("language", [])
        languages = [str(language) for language in (known if isinstance(known, list) else [known])]
    licence = preset.licence if preset else metadata.get("license")
    hub = preset.hub if preset else None if path.exists() or "/" not in dataset.name else dataset.name
    return DataCard(
        name=public_name(dataset.name),
        hub=hub if hub and "/" in hub else None,
        languages=list(dict.fromkeys(languages)),
        licence=licence if isinstance(licence, str) else None,
    )


def public_name(name: str) -> str:
    """A name without local folders: the last part of a path, or the part before a checkpoint's folder `best`."""
    path = Path(name)
    if not path.is_absolute() and not path.exists():
        return name
    return path.parent.name if path.name == "best" else path.name


def _read_metadata(path: Path) -> dict[str, Any]:
    """The YAML block at the start of a README; empty if there is none, or if it cannot be read."""
    try:
        match = re.match(r"---\r?\n(.*?)\r?\n---", path.read_text(encoding="utf-8-sig"), re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else {}
    except (OSError, ValueError, yaml.YAMLError):  # a README is for readers, and no reason for an error
        return {}
    return metadata if isinstance(metadata, dict) else {}
