#!/bin/bash
# A sweep on nodes that Slurm gives out: one Ray node per machine, the launch on the first one, and an orderly end.
#   sbatch --nodes=4 docker/cluster/slurm.sh launch sweep=paper resources=gpu store=/shared/pift
# Every node needs pift in the environment that PIFT_BIN names, and sees the store. A sweep that outlives its time is
# stopped with checkpoints; the same sbatch goes on.
#SBATCH --job-name=pift
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@600
set -euo pipefail

PIFT_BIN=${PIFT_BIN:-/opt/pift/bin}
PORT=${PIFT_RAY_PORT:-6379}
export PATH="$PIFT_BIN:$PATH" RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

store= sweep=single
for word in "$@"; do
  case "$word" in
    store=*) store=${word#store=} ;;
    sweep=* | sweep.name=*) sweep=${word#*=} ;;
  esac
done
if [ -z "$store" ]; then
  echo "slurm.sh: name a store that all nodes see, as in: sbatch $0 launch sweep=quickstart store=/shared/pift" >&2
  exit 2
fi

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(getent ahostsv4 "$(echo "$nodes" | head -n 1)" | awk 'NR == 1 {print $1}')

srun --kill-on-bad-exit=0 ray symmetric-run --address "$head:$PORT" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --object-store-memory 134217728 --disable-usage-stats -- \
  pift "$@" executor=ray executor.address=auto &
job=$!

# Slurm's warning, ten minutes before the end: the trials write checkpoints.
trap 'pift stop "$sweep" --store "$store" --no-wait || true' USR1
code=0
while true; do
  wait "$job" && code=0 || code=$?
  kill -0 "$job" 2>/dev/null || break
done
exit "$code"
