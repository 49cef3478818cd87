#!/bin/bash
# A sweep as a job array: four learning rates with three seeds each, one GPU a run, at most six at a time.
#   sbatch examples/cluster/job_array.sh experiment=small/unconditional run.name=rates
#   ldmlab dashboard runs --out rates.html
#SBATCH --job-name=ldmlab
#SBATCH --array=0-11%6
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log

rates=(1e-5 3e-5 1e-4 3e-4)
rate=${rates[$((SLURM_ARRAY_TASK_ID % ${#rates[@]}))]}
seed=$((SLURM_ARRAY_TASK_ID / ${#rates[@]}))
srun python train.py "$@" "optimizer.learning_rate=$rate" "seed=$seed"
code=$?
[ "$code" -eq 138 ] && scontrol requeue "$SLURM_JOB_ID" # 128 + USR1: saved before the time limit
exit "$code"
