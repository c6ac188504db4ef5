"""A run's full description: what a user asked for, resolved; TOML in, TOML out."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tomli_w
from pydantic import BeforeValidator, Field, PrivateAttr

from ..errors import InputError, PilotfishError, explain, in_utf8, unknown
from ..guidance.presets import PRESETS, find_preset
from .made_with import MadeWith, Unpacked, tell
from .toml import read_toml

_CALLED = {  # what it is here, and what other programs call it
    "steps": "num_inference_steps",
    "seed": "generator",
    "num_images": "num_images_per_prompt",
    "guidance_scale": "cfg_scale cfg",
    "scheduler": "sampler sampler_name",
    "plugins": "plugin guides",
    "stream, a method of the sampler that gives every step": "callback callback_on_step_end",
    "the plugin cfg-rescale": "guidance_rescale",
    "the plugin img2img": "image strength",
    "the plugin inpaint": "mask_image",
    "result.images and result.latents": "output_type",
}
ELSEWHERE = {other: here for here, others in _CALLED.items() for other in others.split()}
# None is the model's own.
OWN = ("true_cfg_scale", "max_sequence_length")  # which not every family's pipeline takes
OPEN = ("steps", "guidance_scale", "scheduler", "height", "width", *OWN)


def _must_be(expected: str, holds: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A validator that refuses a value by saying what it must be."""

    def check(value: Any) -> Any:
        if isinstance(value, bool) or not holds(value):
            raise ValueError(expected)
        return value

    return check


def _whole(least: int) -> Callable[[Any], Any]:
    return _must_be(f"a whole number >= {least}", lambda v: isinstance(v, int) and v >= least)


def _all_text(table: Mapping[Any, Any]) -> bool:
    return bool(table) and all(isinstance(t, str) for pair in table.items() for t in pair)


def _drawn(seed: Any) -> Any:
    return secrets.randbelow(2**32) if seed is None else seed


_finite = _must_be(
    "a finite number >= 0 (1.0 switches guidance off)",
    lambda v: isinstance(v, int | float) and 0 <= v < 1e300,
)
_texts = _must_be(
    'text, or a text for each text encoder: {"text_encoder": ..., "text_encoder_2": ...}',
    lambda v: isinstance(v, str) or (isinstance(v, Mapping) and _all_text(v)),
)
_decoder = _must_be(
    "vae, linear, tiny (the tiny_vae/ of the model's folder) or tiny:FOLDER_OR_HUB_ID",
    lambda v: isinstance(v, str) and re.fullmatch("(?s)vae|linear|tiny(:.+)?", v),
)
Prompt = Annotated[str | dict[str, str], BeforeValidator(_texts)]
MODELS = "the model's"
Count = Annotated[int, BeforeValidator(_whole(1))]


def _key(
    default: Any, description: str, metavar: str | None = None, none: str | None = None
) -> Any:
    """A key of a run.

    Args:
        metavar: what stands for a value in the command line's help; None is the type's name.
        none: what None means.
    """
    return Field(
        default, description=description, json_schema_extra={"metavar": metavar, "none": none}
    )


