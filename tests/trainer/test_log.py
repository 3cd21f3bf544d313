"""The progress bar."""

import re

from refalign_jax.config import TrainConfig
from refalign_jax.trainer.log import Log


def test_the_bar_fits_80_columns_and_begins_with_the_first_step(tmp_path, capsys):
    """Before it, the step is compiled; that time would be in the estimate of what is left."""
    config = TrainConfig(folder=str(tmp_path), steps=32112)
    metrics = {"loss": 0.012345, "pull": 0.123456, "push": 0.00123, "grad_norm": 12.345, "mfu": 0.3123}
    with Log(config, 32100, {}) as log:
        log.note({"compile_seconds": 70.0})
        assert capsys.readouterr().err == ""
        for step in range(32101, 32113):
            log.step(step, [], {**metrics, "examples_per_second": 123.4, "data_wait": 0.01})
    bars = re.split(r"[\r\n]+", capsys.readouterr().err)
    last = [bar for bar in bars if bar][-1]
    assert re.search(r"100%\|█{6}\| 32112/32112 \[00:0\d<00:00, loss=0\.0123, ex/s=123, MFU=0\.312\]", last), last
    assert max(map(len, bars)) <= 80
