#!/bin/bash
# Trains on several machines of a SLURM cluster: sbatch scripts/slurm.sh RUN_DIR [overrides of train.py]
# One torchrun per machine starts one process per GPU. Two minutes before the time limit SLURM sends SIGTERM, on which the
# run saves a checkpoint and ends. The job is then requeued with the same RUN_DIR and resumes the run.
#SBATCH --job-name=sequencer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

run_dir=${1:?usage: sbatch scripts/slurm.sh RUN_DIR [key=value ...]}
shift
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

requeue() {
    kill -TERM "$step"
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue TERM

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" --max-restarts=3 \
    train.py run_dir="$run_dir" trainer.accelerator=gpu trainer.precision=bf16-mixed "$@" &
step=$!
wait "$step"
