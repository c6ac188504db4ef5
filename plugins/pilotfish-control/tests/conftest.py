"""Networks of random weights that steer, in files as their trainers write them."""

import contextlib
from types import SimpleNamespace

import diffusers
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pilotfish import Guide, Plugin, Sampler
from pilotfish.testing import random_pipeline


@pytest.fixture(scope="session")
def pipelines():
    """The random pipeline of a family, made once; nobody changes it."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = random_pipeline(family=family)
        return made[family]

    return of


@pytest.fixture(scope="session")
def samplers(pipelines):
    return lambda family: Sampler.from_pipeline(pipelines(family))


def noise_picture(seed, size=32):
    values = torch.rand(size, size, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((values * 255).byte().numpy())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Two picture files of 32 x 32 random pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{seed}.png" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        noise_picture(seed).save(path)
    return paths


def controlnet(pipeline, seed=5, factor=2, **options):
    """A ControlNet of random weights for a pipeline's network, and a VAE of that factor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if hasattr(pipeline, "unet"):
            halves = factor.bit_length() - 1
            made = diffusers.ControlNetModel.from_unet(
                pipeline.unet, conditioning_embedding_out_channels=(4,) + (8,) * halves
            )
        elif isinstance(pipeline, diffusers.FluxPipeline):
            config = {**pipeline.transformer.config, **options}
            made = diffusers.FluxControlNetModel.from_config(config)
        else:
            config = {**pipeline.transformer.config, "num_layers": 1, **options}
            made = diffusers.SD3ControlNetModel.from_config(config)
        for parameter in made.parameters():  # its last layers begin at zero
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


def write_lora(pipeline, folder, seed, alpha=8, parts=()):
    """A LoRA of random weights for a pipeline's networks, as a trainer with diffusers writes it.

    Args:
        parts: of text encoders; the network that predicts where there are none.
    """
    network = "unet" if hasattr(pipeline, "unet") else "transformer"
    content, config = {}, None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in parts or (network,):
            targets = ["q_proj", "v_proj"] if parts else ["to_q", "to_v", "to_out.0"]
            config = peft.LoraConfig(
                r=2, lora_alpha=alpha, target_modules=targets, init_lora_weights=False
            )
            network = getattr(pipeline, name)
            peft.inject_adapter_in_model(config, network)
            content[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(network)
            content[f"{name}_lora_adapter_metadata"] = config.to_dict()
    type(pipeline).save_lora_weights(folder, **content)
    return folder / "pytorch_lora_weights.safetensors"


SEES, WIDTH = 24, 16  # of the image encoder: what it projects to, and its own


def write_adapter(unet, file, kind, seed):
    """Weights of a random IP-Adapter as its authors publish them: of four tokens, or of all."""
    draw = torch.Generator().manual_seed(seed)
    cross = unet.config.cross_attention_dim
    shapes = {
        "plain": {"proj.weight": (4 * cross, SEES), "proj.bias": (4 * cross,),
                  "norm.weight": (cross,), "norm.bias": (cross,)},
        "full": {"proj.0.weight": (WIDTH, WIDTH), "proj.0.bias": (WIDTH,),
                 "proj.2.weight": (cross, WIDTH), "proj.2.bias": (cross,),
                 "proj.3.weight": (cross,), "proj.3.bias": (cross,)},
    }[kind]  # fmt: skip
    content = {f"image_proj.{n}": torch.randn(s, generator=draw) for n, s in shapes.items()}
    across = [m for n, m in unet.named_modules() if n.endswith("attn2")]
    for name, place in zip(unet.attn_processors, range(len(unet.attn_processors)), strict=True):
        if "attn2" in name:
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            for part in ("to_k_ip", "to_v_ip"):
                weight = torch.randn(hidden, cross, generator=draw)
                content[f"ip_adapter.{place}.{part}.weight"] = weight
    assert len(content) == len(shapes) + 2 * len(across)
    save_file(content, file)


def image_encoder(sees=SEES):
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=sees,
    )
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return transformers.CLIPVisionModelWithProjection(config)


class Blue(Guide):
    def loss_guidance(self, step):
        return (step.image[:, 2] - 0.9).abs().mean(dim=(1, 2))


class Identity:
    """Attention that looks at nothing but each token itself."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return attn.to_out[0](attn.to_v(hidden_states))


@contextlib.contextmanager
def perturbed(network):
    attention = [m for name, m in network.named_modules() if name.endswith("attn1")]
    before = [module.processor for module in attention]
    for module in attention:
        module.processor = Identity()
    try:
        yield
    finally:
        for module, processor in zip(attention, before, strict=True):
            module.processor = processor


class Perturbed(Plugin):
    """Perturbed attention guidance (Ahn et al. 2024, arXiv 2403.17377)."""

    def combine_predictions(self, prediction, cond, step):
        worse = step.predict(patch=lambda: perturbed(step.run.model.denoiser))
        return prediction + 2 * (cond - worse)


@pytest.fixture(scope="session")
def make():
    """What makes such networks and files, and two plugins that they run with."""
    return SimpleNamespace(
        controlnet=controlnet,
        lora=write_lora,
        adapter=write_adapter,
        image_encoder=image_encoder,
        blue=Blue,
        perturbed=Perturbed,
    )
