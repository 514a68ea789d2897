"""A process that writes an artifact or a stored folder and can pause in the middle, for tests of two hosts.

    python -m tests.factories.writers build FOLDER TEXT SIGNALS STAGE    an artifact; STAGE is the step to pause at
    python -m tests.factories.writers save FOLDER TEXT SIGNALS STAGE     a folder in the storage of RAYDISTILL_STORAGE

STAGE is "none" or a name of `PAUSES`. A process that pauses creates SIGNALS/STAGE.paused and waits until the file
SIGNALS/continue exists. At its end the process writes its error, or null, to SIGNALS/ROLE-TEXT-STAGE.json.
"""

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from raydistill.cluster import snapshots, sync
from raydistill.core import artifact
from raydistill.core.artifact import Manifest
from raydistill.core.errors import TransientError

KIND = "test artifact"
FILES = ("a.txt", "inner/b.txt")
PAUSES = ("before", "block", "publish", "renames", "upload")
LARGE = "checkpoint/model"  # the file whose upload pauses; larger than one part of an upload to a bucket
LARGE_BYTES = 24_000_000
RETRY_SECONDS = 150


def build(folder: Path, text: str, pause: Callable[[str], None]) -> None:
    """Build an artifact whose files contain `text`, with the artifact's lock."""
    publish, rename = artifact.publish, os.rename

    def pause_and_publish(*args: Any) -> None:
        pause("publish")
        publish(*args)

    def pause_and_rename(source: Any, target: Any) -> None:
        if str(target) == str(folder):
            pause("renames")
        rename(source, target)

    artifact.publish = pause_and_publish  # type: ignore[assignment]
    os.rename = pause_and_rename  # type: ignore[assignment]
    with artifact.lock(folder):
        pause("before")
        with artifact.build(folder, lambda: Manifest(kind=KIND, key=text)) as temporary:
            for name in FILES:
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                pause("block")


def save(folder: Path, text: str, pause: Callable[[str], None]) -> None:
    """Claim a stored folder, save a small file, then a small and a large one; try again while the storage is down."""
    write = sync.Storage.write_stream

    def pause_and_write(self: sync.Storage, source: BinaryIO, name: str) -> int:
        if name.endswith(LARGE):
            source = PausingFile(source.read(), lambda: pause("upload"))
        return write(self, source, name)

    with snapshots.writer(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text(f"{text} 1")
        snapshots.save(folder)
        sync.Storage.write_stream = pause_and_write  # type: ignore[method-assign]
        (folder / LARGE).parent.mkdir(exist_ok=True)
        (folder / LARGE).write_text(text * (LARGE_BYTES // len(text)))
        (folder / "state.json").write_text(f"{text} 2")
        retry_while_down(lambda: snapshots.save(folder))


def retry_while_down(action: Callable[[], None]) -> None:
    """Repeat an action while the storage does not answer, as the next command of a user does."""
    deadline = time.monotonic() + RETRY_SECONDS
    while True:
        try:
            return action()
        except TransientError as error:
            if sync.STORAGE_ENV not in str(error) or time.monotonic() > deadline:
                raise
            print(error, flush=True)
            time.sleep(1)


class PausingFile(io.BytesIO):
    """A file in memory that calls `pause` once half of it was read."""

    def __init__(self, content: bytes, pause: Callable[[], None]) -> None:
        super().__init__(content)
        self.half, self.pause = len(content) // 2, pause

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= self.half:
            self.pause()
        return super().read(size)


def main(role: str, folder: str, text: str, signals: str, stage: str) -> None:
    """Write as `text`, and leave the error in the folder `signals`."""
    assert stage in (*PAUSES, "none")
    paused, resumed = Path(signals, f"{stage}.paused"), Path(signals, "continue")

    def pause(at: str) -> None:
        if at == stage and not paused.exists():
            paused.touch()
            while not resumed.exists():
                time.sleep(0.05)

    error = None
    try:
        {"build": build, "save": save}[role](Path(folder), text, pause)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    result = Path(signals, f"{role}-{text}-{stage}.json")
    result.with_suffix(".part").write_text(json.dumps(error))
    shutil.move(result.with_suffix(".part"), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
