"""Writes a run's report: losses, samples, evaluation and what its reference tokens show, as one HTML file.

python tools/report.py RUN [--out report.html] [--compare ALIGNED BASELINE [ALIGNED BASELINE ...]]
"""

if __name__ == "__main__":
    from refalign_jax.command import run
    from refalign_jax.report.page import report

    run(report)
