"use strict";
/* The map, and the list of its rows. */
function showMap() {
  if (!inMap.length) {
    byId("map-caption").textContent = "Nothing was recorded yet.";
    byId("chooser").disabled = true;
    return;
  }
  const metric = Number(byId("map-metric").value), kind = Number(byId("map-kind").value);
  const group = Number(byId("map-group").value), width = Math.round(data.recorded / data.steps.length);
  const none = data.steps.map(() => null), log = data.ratios[metric], name = wordFor(data.metrics[metric]);
  const known = inMap.filter((at) => !rankOfVector(at, metric, kind));
  state.map = known.length ? known : inMap;
  const way = width > 1 ? `; medians of about ${width} recorded steps each` : "";
  byId("map-caption").textContent = `${capital(name)} of the ${data.kinds[kind]} in ${data.shown[group]}` +
    `${log ? ", at the scale of the group's own mean, on a logarithmic scale" : ""}${way}. Grey: not measured. ` +
    (known.length < inMap.length ? "Vectors, whose ranks are 1, are left out. " : "") + "Click a row to see its spectra.";
  drawMap(byId("map"), byId("map-caption").textContent, {
    names: state.map.map((at) => data.parameters[at].name), steps: data.steps, log, chosen: state.map.indexOf(state.chosen),
    values: state.map.map((at) => data.curves[at].values[kind][metric][group] || none),
  }, (row) => choose(state.map[row], false));
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);
const rankOfVector = (at, metric, kind) =>
  data.kinds[kind] === "gradient" && !data.ratios[metric] && !data.parameters[at].matrix;

function setUpMap() {
  const numbered = (names) => names.map((name, at) => [String(at), name]);
  options(byId("map-metric"), numbered(data.metrics.map(wordFor)), String(data.metrics.indexOf(data.first)));
  options(byId("map-kind"), numbered(data.kinds), "0");
  options(byId("map-group"), numbered(data.shown), "0");
  options(byId("kind"), numbered(data.kinds), "0");
  const groupings = [...new Set(data.shown.filter((name) => name.includes("=")).map((name) => name.split("=")[0]))];
  options(byId("grouping"), [...groupings.map((name) => [name, name]), ["", "all of them"]], groupings[0] ?? "");
  options(byId("chooser"), inMap.map((at) => [String(at), data.parameters[at].name]), null);
  for (const id of ["map-metric", "map-kind", "map-group"]) byId(id).addEventListener("change", showMap);
  for (const id of ["kind", "grouping", "smooth"]) byId(id).addEventListener("change", showParameter);
  byId("chooser").addEventListener("change", (event) => choose(Number(event.target.value), false));
  for (const [id, by] of [["previous", -1], ["next", 1]]) {
    byId(id).addEventListener("click", () => choose(inMap[inMap.indexOf(state.chosen) + by], false));
  }
}

/* One parameter. */
function choose(at, go) {
  if (at === undefined || at === state.chosen && !go) return;
  state.chosen = at;
  byId("chooser").value = String(at);
  Plotly.relayout(byId("map"), { shapes: marks(state.map.indexOf(at)) });
  for (const row of document.querySelectorAll("tr.chosen")) row.classList.remove("chosen");
  for (const row of document.querySelectorAll(`tr[data-parameter="${at}"]`)) row.classList.add("chosen");
  showParameter();
  byId("said").textContent = `Showing ${data.parameters[at].name}`;
  if (go) byId("parameter-title").focus();
}

