"""One global order for any number of processes and workers, exact resume, padding, corrupt records, no orphans."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.examples import FLOAT32, make
from support.places import environment

from refalign_jax.config import DataConfig, Storage
from refalign_jax.data.examples import Spec, cosines
from refalign_jax.data.loader import make_loader
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.shards import ShardSource
from refalign_jax.data.synthetic import SyntheticSource

SPEC = Spec(
    num_examples=23,
    video_latents=(2, 4, 6, 3),
    text_width=8,
    vfm_width=7,
    longest_text=5,
    most_references=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "d")


def write(path, storage=FLOAT32):
    with ShardWriter(path, storage=storage, made={}, examples_per_shard=5) as writer:
        for i in range(13):
            writer.add(make(i, references=i % 5, text=3 + i))
    return path


def corrupt(folder, *examples):
    """Flips a bit inside the records of some examples."""
    for example in examples:
        path = folder / f"examples-{example // 5:05d}.array_record"
        data = bytearray(path.read_bytes())
        data[data.index(b'"id\\": \\"e%d\\"' % example) + 100] ^= 1
        path.write_bytes(data)


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def indices(loader, count):
    return [batch["index"].tolist() for batch in take(loader, count)]


def flat(rows):
    return [int(index) for row in rows for index in row]


def assert_batches_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def test_rows_hold_their_examples_and_padding_is_zero(folder):
    config = DataConfig(batch_size=4, max_references=3, text_length=20)
    for batch in take(make_loader(config, ShardSource(folder)), 4):
        assert type(batch["text"]) is np.ndarray
        for row, index in enumerate(batch["index"]):
            example = make(index, references=index % 5, text=3 + index)
            R, S = min(index % 5, 3), 3 + index
            assert batch["ids"][row] == example.id
            assert batch["num_references"][row] == R
            np.testing.assert_array_equal(batch["video_latents"][row], example.video_latents)
            np.testing.assert_array_equal(batch["subject_ids"][row], [*example.subject_ids[:R], *[-1] * (3 - R)])
            for name, used in (("reference_latents", R), ("vfm_features", R), ("text", S)):
                np.testing.assert_array_equal(batch[name][row, :used], getattr(example, name)[:used])
                assert not batch[name][row, used:].any()
        shapes = {name: values.shape for name, values in batch.items()}
        assert shapes["reference_latents"] == (4, 3, 4, 6, 3)
        assert shapes["vfm_features"] == (4, 3, 6, 7)
        assert shapes["text"] == (4, 20, 8)


@pytest.mark.parametrize("vfm", ["bfloat16", "int8"])
def test_dtype_is_stored_or_float32(tmp_path, vfm):
    source = ShardSource(write(tmp_path, Storage(vfm_features=vfm)))
    (stored,) = take(make_loader(DataConfig(batch_size=4), source), 1)
    (full,) = take(make_loader(DataConfig(batch_size=4, dtype="float32"), source), 1)
    for name in ("video_latents", "reference_latents", "text", "vfm_features"):
        assert full[name].dtype == np.float32
        int8 = name == "vfm_features" and vfm == "int8"
        assert stored[name].dtype == (np.float32 if int8 else ml_dtypes.bfloat16)
        np.testing.assert_array_equal(stored[name].astype(np.float32), full[name])
    for row, index in enumerate(full["index"]):
        R = full["num_references"][row]
        truth = make(index, references=index % 5, text=3 + index).vfm_features[:R]
        assert (cosines(full["vfm_features"][row, :R], truth) > 0.999).all()


def test_each_epoch_shows_each_example_once_in_another_order():
    order = np.concatenate(indices(make_loader(DataConfig(batch_size=4), SyntheticSource(SPEC)), 23)).reshape(4, 23)
    for epoch in order:
        assert sorted(epoch) == list(range(23))
    assert len({tuple(epoch) for epoch in order}) == 4
    other = indices(make_loader(DataConfig(batch_size=4, shuffle_seed=1), SyntheticSource(SPEC)), 5)
    assert other != order.reshape(-1, 4)[:5].tolist()


@pytest.mark.parametrize("processes", [2, 4])
def test_global_order_is_independent_of_the_number_of_processes(processes):
    source, config = SyntheticSource(SPEC), DataConfig(batch_size=8)
    alone = indices(make_loader(config, source), 7)
    parts = [
        indices(make_loader(config, source, process_index=i, process_count=processes), 7) for i in range(processes)
    ]
    assert [flat(rows) for rows in zip(*parts, strict=True)] == alone


def test_resume_at_another_number_of_processes_and_batch_size():
    source, config = SyntheticSource(SPEC), DataConfig(batch_size=8)
    loader = make_loader(config, source)
    before = indices(loader, 4)
    state = json.loads(json.dumps(loader.get_state()))
    after = indices(loader, 6)
    parts = []
    for rank in range(2):
        resumed = make_loader(config, source, process_index=rank, process_count=2)
        resumed.set_state(state)
        parts.append(indices(resumed, 6))
        assert resumed.get_state()["examples_consumed"] == 8 * 10
    assert [a + b for a, b in zip(*parts, strict=True)] == after
    smaller = make_loader(dataclasses.replace(config, batch_size=4), source)
    smaller.set_state(state)
    assert flat(indices(smaller, 12)) == flat(after)
    far = make_loader(config, source)
    far.set_state({**state, "examples_consumed": 0})
    assert indices(far, 4) == before


def test_state_is_the_position_of_the_batch_taken_not_of_what_was_read_ahead():
    loader = make_loader(DataConfig(batch_size=4, prefetch=8), SyntheticSource(SPEC))
    for k in range(3):
        assert loader.get_state()["examples_consumed"] == 4 * k
        next(loader)
    loader.close()


@pytest.mark.parametrize(
    "change", [{"shuffle_seed": 3}, {"held_out": 4}], ids=["another seed", "another split of the dataset"]
)
def test_state_of_another_order_is_refused(change):
    config = DataConfig(batch_size=4)
    state = make_loader(config, SyntheticSource(SPEC)).get_state()
    other = make_loader(dataclasses.replace(config, **change), SyntheticSource(SPEC))
    with pytest.raises(ValueError, match=r"was saved with (shuffle_seed 0, now it is 3|num_examples 23, now it is 19)"):
        other.set_state(state)


def test_held_out_examples_never_train_and_come_in_order():
    config, source = DataConfig(batch_size=4, held_out=8), SyntheticSource(SPEC)
    held_out = indices(make_loader(config, source, split="held_out"), 4)
    assert flat(held_out) == [*range(15, 23)] * 2
    assert set(flat(indices(make_loader(config, source), 12))) == set(range(15))


def test_held_out_examples_need_not_fill_batches():
    config, source = DataConfig(batch_size=4, held_out=6), SyntheticSource(SPEC)
    held_out = indices(make_loader(config, source, split="held_out"), 3)
    assert flat(held_out) == [*range(17, 23)] * 2
    state = make_loader(dataclasses.replace(config, batch_size=3), source).get_state()
    make_loader(config, source).set_state(state)


def grown(count):
    return SyntheticSource(dataclasses.replace(SPEC, num_examples=count))


def test_a_run_goes_on_with_a_grown_dataset_after_its_epoch():
    config = DataConfig(batch_size=4, held_out=3)
    loader = make_loader(config, SyntheticSource(SPEC))
    taken = flat(next(loader)["index"].tolist() for _ in range(6))  # 24 of 20 in the first epoch, 4 of the second
    state = json.loads(json.dumps(loader.get_state()))
    rest = flat(indices(loader, 4))
    with pytest.raises(ValueError, match=r"had 23 examples when the run began, now it has 31.* set data.grown_from=23"):
        make_loader(config, grown(31)).set_state(state)
    on = dataclasses.replace(config, grown_from=23)
    loader = make_loader(on, grown(31))
    loader.set_state(state)
    after = [next(loader)["index"].tolist() for _ in range(4)]
    assert flat(after) == rest  # to the end of the second epoch, position 40
    middle = json.loads(json.dumps(loader.get_state()))
    assert middle["segments"] == [[0, 20], [40, 28]]
    following = flat(next(loader)["index"].tolist() for _ in range(14))
    for epoch in (following[:28], following[28:]):
        assert sorted(epoch) == [*range(20), *range(23, 31)]
    end = loader.get_state()
    loader.close()
    resumed = make_loader(dataclasses.replace(on, batch_size=7, num_workers=0), grown(31))
    resumed.set_state(middle)
    assert flat(indices(resumed, 8)) == following
    assert flat(indices(make_loader(on, grown(31), split="held_out"), 3)) == [20, 21, 22] * 4
    assert len(taken) == 24

    again = make_loader(on, grown(40))  # it grows a second time
    again.set_state(end)
    assert again.get_state()["segments"] == [[0, 20], [40, 28], [96, 37]]
    with pytest.raises(ValueError, match=r"data.grown_from is 31; set data.grown_from=23"):
        make_loader(dataclasses.replace(config, grown_from=31, held_out=11), grown(40)).set_state(
            {**end, "num_examples": 20}
        )
    with pytest.raises(ValueError, match="had 31 examples when the run was saved, now it has 30"):
        make_loader(on, grown(30)).set_state(end)


def test_a_growth_that_has_not_come_into_use_is_replaced_by_the_next():
    loader = make_loader(DataConfig(batch_size=4), SyntheticSource(SPEC))
    next(loader)
    state = loader.get_state()
    loader.close()
    config = DataConfig(batch_size=4, grown_from=23)
    for count, segments in ((30, [[0, 23], [23, 30]]), (35, [[0, 23], [23, 35]])):
        loader = make_loader(config, grown(count))
        loader.set_state(state)
        state = loader.get_state()
        assert state["segments"] == segments
    fresh = {**state, "examples_consumed": 0, "segments": [[0, 23]], "dataset_examples": 23, "num_examples": 23}
    loader.set_state(fresh)
    assert loader.get_state()["segments"] == [[0, 35]]


def test_another_dataset_of_the_same_size_is_refused_and_older_states_are_taken(tmp_path, folder):
    config = DataConfig(batch_size=4)
    state = make_loader(config, ShardSource(folder)).get_state()
    other = tmp_path / "other"
    with ShardWriter(other, storage=FLOAT32, made={}, examples_per_shard=5) as writer:
        for i in range(13):
            writer.add(make(i, references=i % 5, text=4 + i))
    with pytest.raises(ValueError, match="first 13 examples are not those that the run was saved with"):
        make_loader(config, ShardSource(other)).set_state(state)
    old = {name: state[name] for name in ("examples_consumed", "shuffle_seed", "first_example", "num_examples")}
    make_loader(config, ShardSource(other)).set_state(old)
    with ShardWriter(other, storage=FLOAT32, made={}, examples_per_shard=5) as writer:
        writer.add(make(77))
    make_loader(dataclasses.replace(config, grown_from=13), ShardSource(other)).set_state(old)
    with pytest.raises(ValueError, match="num_examples 13, now it is 14"):
        make_loader(config, ShardSource(other)).set_state(old)


def test_two_workers_give_the_same_batches_and_resume(folder):
    config = DataConfig(batch_size=4, held_out=4)
    loader = make_loader(config, ShardSource(folder))
    alone = [next(loader) for _ in range(4)]
    state = loader.get_state()
    alone += take(loader, 3)
    loader = make_loader(dataclasses.replace(config, num_workers=2), ShardSource(folder))
    loader.set_state(state)
    first = next(loader)
    assert type(first["text"]) is np.ndarray
    assert_batches_equal([first, *take(loader, 2)], alone[4:])


def test_corrupt_records_are_named_and_replaced_by_the_next(tmp_path, caplog):
    folder = write(tmp_path / "d")
    clean = make_loader(DataConfig(batch_size=4), ShardSource(folder))
    expected = [{3: 5, 4: 5}.get(i, i) for batch in indices(clean, 13) for i in batch]
    corrupt(folder, 3, 4)
    config = DataConfig(batch_size=4, max_corrupt=2)
    loader = make_loader(config, ShardSource(folder))
    with caplog.at_level(logging.WARNING):
        found = [next(loader) for _ in range(6)]
        state = loader.get_state()
        found += take(loader, 7)
    assert flat(batch["index"] for batch in found) == expected
    assert [batch["ids"].tolist() for batch in found] == [[f"e{i}" for i in batch["index"]] for batch in found]
    assert len(caplog.records) == 2
    assert "examples-00000.array_record, record 3 (example 3) can't be read" in caplog.text
    resumed = make_loader(config, ShardSource(folder))
    resumed.set_state(state)
    assert_batches_equal(take(resumed, 7), found[6:])


def test_last_example_corrupt_is_replaced_by_the_first(tmp_path):
    folder = write(tmp_path / "d")
    corrupt(folder, 12)
    loader = make_loader(DataConfig(batch_size=13, max_corrupt=1), ShardSource(folder))
    (rows,) = indices(loader, 1)
    assert sorted(rows) == [0, *range(12)]


@pytest.mark.parametrize(("limit", "workers"), [(0, 0), (1, 0), (1, 2)])
def test_too_many_corrupt_records_are_one_sentence(tmp_path, limit, workers):
    folder = write(tmp_path / "d")
    corrupt(folder, 1, 6)
    config = DataConfig(batch_size=1, max_corrupt=limit, num_workers=workers)
    loader = make_loader(config, ShardSource(folder))
    with pytest.raises(
        ValueError, match=rf"More than {limit} corrupt records .*examples-0000\d.array_record, record 1"
    ):
        take(loader, 13)
    loader.close()


def test_nothing_readable_ends_with_an_error(tmp_path):
    folder = write(tmp_path / "d")
    corrupt(folder, *range(13))
    loader = make_loader(DataConfig(batch_size=1, max_corrupt=99), ShardSource(folder))
    with pytest.raises(ValueError, match="corrupt records"):
        next(loader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "DataConfig.batch_size=0 must be at least 1"),
        ({"max_references": -1}, "DataConfig.max_references=-1 must be at least 0"),
        ({"text_length": 513}, "at most 512"),
        ({"dtype": "float16"}, "choose one of float32, stored"),
        ({"held_out": 3, "grown_from": 3}, "held_out=3 must be below grown_from=3"),
        ({"shuffle_seed": 2**32}, r"below 2\^32"),
        ({"num_workers": -1}, "at least 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**change)


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ({"batch_size": 3}, "train", "2 processes must divide it"),
        ({"held_out": 24}, "train", "held_out is 24 of 23 examples, which leaves none for the split train"),
        ({}, "held_out", "leaves none for the split held_out"),
        ({"grown_from": 24}, "train", "data.grown_from is 24, but there are 23 examples"),
        ({"text_length": 4}, "train", "the longest prompt has 5 tokens"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(change, split, message):
    with pytest.raises(ValueError, match=message):
        make_loader(DataConfig(**change), SyntheticSource(SPEC), split=split, process_count=2)


def test_synthetic_examples_are_the_same_everywhere_and_differ_from_each_other():
    ours, theirs = SyntheticSource(SPEC, seed=1), SyntheticSource(SPEC, seed=1)
    for name, values in ours[5][0].items():
        np.testing.assert_array_equal(values, theirs[5][0][name])
    assert len({ours[i][0]["video_latents"].tobytes() for i in range(23)}) == 23
    assert ours[0][0]["vfm_features"].shape == (2, 6, 7)


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


WORKERS = """
from refalign_jax.config import DataConfig
from refalign_jax.data.examples import Spec
from refalign_jax.data.loader import make_loader
from refalign_jax.data.synthetic import SyntheticSource

