"""The plugins `weights` and `long-prompt`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pilotfish import InputError, ModelError, Plugin, Setting

from .reading import MOST, Plan, Reader

if TYPE_CHECKING:
    from pilotfish import Run

CLIP, T5 = "clip_text_model", "t5"  # model types of transformers


class Weights(Plugin):
    """Weigh words of the prompts by brackets and signs: `(word:1.3)`, `[word]`, or `word++`.

    They are read in every text that the run encodes. A bracket that is text is written with a
    backslash before it.
    """

    heading = "prompts"

    class Settings(Plugin.Settings):
        dialect: Literal["automatic1111", "compel"] = Setting(
            description="automatic1111: (word) [word] (word:1.3), which scale the text encoder's "
            "output; compel: word+ word- (words)1.3, which lead away from the prompt without them",
            examples=["automatic1111"],
        )

    def setup(self, run: Run) -> None:
        for encoder in run.model.text_encoders:
            if kind(encoder) not in (CLIP, T5):
                raise ModelError(
                    f"weights reads prompts for CLIP and T5, and this model's {encoder.name} is a "
                    f"{kind(encoder)}, which sees the prompt inside a text of its own. Leave "
                    "weights out, and say in words what counts"
                )
            if isinstance(encoder, Reader) and encoder.dialect:
                raise InputError("weights is in this run twice; prompts have one dialect")
        run.model.text_encoders = [
            Reader.of(e, dialect=self.settings.dialect) for e in run.model.text_encoders
        ]


class LongPrompt(Plugin):
    """Take prompts of more than 75 tokens, in chunks that are encoded one after the other.

    Both prompts are filled up to as many chunks with empty ones. T5 and Qwen take long prompts by
    themselves (`max_sequence_length`), and are left as they are.
    """

    heading = "prompts"

    class Settings(Plugin.Settings):
        chunks: int | None = Setting(
            None,
            ge=1,
            le=MOST,
            description="chunks of 75 tokens that every prompt is filled up to; where not given, "
            "as many as the longer of both prompts needs",
        )

    def setup(self, run: Run) -> Plan:
        plan = Plan(run, self.settings.chunks)
        run.model.text_encoders = [
            Reader.of(e, plan=plan) if kind(e) == CLIP else e for e in run.model.text_encoders
        ]
        return plan

    def prompt_transform(self, prompt: str, state: Plan) -> None:
        state.texts.append(prompt)


def kind(encoder: Any) -> str:
    """What kind of network a text encoder is, as transformers calls it."""
    return str(encoder.network.config.model_type)
