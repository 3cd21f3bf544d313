"""The training step against golden values, its random parts, and runs that are stopped and go on."""

import contextlib
import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny
from support.runs import FAST_COMPILE, MODEL, recipe
from support.sources import Disturbed

from refalign_jax.command import load
from refalign_jax.config import (
    AlignmentConfig,
    Config,
    DataConfig,
    DiTConfig,
    DropoutConfig,
    FlowConfig,
    ModelConfig,
    OptimizerConfig,
    Storage,
)
from refalign_jax.convert.checkpoint import find_checkpoint, read_json
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import to_ours, to_published
from refalign_jax.data.examples import Example
from refalign_jax.data.loader import make_loader
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.shards import CorruptRecordError, ShardSource
from refalign_jax.initial import model_shapes
from refalign_jax.objective import objective
from refalign_jax.sharding import make_mesh, replicated
from refalign_jax.trainer.compare import differences
from refalign_jax.trainer.log import read_metrics
from refalign_jax.trainer.loop import train
from refalign_jax.trainer.preflight import open_loader, open_source
from refalign_jax.trainer.state import init_state
from refalign_jax.trainer.step import as_batch, batch_shapes, draw, drop_conditions, mean_gradient, train_step

EMA = 0.75


@pytest.fixture(scope="module")
def golden_run(golden, tmp_path_factory):
    """The golden inputs, written as a prepared example and read back by the loader; weights; a compiled step."""
    folder = golden / "dit_a"
    about = json.loads((folder / "config.json").read_text())
    values = dict(np.load(folder / "values.npz"))
    latents, references, features = (
        np.moveaxis(values[name][0], 0, -1) for name in ("video_latents", "reference_latents", "vfm_features")
    )
    example = Example(
        id="golden",
        prompt="",
        video_latents=latents,
        reference_latents=references,
        subject_ids=np.arange(len(references), dtype=np.int32),
        text=values["text"][0],
        vfm_features=features.reshape(len(features), -1, features.shape[-1]),
    )
    storage = Storage(video_latents="float32", reference_latents="float32", text="float32", vfm_features="float32")
    data = tmp_path_factory.mktemp("golden") / "data"
    with ShardWriter(data, storage=storage, made={}) as writer:
        writer.add(example)
    config = Config(
        model=ModelConfig(
            dit=DiTConfig(
                width=about["dim"],
                num_layers=about["num_layers"],
                num_heads=about["num_heads"],
                ffn_width=about["ffn_dim"],
                text_width=about["text_dim"],
                frequency_width=about["freq_dim"],
                compute_dtype="float32",
                remat="none",
            ),
            alignment=AlignmentConfig(num_blocks=about["align_blocks"], vfm_width=about["vfm_dim"]),
            flow=FlowConfig(shift=about["shift"]),
        ),
        data=DataConfig(path=str(data), batch_size=1, text_length=len(values["text"][0])),
        optimizer=OptimizerConfig(clip=0, ema_decay=EMA),
    )
    source = ShardSource(data)
    loader = make_loader(config.data, source)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    batch = as_batch(next(loader), config, source.spec, mesh)
    loader.close()
    table = model_table(config.model.dit, config.model.alignment)
    params = to_ours(table, model_shapes(config.model), open_weights(folder / "weights.safetensors"))
    jitted = jax.jit(train_step, static_argnames="config", compiler_options=FAST_COMPILE)
    golden_noise = np.moveaxis(values["noise"], 1, -1)

    def step(state, index, noise=golden_noise):
        return jitted(*jax.device_put((state, batch, noise, np.full(1, index)), replicated(mesh)), config=config)

    state = init_state(jax.tree.map(jnp.asarray, params), jax.random.key(0), config)
    return folder, about, values, table, state, step


def test_golden_loss_scalars(golden_run):
    _, about, values, _, state, step = golden_run
    names = {
        "mse": "flow",
        "weight": "weight",
        "gate": "gate",
        "ra_total(pos+neg)": "alignment",
        "ra_neg": "push",
        "loss": "loss",
    }
    for index in about["loss_ids"]:
        metrics = step(state, index)[1]
        for label, theirs in zip(about["scalars"], values[f"step{index}_scalars"], strict=True):
            ours = float(metrics[names[label]])
            assert abs(ours - theirs) <= 1e-5 * max(abs(theirs), 1e-30) or ours == theirs, (index, label, ours, theirs)


