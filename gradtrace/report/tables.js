"use strict";
/* Tables. Whatever a run calls its things becomes text, never markup. */
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = { chosen: null, rows: data.parameters.map((_, at) => at), sort: null, down: false, map: [] };
const inMap = data.parameters.map((_, at) => at).filter((at) => data.curves[at]);

function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function fill(table, heads, rows, caption) {
  table.replaceChildren();
  if (caption) table.append(make("caption", caption));
  const head = make("tr");
  for (const one of heads) head.append(one instanceof Element ? one : make("th", one, { scope: "col" }));
  const top = make("thead"), body = make("tbody");
  top.append(head);
  rows[0]?.forEach((cell, at) => head.cells[at].classList.toggle("number", typeof cell === "number" || cell?.className === "number"));
  for (const cells of rows) {
    const row = make("tr");
    for (const cell of cells) row.append(cell instanceof Element ? cell : cellOf(cell));
    body.append(row);
  }
  table.append(top, body);
}

const cellOf = (value) => make("td", shown(value), typeof value === "number" ? { class: "number" } : {});

function options(select, names, chosen) {
  select.replaceChildren(...names.map(([value, text]) => {
    const option = make("option", text, { value });
    option.selected = value === chosen;
    return option;
  }));
}

function buttonTo(at) {
  const cell = make("td", null, { class: "name" }), name = data.parameters[at].name;
  if (!data.curves[at]) { cell.textContent = name; return cell; }
  const button = make("button", null, { type: "button", title: "Show its spectra" });
  for (const piece of name.split(/(?<=[._])/)) button.append(piece, make("wbr"));
  button.addEventListener("click", () => choose(at, true));
  cell.append(button);
  return cell;
}

/* The table of parameters. */
const COLUMNS = [["name", "parameter"], ["shape", "shape"], ["rung", "rung"], ["ownership", "ownership"], ["kinds", "kinds"],
  ["steps", "steps"], ["residual", "residual"], ["owner", "owner residual"], ["tolerance", "tolerance"], ["audit", "audits"],
  ["adapters", "adapters"], ["reason", "reason"]];

function header([key, text]) {
  const head = make("th", null, { scope: "col" }), button = make("button", text, { type: "button" });
  const active = state.sort === key;
  head.setAttribute("aria-sort", active ? (state.down ? "descending" : "ascending") : "none");
  if (active) button.textContent += state.down ? " ▼" : " ▲";
  button.addEventListener("click", () => {
    state.down = state.sort === key && !state.down;
    state.sort = key;
    showParameters();
    byId("parameters").tHead.rows[0].cells[COLUMNS.findIndex(([name]) => name === key)].firstChild.focus();
  });
  head.append(button);
  return head;
}

function sorted() {
  const wanted = byId("filter").value.toLowerCase(), audit = byId("audit").value, key = state.sort;
  const rows = data.parameters.map((one, at) => [one, at]).filter(([one]) => (!audit || one.audit === audit) &&
    ["name", "rung", "ownership", "ops", "adapters", "reason"].some((field) => String(one[field] ?? "").toLowerCase().includes(wanted)));
  if (!key) return rows;
  const compare = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  const missing = ([one]) => one[key] === null || one[key] === "";
  return rows.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : compare(a[0][key], b[0][key]) * (state.down ? -1 : 1)));
}

function showParameters() {
  const rows = sorted(), table = byId("parameters");
  fill(table, COLUMNS.map(header), rows.map(([one, at]) => COLUMNS.map(([key]) => {
    if (key === "name") return buttonTo(at);
    const cell = cellOf(one[key]);
    if (key === "audit" && one.above) { cell.className = "bad"; cell.textContent = `above tolerance, ${one.above} times`; }
    if (key === "reason") cell.className = "long";
    return cell;
  })));
  rows.forEach(([, at], place) => {
    table.tBodies[0].rows[place].dataset.parameter = at;
    if (at === state.chosen) table.tBodies[0].rows[place].className = "chosen";
  });
  byId("count").textContent = `${rows.length} of ${data.parameters.length} parameters`;
}
