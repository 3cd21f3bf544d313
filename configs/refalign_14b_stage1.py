"""RefAlign-14B, stage 1: alignment on subjects cut from the clip itself.

    python tools/train.py configs/refalign_14b_stage1.py --data.path data/opens2v --train.folder RUN

Hardware: 112 devices of 80 GB, as published, 16 of them holding one copy of the state; others by --mesh.* and
--data.batch-size. Several hosts: add --train.distributed and start it on each.
One device of 80 GB holds 6 of the 40 blocks, enough for a try at full width (the state of all, parameters, moments and
gradients in float32, takes 230 GB), with

    --mesh.fsdp 1 --data.batch-size 1 --model.dit.num-layers 6 --model.alignment.num-blocks 4 --train.init ""

Time: not measured. Expected result: none of its own; stage 2 goes on from it.

Published (arXiv 2603.25743 and its released scripts): learning rate 5e-5, constant; AdamW 0.9, 0.999, 1e-8, weight
decay 0.01; clip 1.0; bfloat16 compute on float32 master weights; alignment of 9 blocks with weight 1; the whole
transformer and the projectors trained; conditioning dropout of a tenth each; 81 frames of 480x832, up to 3
references; 112 GPUs, one example per GPU, batch 112.

Not in the paper or its scripts, so ours and not tuned: 1,500 steps (five passes over the published 32,112 examples),
the held-out examples, no moving average, how the mesh is laid out, the loader's workers, how often it is saved.
"""

from refalign_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, wan_14b


def get_config() -> Config:
    """The recipe."""
    return Config(
        model=ModelConfig(dit=wan_14b()),
        data=DataConfig(path="data/opens2v", batch_size=112, held_out=112, num_workers=2),
        optimizer=OptimizerConfig(learning_rate=5e-5),
        mesh=MeshConfig(fsdp=16),
        train=TrainConfig(
            folder="runs/refalign_14b_stage1",
            init="weights/Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors.index.json",
            steps=1_500,
            save_every=250,
            held_out_every=250,
        ),
    )
