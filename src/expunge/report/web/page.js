// The theme, sortable tables and charts. Text from a run only ever becomes textContent.
"use strict";

const PANEL = 360; // least room of one panel of several, in pixels, with its axis
const WIDEST = 640;
const NARROWEST = 120;
const KEY = 190; // room of one name of a key
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

function chartConfig(room) {
  const ink = getComputedStyle(document.body).color;
  const quiet = getComputedStyle(document.querySelector("figcaption")).color;
  const line = getComputedStyle(document.querySelector("th")).borderBottomColor;
  const text = { labelColor: quiet, titleColor: ink, titleFontWeight: 500, labelFontSize: 12 };
  return {
    background: null,
    font: "system-ui, sans-serif",
    axis: { ...text, gridColor: line, domainColor: line, tickColor: line, labelLimit: Math.min(260, room / 3), labelSeparation: 6 },
    legend: {
      labelColor: ink, titleColor: ink, labelFontSize: 12, labelLimit: 260, orient: "bottom",
      symbolBaseFillColor: quiet, symbolBaseStrokeColor: quiet,
      columns: Math.max(1, Math.floor(room / KEY)),
      layout: { bottom: { direction: room < 2 * PANEL ? "vertical" : "horizontal" } },
    },
    title: { color: ink },
    header: { labelColor: ink, titleColor: ink, labelFontSize: 13, labelFontWeight: "bold" },
    view: { stroke: line },
  };
}

// The same chart at another width, its panels so many side by side and the others below them.
function sized(chart, across, width) {
  const spec = structuredClone(chart);
  if (spec.hconcat) {
    spec.concat = spec.hconcat.map((one) => ({ ...one, width }));
    delete spec.hconcat;
    spec.columns = across;
  } else if (spec.facet) {
    spec.facet = spec.facet.column;
    spec.columns = across;
    spec.spec.width = width;
  } else {
    spec.width = width;
  }
  return spec;
}

function panels(chart) {
  if (chart.hconcat) return chart.hconcat.length;
  if (!chart.facet) return 1;
  const rows = (chart.data ?? chart.spec.data).values;
  return new Set(rows.map((row) => row[chart.facet.column.field])).size;
}

// Charts carry the widths of their files; here they take the room there is. What stands beside
// the panels (axes, names) is known once it is drawn: where it leaves another width, draw again.
async function drawChart(place, chart) {
  const room = place.clientWidth;
  const options = {
    ast: true, renderer: "svg", config: chartConfig(room), actions: false, defaultStyle: false,
    tooltip: { theme: isDark() ? "dark" : "light" },
  };
  const across = Math.min(panels(chart), Math.max(1, Math.floor(room / PANEL)));
  const wide = Math.min(WIDEST, Math.floor(room / across));
  const draw = (width) => window.vegaEmbed(place, sized(chart, across, width), options);
  await draw(wide);
  const beside = place.querySelector("svg").width.baseVal.value - across * wide;
  const fitting = Math.floor((room - beside) / across);
  if (fitting < wide) await draw(Math.max(fitting, NARROWEST));
  place.querySelector("svg").setAttribute("aria-hidden", "true"); // the table below is read
  place.dataset.drawn = "yes";
}

function drawCharts() {
  const charts = carried("charts") || {};
  for (const place of document.querySelectorAll(".chart[data-chart]")) {
    drawChart(place, charts[place.dataset.chart]).catch((error) => {
      place.textContent = `This chart could not be drawn: ${error.message}`;
    });
  }
}

function followWidth() {
  let wide = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (innerWidth !== wide) drawCharts(); // a phone's bars change the height alone
      wide = innerWidth;
    }, 200);
  });
}

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details[data-print]")) details.open = true;
});

setUpTheme();
followWidth();
document.querySelectorAll("table.sortable").forEach(setUpSorting);
drawCharts();
