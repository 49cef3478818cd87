#!/bin/bash
# Four nodes with eight GPUs each; srun starts the 32 processes.
#   sbatch examples/cluster/four_nodes_srun.sh experiment=paper/text/ldm_kl_8 run.name=text
#SBATCH --job-name=ldmlab
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log

export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it over by itself
srun --kill-on-bad-exit=1 python train.py "$@"
