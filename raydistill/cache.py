"""`raydistill cache`: list and remove the stores of the teacher cache and the converted checkpoints."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer

from raydistill._app import make_app, run_app
from raydistill.core import artifact
from raydistill.core.artifact import LockHeld
from raydistill.core.console import format_table, print_json, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.models import conversions
from raydistill.teacher_cache import store

app = make_app()
JsonOption = Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")]
DAY_S = 86_400


@dataclass(frozen=True)
class CacheEntry:
    """A store or a conversion: a row of `raydistill cache list`, its JSON, and the function that deletes it.

    `name` is the path below the cache folder. `description` says what the entry is, and `checkpoint` of what.
    """

    name: str
    description: str
    checkpoint: str
    data: str
    size_bytes: int
    last_used: float
    fields: dict[str, Any]
    remove: Callable[[], None]

    @property
    def days_unused(self) -> float:
        """Days since the last use."""
        return (time.time() - self.last_used) / DAY_S

    def to_json(self) -> dict[str, Any]:
        """The entry as JSON."""
        return {"name": self.name, "bytes": self.size_bytes, "days_unused": self.days_unused, **self.fields}


@app.callback()
def cache() -> None:
    """The cache (`outputs/cache`): states of teachers that all trials of a sweep read, and converted checkpoints.

    The teacher states are stored in `encoder-KEY` and `decoder-KEY`, checkpoints that were converted for CTranslate2 in
    `ctranslate2/KEY`, and pickled checkpoints that were converted to safetensors in `safetensors/KEY`. A sweep that was
    killed while its students were served leaves `serving-SWEEP/KEY`. Any of them may be removed at any time while no
    run reads from it; a run that needs it builds it again. With `--json` each command ends with one JSON object on
    stdout.

    Examples:

        raydistill cache list

        raydistill cache remove encoder-3f2a ctranslate2/91

        raydistill cache remove --unused-days 30
    """


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List stores and conversions, least recently used first, with size, checkpoint, data and content."""
    stores, converted = _list_stores(), _list_conversions()
    rows = [
        [
            entry.name,
            _format_gb(entry.size_bytes),
            f"{entry.days_unused:.1f}",
            entry.checkpoint,
            entry.data,
            entry.description,
        ]
        for entry in _sort_by_use([*stores, *converted])
    ]
    print_text(format_table(["name", "GB", "days unused", "checkpoint", "data", "holds"], rows), as_json)
    size_bytes = sum(entry.size_bytes for entry in [*stores, *converted])
    print_text(f"{_format_gb(size_bytes)} GB under {raydistill_home() / 'cache'}", as_json)
    listed = {"stores": stores, "conversions": converted}
    print_json({key: [entry.to_json() for entry in entries] for key, entries in listed.items()}, as_json)


@app.command()
def remove(
    names: Annotated[
        list[str] | None, typer.Argument(help="stores and conversions by name, or by the beginning of a name")
    ] = None,
    unused_days: Annotated[
        float | None, typer.Option(min=0, help="all stores and conversions that no run has opened for this many days")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Delete stores and conversions by name or by days since the last use, and folders that killed commands left.

    A run that reads a deleted store or conversion fails.
    """
    if not names and unused_days is None:
        raise UserError("name what to remove (`raydistill cache list` shows the names), or give --unused-days")
    entries = _sort_by_use([*_list_stores(), *_list_conversions()])
    selected = {entry.name: entry for entry in (_match_entry(name, entries) for name in names or [])}
    if unused_days is not None:
        selected |= {entry.name: entry for entry in entries if entry.days_unused >= unused_days}
    for entry in selected.values():
        entry.remove()
        print_text(f"removed {entry.name}: {_format_gb(entry.size_bytes)} GB", as_json)
    _remove_leftovers()
    if not selected:
        print_text("nothing to remove", as_json)
    print_json({"removed": [entry.to_json() for entry in selected.values()]}, as_json)


def _remove_leftovers() -> None:
    """Delete the temporary folders of killed commands; a lock protects the folders of running commands."""
    home = raydistill_home()
    artifact_folders = (
        home / "cache",
        *conversions.conversion_folders(),
        home / "labels",
        home / "shortlists",
        home / "extra",
    )
    for parent in (*artifact_folders, *home.glob("sweeps/*/exports/")):
        for folder in artifact.artifacts_with_leftovers(parent):
            with suppress(LockHeld), artifact.lock(folder):
                artifact.remove_leftovers(folder)


def _list_stores() -> list[CacheEntry]:
    return [
        CacheEntry(
            name=info.folder.name,
            description=f"{info.record.storage_dtype}, {', '.join(info.arrays) or 'not finished'}",
            checkpoint=info.record.teacher,
            data=info.record.data,
            size_bytes=info.size_bytes,
            last_used=info.last_used,
            fields={"arrays": info.arrays, **info.record.model_dump()},
            remove=partial(store.remove, info),
        )
        for info in store.list_stores(raydistill_home() / "cache")
    ]


def _list_conversions() -> list[CacheEntry]:
    return [
        CacheEntry(
            name=f"{info.folder.parent.name}/{info.folder.name}",
            description=info.kind if info.checkpoint else f"{info.kind}, damaged",
            checkpoint=info.checkpoint or "",
            data="",
            size_bytes=info.size_bytes,
            last_used=info.last_used,
            fields={"kind": info.kind, "checkpoint": info.checkpoint},
            remove=partial(conversions.remove, info),
        )
        for info in conversions.list_conversions()
    ]


def _sort_by_use(entries: list[CacheEntry]) -> list[CacheEntry]:
    return sorted(entries, key=lambda entry: entry.last_used)


def _match_entry(name: str, entries: list[CacheEntry]) -> CacheEntry:
    """The entry with this name or beginning of a name; UserError if none or several match."""
    matching = [entry for entry in entries if entry.name.startswith(name)]
    if len(matching) != 1:
        reason = "several names match" if matching else "no such store or conversion; available"
        names = ", ".join(entry.name for entry in matching or entries) or "none"
        raise UserError(f"{name}: {reason}: {names}")
    return matching[0]


def _format_gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f}"


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.cache import main as entry

    entry()
