"""Checkpoints know their contents: every reader refuses damage by file and array, and nothing else as damage."""

import functools
import hashlib
import json
import logging
import random
import shutil
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts
from support.runs import MODEL, recipe

from refalign_jax import locks
from refalign_jax.config import Config
from refalign_jax.convert import checkpoint as checkpoint_module
from refalign_jax.convert import checksums
from refalign_jax.convert.checkpoint import ARRAYS, JSONS, load_params, open_params, read_json, save_params
from refalign_jax.convert.checksums import DamagedError, check_digests, hash_blocks, write_digests
from refalign_jax.convert.load import initial_params
from refalign_jax.convert.transfer import export_weights
from refalign_jax.devices import check_backend
from refalign_jax.sharding import make_mesh
from refalign_jax.soak.flips import flip_checkpoint
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.loop import train
from refalign_jax.trainer.state import begin, save, state_shapes

ITEMS = (*ARRAYS, *JSONS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with checkpoints 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    config = recipe(folder)
    with Checkpoints(folder / "checkpoints", 2) as checkpoints:
        state, _ = begin(config, make_mesh(config.mesh), checkpoints)
        for step in (3, 6):
            save(state._replace(step=np.int32(step)), {}, config, {}, checkpoints)
    return folder


@pytest.fixture
def damaged(run, tmp_path):
    """A copy of the run, and a function that flips one bit of the largest value of an item of checkpoint 6."""
    shutil.copytree(run, tmp_path / "run")

    def flip(item):
        folder = tmp_path / "run/checkpoints/6" / item
        _, name, start, length = max(values(folder), key=lambda value: value[3])
        change(folder / name, 8 * (start + length // 2))
        return folder / name

    return tmp_path / "run", flip


def values(item):
    """Key, file, offset and length of the values of an item that lie in data files."""
    return list(checksums.stored_values(ts.KvStore.open(f"file://{item}/").result()))


def change(path, bit):
    """Flips a bit of a file."""
    values = bytearray(path.read_bytes())
    values[bit // 8] ^= 1 << bit % 8
    path.write_bytes(values)


def restore(folder, **train):
    config = recipe(folder, **train)
    with Checkpoints(folder / "checkpoints", 2, config.train.verify_checkpoints) as checkpoints:
        return begin(config, make_mesh(config.mesh), checkpoints)


def placed():
    config = Config(model=MODEL)
    return state_shapes(config, make_mesh(config.mesh)).params


@pytest.mark.parametrize("item", ARRAYS)
def test_a_flipped_bit_is_refused_by_file_and_array_and_read_only_if_asked_for(damaged, item):
    folder, flip = damaged
    path = flip(item)
    with pytest.raises(ValueError, match=rf"6 can't be restored .*{path.name} is damaged in .*kernel.*from step 3\."):
        restore(folder)
    restore(folder, verify_checkpoints=False)


def test_sampling_and_export_refuse_damaged_parameters(damaged, tmp_path):
    folder, flip = damaged
    path = flip("params")
    for read in (
        lambda: initial_params(str(folder), False, MODEL, placed(), jax.random.key(0)),
        lambda: load_params(folder),
        lambda: open_params(folder),
        lambda: export_weights(folder, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(DamagedError, match=rf"{path.name} is damaged in dit\..*\.$"):
            read()
    assert not list(tmp_path.glob("*out*"))
    load_params(folder, ema=True)
    load_params(folder, verify=False)


def test_the_array_is_the_one_that_lies_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 64)
    save_params(tmp_path / "p", {"dit": {name: np.full((3, 100, 100), 1.5) for name in "abcd"}}, MODEL)
    found = values(tmp_path / "p/params")
    assert {key.partition("/")[0] for key, *_ in found} == {"dit.a", "dit.b", "dit.c", "dit.d"}
    for key, name, start, length in found:
        place = 8 * (start + length // 2)
        change(tmp_path / "p/params" / name, place)
        with pytest.raises(DamagedError, match=rf"damaged in {key.partition('/')[0]}: "):
            load_params(tmp_path / "p")
        change(tmp_path / "p/params" / name, place)


def test_no_single_bit_of_any_file_passes(run, tmp_path):
    folder = tmp_path / "6"
    shutil.copytree(run / "checkpoints/6", folder)
    rng = random.Random(0)
    files = [path for item in ITEMS for path in (folder / item).rglob("*") if path.is_file()]
    files = [path for path in files if path.name != "commit_success.txt"]
    for index in range(300):
        path = files[index % len(files)]
        bit = rng.randrange(8 * path.stat().st_size)
        change(path, bit)
        with pytest.raises(DamagedError):
            check_digests(folder, ITEMS)
        change(path, bit)
    check_digests(folder, ITEMS)


def test_bits_that_are_flipped_are_not_restored(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    refused, faults = flip_checkpoint(tmp_path / "run", 45, random.Random(1))
    assert faults == []
    assert refused >= 32  # Orbax's marks hold nothing that is read


@pytest.mark.parametrize("length", [0, -1, 5])
def test_files_that_are_longer_or_shorter_are_refused(damaged, length):
    folder, _ = damaged
    path = folder / "checkpoints/6/optimizer/_METADATA"
    whole = path.read_bytes()
    path.write_bytes(whole + b" " * length if length > 0 else whole[:length])
    with pytest.raises(DamagedError, match="_METADATA is damaged"):
        check_digests(folder / "checkpoints/6", ITEMS)


def test_each_process_checks_its_share(run, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(checksums, "BLOCKS_PER_READ", 2)
    item = run / "checkpoints/3/params"
    before = (item / checksums.FILE).read_bytes()
    write_digests(item)
    read, hashed = [], checksums.hash_blocks
    monkeypatch.setattr(
        checksums, "hash_blocks", lambda item, reads, *hash: read.append(reads) or hashed(item, reads, *hash)
    )
    for index in range(3):
        check_digests(item.parent, ["params"], share=(index, 3))
    check_digests(item.parent, ["params"])
    assert sorted(read[0] + read[1] + read[2]) == sorted(read[3])
    (item / checksums.FILE).write_bytes(before)


def test_sha256_of_older_checkpoints_is_checked(damaged, monkeypatch):
    folder, flip = damaged
    monkeypatch.setattr(checksums, "KEY", "sha256_of_4_mib_blocks")
    monkeypatch.setattr(
        checksums, "hash_blocks", functools.partial(hash_blocks, digest=checksums.HASHES[checksums.KEY])
    )
    for item in ITEMS:
        (folder / "checkpoints/6" / item / checksums.FILE).unlink()
        write_digests(folder / "checkpoints/6" / item)
    monkeypatch.undo()
    values = json.loads((folder / "checkpoints/6/config" / checksums.FILE).read_text())
    content = (folder / "checkpoints/6/config/metadata").read_bytes()
    assert values == {"sha256_of_4_mib_blocks": {"metadata": [hashlib.sha256(content).hexdigest()]}}
    check_digests(folder / "checkpoints/6", ITEMS)
    path = flip("params")
    with pytest.raises(DamagedError, match=f"{path.name} is damaged"):
        check_digests(folder / "checkpoints/6", ITEMS)


def test_a_checkpoint_without_digests_is_restored_with_one_line(damaged, caplog):
    folder, _ = damaged
    for path in folder.rglob(checksums.FILE):
        path.unlink()
    with caplog.at_level(logging.WARNING, "refalign_jax"):
        restore(folder)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("refalign_jax")]
    assert line.endswith(
        "checkpoints/6 has no digests of its params, ema, optimizer, config, progress; they are read unchecked."
    )


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(damaged):
    folder, _ = damaged
    (folder / "checkpoints/6").rename(folder / "checkpoints/7")
    with pytest.raises(ValueError, match=r"7 can't be restored \(it is of step 6, not 7\); remove that folder"):
        restore(folder)


def test_only_damage_is_called_damage(run, monkeypatch):
    faults = [
        (PermissionError(13, "Permission denied", "x"), PermissionError, "^x can't be read: Permission denied"),
        (ValueError('PERMISSION_DENIED: Error opening "zarr" driver'), OSError, "PERMISSION_DENIED"),
        (MemoryError(), MemoryError, "^$"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), jax.errors.JaxRuntimeError, "Out of memory"),
    ]
    for fault, kind, message in faults:

        def fail(*_, fault=fault, **__):
            raise fault

        monkeypatch.setattr("refalign_jax.trainer.checkpoint.ocp.CheckpointManager.restore", fail)
        monkeypatch.setattr("refalign_jax.convert.checkpoint.ocp.Checkpointer.restore", fail)
        for read in (
            lambda: restore(run),
            lambda: load_params(run),
            lambda: read_json(run / "checkpoints/6", "config"),
        ):
            with pytest.raises(kind, match=message) as error:
                read()
            assert "remove" not in str(error.value)
            assert "not whole" not in str(error.value)


def test_devices_that_do_not_start_are_named(run, monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda': no device.\nMore")

    monkeypatch.setattr(checkpoint_module.jax, "devices", fail)
    for read in (check_backend, lambda: load_params(run), lambda: Checkpoints(run / "checkpoints", 2)):
        with pytest.raises(OSError, match=r"finds no device to compute on .*'cuda': no device\); check its driver"):
            read()


def test_a_second_trainer_in_a_folder_is_refused(tmp_path):
    """A process of this host that is alive holds both folders in turn."""
    identity = {"host": socket.gethostname(), "pid": 1, "begun": locks.begun(1), "what": "a training run", "time": ""}
    for place in (tmp_path / "run", tmp_path / "elsewhere"):
        place.mkdir(exist_ok=True)
        (place / locks.LOCK).write_text(json.dumps(identity))
        with pytest.raises(ValueError, match=rf"{place.name} is in use by a training run \(process 1 on "):
            train(recipe(tmp_path / "run", checkpoint_folder=str(tmp_path / "elsewhere")))
        (place / locks.LOCK).unlink(missing_ok=True)
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert not list(Path(tmp_path).rglob(locks.LOCK))
