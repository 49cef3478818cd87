#!/bin/bash
# Agents of a W&B sweep, one a GPU; each trains one run of the sweep and ends.
#   sbatch examples/cluster/wandb_agents.sh ENTITY/PROJECT/SWEEP
#SBATCH --job-name=ldmlab-agent
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=72:00:00
#SBATCH --output=slurm-%A_%a.log

srun wandb agent --count 1 "$1"
