"""EfficientNet-lite0's published weights in torch, written anew here, against ours: every block, logits, features."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
functional = torch.nn.functional

from refalign_jax.convert.files import open_weights
from refalign_jax.encoders.efficientnet import find_weights, load_efficientnet
from refalign_jax.models.efficientnet import EfficientNetConfig, classify, encode, encode_blocks, normalize

CONFIG = EfficientNetConfig()
KERNELS = (3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def theirs():
    return torch.load(find_weights(), weights_only=True)


@pytest.fixture(scope="module")
def ours():
    return load_efficientnet(CONFIG, open_weights(find_weights()))


@pytest.fixture(scope="module")
def pixels():
    """RGB in [-1, 1]; neither square nor smooth."""
    return np.random.default_rng(0).uniform(-1, 1, (2, 64, 96, 3)).astype(np.float32)


def convolve(weights, name, norm, x, stride=1, groups=1):
    kernel = weights[f"{name}.weight"]
    size = kernel.shape[-1]
    around = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in (x.shape[3], x.shape[2])]
    x = functional.pad(x, [n for total in around for n in (total // 2, total - total // 2)])
    x = functional.conv2d(x, kernel, stride=stride, groups=groups)
    values = [weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return functional.batch_norm(x, *values, training=False, eps=1e-3)


def run_torch(weights, x):
    """Outputs of all blocks, and logits, of normalised pixels [B, 3, h, w]."""
    x, outputs = functional.relu6(convolve(weights, "_conv_stem", "_bn0", x, 2)), []
    for i, (kernel, stride) in enumerate(zip(KERNELS, STRIDES, strict=True)):
        name, before = f"_blocks.{i}", x
        if i:
            x = functional.relu6(convolve(weights, f"{name}._expand_conv", f"{name}._bn0", x))
        assert weights[f"{name}._depthwise_conv.weight"].shape[-1] == kernel
        x = functional.relu6(convolve(weights, f"{name}._depthwise_conv", f"{name}._bn1", x, stride, groups=x.shape[1]))
        x = convolve(weights, f"{name}._project_conv", f"{name}._bn2", x)
        x = x + before if x.shape == before.shape else x
        outputs.append(x)
    head = functional.relu6(convolve(weights, "_conv_head", "_bn1", x))
    return outputs, functional.linear(head.mean((2, 3)), weights["_fc.weight"], weights["_fc.bias"])


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def first(pixels):
    """Pixels in [-1, 1] as torch takes them, (x - 127) / 128 of x in [0, 255], channels first."""
    return torch.from_numpy(((pixels + 1) * 127.5 - 127) / 128).permute(0, 3, 1, 2).contiguous()


def test_every_block_and_the_logits(theirs, ours, pixels):
    with torch.inference_mode():
        outputs, logits = run_torch(theirs, first(pixels))
    found = encode_blocks(ours, normalize(pixels), CONFIG)
    assert len(found) == len(outputs) == 16
    errors = [relative(a, b.permute(0, 2, 3, 1).numpy()) for a, b in zip(found, outputs, strict=True)]
    errors.append(relative(classify(ours, normalize(pixels), CONFIG), logits.numpy()))
    assert max(errors) <= 1e-5, errors


def test_features_of_the_enlarged_image(theirs, ours, pixels):
    large = functional.interpolate(
        torch.from_numpy(pixels).permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False
    )
    with torch.inference_mode():
        expected = run_torch(theirs, first(large.permute(0, 2, 3, 1).numpy()))[0][-1].permute(0, 2, 3, 1).numpy()
    found = encode(ours, pixels, CONFIG)
    assert found.shape == (2, 4, 6, 320)
    assert relative(found, expected) <= 1e-5
