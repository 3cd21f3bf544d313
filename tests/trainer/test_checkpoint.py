"""Checkpoints of parameters and of runs: read back, started from, refused."""

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.runs import MODEL, recipe

from refalign_jax.config import AlignmentConfig, Config, ExportConfig, MeshConfig, ModelConfig
from refalign_jax.config.recipe import from_dict
from refalign_jax.convert.checkpoint import (
    Unread,
    find_checkpoint,
    import_params,
    load_params,
    open_params,
    read_json,
    save_params,
)
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.load import initial_params
from refalign_jax.convert.table import Stored, published_shapes, to_ours, to_published
from refalign_jax.convert.transfer import export_weights
from refalign_jax.convert.write import write_weights
from refalign_jax.sharding import make_mesh
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.preflight import check_same_run
from refalign_jax.trainer.state import begin, save, state_shapes
from refalign_jax.trees import flatten


def equal(ours, theirs) -> bool:
    a, b = flatten(ours), flatten(theirs)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with checkpoints 3 and 6, its EMA unlike its parameters, and the two."""
    folder = tmp_path_factory.mktemp("run")
    config = recipe(folder)
    with Checkpoints(folder / "checkpoints", 2) as checkpoints:
        state, _ = begin(config, make_mesh(config.mesh), checkpoints)
        for step in (2, 3, 6):
            state = state._replace(step=jnp.int32(step), ema=jax.tree.map(lambda x: x + 1, state.ema))
            save(state, {"examples_consumed": 8 * step}, config, {"commit": "x"}, checkpoints)
    return folder, jax.device_get(state.params), jax.device_get(state.ema)


@pytest.fixture(scope="module")
def params():
    return jax.device_get(tiny.params(MODEL))


def published(folder, tree, table):
    """Parameters written as safetensors under the names of a table."""
    sizes = published_shapes(table, tree)
    ordered = {name: sizes[name] for entry in table for name in entry.names}
    path = folder / "model.safetensors"
    write_weights(path, to_published(table, tree), ordered, dict.fromkeys(ordered, np.dtype(np.float32)), 10**9)
    return path


def shapes(model: ModelConfig = MODEL, **alignment):
    """Shapes with places of the parameters of a recipe's model."""
    config = Config(model=dataclasses.replace(model, alignment=dataclasses.replace(model.alignment, **alignment)))
    return config.model, state_shapes(config, make_mesh(config.mesh)).params


def test_layers_are_written_and_read_one_at_a_time(run, tmp_path, params):
    """So no process holds a stack, whatever its depth; Orbax's own layout would be one chunk a device."""
    indices = []

    def unread(array):
        return Unread(array.shape, array.dtype, lambda index: indices.append(index) or array[index])

    import_params(tmp_path / "p", jax.tree.map(unread, params), MODEL)
    assert {len(range(*index[0].indices(3))) for index in indices if index} == {1}
    assert equal(load_params(tmp_path / "p")[0], params)
    for folder in (tmp_path / "p", run[0]):
        opened, model = open_params(folder)
        assert model == MODEL
        for array, expected in zip(jax.tree.leaves(opened), jax.tree.leaves(params), strict=True):
            assert array.shape == expected.shape
            assert array.ndim < 3 or array.chunk_layout.read_chunk.shape[0] == 1


@pytest.mark.parametrize("ema", [False, True])
def test_parameters_or_the_average_of_a_run_are_exported(run, tmp_path, ema):
    export_weights(run[0], tmp_path / "out.safetensors", ExportConfig(projectors=True, ema=ema))
    table = model_table(MODEL.dit, MODEL.alignment)
    written = to_ours(table, run[1], open_weights(tmp_path / "out.safetensors"))
    assert equal(written, run[2 if ema else 1])


def test_of_published_weights_each_device_reads_its_share(tmp_path, params, monkeypatch):
    path = published(tmp_path, params, model_table(MODEL.dit, MODEL.alignment))
    config = Config(model=MODEL, mesh=MeshConfig(fsdp=8))
    targets = state_shapes(config, make_mesh(config.mesh)).params
    read, blocks = Stored.__getitem__, []

    def counted(self, index):
        block = read(self, index)
        blocks.append((self.entry.path, block.shape))
        return block

    monkeypatch.setattr(Stored, "__getitem__", counted)
    loaded, _ = initial_params(str(path), False, MODEL, targets, jax.random.key(0))
    assert equal(loaded, params)
    for name, shape in blocks:
        target = flatten(targets)[name]
        assert shape == target.sharding.shard_shape(target.shape)
    wide = [shape for name, shape in blocks if name == "dit/blocks/ffn/in/kernel"]
    assert [8 * math.prod(shape) for shape in wide] == [3 * 24 * 40] * 8


