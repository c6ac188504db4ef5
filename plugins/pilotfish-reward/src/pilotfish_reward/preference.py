"""Rewards that people's judgements taught: `aesthetic`, `pickscore`, `hps` and `image-reward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from pilotfish import Guide, Setting, SettingsError

from .blip import BlipReward
from .clips import HuggingClip, OpenClip, read_head, tokenized, tokenizer_of
from .files import Published
from .networks import wide

if TYPE_CHECKING:
    from pilotfish import Run, Step

Score = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in about [0, 1] -> what is to be high, (B,)."""


class Reward(Guide):
    """What all rewards have: the loss is minus the score of the picture."""

    heading = "rewards"

    def loss_guidance(self, step: Step, state: Score) -> Tensor:
        return -state(step.image)


class PromptReward(Reward):
    """A reward for how well a picture shows a text."""

    class Settings(Guide.Settings):
        text: str | None = Setting(
            None, description="what the picture is to show; the run's prompt where not given"
        )

    def text(self, run: Run) -> str:
        """What the picture is judged by.

        Raises:
            SettingsError: there is nothing.
        """
        text = run.prompt if self.settings.text is None else self.settings.text
        if not isinstance(text, str) or not text.strip():
            raise SettingsError(
                f"{type(self).__name__}: text must say what the picture is to show, where the run "
                f"has no prompt, or one for each text encoder; got {text!r}"
            )
        return text


class Aesthetic(Reward):
    """Make the picture one that people find beautiful: LAION's aesthetic predictor.

    Schuhmann et al. 2022, arXiv 2210.08402: five linear layers on CLIP's embedding of the picture,
    of length one. The score is people's mark from 1 to 10; the prompt does not count.
    """

    class Settings(Guide.Settings):
        model: str | None = Setting(
            None,
            description="the predictor: a file, or a hub id, which is downloaded; "
            "trl-lib/ddpo-aesthetic-predictor if it was downloaded before, where not given",
        )
        clip: str | None = Setting(
            None,
            description="its CLIP: a folder in the layout of transformers, or a hub id; "
            "openai/clip-vit-large-patch14 if it was downloaded before, where not given",
        )

    HEAD = Published(
        "Aesthetic: model", "trl-lib/ddpo-aesthetic-predictor", "4 MB", "aesthetic-model.pth"
    )
    CLIP = Published("Aesthetic: clip", "openai/clip-vit-large-patch14", "1.7 GB")

    def setup(self, run: Run) -> Score:
        clip = HuggingClip.of(self.CLIP, self.settings.clip, run)
        path = self.HEAD.path(self.settings.model)
        with self.HEAD.told(self.settings.model):
            width = clip.module.config.projection_dim
            head = read_head(path, width, f"aesthetic predictor {path.name}")
        head.to(clip.device, wide(clip.dtype))
        return lambda images: head(clip.pictures(images))


class PickScore(PromptReward):
    """Make the picture one that people would pick for the prompt: PickScore.

    Kirstain et al. 2023, arXiv 2305.01569: a CLIP-H trained on the choices of the users of a web
    page. The score is the cosine of the embeddings of picture and text, times CLIP's own scale.
    """

    class Settings(PromptReward.Settings):
        model: str | None = Setting(
            None,
            description="a folder in the layout of transformers, or a hub id, which is downloaded; "
            "yuvalkirstain/PickScore_v1 if it was downloaded before, where not given",
        )
        tokenizer: str | None = Setting(
            None,
            description="a folder or hub id; the one in the model's folder, or else that of "
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, where not given",
        )

    MODEL = Published("PickScore: model", "yuvalkirstain/PickScore_v1", "3.9 GB")
    TOKENIZER = Published(
        "PickScore: tokenizer", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "3 MB without the model"
    )

    def setup(self, run: Run) -> Score:
        settings, text = self.settings, self.text(run)
        clip = HuggingClip.of(self.MODEL, settings.model, run)
        tokenizer = tokenizer_of(self.TOKENIZER, settings.tokenizer, settings.model)
        length = clip.module.config.text_config.max_position_embeddings
        wanted = clip.text(tokenized(tokenizer, text, length, padding=True))
        return lambda images: clip.temperature * (clip.pictures(images) * wanted).sum(dim=-1)


class Hps(PromptReward):
    """Make the picture one that people prefer for the prompt: Human Preference Score v2.

    Wu et al. 2023, arXiv 2306.09341: a ViT-H-14 of open_clip trained on people's rankings. The
    score is the cosine of the embeddings of picture and text; 0.01 is a difference that shows.
    """

    class Settings(PromptReward.Settings):
        model: str | None = Setting(
            None,
            description="a checkpoint file, its folder, or a hub id, which is downloaded, also with"
            " the file's name: xswu/HPSv2/HPS_v2_compressed.pt; xswu/HPSv2/HPS_v2.1_compressed.pt "
            "if it was downloaded before, where not given",
        )

    MODEL = Published("Hps: model", "xswu/HPSv2", "2 GB", "HPS_v2.1_compressed.pt")

    def setup(self, run: Run) -> Score:
        text = self.text(run)
        clip = OpenClip.of(self.MODEL, self.settings.model, "ViT-H-14", run)
        wanted = clip.text(text)
        return lambda images: (clip.pictures(images) * wanted).sum(dim=-1)


class ImageReward(PromptReward):
    """Make the picture one that experts rank high for the prompt: ImageReward.

    Xu et al. 2023, arXiv 2304.05977: BLIP's text encoder reads the prompt while it looks at the
    picture, and five linear layers judge. Scores have mean 0 and deviation 1 over the training's
    pictures.
    """

    class Settings(PromptReward.Settings):
        model: str | None = Setting(
            None,
            description="a checkpoint file, its folder, or a hub id, which is downloaded; "
            "THUDM/ImageReward if it was downloaded before, where not given",
        )
        tokenizer: str | None = Setting(
            None,
            description="a folder or hub id; the one in the model's folder, or else that of "
            "google-bert/bert-base-uncased, where not given",
        )

    MODEL = Published("ImageReward: model", "THUDM/ImageReward", "1.8 GB", "ImageReward.pt")
    TOKENIZER = Published("ImageReward: tokenizer", "google-bert/bert-base-uncased", "1 MB")
    LENGTH = 35  # tokens of a prompt in its training

    def setup(self, run: Run) -> Score:
        settings, text = self.settings, self.text(run)
        network = BlipReward.of(self.MODEL, settings.model, run)
        tokenizer = tokenizer_of(self.TOKENIZER, settings.tokenizer, settings.model)
        tokens = tokenized(tokenizer, text, self.LENGTH, padding="max_length")
        return lambda images: network.score(images, tokens)
