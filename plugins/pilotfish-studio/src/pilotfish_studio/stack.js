// The stack's rows: their buttons, and dragging. `element` and `trigger` are gradio's.
const key = (row) => Number(row.dataset.key);
const rowAt = (event) => event.target.closest("li.item");
let dragged = null;

element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button) trigger("click", { action: button.dataset.do, key: key(rowAt(event)) });
});
element.addEventListener("dragstart", (event) => {
  dragged = rowAt(event);
  if (!dragged) return;
  dragged.classList.add("dragged");
  event.dataTransfer.effectAllowed = "move";
  event.dataTransfer.setData("text/plain", dragged.dataset.key);
});
element.addEventListener("dragover", (event) => {
  const row = rowAt(event);
  if (!dragged || !row) return;
  event.preventDefault();
  if (row === dragged) return;
  const box = row.getBoundingClientRect();
  const below = event.clientY > box.top + box.height / 2;
  row.parentNode.insertBefore(dragged, below ? row.nextSibling : row);
});
element.addEventListener("drop", (event) => event.preventDefault());
element.addEventListener("dragend", () => {
  if (!dragged) return;
  dragged.classList.remove("dragged");
  const to = [...dragged.parentNode.children].indexOf(dragged);
  trigger("click", { action: "place", key: key(dragged), to });
  dragged = null;
});
