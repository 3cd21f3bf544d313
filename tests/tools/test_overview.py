"""`refalign overview` as a command."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refalign_jax.config import Storage
from refalign_jax.data.colours import principal_colours
from refalign_jax.data.examples import Example
from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.overview import describe, inspect_dataset
from refalign_jax.data.shard_writer import ShardWriter

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def dataset(tmp_path):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "d", storage=Storage(vfm_features="int8"), made={"command": "x"}) as writer:
        for i in range(5):
            R = i % 3
            writer.add(
                Example(
                    id=f"clip-{i}",
                    prompt="a prompt",
                    video_latents=rng.standard_normal((2, 8, 12, 5), np.float32),
                    reference_latents=rng.standard_normal((R, 8, 12, 5), np.float32),
                    subject_ids=np.zeros(R, np.int32),
                    text=rng.standard_normal((4 + i, 16), np.float32),
                    vfm_features=rng.standard_normal((R, 24, 9), np.float32),
                )
            )
    return tmp_path / "d"


def test_description(dataset):
    text = describe(read_manifest(dataset))
    for part in (
        "examples    5 in 1 shards",
        "[2, 8, 12, 5]          bfloat16",
        "[R, 24, 9]             int8",
        "references  0: 2, 1: 2, 2: 1",
        "text tokens 4 to 8, mean 6.0",
        "mean cosine to the given ones 0.9999",
        '"command": "x"',
    ):
        assert part in text


def test_command_describes_verifies_and_draws(dataset):
    """Run by its path, where tools/ comes before the standard library on sys.path."""
    command = [sys.executable, str(TOOLS / "overview.py"), str(dataset), "--verify", "--out", str(dataset / "s.png")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(TOOLS.parent)})
    assert done.returncode == 0, done.stderr
    assert "1 shards are as written" in done.stdout
    sheet = np.asarray(Image.open(dataset / "s.png").convert("RGB"))
    assert sheet.shape[1] > sheet.shape[0] / 3
    assert sheet.std() > 20


def test_no_command_hides_a_module_of_the_standard_library():
    assert not {path.stem for path in TOOLS.glob("*.py")} & sys.stdlib_module_names


def test_faults_are_one_sentence_and_an_exit_code(tmp_path):
    command = [sys.executable, str(TOOLS / "overview.py"), str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(TOOLS.parent)})
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "manifest.json does not exist" in done.stderr


def test_verify_names_the_shard_that_changed(dataset):
    shard = dataset / "examples-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    inspect_dataset(str(dataset))
    with pytest.raises(
        ValueError, match=r"1 of 1 shards are not as written: .*examples-00000.array_record has SHA-256"
    ):
        inspect_dataset(str(dataset), verify=True)


@pytest.mark.parametrize("out", ["sheet.jpg", "no/folder/sheet.png"])
def test_bad_output_is_refused(dataset, out):
    with pytest.raises(ValueError, match=r"name a \.png in a folder that exists"):
        inspect_dataset(str(dataset), out=dataset / out)
    assert not (dataset / out).exists()


def test_principal_colours_find_the_axis_of_variation():
    frames = np.zeros((1, 4, 6, 5), np.float32)
    frames[..., 3] = np.linspace(-5, 5, 6)
    red = principal_colours(frames)[0, 0, :, 0]
    assert np.allclose(np.diff(red), np.diff(red)[0])
    assert {red.min(), red.max()} == {0, 1}
    np.testing.assert_array_equal(principal_colours(np.ones((1, 2, 2, 2), np.float32))[..., 2], 0)
