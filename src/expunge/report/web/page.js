// The theme, sortable tables and charts. Text from a run only ever becomes textContent.
"use strict";

const root = document.documentElement;

function carried(id) {
  const element = document.getElementById(id);
  return element ? JSON.parse(element.textContent) : null;
}

// --- theme: the system's, until the reader chooses ------------------------------------------

function isDark() {
  const chosen = root.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function setUpTheme() {
  const button = document.getElementById("theme");
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    name();
    drawCharts();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    name();
    drawCharts();
  });
  name();
}

// --- tables: a button in each heading sorts the body by that column --------------------------

function cellValue(row, column) {
  const cell = row.cells[column];
  const raw = cell.dataset.value ?? cell.textContent.trim();
  const value = Number(raw);
  return raw === "" || Number.isNaN(value) ? raw : value;
}

function compareValues(a, b) {
  const missing = (value) => value === "–" || value === "" || value === null;
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function setUpSorting(table) {
  const headings = [...table.querySelectorAll("thead tr:last-child th")];
  const shift = table.tBodies[0].rows[0] ? table.tBodies[0].rows[0].cells.length - headings.length : 0;
  headings.forEach((heading, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      const column = place + shift;
      rows.sort((a, b) => (up ? 1 : -1) * compareValues(cellValue(a, column), cellValue(b, column)));
      table.tBodies[0].append(...rows);
    });
  });
}

// --- charts: Vega-Lite, interpreted (the page allows no eval), in the colours of the theme -----

function chartConfig() {
  const ink = getComputedStyle(document.body).color;
  const quiet = getComputedStyle(document.querySelector("figcaption")).color;
  const line = getComputedStyle(document.querySelector("th")).borderBottomColor;
  const text = { labelColor: quiet, titleColor: ink, titleFontWeight: 500, labelFontSize: 12 };
  return {
    background: null,
    font: "system-ui, sans-serif",
    axis: { ...text, gridColor: line, domainColor: line, tickColor: line, labelLimit: 260 },
    legend: { labelColor: ink, titleColor: ink, labelFontSize: 12, labelLimit: 260, columns: 5 },
    header: { labelColor: ink, titleColor: ink },
    view: { stroke: line },
  };
}

function drawCharts() {
  const charts = carried("charts") || {};
  for (const place of document.querySelectorAll(".chart[data-chart]")) {
    const chart = charts[place.dataset.chart];
    const options = {
      ast: true, renderer: "svg", config: chartConfig(), actions: false, defaultStyle: false,
      tooltip: { theme: isDark() ? "dark" : "light" },
    };
    window.vegaEmbed(place, chart, options).then(
      () => {
        place.querySelector("svg").setAttribute("aria-hidden", "true"); // the table below is read
        place.dataset.drawn = "yes";
      },
      (error) => { place.textContent = `This chart could not be drawn: ${error.message}`; },
    );
  }
}

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details[data-print]")) details.open = true;
});

setUpTheme();
document.querySelectorAll("table.sortable").forEach(setUpSorting);
drawCharts();
