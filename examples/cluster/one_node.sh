#!/bin/bash
# One node, one process a GPU.
#   sbatch examples/cluster/one_node.sh experiment=paper/unconditional/ffhq run.name=ffhq
#SBATCH --job-name=ldmlab
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log

exec torchrun --standalone --nproc-per-node="$SLURM_GPUS_ON_NODE" train.py "$@"
