#!/usr/bin/env bash
# Makes what docker/compose.yaml reads from docker/secrets/: random passwords and a token. Keeps those that are there.
#   docker/secrets.sh
# The folder is closed to everybody else (700) and unknown to git. The files in it can be read by all who get there,
# because containers do, under users of their own (PostgreSQL's and ours), whom this machine does not know.
set -euo pipefail
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
chmod 700 secrets
for name in postgres_password ray_token mlflow_password mlflow_key s3_key s3_secret; do
    if [ -s "secrets/$name" ]; then
        echo "kept     secrets/$name"
        continue
    fi
    new=$(mktemp "secrets/.$name.XXXXXX")
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "$new"
    chmod 444 "$new"
    mv "$new" "secrets/$name"
    echo "made     secrets/$name"
done
