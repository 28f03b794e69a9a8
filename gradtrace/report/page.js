"use strict";
/* The page, from top to bottom. */

/* What was run. */
function showRun() {
  document.title = data.title;
  byId("title").textContent = data.title;
  const about = new Map(data.about.map(([section, name, value]) => [`${section}/${name}`, value]));
  const of = (name) => about.get(`about/${name}`) ?? about.get(`about/versions.${name}`);
  byId("lead").textContent = "Singular values of gradients, activations and adjoints per group of samples, recorded " +
    "while the network was trained. This file holds everything it shows; nothing is fetched.";
  if (!data.closed) {
    byId("state").hidden = false;
    byId("state").textContent = "This run was not closed: it was still being written, or its writer was stopped. " +
      "What is shown is as of its last commit.";
  }
  const failed = data.parameters.filter((one) => one.above).length;
  const audited = data.parameters.filter((one) => one.audit !== "not audited").length;
  const facts = {
    "Recorded steps": data.recorded, "From step to step": data.ends ? data.ends.map(shown).join(" to ") : "none",
    "Parameters": data.parameters.length, "Groups": data.groups.length,
    "Audits": audited ? `${audited - failed} of ${audited} parameters passed` : "none",
    "gradtrace": of("gradtrace"), "PyTorch": of("torch"), "Seed": of("seed"), "Type of numbers": of("dtype"),
    "State": data.closed ? "closed" : "not closed",
  };
  for (const [name, value] of Object.entries(facts)) {
    if (value === undefined || value === null) continue;
    const item = make("div");
    item.append(make("dt", name), make("dd", typeof value === "number" && name !== "Seed" ? shown(value) : String(value)));
    byId("facts").append(item);
  }
  const heads = ["group", "steps", "samples", "least", "median", "most"];
  fill(byId("groups"), heads, data.groups.map((one) => [one.name, one.steps, one.samples, one.least, one.median, one.most]),
    "steps: with the group; samples: in all steps; least, median, most: samples in a step that has the group");
  byId("notes").replaceChildren(...data.notes.map((note) => make("li", note)));
  if (!data.loss) { byId("loss-figure").hidden = true; return; }
  drawCurves(byId("loss"), "Loss over training", data.loss.steps, [{ name: "loss", values: data.loss.values, look: 1 }],
    { title: { text: "loss" } });
}

/* Differences. */
function difference(row) {
  if (row.difference === null) return "";
  const times = (value) => String(Number((2 ** value).toPrecision(4))), ends = [row.low, row.high];
  const known = ends.every((value) => value !== null);
  if (row.unit === "log2 ratio") return `${times(row.difference)}×${known ? ` (${ends.map(times).join(" to ")})` : ""}`;
  return `${row.difference > 0 ? "+" : ""}${shown(row.difference)}${known ? ` (${ends.map(shown).join(" to ")})` : ""}`;
}

function showDifferences() {
  const place = byId("comparisons");
  for (const found of data.differences) {
    place.append(make("h3", `By ${found.name}`));
    const where = found.probe === null ? "in the training batches" : `in the probe ${found.probe}, at constant weights`;
    place.append(make("p", `${shown(found.count)} comparisons ${where}; ${shown(found.with_p)} have a p-value, and ` +
      `${shown(found.below)} of them q ≤ 0.05 (p corrected for all comparisons by ${found.name}).`));
    place.append(make("p", found.population));
    for (const note of found.notes) place.append(make("p", note));
    const heads = ["parameter", "kind", "metric", "groups", "first against second (95 % interval)", "p", "q", "steps"];
    const noted = found.rows.some((row) => row.note);
    if (noted) heads.push("note");
    const region = make("div", null, { class: "scroll tall", role: "region", tabindex: "0", "aria-label": `Differences by ${found.name}` });
    const table = make("table");
    fill(table, heads, found.rows.map((row) => [buttonTo(row.parameter), row.kind, wordFor(row.metric),
      `${row.group} against ${row.group_other}`, difference(row), row.p ?? "none", row.q ?? "none",
      make("td", row.first_step === null ? "" : `${shown(row.first_step)} to ${shown(row.last_step)}`, { class: "steps" }), ...(noted ? [row.note || ""] : [])]),
      `The ${found.rows.length} strongest of ${shown(found.count)}; × says how many times as large the first group is, + or − by how much.`);
    found.rows.forEach((row, at) => { table.tBodies[0].rows[at].dataset.parameter = row.parameter; });
    region.append(table);
    place.append(region);
  }
  if (!data.differences.length) place.append(make("p", data.notes.join(" ") || "Nothing was recorded yet."));
}

function showRest() {
  const place = byId("methods-text");
  place.append(make("p", "Curves are of the training batches. Singular values and norms are at the scale of each group's own mean: " +
    "a gradient times N / n, where N samples are in the batch and n in the group, an adjoint times N / √n, an activation times 1 / √n."));
  for (const found of data.differences) place.append(make("h3", `By ${found.name}`), make("p", found.methods));
  fill(byId("about"), ["section", "name", "value"], data.about.map(([section, name, value]) =>
    [section, name, make("td", String(value ?? ""), { class: "long" })]));
}

showRun();
setUpMap();
showDifferences();
options(byId("audit"), [["", "all"], ...[...new Set(data.parameters.map((one) => one.audit))].map((each) => [each, each])], "");
showParameters();
for (const id of ["filter", "audit"]) byId(id).addEventListener("input", showParameters);
showRest();
showMap();
if (inMap.length) choose(data.differences.flatMap((found) => found.rows)[0]?.parameter ?? inMap[0], false);
else showParameter();
addEventListener("beforeprint", () => fitToPaper(true));
addEventListener("afterprint", () => fitToPaper(false));
