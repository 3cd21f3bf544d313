"""Several datasets by weights: shares, order, resume, held-out examples, and what can't be mixed."""

import dataclasses
import json

import numpy as np
import pytest
from support.examples import FLOAT32, make

from refalign_jax.config import Config, DataConfig, flat_fields
from refalign_jax.config.recipe import from_dict
from refalign_jax.data.examples import Spec
from refalign_jax.data.loader import make_loader
from refalign_jax.data.mixture import Mixture, names_of, open_dataset
from refalign_jax.data.order import spread
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.synthetic import SyntheticSource

MIX = (("a", 6.0), ("b", 4.0))
SPEC = Spec(
    num_examples=23,
    video_latents=(2, 4, 6, 3),
    text_width=8,
    vfm_width=7,
    longest_text=5,
    most_references=2,
)


def source(*sizes):
    parts = [dataclasses.replace(SPEC, num_examples=size) for size in sizes]
    return Mixture([SyntheticSource(spec, seed) for seed, spec in enumerate(parts)])


def config(**changes):
    return DataConfig(**{"mix": MIX, "batch_size": 10, "text_length": 5, "shuffle_seed": 3} | changes)


def take(loader, count, name="index"):
    rows = [next(loader)[name].tolist() for _ in range(count)]
    loader.close()
    return rows


def flat(rows):
    return [value for row in rows for value in row]


def test_every_batch_has_the_shares_and_every_epoch_each_example_once():
    mixed = source(23, 7)
    rows = take(make_loader(config(), mixed), 12)
    for row in rows:
        assert sum(index < 23 for index in row) == 6
    first, second = ([i for i in flat(rows) if (i >= 23) == which] for which in (False, True))
    assert sorted(first[:23]) == sorted(first[23:46]) == list(range(23))
    for epoch in range(6):
        assert sorted(second[7 * epoch : 7 * epoch + 7]) == list(range(23, 30))
    assert first[:23] != first[23:46]
    assert take(make_loader(config(), mixed), 12) == rows
    assert take(make_loader(config(shuffle_seed=4), mixed), 12) != rows


def test_a_mixture_pads_where_one_of_its_datasets_does():
    full, fewer = (dataclasses.replace(SPEC, fewest_references=n) for n in (2, 1))
    mixtures = [Mixture([SyntheticSource(full), SyntheticSource(other)]) for other in (full, fewer)]
    assert [mixture.spec.pads(2) for mixture in mixtures] == [False, True]


def test_datasets_of_one_size_are_not_shuffled_alike():
    rows = flat(take(make_loader(config(mix=(("a", 1.0), ("b", 1.0))), source(23, 23)), 4))
    first, second = [i for i in rows if i < 23], [i - 23 for i in rows if i >= 23]
    assert first != second


@pytest.mark.parametrize("processes", [2, 5])
def test_the_order_is_independent_of_the_number_of_processes(processes):
    mixed, loaders = source(23, 7), range(processes)
    rows = [
        take(make_loader(config(), mixed, process_index=i, process_count=processes), 4, name)
        for name in ("index", "dataset")
        for i in loaders
    ]
    whole = [take(make_loader(config(), mixed), 4, name) for name in ("index", "dataset")]
    joined = [[flat(parts) for parts in zip(*rows[k * processes : (k + 1) * processes], strict=True)] for k in (0, 1)]
    assert joined == whole


