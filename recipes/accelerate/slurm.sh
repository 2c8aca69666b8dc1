#!/bin/bash
# Data parallel healing on several machines of a Slurm cluster, one task a machine and one process a GPU.
#
#   sbatch recipes/accelerate/slurm.sh runs/pruned runs/healed data.jsonl
#
# All machines must see the checkpoint, the data and the folder of the result under the same paths. A requeued job goes on from
# its last checkpoint.
#SBATCH --job-name=layerprune-heal
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue

set -euo pipefail
MODEL=$1 OUT=$2 DATA=$3
export MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GPUS=${SLURM_GPUS_ON_NODE:-8}

# $SLURM_NODEID is known on each machine, so the task's own shell fills it in
srun bash -c 'accelerate launch --multi_gpu \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS)) --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN" --main_process_port 29500 --mixed_precision no --dynamo_backend no \
    -m layerprune heal --model "$0" --out "$1" --heal-data "$2" --batch-size 16' "$MODEL" "$OUT" "$DATA"
