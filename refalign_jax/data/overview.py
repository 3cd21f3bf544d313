"""What a prepared dataset contains, as text and as a picture.

The contact sheet needs no decoder: it shows latents as principal colours. It has one row per example, with the middle
latent frame of the video and then each reference, in the same colours.
"""

from __future__ import annotations

import collections
import json
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from refalign_jax.atomic import atomic_write
from refalign_jax.config import FIELDS, AlignmentConfig
from refalign_jax.data.colours import principal_colours
from refalign_jax.data.examples import MASK, fill
from refalign_jax.data.manifest import Manifest, read_manifest
from refalign_jax.data.shards import ShardSource, verify_shards
from refalign_jax.data.targets import PUSH_EXAMPLES, remaining_pushes


def describe(manifest: Manifest) -> str:
    """Returns lines on counts, shapes, dtypes, references and text lengths."""
    shards, spec = manifest.shards, manifest.spec
    F, H, W, C = spec.video_latents
    shapes = {
        "video_latents": f"[{F}, {H}, {W}, {C}]",
        "reference_latents": f"[R, {H}, {W}, {C}]",
        "text": f"[S, {spec.text_width}]",
        "vfm_features": f"[R, {spec.vfm_tokens}, {spec.vfm_width}]",
    }
    size = sum(shard.bytes for shard in shards)
    lines = [
        f"examples    {manifest.num_examples} in {len(shards)} shards, {size / 1e9:.3f} GB"
        + ("" if manifest.complete else "; unfinished"),
        *(f"{name:18s} {shapes[name]:22s} {getattr(manifest.storage, name)}" for name in FIELDS),
        f"{MASK:18s} " + (f"[R, {spec.vfm_tokens}]" if spec.subject_mask else "not known"),
        f"stored VFM targets, mean cosine to the given ones {manifest.vfm_cosine:.6f}",
    ]
    references = collections.Counter(count for shard in shards for count in shard.references)
    lines.append("references  " + ", ".join(f"{count}: {references[count]}" for count in sorted(references)))
    lengths = np.array([length for shard in shards for length in shard.text_lengths] or [0])
    lines.append(f"text tokens {lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}")
    made = {name: value for name, value in manifest.made.items() if name != "empty_text"}  # thousands of numbers
    lines.append("made        " + json.dumps(made))
    return "\n".join(lines)


def contact_sheet(source: ShardSource, rows: int) -> Figure:
    """Draws `rows` examples, spread evenly over the dataset.

    Raises:
      ValueError: one of them can't be read.
    """
    indices = np.unique(np.linspace(0, len(source) - 1, rows).round().astype(int))
    columns = 1 + source.spec.most_references
    _, H, W, _ = source.spec.video_latents
    figure = Figure(figsize=(2.6 * columns, (2.6 * H / W + 0.55) * len(indices)), dpi=120, layout="constrained")
    grid = figure.subplots(len(indices), columns, squeeze=False)
    for axes, index in zip(grid, indices.tolist(), strict=True):
        arrays, about = source[index]
        middle = len(arrays["video_latents"]) // 2
        frames = np.empty((1 + len(arrays["subject_ids"]), *arrays["video_latents"].shape[1:]), np.float32)
        frames[0] = arrays["video_latents"][middle]
        fill(frames[1:], arrays, "reference_latents")
        titles = [f"{about['id']}\n{textwrap.shorten(about['prompt'], 40, placeholder=' …')}"]
        titles += [f"reference {i}\nsubject {subject}" for i, subject in enumerate(arrays["subject_ids"])]
        for place in axes:
            place.axis("off")
        for place, image, title in zip(axes, principal_colours(frames), titles, strict=False):
            place.imshow(image, interpolation="nearest")
            # Not as a formula where it holds dollars; half of a surrogate pair has no glyph.
            drawable = title.encode("utf-8", "replace").decode()
            place.set_title(drawable, fontsize=7, parse_math=False)
    return figure


def inspect_dataset(
    dataset: str, *, verify: bool = False, out: Path | None = None, rows: int = 6, push_examples: int = PUSH_EXAMPLES
) -> None:
    """Prints what a prepared dataset contains, and the push that remains at perfect alignment on it.

    Args:
      dataset: its folder, local or gs://.
      verify: read every shard and compare its SHA-256 with the manifest's.
      out: PNG file to write a contact sheet to.
      rows: number of examples on the contact sheet.
      push_examples: largest number of examples from which the remaining push is computed; 0 for all.

    Raises:
      ValueError: no such dataset, one whose shards are not as they were written, or a file that can't be a PNG.
    """
    manifest = read_manifest(dataset)
    if push_examples < 0:
        raise ValueError(f"--push-examples {push_examples} must be 0, for all, or more.")
    print(describe(manifest))
    if manifest.complete and manifest.num_examples:
        try:
            print(remaining_pushes(ShardSource(dataset), AlignmentConfig(), push_examples))
        except ValueError as error:  # finding damaged shards is what `verify` is for
            print(f"push        can't be computed: {error}")
    if verify:
        problems = verify_shards(dataset)
        if problems:
            raise ValueError(f"{len(problems)} of {len(manifest.shards)} shards are not as written: {problems[0]}")
        print(f"verified    {len(manifest.shards)} shards are as written")
    if out is not None:
        if out.suffix != ".png" or not out.parent.is_dir() or rows < 1:
            raise ValueError(f"--out {out} with --rows {rows}: name a .png in a folder that exists, and 1 row or more.")
        figure = contact_sheet(ShardSource(dataset), rows)
        with atomic_write(out) as temporary:
            figure.savefig(temporary, format="png")
        print(f"wrote       {out}")