def test_golden_adamw_updates_and_moving_average(golden_run):
    folder, _, values, table, state, step = golden_run
    before, average = dict(to_published(table, state.params)), state.params
    for theirs in values["adamw_losses"]:
        state, metrics = step(state, 300)
        assert abs(float(metrics["loss"]) - theirs) <= 1e-5 * theirs
        average = jax.tree.map(lambda a, x: EMA * a + (1 - EMA) * x, average, state.params)
    assert int(state.step) == len(values["adamw_losses"]) == 3
    weights = open_weights(folder / "weights_after_3_adamw.safetensors")
    for name, ours in to_published(table, state.params):
        assert tiny.relative(ours - before[name], weights.read(name) - before[name]) <= 5e-3, name
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_step_that_is_not_finite_leaves_all_but_the_count(golden_run):
    *_, state, step = golden_run
    good, _ = step(state, 600)
    bad = np.full((1, 3, 8, 12, 16), np.nan, np.float32)
    once, metrics = step(good, 600, bad)
    twice, _ = step(once, 600, bad)
    assert (int(once.step), int(once.skipped), int(twice.skipped)) == (2, 1, 2)
    assert int(metrics["skipped"]) == 1
    for name in ("params", "ema", "optimizer"):
        for a, b in zip(*(jax.tree.leaves(getattr(s, name)) for s in (good, twice)), strict=True):
            np.testing.assert_array_equal(a, b)
    again, _ = step(twice, 600)
    assert int(again.skipped) == 0
    assert not np.array_equal(again.params["projectors"]["in"], good.params["projectors"]["in"])


def test_accumulated_gradient_is_that_of_the_whole_batch():
    params, batch = tiny.params(MODEL), tiny.batch([3, 2, 0, 1], config=MODEL)
    noise = jax.random.normal(jax.random.key(0), batch.video_latents.shape)
    index = jnp.array([900, 100, 500, 700])

    def loss(params, batch, noise, index):
        return objective(params, batch, noise, index, jnp.int32(0), MODEL)

    (one, g1), (two, g2) = (
        jax.jit(lambda p, *x, n=n: mean_gradient(loss, p, x, n), compiler_options=FAST_COMPILE)(
            params, batch, noise, index
        )
        for n in (1, 2)
    )
    for a, b in zip(jax.tree.leaves((one, g1)), jax.tree.leaves((two, g2)), strict=True):
        # float32 sums in another order; the gradients of norms sum over tokens, and come to 1.1e-6
        assert tiny.relative(a, b) <= 2e-6 or float(jnp.abs(a - b).max()) <= 1e-9


def test_dropped_conditions():
    batch = tiny.batch([3, 3, 3, 2])
    u, empty = jnp.array([0.05, 0.15, 0.25, 0.35]), jnp.arange(5 * 16, dtype=jnp.float32).reshape(5, 16)
    dropped = drop_conditions(batch, u, empty, DropoutConfig())
    for row, (text, references) in enumerate([(True, False), (False, True), (True, True), (False, False)]):
        np.testing.assert_array_equal(dropped.text[row], empty if text else batch.text[row])
        kept = batch.reference_latents[row]
        np.testing.assert_array_equal(dropped.reference_latents[row], 0 * kept if references else kept)
        assert bool(dropped.aligned[row]) is not references
    np.testing.assert_array_equal(dropped.num_references, batch.num_references)
    none = drop_conditions(batch, u, empty, DropoutConfig(text=0, references=0, both=0))
    for a, b in zip(none, batch, strict=True):
        np.testing.assert_array_equal(a, b)


def test_draws_have_their_distributions_and_depend_on_the_key_alone():
    samples, config = 4000, Config()
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (samples, *x.shape[1:])), tiny.batch([3]))
    empty = jnp.full((5, 16), 7.0)
    dropped, noise, index = jax.jit(lambda k: draw(k, batch, empty, config))(jax.random.key(1))
    text = np.asarray((dropped.text == 7).all((1, 2)))
    references = np.asarray((dropped.reference_latents == 0).all((1, 2, 3, 4)))
    for both in (text & ~references, references & ~text, text & references):
        assert abs(both.mean() - 0.1) < 0.02
    assert abs(noise.mean()) < 1e-3
    assert abs(noise.std() - 1) < 1e-3
    assert 0 <= index.min() < 10
    assert 990 < index.max() <= 999
    assert abs(index.mean() - 499.5) < 20
    again = draw(jax.random.key(1), batch, empty, config)
    other = draw(jax.random.key(2), batch, empty, config)
    np.testing.assert_array_equal(index, again[2])
    assert not np.array_equal(index, other[2])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    train(recipe(folder, profile_start=2, profile_steps=1))
    return folder


