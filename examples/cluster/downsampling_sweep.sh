#!/bin/bash
# The paper's comparison of downsampling factors (figures 6 and 7) as a W&B sweep: a file for `wandb sweep`. The latents
# of each factor lie in data/latents/NAME, NAME being the run.name of its experiment; LDM-1 reads pixels and is a job by
# itself.
#   examples/cluster/downsampling_sweep.sh && wandb sweep downsampling.yaml --project ldmlab
#   sbatch examples/cluster/wandb_agents.sh ENTITY/ldmlab/SWEEP
#   sbatch examples/cluster/one_node.sh experiment=paper/compression/imagenet_ldm_1 run.group=downsampling
set -e
runs=paper/compression/imagenet_ldm
ldmlab sweep-file "experiment=${runs}_2,${runs}_4,${runs}_8,${runs}_16,${runs}_32" \
    'data.latents="data/latents/${run.name}"' --name downsampling --out downsampling.yaml "$@"
