"""From videos to a dataset that the loader reads: shapes, resumption, what is left out and why."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.footage import panned, photograph, write_records

import refalign_jax.data.encode as encode_module
from refalign_jax.config import DataConfig, PrepareConfig, Storage
from refalign_jax.data.clip_frames import resize_and_crop
from refalign_jax.data.clips import Clip, load_clip
from refalign_jax.data.loader import make_loader
from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.prepare import prepare
from refalign_jax.data.records import Record, Reference, Skipped
from refalign_jax.data.shards import ShardSource
from refalign_jax.data.sources.jsonl import read_jsonl
from refalign_jax.data.video import to_float, write_video
from refalign_jax.encoders.open import reopen_video_codec

SMALL = PrepareConfig(
    vae="dct",
    text_encoder="words",
    vfm="daisy",
    height=48,
    width=64,
    num_frames=5,
    stride=2,
    dct_stride=4,
    dct_channels=6,
    word_width=12,
    examples_per_shard=2,
    storage=Storage(video_latents="float32", reference_latents="float32", text="float32", vfm_features="int8"),
)


def change(**changes):
    return dataclasses.replace(SMALL, **changes)


def run(path, out, config=SMALL, source=()):
    return prepare(read_jsonl(path), out, config, dict(source))


def examples(folder):
    source = ShardSource(folder)
    return [source[i] for i in range(len(source))]


def digests(folder):
    return [shard.sha256 for shard in read_manifest(folder).shards]


def skips(folder):
    return [json.loads(line) for line in (Path(folder) / "skipped.jsonl").read_text().splitlines()]


def blocks(frames):
    """Means over time, 8x8 pixels and colours of frames of 48x64."""
    return frames.reshape(-1, 6, 8, 8, 8, 3).mean((0, 2, 4, 5)).ravel()


def test_records_become_examples(tmp_path):
    said = run(write_records(tmp_path), tmp_path / "d", source={"name": "test"})
    assert said == f"3 examples are in {tmp_path / 'd'}, 3 of them new; none was left out."
    manifest = read_manifest(tmp_path / "d")
    assert manifest.spec.video_latents == (2, 12, 16, 6)
    assert (manifest.spec.text_width, manifest.spec.vfm_width, manifest.spec.vfm_tokens) == (12, 108, 48)
    assert manifest.made["encoders"]["video"] == {"name": "dct", "version": 2, "stride": 4, "channels": 6}
    assert manifest.made["settings"]["stride"] == 2
    assert manifest.made["source"] == {"name": "test"}
    assert {"commit", "command", "versions"} <= manifest.made.keys()
    assert np.shape(manifest.made["empty_text"]) == (1, 12)
    assert manifest.vfm_cosine > 0.999
    assert skips(tmp_path / "d") == []

    parsed = examples(tmp_path / "d")
    assert [arrays["subject_ids"].tolist() for arrays, _ in parsed] == [[0], [0, 1], []]
    assert [arrays["text"].shape for arrays, _ in parsed] == [(5, 12)] * 3
    np.testing.assert_array_equal(parsed[0][0]["text"][-1], np.float32(manifest.made["empty_text"][0]))
    assert [about["prompt"] for _, about in parsed] == [f"The {n} moves left." for n in ("astronaut", "cat", "coffee")]
    codec = reopen_video_codec(manifest.made["encoders"]["video"])
    for (arrays, about), name in zip(parsed, ("astronaut", "cat", "coffee"), strict=True):
        frames = about["metadata"]["frames"]
        assert np.diff(frames).tolist() == [2] * 4
        assert about["metadata"]["fps"] == 4
        decoded = codec.decode(arrays["video_latents"][None])[0]
        truth = to_float(resize_and_crop(panned(name)[frames], 48, 64))
        for part in (slice(0, 1), slice(1, 5)):  # six channels hold no motion, but the mean of each group of frames
            assert np.corrcoef(blocks(decoded[part]), blocks(truth[part]))[0, 1] > 0.99
    reference = codec.decode(parsed[1][0]["reference_latents"][1][None, None])[0, 0]
    assert np.abs(reference[:, :18] - 1).max() < 0.01  # the mask is 60x30, fitted to 48x24 of 48x64
    assert reference[:, 24:40].mean() < 0.5
    patches = parsed[1][0]["subject_mask"][1].reshape(6, 8)
    assert patches[:, 3:5].all()
    assert not patches[:, [0, 1, 6, 7]].any()
    assert parsed[2][0]["subject_mask"].shape == (0, 48)


def test_the_loader_reads_it(tmp_path):
    run(write_records(tmp_path), tmp_path / "d")
    config = DataConfig(path=str(tmp_path / "d"), batch_size=3, max_references=3, text_length=16)
    loader = make_loader(config, ShardSource(tmp_path / "d"))
    batch = next(loader)
    loader.close()
    assert batch["video_latents"].shape == (3, 2, 12, 16, 6)
    assert sorted(batch["num_references"].tolist()) == [0, 1, 2]
    assert batch["vfm_features"].shape == (3, 3, 48, 108)


@pytest.mark.parametrize("config", [SMALL, change(batch_size=2, workers=3), change(batch_size=5)])
def test_same_records_same_bytes_however_they_are_batched(tmp_path, config):
    path = write_records(tmp_path)
    run(path, tmp_path / "a")
    run(path, tmp_path / "b", config)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    run(path, tmp_path / "c", dataclasses.replace(config, seed=1))
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_an_interrupted_run_goes_on_to_the_same_dataset(tmp_path, monkeypatch):
    path = write_records(tmp_path)
    run(path, tmp_path / "whole", change(examples_per_shard=1))
    encode, calls = encode_module.encode, []

    def fails_at_the_third(clips, encoders):
        calls.append(clips[0].record.id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(clips, encoders)

    monkeypatch.setattr(encode_module, "encode", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "d", change(examples_per_shard=1))
    assert not read_manifest(tmp_path / "d").complete
    assert "3 examples are in" in run(path, tmp_path / "d", change(examples_per_shard=1))
    assert calls[3:] == calls[2:3]  # the third alone was made again
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")
    assert "0 of them new" in run(path, tmp_path / "d", change(examples_per_shard=1))
    assert len(calls) == 4


def test_going_on_with_other_settings_is_refused(tmp_path):
    path = write_records(tmp_path)
    run(path, tmp_path / "d")
    for config, message in [
        (change(stride=1), r"was begun with stride=2, not 1; give the same, or name another folder"),
        (change(seed=3), r"begun with seed=0, not 3"),
        (change(stride=1, fps=4.0), r"begun with fps=0\.0, not 4\.0"),
        (change(word_width=13), r"was made with the encoders"),
        (change(storage=Storage()), r"holds examples stored as"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(path, tmp_path / "d", config)


def faulty(tmp_path):
    """Records of which only the second is good, and the reason for each other one."""
    write_records(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.png").write_text("no image")
    half = (tmp_path / "cat.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(half[: len(half) // 2])
    write_video(tmp_path / "short.mp4", panned("cat", 4), fps=8)
    cat = {"image": "cat.png"}
    rows = [
        ("text.mp4", [cat], "the video can't be read", "text.mp4 can't be decoded"),
        ("cat.mp4", [cat], "", ""),
        ("none.mp4", [cat], "the video can't be read", "none.mp4 does not exist"),
        ("half.mp4", [cat], "the video can't be read", "half.mp4 is truncated: "),
        ("short.mp4", [cat], "fewer than 5 frames", "short.mp4 has 4 frames of the clip; 5 are needed."),
        ("cat.mp4", [cat, {"image": "text.png"}], "a reference can't be read", "text.png is not an image"),
        ("cat.mp4", [{"image": "none.png"}], "a reference can't be read", "none.png does not exist"),
        ("cat.mp4", [cat | {"mask": "none.png"}], "a reference can't be read", "none.png does not exist"),
        ("coffee.mp4", [cat | {"mask": "mask.png"}], "a reference can't be read", "is 5x4, the image 128x96."),
    ]
    Image.new("L", (5, 4), 255).save(tmp_path / "mask.png")
    lines = [{"video": video, "prompt": "", "references": references} for video, references, _, _ in rows]
    (tmp_path / "faulty.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "faulty.jsonl", [(reason, detail) for _, _, reason, detail in rows if reason]


def test_what_can_not_be_used_is_left_out_with_its_reason(tmp_path):
    path, expected = faulty(tmp_path)
    said = run(path, tmp_path / "d")
    assert said.endswith(
        "1 of them new; 8 left out (4 a reference can't be read, 3 the video can't be read, 1 fewer than 5 frames; "
        "see skipped.jsonl)."
    )
    found = skips(tmp_path / "d")
    assert [entry["reason"] for entry in found] == [reason for reason, _ in expected]
    for entry, (_, detail) in zip(found, expected, strict=True):
        assert detail in entry["detail"]
        assert entry["detail"].endswith(".")
    assert len(ShardSource(tmp_path / "d")) == 1
    write_video(tmp_path / "short.mp4", panned("cat", 7), fps=8)
    assert "2 examples are in" in run(path, tmp_path / "d")  # what was mended is tried again
    assert len(skips(tmp_path / "d")) == 7


def test_nothing_left_is_an_error_and_no_dataset(tmp_path):
    write_records(tmp_path)
    (tmp_path / "r.jsonl").write_text('{"video": "none.mp4", "prompt": "", "references": []}')
    with pytest.raises(ValueError, match=r"No record became an example .*1 left out .*The first: .*none\.mp4 does not"):
        run(tmp_path / "r.jsonl", tmp_path / "d")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["skipped.jsonl"]


def test_a_source_may_leave_clips_out(tmp_path):
    records = read_jsonl(write_records(tmp_path))
    records[1] = Skipped(id="b", reason="no good reference")
    assert "2 of them new; 1 left out (1 no good reference;" in prepare(records, tmp_path / "d", SMALL, {})


def test_latents_that_are_not_finite_are_left_out(tmp_path, monkeypatch):
    encode = encode_module.encode

    def one_is_broken(clips, encoders):
        made = encode(clips, encoders)
        return [
            dataclasses.replace(example, text=example.text * np.nan) if example.id.startswith("cat") else example
            for example in made
        ]

    monkeypatch.setattr(encode_module, "encode", one_is_broken)
    said = run(write_records(tmp_path), tmp_path / "d", change(batch_size=3))
    assert "2 of them new; 1 left out (1 the encoders gave NaN or infinity;" in said


def test_parts_make_one_dataset(tmp_path):
    path = write_records(tmp_path)
    run(path, tmp_path / "whole")
    assert "1 of 2 parts are missing: part-00001-of-00002." in run(path, tmp_path / "d", change(part=(2, 2)))
    with pytest.raises(ValueError, match="manifest"):
        ShardSource(tmp_path / "d")
    said = run(path, tmp_path / "d", change(part=(1, 2)))
    assert said.endswith(f" All 2 parts are ready: 3 examples in {tmp_path / 'd'}.")
    whole = {about["id"]: arrays for arrays, about in examples(tmp_path / "whole")}
    parts = {about["id"]: arrays for arrays, about in examples(tmp_path / "d")}
    assert whole.keys() == parts.keys()
    for id, arrays in whole.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, parts[id][name], err_msg=f"{id} {name}")
    (tmp_path / "d" / "part-00001-of-00002" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="made with different settings"):
        run(path, tmp_path / "d", change(part=(1, 2), seed=9))


def test_frames_crops_and_references_out_of_videos(tmp_path):
    write_records(tmp_path)
    mask = np.zeros((40, 50), bool)
    mask[5:30, 5:20] = True
    video = tmp_path / "cat.mp4"
    record = Record(
        id="x",
        video=video,
        prompt="",
        frames=(2, 9),
        crop=(10, 4, 70, 50),
        references=(
            Reference(path=video, frame=3, crop=(8, 8, 58, 48), mask=mask, own_clip=True),
            Reference(path=video, frame=3, crop=(8, 8, 58, 48), mask=mask, subject="s"),
            Reference(path=tmp_path / "cat.png", box=(0, 0, 64, 96), subject="s"),
            Reference(path=tmp_path / "left out.png"),
        ),
        metadata={"key": 1},
    )
    clip = load_clip(record, SMALL)
    assert isinstance(clip, Clip)
    assert clip.metadata["frames"][0] == 2  # 7 frames there, spread evenly
    assert clip.metadata["frames"][-1] == 8
    assert clip.metadata["key"] == 1
    assert clip.subject_ids.tolist() == [0, 1, 1]
    altered, plain, image = clip.references
    assert np.abs(altered.astype(int) - plain).mean() > 2
    assert (plain[:, :15] == 255).all()
    assert (plain[:, 20:40] < 250).any(-1).mean() > 0.9
    truth = photograph("cat")[:, :64].mean((0, 1))
    np.testing.assert_allclose(image[:, 16:48].mean((0, 1)), truth, atol=3)
    short = load_clip(dataclasses.replace(record, frames=(9, 99)), SMALL)
    assert isinstance(short, Skipped)
    assert "has 3 frames of the clip" in short.detail


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 16}, r"num_frames=16 must be 4k\+1, such as 17"),
        ({"stride": 0}, r"stride=0 must be at least 1"),
        ({"part": (3, 2)}, r"part=\(3, 2\) must be two numbers, the first from 1 to the second"),
        ({"height": 50}, r"The size is 50x64; .* both must be multiples of 8"),
        ({"dct_channels": 99}, r"99 channels"),
        ({"vae": "nowhere"}, r"--vae 'nowhere' does not exist; give"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, changes, message):
    path = write_records(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(path, tmp_path / "d", change(**changes))
    assert not (tmp_path / "d").exists()


def test_a_vfm_of_another_patch_is_refused(tmp_path):
    weights = Path(__file__).parents[1] / "golden" / "encoders_a"
    (tmp_path / "vfm").mkdir()
    (tmp_path / "vfm" / "config.json").write_bytes((weights / "dinov3.json").read_bytes())
    (tmp_path / "vfm" / "m.safetensors").write_bytes((weights / "dinov3.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"patches are 16 pixels, the codec's stride 4; .* patches of 8"):
        run(write_records(tmp_path), tmp_path / "d", change(vfm=str(tmp_path / "vfm")))
