"""Messages for errors of the operating system, and exit statuses of commands."""

import errno
import os

import pytest

from raydistill._app import make_app, run_app
from raydistill.core.errors import TransientError, UserError, describe_os_error


def test_message_for_a_full_disk_says_how_to_continue():
    message = describe_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x"))
    assert "the disk of /data/x is full; no data is lost. Free some space and run the same command again" in message
    assert describe_os_error(PermissionError(errno.EACCES, "denied", "/x")) == "[Errno 13] denied: '/x'"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("bad input"), 2, "error: bad input"),
        (TransientError("try again"), 75, "error: try again"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume"),
        (OSError("no permission"), 1, "error: no permission"),
        (UserError("at http://u:p@h"), 2, "error: at http://***@h"),
    ],
)
def test_errors_become_messages_and_exit_statuses(error, status, message, capsys, monkeypatch):
    app = make_app()

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["raydistill"])
    with pytest.raises(SystemExit) as caught:
        run_app(app)
    assert caught.value.code == status
    assert capsys.readouterr().err.strip() == message
