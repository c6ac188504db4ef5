"""What a GPU must not change, and what it must do. Tests of helpers run on the CPU too."""

import contextlib
import time
import warnings

import pytest
import torch

from pilotfish import Guide, Sampler, draw
from pilotfish.testing import random_pipeline

pytestmark = pytest.mark.slow  # each is short, together they are not

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = pytest.param("cuda", marks=GPU)
cuda_only = pytest.mark.parametrize("device", [CUDA])
everywhere = pytest.mark.parametrize("device", ["cpu", CUDA])
PROMPT = "a red cat"


class Dark(Guide):
    def loss_guidance(self, step):
        return step.image.mean(dim=(1, 2, 3))


class Smooth(Guide):
    def loss_guidance(self, step):
        return step.image.diff(dim=3).square().mean(dim=(1, 2, 3))


@pytest.fixture
def sampler_on():
    """A fresh random model: `sampler_on(device, dtype)`."""

    def make(device, dtype=torch.float32):
        return Sampler.from_pipeline(random_pipeline(dtype=dtype).to(device))

    return make


def latents(sampler, *plugins, **options):
    options = {"steps": 4, "seed": 3, "scheduler": "euler", "preset": "deep-dive", **options}
    return sampler(PROMPT, plugins=plugins, **options).latents.cpu()


@contextlib.contextmanager
def reads():
    """How often Python asks a device for numbers, in a list that grows by one each time."""
    asked = []
    methods = ("tolist", "item", "__bool__", "__float__", "__int__")
    with pytest.MonkeyPatch.context() as patch:
        for name in methods:
            method = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda t, *a, m=method: asked.append(1) or m(t, *a))
        yield asked


@pytest.mark.parametrize("gradient", ["x0", "latents"])
def test_a_step_reads_from_the_device_as_often_for_eight_guides_as_for_one(sampler, gradient):
    counts = []
    for guides in (1, 8):
        with reads() as asked:
            latents(sampler, *[Dark(scale=k + 1, gradient=gradient) for k in range(guides)])
        counts.append(len(asked))
    assert counts[1] == counts[0] > 0


@cuda_only
@pytest.mark.parametrize("gradient", ["x0", "latents"])
def test_a_gpu_is_waited_for_as_often_for_eight_guides_as_for_one(sampler_on, device, gradient):
    sampler, counts = sampler_on(device), []
    latents(sampler, Dark(gradient=gradient))  # what is done once
    for guides in (1, 8):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                latents(sampler, *[Dark(scale=k + 1, gradient=gradient) for k in range(guides)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len(caught))
    assert counts[1] == counts[0]


@cuda_only
def test_noise_does_not_depend_on_the_device(sampler_on, device):
    first = next(iter(sampler_on(device).stream(PROMPT, steps=2, seed=5, num_images=2)))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = draw(first.latents.shape, generators, torch.float32)
    torch.testing.assert_close(first.latents.cpu(), expected, rtol=0, atol=0)


@pytest.fixture
def whole_float32(monkeypatch):
    """No convolution in TF32, which is the usual thing on CUDA and keeps three digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.usefixtures("whole_float32")
@cuda_only
@pytest.mark.parametrize("preset", ["deep-dive", "balanced", "freedom", "tfg"])
@pytest.mark.parametrize("gradient", ["x0", "latents"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral"])
def test_a_guided_run_on_a_gpu_is_that_on_the_cpu(sampler_on, device, preset, gradient, scheduler):
    guides = [Dark(gradient=gradient), Smooth(scale=0.5, mask=[0, 0, 0.5, 1])]
    run = {"preset": preset, "scheduler": scheduler, "num_images": 2}
    expected = latents(sampler_on("cpu"), *guides, **run)
    # Sums are taken in another order, and rules of size one make full-size moves of rounding.
    atol = 1e-3 * float(expected.abs().max())
    ours = latents(sampler_on(device), *guides, **run)
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("gradient", ["x0", "latents"])
def test_half_precision_is_guided_and_stays_finite(
    sampler_on, device, dtype, checkpointing, gradient
):
    sampler = sampler_on(device, dtype)
    run = {"checkpointing": checkpointing, "preset": "balanced", "num_images": 2}
    plain, guided = latents(sampler, **run), latents(sampler, Dark(gradient=gradient), **run)
    assert plain.dtype == guided.dtype == dtype
    assert guided.isfinite().all()
    assert not torch.equal(plain, guided)


@cuda_only
def test_checkpointing_lowers_the_peak_of_memory(device):
    from pilotfish.models.schedulers import diffusers

    pipeline = random_pipeline().to(device)
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(
            sample_size=64, block_out_channels=(128, 128), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16,
        )  # fmt: skip
    pipeline.unet = unet.eval()
    sampler, peaks = Sampler.from_pipeline(pipeline), {}
    for checkpointing in ("off", "on"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        latents(sampler, Dark(gradient="latents"), checkpointing=checkpointing, num_images=4)
        peaks[checkpointing] = torch.cuda.max_memory_allocated() - before
    assert peaks["on"] < 0.6 * peaks["off"]


@pytest.mark.slow
@pytest.mark.usefixtures("whole_float32")
@pytest.mark.filterwarnings("ignore")  # what dynamo and inductor say about themselves
@pytest.mark.parametrize(
    "device, backend", [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=GPU)]
)
def test_a_compiled_unet_runs_without_and_with_guides(sampler_on, device, backend):
    """On the CPU nothing is compiled, but everything is traced, forward and backward."""
    sampler = sampler_on(device)
    runs = [
        {"plugins": []},
        {"plugins": [Dark(scale=50, gradient="x0")]},
        {"plugins": [Dark(scale=50, gradient="latents")]},
        {"plugins": [Dark(scale=50, gradient="latents")], "checkpointing": "on"},
    ]
    expected = [latents(sampler, *run.pop("plugins"), **run) for run in map(dict, runs)]
    sampler.model.unet.compile(backend=backend)
    for run, eager in zip(runs, expected, strict=True):
        compiled = latents(sampler, *run.pop("plugins"), **run)
        atol = 1e-3 * float(eager.abs().max())  # fused operations round otherwise
        torch.testing.assert_close(compiled, eager, rtol=0, atol=atol)


@everywhere
def test_the_trace_tells_the_time_of_each_guide_alone(sampler_on, device):
    class Slow(Guide):
        def loss_guidance(self, step):
            image = step.image  # the shared decode is nobody's time
            if device == "cuda":
                torch.cuda._sleep(50_000_000)  # cycles: 25 ms at 2 GHz
            else:
                time.sleep(0.02)
            return image.mean(dim=(1, 2, 3))

    sampler = sampler_on(device)
    start = time.perf_counter()
    trace = sampler(PROMPT, plugins=[Slow(), Dark()], steps=3, seed=0).trace
    spent = time.perf_counter() - start
    slow, dark = (sum(r.seconds for r in trace.of(name)) for name in ("Slow", "Dark"))
    assert 3 * 0.02 < slow < spent
    assert 0 < dark < slow
