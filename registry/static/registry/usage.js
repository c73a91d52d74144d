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

/** Every bucket of the range, also those in which nothing happened. */
function buckets(report, width) {
  const rows = new Map(report.rows.map((row) => [Date.parse(width === "day" ? row.day : row.hour), row]));
  const day = width === "day";
  const step = day ? 86_400_000 : 3_600_000;
  const first = day ? Date.parse(place.dataset.first) : Date.parse(report.start);
  const end = day ? Date.parse(place.dataset.last) + step : Math.min(Date.parse(report.end), Date.now());
  const nothing = { requests: 0, errors: 0, input_tokens: 0, output_tokens: 0 };
  const all = [];
  for (let at = first; at < end; at += step) all.push([at / 1000, rows.get(at) ?? nothing]);
  return all;
}

/** Bars of `top` standing on bars of `base`. */
function chart(uPlot, element, data, base, top, zone) {
  const times = data.map(([at]) => at);
  const lower = data.map(([, row]) => base.of(row));
  const upper = data.map(([, row]) => top.of(row));
  const sums = lower.map((value, place) => value + upper[place]);
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
  const series = (what, values) => ({
    label: what.label,
    fill: colour(what.colour),
    stroke: colour(what.colour),
    width: 0,
    paths: bars,
    points: { show: false },
    value: (_, __, ___, place) => whole(place == null ? null : values[place]),
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
      // The sum is drawn first and the base over it: what shows of the sum is the top.
      series: [{ label: byDay ? "day" : "hour", value: byDay ? "{YYYY}-{MM}-{DD}" : "{YYYY}-{MM}-{DD} {HH}:{mm}" }, series(top, upper), series(base, lower)],
    },
    [times, sums, lower],
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
    chart(uPlot, document.getElementById("tokens"), data,
      { label: "in", colour: "--input", of: (row) => row.input_tokens },
      { label: "out", colour: "--output", of: (row) => row.output_tokens }, zone),
    chart(uPlot, document.getElementById("requests"), data,
      { label: "answered", colour: "--input", of: (row) => row.requests - row.errors },
      { label: "errors", colour: "--bad", of: (row) => row.errors }, zone),
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
