"""RefAlign-1.3B, stage 1: alignment on subjects cut from the clip itself.

    python tools/train.py configs/refalign_1_3b_stage1.py --data.path data/opens2v --train.folder RUN

Hardware: 8 devices of 80 GB, as published; any number that divides the batch, by --mesh.fsdp and --data.batch-size.
One device of 80 GB computes the same batch of 8 in 8 parts, one after the other, with

    --mesh.fsdp 1 --optimizer.accumulation 8

Time: not measured. Expected result: none of its own; stage 2 goes on from it.

Published (arXiv 2603.25743 and its released scripts): learning rate 5e-5, constant; AdamW 0.9, 0.999, 1e-8, weight
decay 0.01; clip 1.0; bfloat16 compute on float32 master weights; alignment of 9 blocks with weight 1; the whole
transformer and the projectors trained; conditioning dropout of a tenth each; 81 frames of 480x832, up to 3
references; 8 GPUs, one example per GPU, batch 8.

Not in the paper or its scripts, so ours and not tuned: 20,000 steps (five passes over the published 32,112 examples),
the held-out examples, no moving average, how the mesh is laid out, the loader's workers, how often it is saved.
"""

from refalign_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, wan_1_3b


def get_config() -> Config:
    """The recipe."""
    return Config(
        model=ModelConfig(dit=wan_1_3b()),
        data=DataConfig(path="data/opens2v", batch_size=8, held_out=8 * 8, num_workers=2),
        optimizer=OptimizerConfig(learning_rate=5e-5),
        mesh=MeshConfig(fsdp=8),
        train=TrainConfig(
            folder="runs/refalign_1_3b_stage1",
            init="weights/Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors",
            steps=20_000,
            save_every=500,
            held_out_every=500,
        ),
    )
