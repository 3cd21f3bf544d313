"""The networks of OpenS2V-Eval's metrics against transformers and torch, with random weights."""

import itertools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file
from torch import nn

from refalign_jax.evaluate.aesthetic import HEAD_WIDTHS, AestheticScorer
from refalign_jax.evaluate.faces import FaceEncoder
from refalign_jax.models import iresnet


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def head():
    """LAION's predictor; dropout has no parameters."""
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(HEAD_WIDTHS)]
    parts = [layers[0], nn.Dropout(0.2), layers[1], nn.Dropout(0.2), layers[2], nn.Dropout(0.1), *layers[3:]]
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize(("size", "patch"), [(56, 14), (64, 16)])
def test_the_aesthetic_score(tmp_path, size, patch):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=size,
        patch_size=patch,
        projection_dim=768,
    )
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "clip")
    judge = head()
    torch.save({f"layers.{name}": value for name, value in judge.state_dict().items()}, tmp_path / "head.pth")

    frames = np.random.default_rng(0).integers(0, 255, (3, 60, 90, 3)).astype(np.uint8)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    with torch.inference_mode():
        pixels = processor(images=list(frames), return_tensors="pt").pixel_values
        embeddings = theirs(pixels).image_embeds
        expected = judge(embeddings / embeddings.norm(dim=-1, keepdim=True)).mean().item()
    found = AestheticScorer(tmp_path / "clip", tmp_path / "head.pth", batch_size=2).score_frames(frames)
    assert found == pytest.approx(expected, rel=1e-5)
    assert json.loads((tmp_path / "clip/config.json").read_text())["model_type"] == "clip_vision_model"


class Unit(nn.Module):
    """A unit of CurricularFace's backbone."""

    def __init__(self, inputs, outputs, stride, middle_norm):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride)
        if inputs != outputs:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        middle = [nn.BatchNorm2d(outputs)] if middle_norm else []
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            *middle,
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class Backbone(nn.Module):
    """IR-101 as CurricularFace publishes it."""

    def __init__(self, config):
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.body = nn.Sequential(*(Unit(*sizes, config.middle_norm) for sizes in config.units()))
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(512 * 7 * 7, 512),
            nn.BatchNorm1d(512, affine=config.last_affine),
        )

    def forward(self, x):
        return self.output_layer(self.body(self.input_layer(x)))


@pytest.mark.parametrize(("middle_norm", "last_affine"), [(False, True), (True, False)])
def test_face_embeddings(tmp_path, middle_norm, last_affine):
    torch.manual_seed(0)
    config = iresnet.IResNetConfig(middle_norm=middle_norm, last_affine=last_affine)
    theirs = Backbone(config).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(std=0.01)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, std=0.01)
    save_file(theirs.state_dict(), tmp_path / "face.safetensors")
    faces = np.random.default_rng(0).integers(0, 255, (2, 112, 112, 3)).astype(np.uint8)
    with torch.inference_mode():
        expected = theirs((torch.from_numpy(faces).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
        expected = (expected / expected.norm(dim=-1, keepdim=True)).numpy()
    found = FaceEncoder(tmp_path / "face.safetensors", batch_size=2).embed(faces)
    assert relative(found, expected) <= 1e-5
    assert float(found[0] @ found[1]) < 0.999, "the two faces differ"
