// What the page shows. The content is JSON in the page; names in it are shown as text.
const data = JSON.parse(document.getElementById("data").textContent);
const { analysis, facts, layers } = data;
const get = (id) => document.getElementById(id);
const fixed = (value, digits = 1) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const whole = (value) => value.toLocaleString("en");
const list = (id, sentences) => get(id).replaceChildren(...sentences.map((text) => element("li", {}, text)));
const none = (id, text) => get(id).replaceChildren(element("p", {}, text));

function head() {
  const { source } = analysis;
  const name = source.model ? source.model.split("/").pop() : source.file;
  get("title").textContent = `Which experts ${name} used`;
  document.title = `expert-trace: ${name}`;
  get("source").textContent =
    `${source.file}, context ${source.context}: ${source.layers} layers, ${source.n_expert} experts, ${source.k} chosen per token; ` +
    `${whole(source.prefill_tokens)} tokens of prompts, ${whole(source.decode_tokens)} generated; ${whole(source.activations)} activations`;
  const complete = get("complete");
  complete.textContent = {
    true: "Complete: all that was seen is counted, and nothing was lost.",
    false: "INCOMPLETE: counts are lower bounds.",
    null: "Whether it is complete is not known.",
  }[String(facts.complete)];
  complete.className = facts.complete ? "good" : "bad";
  list("problems", [...facts.problems, ...analysis.notes]);
  for (const title of document.querySelectorAll("main h2")) {
    const item = element("li");
    item.append(element("a", { href: `#${title.parentElement.id}` }, title.textContent));
    get("contents").append(item);
  }
  get("made").textContent = `Made by ${data.tool}.`;
}

// The colour between two of the scale.
const scale = data.scale.map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
function colourOf(heat) {
  const place = Math.min(Math.max(heat, 0), 1) * (scale.length - 1);
  const below = Math.min(Math.floor(place), scale.length - 2);
  return scale[below].map((from, index) => Math.round(from + (scale[below + 1][index] - from) * (place - below)));
}

const canvas = get("heat");
const map = { cell: 1, left: 44, top: 20, order: [], counts: [], cursor: null };

function countsOf(layer) {
  const phase = get("phase").value;
  if (phase !== "all") return layer[phase];
  return layer.prefill.map((count, expert) => count + layer.decode[expert]);
}

function drawMap() {
  map.counts = layers.map(countsOf);
  map.order = map.counts.map((counts) => {
    const ids = counts.map((_, id) => id);
    if (get("order").value === "heat") ids.sort((a, b) => counts[b] - counts[a] || a - b);
    return ids;
  });
  const widest = Math.max(1, ...map.counts.map((counts) => counts.length));
  map.cell = Math.max(2, Math.min(24, Math.floor(1080 / widest)));
  const { cell, left, top } = map;
  canvas.width = left + widest * cell + 8;
  canvas.height = top + layers.length * cell + 4;
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  context.fillStyle = style.getPropertyValue("--panel");
  context.fillRect(left, top, widest * cell, layers.length * cell);
  const most = (counts) => counts.reduce((a, b) => Math.max(a, b), 1);
  const all = map.counts.map(most).reduce((a, b) => Math.max(a, b), 1);
  map.counts.forEach((counts, row) => {
    const hottest = get("range").value === "layer" ? most(counts) : all;
    map.order[row].forEach((expert, place) => {
      if (counts[expert] === 0) return;
      context.fillStyle = `rgb(${colourOf(Math.sqrt(counts[expert] / hottest)).join(" ")})`;
      context.fillRect(left + place * cell, top + row * cell, cell, cell);
    });
  });
  context.fillStyle = style.getPropertyValue("--soft");
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "right";
  const every = Math.ceil(12 / cell);
  layers.forEach((layer, row) => {
    if (row % every === 0) context.fillText(String(layer.id), left - 5, top + row * cell + 9);
  });
  context.textAlign = "left";
  const step = 2 ** Math.ceil(Math.log2(Math.ceil(36 / cell)));
  for (let place = 0; place < widest; place += step) context.fillText(String(place), left + place * cell, top - 6);
  if (map.cursor) {
    context.strokeStyle = style.getPropertyValue("--bad");
    context.lineWidth = 2;
    context.strokeRect(left + map.cursor.place * cell - 1, top + map.cursor.row * cell - 1, cell + 2, cell + 2);
  }
}

function textOf(row, place) {
  const layer = layers[row];
  const expert = map.order[row][place];
  const counts = map.counts[row];
  const sum = counts.reduce((a, b) => a + b, 0);
  const share = sum ? (100 * counts[expert]) / sum : 0;
  return `Layer ${layer.id}, expert ${expert}: ${whole(counts[expert])} activations, ${share.toFixed(2)} % of the layer's ` +
    `(prompts ${whole(layer.prefill[expert])}, generated ${whole(layer.decode[expert])})`;
}

