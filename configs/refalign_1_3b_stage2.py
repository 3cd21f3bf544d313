"""RefAlign-1.3B, stage 2: pairs of one subject from two videos, from stage 1's weights.

    python tools/train.py configs/refalign_1_3b_stage2.py --data.path data/phantom --train.folder RUN

Hardware: 8 devices of 80 GB, as published; any number that divides the batch, by --mesh.fsdp and --data.batch-size.
One device of 80 GB computes the same batch of 8 in 8 parts, one after the other, with

    --mesh.fsdp 1 --optimizer.accumulation 8

Time: not measured. Expected result: the paper's OpenS2V-Eval TotalScore, 56.30.

Published (arXiv 2603.25743 and its released scripts): learning rate 1e-5, constant; AdamW 0.9, 0.999, 1e-8, weight
decay 0.01; clip 1.0; bfloat16 compute on float32 master weights; alignment of 9 blocks with weight 1; the whole
transformer and the projectors trained; conditioning dropout of a tenth each; 81 frames of 480x832, up to 3
references; 8 GPUs, one example per GPU, batch 8.

Not in the paper or its scripts, so ours and not tuned: 10,000 steps (half of stage 1's), the held-out examples, no
moving average, how the mesh is laid out, the loader's workers, how often it is saved.
"""

from refalign_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, wan_1_3b


def get_config() -> Config:
    """The recipe."""
    return Config(
        model=ModelConfig(dit=wan_1_3b()),
        data=DataConfig(path="data/phantom", batch_size=8, held_out=8 * 8, num_workers=2),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        mesh=MeshConfig(fsdp=8),
        train=TrainConfig(
            folder="runs/refalign_1_3b_stage2",
            init="runs/refalign_1_3b_stage1",
            steps=10_000,
            save_every=500,
            held_out_every=500,
        ),
    )