if __name__ == "__main__":
    sizes = {"text_width": 8, "vfm_width": 7, "longest_text": 5, "most_references": 2}
    spec = Spec(num_examples=9, video_latents=(1, 2, 2, 3), **sizes)
    loader = make_loader(DataConfig(batch_size=4, num_workers=2), SyntheticSource(spec))
"""
"""A program that makes a loader with workers."""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists children by /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_leave_with_a_parent_that_is_killed(tmp_path, how):
    script = tmp_path / "loop.py"
    script.write_text(WORKERS + '    for batch in loader:\n        print("batch", flush=True)\n')
    parent = subprocess.Popen(
        [sys.executable, script],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for _ in range(3):
        assert parent.stdout.readline()
    before = children(parent.pid)
    assert len(before) >= 2
    parent.send_signal(how)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(alive, before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, before))
    assert not os.path.exists(f"/proc/{parent.pid}")


def test_leaving_without_close_is_silent(tmp_path):
    script = tmp_path / "leave.py"
    script.write_text(WORKERS + "    batch = next(loader)\n    raise SystemExit(3)\n")
    done = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (3, "")


def test_subject_masks_are_padded_with_false(tmp_path):
    masks = [np.random.default_rng(i).random((i % 4, 6)) < 0.5 for i in range(4)]
    with ShardWriter(tmp_path / "d", storage=FLOAT32, made={}) as writer:
        for i, mask in enumerate(masks):
            writer.add(make(i, references=i % 4, subject_mask=mask))
    config = DataConfig(batch_size=4, max_references=2)
    (batch,) = take(make_loader(config, ShardSource(tmp_path / "d")), 1)
    assert batch["subject_mask"].shape == (4, 2, 6)
    for row, index in enumerate(batch["index"]):
        used = min(index % 4, 2)
        np.testing.assert_array_equal(batch["subject_mask"][row, :used], masks[index][:used])
        assert not batch["subject_mask"][row, used:].any()
