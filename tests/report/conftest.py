"""A small dataset and four runs on it, for all tests of the report."""

import jax
import pytest
from support import tiny
from support.reported import recipe, write_dataset, write_run, write_samples


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Folder of the small dataset."""
    return write_dataset(tmp_path_factory.mktemp("report") / "dataset")


@pytest.fixture(scope="session")
def trained():
    """Parameters that any training might have led to."""
    return tiny.params()


@pytest.fixture(scope="session")
def runs(tmp_path_factory, dataset, trained):
    """Folders of runs by name: seeds 0 and 1 with alignment (a0, a1) and without (b0, b1); a0 has samples."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for seed in (0, 1):
        for name, weight in (("a", 1.0), ("b", 0.0)):
            config = recipe(folder / f"{name}{seed}", str(dataset), weight, seed)
            scale = 1 + 0.3 * weight + 0.1 * seed
            found[f"{name}{seed}"] = write_run(config, jax.tree.map(lambda x, scale=scale: scale * x, trained))
    write_samples(found["a0"])
    return found
