"""The section on the push that remains at perfect alignment."""

import dataclasses

from support.reported import recipe, write_dataset

from refalign_jax.data.shards import ShardSource
from refalign_jax.data.targets import remaining_pushes
from refalign_jax.report.run import Run
from refalign_jax.report.targets import targets_section


def run_of(config) -> Run:
    return Run(
        folder=None, config=config, about={}, starts=(), program={}, steps=(), samples=(), lost=0, evaluation=None
    )


def test_the_number_is_that_of_the_dataset(dataset, tmp_path):
    config = recipe(tmp_path, str(dataset))
    found = remaining_pushes(ShardSource(dataset), config.model.alignment)
    assert found.examples == 4
    html = targets_section(run_of(config)).html
    assert f"the push L₋ {found.all_patches['as published']:.3f}:" in html
    assert "Means of 4 examples" in html
    assert f"<td>{found.subject_patches['center_targets=dataset']:.3g}</td>" in html
    assert "no subject masks" not in html


def test_a_dataset_without_masks_has_the_published_number_alone(tmp_path):
    config = recipe(tmp_path, str(write_dataset(tmp_path / "dataset", masks=False)))
    html = targets_section(run_of(config)).html
    assert "as published" in html
    assert "center_targets=dataset" not in html
    assert "no subject masks" in html


def test_runs_without_a_number(tmp_path):
    assert "synthetic noise, which has no targets" in targets_section(run_of(recipe(tmp_path, ""))).html
    config = recipe(tmp_path, str(tmp_path / "none"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0))
    assert "can&#39;t be read" in targets_section(run_of(config)).html
