#!/usr/bin/env bash
# The whole job on several nodes under SLURM:   RUN=full COCO_DIR=/data/coco sbatch docs/cluster/slurm.sh
# Sent from the repository's folder, which all nodes share. A job that reaches its time limit is requeued, and goes on.
#SBATCH --job-name=w4a16
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=72
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH=$PWD/.venv/bin:$PATH RUN=${RUN:-full}
common=(--run "$RUN" --set "data.coco_dir=${COCO_DIR:?name the COCO folder}")
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((29500 + SLURM_JOB_ID % 1000))
export MASTER_ADDR MASTER_PORT
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1 # the trainings get TERM and save

step() { # in the background, because bash runs a trap only when `wait` returns
  srun --kill-on-bad-exit=1 "$@" &
  wait $!
}

# One torchrun on each node; it starts a process for each GPU. Expanded there, not here:
# shellcheck disable=SC2016
on_node='exec torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --node-rank="$SLURM_NODEID" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -m -- app train "$@"'

step --nodes=1 --ntasks=1 python -m app data "${common[@]}"
for variant in fp16 qat; do
  step bash -c "$on_node" - --variant "$variant" "${common[@]}"
done
for stage in ptq export eval report; do
  step --nodes=1 --ntasks=1 python -m app "$stage" "${common[@]}"
done
