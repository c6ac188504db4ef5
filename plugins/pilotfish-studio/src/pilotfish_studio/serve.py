"""The server of the page: of this machine, for this machine."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

from pilotfish import InputError, PilotfishError

HOST = "127.0.0.1"


def serve(port: int | None, browser: bool, folder: str, *networks: str | None) -> None:
    """Show the page until Ctrl-C.

    Args:
        port: None is the first free one from 7860.
        networks: model, device and dtype.

    Raises:
        InputError: the port is taken, or the folder cannot be made.
    """
    from .work import Studio

    names = ("model", "device", "dtype")
    studio = Studio(_made(folder), **dict(zip(names, networks, strict=True)))
    demo, address = start(studio, port, browser)
    # The browser takes some seconds for the page; the networks come meanwhile.
    threading.Thread(target=_warm, args=(studio,), daemon=True).start()
    print(f"{address}  pictures go to {studio.folder}; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    finally:
        demo.close(verbose=False)


def start(studio: Any, port: int | None = None, browser: bool = False) -> tuple[Any, str]:
    """The running page, and its address.

    Raises:
        InputError: the port is taken.
    """
    from .look import look
    from .page import build

    demo = build(studio)
    try:
        _, address, _ = demo.queue(default_concurrency_limit=None).launch(
            server_name=HOST,
            server_port=port,
            inbrowser=browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            allowed_paths=[str(studio.folder.resolve())],
            **look(),
        )
    except OSError as error:
        raise InputError(
            f"no page on port {port or '7860 to 7959'}: {error}. Another --port may be free"
        ) from None
    return demo, str(address)


def _made(folder: str) -> Path:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--folder {folder} cannot be made: {error.strerror}") from None
    return Path(folder)


def _warm(studio: Any) -> None:
    """Load the networks meanwhile; what is wrong with them the first run tells."""
    with contextlib.suppress(PilotfishError):
        studio.sampler({})
