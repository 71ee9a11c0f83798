// The list of items: filtered, sorted, a page at a time. Text only ever becomes textContent.
"use strict";

const STEP = 20;
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;
const KINDS = { sc: "completion", qa: "knowledge" };
const data = carried("items");
const list = document.getElementById("item-list");
const form = document.getElementById("item-filters");
const more = document.getElementById("item-more");
let found = [];
let shown = 0;

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function whole(text) {
  return text === null ? "" : Array.isArray(text) ? text[0] : text;
}

// A character that cannot be seen, or that turns the text around, is shown by its number.
function plain(text) {
  const parts = [];
  let start = 0;
  for (const match of text.matchAll(HIDDEN)) {
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(text.slice(start, match.index), make("span", { className: "sign" }, `U+${code}`));
    start = match.index + 1;
  }
  return [...parts, text.slice(start)];
}

// Spans count characters as Python does: code points, not UTF-16 units.
function marked(text, spans) {
  const parts = [];
  const points = spans.length ? [...text] : null;
  let start = 0;
  for (const [from, to] of spans) {
    parts.push(...plain(points.slice(start, from).join("")));
    parts.push(make("mark", {}, ...plain(points.slice(from, to).join(""))));
    start = to;
  }
  return [...parts, ...plain(points ? points.slice(start).join("") : text)];
}

function saidBy(text, spans = []) {
  const cell = make("dd", { className: "said", dir: "auto" });
  if (text === null) {
    cell.append(make("span", { className: "quiet" }, "not generated"));
    return cell;
  }
  cell.append(...marked(whole(text), spans));
  if (Array.isArray(text)) {
    const note = ` … ${text[1]} more characters in ${data.whole}`;
    cell.append(make("span", { className: "quiet" }, note));
  }
  if (whole(text) === "") cell.append(make("span", { className: "quiet" }, "(nothing)"));
  if (whole(text).length > 900) cell.tabIndex = 0; // it scrolls
  return cell;
}

function line(label, said, score, kind = "") {
  const name = make("dt", { className: kind, dir: "auto" }, label);
  const value = make("dd", { className: score ? "score" : "score none" }, score);
  if (kind) said.classList.add(kind);
  return [name, said, value];
}

function score(answer) {
  const [, value, nll] = answer;
  const parts = [value === null ? "–" : value.toFixed(2)];
  if (nll !== null) parts.push(`NLL ${nll.toFixed(2)}`);
  return parts.join(" · ");
}

function card(item) {
  const title = make("h4", {}, make("bdi", {}, item.id));
  for (const word of [item.half, item.task, KINDS[item.kind] || item.kind]) {
    title.append(make("span", {}, word));
  }
  const rows = make("dl", {}, ...line("prompt", saidBy(item.prompt), ""));
  rows.append(...line("truth", saidBy(item.truth), "score", "truth"));
  item.answers.forEach((answer, place) => {
    if (answer) rows.append(...line(data.models[place], saidBy(answer[0], answer[3]), score(answer)));
  });
  return make("article", {}, title, rows);
}

function showMore() {
  list.append(...found.slice(shown, shown + STEP).map(card));
  shown = Math.min(found.length, shown + STEP);
  more.hidden = shown >= found.length;
  const spread = data.items.length < data.given ? ` (${data.given} were given; the rest did not fit)` : "";
  document.getElementById("item-count").textContent =
    `${found.length} of ${data.items.length} items${spread}, ${shown} shown`;
}

function copied(answer) {
  return answer ? answer[3].reduce((sum, [from, to]) => sum + to - from, 0) : 0;
}

// Worst first: what is still said of the forget half, then what is lost of the retain half.
function byHarm(halfOf, numbersOf) {
  return (a, b) => {
    const forgets = halfOf(a) === "forget";
    if (forgets !== (halfOf(b) === "forget")) return forgets ? -1 : 1;
    const [left, right] = [numbersOf(a), numbersOf(b)];
    for (const place of left.keys()) {
      const missing = (left[place] === null) - (right[place] === null);
      const order = missing || (forgets ? right[place] - left[place] : left[place] - right[place]);
      if (order) return order;
    }
    return 0;
  };
}