def test_ctrl_c_saves_a_checkpoint_and_is_an_interruption(tmp_path):
    config, signals = recipe(tmp_path), iter([signal.SIGINT])

    def interrupt(arrays):
        for number in signals:  # once
            os.kill(os.getpid(), number)
        return arrays

    with pytest.raises(KeyboardInterrupt):
        train(config, Disturbed(config, 17, interrupt))
    assert 1 <= int(find_checkpoint(tmp_path)[0].name) <= 3


def test_a_run_stopped_and_killed_equals_the_run_never_stopped(finished, tmp_path):
    config, signals = recipe(tmp_path), iter([signal.SIGTERM])

    def terminate(arrays):
        for number in signals:  # once
            os.kill(os.getpid(), number)
        return arrays

    train(config, Disturbed(config, 17, terminate))  # returns, and so the command exits 0
    stopped = int(find_checkpoint(tmp_path)[0].name)
    assert 1 <= stopped <= 3
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [*range(1, stopped + 1)]

    def crash(arrays):
        raise RuntimeError("as if the machine had died")

    with pytest.raises(RuntimeError, match="died"):
        train(config, Disturbed(config, 8 * (7 - stopped) + 1, crash))  # while the eighth batch is read
    assert find_checkpoint(tmp_path)[0].name == "5"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut short
    train(config)
    assert differences(tmp_path, finished) == []

    states = [read_json(find_checkpoint(folder)[0], "progress")["data"] for folder in (tmp_path, finished)]
    loaders = [make_loader(config.data, open_source(config)) for _ in states]
    for loader, state in zip(loaders, states, strict=True):
        loader.set_state(state)
    for a, b in zip(*(next(loader).values() for loader in loaders), strict=True):
        np.testing.assert_array_equal(a, b)


def test_metrics_tell_every_step(finished):
    records = read_metrics(finished / "metrics.jsonl")
    assert [r["step"] for r in records] == [*range(1, 13)]
    for record in records:
        assert {"loss", "flow", "pull", "push", "grad_norm", "learning_rate", "data_wait"} <= record.keys()
        assert record["tokens_per_second"] == pytest.approx(record["examples_per_second"] * 30)
        assert "mfu" not in record  # a CPU's peak isn't known
    assert [r["step"] for r in records if "held_out_loss" in r] == [6, 12]
    assert records[-1]["held_out_loss"] != records[5]["held_out_loss"]
    start = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    about = json.loads((finished / "config.json").read_text())["about"]
    for made in (start, about, read_json(find_checkpoint(finished)[0], "progress")["about"]):
        assert {"commit", "versions", "flags", "command", "devices"} <= made.keys()
    assert '"compile_seconds"' in (finished / "metrics.jsonl").read_text()
    assert [*(finished / "tensorboard").glob("events*")]
    assert [*(finished / "profile").rglob("*.xplane.pb")]
    assert [path.suffix for path in sorted((finished / "previews").iterdir())] == [".npz", ".png"]


def test_a_preview_is_what_the_sampling_command_draws(finished, tmp_path):
    """The same weights, embeddings, references, ids, seed and mesh give the same bits."""
    config, preview = recipe(finished), np.load(finished / "previews/step-00000012.npz")
    source = open_source(config)
    given = {"negative": np.zeros((5, 16), np.float32)}
    ids = preview["ids"].tolist()
    for index, id in enumerate(ids, config.data.first_held_out(len(source))):
        arrays, about = source[index]
        assert about["id"] == id
        given[f"{id}.prompt"] = np.float32(arrays["text"])
        given[f"{id}.references"] = np.float32(arrays["reference_latents"])
    save_file(given, tmp_path / "given.safetensors")
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps({'id': id, 'prompt': ''})}\n" for id in ids))
    options = ["--embeddings", tmp_path / "given.safetensors", "--vae", "dct", "--num-frames", 5, "--height", 32]
    options += ["--width", 48, "--fsdp", 2, "--ema", "--save", "latents"]
    places = [finished, tmp_path / "prompts.jsonl", tmp_path / "out"]
    load("sample")([str(argument) for argument in (*places, *options)], "sample")
    for id, latents in zip(ids, preview["latents"], strict=True):
        ours = load_file(tmp_path / "out" / f"{id}-latents.safetensors")["latents"]
        np.testing.assert_array_equal(np.moveaxis(ours, 0, -1), latents)


