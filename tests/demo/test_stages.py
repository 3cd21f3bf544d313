"""The whole demo at a size that learns nothing: every stage runs, and what is done is not done again."""

import dataclasses
import json

import pytest
from PIL import Image
from support import runs
from support.places import ROOT

from refalign_jax.config import (
    AlignmentConfig,
    Config,
    DataConfig,
    DemoConfig,
    DiTConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    read_recipe,
)
from refalign_jax.convert.checkpoint import find_checkpoint, read_json
from refalign_jax.demo import stages
from refalign_jax.demo.photo import sample_photograph
from refalign_jax.demo.photographs import UNSEEN
from refalign_jax.demo.stages import compare, demo
from refalign_jax.report import page
from refalign_jax.trainer.loop import train

RECIPE = ROOT / "configs" / "demo.py"

SMALL = Config(
    model=ModelConfig(
        dit=DiTConfig(
            width=24,
            num_layers=2,
            num_heads=2,
            ffn_width=40,
            text_width=16,
            frequency_width=16,
            latent_channels=4,
            compute_dtype="float32",
            remat="none",
        ),
        alignment=AlignmentConfig(num_blocks=2, vfm_width=320),
    ),
    data=DataConfig(batch_size=8, max_references=2, text_length=28, held_out=8),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    sampling=SamplingConfig(num_steps=2),
    train=TrainConfig(steps=2, save_every=1, compilation_cache=str(runs.CACHE)),
)


def _of_one_step(config):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1))


@pytest.mark.slow
def test_every_stage_once(tmp_path, monkeypatch):
    config = DemoConfig(folder=tmp_path / "demo", clips=24, samples=3, seeds=1)
    run = config.folder / "seed-0"

    # Training is stopped after its first step, and gone on with.
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", lambda config: train(_of_one_step(config)))
        with pytest.raises(InterruptedError, match=r"seed-0 was stopped at step 1 of 2; start again to go on"):
            demo(config, SMALL)
    assert not (run / "evaluation.json").exists()
    report = demo(config, SMALL)
    assert find_checkpoint(run)[0].name == "2"
    assert report == tmp_path / "demo" / "report.html"
    shown = report.read_text()
    entries = json.loads((run / "samples" / "samples.json").read_text())
    assert [entry["id"] for entry in entries] == ["00016", "00017", "00018"]  # the first of those held out
    for entry in entries:
        assert entry["scores"].keys() == {"right", "SSIM"}
        for name in (entry["video"], entry["truth"], *(reference["image"] for reference in entry["references"])):
            assert (run / "samples" / name).exists()
        assert entry["prompt"] in shown
    found = json.loads((run / "evaluation.json").read_text())
    assert found["numbers"]["right subject in the true clips"] == 1
    assert found["numbers"]["samples"] == 3
    assert found["introduction"]["paragraphs"][0][:23] == "A small video diffusion"
    assert "RefAlign in small" in shown

    # The trained run with a photograph of one's own.
    image = tmp_path / "me.jpg"
    Image.new("RGB", (64, 48), (200, 90, 30)).save(image)
    picture, sentence = sample_photograph(image, run)
    assert Image.open(picture).size == (4 * 192, 4 * 192)
    assert sentence.startswith("Of the 16 subjects of the demo, the samples resemble most: ")

    # With other losses: the run that is there is taken as it is.
    done = [*run.rglob("*.mp4"), *(config.folder / "dataset").glob("*.array_record"), run / "evaluation.json"]
    before = {file: file.stat().st_mtime_ns for file in done}
    asked = []
    monkeypatch.setattr(page, "write_report", lambda *arguments: asked.append(arguments))
    report = compare(config, SMALL)
    other, options = (config.folder / f"seed-0-{loss}" for loss in ("unaligned", "options"))
    assert report == config.folder / "comparison.html"
    ((shown_run, out, compared),) = asked
    assert (shown_run, out) == (run, report)
    assert compared == {
        "What alignment changes": [(run, other)],
        "What alignment changes with targets that do not contradict themselves": [(options, other)],
    }
    assert {file: file.stat().st_mtime_ns for file in before} == before
    first, second, third = (read_json(find_checkpoint(folder)[0], "config") for folder in (run, other, options))
    changed = [
        tuple(config["model"]["alignment"].pop(name) for name in ("weight", "center_targets", "subject_patches_only"))
        for config in (first, second, third)
    ]
    assert changed == [(1, "none", False), (0, "none", False), (3, "dataset", True)]
    for config in (first, second, third):
        config["train"].pop("folder")
    assert first == second == third


def test_the_recipe_fits_the_clips():
    """`make demo` would fail late otherwise."""
    recipe = read_recipe(RECIPE)
    assert recipe.model.alignment.weight > 0
    assert recipe.data.held_out >= DemoConfig().samples
    assert DemoConfig().clips > 10 * recipe.data.held_out


def test_unseen_subjects_are_in_held_out_clips_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stages, "prepare", lambda *arguments: asked.append(arguments))

    def subjects(records):
        return [{actor["subject"] for actor in record.metadata["scene"]["actors"]} for record in records]

    config = DemoConfig(folder=tmp_path, clips=24, unseen=3)
    assert stages.prepare_dataset(config, SMALL) == tmp_path / "unseen-3" / "dataset"
    records, _, _, source = asked.pop()
    shown, held_out = subjects(records)[:16], subjects(records)[16:]
    assert len(records) == 24
    assert set.union(*held_out) == set(UNSEEN)
    assert not set.union(*shown) & set(UNSEEN)
    assert {len(scene) for scene in held_out} == {1, 2}

    # Another number of clips does not give a clip that is there another content, and is another dataset.
    stages.prepare_dataset(dataclasses.replace(config, clips=20), SMALL)
    fewer, _, _, other = asked.pop()
    assert [(one.id, one.metadata) for one in fewer] == [(one.id, one.metadata) for one in records[:12] + records[16:]]
    assert source["settings"] != other["settings"]
    assert stages.run_config(config, SMALL, tmp_path).train.folder == str(tmp_path / "unseen-3" / "seed-0")
    assert "They show 3 subjects that no clip of training shows." in str(stages.introduction(SMALL, 8, 3))
    assert "They show" not in str(stages.introduction(SMALL, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"clips": 8}, "must be above 8, the number of held-out clips"), ({"steps": 1}, "warmup_steps=2 leaves nothing")],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_drawn(tmp_path, changes, message):
    recipe = dataclasses.replace(
        SMALL, optimizer=OptimizerConfig(schedule="cosine", warmup_steps=2), train=TrainConfig()
    )
    with pytest.raises(ValueError, match=message):
        demo(DemoConfig(folder=tmp_path, **changes), recipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [-1, 1, 4])
def test_unseen_subjects_are_two_or_three(number):
    with pytest.raises(ValueError, match=f"DemoConfig.unseen={number} "):
        DemoConfig(unseen=number)


@pytest.mark.parametrize("name", ["clips", "samples", "seeds"])
def test_a_demo_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        DemoConfig(**{name: 0})
