"""Learns a word's vectors from pictures, against the frozen model.

Gal et al. 2022, arXiv 2208.01618. Nothing but the vectors is trained: the loss is that of noise
prediction (of a flow, of the velocity), and its gradient goes back through the network and every
text encoder to where the word's vectors stand among the token embeddings. We differ in the learning
rate, which counts in sizes of the encoder's own vectors, so that one default fits every model, and
falls to 0; and in the timesteps of a batch, which are spread evenly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pilotfish import Conditioning, Embedding, InputError, ModelError, NonFiniteError, Run

from .concept import part_of
from .files import replace, write
from .lesson import Batch, read_lesson
from .noising import Noising
from .plan import Plan
from .sheet import Sheet

if TYPE_CHECKING:
    from pilotfish import Sampler

NOT_LEARNED = ("prompts", "every")  # what may differ when a training goes on


def train(
    sampler: Sampler, pictures: Sequence[str | Path], out: str | Path, plan: Plan
) -> Tensor | dict[str, Tensor]:
    """Learn a word from pictures and write it to `out`; its vectors (n, D).

    Of a model with several text encoders, those of each, as `read` gives them.

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
                write(out, plan.token, training.word)
                sheet.draw(out)
                training.save(checkpoint)
    checkpoint.unlink()
    return training.word


