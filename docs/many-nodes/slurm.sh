#!/usr/bin/env bash
# A run on many nodes that goes on in the queue until it is finished:  sbatch slurm.sh run.yaml [options of fit]
#SBATCH --job-name=lf-lightning
#SBATCH --nodes=2                # trainer.num_nodes
#SBATCH --ntasks-per-node=8      # trainer.devices: one task a GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120        # two minutes before the end: longer than a step and a checkpoint take
#SBATCH --requeue
#SBATCH --open-mode=append       # one log over all starts
#SBATCH --output=slurm-%j.log
set -uo pipefail

config=${1:?give the configuration: sbatch slurm.sh run.yaml}
shift
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# export NCCL_SOCKET_IFNAME=ib0  # the network card, where a node has several

trap : TERM  # this shell outlives the signal that ends the tasks, to see how they ended

# the data first: once for all nodes, where they share data.cache_dir; where they do not, on each of them:
#   srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 lf-lightning prepare --config "$config" "$@" &&
srun --nodes=1 --ntasks=1 --ntasks-per-node=1 lf-lightning prepare --config "$config" "$@" &&
  srun --kill-on-bad-exit=1 lf-lightning fit --config "$config" "$@" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --ckpt_path last
code=$?

case $code in
  138 | 143)  # 128 + USR1 or TERM: what is done is saved, and it is not all
    echo "interrupted with code $code: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit "$code"
