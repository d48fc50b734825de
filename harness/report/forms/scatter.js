// The scatter of any two columns. plotly.js stands in the page, gzipped, and is unpacked when a scatter is first opened.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]; // as in the pictures
const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "triangle-left", "triangle-right"];
const BUTTONS = [["toImage", "zoom2d", "pan2d", "autoScale2d", "resetScale2d"]]; // none that leads to another's server
const MOST_RUNS = 8, WIDE = 50; // runs that are named; largest value by the smallest, from which on an axis is logarithmic

let library;
const plotly = () => library ??= (async () => {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), sign => sign.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
  return window.Plotly;
})();

const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

/* One axis: which column it shows of the view that is chosen, and where its rows stand. */
const axisOf = (box, name) => {
  const choice = box.querySelector(`select[name=${name}]`), log = box.querySelector(`input[name=log_${name}]`);
  const value = row => row.values[choice.value];
  return {
    choice, log, value,
    place: () => Number(choice.value),
    isScore: () => choice.value === "0",
    shows: row => value(row) !== null && (!log.checked || value(row) > 0),
    guess: rows => { // a logarithm where values are far apart and none is below 0, which would have no place on it
      const known = rows.map(value).filter(number => number !== null), above = known.filter(number => number > 0);
      log.checked = Math.min(...known) >= 0 && Math.max(...above) > WIDE * Math.min(...above);
    },
    layout: (rows, title) => {
      const known = rows.map(value).map(number => log.checked ? Math.log10(number) : number);
      const low = Math.min(...known), high = Math.max(...known), space = 0.08 * (high - low) || 0.1 * Math.abs(high) || 1;
      return { title: { text: escaped(title) }, type: log.checked ? "log" : "linear", range: [low - space, high + space],
        zeroline: false, gridcolor: "#eee", linecolor: "#999", ticks: "outside", exponentformat: "SI", minexponent: 3 };
    },
  };
};

/* The rows that no other ranked row beats on one axis without losing on the other, from left to right. */
const frontOf = (rows, [first, second]) => {
  const merits = row => [first, second].map(([axis, lower]) => (lower ? -1 : 1) * axis.value(row));
  const beats = (a, b) => a.every((merit, i) => merit >= b[i]) && a.some((merit, i) => merit > b[i]);
  const ranked = rows.filter(row => row.ranked);
  return ranked.filter(row => !ranked.some(other => beats(merits(other), merits(row))))
    .sort((a, b) => first[0].value(a) - first[0].value(b));
};

const hoverOf = (row, axes, shown) => [ // its score too, which has the interval
  `<b>${escaped(row.label)}</b>${row.ranked ? "" : " (fewer seeds)"}`,
  ...[...new Set([...shown, 0])].map(place => `${escaped(axes[place].name)}: ${escaped(row.texts[place])}`),
  ...row.runs.slice(0, MOST_RUNS).map(escaped),
  ...(row.runs.length > MOST_RUNS ? [`and ${row.runs.length - MOST_RUNS} more runs`] : []),
].join("<br>");

for (const box of document.querySelectorAll(".scatter")) {
  const views = JSON.parse(box.querySelector("script").textContent), plot = box.querySelector(".plot");
  const choice = box.querySelector("select[name=view]"), missing = box.querySelector(".missing");
  const x = axisOf(box, "x"), y = axisOf(box, "y"), methods = [...new Set(views.flatMap(view => view.rows.map(row => row.method)))];
  const bars = (axis, rows, colour) => axis.isScore() && rows.some(row => row.half_width !== null)
    ? { type: "data", array: rows.map(row => row.half_width ?? 0), color: `${colour}70`, thickness: 1, width: 0 } : undefined;

  const draw = async () => {
    const Plotly = await plotly(), view = views[choice.value];
    const [across, up] = [x, y].map(axis => view.axes[axis.choice.value]);
    const rows = view.rows.filter(row => x.shows(row) && y.shows(row)), front = frontOf(rows, [[x, across.lower_is_better], [y, up.lower_is_better]]);
    const traces = methods.map((method, place) => {
      const own = rows.filter(row => row.method === method), symbol = SYMBOLS[place % SYMBOLS.length];
      const colour = COLOURS[place % COLOURS.length];
      return { name: escaped(method), mode: "markers", x: own.map(x.value), y: own.map(y.value),
        error_x: bars(x, own, colour), error_y: bars(y, own, colour),
        marker: { color: colour, size: 9, symbol: own.map(row => row.ranked ? symbol : `${symbol}-open`) }, hoverinfo: "text",
        hovertext: own.map(row => hoverOf(row, view.axes, [x.place(), y.place()])), hoverlabel: { align: "left" } };
    }).filter(trace => trace.x.length);
    traces.unshift({ name: "Pareto front", mode: "lines", x: front.map(x.value), y: front.map(y.value), hoverinfo: "skip",
      line: { color: "#555", width: 1, dash: "dash", shape: across.lower_is_better ? "hv" : "vh" } });
    const layout = { font: { family: "system-ui, sans-serif", size: 12 }, margin: { l: 70, r: 10, t: 32, b: 50 }, hovermode: "closest",
      xaxis: x.layout(rows, across.name), yaxis: y.layout(rows, up.name), showlegend: true };
    const gone = view.rows.filter(row => !rows.includes(row)).map(row => row.label);
    missing.textContent = gone.length ? `Without a value on these axes: ${gone.join("; ")}.` : "";
    await Plotly.react(plot, traces, layout, { responsive: true, displaylogo: false, modeBarButtons: BUTTONS });
  };
  const offer = (select, names, chosen) => {
    select.replaceChildren(...names.map((name, place) => new Option(name, place)));
    select.value = Math.max(0, names.indexOf(chosen));
  };
  const nameOf = axis => axis.choice.selectedOptions[0]?.textContent;
  const choose = () => { // another view keeps the axes that it has, too
    const view = views[choice.value], names = view.axes.map(axis => axis.name);
    offer(x.choice, names, x.choice.value === "0" ? names[0] : nameOf(x) ?? "parameters");
    offer(y.choice, names, y.choice.value === "0" ? names[0] : nameOf(y));
    [x, y].forEach(axis => axis.guess(view.rows));
  };
  offer(choice, views.map(view => view.title));
  choose();
  choice.addEventListener("change", () => { choose(); draw(); });
  for (const axis of [x, y]) {
    axis.choice.addEventListener("change", () => { axis.guess(views[choice.value].rows); draw(); });
    axis.log.addEventListener("change", draw);
  }
  const first = () => { if (box.open) { box.removeEventListener("toggle", first); draw(); } };
  box.addEventListener("toggle", first);
  first();
}