function apply() {
  const wish = Object.fromEntries(new FormData(form));
  const place = data.models.indexOf(wish.model);
  const words = wish.text.trim().toLowerCase();
  const low = wish.low === "" ? -Infinity : Number(wish.low);
  const high = wish.high === "" ? Infinity : Number(wish.high);
  const scoreOf = (item) => (item.answers[place] ? item.answers[place][1] : null);
  const holds = (item) => [item.id, whole(item.prompt), whole(item.truth),
    ...item.answers.map((answer) => (answer ? whole(answer[0]) : ""))]
    .some((text) => text.toLowerCase().includes(words));
  found = data.items.filter((item) => {
    const value = scoreOf(item);
    const ranged = low > -Infinity || high < Infinity;
    return (!wish.half || item.half === wish.half) && (!wish.task || item.task === wish.task) &&
      (!wish.kind || item.kind === wish.kind) && (!wish.document || item.document === wish.document) &&
      (!ranged || (value !== null && value >= low && value <= high)) && (!words || holds(item));
  });
  const orders = {
    worst: byHarm((item) => item.half, (item) => [scoreOf(item), copied(item.answers[place])]),
    high: (a, b) => compareValues(scoreOf(b) ?? -1, scoreOf(a) ?? -1),
    low: (a, b) => compareValues(scoreOf(a), scoreOf(b)),
    copied: (a, b) => copied(b.answers[place]) - copied(a.answers[place]),
    id: (a, b) => compareValues(a.id, b.id),
  };
  if (orders[wish.order]) found.sort(orders[wish.order]);
  list.replaceChildren();
  shown = 0;
  showMore();
}

function fill(name, values) {
  const select = form.elements[name];
  for (const value of values) {
    const defaultSelected = name === "model" && value === data.models[data.after];
    select.append(make("option", { value, defaultSelected }, KINDS[value] || value));
  }
}

// --- documents: one row each, worst and mean score of the chosen model -------------------------

function documents(place) {
  const groups = new Map();
  for (const item of data.items) {
    const key = `${item.half}\n${item.document}`;
    if (!groups.has(key)) groups.set(key, { half: item.half, document: item.document, items: [] });
    groups.get(key).items.push(item);
  }
  const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
  const values = (items, model, part) => items.map((item) => item.answers[model]?.[part])
    .filter((value) => value !== null && value !== undefined);
  return [...groups.values()].map(({ half, document: name, items }) => {
    const before = mean(values(items, data.before, 1));
    const scores = values(items, place, 1);
    const most = scores.length ? Math.max(...scores) : null;
    const least = scores.length ? Math.min(...scores) : null;
    const losses = [mean(values(items, data.before, 2)), mean(values(items, place, 2))];
    const harm = [half === "forget" ? most : least, mean(scores)]; // as `expunge leaks` ranks them
    return { harm, row: [name, half, items.length, before, mean(scores), most, ...losses] };
  }).sort(byHarm((one) => one.row[1], (one) => one.harm)).map((one) => one.row);
}

function fillDocuments() {
  const body = document.querySelector("#documents tbody");
  const rows = documents(data.after).map(([name, half, ...numbers]) => {
    const button = make("button", { type: "button" }, make("bdi", {}, ...plain(name)));
    button.addEventListener("click", () => {
      form.elements.document.value = name;
      form.elements.half.value = half;
      apply();
      document.getElementById("items-title").focus();
    });
    const first = make("th", { scope: "row" }, button);
    first.dataset.value = name;
    const cells = numbers.map((value, column) => {
      const text = value === null ? "–" : column ? value.toFixed(2) : String(value);
      return make("td", {}, text);
    });
    return make("tr", {}, first, make("td", { className: "text" }, half), ...cells);
  });
  body.replaceChildren(...rows);
}

if (data) {
  fill("half", new Set(data.items.map((item) => item.half)));
  fill("task", new Set(data.items.map((item) => item.task)));
  fill("kind", new Set(data.items.map((item) => item.kind)));
  fill("model", data.models);
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  more.addEventListener("click", showMore);
  fillDocuments();
  apply();
}
