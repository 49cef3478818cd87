#!/bin/bash
# A job that may be preempted, and one longer than the cluster's time limit: it saves, goes back into the queue and
# continues in its folder with the next step.
#   sbatch examples/cluster/preemptible.sh experiment=paper/text/ldm_kl_8 run.name=text trainer.checkpoint_every_minutes=20
#SBATCH --job-name=ldmlab
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it over by itself
srun python train.py "$@" # without --kill-on-bad-exit, which would hide the exit code below
code=$?
# 138 = 128 + USR1: saved before the time limit, where SLURM itself does not requeue; it does after a preemption.
[ "$code" -eq 138 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
