"""Writes values of a Wan transformer in PyTorch for `refalign verify`; needs torch, numpy, safetensors and diffusers.

    python dump_torch.py OUT tiny                 a tiny WanTransformer3DModel with random weights
    python dump_torch.py OUT 1.3b                 a random one of the full shape: 3 GB on disk, 8 GB of memory
    python dump_torch.py OUT FOLDER               diffusers' weights; verify with --weights FOLDER

Published code (Wan2.1, RefAlign): import this file in the script that loads the model, and call for example

    dump(model, Path("out"), lambda x, t, text, refs: torch.stack(model(list(x), t, list(text), seq_len)))
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

RANDOM = {
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "ffn_dim": 40, "num_layers": 2},
    "1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
}
OPERATIONS = {"attention": ("self_attn", "attn1"), "cross_attention": ("cross_attn", "attn2"), "ffn": ("ffn", "ffn")}


def dump(model, out, predict, references=0, grid=(3, 8, 12), text_width=4096, index=600):
    """Writes velocities with what each block computed and, without references, a step's loss and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"video_latents": grid, "noise": grid, "reference_latents": (references, *grid[1:])}
    inputs = {name: torch.randn(1, 16, *shape, generator=generator) for name, shape in shapes.items() if shape[0]}
    inputs["text"] = torch.randn(1, 16, text_width, generator=generator)
    heads = getattr(model, "num_heads", None) or model.config.num_attention_heads
    config, values, seen = {"num_heads": heads, "scalars": ["mse", "weight", "loss"]}, dict(inputs), {}

    def keep(name):
        return lambda module, args, y: seen.setdefault(name, []).append((y[0] if isinstance(y, tuple) else y).detach())

    hooks = [block.register_forward_hook(keep("blocks")) for block in model.blocks]
    for name, (published, diffusers) in OPERATIONS.items():
        parts = [getattr(block, published if hasattr(block, published) else diffusers) for block in model.blocks]
        hooks += [part.register_forward_hook(keep(name)) for part in parts]
    run, clean = f"velocity_t500_refs{references}", inputs.get("reference_latents")
    with torch.no_grad():
        values[run] = predict(inputs["video_latents"], torch.tensor([500.0]), inputs["text"], clean)
    values |= {f"{run}_{name}": torch.stack(layers) for name, layers in seen.items()}
    for hook in hooks:
        hook.remove()
    if not references and sum(p.numel() for p in model.parameters()) < 200e6:
        u = 1 - torch.arange(1000, dtype=torch.float64) / 1000
        times = 1000 * 5 * u / (1 + 4 * u)  # the shift of 5, once
        weights = torch.exp(-2 * ((times - 500) / 1000) ** 2)
        weights = (weights - weights.min()) * 1000 / (weights - weights.min()).sum()
        t, w = times[index].float().reshape(1), weights[index].float()
        noisy = (1 - t / 1000) * inputs["video_latents"] + t / 1000 * inputs["noise"]
        velocity = predict(noisy, t, inputs["text"], None)
        mse = (velocity - (inputs["noise"] - inputs["video_latents"])).square().mean()
        (w * mse).backward()
        save_file({n: p.grad.contiguous() for n, p in model.named_parameters()}, out / f"grads_step{index}.safetensors")
        step = {"timestep": t, "noisy": noisy, "velocity": velocity, "scalars": torch.stack([mse, w, w * mse])}
        values |= {f"step{index}_{name}": x.detach() for name, x in step.items()}
    (out / "config.json").write_text(json.dumps(config))
    np.savez(out / "values.npz", **{name: x.float().cpu().numpy() for name, x in values.items()})


if __name__ == "__main__":
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    out, kind = Path(sys.argv[1]), sys.argv[2]
    out.mkdir(parents=True, exist_ok=True)
    random = kind in RANDOM
    if random:
        model = WanTransformer3DModel(**RANDOM[kind])
    else:
        model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(kind))
        model.load_state_dict({n: x for path in Path(kind).glob("*.safetensors") for n, x in load_file(path).items()})
    model = model.float().eval()
    if random:
        for parameter in model.parameters():  # so that they can be saved in half the size; buffers are the rotary table
            parameter.data = parameter.data.bfloat16().float()
        save_file({n: x.bfloat16().contiguous() for n, x in model.state_dict().items()}, out / "weights.safetensors")
    width = model.config.text_dim
    dump(model, out, lambda x, t, text, _: model(x, t, text, return_dict=False)[0], text_width=width)
