"""Learns a word's vectors from pictures, against the frozen model.

Gal et al. 2022, arXiv 2208.01618. Nothing but the vectors is trained: the loss is that of noise
prediction, and its gradient goes back through the network and the text encoder to where the word's
vectors stand among the token embeddings. We differ in the learning rate, which counts in sizes of
the encoder's own vectors, so that one default fits every model, and falls to 0; and in the
timesteps of a batch, which are spread evenly.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pilotfish import Embedding, InputError, ModelError, NonFiniteError

from .files import replace, write
from .lesson import Batch, read_lesson
from .plan import Plan
from .sheet import Sheet

if TYPE_CHECKING:
    from pilotfish import Sampler

NOT_LEARNED = ("prompts", "every")  # what may differ when a training goes on


def train(sampler: Sampler, pictures: Sequence[str | Path], out: str | Path, plan: Plan) -> Tensor:
    """Learn a word from pictures and write it to `out`; its vectors (n, D).

    Every `plan.every` steps, `out`, a sample sheet (`out` with .png) and a checkpoint (.training)
    are written. Called again the same way, it goes on from the checkpoint, which goes when it is
    done; a training that was stopped and resumed gives the same vectors.

    Raises:
        InputError: a picture, a caption or the plan does not fit, `out` exists already, or its
            checkpoint is of another training.
        ModelError: no gradient can go through the model.
        NonFiniteError: the loss became NaN or infinite.
    """
    out = Path(out)
    checkpoint = out.with_suffix(".training")
    if out.suffix != ".safetensors":
        raise InputError(f"cannot write {out}: end its name in .safetensors")
    if out.exists() and not checkpoint.exists():
        raise InputError(f"{out} exists already; choose another name, or remove it")
    training = Training(sampler.model, [Path(picture) for picture in pictures], plan)
    training.resume(checkpoint)
    sheet = Sheet(sampler, plan, training.lesson)
    with tqdm(total=plan.steps, initial=training.index, unit="step") as bar:
        for loss in training.steps():
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
            if training.index % plan.every == 0 or training.index == plan.steps:
                write(out, plan.token, training.vectors)
                sheet.draw(out)
                training.save(checkpoint)
    checkpoint.unlink()
    return training.vectors.detach().cpu()


class Training:
    """A training under way.

    Args:
        model: the networks, `sampler.model`.

    Attributes:
        vectors: (n, D), float32, on the model's device.
        index: steps taken.
        lesson: the pictures with their captions.
    """

    def __init__(self, model: Any, pictures: Sequence[Path], plan: Plan) -> None:
        if reason := model.refuse_gradients():
            raise ModelError(f"no gradient can be taken: {reason}")
        if len(model.text_encoders) != 1:
            raise ModelError("a word can be learned for models with one text encoder only")
        self.model, self.plan, self.index = model, plan, 0
        self.prompts = Prompts(model.text_encoders[0], plan.token, plan.vectors)
        self.lesson = read_lesson(model, pictures, plan)
        for caption in {c for captions in self.lesson.captions for c in captions}:
            self.prompts.ids([plan.spell(caption)])  # refuse what is too long now, not later
        # Any of the model's schedulers knows its noise; this one can also add it.
        self.scheduler = model.new_scheduler("ddpm")
        self.vectors = self.prompts.first(plan.init).to(model.device).requires_grad_()
        self.optimizer = torch.optim.Adam([self.vectors])
        self._networks = model.differentiable("auto")
        self._smooth = 0.0
        self._described = {
            **dataclasses.asdict(plan),
            "captions": self.lesson.captions,
            "pictures": [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures],
            "model": model.id,
        }

    def steps(self) -> Iterator[float]:
        """Take the remaining steps; gives the loss after each, averaged over the last ones."""
        while self.index < self.plan.steps:
            loss = self._step()
            self._smooth += (loss - self._smooth) / min(self.index, 50)
            yield self._smooth

    def _step(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        batch = self.lesson.draw(self.plan, self.index, len(self.scheduler.alphas_cumprod))
        with self._networks, torch.enable_grad():
            error = self.error(batch)
            # The sum, not the mean: all the same to Adam, and no underflow in half precision.
            (self.vectors.grad,) = torch.autograd.grad(error.sum(), self.vectors)
        loss: float = error.detach().mean().item()
        if not (math.isfinite(loss) and self.vectors.grad.isfinite().all()):
            raise NonFiniteError(
                f"the loss or its gradient is not finite at step {self.index} of "
                f"{self.plan.steps}; lower learning_rate, or train in float32 or bfloat16"
            )
        self.optimizer.step()
        self.index += 1
        return loss

    def _learning_rate(self) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * self.index / self.plan.steps))
        rate: float = self.plan.learning_rate * self.prompts.size * fall
        return rate

    def error(self, batch: Batch) -> Tensor:
        """Squared error of the prediction for noised pictures, (B, C, H, W), float32."""
        device = self.model.device
        x0, noise, timesteps = (t.to(device) for t in (batch.x0, batch.noise, batch.timesteps))
        latents = self.scheduler.add_noise(x0, noise, timesteps)
        values = self.prompts([self.plan.spell(c) for c in batch.captions], self.vectors)
        embedding = Embedding("prompt", "positive", values, None, (), self.prompts.encoder.name)
        conditioning = self.model.condition([embedding])
        output = self.model.predict(latents.to(self.model.dtype), timesteps, conditioning)
        result: Tensor = (output.float() - self._target(x0, noise, timesteps)).square()
        return result

    def _target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return x0
        if kind != "v_prediction":
            raise ModelError(f"prediction type {kind!r} cannot be trained against")
        velocity: Tensor = self.scheduler.get_velocity(x0, noise, timesteps)
        return velocity

    # ---- checkpoints ----

    def save(self, path: Path) -> None:
        """Keep all that the rest of the training depends on."""
        state = {
            "index": self.index,
            "smooth": self._smooth,
            "vectors": self.vectors.detach(),
            "optimizer": self.optimizer.state_dict(),
            "described": self._described,
        }
        replace(path, lambda part: torch.save(state, part))

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint; where there is none, begin one.

        Raises:
            InputError: it cannot be read, or belongs to another training; names what differs.
        """
        if not path.exists():
            return self.save(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            theirs = state["described"]
        except Exception as error:  # a damaged file makes torch raise anything
            raise InputError(f"{path} is no checkpoint; remove it to start again") from error
        other = [
            key
            for key, mine in self._described.items()
            if key not in NOT_LEARNED and theirs.get(key) != mine
        ]
        if other:
            raise InputError(
                f"{path} belongs to a training with other {', '.join(other)}. Ask for the same "
                "again to go on, choose another name, or remove it to start anew."
            )
        with torch.no_grad():
            self.vectors.copy_(state["vectors"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.index, self._smooth = state["index"], state["smooth"]


class Prompts:
    """Texts -> the encoder's output, with the word's vectors where it stands.

    As in a run with the plugin `concept`, but differentiable in the vectors. The shared tokenizer
    and encoder stay as they are.

    Attributes:
        encoder: the model's text encoder with its tokenizer.
        size: root mean square of its token embeddings.
    """

    def __init__(self, encoder: Any, token: str, count: int) -> None:
        self.encoder, self._token = encoder, token
        self._tokenizer = copy.deepcopy(encoder.tokenizer)
        # As diffusers names the tokens of one word.
        self._pieces = [token, *(f"{token}_{i}" for i in range(1, count))]
        if known := set(self._pieces) & self._tokenizer.get_vocab().keys():
            raise InputError(
                f"token {min(known)!r} is a word of this model already; choose another"
            )
        self._tokenizer.add_tokens(self._pieces)
        self._added = self._tokenizer.convert_tokens_to_ids(self._pieces)
        self._table: Tensor = encoder.network.get_input_embeddings().weight.detach()
        self.size = self._table.float().square().mean().sqrt().item()

    def first(self, init: str) -> Tensor:
        """The vectors to start from (n, D): those of the tokens of `init`.

        Where there are fewer tokens than vectors, they come again in turn; where there are more,
        means of neighbours, for a text that the tokenizer takes to pieces.

        Raises:
            InputError: it is no token at all.
        """
        ids = self.encoder.tokenizer(init, add_special_tokens=False).input_ids
        if not ids:
            raise InputError(f"init must be a word that the model knows; got {init!r}")
        count = len(self._pieces)
        rows = self._table[[*ids, *(ids[i % len(ids)] for i in range(len(ids), count))]].float()
        return torch.stack([part.mean(0) for part in rows.tensor_split(count)])  # (n, D)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T).

        Raises:
            InputError: the word does not fit into what the encoder takes.
        """
        spelled = [text.replace(self._token, " ".join(self._pieces)) for text in texts]
        ids: Tensor = self._tokenizer(
            [self.encoder.prepare(text) for text in spelled],
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for text, row in zip(texts, ids.tolist(), strict=True):
            if not set(self._added) <= set(row):
                raise InputError(
                    f"{text!r} is too long: {self._token!r} with its {len(self._pieces)} vectors "
                    f"does not fit into the {len(row) - 2} tokens that the text encoder takes"
                )
        return ids

    def __call__(self, texts: Sequence[str], vectors: Tensor) -> Tensor:
        """The encoder's output (B, T, D)."""
        ids = self.ids(texts).to(self._table.device)
        places = [ids == piece for piece in self._added]
        # The end token's id must stay the highest: there the encoder finds its pooled position.
        known = torch.where(ids >= min(self._added), 0, ids)

        def put(_module: Any, _inputs: Any, values: Tensor) -> Tensor:
            for place, vector in zip(places, vectors, strict=True):
                values = torch.where(place[..., None], vector.to(values), values)
            return values

        network = self.encoder.network
        handle = network.get_input_embeddings().register_forward_hook(put)
        try:
            output: Tensor = network(known, attention_mask=None)[0]
        finally:
            handle.remove()
        return output
