"""EfficientNet-lite0 with published weights: ImageNet's labels of photographs; sizes and layout with random ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from PIL import Image

from refalign_jax.convert.efficientnet import efficientnet_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import to_published
from refalign_jax.encoders.efficientnet import find_weights, load_efficientnet
from refalign_jax.models.efficientnet import (
    EfficientNetConfig,
    Stage,
    classify,
    encode,
    encode_blocks,
    init,
    normalize,
)

LITE0 = EfficientNetConfig()
SMALL = EfficientNetConfig(
    stem_width=4,
    stages=(
        Stage(num_blocks=1, kernel=3, stride=1, expansion=1, width=4),
        Stage(num_blocks=2, kernel=5, stride=2, expansion=2, width=6),
    ),
    head_width=8,
    num_classes=3,
)
TIGER_CAT, ESPRESSO, MOPED = 282, 967, 665


@pytest.fixture(scope="module")
def params():
    return jax.jit(init, static_argnums=0)(SMALL, jax.random.key(0))


@pytest.fixture(scope="module")
def pixels():
    return jax.random.uniform(jax.random.key(1), (2, 16, 24, 3), minval=-1)


def centre(photograph):
    """The 224 x 224 pixels in the middle, the short side scaled to 256."""
    image = Image.fromarray(photograph)
    scale = 256 / min(image.size)
    image = image.resize([round(scale * n) for n in image.size], Image.Resampling.BICUBIC)
    left, top = ((n - 224) // 2 for n in image.size)
    return np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 127.5 - 1


def test_labels_of_photographs():
    weights = load_efficientnet(LITE0, open_weights(find_weights()))
    photographs = (skimage.data.chelsea(), skimage.data.coffee(), skimage.data.stereo_motorcycle()[0])
    images = np.stack([centre(photograph) for photograph in photographs])
    probabilities = np.asarray(jax.nn.softmax(classify(weights, normalize(images), LITE0)))
    np.testing.assert_array_equal(probabilities.argmax(-1), [TIGER_CAT, ESPRESSO, MOPED])
    assert probabilities[0, TIGER_CAT] > 0.3
    assert probabilities[1, ESPRESSO] > 0.9
    assert probabilities[2, MOPED] > 0.4
    features = encode(weights, images[:, :96, :96], LITE0)
    assert features.shape == (3, 6, 6, 320)


def test_sizes_of_lite0():
    shapes = jax.eval_shape(lambda key: init(LITE0, key), jax.random.key(0))
    kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(shapes) if "kernel" in str(path[-1])]
    assert len(kernels) == 1 + 2 + 15 * 3 + 1 + 1
    trained = [x for path, x in jax.tree_util.tree_leaves_with_path(shapes) if str(path[-1])[2:-2] in TRAINED]
    assert sum(x.size for x in trained) == 4_652_008  # 4.65 M, as published
    assert (LITE0.stride, LITE0.width, len(LITE0.blocks())) == (32, 320, 16)


TRAINED = ("kernel", "scale", "bias")


def test_normalize_of_known_colours():
    np.testing.assert_allclose(normalize(jnp.array([-1.0, 1.0, -1 / 255])), [-127 / 128, 1, 0], atol=1e-6)


def test_features_are_the_last_block_of_the_enlarged_image(params, pixels):
    features = encode(params, pixels, SMALL)
    assert features.shape == (2, 8, 12, 6)
    large = jax.image.resize(pixels, (2, 32, 48, 3), "bilinear")
    np.testing.assert_allclose(features, encode_blocks(params, normalize(large), SMALL)[-1], rtol=1e-5, atol=1e-6)


def test_images_of_a_batch_do_not_mix(params, pixels):
    np.testing.assert_allclose(encode(params, pixels, SMALL)[1:], encode(params, pixels[1:], SMALL), atol=1e-6)


@pytest.mark.parametrize("size", [(18, 16), (16, 18), (0, 16)])
def test_sizes_off_the_grid_are_refused(params, size):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} pixels; EfficientNet needs multiples of 4"):
        encode_blocks(params, jnp.zeros((1, *size, 3)), SMALL)
    odd = tuple(n + n // 16 for n in size)
    with pytest.raises(ValueError, match=rf"{odd[0]}x{odd[1]} pixels; EfficientNet's features need multiples of 2"):
        encode(params, jnp.zeros((1, *odd, 3)), SMALL)


def test_published_names_and_back(params):
    tensors = dict(to_published(efficientnet_table(SMALL), params))
    assert tensors["_blocks.1._depthwise_conv.weight"].shape == (8, 1, 5, 5)
    assert "_blocks.0._expand_conv.weight" not in tensors
    again = load_efficientnet(SMALL, Stored(tensors | {"_bn0.num_batches_tracked": np.int64(7)}))
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, params))
    del tensors["_bn1.running_var"]
    with pytest.raises(ValueError, match=r"1 missing: _bn1.running_var \[8\]"):
        load_efficientnet(SMALL, Stored(tensors))


@dataclasses.dataclass
class Stored:
    """Tensors in memory as `table.Tensors`."""

    tensors: dict
    source = "memory"

    def __post_init__(self):
        self.shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
        self.dtypes = {name: value.dtype for name, value in self.tensors.items()}
        self.metadata = {}

    def read(self, name):
        return self.tensors[name]
