"""The whole way from a prompt to pixels, through the command line alone, against diffusers' WanPipeline in float32."""

import json

import numpy as np
import pytest
from support import tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file

from refalign_jax.command import load
from refalign_jax.config import WAN_NEGATIVE_PROMPT
from refalign_jax.data.video import read_comment

PROMPT = "A  cat walks &amp; a dog runs fast"
FRAMES, ROWS, COLUMNS = 5, 32, 48
SCHEDULE = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


def tokenizer():
    """Words and characters, with UMT5's conventions: NFKC, pad 0, end token 1, no start token."""
    import unicodedata

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", "cat", "dog", "walks", "runs", "fast", "a", "A", "&", *"bcdefgh,."]
    pieces = list(dict.fromkeys([*pieces, *unicodedata.normalize("NFKC", WAN_NEGATIVE_PROMPT)]))
    model = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **words), len(pieces)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny random pipeline of diffusers, and where it is saved as it is published."""
    torch.manual_seed(0)
    words, count = tokenizer()
    text = transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=count, d_model=32, d_kv=8, d_ff=48, num_heads=2, num_layers=2)
    )
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=40, num_layers=2
    )
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    for network in (text, transformer, vae):
        network.eval()
    with torch.no_grad():
        for network in (text, transformer):
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    scheduler = diffusers.UniPCMultistepScheduler(**SCHEDULE)
    pipeline = diffusers.WanPipeline(
        tokenizer=words, text_encoder=text, transformer=transformer, vae=vae, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("wan")
    pipeline.save_pretrained(folder)
    return folder, pipeline


SCHEDULERS = {
    "unipc diffusers-0.37": lambda: diffusers.UniPCMultistepScheduler(**SCHEDULE),
    "dpm++ diffusers-0.36": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **SCHEDULE),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_prompt_to_pixels(saved, tmp_path, name):
    root, theirs = saved
    solver, sigmas = name.split()
    noise = np.random.default_rng(1).standard_normal((1, 16, 2, ROWS // 8, COLUMNS // 8)).astype(np.float32)
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    theirs.scheduler = SCHEDULERS[name]()
    settings = {"height": ROWS, "width": COLUMNS, "num_frames": FRAMES, "num_inference_steps": 8}
    settings |= {"guidance_scale": 5.0, "prompt": PROMPT, "negative_prompt": WAN_NEGATIVE_PROMPT}
    latents = theirs(latents=torch.from_numpy(noise), output_type="latent", **settings).frames[0].numpy()
    pixels = theirs(latents=torch.from_numpy(noise), output_type="np", **settings).frames[0]

    out = tmp_path / "video.mp4"
    options = (
        f"--weights {root} --height {ROWS} --width {COLUMNS} --num-frames {FRAMES} --num-steps 8 --solver {solver}"
    )
    options += f" --text-guidance 5 --sigmas {sigmas} --integer-timesteps True --dtype float32 --save latents,pixels"
    options += f" --noise {tmp_path}/noise.safetensors --out {out}"
    load("sample")([*options.split(), "--prompt", PROMPT], "sample")

    ours = load_file(tmp_path / "video-latents.safetensors")["latents"]
    assert tiny.relative(ours, latents) <= 1e-5
    decoded = load_file(tmp_path / "video-pixels.safetensors")["pixels"]
    assert np.abs((decoded.clip(-1, 1) + 1) / 2 - pixels).max() <= 1e-4
    about = json.loads(read_comment(out))
    assert (about["prompt"], about["made"]["sampling"]["sigmas"]) == (PROMPT, sigmas)
