"""`raydistill cache`: list and remove the stores of the teacher cache."""

import time
from typing import Annotated, Any

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import format_table, print_json, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.teacher_cache import store

app = make_app()
JsonOption = Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")]
DAY_S = 86_400


@app.callback()
def cache() -> None:
    """The teacher cache (`outputs/cache`): states of teachers that all trials of a sweep read.

    Any store may be removed at any time while no run reads from it; a run that needs the store builds it again. With
    `--json` each command ends with one JSON object on stdout.

    Examples:

        raydistill cache list

        raydistill cache remove encoder-3f2a

        raydistill cache remove --unused-days 30
    """


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the stores, least recently used first, with size, teacher, data and arrays."""
    root = raydistill_home() / "cache"
    stores = list(store.list_stores(root))
    rows = [
        [
            info.folder.name,
            _format_gb(info.size_bytes),
            f"{_days_unused(info):.1f}",
            info.record.teacher,
            info.record.data,
            f"{info.record.storage_dtype}, {', '.join(info.arrays) or 'not finished'}",
        ]
        for info in stores
    ]
    print_text(format_table(["store", "GB", "days unused", "teacher", "data", "holds"], rows), as_json)
    print_text(f"{_format_gb(sum(info.size_bytes for info in stores))} GB under {root}", as_json)
    print_json({"stores": [_store_record(info) for info in stores]}, as_json)


@app.command()
def remove(
    names: Annotated[list[str] | None, typer.Argument(help="stores by name, or by the beginning of a name")] = None,
    unused_days: Annotated[
        float | None, typer.Option(min=0, help="all stores that no run has opened for this many days")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Delete stores by name or by days since the last use. A run that reads a deleted store fails."""
    if not names and unused_days is None:
        raise UserError("name the stores to remove (`raydistill cache list` shows them), or give --unused-days")
    stores = list(store.list_stores(raydistill_home() / "cache"))
    selected = {info.folder: info for info in (_match_store(name, stores) for name in names or [])}
    if unused_days is not None:
        selected |= {info.folder: info for info in stores if _days_unused(info) >= unused_days}
    for info in selected.values():
        store.remove(info)
        print_text(f"removed {info.folder.name}: {_format_gb(info.size_bytes)} GB", as_json)
    if not selected:
        print_text("nothing to remove", as_json)
    print_json({"removed": [_store_record(info) for info in selected.values()]}, as_json)


def _match_store(name: str, stores: list[store.StoreInfo]) -> store.StoreInfo:
    """The store with this name or beginning of a name; UserError if none or several match."""
    matching = [info for info in stores if info.folder.name.startswith(name)]
    if len(matching) != 1:
        reason = "several stores match" if matching else "no such store; available"
        names = ", ".join(info.folder.name for info in matching or stores) or "none"
        raise UserError(f"{name}: {reason}: {names}")
    return matching[0]


def _format_gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f}"


def _days_unused(info: store.StoreInfo) -> float:
    return (time.time() - info.last_used) / DAY_S


def _store_record(info: store.StoreInfo) -> dict[str, Any]:
    """A store as JSON."""
    figures = {"bytes": info.size_bytes, "days_unused": _days_unused(info), "arrays": info.arrays}
    return {"name": info.folder.name, **figures, **info.record.model_dump()}


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.cache import main as entry

    entry()