class Training:
    """A training under way.

    Args:
        model: the networks, `sampler.model`; trained against frozen copies over its weights.

    Attributes:
        model: these copies.
        run: what they are told of a batch.
        vectors: (n, D) of each text encoder, float32, on the model's device.
        index: steps taken.
        lesson: the pictures with their captions.
    """

    def __init__(self, model: Any, pictures: Sequence[Path], plan: Plan) -> None:
        if reason := model.refuse_gradients():
            raise ModelError(f"no gradient can be taken: {reason}")
        self.model, self.plan, self.index = model.differentiable("auto"), plan, 0
        self.run = Run(seed=0, num_images=plan.batch).resolved(self.model, ()).of_model(self.model)
        length = self.run.max_sequence_length
        self.prompts = {part_of(e): Prompts(e, plan, length) for e in self.model.text_encoders}
        self.lesson = read_lesson(self.model, pictures, plan)
        for caption in {c for captions in self.lesson.captions for c in captions}:
            for prompts in self.prompts.values():
                prompts.tokens(plan.spell(caption))  # refuse what is too long now, not later
        self.noising = Noising(model)
        self.vectors = {n: p.first.clone().requires_grad_() for n, p in self.prompts.items()}
        self.optimizer = torch.optim.Adam([{"params": [v]} for v in self.vectors.values()])
        self._smooth = 0.0
        self._described = {
            **dataclasses.asdict(plan),
            "captions": self.lesson.captions,
            "pictures": [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures],
            "model": model.id,
        }

    @property
    def word(self) -> Tensor | dict[str, Tensor]:
        """The vectors as they are written; where there is one encoder, no name."""
        found = {name: vectors.detach().cpu().clone() for name, vectors in self.vectors.items()}
        return found if len(found) > 1 else next(iter(found.values()))

    def steps(self) -> Iterator[float]:
        """Take the remaining steps; gives the loss after each, averaged over the last ones."""
        while self.index < self.plan.steps:
            loss = self._step()
            self._smooth += (loss - self._smooth) / min(self.index, 50)
            yield self._smooth

    def _step(self) -> float:
        for group, prompts in zip(self.optimizer.param_groups, self.prompts.values(), strict=True):
            group["lr"] = self._learning_rate() * prompts.size
        batch = self.lesson.draw(self.plan, self.index, self.noising.num_timesteps)
        vectors = list(self.vectors.values())
        with torch.enable_grad():
            error = self.error(batch)
            # The sum, not the mean: all the same to Adam, and no underflow in half precision.
            gradients = torch.autograd.grad(error.sum(), vectors)
        for vector, gradient in zip(vectors, gradients, strict=True):
            vector.grad = gradient
        loss: float = error.detach().mean().item()
        if not (math.isfinite(loss) and all(g.isfinite().all() for g in gradients)):
            raise NonFiniteError(
                f"the loss or its gradient is not finite at step {self.index} of "
                f"{self.plan.steps}; lower learning_rate, or train in float32 or bfloat16"
            )
        self.optimizer.step()
        self.index += 1
        return loss

    def _learning_rate(self) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * self.index / self.plan.steps))
        return self.plan.learning_rate * fall

    def error(self, batch: Batch) -> Tensor:
        """Squared error of the prediction for noised pictures, (B, C, H, W), float32."""
        device = self.model.device
        x0, noise, even = (t.to(device) for t in (batch.x0, batch.noise, batch.timesteps))
        timesteps = self.noising.timesteps(even)
        latents = self.noising.add(x0, noise, timesteps).to(self.model.latents_dtype)
        told = {c: self.condition(self.plan.spell(c), self.vectors) for c in set(batch.captions)}
        conditioning = reduce(Conditioning.cat, (told[c] for c in batch.captions))
        output = self.model.predict(latents, timesteps, conditioning)
        result: Tensor = (output.float() - self.noising.target(x0, noise, timesteps)).square()
        return result

    def condition(self, text: str, vectors: Mapping[str, Tensor]) -> Conditioning:
        """What the network is told of a text with these vectors for the word."""
        embeddings = [prompts(text, vectors[name]) for name, prompts in self.prompts.items()]
        found: Conditioning = self.model.condition(embeddings, "positive", self.run)
        return found

    # ---- checkpoints ----

    def save(self, path: Path) -> None:
        """Keep all that the rest of the training depends on."""
        state = {
            "index": self.index,
            "smooth": self._smooth,
            "vectors": {name: vectors.detach() for name, vectors in self.vectors.items()},
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
            for name, vectors in self.vectors.items():
                vectors.copy_(state["vectors"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.index, self._smooth = state["index"], state["smooth"]


class Prompts:
    """Texts -> one encoder's output, with the word's vectors where it stands.

    As in a run with the plugin `concept`, but differentiable in the vectors.

    Args:
        encoder: a text encoder of a model of one's own.
        length: the run's `max_sequence_length`.

    Attributes:
        first: the vectors to start from (n, D), float32.
        size: root mean square of the encoder's token embeddings.
    """

    def __init__(self, encoder: Any, plan: Plan, length: int | None) -> None:
        table = encoder.network.get_input_embeddings().weight.detach()
        self.size = table.float().square().mean().sqrt().item()
        self.first = first_vectors(encoder, table, plan)
        self._encoder, self._token = encoder.with_words({plan.token: self.first}), plan.token
        self._length, self._tokens = length, dict[str, Any]()

    def tokens(self, text: str) -> Any:
        """A text's tokens.

        Raises:
            InputError: the word does not fit into what the encoder takes.
        """
        if text not in self._tokens:
            tokens, count = self._encoder.tokenize(text, self._length), len(self.first)
            if len(tokens.added) < count:
                room = tokens.ids.shape[1] - self._encoder.tokenizer.num_special_tokens_to_add()
                raise InputError(
                    f"{text!r} is too long: {self._token!r} with its {count} vectors does not fit "
                    f"into the {room} tokens that {self._encoder.name} takes"
                )
            self._tokens[text] = tokens
        return self._tokens[text]

    def __call__(self, text: str, vectors: Tensor) -> Embedding:
        """The encoder's output (1, T, D)."""
        tokens = self.tokens(text)

        def put(embedding: Embedding) -> Embedding:
            values = embedding.values.clone()
            for number, place in enumerate(sorted(tokens.added)):  # the word may stand there twice
                values[:, place] = vectors[number % len(vectors)].to(values)
            return dataclasses.replace(embedding, values=values)

        result: Embedding = self._encoder.encode(tokens, "positive", put)
        return result


def first_vectors(encoder: Any, table: Tensor, plan: Plan) -> Tensor:
    """The vectors to start from (n, D): rows of the encoder's table for the tokens of `plan.init`.

    Where there are fewer tokens than vectors, they come again in turn; where there are more,
    means of neighbours, for a text that the tokenizer takes to pieces.

    Raises:
        InputError: it is no token at all.
    """
    ids = encoder.ids(plan.init)
    if not ids:
        raise InputError(f"init must be a word that the model knows; got {plan.init!r}")
    more = (ids[i % len(ids)] for i in range(len(ids), plan.vectors))
    rows = table[[*ids, *more]].float()
    return torch.stack([part.mean(0) for part in rows.tensor_split(plan.vectors)])  # (n, D)
