"""How the page looks: system fonts, quiet colours, nothing from the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr


def look() -> dict[str, Any]:
    """What gradio's `launch` is told of it."""
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        radius_size="md",
    )
    return {"theme": theme, "css_paths": Path(__file__).with_name("page.css")}