class Run(pydantic.BaseModel):
    """Everything needed to repeat a run. Every key's type, range, default and help stand here.

    The command line's options are made of them, see `pilotfish.cli.options`.

    Attributes:
        plugins: tables with `use`, `name` and settings, in order; a table with an empty `use` is
            of a function, or of a class that cannot be imported again.
        model_id: folder, file or hub id of the model; None if unknown.
        config: of a single file, see `pilotfish.load`.
        dtype: the networks' number format.
        made_with: weights, packages and input files that it was made with, where it comes from a
            file; a run that would have others is refused before its first step.
        anyway: or is not, and what differs is a warning.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=()
    )

    prompt: Prompt = _key(
        "",
        "what the picture shows; in Python and run files also a text for each text encoder",
        "TEXT",
    )
    negative_prompt: Prompt | None = _key(
        None,
        "what the picture should not show; counts only with guidance",
        "TEXT",
        "none; an empty one is one, to models that tell the two apart",
    )
    steps: Count | None = _key(None, "sampling steps", none=MODELS)
    guidance_scale: Annotated[float, BeforeValidator(_finite)] | None = _key(
        None, "classifier-free guidance, as diffusers has it; 1 or less is off", none=MODELS
    )
    true_cfg_scale: Annotated[float, BeforeValidator(_finite)] | None = _key(
        None,
        "classifier-free guidance where guidance_scale is told to the network, as FLUX.1 and "
        "Qwen-Image have it; needs a negative prompt",
        none=MODELS,
    )
    max_sequence_length: Count | None = _key(
        None, "tokens that a long text encoder takes (T5 and others, not CLIP)", none=MODELS
    )
    scheduler: Any = _key(
        None,
        "how noise is taken away: lms, ddim, euler ... by name, a table with `name` and the "
        "configuration that differs from the model's, or in Python a diffusers scheduler",
        "NAME",
        MODELS,
    )
    preset: Any = _key(
        "balanced",
        f"how losses become a move: {', '.join(PRESETS)}, a TOML file, a table of knobs with or "
        "without `base`, or in Python a pilotfish.Preset",
        "NAME|FILE.toml",
    )
    seed: Annotated[int, BeforeValidator(_whole(0)), BeforeValidator(_drawn)] = _key(
        None, "of the first image; each further one has one more", none="drawn, and told"
    )
    num_images: Count = _key(1, "images of the same prompt, run as one batch")
    height: Count | None = _key(None, "in pixels", none=MODELS)
    width: Count | None = _key(None, "in pixels", none=MODELS)
    checkpointing: Literal["auto", "on", "off"] = _key(
        "auto",
        "compute again what the network's gradient needs, instead of keeping it: less memory, "
        "about a third more work in a guided step. auto: above 100 million parameters",
    )
    on_error: Literal["raise", "skip", "disable"] = _key(
        "raise",
        "where a guide fails: stop, skip that step, or go on without it; the trace names it",
    )
    decoder: Annotated[str, BeforeValidator(_decoder)] = _key(
        "vae",
        "what guides see by: vae, or cheaper and with another gradient tiny, "
        "tiny:FOLDER_OR_HUB_ID or linear. The pictures come from the VAE, and the trace ends with "
        "each guide's loss on them",
        "vae|tiny|tiny:FOLDER|linear",
    )
    embed_inputs: bool = _key(
        False,
        "small input files (pictures, .safetensors; at most 256 kB each, 1 MB in all) travel in "
        "the run, and so in the picture's file",
    )
    plugins: tuple[Any, ...] = Field((), repr=False)
    model_id: str | None = None
    config: str | None = None
    dtype: str | None = None
    made_with: MadeWith | None = Field(None, repr=False)
    anyway: bool = False

    _inputs: Unpacked = PrivateAttr(Unpacked())
    _model: Any = PrivateAttr(None)

    _in_utf8 = pydantic.field_validator(
        "prompt", "negative_prompt", "scheduler", "preset", "decoder", mode="before"
    )(in_utf8)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise InputError(explain(error, KEYS, "key").removesuffix(".")) from None
        if self.seed + self.num_images > 2**64:  # torch's generators take no more
            raise InputError(f"seed must be below 2**64, for every image; got {self.seed}")
        find_preset(self.preset)

    @property
    def model(self) -> Any:
        """The loaded networks, while the run lasts; for hooks."""
        return self._model

    def of_model(self, model: Any, particles: int = 1) -> Run:
        """The same, with the networks in it, for so many candidates of each picture."""
        run = self.model_copy(update={"num_images": particles * self.num_images})
        run._model = model
        return run

    @property
    def cfg_scale(self) -> float | None:
        """The scale of classifier-free guidance, by the model's family; None without."""
        scale: float | None = self._model.cfg_scale(self)
        return scale

    def prepared(self, plugins: Sequence[object]) -> Sequence[object]:
        """The plugins as a stack takes them, with the input files of `made_with` in place.

        Raises:
            InputError: they, or their input files, are not those of `made_with`.

        Warns:
            UserWarning: a package is of another version, or what differs, if it goes on anyway.
        """
        if self.made_with is None:
            return plugins
        self._inputs = self.made_with.unpacked()
        tables = [item for item in plugins if isinstance(item, Mapping)]
        here = MadeWith.here(tables, places=self._inputs.places)
        tell(self.made_with.differences(tables, here), self.anyway)
        tell(self.made_with.releases(here), anyway=True)
        return [self._inputs.local(p) if isinstance(p, Mapping) else p for p in plugins]

    def resolved(self, model: Any, plugins: tuple[Mapping[str, Any], ...]) -> Run:
        """The run with everything resolved that the user left open.

        Raises:
            InputError: a value is none for this model, or its weights are not those of `made_with`.
        """
        found = {key: getattr(self, key) for key in OPEN}
        for key in OWN:
            if found[key] is not None and getattr(model.defaults, key) is None:
                raise InputError(f"{key} means nothing to this model: its pipeline takes none")
        found |= {key: getattr(model.defaults, key) for key in OPEN if found[key] is None}
        found["scheduler"] = model.describe_scheduler(found["scheduler"])
        model.latent_shape(found["height"], found["width"])
        dtype = str(model.dtype).removeprefix("torch.")
        plugins = tuple(map(self._inputs.called, plugins))
        here = MadeWith.here(plugins, model.fingerprint(), self.embed_inputs, self._inputs.places)
        if self.made_with is not None:
            tell(self.made_with.other_weights(here), self.anyway)
        more = {"model_id": model.id, "config": model.config, "dtype": dtype, "plugins": plugins}
        run = self.model_copy(update={**found, **more, "made_with": here, "anyway": False})
        run._inputs = Unpacked()
        return run

    def to_toml(self) -> str:
        """The run as a file for `pilotfish generate --run`.

        Raises:
            PilotfishError: a plugin was made in this program and has no name to find it by, or a
                path in it is no UTF-8.
        """
        if unnamed := [table["name"] for table in self.plugins if not table["use"]]:
            raise PilotfishError(
                f"plugin {unnamed[0]!r} was defined in this session, so this run cannot be "
                "repeated from a file; write it as a class in a file and use it as 'file.py:Class'"
            )
        preset = find_preset(self.preset)
        content = {
            "model": self.model_id,
            "config": self.config,
            "dtype": self.dtype,
            **{key: getattr(self, key) for key in KEYS},
            "preset": preset.name if preset == PRESETS.get(preset.name) else preset.changes(),
            "plugins": [_without_none(table) for table in self.plugins],
            "made_with": self.made_with and self.made_with.model_dump(exclude_defaults=True),
        }
        text = tomli_w.dumps(_without_none(content))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PilotfishError(f"this run cannot be written down: {error}") from error
        return text

    @classmethod
    def parse(cls, text: str, origin: str = "the run file") -> dict[str, Any]:
        """The keyword arguments that a run file holds; `MODEL_KEYS` among them are for `load`.

        Raises:
            InputError: not TOML, or an unknown key; names the file.
        """
        content = read_toml(text, origin)
        for key in content:
            if key not in (known := (*KEYS, *MODEL_KEYS, "plugins", "made_with")):
                raise InputError(f"{origin}: {unknown_key('key', key, known)}")
        if not isinstance(content.setdefault("plugins", []), list):
            raise InputError(f"{origin}: plugins must be [[plugins]] tables")
        return content

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """`parse` a file.

        Raises:
            InputError: it cannot be read, or see `parse`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # no UTF-8, or a name with a NUL
            raise InputError(f"cannot read the run file {path}: {error}") from None
        return cls.parse(text, str(path))


BESIDE = ("made_with", "anyway")  # which a sampler takes too
FOUND = ("plugins", "model_id", "config", "dtype", *BESIDE)
MODEL_KEYS = ("model", "config", "dtype")  # of a run file, as `pilotfish.load` takes them
KEYS = {name: field for name, field in Run.model_fields.items() if name not in FOUND}
"""What a user may say of a run, beside its plugins and its model."""


def check_keywords(options: Mapping[str, Any]) -> None:
    """Refuse a keyword that is none of a run's.

    Raises:
        InputError: names the right one, also where another program calls it so.
    """
    for name in options:
        if name not in (*KEYS, *BESIDE):
            raise unknown_key("option of a run", name, [*KEYS, "plugins"])


def unknown_key(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for a key that no run has: the right one, where another program calls it so."""
    if name in ELSEWHERE:
        return InputError(f"no {kind} called {name!r}; here it is {ELSEWHERE[name]}")
    return unknown(kind, name, choices)


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no null: what is not there is the default."""
    kept = {key: value for key, value in table.items() if value is not None}
    return {k: _without_none(v) if isinstance(v, Mapping) else v for k, v in kept.items()}
