"use strict";
// Sorts tables by a column, copies recipes, and shows which mark of a plot belongs to which row.
function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = Number(a) - Number(b);
  return Number.isNaN(difference) ? a.localeCompare(b) : difference;
}

function sortBy(table, heads, column) {
  const descending = heads[column].getAttribute("aria-sort") === "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const order = compare(value(a), value(b));
    return descending && value(a) !== "" && value(b) !== "" ? -order : order;
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, heads, column));
    head.append(button);
  });
}

for (const box of document.querySelectorAll(".copyable")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const text = box.querySelector("pre");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected: press Ctrl-C";
    }
  });
  box.append(button);
}

const pointOf = (target) => target.closest?.("[data-point]")?.dataset.point;
const same = (point) => [...document.querySelectorAll("[data-point]")].filter((e) => e.dataset.point === point);
document.addEventListener("pointerover", (event) => {
  const point = pointOf(event.target);
  document.querySelectorAll(".active").forEach((e) => e.classList.remove("active"));
  if (point !== undefined) same(point).forEach((e) => e.classList.add("active"));
});
document.addEventListener("click", (event) => {
  const mark = event.target.closest?.("svg [data-point]");
  if (mark) same(mark.dataset.point).find((e) => e.tagName === "TR")?.scrollIntoView({ block: "center" });
});
