"use strict";
/* Pictures: data in, Plotly out. Names go through `safe`, as Plotly reads a little markup. */
const COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"];
const DASHES = ["solid", "solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const WORDS = {
  sigma1: "largest singular value", effective_rank: "effective rank", stable_rank: "stable rank",
  numerical_rank: "numerical rank", frobenius: "Frobenius norm", nuclear: "nuclear norm",
};
const TOUCH = matchMedia("(pointer: coarse)").matches;
const MOTION = { displayModeBar: false, responsive: true };

const wordFor = (metric) => WORDS[metric] || metric.replaceAll("_", " ");
const safe = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** The end of a name says most. */
const shortened = (name, most) => (name.length <= most ? name : "…" + name.slice(1 - most).replace(/^\./, ""));

/** A number as people read it. */
function shown(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

function layoutOf(height, more) {
  const axis = { gridcolor: "#e8e8e8", linecolor: "#666", zeroline: false, automargin: true, fixedrange: TOUCH };
  return Object.assign({
    height, margin: { l: 56, r: 12, t: 8, b: 44 }, font: { size: 12, color: "#1c1c1c" },
    paper_bgcolor: "white", plot_bgcolor: "white", hovermode: "closest", dragmode: TOUCH ? false : "zoom",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
  }, more, { xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis } });
}

function draw(element, label, traces, layout) {
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", label);
  element.style.height = `${layout.height}px`;
  return Plotly.react(element, traces, layout, MOTION);
}

const stepsAxis = () => ({ title: { text: "step" }, tickformat: "~s" });

/** One curve for each name that has one. curves: of numbers or null. */
function drawCurves(element, label, x, named, y, x_axis) {
  const traces = named.filter((one) => one.values).map((one) => ({
    x, y: one.values, name: safe(one.name), mode: x.length > 1 ? "lines" : "markers", connectgaps: false,
    line: { color: COLOURS[one.look % COLOURS.length], dash: DASHES[one.look % DASHES.length], width: 2 },
    marker: { color: COLOURS[one.look % COLOURS.length] },
    hovertemplate: "%{fullData.name}: %{y:.4~g} at %{x}<extra></extra>",
  }));
  const layout = layoutOf(280, { xaxis: x_axis || stepsAxis(), yaxis: y, showlegend: named[0]?.name !== "loss" });
  return draw(element, label, traces, layout);
}

/** Rows with names, the first on top; `choose` is called with the row that was clicked. */
function drawMap(element, label, map, choose) {
  const narrow = element.clientWidth < 520;
  const count = map.names.length, every = Math.ceil(count / 45);
  const height = Math.min(760, Math.max(220, 90 + 17 * count));
  const seen = map.values.flat().filter((value) => value !== null && (!map.log || value > 0));
  const scaled = (value) => (value === null ? null : map.log ? Math.log10(Math.max(value, Number.MIN_VALUE)) : value);
  const ordered = seen.map(scaled).sort((a, b) => a - b);
  const at = (share) => ordered[Math.min(ordered.length - 1, Math.floor(share * ordered.length))];
  const low = ordered.length ? at(0.005) : 0, high = ordered.length ? at(0.995) : 1;
  const rows = map.names.map((_, row) => row).filter((row) => row % every === 0);
  const trace = {
    type: "heatmap", x: map.steps, z: map.values.map((row) => row.map(scaled)), customdata: map.values,
    text: map.names.map((name) => map.steps.map(() => safe(name))), colorscale: "Viridis",
    zmin: low, zmax: high > low ? high : low + 1, hoverongaps: false,
    hovertemplate: "%{text}<br>step %{x}: %{customdata:.4~g}<extra></extra>",
    colorbar: { thickness: 12, len: 1, outlinewidth: 0, ...colourTicks(map.log, low, high) },
  };
  const names = rows.map((row) => safe(shortened(map.names[row], narrow ? 18 : 40)));
  const layout = layoutOf(height, {
    plot_bgcolor: "#e4e4e4", xaxis: { ...stepsAxis(), showgrid: false }, showlegend: false,
    yaxis: { range: [count - 0.5, -0.5], tickvals: rows, ticktext: names, tickfont: { size: 11 }, showgrid: false },
    shapes: marks(map.chosen), margin: { l: 40, r: 4, t: 6, b: 44 },
  });
  draw(element, label, [trace], layout);
  element.removeAllListeners("plotly_click");
  element.on("plotly_click", (event) => choose(Math.round(event.points[0].y)));
}

function colourTicks(log, low, high) {
  if (!log) return { tickformat: ".3~g" };
  const span = high - low, places = [0, 0.25, 0.5, 0.75, 1].map((share) => low + share * (span || 1));
  return { tickvals: places, ticktext: places.map((place) => Number((10 ** place).toPrecision(2)).toString()) };
}

const marks = (row) => row < 0 ? [] : [{
  type: "rect", xref: "paper", x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5, line: { color: "#D55E00", width: 2.5 },
}];

/** Differences over training, with the steps in clusters that are more than chance in a thick line. */
function drawDifferences(element, label, windows, rows, name) {
  const traces = rows.flatMap((row, at) => {
    const colour = COLOURS[(at + 1) % COLOURS.length], sure = new Set(row.significant);
    const line = { x: windows, y: row.trajectory, name: safe(name(row)).replace(": ", element.clientWidth < 520 ? ":<br>" : ": "), mode: "lines",
      line: { color: colour, width: 1.2, dash: DASHES[(at + 1) % DASHES.length] },
      hovertemplate: "%{y:.3~g} at %{x}<extra></extra>" };
    const thick = { ...line, y: row.trajectory.map((value, place) => (sure.has(place) ? value : null)),
      line: { color: colour, width: 4 }, showlegend: false, hoverinfo: "skip", hovertemplate: undefined };
    return sure.size ? [line, thick] : [line];
  });
  const zero = { type: "line", xref: "paper", x0: 0, x1: 1, y0: 0, y1: 0, line: { color: "#666", width: 1 } };
  return draw(element, label, traces, layoutOf(300, {
    xaxis: stepsAxis(), yaxis: { title: { text: rows[0].unit } }, shapes: [zero], showlegend: true,
  }));
}

/** Paper has another width than the screen, and no time to ask for it. */
function fitToPaper(paper) {
  for (const element of document.querySelectorAll(".js-plotly-plot")) {
    Plotly.relayout(element, paper ? { width: 660, autosize: false } : { width: null, autosize: true });
  }
}