function point(row, place) {
  if (layers.length === 0) return;
  row = Math.min(Math.max(row, 0), layers.length - 1);
  place = Math.min(Math.max(place, 0), map.order[row].length - 1);
  map.cursor = { row, place };
  get("pointed").textContent = textOf(row, place);
  canvas.title = textOf(row, place);
  drawMap();
}

function listenToMap() {
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) * canvas.width) / box.width - map.left;
    const y = ((event.clientY - box.top) * canvas.height) / box.height - map.top;
    const [place, row] = [Math.floor(x / map.cell), Math.floor(y / map.cell)];
    if (row >= 0 && row < layers.length && place >= 0 && place < map.order[row].length) point(row, place);
  });
  canvas.addEventListener("keydown", (event) => {
    const { row, place } = map.cursor || { row: 0, place: 0 };
    const moves = {
      ArrowUp: [row - 1, place], ArrowDown: [row + 1, place], ArrowLeft: [row, place - 1], ArrowRight: [row, place + 1],
      PageUp: [row - 10, place], PageDown: [row + 10, place], Home: [row, 0], End: [row, Infinity],
    };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    point(...(map.cursor ? move : [0, 0]));
  });
  for (const id of ["phase", "range", "order"]) {
    get(id).addEventListener("change", () => {
      drawMap();
      if (map.cursor) point(map.cursor.row, map.cursor.place);
    });
  }
  const legend = get("legend");
  const bar = element("i");
  bar.style.background = `linear-gradient(to right, ${data.scale.join(",")})`;
  legend.append("rarely chosen", bar, "the hottest; an empty cell was never chosen");
  const rows = layers.map((layer) => {
    const counts = layer.prefill.map((count, expert) => [expert, count + layer.decode[expert]]);
    const hottest = counts.filter(([, count]) => count > 0).sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, 10);
    return [String(layer.id), hottest.map(([expert, count]) => `${expert} (${whole(count)})`).join(", ")];
  });
  table(get("hottest"), "Hottest experts by layer", ["Layer", "Experts, with their activations"], rows, "text");
}

function coverage() {
  const curves = layers.map((layer) => {
    const counts = layer.prefill.map((count, expert) => count + layer.decode[expert]).sort((a, b) => b - a);
    const sum = counts.reduce((a, b) => a + b, 0);
    let covered = 0;
    return [[0, 0], ...counts.map((count, index) => [index + 1, sum ? (100 * (covered += count)) / sum : 0])];
  }).filter((curve) => curve[curve.length - 1][1] > 0);
  const widest = Math.max(1, ...curves.map((curve) => curve.length - 1));
  const options = { label: "Coverage by layer", x: "experts, hottest first", y: "% of activations", mostX: widest, mostY: 100 };
  const chart = frame(get("coverage-chart"), options);
  for (const curve of curves) {
    shape(chart.svg, "path", { d: path(curve, chart), fill: "none", stroke: COLOURS[0], "stroke-width": 0.7, opacity: 0.45 });
  }
  const mean = Array.from({ length: widest + 1 }, (_, x) => {
    const at = curves.map((curve) => curve[Math.min(x, curve.length - 1)][1]);
    return [x, at.reduce((a, b) => a + b, 0) / Math.max(at.length, 1)];
  });
  shape(chart.svg, "path", { d: path(mean, chart), fill: "none", stroke: COLOURS[1], "stroke-width": 3 });
  const used = analysis.balance.layers.filter((layer) => layer.all);
  const rows = used.map((layer) => [String(layer.layer_id), ...layer.all.coverage.map((of) => String(of.experts)), String(layer.n_expert)]);
  const percents = used.length ? used[0].all.coverage.map((of) => `${of.percent} %`) : [];
  table(get("coverage-table"), "Fewest experts by share", ["Layer", ...percents, "all"], rows);
}

function balance() {
  const used = analysis.balance.layers.filter((layer) => layer.all);
  const bars = used.map((layer) => ({
    name: String(layer.layer_id),
    value: layer.all.max_over_mean,
    text: `Layer ${layer.layer_id}: ${fixed(layer.all.max_over_mean)} times the mean`,
  }));
  const mostY = Math.max(1, ...bars.map((bar) => bar.value)) * 1.05;
  barChart(get("balance-chart"), { label: "Hottest expert by layer, in multiples of the mean", x: "layer", y: "hottest / mean", mostY }, bars);
  const rows = used.map(({ layer_id, all, prefill_decode_jsd_bits }) => [
    String(layer_id), fixed(all.max_over_mean, 2), fixed(all.entropy_bits, 2), fixed(all.effective_percent), fixed(all.gini, 3),
    fixed(all.cv, 2), String(all.dead), fixed(prefill_decode_jsd_bits, 3),
  ]);
  const names = ["Layer", "Hottest / mean", "Entropy, bits", "Effective, %", "Gini", "Variation", "Never used", "Prompts against generated, bits"];
  table(get("balance-table"), "Balance by layer", names, rows);
}

