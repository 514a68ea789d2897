"""`raydistill cache`: which stores of the teacher's states are on disk, and removing those that nobody needs."""

import time
from typing import Annotated, Any

import typer

from raydistill.core.console import finish, home, make_app, run_app, show, table
from raydistill.core.errors import UserError
from raydistill.teacher_cache import store

app = make_app()
Json = Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")]
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
def list_(as_json: Json = False) -> None:
    """The stores, last used last, with their size and what they are of."""
    found = list(store.kept(home() / "cache"))
    rows = [
        [
            kept.folder.name,
            f"{kept.bytes / 1e9:.3f}",
            f"{_days(kept):.1f}",
            str(kept.about.get("teacher")),
            str(kept.about.get("data")),
            f"{kept.about['kept']}, {', '.join(kept.arrays) or 'not finished'}",
        ]
        for kept in found
    ]
    show(table(["store", "GB", "days unused", "teacher", "data", "holds"], rows), as_json)
    show(f"{sum(kept.bytes for kept in found) / 1e9:.3f} GB under {home() / 'cache'}", as_json)
    finish({"stores": [_facts(kept) for kept in found]}, as_json)


@app.command()
def remove(
    names: Annotated[list[str] | None, typer.Argument(help="stores by name, or the names' beginnings")] = None,
    unused_days: Annotated[float | None, typer.Option(min=0, help="all that no run has opened for so long")] = None,
    as_json: Json = False,
) -> None:
    """Delete stores: those named, or those unused for so many days. Not while a run reads one: it would stop."""
    if not names and unused_days is None:
        raise UserError("say which: names of stores (`raydistill cache list` shows them), or --unused-days")
    found = list(store.kept(home() / "cache"))
    chosen = {kept.folder: kept for name in names or [] for kept in _named(name, found)}
    if unused_days is not None:
        chosen |= {kept.folder: kept for kept in found if _days(kept) >= unused_days}
    for kept in chosen.values():
        store.remove(kept)
        show(f"removed {kept.folder.name}: {kept.bytes / 1e9:.3f} GB", as_json)
    if not chosen:
        show("nothing to remove", as_json)
    finish({"removed": [_facts(kept) for kept in chosen.values()]}, as_json)


def _named(name: str, found: list[store.Kept]) -> list[store.Kept]:
    """The one store of a name or a name's beginning."""
    matching = [kept for kept in found if kept.folder.name.startswith(name)]
    if len(matching) != 1:
        names = ", ".join(kept.folder.name for kept in matching or found) or "none"
        wrong = "is the beginning of several" if matching else "no store is named so; there are"
        raise UserError(f"{name}: {wrong}: {names}")
    return matching


def _days(kept: store.Kept) -> float:
    return (time.time() - kept.used) / DAY_S


def _facts(kept: store.Kept) -> dict[str, Any]:
    facts = {"name": kept.folder.name, "bytes": kept.bytes, "days_unused": _days(kept), "arrays": kept.arrays}
    return {**facts, **kept.about}


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.cache import main as entry

    entry()
