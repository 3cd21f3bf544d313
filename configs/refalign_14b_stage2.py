"""RefAlign-14B, stage 2: pairs of one subject from two videos, from stage 1's weights.

    python tools/train.py configs/refalign_14b_stage2.py --data.path data/phantom --train.folder RUN

Hardware: 112 devices of 80 GB, as published, 16 of them holding one copy of the state; others by --mesh.* and
--data.batch-size. Several hosts: add --train.distributed and start it on each.
One device of 80 GB holds 6 of the 40 blocks, enough for a try at full width (the state of all, parameters, moments and
gradients in float32, takes 230 GB), with

    --mesh.fsdp 1 --data.batch-size 1 --model.dit.num-layers 6 --model.alignment.num-blocks 4 --train.init ""

Time: not measured. Expected result: the paper's OpenS2V-Eval TotalScore, 60.42.

Published (arXiv 2603.25743 and its released scripts): learning rate 1e-5, constant; AdamW 0.9, 0.999, 1e-8, weight
decay 0.01; clip 1.0; bfloat16 compute on float32 master weights; alignment of 9 blocks with weight 1; the whole
transformer and the projectors trained; conditioning dropout of a tenth each; 81 frames of 480x832, up to 3
references; 112 GPUs, one example per GPU, batch 112.

Not in the paper or its scripts, so ours and not tuned: 750 steps (half of stage 1's), the held-out examples, no
moving average, how the mesh is laid out, the loader's workers, how often it is saved.
"""

from refalign_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, wan_14b


def get_config() -> Config:
    """The recipe."""
    return Config(
        model=ModelConfig(dit=wan_14b()),
        data=DataConfig(path="data/phantom", batch_size=112, held_out=112, num_workers=2),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        mesh=MeshConfig(fsdp=16),
        train=TrainConfig(
            folder="runs/refalign_14b_stage2",
            init="runs/refalign_14b_stage1",
            steps=750,
            save_every=250,
            held_out_every=250,
        ),
    )
