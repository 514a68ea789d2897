"""`raydistill cache`: which stores of the teacher's states are on disk, and removing those that nobody needs."""

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
    """The teacher cache (`outputs/cache`): what sweeps made of their teachers, for all their trials.

    Anything in it may be removed at any time: what is wanted again is made again. With --json each of these ends with
    one JSON object on stdout.

    Examples:

        raydistill cache list

        raydistill cache remove encoder-3f2a

        raydistill cache remove --unused-days 30
    """


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """The stores, last used last, with their size and what they are of."""
    found = list(store.list_stores(raydistill_home() / "cache"))
    rows = [
        [
            kept.folder.name,
            f"{kept.bytes / 1e9:.3f}",
            f"{_days_unused(kept):.1f}",
            str(kept.metadata.get("teacher")),
            str(kept.metadata.get("data")),
            f"{kept.metadata['kept']}, {', '.join(kept.arrays) or 'not finished'}",
        ]
        for kept in found
    ]
    print_text(format_table(["store", "GB", "days unused", "teacher", "data", "holds"], rows), as_json)
    print_text(f"{sum(kept.bytes for kept in found) / 1e9:.3f} GB under {raydistill_home() / 'cache'}", as_json)
    print_json({"stores": [_store_record(kept) for kept in found]}, as_json)


@app.command()
def remove(
    names: Annotated[list[str] | None, typer.Argument(help="stores by name, or the names' beginnings")] = None,
    unused_days: Annotated[float | None, typer.Option(min=0, help="all that no run has opened for so long")] = None,
    as_json: JsonOption = False,
) -> None:
    """Delete stores: those named, or those unused for so many days. Not while a run reads one: it would stop."""
    if not names and unused_days is None:
        raise UserError("say which: names of stores (`raydistill cache list` shows them), or --unused-days")
    found = list(store.list_stores(raydistill_home() / "cache"))
    chosen = {kept.folder: kept for name in names or [] for kept in _match_store(name, found)}
    if unused_days is not None:
        chosen |= {kept.folder: kept for kept in found if _days_unused(kept) >= unused_days}
    for kept in chosen.values():
        store.remove(kept)
        print_text(f"removed {kept.folder.name}: {kept.bytes / 1e9:.3f} GB", as_json)
    if not chosen:
        print_text("nothing to remove", as_json)
    print_json({"removed": [_store_record(kept) for kept in chosen.values()]}, as_json)


def _match_store(name: str, stores: list[store.StoreInfo]) -> list[store.StoreInfo]:
    """The one store of a name or a name's beginning."""
    matching = [kept for kept in stores if kept.folder.name.startswith(name)]
    if len(matching) != 1:
        names = ", ".join(kept.folder.name for kept in matching or stores) or "none"
        wrong = "is the beginning of several" if matching else "no store is named so; there are"
        raise UserError(f"{name}: {wrong}: {names}")
    return matching


def _days_unused(info: store.StoreInfo) -> float:
    return (time.time() - info.last_used) / DAY_S


def _store_record(info: store.StoreInfo) -> dict[str, Any]:
    facts = {"name": info.folder.name, "bytes": info.bytes, "days_unused": _days_unused(info), "arrays": info.arrays}
    return {**facts, **info.metadata}


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.cache import main as entry

    entry()
