#!/usr/bin/env bash
# secrets.sh and `docker compose up -d --wait`, with a look first at what goes wrong on a first try, and the next commands
# last. Safe to repeat.
#   docker/up.sh                            PIFT_WORKERS=2 docker/up.sh
set -euo pipefail
cd "$(dirname "$0")"

say() { printf 'pift: %s\n' "$*" >&2; }

# A setting of docker/.env or the environment, as compose reads it: the environment wins.
setting() {
    local found=${!1:-}
    if [ -z "$found" ] && [ -f .env ]; then found=$(sed -n "s/^$1=//p" .env | tail -n 1); fi
    echo "${found:-$2}"
}

taken() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }

# check_port SERVICE VARIABLE DEFAULT: is it free, or ours already?
check_port() {
    local port
    port=$(setting "$2" "$3")
    if [ -z "$(docker compose ps -q "$1")" ] && taken "$port"; then
        say "port $port of 127.0.0.1, which $1 wants, is taken by another program."
        say "End that program, or choose another port: echo $2=$((port + 1)) >> docker/.env"
        exit 2
    fi
}

if ! docker info > /dev/null 2>&1; then
    say "no Docker engine answers (docker info); start it, or let your user use it: usermod -aG docker $(id -un)"
    exit 2
fi
if ! docker compose version > /dev/null 2>&1; then
    say "docker compose is not installed; version 2.20 or newer is needed (the package docker-compose-plugin)"
    exit 2
fi
./secrets.sh > /dev/null
check_port mlflow PIFT_MLFLOW_PORT 5000
check_port ray-head PIFT_RAY_PORT 8265
if ! docker compose up -d --wait "$@"; then
    say "not everything is up. What is wrong, by service (the last lines of docker compose logs):"
    docker compose ps -a --format '{{.Service}} {{.State}} {{.Health}}' |
        awk '$2 != "running" || ($3 != "healthy" && $3 != "") {print $1}' | sort -u |
        while read -r service; do docker compose logs --no-log-prefix --tail 4 "$service" 2>&1 | sed "s/^/  $service: /" >&2; done
    exit 1
fi
cat << END
MLflow:   http://127.0.0.1:$(setting PIFT_MLFLOW_PORT 5000)
Ray:      http://127.0.0.1:$(setting PIFT_RAY_PORT 8265), which asks for the token in docker/secrets/ray_token
run one:  cd docker && docker compose run --rm sweep launch sweep=quickstart
END
