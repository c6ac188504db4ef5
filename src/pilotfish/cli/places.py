"""Where a command's files go: nothing is overwritten unasked, and no finished picture is lost."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, OutOfMemoryError, PilotfishError
from .program import not_installed

if TYPE_CHECKING:
    from pilotfish_view import Film

    from ..runs.run import Run
    from ..sampling.sampler import Result

FOLDER = Path("out")  # where nobody names a place
LONGEST = 60  # characters of a prompt in a name


@dataclass(frozen=True)
class Output:
    """The files of a run, as the user asks for them.

    Attributes:
        out: for the pictures; None is a name of prompt and seed.
        save_run, film: for the run file and the film; None is none.
        film_decoded: a sharp film.
        force: write over what is there.
        preview: a small picture above the progress bar, where a terminal can.
    """

    out: str | None = None
    save_run: str | None = None
    film: str | None = None
    film_decoded: bool = False
    force: bool = False
    preview: bool = True

    def check(self) -> None:
        """Find out before the model is loaded whether the places can be written.

        Raises:
            PilotfishError: one cannot.
        """
        from ..runs.pictures import check_place, check_writable

        self.new_film()
        for place in (self.save_run, self.film):
            if place is not None:
                check_place(Path(place))
        check_writable(FOLDER / "picture.png" if self.out is None else self.out)

    def new_film(self) -> Film | None:
        """An empty film, where one is asked for.

        Raises:
            PilotfishError: its package is missing, or its ending names no film.
        """
        if self.film is None:
            return None
        try:
            from pilotfish_view import Film
        except ModuleNotFoundError as error:
            if error.name != "pilotfish_view":
                raise
            raise not_installed("the option '--film'", "pilotfish-view") from None
        Film.check(self.film)
        return Film(decoded=self.film_decoded)

    def pictures(self, run: Run) -> Path:
        """Where the pictures of a run go, which has its seed by now."""
        from ..runs.pictures import numbered

        path = Path(self.out) if self.out is not None else own_place(run)
        return self.unused(path, lambda place: numbered(place, run.num_images))

    def unused(
        self, path: Path, files: Callable[[Path], Sequence[Path]] = lambda path: [path]
    ) -> Path:
        """The path, or `name_2`, `name_3` ... where a file would be written over.

        Args:
            files: what is written for a path.
        """
        counted = (path.with_stem(f"{path.stem}_{count}") for count in itertools.count(2))
        places = itertools.chain([path], () if self.force else counted)
        return next((p for p in places if not any(f.exists() for f in files(p))), path)


def own_place(run: Run, folder: Path = FOLDER) -> Path:
    """Where the pictures of a run go that nobody has named: `out/PROMPT-SEED.png`."""
    return folder / f"{named(str(run.prompt))}-{run.seed}.png"


def save_new(result: Result, folder: str | Path = FOLDER) -> list[Path]:
    """Write a run's pictures as `pilotfish generate` names them: nothing is written over.

    Raises:
        PilotfishError: the folder failed; it tells where the pictures are.
    """
    return saved(result, Output(str(own_place(result.run, Path(folder)))).pictures(result.run))


def named(prompt: str) -> str:
    """A prompt as part of a file's name: its first words."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:LONGEST].rstrip("-") or "picture"


def saved(result: Result, path: Path) -> list[Path]:
    """Write a run's pictures; elsewhere if their place fails by now.

    Raises:
        PilotfishError: the place failed; it tells where the pictures are.
    """
    try:
        return result.save(path)
    except InputError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="pilotfish-")) / path.name
        files = ", ".join(map(str, result.save(elsewhere)))
        raise PilotfishError(f"{error}. The finished picture is not lost: {files}") from error


def with_latents(error: OutOfMemoryError, run: Run, path: Path) -> OutOfMemoryError:
    """The error of a run whose memory was not enough, after its finished latents are written.

    Args:
        path: of the picture; they go beside it.

    Raises:
        InputError: the place cannot be written.
    """
    if not error.finished:
        return error
    from safetensors.torch import save_file

    from ..runs.metadata import KEY
    from ..runs.pictures import check_folder, whole_file

    file = check_folder(path.with_suffix(".latents.safetensors"))
    with whole_file(file) as part:
        save_file({"latents": error.latents.cpu().contiguous()}, part, {KEY: run.to_toml()})
    more = f", config={run.config!r}" if run.config else ""
    return OutOfMemoryError(
        f"{error}. The finished latents are not lost: {file}. In Python, on the CPU: "
        "import pilotfish, safetensors.torch; "
        f'model = pilotfish.load({run.model_id!r}, device="cpu"{more}).model; '
        f'latents = safetensors.torch.load_file({str(file)!r})["latents"]; '
        f"pilotfish.to_pil(model.decode(latents))[0].save({str(path)!r})"
    )


def write(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        InputError: the place cannot be written.
    """
    from ..runs.pictures import check_folder, whole_file

    with whole_file(check_folder(path)) as part:
        part.write_text(text, encoding="utf-8")
