#!/usr/bin/env bash
# A Slurm batch script: one torchrun agent on each node, which starts a process for each GPU (or PROCESSES of them).
#
#     sbatch --nodes 2 launch/cluster/slurm.sh --model medium --out /shared/runs/one --checkpoint-every 100
#
# The arguments are those of launch/train.py. --out must be a directory that every node sees. When Slurm requeues the job
# after a node has failed, or a process dies, training goes on from the last complete checkpoint.
#SBATCH --job-name=sm3
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # pytorch/pytorch#135712: with it a node that was lost cannot come back
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}

srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$processes" --max-restarts 100 \
    --rdzv-backend c10d --rdzv-endpoint "$first:${RDZV_PORT:-29400}" --rdzv-id "$SLURM_JOB_ID" \
    launch/train.py --resume auto "$@"
