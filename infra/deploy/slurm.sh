#!/usr/bin/env bash
# An experiment on Slurm: a Ray cluster over the job's nodes, then winnow on the first of them.
#   sbatch infra/deploy/slurm.sh RECIPE OUT        (OUT on a file system that all nodes see)
#SBATCH --job-name=winnow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
recipe=$1 out=$2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address="$head:6379"

srun --nodes=1 --ntasks=1 -w "$head" ray start --head --port=6379 --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
        ray start --address="$address" --block &
    sleep 20
fi
# The batch script runs on the job's first node, next to the head.
winnow run "$recipe" --out "$out" --address "$address"
