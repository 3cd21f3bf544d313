"""RefAlign-14B, the mixture: one run over regular pairs of OpenS2V-5M and cross pairs of Phantom-Data, 6:4.

    python tools/train.py configs/refalign_14b_mixture.py --data.mix data/opens2v 6 data/phantom 4 --train.folder RUN

Hardware: 128 devices of 80 GB, 16 of them holding one copy of the state; others by --mesh.* and --data.batch-size.
Several hosts: add --train.distributed and start it on each.
One device of 80 GB holds 6 of the 40 blocks, enough for a try at full width (the state of all, parameters, moments and
gradients in float32, takes 230 GB), with

    --mesh.fsdp 1 --data.batch-size 1 --model.dit.num-layers 6 --model.alignment.num-blocks 4 --train.init ""

Time: not measured. Expected result: the paper's OpenS2V-Eval TotalScore, 60.42; the stages' too.

Published, in the account of the paper's later version (arXiv 2603.25743, by way of a secondary source): one run instead
of two stages, over 200,000 regular pairs of OpenS2V-5M and 160,000 cross pairs of Phantom-Data, mixed 6:4; learning
rate 5e-5; batch 128; 3,000 iterations. As in the released scripts: a constant rate; AdamW 0.9, 0.999, 1e-8, weight
decay 0.01; clip 1.0; bfloat16 compute on float32 master weights; alignment of 9 blocks with weight 1; the whole
transformer and the projectors trained; conditioning dropout of a tenth each; 81 frames of 480x832, up to 3 references.

Not in either, so ours and not tuned: that the ratio holds in every batch, the held-out examples, no moving average, how
the mesh is laid out, the loader's workers, how often it is saved.
"""

from refalign_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, wan_14b


def get_config() -> Config:
    """The recipe."""
    return Config(
        model=ModelConfig(dit=wan_14b()),
        data=DataConfig(
            mix=(("data/opens2v", 6.0), ("data/phantom", 4.0)), batch_size=128, held_out=128, num_workers=2
        ),
        optimizer=OptimizerConfig(learning_rate=5e-5),
        mesh=MeshConfig(fsdp=16),
        train=TrainConfig(
            folder="runs/refalign_14b_mixture",
            init="weights/Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors.index.json",
            steps=3_000,
            save_every=250,
            held_out_every=250,
        ),
    )
