"""Every configuration, every default; imports no JAX, so that a command can refuse a mistake at once."""

from refalign_jax.config.benchmark import Mode, Plan
from refalign_jax.config.data import (
    FIELDS,
    MAX_TEXT_LENGTH,
    AugmentConfig,
    ComputeDtype,
    DataConfig,
    FloatStorage,
    PrepareConfig,
    Storage,
    SyntheticConfig,
)
from refalign_jax.config.demo import DemoConfig
from refalign_jax.config.model import (
    AlignmentConfig,
    AttentionKernel,
    AttentionTiles,
    DiTConfig,
    DType,
    FlowConfig,
    ModelConfig,
    RematPolicy,
    wan_1_3b,
    wan_14b,
)
from refalign_jax.config.recipe import RECIPES, find_recipe, flat_fields, from_dict, read_recipe, without_data
from refalign_jax.config.sample import (
    SAVED,
    WAN_NEGATIVE_PROMPT,
    ExportConfig,
    GenerateConfig,
    SamplingConfig,
    SigmaTable,
    SolverName,
)
from refalign_jax.config.sources import OpenS2VConfig, PhantomConfig
from refalign_jax.config.train import Config, DropoutConfig, MeshConfig, OptimizerConfig, TrainConfig

__all__ = [
    "FIELDS",
    "MAX_TEXT_LENGTH",
    "RECIPES",
    "SAVED",
    "WAN_NEGATIVE_PROMPT",
    "AlignmentConfig",
    "AttentionKernel",
    "AttentionTiles",
    "AugmentConfig",
    "ComputeDtype",
    "Config",
    "DType",
    "DataConfig",
    "DemoConfig",
    "DiTConfig",
    "DropoutConfig",
    "ExportConfig",
    "FloatStorage",
    "FlowConfig",
    "GenerateConfig",
    "MeshConfig",
    "Mode",
    "ModelConfig",
    "OpenS2VConfig",
    "OptimizerConfig",
    "PhantomConfig",
    "Plan",
    "PrepareConfig",
    "RematPolicy",
    "SamplingConfig",
    "SigmaTable",
    "SolverName",
    "Storage",
    "SyntheticConfig",
    "TrainConfig",
    "find_recipe",
    "flat_fields",
    "from_dict",
    "read_recipe",
    "wan_1_3b",
    "wan_14b",
    "without_data",
]
