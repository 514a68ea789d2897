"""The MLflow server of deploy/ with a real PostgreSQL and moto's S3."""

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request

import psutil
import pytest
import yaml

from tests.factories.mlflow_server import DEPLOY, MODULES, USER, ask, missing_requirements, mlflow_server
from tests.factories.sweeps import KILL_SPACE
from tests.factories.workspace import SECRETS, command, last_json, make_world


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    for name in MODULES:
        pytest.importorskip(name)
    if reason := missing_requirements():
        pytest.skip(reason)
    with mlflow_server(tmp_path_factory.mktemp("server")) as running_server:
        yield running_server


@pytest.mark.cluster
def test_server_requires_a_password_and_listens_on_loopback_only(server):
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    for user in (None, (USER, "wrong-password"), ("nobody", server.hidden["user"])):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(server.url, search, user)
    assert b"experiments" in ask(server.url, search, (USER, server.hidden["user"]))
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    listening = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    arguments = " ".join(word for p in family for word in p.cmdline())
    assert not [name for name, value in server.hidden.items() if value in arguments]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_nothing_is_lost_when_the_database_stops_during_a_sweep(server, tmp_path):
    teacher, data = make_world(tmp_path)
    run = {**KILL_SPACE["run"], "teacher": str(teacher), "student": {"size": {"choice": ["2-2", "2-1"]}}}
    run["dataset"] = {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0}
    run["training"] = {**run["training"], "epochs": 2}
    path = tmp_path / "deployed.yaml"
    path.write_text(yaml.safe_dump({**KILL_SPACE, "name": "deployed", "run": run}))
    home = tmp_path / "outputs"
    arguments = ("sweep", path, "--set", f"tracking_uri={server.url}")
    first = command(home, *arguments, "--set", "search.trials=1", "--json", **server.login)
    assert [(t["key"], "FINISHED") for t in last_json(first)["trials"]] == server.trials("deployed")

    server.database.stop()
    offline = command(home, *arguments, "--set", "search.trials=4", "--json", **server.login)
    assert len(last_json(offline)["trials"]) == 4
    assert "run the same command again to publish" in offline.stderr
    server.database.start()

    again = command(home, *arguments, "--set", "search.trials=4", "--json", **server.login)
    result = last_json(again)
    assert sorted((t["key"], "FINISHED") for t in result["trials"]) == server.trials("deployed")
    assert_published_once(server, home / "sweeps" / "deployed", result)
    output = "".join(done.stdout + done.stderr for done in (first, offline, again))
    assert_no_secrets(server, home, output)


def assert_published_once(server, sweep, result):
    """PostgreSQL holds every validation of every trial once, and the bucket every checkpoint."""
    objects = {item.key: item.size for item in server.bucket.objects.all()}
    for trial in result["trials"]:
        query = (
            "select m.step, m.value from metrics m join tags t using (run_uuid) where t.key = 'raydistill.trial' "
            f"and t.value = '{trial['key']}' and m.key = 'val_loss' order by m.step, m.timestamp"
        )
        # MLflow receives four significant digits
        logged = [(int(step), pytest.approx(float(value), rel=5e-4)) for step, value in server.database.rows(query)]
        lines = (sweep / "trials" / trial["key"] / "metrics.jsonl").read_text().splitlines()
        history = [(line["step"], line["val_loss"]) for line in map(json.loads, lines)]
        assert history == logged[: len(history)]
        assert len(logged) == len(history) + 1  # plus the final value of the best checkpoint
        query = (
            "select r.artifact_uri from runs r join tags t using (run_uuid) "
            f"where t.key = 'raydistill.trial' and t.value = '{trial['key']}'"
        )
        [[uri]] = server.database.rows(query)
        prefix = "mlflow/" + uri.removeprefix("mlflow-artifacts:/")
        weights = sweep / "trials" / trial["key"] / "best" / "model.safetensors"
        assert objects[f"{prefix}/checkpoint/model.safetensors"] == weights.stat().st_size
    aliases = server.database.rows("select alias from registered_model_aliases where name = 'deployed'")
    assert aliases == [["any"]]


def assert_no_secrets(server, home, output):
    """No password occurs in the output, the logs, a dump of the database, the local files or the bucket."""
    hidden = [*server.hidden.values(), *SECRETS.values()]
    texts = {"output": output.encode(), "dump": server.database.run("pg_dump").encode()}
    texts |= {str(p): p.read_bytes() for folder in (home, server.logs) for p in folder.rglob("*") if p.is_file()}
    texts |= {item.key: item.get()["Body"].read() for item in server.bucket.objects.all()}
    for source, content in texts.items():
        assert not [value for value in hidden if value.encode() in content], source


def test_serve_script_names_a_missing_secret(tmp_path):
    env = {"PATH": os.environ["PATH"], "ARTIFACTS": "s3://b/m", "PGHOST": "h", "PGDATABASE": "d", "PGUSER": "u"}
    done = subprocess.run([DEPLOY / "serve.sh"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: PGPASSWORD is not set")


def test_deploy_files_publish_loopback_only_and_contain_no_secret():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    published = {name: service.get("ports", []) for name, service in compose["services"].items()}
    assert published == {"database": [], "mlflow": ["127.0.0.1:5000:5000"]}
    example = dict(
        line.split("=", 1) for line in (DEPLOY / "mlflow.env.example").read_text().splitlines() if line[:1].isalpha()
    )
    assert {name for name, value in example.items() if not value} >= {
        *("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "AWS_SECRET_ACCESS_KEY")
    }
    required = (DEPLOY / "serve.sh").read_text().split("for name in ")[1].split(";")[0].split()
    assert set(required) <= set(example)
    pins = dict(line.split("==") for line in (DEPLOY / "requirements.txt").read_text().splitlines() if "==" in line)
    pinned = (DEPLOY.parent / "constraints.txt").read_text().splitlines()
    assert f"mlflow=={pins['mlflow[auth]']}" in pinned
    assert shutil.which("bash")
