"""The MLflow server of deploy/ on a real PostgreSQL and moto's S3; server and database can be stopped and restarted."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.factories.workspace import background, free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
ADMIN, USER = "admin", "team"
MODULES = ("moto.server", "boto3", "psycopg2", "flask_wtf")


def missing_requirements() -> str:
    """The reason why this machine cannot run the server; empty if it can."""
    if os.geteuid() != 0 or not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        return "needs root and Debian's postgresql"
    return ""


class Database:
    """Debian's PostgreSQL with its data in `folder`, on loopback, with a password."""

    def __init__(self, folder, password):
        [self.programs] = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
        self.folder, self.port, self.password = folder, free_port(), password
        (folder / "password").write_text(password)
        subprocess.run(["chown", "-R", "postgres", folder], check=True)
        self._as_postgres(f"initdb -D {folder}/data -U mlflow --pwfile={folder}/password -A scram-sha-256 -E UTF8")
        (folder / "password").unlink()
        self.start()
        self.run("createdb", "mlflow")

    def start(self):
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self._as_postgres(f"pg_ctl -D {self.folder}/data -l {self.folder}/log -w -o '{options}' start")

    def stop(self):
        self._as_postgres(f"pg_ctl -D {self.folder}/data -m immediate -w stop")  # without a shutdown, as in a power cut

    @property
    def environment(self):
        address = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "mlflow", "PGDATABASE": "mlflow"}
        return {**address, "PGPASSWORD": self.password}

    def run(self, program, *arguments):
        env = {**os.environ, **self.environment}
        done = subprocess.run(
            [self.programs / program, *arguments], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout

    def rows(self, query):
        return [line.split("|") for line in self.run("psql", "-Atc", query).splitlines()]

    def _as_postgres(self, line):
        quiet = subprocess.DEVNULL  # a server that inherits a pipe would keep it open
        subprocess.run(["su", "postgres", "-c", f"{self.programs}/{line}"], stdout=quiet, stderr=quiet, check=True)


class Server:
    """deploy/serve.sh as systemd starts it, with a user who is not the administrator.

    Attributes:
        database: the server's PostgreSQL.
        env: the server's environment.
        hidden: the secrets, by purpose.
        bucket: the S3 bucket of the artifacts.
        logs: the folder of the server's logs.
        url: the server's address.
    """

    def __init__(self, database: Database, env: dict[str, str], hidden: dict[str, str], bucket: Any, logs: Path):
        self.database, self.env, self.hidden, self.bucket, self.logs = database, env, hidden, bucket, logs
        self.url = f"http://{env['HOST']}:{env['PORT']}"
        self.running = ExitStack()

    @property
    def login(self) -> dict[str, str]:
        """Environment variables by which a command logs in."""
        return {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": self.hidden["user"]}

    def start(self) -> None:
        """Start the server and wait until it answers."""
        log = self.logs / f"mlflow-{len(list(self.logs.glob('mlflow-*')))}.log"
        serve = background([str(DEPLOY / "serve.sh")], log, lambda: ask(self.url, "/health"), **self.env)
        self.process = self.running.enter_context(serve)

    def kill(self) -> None:
        """Kill the server and its worker processes."""
        self.running.close()

    def trials(self, experiment: str) -> list[tuple[str, str]]:
        """(key, status) of the run of every trial of an experiment, from the database."""
        query = (
            "select t.value, r.status from runs r join tags t using (run_uuid) join experiments e using (experiment_id)"
            f" where t.key = 'raydistill.trial' and e.name = '{experiment}'"
        )
        return sorted((key, status) for key, status in self.database.rows(query))


@contextmanager
def mlflow_server(logs: Path, host: str = "127.0.0.1", password: str = "") -> Iterator[Server]:
    """Context with a server on `host`; database and bucket are on loopback. `password` is the user's password."""
    import boto3

    hidden = {name: secrets.token_hex(12) for name in ("database", "admin", "user", "form", "bucket")}
    hidden["user"] = password or hidden["user"]
    store = free_port()
    s3 = {"aws_access_key_id": "key", "aws_secret_access_key": hidden["bucket"], "region_name": "us-east-1"}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raydistill-postgres-")))
        database = Database(folder, hidden["database"])
        stack.callback(database.stop)
        moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(store)]
        stack.enter_context(background(moto, logs / "moto.log", lambda: socket.create_connection(("127.0.0.1", store))))
        bucket = boto3.resource("s3", endpoint_url=f"http://127.0.0.1:{store}", **s3).create_bucket(Bucket="raydistill")
        env = {
            **database.environment,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOST": host,
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"{host},{host}:*",
            "PORT": str(free_port()),
            "ARTIFACTS": "s3://raydistill/mlflow",
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{store}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": hidden["bucket"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": hidden["admin"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": hidden["form"],
        }
        server = Server(database, env, hidden, bucket, logs)
        server.start()
        stack.callback(server.kill)
        user = {"username": USER, "password": hidden["user"]}
        ask(server.url, "/api/2.0/mlflow/users/create", (ADMIN, hidden["admin"]), user)
        yield server


def ask(url, path, user=None, data=None):
    """Send a request and return the body of the answer; raises HTTPError, an OSError, if the server refuses."""
    headers = {"Content-Type": "application/json"}
    if user:
        headers["Authorization"] = "Basic " + b64encode(":".join(user).encode()).decode()
    body = json.dumps(data).encode() if data else None
    with urllib.request.urlopen(urllib.request.Request(url + path, body, headers), timeout=30) as answer:
        return answer.read()