function cache() {
  const { cache: caches, verdict } = analysis;
  get("verdict").textContent = verdict.summary;
  list("verdict-figures", verdict.figures);
  list("verdict-warnings", [...verdict.warnings, ...verdict.cannot_know]);
  const why = analysis.unanswered.find((of) => of.question === "cache");
  if (!caches) return none("cache-table", why ? why.why : "Not known.");
  const policies = { belady: "Belady (knows the future)", lru: "LRU", lfu: "LFU", random: "random", layer_lru: "LRU by layer", layer_lfu: "LFU by layer", static_pin: "pin (knows the run)" };
  const mostX = Math.max(1, ...caches.table.map((row) => row.budget_mib));
  const lines = Object.entries(policies).map(([key, name]) => ({
    name, points: caches.table.filter((row) => row[key] !== null).map((row) => [row.budget_mib, row[key]]),
  })).filter((line) => line.points.length);
  const options = { label: "Hits of generated tokens by size of the cache", x: "size of the cache, MiB", y: "% hits", mostX, mostY: 100 };
  lineChart(get("cache-chart"), options, lines);
  const rows = caches.table.map((row) => [
    (row.below_working_set ? "! " : "") + fixed(row.budget_mib), ...Object.keys(policies).map((key) => fixed(row[key])),
  ]);
  table(get("cache-table"), "Hits by size and policy, percent; ! is less than one pass touches", ["MiB", ...Object.values(policies)], rows);
}

function overlap() {
  const { time } = analysis;
  const why = analysis.unanswered.find((of) => of.question === "time");
  if (!time) return none("overlap-table", why ? why.why : "Not known.");
  if (time.refused) return none("overlap-table", time.refused);
  const known = time.overlap.filter((of) => of.percent !== null);
  const bars = known.map((of) => ({ name: String(of.lag), value: of.percent, text: `${of.lag} back: ${fixed(of.percent)} %` }));
  if (bars.length) barChart(get("overlap-chart"), { label: "Overlap by lag", x: "tokens back", y: "% in common", mostY: 100 }, bars);
  const { predictors } = time;
  const rows = time.overlap.map((of) => [`overlap with the token ${of.lag} back`, fixed(of.percent), whole(of.pairs)]);
  for (const [key, name] of Object.entries({ previous_token: "the experts of the token before", static_hot: "the hottest of the whole run", prompt_hot: "the hottest of the prompts" })) {
    rows.push([`guess: ${name}`, fixed(predictors[key]), whole(predictors.tested)]);
  }
  table(get("overlap-table"), "Overlap and predictors", ["What", "%", "tokens compared"], rows);
}

function together() {
  const pairs = analysis.structure.co_activation;
  const choice = get("layer");
  const known = [...new Set(pairs.map((pair) => pair.layers[0]))];
  for (const layer of known) choice.append(element("option", { value: layer }, String(layer)));
  if (!known.length) {
    get("together-controls").hidden = true;
    return none("together-table", "Pairs of experts are known of traces alone, and listed when enough tokens chose both.");
  }
  get("together-help").textContent =
    `Pairs that tokens chose together more often than by chance (lift 1), of at least ${analysis.structure.min_support} tokens; the strongest of each layer.`;
  const show = () => {
    const rows = pairs.filter((pair) => pair.layers[0] === Number(choice.value)).map((pair) => [
      `${pair.experts[0]} and ${pair.experts[1]}`, whole(pair.tokens), fixed(pair.percent), fixed(pair.lift, 2),
    ]);
    table(get("together-table"), `Experts of layer ${choice.value} that are chosen together`, ["Experts", "Tokens", "% of the first's", "Lift"], rows);
  };
  choice.addEventListener("change", show);
  show();
}

function capture() {
  table(get("facts-table"), "The capture", ["What", "Value"], facts.table, "text");
  list("unseen", facts.not_visible.length ? facts.not_visible : [facts.complete === null ? "Not known." : "Nothing that is known of."]);
  list("unanswered", analysis.unanswered.map((of) => `${of.question}: ${of.why}`));
  get("unanswered-title").hidden = analysis.unanswered.length === 0;
}

get("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  drawMap();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);

head();
drawMap();
listenToMap();
for (const part of [coverage, balance, cache, overlap, together, capture]) part();
document.documentElement.dataset.drawn = "yes";
