"use strict";
// The numbers and texts of the page: { charts, images, cells, fields }. Texts are only ever set as text, never as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Charts: a rule at the position under the pointer, and the values there as text below. Arrow keys move the rule too.
for (const chart of document.querySelectorAll(".chart")) {
  const { left, right, top, bottom, rows, names, colours } = DATA.charts[chart.dataset.chart];
  const values = chart.parentElement.querySelector(".values");
  const resting = values.innerHTML;
  const svg = chart.querySelector("svg");
  const rule = element("div", { className: "rule", hidden: true });
  Object.assign(rule.style, { top: `${100 * top}%`, bottom: `${100 * bottom}%` });
  chart.append(rule);
  let position = rows.length - 1;
  const show = (index) => {
    position = Math.max(0, Math.min(rows.length - 1, index));
    const x = rows.length > 1 ? left + (right - left) * position / (rows.length - 1) : left;
    rule.style.left = `${100 * x}%`;
    rule.hidden = false;
    const [where, ...numbers] = rows[position];
    values.replaceChildren(where);
    numbers.forEach((number, i) => {
      const key = element("span", { className: "key", hidden: !colours[i] });
      key.style.background = colours[i] ?? "";
      values.append("\u2002", key, `${names[i]} `, element("b", { textContent: number }));
    });
  };
  const rest = () => { rule.hidden = true; values.innerHTML = resting; };
  chart.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width;
    show(Math.round((x - left) / ((right - left) || 1) * (rows.length - 1)));
  });
  chart.addEventListener("pointerleave", rest);
  chart.addEventListener("focus", () => show(position));
  chart.addEventListener("blur", rest);
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); show(position + step); }
  });
}

// Tables: a click on a heading sorts by the column, another one reverses the order. Empty cells come last.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = element("button", { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return up ? order : -order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

// The confusion matrix: a cell opens its images.
function card(index) {
  const image = DATA.images[index];
  const picture = element("span", { className: "picture" }, element("img", {
    src: image.uri, alt: image.id, className: image.small ? "pixels" : "", loading: "lazy",
  }));
  return element("figure", {}, picture, element("figcaption", { textContent: `${image.id}: ${image.text}` }));
}
const dialog = document.getElementById("images");
for (const cell of document.querySelectorAll("[data-cell]")) {
  cell.addEventListener("click", () => {
    const indices = DATA.cells[cell.dataset.cell];
    dialog.querySelector("h3").textContent = cell.getAttribute("aria-label");
    dialog.querySelector(".gallery").replaceChildren(...indices.map(card));
    dialog.showModal();
  });
}
dialog?.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

// The mistakes: a filter by the true class.
const more = document.getElementById("more-mistakes"); // holds all but the first ones
const filter = document.getElementById("filter");
filter?.addEventListener("change", () => {
  for (const figure of document.querySelectorAll("#mistakes .gallery figure")) {
    figure.hidden = filter.value === "" ? figure.dataset.top === "" : figure.dataset.label !== filter.value;
  }
  if (more) more.open = filter.value !== "";
  more?.querySelector("summary").toggleAttribute("hidden", filter.value !== "");
});

// Receptive fields: the map of the token under the pointer, or of the focused one.
for (const place of document.querySelectorAll("[data-field]")) {
  const { rows, columns, sheet } = DATA.fields[place.dataset.field];
  const [grid, field] = [place.querySelector(".grid"), place.querySelector(".field")];
  grid.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
  field.style.backgroundImage = `url(${sheet})`;
  field.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
  const choose = (index) => {
    const [row, column] = [Math.floor(index / columns), index % columns];
    const share = (k, n) => n > 1 ? `${100 * k / (n - 1)}%` : "0%";
    field.style.backgroundPosition = `${share(column, columns)} ${share(row, rows)}`;
    field.setAttribute("aria-label", `receptive field of the token in row ${row + 1}, column ${column + 1} of the grid`);
    [...grid.children].forEach((button, i) => button.classList.toggle("chosen", i === index));
  };
  for (let index = 0; index < rows * columns; index++) {
    const label = `token in row ${Math.floor(index / columns) + 1}, column ${index % columns + 1}`;
    const button = element("button", { type: "button", ariaLabel: label, tabIndex: index ? -1 : 0 });
    for (const name of ["pointerenter", "focus", "click"]) button.addEventListener(name, () => choose(index));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
      const next = grid.children[index + step];
      if (step && next) { event.preventDefault(); next.focus(); }
    });
    grid.append(button);
  }
  choose(Math.floor(rows / 2) * columns + Math.floor(columns / 2));
}
