// Draws what the table says. Data comes from the page's own URL with format=json.
const place = document.getElementById("charts");

// How far apart marks may stand on the time axis, in seconds.
const HOURS = [1, 3, 6, 12, 24, 48, 96, 168].map((hours) => hours * 3_600);
const DAYS = [1, 2, 7, 14, 28, 56, 112].map((days) => days * 86_400);

/** A colour of the style sheet, as the canvas needs it: with light-dark() resolved. */
function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  place.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

const FIGURES = ["requests", "errors", "input_tokens", "output_tokens"];
// Models that get a colour of their own; the rest is one.
const TOP = 5;

/** Every bucket of the range, also those in which nothing happened: its time, sums and rows by model. */
function buckets(report, width) {
  const found = new Map();
  for (const row of report.rows) {
    const at = Date.parse(width === "day" ? row.day : row.hour);
    if (!found.has(at)) found.set(at, { ...Object.fromEntries(FIGURES.map((name) => [name, 0])), models: new Map() });
    const bucket = found.get(at);
    for (const name of FIGURES) bucket[name] += row[name];
    bucket.models.set(row.model, row.input_tokens + row.output_tokens);
  }
  const day = width === "day";
  const step = day ? 86_400_000 : 3_600_000;
  const first = day ? Date.parse(place.dataset.first) : Date.parse(report.start);
  const end = day ? Date.parse(place.dataset.last) + step : Math.min(Date.parse(report.end), Date.now());
  const nothing = { ...Object.fromEntries(FIGURES.map((name) => [name, 0])), models: new Map() };
  const all = [];
  for (let at = first; at < end; at += step) all.push([at / 1000, found.get(at) ?? nothing]);
  return all;
}

/** Layers of the models with most tokens, and of all others. */
function byModel(data) {
  const sums = new Map();
  for (const [, bucket] of data)
    for (const [model, tokens] of bucket.models) sums.set(model, (sums.get(model) ?? 0) + tokens);
  const names = [...sums.keys()].sort((one, other) => sums.get(other) - sums.get(one));
  const top = names.slice(0, TOP);
  const layers = top.map((name, number) => ({
    label: name, colour: `--layer-${number + 1}`, of: (bucket) => bucket.models.get(name) ?? 0,
  }));
  const rest = names.slice(TOP);
  if (rest.length)
    layers.push({
      label: `${rest.length} others`, colour: "--quiet",
      of: (bucket) => rest.reduce((sum, name) => sum + (bucket.models.get(name) ?? 0), 0),
    });
  return layers;
}

/** Bars of each layer standing on those of the layers before it. */
function chart(uPlot, element, data, layers, zone) {
  const times = data.map(([at]) => at);
  const values = layers.map((layer) => data.map(([, bucket]) => layer.of(bucket)));
  const heights = values.map((_, number) =>
    times.map((__, place) => values.slice(0, number + 1).reduce((sum, one) => sum + one[place], 0)));
  const bars = uPlot.paths.bars({ size: [0.8, 40] });
  const byDay = place.dataset.width === "day";
  const half = (byDay ? 86_400 : 3_600) / 2;
  const local = (at) => uPlot.tzDate(new Date(at * 1000), zone);
  const two = (number) => String(number).padStart(2, "0");
  const day = (date) => `${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  const hour = (date) => `${two(date.getHours())}:${two(date.getMinutes())}`;
  const label = (date) => (byDay ? day(date) : hour(date) === "00:00" ? `${hour(date)}\n${day(date)}` : hour(date));
  const text = colour("--quiet");
  const grid = { stroke: colour("--line"), width: 1 };
  const compact = new Intl.NumberFormat("en", { notation: "compact" });
  const whole = (value) => (value == null ? "–" : value.toLocaleString("en"));
  const series = (layer, own) => ({
    label: layer.label,
    fill: colour(layer.colour),
    stroke: colour(layer.colour),
    width: 0,
    paths: bars,
    points: { show: false },
    value: (_, __, ___, place) => whole(place == null ? null : own[place]),
  });
  const plot = new uPlot(
    {
      width: element.clientWidth,
      height: 220,
      tzDate: local,
      cursor: { drag: { x: false, y: false } },
      scales: {
        // Room for the first and the last bar.
        x: { range: (_, first, last) => [first - half, last + half] },
        y: { range: (_, __, most) => [0, Math.max(most * 1.05, 1)] },
      },
      axes: [
        { stroke: text, grid, ticks: grid, incrs: byDay ? DAYS : HOURS, values: (_, marks) => marks.map((at) => label(local(at))) },
        { stroke: text, grid, ticks: grid, size: 56, values: (_, marks) => marks.map((mark) => compact.format(mark)) },
      ],
      // The highest is drawn first and each lower one over it: what shows of a layer is its own part.
      series: [
        { label: byDay ? "day" : "hour", value: byDay ? "{YYYY}-{MM}-{DD}" : "{YYYY}-{MM}-{DD} {HH}:{mm}" },
        ...layers.map((layer, number) => series(layer, values[number])).reverse(),
      ],
    },
    [times, ...heights.reverse()],
    element,
  );
  new ResizeObserver(() => plot.setSize({ width: element.clientWidth, height: 220 })).observe(element);
  return plot;
}

async function draw() {
  const [{ default: uPlot }, answer] = await Promise.all([
    import(place.dataset.uplot),
    fetch(place.dataset.source, { credentials: "same-origin" }),
  ]);
  if (!answer.ok) throw new Error(`the report answered ${answer.status}`);
  const report = await answer.json();
  const width = place.dataset.width;
  const data = buckets(report, width);
  // Days are drawn by their names, whatever their length in the report's time zone.
  const zone = width === "day" ? "UTC" : report.time_zone;
  const charts = () => [
    chart(uPlot, document.getElementById("tokens"), data, [
      { label: "in", colour: "--input", of: (bucket) => bucket.input_tokens },
      { label: "out", colour: "--output", of: (bucket) => bucket.output_tokens },
    ], zone),
    chart(uPlot, document.getElementById("requests"), data, [
      { label: "answered", colour: "--input", of: (bucket) => bucket.requests - bucket.errors },
      { label: "errors", colour: "--bad", of: (bucket) => bucket.errors },
    ], zone),
    chart(uPlot, document.getElementById("models"), data, byModel(data), zone),
  ];
  let drawn = charts();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const plot of drawn) plot.destroy();
    drawn = charts();
  });
}

draw().catch((error) => {
  console.error(error);
  document.getElementById("chart-error").hidden = false;
});
