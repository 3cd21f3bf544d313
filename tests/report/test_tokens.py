"""Which tokens the report looks at, and that they are the transformer's."""

import jax
import numpy as np
import pytest
from support.reported import SUBJECTS, recipe, write_dataset

from refalign_jax.config import MeshConfig
from refalign_jax.flow import training_schedule
from refalign_jax.models.condition import Condition
from refalign_jax.models.dit import observe, reference_tokens
from refalign_jax.report import tokens
from refalign_jax.report.run import read_run
from refalign_jax.sharding import make_mesh
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.state import begin


@pytest.fixture(scope="module")
def references(runs):
    return tokens.read_references(read_run(runs["a0"]).config)


def test_named_tokens_that_show_something(references):
    """The left two of six tokens are white; eight examples have twelve references."""
    assert references.held_out
    assert references.named
    assert references.names == SUBJECTS
    example, reference, token = references.place
    assert len(example) == 12 * 4
    assert set(token.tolist()) == {1, 2, 4, 5}
    for n, r, subject in zip(example, reference, references.subjects, strict=True):
        assert subject == (n + r) % 3
    for kind, allowed in references.allowed.items():
        for i, j in np.argwhere(allowed):
            assert example[i] != example[j]
            assert subject_and_place(references, i) != subject_and_place(references, j)
            assert kind == "anywhere" or token[i] != token[j]
    assert references.allowed["elsewhere"].sum() < references.allowed["anywhere"].sum()
    rows = np.concatenate([row["vfm_features"] for row in references.rows])
    np.testing.assert_array_equal(references.vfm[7], rows[example[7], reference[7], token[7]])


def subject_and_place(references, i):
    return references.subjects[i], references.place[2][i]


def test_nameless_references_have_no_neighbours_of_their_own(tmp_path):
    config = recipe(tmp_path / "run", str(write_dataset(tmp_path / "d", names=False)))
    references = tokens.read_references(config)
    assert not references.named
    assert len(references.names) == 12


def test_no_dataset_no_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"can't be read"):
        tokens.read_references(recipe(tmp_path, str(tmp_path / "gone")))


def test_features_are_the_transformers(runs, references, trained):
    run = read_run(runs["a0"])
    params, step = tokens.trained_params(run)
    assert step == 40
    np.testing.assert_allclose(params["dit"]["time_in"]["bias"], 1.3 * trained["dit"]["time_in"]["bias"], rtol=1e-6)
    found = tokens.features(params, references, run.config, "")
    assert found.shape == (3, 48, 24)

    n, r, p = (int(part[-1]) for part in references.place)
    row, t = references.rows[n], tokens.noise_time(run.config)
    sigma = training_schedule(run.config.model.flow).sigmas[500]
    assert t == pytest.approx(1000 * sigma)
    noise = np.random.default_rng([tokens.SEED, n]).standard_normal(row["video_latents"].shape, np.float32)
    noisy = (1 - sigma) * row["video_latents"] + sigma * noise
    dit = run.config.model.dit
    condition = Condition(*(jax.numpy.asarray(row[name]) for name in ("text", "reference_latents", "num_references")))
    observer = reference_tokens(dit, 3, condition.reference_latents.shape)
    _, expected = observe(params["dit"], dit, jax.numpy.asarray(noisy), jax.numpy.full(1, t), condition, observer)
    np.testing.assert_allclose(found[:, -1], expected[:, 0, r, p], rtol=1e-4, atol=1e-5)


def test_before_training_is_where_a_run_starts(runs, tmp_path):
    config = read_run(runs["a1"]).config
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        state, _ = begin(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), checkpoints)
    ours = tokens.untrained_params(config)
    jax.tree.map(np.testing.assert_array_equal, ours, jax.device_get(state.params))