@pytest.mark.parametrize("done", [1, 4, 9])
def test_resume_is_exact_at_another_batch_size(done):
    mixed = source(23, 7)
    expected = flat(take(make_loader(config(), mixed), 20))
    loader = make_loader(config(), mixed)
    take_without_closing = [next(loader) for _ in range(done)]
    assert len(take_without_closing) == done
    state = json.loads(json.dumps(loader.get_state()))
    loader.close()
    again = make_loader(config(batch_size=4, held_out=0), mixed)
    again.set_state(state)
    assert flat(take(again, 20)) == expected[10 * done : 10 * done + 80]


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        ({"mix": (("a", 1.0), ("b", 1.0))}, (23, 7), r"saved with proportions \[3, 2\], now it is \[1, 1\]"),
        ({"mix": (("a", 3.0), ("b", 2.0))}, (22, 8), "The dataset had 23 examples .* now it has 22"),
        ({"shuffle_seed": 4}, (23, 7), "saved with shuffle_seed 3, now it is 4"),
        ({"held_out": 5}, (23, 7), "saved with num_examples 23, now it is 20"),
        ({}, (23, 9), "7 examples when the run began, now it has 9, and data.grown_from is 0"),
    ],
)
def test_another_order_is_refused(change, sizes, message):
    loader = make_loader(config(), source(23, 7))
    state = loader.get_state()
    loader.close()
    with pytest.raises(ValueError, match=message):
        make_loader(config(**change), source(*sizes)).set_state(state)
    single = make_loader(DataConfig(text_length=5, shuffle_seed=3), source(23).parts[0])
    with pytest.raises(ValueError, match=r"saved with proportions \[3, 2\], now it is \[1\]"):
        single.set_state(state)


def test_one_dataset_grows_and_the_other_goes_on():
    """After its epoch that had begun, the second dataset has its new examples; the first is not disturbed."""
    loader = make_loader(config(), source(23, 7))
    before = flat(next(loader)["index"].tolist() for _ in range(3))
    state = loader.get_state()
    loader.close()
    grown = make_loader(config(grown_from=(0, 7)), source(23, 9))
    grown.set_state(state)
    indices = before + flat(take(grown, 9))
    unchanged = flat(take(make_loader(config(), source(23, 7)), 12))
    assert [i for i in indices if i < 23] == [i for i in unchanged if i < 23]
    second = [i for i in indices if i >= 23]
    assert sorted(second[7:14]) == list(range(23, 30))
    assert sorted(second[14:23]) == list(range(23, 32))


def test_each_dataset_holds_out_its_share():
    settings, mixed = config(held_out=6, batch_size=5), source(23, 7)
    assert [part.held_out for part in settings.parts] == [4, 2]
    held = [19, 20, 21, 22, 28, 29]
    loader = make_loader(settings, mixed, split="held_out")
    rows = [next(loader) for _ in range(3)]
    loader.close()
    assert flat(row["index"].tolist() for row in rows)[:12] == held * 2
    assert flat(row["place"].tolist() for row in rows)[:12] == [0, 1, 2, 3, 4, 5] * 2
    assert flat(row["dataset"].tolist() for row in rows)[:12] == [0, 0, 0, 0, 1, 1] * 2
    assert not set(flat(take(make_loader(settings, mixed), 40))) & set(held)
    with pytest.raises(ValueError, match=r"data\.held_out of b is 8 of 7 examples"):
        make_loader(config(held_out=20), mixed)


@pytest.mark.parametrize(
    ("weights", "expected"), [((6, 4), (3, 2)), ((0.6, 0.4), (3, 2)), ((7, 3), (7, 3)), ((2,), (1,))]
)
def test_weights_are_a_ratio(weights, expected):
    mix = tuple((name, float(weight)) for name, weight in zip("ab", weights, strict=False))
    assert DataConfig(mix=mix).proportions == expected


@pytest.mark.parametrize("proportions", [(3, 2), (7, 3), (1, 10), (2, 3, 4)])
def test_turns_never_lag_behind_the_shares(proportions):
    """After any number of turns, each dataset has its share of them to within one."""
    pattern = np.tile(spread(proportions), 2)
    assert np.bincount(pattern).tolist() == [2 * one for one in proportions]
    for number, one in enumerate(proportions):
        share = np.arange(1, len(pattern) + 1) * one / sum(proportions)
        assert np.abs(np.cumsum(pattern == number) - share).max() <= 1


def write(path, count, made=None, storage=FLOAT32, **changes):
    with ShardWriter(path, storage=storage, made=made or {}) as writer:
        for i in range(count):
            writer.add(make(i, **changes))
    return str(path)


