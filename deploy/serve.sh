#!/usr/bin/env bash
# An MLflow server for a team: runs in PostgreSQL, artifacts in S3, MLflow's basic authentication.
# Settings and secrets come from the environment (see mlflow.env.example) and not from the command line, which every
# user of the machine can read. Listens on loopback; set HOST to change that, and put a TLS proxy in front.
set -euo pipefail
for name in ARTIFACTS PGHOST PGDATABASE PGUSER PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY; do
  [ -n "${!name:-}" ] || { echo "error: $name is not set; see deploy/mlflow.env.example" >&2; exit 2; }
done
export MLFLOW_AUTH_CONFIG_PATH="${MLFLOW_AUTH_CONFIG_PATH:-$(cd "$(dirname "$0")" && pwd)/basic_auth.ini}"
export MLFLOW_DISABLE_TELEMETRY=true
# libpq reads PGHOST, PGPASSWORD and the other PG variables itself, so that the address contains no password. Artifacts
# go through the server, so that only the server needs the keys of the bucket.
exec mlflow server --app-name basic-auth --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-2}" \
  --backend-store-uri postgresql+psycopg2:// --artifacts-destination "$ARTIFACTS"
