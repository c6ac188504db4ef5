"""`pilotfish studio`. What needs gradio and torch is imported when it runs."""

from __future__ import annotations

import click


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="[default: the first free from 7860]")
@click.option("--no-browser", is_flag=True, help="Open no browser; the address is printed.")
@click.option(
    "--folder", default="out", show_default=True, metavar="FOLDER", help="Of the pictures."
)
@click.option(
    "--model", metavar="FOLDER|HUB_ID|NAME|FILE.safetensors", help="[default: the emoji model]"
)
@click.option("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu  [default: the best]")
@click.option("--dtype", metavar="NAME", help="bfloat16, float16 ...  [default: float32]")
def studio(
    port: int | None,
    no_browser: bool,
    folder: str,
    model: str | None,
    device: str | None,
    dtype: str | None,
) -> None:
    """A page in the browser: plugins as forms, every step watched, pictures with their runs.

    It answers this machine only, and loads nothing from the network. Ctrl-C ends it.

    \b
    pilotfish studio
    pilotfish studio --model folder-or-hub-id --device cuda --dtype bfloat16 --folder pictures
    """
    from .serve import serve

    serve(port, not no_browser, folder, model, device, dtype)
