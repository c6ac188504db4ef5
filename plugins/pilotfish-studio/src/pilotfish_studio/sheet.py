"""What one page holds beside its fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .content import content_of, preset_and_knobs
from .drawing import stack_rows
from .stack import Item, items_of, moved, tables, without


@dataclass
class Page:
    """A page's state.

    Attributes:
        items: its stack.
        selected: the key of the plugin whose form is shown.
        knobs: of the preset, that were changed.
        kept: of a run that was loaded, what no field can show: what each field shows of it, and
            the value.
        origin: the picture that the run was loaded from, until it is trusted.
        asked: a run that waits for the person's word: its content and its picture.
    """

    items: list[Item] = field(default_factory=list)
    selected: int | None = None
    knobs: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    origin: str | None = None
    asked: tuple[dict[str, Any], str] | None = None

    @property
    def item(self) -> Item | None:
        """The plugin whose form is shown."""
        return next((item for item in self.items if item.key == self.selected), None)

    def rows(self) -> str:
        """The stack as HTML."""
        return stack_rows(self.items, self.selected)

    def add(self, use: str) -> None:
        """Put a plugin at the end, and show its form."""
        item = Item(use.strip())
        self.items.append(item)
        self.selected = item.key

    def act(self, action: str, key: int, to: int = 0) -> None:
        """What a button of the stack, or dragging, asks for."""
        places = [item.key for item in self.items]
        if key not in places:
            return  # a row that is gone by now
        item, at = self.items[places.index(key)], places.index(key)
        if action == "remove":
            self.items = without(self.items, key)
        elif action == "switch":
            item.on = not item.on
        elif action == "select":
            self.selected = None if self.selected == key else key
        else:
            to = {"up": at - 1, "down": at + 1}.get(action, to)
            self.items = moved(self.items, key, to)

    def content(self, values: dict[str, Any]) -> dict[str, Any]:
        """The run that the page stands for."""
        for key, (shown, value) in self.kept.items():
            if values.get(key, shown) == shown:
                values = {**values, key: value}
        return content_of(values, self.knobs, tables(self.items))

    def load(self, content: dict[str, Any], origin: str | None) -> dict[str, Any]:
        """Take a run over; what the fields show of it.

        Raises:
            InputError: a preset or a plugin's table is none.
        """
        preset, knobs = preset_and_knobs(content.get("preset", "balanced"))
        items = items_of(content.get("plugins", []))
        self.items, self.knobs, self.origin, self.asked = items, knobs, origin, None
        self.selected, self.kept = None, {}
        values: dict[str, Any] = {"preset": preset}
        for key, value in content.items():
            if key in ("config", "dtype"):
                self.kept[key] = (None, value)
            elif isinstance(value, dict) and key != "preset":
                values[key] = str(value.get("name", value))
                self.kept[key] = (values[key], value)
            elif key not in ("preset", "plugins"):
                values[key] = value
        return values

    def rival(
        self, compare: str | None, nobody: str, everybody: str
    ) -> tuple[str, list[dict[str, Any]]] | None:
        """What a run to compare with is called, and its plugins; None where there is none.

        Args:
            compare: a plugin's key as text, or one of the other two.
        """
        if compare == everybody:
            return everybody, []
        found = next((item for item in self.items if str(item.key) == compare), None)
        if found is None or compare == nobody:
            return None
        return f"without {found.name or found.use}", tables(self.items, found.key)
