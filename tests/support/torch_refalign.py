"""RefAlign in plain torch under the published names, to make folders of values for `tools/verify.py`.

Written from docs/method.md, not from our code: sequence-first attention over one concatenated sequence, complex
rotations, one sample at a time for the loss.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k, self.heads = RMSNorm(width, eps), RMSNorm(width, eps), heads

    def forward(self, x, context, turn=None):
        def split(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.norm_q(self.q(x))), split(self.norm_k(self.k(context))), split(self.v(context))
        if turn is not None:
            q, k = (
                torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2) for y in (q, k)
            )
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        D, eps = c["dim"], c["eps"]
        self.self_attn, self.cross_attn = (Attention(D, c["num_heads"], eps) for _ in range(2))
        self.norm3 = nn.LayerNorm(D, eps)
        self.ffn = nn.Sequential(nn.Linear(D, c["ffn_dim"]), nn.GELU("tanh"), nn.Linear(c["ffn_dim"], D))
        self.modulation = nn.Parameter(torch.zeros(1, 6, D))

    def forward(self, x, time, text, turn, length):
        shift1, scale1, gate1, shift2, scale2, gate2 = (time + self.modulation).chunk(6, 1)

        def norm(y):
            return functional.layer_norm(y, y.shape[-1:], eps=self.norm3.eps)

        y = norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.self_attn(y, y, turn)
        video, reference = x[:, :length], x[:, length:]
        video = video + self.cross_attn(self.norm3(video), text)
        x = torch.cat([video, reference], 1)
        return x + gate2 * self.ffn(norm(x) * (1 + scale2) + shift2)


class Head(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.head = nn.Linear(c["dim"], 4 * c["out_dim"])
        self.modulation = nn.Parameter(torch.zeros(1, 2, c["dim"]))


class RefAlign(nn.Module):
    """`config` is a folder's config.json; without `align_blocks` there are no projectors."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.c = c = config
        D = c["dim"]
        self.patch_embedding = nn.Conv3d(c["in_dim"], D, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(c["text_dim"], D), nn.GELU("tanh"), nn.Linear(D, D))
        self.time_embedding = nn.Sequential(nn.Linear(c["freq_dim"], D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["num_layers"]))
        for block in list(self.blocks)[: c.get("align_blocks", 0)]:
            block.input_mlp = nn.Module()
            half, E = D // 2, c["vfm_dim"]
            block.input_mlp.proj = nn.Sequential(
                nn.Linear(D, half, bias=False), nn.SiLU(), nn.Linear(half, E, bias=False)
            )
        self.head = Head(c)

    def turn(self, grids):
        """Rotations of the tokens of several grids, (frames, rows, columns), one after the other in time."""
        K = self.c["dim"] // self.c["num_heads"]
        widths, parts, start = (K - 2 * (K // 3), K // 3, K // 3), [], 0
        for grid in grids:
            places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).reshape(-1, 3).double()
            places[:, 0] += start
            start += grid[0]
            angles = [places[:, i, None] * 1e4 ** (-torch.arange(0, w, 2).double() / w) for i, w in enumerate(widths)]
            parts.append(torch.cat(angles, -1))
        angles = torch.cat(parts)
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def forward(self, x, t, text, references=None):
        """Velocity [B, C, F, H, W], and the reference tokens after each block."""
        c = self.c
        patches = [self.patch_embedding(y) for y in (x, references) if y is not None]
        grids = [p.shape[2:] for p in patches]
        tokens = torch.cat([p.flatten(2).transpose(1, 2) for p in patches], 1)
        length, turn = math.prod(grids[0]), self.turn(grids)
        half = c["freq_dim"] // 2
        angle = t.double()[:, None] * 1e4 ** (-torch.arange(half).double() / half)
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()], -1).float())
        time, words = self.time_projection(e).unflatten(1, (6, -1)), self.text_embedding(text)
        features = []
        for block in self.blocks:
            tokens = block(tokens, time, words, turn, length)
            features.append(tokens[:, length:])
        shift, scale = (e[:, None] + self.head.modulation).chunk(2, 1)
        video = functional.layer_norm(tokens[:, :length], tokens.shape[-1:], eps=c["eps"]) * (1 + scale) + shift
        f, h, w = grids[0]
        y = self.head.head(video).reshape(-1, f, h, w, 2, 2, c["out_dim"])
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape), features


def table(shift=5.0, dtype=torch.float32):
    """Times and weights of the training schedule, computed in `dtype`, as a framework in float32 does."""
    sigma = torch.linspace(1, 0, 1001, dtype=dtype)[:-1]
    t = 1000 * (shift * sigma / (1 + (shift - 1) * sigma))
    y = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    y = y - y.min()
    return t, y * (1000 / y.sum())


