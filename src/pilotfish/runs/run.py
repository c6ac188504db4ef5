"""A run's full description: what a user asked for, resolved; TOML in, TOML out."""

from __future__ import annotations

import dataclasses
import math
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypedDict

import tomli_w

from ..errors import InputError, PilotfishError, unknown
from ..guidance.presets import PRESETS, Preset, find_preset


class Options(TypedDict, total=False):
    """The keyword arguments of a run; `Run` says what they mean."""

    negative_prompt: str
    steps: int
    guidance_scale: float
    scheduler: Any
    preset: str | Path | Mapping[str, Any] | Preset
    seed: int | None
    num_images: int
    height: int | None
    width: int | None
    checkpointing: Literal["auto", "on", "off"]
    on_error: Literal["raise", "skip", "disable"]
    decoder: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything needed to repeat a run.

    Attributes:
        prompt: text.
        negative_prompt: text; counts only with guidance.
        steps: number of sampling steps, at least 1.
        guidance_scale: classifier-free guidance in diffusers' convention; 1 or less is off.
        scheduler: None for the model's own; a name ("lms"), a diffusers scheduler, or a table with
            `name` and configuration that differs from the model's.
        preset: how losses become a move: a name, a TOML file, a table of knobs with or without
            `base`, or a `pilotfish.Preset`.
        seed: of the first image; the next ones have `seed + 1`, ... Drawn where not given.
        num_images: images with the same prompt, run as one batch.
        height: in pixels; None for the model's own.
        width: as `height`.
        checkpointing: recompute instead of keeping what the network's gradient needs: less memory,
            about a third more work in a guided step. "auto": for networks of more than
            100 million parameters.
        on_error: a guide that fails: "raise", "skip" that step, or "disable" it from there on. The
            trace names it.
        decoder: what `step.image` is decoded by. "vae": the model's own. Cheaper, with another
            gradient: "tiny:FOLDER_OR_HUB_ID", an `AutoencoderTiny` of diffusers for the same
            latents; "tiny", the one in `tiny_vae/` of the model's folder; "linear", `step.rgb`
            enlarged. The finished pictures come from the VAE, and the trace ends with each guide's
            loss on them.
        plugins: tables with `use`, `name` and settings, in order; a table with an empty `use` is
            of a function, or of a class that cannot be imported again.
        model_id: folder or hub id of the model; None if unknown.
        dtype: the networks' number format.
        model: the loaded networks, while the run lasts; for hooks.
    """

    prompt: str = ""
    negative_prompt: str = ""
    steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str | Mapping[str, Any] | None = None
    preset: str | Path | Mapping[str, Any] | Preset = "balanced"
    seed: int = field(default_factory=lambda: secrets.randbelow(2**32))
    num_images: int = 1
    height: int | None = None
    width: int | None = None
    checkpointing: Literal["auto", "on", "off"] = "auto"
    on_error: Literal["raise", "skip", "disable"] = "raise"
    decoder: str = "vae"
    plugins: tuple[Mapping[str, Any], ...] = ()
    model_id: str | None = None
    dtype: str | None = None
    model: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be text; got {getattr(self, name)!r}")
        for name, least in (("steps", 1), ("num_images", 1), ("seed", 0)):
            _check_whole(name, getattr(self, name), least)
        if self.seed + self.num_images > 2**64:  # torch's generators take no more
            raise InputError(f"seed must be below 2**64, for every image; got {self.seed}")
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        scale = self.guidance_scale
        if not isinstance(scale, int | float) or not math.isfinite(scale) or scale < 0:
            raise InputError(
                "guidance_scale must be a finite number >= 0 (1.0 switches guidance off); "
                f"got {scale!r}"
            )
        _check_choice("checkpointing", self.checkpointing, ("auto", "on", "off"))
        _check_choice("on_error", self.on_error, ("raise", "skip", "disable"))
        _check_decoder(self.decoder)
        find_preset(self.preset)

    @property
    def guided_by_prompt(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.guidance_scale > 1

    def resolved(self, model: Any, plugins: tuple[Mapping[str, Any], ...]) -> Run:
        """The run with everything resolved that the user left open."""
        described = getattr(model, "describe_scheduler", lambda spec: spec)
        factor = getattr(model, "factor", 1)
        _, height, width = model.latent_shape(self.height, self.width)
        return dataclasses.replace(
            self,
            scheduler=described(self.scheduler),
            height=height * factor,
            width=width * factor,
            model_id=model.id,
            dtype=str(model.dtype).removeprefix("torch."),
            plugins=plugins,
        )

    def to_toml(self) -> str:
        """The run as a file for `pilotfish generate --run`.

        Raises:
            PilotfishError: a plugin was made in this program and has no name to find it by.
        """
        for table in self.plugins:
            if not table["use"]:
                raise PilotfishError(
                    f"plugin {table['name']!r} was defined in this session, so this run cannot be "
                    "repeated from a file; write the plugin as a class in a file and use it as "
                    "'file.py:Class'"
                )
        content = {
            "pilotfish": version("pilotfish"),
            "model": self.model_id,
            **{f: getattr(self, f) for f in _FIELDS},
            "preset": self._preset(),
            "plugins": [_without_none(table) for table in self.plugins],
        }
        return tomli_w.dumps(_without_none(content))

    def _preset(self) -> str | dict[str, Any]:
        """Its name, or a table of what differs from the one of that name."""
        preset = find_preset(self.preset)
        return preset.name if preset == PRESETS.get(preset.name) else preset.changes()

    @classmethod
    def parse(cls, text: str, origin: str = "the run file") -> dict[str, Any]:
        """The keyword arguments that a run file holds, `plugins` and `model` among them.

        Raises:
            InputError: not TOML, or an unknown key; names the file.
        """
        try:
            content = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:  # the latter: [[[[[[ ...
            raise InputError(f"{origin} is not valid TOML: {error}") from None
        content.pop("pilotfish", None)
        for key in content:
            if key not in (known := (*_FIELDS, "model", "plugins")):
                raise InputError(f"{origin}: {unknown('key', key, known)}")
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
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the run file {path}: {error}") from None
        return cls.parse(text, str(path))


_FIELDS = (
    *(f.name for f in dataclasses.fields(Run) if f.name not in ("plugins", "model_id", "model")),
)


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no null: what is not there is the default."""
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}; got {value!r}")


def _check_decoder(value: object) -> None:
    kind, colon, place = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind not in ("vae", "tiny", "linear") or (colon and (kind != "tiny" or not place)):
        raise InputError(
            "decoder must be vae, linear, tiny (the tiny_vae/ of the model's folder) or "
            f"tiny:FOLDER_OR_HUB_ID; got {value!r}"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
