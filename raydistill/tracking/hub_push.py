"""Uploads an export to the Hugging Face hub: weights, converted model and model card, in one commit."""

import json
import os
import re
from pathlib import Path
from typing import Any, cast

from raydistill.core import artifact
from raydistill.core.artifact import MANIFEST
from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import check_symlinks
from raydistill.data.card import public_name
from raydistill.models.metadata import METADATA_FILE, CheckpointMetadata
from raydistill.tracking.export import KIND
from raydistill.tracking.model_card import card_of_repository

TOKEN_VARIABLE = "HF_TOKEN"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def push_export(export: Path, repository: str, *, private: bool = False) -> str:
    """Upload an export to a model repository of the hub, which is created if it does not exist.

    Local paths in the metadata are replaced by names. The token is read from the environment variable HF_TOKEN only,
    and the address of the hub from HF_ENDPOINT, if that is set.

    Args:
        export: A folder below `exports/` of a sweep.
        repository: The repository, as "owner/name".
        private: Whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        UserError: The folder is no complete export, the name is not valid, there is no token, or the hub refuses.
        TransientError: The hub cannot be reached, or fails.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"{repository}: expected owner/name")
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise UserError(f"{TOKEN_VARIABLE} is not set: create a token with the role write on the hub, and export it")
    files = _files_to_push(export, repository)
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    # The error of the HTTP library, which differs between versions of huggingface_hub
    connection_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Upload a student distilled by raydistill")
    except HfHubHTTPError as error:
        kind = TransientError if error.response.status_code in (429, *range(500, 600)) else UserError
        raise kind(f"{repository}: the hub refuses: {error}") from None
    except (connection_error, OSError) as error:
        raise TransientError(f"{repository}: the hub cannot be reached: {error}") from None
    return str(commit.commit_url)


def _files_to_push(export: Path, repository: str) -> dict[str, Path | bytes]:
    """The files of an export by name, with the card and the metadata as they are published."""
    if artifact.open_if_whole(export, artifact.Manifest, KIND) is None:
        raise UserError(f"{export}: not a complete export; give a folder below outputs/sweeps/NAME/exports")
    check_symlinks(export)
    paths = sorted(path for path in export.rglob("*") if path.is_file() and path.name != MANIFEST)
    files: dict[str, Path | bytes] = {path.relative_to(export).as_posix(): path for path in paths}
    card = (export / "README.md").read_text(encoding="utf-8")
    files["README.md"] = card_of_repository(card, repository).encode()
    metadata = _without_paths(CheckpointMetadata.read_from(export).to_json())
    files[METADATA_FILE] = json.dumps(metadata, indent=1).encode()
    return files


def _without_paths(value: Any) -> Any:
    """Nested data in which every absolute path is replaced by a name; labels are names and paths joined by "+"."""
    if isinstance(value, str):
        return "+".join(public_name(part) if part.startswith("/") else part for part in value.split("+"))
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value
