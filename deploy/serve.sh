#!/usr/bin/env bash
# MLflow for a team: PostgreSQL for what is logged, S3 for artifacts, MLflow's own basic authentication in front.
# Settings and secrets come from the environment (mlflow.env.example lists them), so none is on a command line, which
# every user of the machine can read. Listens on loopback; HOST changes that, and then TLS has to stand before it.
set -euo pipefail
for name in ARTIFACTS PGHOST PGDATABASE PGUSER PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY; do
  [ -n "${!name:-}" ] || { echo "error: $name is not set; deploy/mlflow.env.example says what it is" >&2; exit 2; }
done
export MLFLOW_AUTH_CONFIG_PATH="${MLFLOW_AUTH_CONFIG_PATH:-$(cd "$(dirname "$0")" && pwd)/basic_auth.ini}"
export MLFLOW_DISABLE_TELEMETRY=true
# libpq reads PGHOST and its fellows itself, which keeps the password out of the address. Artifacts go through the
# server, so that only the server has the keys of the bucket.
exec mlflow server --app-name basic-auth --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-2}" \
  --backend-store-uri postgresql+psycopg2:// --artifacts-destination "$ARTIFACTS"
