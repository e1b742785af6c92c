#!/usr/bin/env bash
# One run over several nodes, one task a GPU:
#   sbatch experiments/cluster/slurm.sh --config experiments/patcher.yaml --config experiments/scale/patcher_paper.yaml \
#       --config experiments/scale/llama3_8b.yaml
# Weights are sharded over all tasks (fsdp2.yaml), unless the options name another file of experiments/cluster.
#SBATCH --job-name=casehard
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

for name in SLURM_JOB_ID SLURM_CPUS_PER_TASK SLURM_JOB_NUM_NODES SLURM_NTASKS SLURM_NTASKS_PER_NODE; do
    if [[ -z "${!name:-}" ]]; then
        echo "error: ${name} must be set, as SLURM does for a job, and it is not. Hand this script in: sbatch $0 $*" >&2
        exit 1
    fi
done

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK}"
export CASEHARD_RUN_FOLDER="runs/slurm/${SLURM_JOB_ID}" # one for all tasks, and for the job when it is requeued
export HF_HUB_OFFLINE=1                                 # compute nodes seldom have a network: fetch the checkpoint before

run=(casehard fit "$@")
if [[ "$*" != *experiments/cluster/* ]]; then # such as patcher_parallel.yaml
    run+=(--config experiments/cluster/fsdp2.yaml --trainer.strategy.init_args.data_parallel_size "${SLURM_NTASKS}")
fi
run+=(--trainer.num_nodes "${SLURM_JOB_NUM_NODES}" --trainer.devices "${SLURM_NTASKS_PER_NODE}")
last="${CASEHARD_RUN_FOLDER}/checkpoints/last.ckpt"
if [[ -e "${last}" ]]; then # requeued
    run+=(--ckpt_path "${last}")
fi
if [[ -n "${CASEHARD_DRY_RUN:-}" ]]; then
    printf '%q ' srun "${run[@]}"
    printf '\n'
    exit
fi
trap 'scontrol requeue "${SLURM_JOB_ID}"' USR1 # two minutes before the time limit, to this script alone
mkdir -p "${CASEHARD_RUN_FOLDER}"
srun "${run[@]}" &
wait $!