def pull_push(student, teacher, subjects):
    """[total, pull, push] of tokens [subjects·P, E]."""
    s, f = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
    cosine = s @ f.T
    pull = (1 - cosine.diagonal()).clamp(min=0).mean()
    owner = torch.arange(subjects).repeat_interleave(len(s) // subjects)
    others = cosine[owner[:, None] != owner[None]]
    push = others.clamp(min=0).mean() if len(others) else torch.zeros(())
    return pull + push, pull, push


def step(model, inputs, index, times):
    """Values of one training step at a schedule index, by their names in values.npz, and the loss."""
    t, w = (x[index].float().reshape(1) for x in times)
    sigma, x0, noise = t / 1000, inputs["video_latents"], inputs["noise"]
    noisy, target = (1 - sigma) * x0 + sigma * noise, noise - x0
    velocity, features = model(noisy, t, inputs["text"], inputs.get("reference_latents"))
    mse = functional.mse_loss(velocity, target)
    gate, aligned = (t[0] / 1000) ** 3, model.c.get("align_blocks", 0)
    total = pull = push = torch.zeros(())
    if aligned:
        teacher = inputs["vfm_features"].flatten(2).transpose(1, 2)[0]  # [R·P, E]
        R = inputs["vfm_features"].shape[2]
        terms = [
            pull_push(block.input_mlp.proj(tokens[0]), teacher, R)
            for block, tokens in zip(list(model.blocks)[:aligned], features, strict=False)
        ]
        total, pull, push = (sum(parts) / aligned for parts in zip(*terms, strict=True))
    loss = w[0] * mse + gate * total
    scalars = {"mse": mse, "weight": w[0], "gate": gate, "loss": loss}
    if aligned:
        scalars |= {"ra_total(pos+neg)": total, "ra_pos": pull, "ra_neg": push}
    values = {"timestep": t, "noisy": noisy, "target": target, "velocity": velocity}
    if aligned:
        values["ref_features"] = torch.stack(features[:aligned])
    return values, scalars, loss


def write_folder(folder: Path, model, inputs, *, indices=(0, 600, 999), adamw=0, times=None) -> Path:
    """Writes a folder of values: schedule, velocities, steps with gradients, and steps of AdamW."""
    folder.mkdir(parents=True, exist_ok=True)
    times = times or table()
    values = {**inputs, "train_timesteps": times[0].float(), "train_weights": times[1].float()}
    config = dict(model.c)
    with torch.no_grad():
        R = inputs["reference_latents"].shape[2] if "reference_latents" in inputs else 0
        for count in range(R + 1):
            references = inputs["reference_latents"][:, :, :count] if count else None
            v, _ = model(inputs["video_latents"], torch.tensor([437.5]), inputs["text"], references)
            values[f"velocity_t437.5_refs{count}"] = v
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, folder / "weights.safetensors")
    for index in indices:
        found, scalars, loss = step(model, inputs, index, times)
        values |= {f"step{index}_{name}": x for name, x in found.items()}
        values[f"step{index}_scalars"] = torch.stack(list(scalars.values()))
        config["scalars"] = list(scalars)
        model.zero_grad()
        loss.backward()
        save_file(gradients(model), folder / f"grads_step{index}.safetensors")
    if adamw:
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-5), []
        for _ in range(adamw):
            loss = step(model, inputs, 300, times)[2]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        values["adamw_losses"] = torch.stack(losses)
        after = {n: p.detach().clone() for n, p in model.named_parameters()}
        save_file(after, folder / f"weights_after_{adamw}_adamw.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    np.savez(folder / "values.npz", **{n: x.detach().numpy() for n, x in values.items()})
    return folder


def gradients(model):
    return {
        n: (torch.zeros_like(p) if p.grad is None else p.grad).detach().clone() for n, p in model.named_parameters()
    }


def make_model(config: dict, std: float = 0.1, seed: int = 0) -> RefAlign:
    """A model with normal weights of a standard deviation; norms are around 1."""
    torch.manual_seed(seed)
    model = RefAlign(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, std)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def make_inputs(config: dict, references: int = 2, grid=(2, 4, 6), text: int = 5, seed: int = 0) -> dict:
    """Random inputs of one sample; without references, plain text-to-video."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    F, H, W = grid
    inputs = {
        "video_latents": normal(1, config["in_dim"], F, H, W),
        "noise": normal(1, config["in_dim"], F, H, W),
        "text": normal(1, text, config["text_dim"]),
    }
    if references:
        inputs["reference_latents"] = normal(1, config["in_dim"], references, H, W)
        if config.get("align_blocks"):
            inputs["vfm_features"] = normal(1, config["vfm_dim"], references, H // 2, W // 2)
    return inputs
