import { expertTag, fixed, h, label, percent, range } from "./kit.js";

const rightAt = (run, looked, phrases) =>
  phrases.map((phrase, i) => looked >= 0 && run.snapshots[looked].translations[i] === phrase.human);

function compute(state, data) {
  const run = data.runs[state.weight];
  const place = Math.floor(state.step / data.window) - 1;
  const point = run.points[place];
  const looked = Math.floor(state.step / data.snapshot_every) - 1;
  const right = rightAt(run, looked, data.phrases);
  const [load, behind] = [point.load, point.left_behind];
  const chrf = looked >= 0 ? run.snapshots[looked].chrf : null;
  const many = right.filter(Boolean).length;
  const quality = chrf === null ? "nothing has been translated yet"
    : `at the last check chrF++ was ${fixed(chrf, 0)} and ${many} of ${data.phrases.length} phrases were right`;
  const busiest = load.indexOf(Math.max(...load));
  return {
    point: place, snapshot: looked, loss: point.loss, chrf, load, left_behind: behind, right,
    sentence: `Step ${state.step}: the loss is ${fixed(point.loss)}; ${quality}. ` +
      `Expert ${busiest} is the first choice of ${percent(load[busiest])} of the tokens; ` +
      `${percent(behind, 1)} of all tokens find no room in any expert.`,
    met: [
      point.loss < 2.5 && chrf !== null && chrf < 10,
      many > 0 && !rightAt(run, looked - 1, data.phrases).some(Boolean),
      state.weight === "0" && Math.min(...load) < 0.005,
    ],
  };
}

const [LEFT, WIDTH, HEIGHT] = [34, 300, 96];

// A chart of both runs over the steps. `series` gives [step, value] pairs of a run; `high` is the top of the axis.
function chart(top, title, high, series, state, data, now) {
  const x = (step) => LEFT + (WIDTH * step) / data.last;
  const y = (value) => top + HEIGHT * (1 - Math.min(value, high) / high);
  const path = (run) => series(run).map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const other = Object.keys(data.runs).find((weight) => weight !== state.weight);
  return [
    label(LEFT, top - 8, title, { size: 13, weight: 600 }),
    h("path", { d: `M${LEFT} ${top}V${top + HEIGHT}H${LEFT + WIDTH}`, class: "line" }),
    [0, high].map((value) => label(LEFT - 6, y(value) + 4, String(value), { size: 11, anchor: "end", soft: true })),
    h("path", { d: path(data.runs[other]), class: "line", "stroke-dasharray": "3 3" }),
    h("path", { d: path(data.runs[state.weight]), class: "curve" }),
    h("path", { d: `M${x(state.step)} ${top}V${top + HEIGHT}`, class: "line" }),
    now !== null && h("circle", { cx: x(state.step), cy: y(now), r: 4.5, class: "ink" }),
    now !== null && label(x(state.step) + (state.step > 0.8 * data.last ? -8 : 8), Math.min(y(now) - 8, top + HEIGHT - 8), fixed(now, high > 50 ? 0 : 2),
      { size: 13, weight: 600, anchor: state.step > 0.8 * data.last ? "end" : "start" }),
  ];
}

const shortened = (text, room) => (text.length > room ? `${text.slice(0, room - 1)}…` : text);

function draw(view, state, act, spec) {
  const { data } = spec;
  const run = data.runs[state.weight];
  const snapshot = view.snapshot >= 0 ? run.snapshots[view.snapshot] : null;
  const [panel, bars, scale] = [392, 488, 420]; // half of the tokens make a bar 210 wide
  return [
    chart(24, "loss per target token", 8, (r) => r.points.map((p) => [p.step, p.loss]), state, data, view.loss),
    chart(158, "chrF++ on validation sentences", 100, (r) => r.snapshots.map((s) => [s.step, s.chrf]), state, data, view.chrf),
    label(LEFT + WIDTH, 268, `step ${data.last}`, { size: 11, anchor: "end", soft: true }),
    label(panel, 16, "share of the tokens that choose the expert first", { size: 13, weight: 600 }),
    view.load.map((share, e) => [
      expertTag(panel, 24 + e * 29, 46, spec.experts[e], 22),
      h("rect", { x: bars, y: 26 + e * 29, width: Math.max(1, share * scale), height: 18, fill: spec.experts[e].color, class: "tag" }),
      label(bars - 8, 40 + e * 29, percent(share), { size: 12, anchor: "end" }),
    ]),
    h("path", { d: `M${bars + scale / view.load.length} 22V254`, class: "line", "stroke-dasharray": "4 3" }),
    label(bars + scale / view.load.length, 268, "even", { size: 11, anchor: "middle", soft: true }),
    range(data.phrases.length).map((i) => {
      const [phrase, y] = [data.phrases[i], 300 + i * 30];
      const text = snapshot === null ? "not translated yet" : snapshot.translations[i] || "(no words)";
      return [
        h("rect", { x: 2, y: y - 18, width: 236, height: 26, rx: 6, class: "chip" }),
        label(10, y, phrase.source, { size: 13 }),
        label(230, y, phrase.language.slice(0, 3), { size: 11, anchor: "end", soft: true }),
        label(252, y, "→", { soft: true }),
        label(276, y, `${view.right[i] ? "✓ " : ""}${shortened(text, 56)}`, { size: 13, weight: view.right[i] ? 600 : 400, soft: snapshot === null }),
      ];
    }),
  ];
}

export const explorer = { compute, draw };
