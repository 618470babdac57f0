"use strict";
(() => {
  const table = document.querySelector("#ranking table");
  const form = document.querySelector("#filters");
  const said = document.querySelector("#shown");

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    const number = Number(text);
    return text !== "" && Number.isFinite(number) ? number : text;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));

  const sort = (header) => {
    const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const body = table.tBodies[0];
    const rows = [...body.rows].sort(
      (a, b) => sign * compare(valueOf(a, header.cellIndex), valueOf(b, header.cellIndex)));
    body.append(...rows);
  };

  const filter = () => {
    let count = 0;
    for (const row of table.tBodies[0].rows) {
      const fits = [...form.elements].every((field) => {
        if (!field.name) return true;
        if (field.type === "checkbox") return !field.checked || row.dataset[field.name] === "";
        const wanted = field.value.toLowerCase();
        const there = (row.dataset[field.name] ?? "").toLowerCase();
        return field.type === "search" ? there.includes(wanted) : wanted === "" || there === wanted;
      });
      row.hidden = !fits;
      count += fits;
    }
    said.textContent = `${count} of ${table.tBodies[0].rows.length} rows are shown.`;
  };

  if (table) {
    for (const header of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sort(header));
    }
    form.hidden = false;
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    filter();
  }

  for (const button of document.querySelectorAll("button[data-copies]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.copies);
      const selection = getSelection();
      selection.selectAllChildren(text);  // seen, and ready for the keyboard where the clipboard is closed
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "copied";
      } catch {
        button.textContent = "selected: press Ctrl+C";
      }
    });
  }

  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    target?.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  if (location.hash) reveal();

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const each of closed) each.open = true;
  });
  addEventListener("afterprint", () => { for (const each of closed) each.open = false; });
})();