def test_parameters_round_trip_and_are_not_overwritten(tmp_path, params):
    save_params(tmp_path / "p", jax.device_put(params), MODEL)
    loaded, model = load_params(tmp_path / "p")
    assert equal(loaded, params)
    assert model == MODEL
    with pytest.raises(ValueError, match="exists; it is not overwritten"):
        save_params(tmp_path / "p", params, MODEL)


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/6"])
def test_parameters_alone_are_read_of_a_run(run, tmp_path, place):
    folder, parameters, average = run
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for item in ("optimizer", "progress"):
        shutil.rmtree(tmp_path / "checkpoints/6" / item)
    loaded, model = load_params(tmp_path / place)
    assert equal(loaded, parameters)
    assert model == MODEL
    assert equal(load_params(tmp_path / place, ema=True)[0], average)


def test_an_earlier_step_is_read_if_named_and_only_the_newest_are_kept(run):
    folder, _, average = run
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["3", "6"]
    earlier, _ = load_params(folder / "checkpoints/3", ema=True)
    assert not equal(earlier, average)
    assert read_json(folder / "checkpoints/3", "progress")["data"] == {"examples_consumed": 24}


def test_what_an_interrupted_write_left_is_removed(run, tmp_path):
    shutil.copytree(run[0] / "checkpoints", tmp_path / "c")
    partial = tmp_path / "c" / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "c/6", partial)
    (partial / "commit_success.txt").unlink()
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        assert checkpoints.latest == 6
        until = time.monotonic() + 10
        while partial.exists() and time.monotonic() < until:  # removed in the background
            time.sleep(0.05)
    assert not partial.exists()


@pytest.mark.parametrize("missing", ["params", "optimizer", "progress", "params/manifest.ocdbt", "ema/d"])
def test_a_damaged_checkpoint_is_one_sentence_that_names_the_one_before(run, tmp_path, missing):
    config = recipe(tmp_path)
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    victim = tmp_path / "checkpoints/6" / missing
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    with Checkpoints(tmp_path / "checkpoints", 2) as checkpoints:
        with pytest.raises(ValueError, match=r"checkpoints/6 can't be restored .*continue from step 3\.") as error:
            begin(config, make_mesh(config.mesh), checkpoints)
        assert "\n" not in str(error.value)


def test_a_truncated_file_is_noticed(run, tmp_path):
    config = recipe(tmp_path)
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints/6/params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        Checkpoints(tmp_path / "checkpoints", 2) as checkpoints,
        pytest.raises(ValueError, match=r"checkpoints/6 can't be restored"),
    ):
        begin(config, make_mesh(config.mesh), checkpoints)


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_params(tmp_path / "none")
    with pytest.raises(ValueError, match="is no checkpoint of parameters"):
        load_params(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"The run .* has no checkpoint yet"):
        load_params(tmp_path)


def test_a_run_starts_from_another(run):
    folder, parameters, average = run
    for ema, expected in ((False, parameters), (True, average)):
        loaded, said = initial_params(str(folder), ema, *shapes(), jax.random.key(0))
        assert equal(loaded, expected)
        assert str(folder) in said


def test_a_run_starts_from_sixteen_bit_weights_without_projectors(tmp_path, params):
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), {"dit": params["dit"]})
    save_params(tmp_path / "p", half, MODEL)
    loaded, said = initial_params(str(tmp_path / "p"), False, *shapes(), jax.random.key(0))
    assert said.endswith("It has no projectors; those are random.")
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
    assert equal(loaded["dit"], jax.tree.map(lambda x: np.asarray(x, np.float32), half["dit"]))
    assert loaded["projectors"]["in"].std() > 0
    alone, _ = initial_params(str(tmp_path / "p"), False, *shapes(weight=0.0), jax.random.key(0))
    assert alone.keys() == {"dit"}


