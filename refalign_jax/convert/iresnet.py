"""Names of IR-101, as CurricularFace's backbone is published."""

from __future__ import annotations

from refalign_jax.convert.table import Entry, Layout, Tensors, convolution
from refalign_jax.models.iresnet import IResNetConfig

_NORM = {"mean": "running_mean", "variance": "running_var", "scale": "weight", "bias": "bias"}


def iresnet_config(tensors: Tensors) -> IResNetConfig:
    """Returns IR-101 with the options that a file's tensors show."""
    shapes = tensors.shapes
    return IResNetConfig(
        middle_norm="body.0.res_layer.2.running_mean" in shapes, last_affine="output_layer.4.weight" in shapes
    )


def iresnet_table(config: IResNetConfig) -> list[Entry]:
    """The table of `models.iresnet.init`; read files through `forms.without_counters`."""
    grid, width = config.grid, config.stages[-1][0]
    flattened = Layout(
        lambda x: x.reshape(-1, width, grid, grid).transpose(2, 3, 1, 0),
        lambda x: x.transpose(3, 2, 0, 1).reshape(x.shape[3], -1),
    )
    entries = [
        Entry("stem/kernel", "input_layer.0.weight", convolution(2)),
        *_norm("stem/norm", "input_layer.1"),
        Entry("stem/slope", "input_layer.2.weight"),
        *_norm("last/norm", "output_layer.0"),
        Entry("last/kernel", "output_layer.3.weight", flattened),
        Entry("last/bias", "output_layer.3.bias"),
        *_norm("last/embedding_norm", "output_layer.4", config.last_affine),
    ]
    after = 3 if config.middle_norm else 2  # the number of what follows in the published sequence
    for i, (inputs, outputs, _) in enumerate(config.units()):
        ours, theirs = f"units/{i}", f"body.{i}."
        entries += [
            *_norm(f"{ours}/norm0", f"{theirs}res_layer.0"),
            Entry(f"{ours}/kernel0", f"{theirs}res_layer.1.weight", convolution(2)),
            Entry(f"{ours}/slope", f"{theirs}res_layer.{after}.weight"),
            Entry(f"{ours}/kernel1", f"{theirs}res_layer.{after + 1}.weight", convolution(2)),
            *_norm(f"{ours}/norm2", f"{theirs}res_layer.{after + 2}"),
        ]
        if config.middle_norm:
            entries += _norm(f"{ours}/norm1", f"{theirs}res_layer.2")
        if inputs != outputs:
            entries.append(Entry(f"{ours}/shortcut_kernel", f"{theirs}shortcut_layer.0.weight", convolution(2)))
            entries += _norm(f"{ours}/shortcut_norm", f"{theirs}shortcut_layer.1")
    return entries


def _norm(ours: str, theirs: str, affine: bool = True) -> list[Entry]:
    return [
        Entry(f"{ours}/{name}", f"{theirs}.{published}")
        for name, published in _NORM.items()
        if affine or name in ("mean", "variance")
    ]