function showParameter() {
  const at = state.chosen;
  if (at === null) { byId("parameter-about").textContent = "Nothing was recorded yet."; return; }
  const one = data.parameters[at], kind = Number(byId("kind").value), of = data.curves[at];
  byId("previous").disabled = inMap[0] === at;
  byId("next").disabled = inMap[inMap.length - 1] === at;
  byId("parameter-title").textContent = one.name;
  byId("parameter-about").textContent = [`Shape ${one.shape}`, one.rung && `measured ${one.rung}`, one.ops && `by ${one.ops}`,
    `${shown(one.steps)} steps`, `audits: ${one.audit}`, one.reason].filter(Boolean).join("; ") + ".";
  const width = smoothing(), seen = data.shown.map((name, g) => g).filter((g) => isSeen(data.shown[g]));
  const named = (curves, width) => seen.map((g, look) => ({ name: data.shown[g], look, values: smoothed(curves[g], width) }));
  const figures = data.metrics.map((metric, m) => {
    if (rankOfVector(at, m, kind)) return null;
    const title = `${capital(wordFor(metric))} of the ${data.kinds[kind]}${data.ratios[m] ? ", each group at the scale of its own mean" : ""}${saidOf(width)}`;
    return [title, (element) => drawCurves(element, `${title}, ${one.name}. ${lastOf(of.values[kind][m])}`, data.steps,
      named(of.values[kind][m], width), { title: { text: safe(wordFor(metric)) }, type: data.ratios[m] ? "log" : "linear", tickformat: ".2~g" })];
  });
  const scree = `Singular values of the ${data.kinds[kind]} by size, in the last recorded step that has the group`;
  figures.push([scree, (element) => drawCurves(element, `${scree}, ${one.name}`, data.places, named(of.scree[kind], 1),
    { title: { text: "singular value" }, type: "log", tickformat: ".2~g" }, { title: { text: "component" } })]);
  if (of.cosines.some(Boolean)) figures.push(cosines(one, of));
  figures.push(...differencesOf(at));
  showFigures(figures.filter(Boolean));
}

/** Points in a running median; 1 for none. */
const smoothing = () => (byId("smooth").checked ? 2 * Math.floor(data.steps.length / 30) + 1 : 1);
const saidOf = (width) => (width > 1 ? `; running median of ${width} points` : "");
const isSeen = (group) => !byId("grouping").value || group === "all" || group.startsWith(`${byId("grouping").value}=`);

function smoothed(curve, width) {
  if (!curve || width < 2) return curve;
  const half = (width - 1) / 2;
  return curve.map((value, at) => {
    const near = curve.slice(Math.max(0, at - half), at + half + 1).filter((one) => one !== null).sort((a, b) => a - b);
    const middle = near.length >> 1;
    return value === null ? null : near.length % 2 ? near[middle] : (near[middle - 1] + near[middle]) / 2;
  });
}

function cosines(one, of) {
  const width = smoothing();
  const title = `Cosine between the groups' gradients: 1 the same direction, 0 none in common, −1 against each other${saidOf(width)}`;
  const pairs = data.pairs.map(([a, b], at) => [data.shown[a], data.shown[b], at]).filter(([a, b]) => isSeen(a) && isSeen(b));
  const named = pairs.map(([a, b, at], look) => ({ name: `${a} and ${b}`, look: look + 1, values: smoothed(of.cosines[at], width) }));
  return [title, (element) => drawCurves(element, `${title}, ${one.name}`, data.steps, named, { title: { text: "cosine" }, range: [-1.05, 1.05] })];
}

function differencesOf(at) {
  const width = smoothing();
  return data.differences.flatMap((found) => ["log2 ratio", "difference"].flatMap((unit) => {
    const rows = found.rows.filter((row) => row.parameter === at && row.unit === unit && row.trajectory).slice(0, 3)
      .map((row) => ({ ...row, trajectory: smoothed(row.trajectory, width) }));
    const title = `Differences by ${found.name} that are among the strongest, over training; thick: more than chance${saidOf(width)}`;
    const name = (row) => `${row.kind}, ${wordFor(row.metric)}: ${row.group} − ${row.group_other}`;
    return rows.length ? [[title, (element) => drawDifferences(element, title, found.windows, rows, name)]] : [];
  }));
}

function lastOf(curves) {
  const last = (curve) => [...curve].reverse().find((value) => value !== null);
  return "In the end: " + data.shown.map((name, g) => curves[g] && `${name} ${shown(last(curves[g]))}`).filter(Boolean).join(", ");
}

function showFigures(figures) {
  const place = byId("plots");
  for (const old of place.querySelectorAll(".js-plotly-plot")) Plotly.purge(old);
  place.replaceChildren();
  const plots = figures.map(([title]) => {
    const figure = make("figure"), plot = make("div", null, { class: "plot" });
    figure.append(make("figcaption", title), plot);
    place.append(figure);
    return plot;
  });
  plots.forEach((plot, at) => figures[at][1](plot)); // when all are there, each has its width
}