def test_a_corrupt_record_is_replaced_within_its_dataset(tmp_path):
    a, b = write(tmp_path / "a", 3), write(tmp_path / "b", 2)
    shard = tmp_path / "b" / "examples-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[data.index(b'"id\\": \\"e1\\"') + 100] ^= 1
    shard.write_bytes(data)
    settings = config(mix=((a, 1.0), (b, 1.0)), batch_size=4, max_corrupt=1)
    loader = make_loader(settings, open_dataset(settings))
    rows = next(loader)
    loader.close()
    assert rows["dataset"].tolist() == [0, 1, 0, 1]
    assert [index for index in rows["index"].tolist() if index > 2] == [3, 3]


def test_what_differs_is_listed_at_once(tmp_path):
    encoders = {"vfm": {"name": "dinov3", "path": "x", "width": 7}, "text": {"name": "umt5", "path": "t"}}
    ours = {"encoders": encoders, "digests": {"vfm": "1" * 64, "text": "2" * 64}}
    a = write(tmp_path / "a", 1, ours)
    assert len(open_dataset(config(mix=((a, 6.0), (write(tmp_path / "same", 2, ours), 4.0))))) == 3
    moved = {**ours, "encoders": {**encoders, "vfm": {**encoders["vfm"], "path": "elsewhere"}}}
    assert len(open_dataset(config(mix=((a, 6.0), (write(tmp_path / "moved", 1, moved), 4.0))))) == 2

    theirs = {
        "encoders": {**encoders, "vfm": {"name": "dinov2", "path": "x"}},
        "digests": ours["digests"] | {"text": "3" * 64},
    }
    small = {"video_latents": np.zeros((1, 4, 6, 3), np.float32), "vfm_features": np.zeros((2, 6, 9), np.float32)}
    b = write(tmp_path / "b", 1, theirs, dataclasses.replace(FLOAT32, text="bfloat16"), **small)
    expected = (
        rf"^The datasets of data\.mix can't be mixed\. Unlike {a}, {b} has video latents \[1, 4, 6, 3\], not "
        rf"\[2, 4, 6, 3\]; {b} has VFM width 9, not 7; {b} has dtype of text \(.*\) bfloat16, not float32; {b} has the "
        rf"text encoder umt5 with sha256 333333333333…, not 222222222222…; {b} has the VFM dinov2, not dinov3\.$"
    )
    with pytest.raises(ValueError, match=expected):
        open_dataset(config(mix=((a, 6.0), (b, 4.0))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "c"}, "exclude each other"),
        ({"mix": (("a", 6.0), ("a", 4.0))}, "different folders"),
        ({"mix": (("a", 6.0), ("", 4.0))}, "different folders"),
        ({"mix": (("a", 6.0), ("b", 0.0))}, "positive weights"),
        ({"mix": (("a", 1.0), ("b", 200_001.0))}, "small whole numbers"),
        ({"mix": (("a", 1.0), ("b", float("nan")))}, "not finite"),
        ({"mix": (("a",),)}, "must hold 2 values"),
        ({"grown_from": 3}, "a number for each of the 2 datasets"),
        ({"grown_from": (5, 0), "held_out": 10}, "held_out=6 must be below grown_from=5"),
        ({"mix": (), "grown_from": (5, 0)}, "must be one number"),
    ],
    ids=str,
)
def test_settings_that_are_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_a_mixture_survives_json(tmp_path):
    whole = Config(data=config(grown_from=(9, 0)))
    saved = json.loads(json.dumps(dataclasses.asdict(whole)))
    assert from_dict(Config, saved, "x") == whole
    assert flat_fields(saved) == flat_fields(dataclasses.asdict(whole))


def test_names_of_datasets_are_short_and_different():
    assert names_of(["data/opens2v", "gs://x/phantom/"]) == ["opens2v", "phantom"]
    assert names_of(["a/d", "b/d", "c"]) == ["d_1", "d_2", "c"]