@pytest.mark.parametrize("projectors", [False, True])
@pytest.mark.parametrize("names", ["wan", "diffusers"])
def test_a_run_starts_from_published_weights(tmp_path, params, projectors, names):
    table = model_table(MODEL.dit, MODEL.alignment if projectors else None, names)
    tree = params if projectors else {"dit": params["dit"]}
    path = published(tmp_path, tree, table)
    loaded, said = initial_params(str(path), False, *shapes(), jax.random.key(0))
    assert equal(loaded["dit"], params["dit"])
    assert equal(loaded["projectors"], params["projectors"]) is projectors
    assert said.endswith("random.") is not projectors
    without, _ = initial_params(str(path), False, *shapes(weight=0.0), jax.random.key(0))
    assert equal(without, {"dit": params["dit"]})
    with pytest.raises(ValueError, match="no training checkpoint"):
        initial_params(str(path), True, *shapes(), jax.random.key(0))
    wider = dataclasses.replace(MODEL, dit=dataclasses.replace(MODEL.dit, ffn_width=48))
    with pytest.raises(ValueError, match=r"does not hold the weights of this model: .*of another shape: .*\[48, 24\]"):
        initial_params(str(path), False, *shapes(wider), jax.random.key(0))


def test_another_model_is_refused_with_its_shapes(run):
    wider = dataclasses.replace(MODEL, alignment=AlignmentConfig(num_blocks=3, vfm_width=10))
    with pytest.raises(ValueError, match=r"of another shape: projectors/out \[3, 12, 8\], not \[3, 12, 10\]"):
        initial_params(str(run[0]), False, *shapes(wider), jax.random.key(0))


def test_a_run_goes_on_with_other_settings_but_not_as_another_model(tmp_path):
    config = recipe(tmp_path)
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert check_same_run(saved, dataclasses.asdict(config), "x") == []
    older = json.loads(json.dumps(saved))
    del older["model"]["alignment"]["center_targets"], older["train"]["verify_checkpoints"]
    assert check_same_run(older, dataclasses.asdict(config), "x") == []
    centred = dataclasses.replace(MODEL, alignment=dataclasses.replace(MODEL.alignment, center_targets="reference"))
    with pytest.raises(ValueError, match=r"model\.alignment\.center_targets was 'none', now it is 'reference'"):
        check_same_run(older, dataclasses.asdict(dataclasses.replace(config, model=centred)), "x")

    def changed(**parts):
        values = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in parts.items()}
        return dataclasses.asdict(dataclasses.replace(config, **values))

    now = changed(optimizer={"learning_rate": 1e-5}, mesh={"fsdp": 8}, train={"steps": 40})
    assert check_same_run(saved, now, "x") == [
        "mesh.fsdp was 2, now it is 8",
        "optimizer.learning_rate was 0.001, now it is 1e-05",
    ]
    dit = dataclasses.replace(MODEL.dit, remat="full")
    assert len(check_same_run(saved, changed(model={"dit": dit}), "x")) == 1
    dit = dataclasses.replace(MODEL.dit, num_layers=4, ffn_width=8)
    with pytest.raises(
        ValueError, match=r"model\.dit\.ffn_width was 40, now it is 8; model\.dit\.num_layers was 3, now it is 4; set"
    ):
        check_same_run(saved, changed(model={"dit": dit}), "x")
    for part in ({"optimizer": {"freeze": ("dit/*",)}}, {"optimizer": {"ema_decay": 0.0}}, {"train": {"seed": 1}}):
        with pytest.raises(ValueError, match="belongs to another run"):
            check_same_run(saved, changed(**part), "x")


def test_configurations_survive_json(tmp_path):
    config = recipe(tmp_path)
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_dict(Config, values, "x") == config
    with pytest.raises(ValueError, match="x: DiTConfig has no field 'depth'; it has width,"):
        from_dict(Config, {**values, "model": {**values["model"], "dit": {"depth": 3}}}, "x")


def test_find_checkpoint_takes_the_highest_number(tmp_path):
    for step in ("9", "10"):
        for item in ("params", "config"):
            (tmp_path / "checkpoints" / step / item).mkdir(parents=True)
    found, item = find_checkpoint(tmp_path)
    assert (Path(found).name, item) == ("10", "params")