def test_a_finished_run_has_nothing_left_to_do(finished):
    before = (finished / "metrics.jsonl").read_text()
    train(recipe(finished))
    assert (finished / "metrics.jsonl").read_text() == before


def one_thread(config: Config) -> Config:
    """The recipe with batches that are read one after the other."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, num_threads=1))


def test_what_fails_while_reading_data_loses_no_step(tmp_path):
    def corrupt(arrays):
        raise CorruptRecordError("record 25 can't be read")

    config = one_thread(recipe(tmp_path))
    with pytest.raises(ValueError, match=r"More than 0 corrupt records .*record 25 can't be read"):
        train(config, Disturbed(config, 25, corrupt))
    assert find_checkpoint(tmp_path)[0].name == "3"
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_examples(tmp_path):
    def poison(arrays):
        return arrays | {"text": np.full_like(arrays["text"], np.nan)}

    config = one_thread(recipe(tmp_path))
    with pytest.raises(ValueError, match=r"Step 7:.* not finite; examples synthetic-.*; 1 in a row.*checkpoints/5"):
        train(config, Disturbed(config, 49, poison))
    assert find_checkpoint(tmp_path)[0].name == "5"
    config = one_thread(recipe(tmp_path, max_skipped=2))
    with pytest.raises(ValueError, match=r"3 in a row, train.max_skipped=2"):
        train(config, Disturbed(config, 9, poison))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [*range(1, 10)]
    assert [r["loss"] is None for r in records] == [False] * 6 + [True] * 3


def test_a_run_with_masked_and_centred_targets_goes_on_where_it_stopped(tmp_path):
    """The mean of the targets is found again, so that a run that stopped equals one that did not."""
    alignment = dataclasses.replace(MODEL.alignment, center_targets="dataset", subject_patches_only=True)
    model = dataclasses.replace(MODEL, alignment=alignment)
    settings = {"steps": 3, "save_every": 2, "held_out_every": 3, "preview_every": 0}
    whole, parts = (
        dataclasses.replace(recipe(tmp_path / name, **settings), model=model, optimizer=OptimizerConfig())
        for name in ("whole", "parts")
    )
    train(whole)
    train(dataclasses.replace(parts, train=dataclasses.replace(parts.train, steps=2)))
    train(parts)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("whole", "parts"))
    assert one["step"] == two["step"] == 3
    assert one["push"] > 0
    assert [one[n] for n in ("loss", "push", "held_out_push")] == [two[n] for n in ("loss", "push", "held_out_push")]


def test_batches_have_the_shapes_that_the_step_is_compiled_for(tmp_path):
    config, mesh = recipe(tmp_path), make_mesh(recipe(tmp_path).mesh)
    for dtype, options, padded in (
        ("stored", {}, True),
        ("stored", {}, False),
        ("float32", {"subject_patches_only": True}, True),
        ("stored", {"center_targets": "dataset"}, False),
    ):
        model = dataclasses.replace(MODEL, alignment=dataclasses.replace(MODEL.alignment, **options))
        synthetic = dataclasses.replace(config.synthetic, padded_references=padded)
        data = dataclasses.replace(config.data, dtype=dtype)
        config = dataclasses.replace(config, model=model, data=data, synthetic=synthetic)
        source = open_source(config)
        with contextlib.closing(open_loader(config, source, "train")) as loader:
            batch = as_batch(next(loader), config, source.spec, mesh)
        shapes = batch_shapes(config, source.spec, mesh)
        assert (batch.num_references is not None) == padded
        assert jax.tree.structure(batch) == jax.tree.structure(shapes)
        for array, shape in zip(*map(jax.tree.leaves, (batch, shapes)), strict=True):
            assert (array.shape, array.dtype, array.sharding) == (shape.shape, shape.dtype, shape.sharding), shape
