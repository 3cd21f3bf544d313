# The image that the recipes in docs/many-hosts.md run: this package in /app, with JAX for one platform.
#
#   docker build --build-arg EXTRA=tpu -t IMAGE .     TPUs
#   docker build --build-arg EXTRA=cuda -t IMAGE .    NVIDIA GPUs; CUDA comes with JAX's wheels
#   docker build -t IMAGE .                           CPUs
#
# EXTRA=tpu,gs and EXTRA=cuda,gs also read and write gs://.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# git records the commit beside every checkpoint.
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*

WORKDIR /app
ARG EXTRA=

# Dependencies first, around an empty package, so that a change of the code does not install them again.
COPY setup.py pyproject.toml README.md LICENSE ./
RUN mkdir refalign_jax tools configs && pip install --no-cache-dir ".${EXTRA:+[$EXTRA]}"
# jax[tpu] may bring an older libtpu, with which a step needs far more memory; see docs/pods-and-memory.md.
RUN case ",$EXTRA," in *,tpu,*) pip install --no-cache-dir --upgrade "libtpu>=0.0.52";; esac

COPY . .
RUN pip install --no-cache-dir --no-deps --editable . && git config --global --add safe.directory /app

CMD ["python", "tools/train.py", "--help"]
