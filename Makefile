# Every target makes .venv and installs what it needs, once; Python 3.11 or newer: `make test PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: install test lint format parity ahead tables demo demo-compare clean

# The package and its command `refalign`, with what tests, lint and documentation need.
install: $(VENV)/.installed
	@echo 'Installed in $(VENV). Activate it, and all commands work as the README has them:'
	@echo '    . $(VENV)/bin/activate'
	@echo '    refalign --help            the commands; python tools/NAME.py runs the same'
	@echo 'For an accelerator, then also: pip install -e ".[tpu]" or pip install -e ".[cuda]"'

$(VENV)/.installed: setup.py pyproject.toml
	@echo 'Installing into $(VENV), in four steps; nothing outside of it is changed.'
	@echo '1. Checking that $(PYTHON) is 3.11 or newer'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	@echo '2. Making $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@echo '3. Updating pip in it'
	@$(BIN)/pip install --quiet --upgrade pip
	@echo '4. Installing JAX, Flax, FFmpeg, Matplotlib, scikit-learn, pytest and the others of setup.py: some minutes'
	@echo '   (what pip does meanwhile: tail -f $(VENV)/install.log)'
	@$(BIN)/pip install --editable '.[dev]' > $(VENV)/install.log 2>&1 || { tail -n 20 $(VENV)/install.log; exit 1; }
	@touch $@

$(VENV)/.parity: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[parity,ray]'
	touch $@

# Gradio wants an older Pillow than the rest, so it gets an environment on top of the other one, which stays as it is.
$(VENV)/.studio: $(VENV)/.installed
	$(BIN)/python -m venv $(VENV)/studio
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(VENV)/studio/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(VENV)/studio/bin/pip install --quiet --editable '.[studio]'
	touch $@

$(VENV)/.ahead: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[ahead,ahead-gpu]'
	touch $@

# All tests but those of `make parity` and `make ahead`. A file's tests run in one process, which shares their programs.
test: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/parity --ignore-glob 'tests/perf/test_ahead*.py' \
		--ignore tests/studio/test_page.py

# Against torch, diffusers and transformers; preparation on Ray, which `make test` then runs too; and the studio's page in
# a browser.
parity: $(VENV)/.parity $(VENV)/.studio
	$(BIN)/pytest tests/parity tests/data/test_ray_engine.py
	$(VENV)/studio/bin/python -m pytest tests/studio/test_page.py

# Against the compilers of TPUs and GPUs, which need neither.
ahead: $(VENV)/.ahead
	$(BIN)/pytest tests/perf/test_ahead.py tests/perf/test_ahead_gpu.py

# A small model learns photographs on the CPU and is sampled; ends by printing the path of its report. Stopped and
# started again, it continues. Memory in huge pages: without them a third of a step goes into page faults.
DEMO = GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/demo.py

demo: $(VENV)/.installed
	$(DEMO)

# The same with the published loss, without alignment, and with targets that do not contradict themselves; five seeds.
demo-compare: $(VENV)/.installed
	$(DEMO) --compare

# Every report under benchmarks/ that the compilers made, made again by its own command; then the tables. Takes hours:
# name some to make these alone, as in `make tables REPORTS="benchmarks/sample/*.json"`.
REPORTS ?= $(wildcard $(addprefix benchmarks/,$(addsuffix /*.json,compiled gpu remat sample pods)))

tables: $(VENV)/.ahead
	$(BIN)/python tools/compile.py --again $(REPORTS)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
