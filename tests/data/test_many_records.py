"""200 records, one in ten faulty: exactly those are left out, and the bytes are the same however they are prepared."""

import time

import numpy as np
import pytest
from support import preparing

from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.shards import verify_shards
from refalign_jax.data.skips import read_skipped, table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The records, the reasons of the faulty ones, and the dataset of one process."""
    folder = tmp_path_factory.mktemp("records")
    wanted = preparing.write(folder)
    process = preparing.start(str(folder), str(folder / "whole"))
    process.join()
    assert process.exitcode == 0
    return folder, wanted, folder / "whole"


def test_exactly_the_faulty_ones_are_left_out_each_with_its_reason(prepared):
    folder, wanted, whole = prepared
    assert len(wanted) == 20
    found = {entry.id: entry.reason for entry in read_skipped(whole)}
    assert found == wanted
    ids = [id for shard in read_manifest(whole).shards for id in shard.ids]
    assert len(ids) == 180
    assert not {*ids} & wanted.keys()
    lines = table(read_skipped(whole)).splitlines()
    assert len(lines) == 1 + len({*wanted.values()})
    assert sum(int(line.split()[0]) for line in lines[1:]) == 20
    assert preparing.run(str(folder), str(whole)).startswith(f"180 examples are in {whole}, 0 of them new; 20 left out")


def test_the_same_bytes_twice(prepared):
    folder, _, whole = prepared
    again = preparing.start(str(folder), str(folder / "again"))
    again.join()
    assert preparing.shards(folder / "again") == preparing.shards(whole)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_same_bytes_with_several_processes(prepared, processes):
    folder, _, whole = prepared
    dataset = folder / f"of_{processes}"
    started = [preparing.start(str(folder), str(dataset), (n + 1, processes)) for n in range(processes)]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * processes
    assert preparing.blobs(dataset) == preparing.blobs(whole)
    assert sum(1 for _ in read_skipped(dataset)) == 20


def test_the_same_bytes_after_twenty_kills(prepared):
    """Killed at any moment before the first example of a start, or a while after one or two more shards."""
    folder, _, whole = prepared
    dataset, rng, sizes = folder / "killed", np.random.default_rng(0), [0]
    for kill in range(20):
        process = preparing.start(str(folder), str(dataset))
        wanted = 0 if kill % 10 in (0, 3, 6) else sizes[-1] + int(rng.integers(1, 9))
        while process.exitcode is None and examples(dataset) < min(wanted, 172):
            time.sleep(0.005)
        process.join(rng.exponential(0.1 if wanted else 0.5))
        assert process.exitcode is None, "it ended before it was killed"
        process.kill()
        process.join()
        sizes.append(examples(dataset))
        assert not (dataset / "manifest.json").exists() or verify_shards(dataset) == []
    assert len({*sizes}) > 5
    process = preparing.start(str(folder), str(dataset))
    process.join()
    assert process.exitcode == 0
    assert preparing.shards(dataset) == preparing.shards(whole)
    print(f"examples after each kill: {sizes}")


def examples(dataset):
    """Number of finished examples."""
    return read_manifest(dataset).num_examples if (dataset / "manifest.json").exists() else 0
