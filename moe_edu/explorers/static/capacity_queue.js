import { argmax, colored, count, expertTag, h, hatching, label, listed, range, softmax } from "./kit.js";

// The arithmetic of moe_edu.top2_gating with a capacity; `data` holds the batch, English first.
function compute(state, data) {
  const T = data.words.length;
  const inOrder = (code) => range(T).filter((t) => (data.languages[t] === state.first) === (code === state.first));
  const codes = [...new Set(data.languages)];
  const batch = [...inOrder(state.first), ...codes.filter((code) => code !== state.first).flatMap(inOrder)];
  const words = batch.map((t) => data.words[t]);
  const languages = batch.map((t) => data.languages[t]);
  const logits = batch.map((t) => data.logits[t].map((logit, e) => logit + state.skew * data.pull[e]));
  const capacity = Math.ceil(state.factor * 2 * data.perExpert);
  const expert_index = logits.map((row) => {
    const first = argmax(row);
    return [first, argmax(row.map((logit, e) => (e === first ? -Infinity : logit)))];
  });
  const top = logits.map((row) => Math.max(...softmax(row)));
  const line = range(T);
  if (state.priority) line.sort((a, b) => top[b] - top[a]);
  const queues = data.pull.map(() => []);
  for (const k of [0, 1]) for (const t of line) queues[expert_index[t][k]].push([t, k]);
  const kept = expert_index.map(() => [false, false]);
  for (const queue of queues) for (const [t, k] of queue.slice(0, capacity)) kept[t][k] = true;
  const isDropped = (t) => !kept[t][0] && !kept[t][1];
  const dropped = Object.fromEntries(codes.map((code) =>
    [code, range(T).filter((t) => languages[t] === code && isDropped(t)).map((t) => words[t])]));
  const [eng, fra] = codes.map((code) => dropped[code].length);
  const lost = kept.flat().filter((kept) => !kept).length;
  return {
    words, languages, expert_index, kept, capacity, queues, dropped,
    sentence: `With ${count(capacity, "slot")} per expert, ${lost} of ${2 * T} choices ` +
      `${lost === 1 ? "finds" : "find"} no room. ${sayDropped(dropped)}`,
    met: [
      eng + fra === 0 && state.factor <= 1,
      state.skew >= 2 && eng > 0 && fra === 0,
      state.skew >= 2 && state.factor <= 1 && Math.abs(eng - fra) <= 1,
    ],
  };
}

const NAMES = { eng: "English", fra: "French" };

function sayDropped(dropped) {
  if (!Object.values(dropped).flat().length) return "No word is dropped: each one gets at least one of its two experts.";
  const parts = Object.entries(dropped).map(([code, words]) =>
    (words.length ? `${NAMES[code]} ${listed(words.map((word) => `“${word}”`))}` : `no ${NAMES[code]} words`));
  return `Dropped by both experts: ${parts.join("; ")}.`;
}

const INK = "var(--moe-ink)";
const FAINT = 0.5; // of hatching behind a word, so that it stays easy to read
const COLUMNS = 13; // places of a queue that fit; the last one counts the rest

function drawWord(x, y, word, experts, kept, spec) {
  const dropped = !kept[0] && !kept[1];
  return h("g", { transform: `translate(${x},${y})` },
    h("rect", { width: 53, height: 46, rx: 6, class: dropped ? "chip dropped" : "chip", "fill-opacity": dropped ? FAINT : null }),
    label(26.5, 18, word, { size: 12.5, anchor: "middle", weight: dropped ? 600 : 400 }),
    dropped ? label(26.5, 37, "dropped", { size: 11, anchor: "middle" }) : experts.map((e, k) => h("g", {},
      kept[k] ? colored({ x: 4 + 23 * k, y: 25, width: 22, height: 16, rx: 3 }, spec.experts[e], k)
        : h("rect", { x: 4 + 23 * k, y: 25, width: 22, height: 16, rx: 3, class: "chip dropped", "fill-opacity": FAINT, "stroke-dasharray": k ? "3 2" : "none" }),
      label(15 + 23 * k, 37, kept[k] ? e : `✕${e}`, {
        size: 11, anchor: "middle", weight: 600, fill: kept[k] ? spec.experts[e].ink : INK,
      }))));
}

function drawPlace(x, y, word, seated, second, style) {
  if (!seated) {
    return h("g", {},
      h("rect", { x, y, width: 47, height: 26, rx: 3, class: "chip dropped", "fill-opacity": FAINT, "stroke-dasharray": second ? "4 3" : "none" }),
      label(x + 23.5, y + 17.5, word, { size: 12, anchor: "middle", fill: INK }));
  }
  return h("g", {},
    colored({ x, y, width: 47, height: 26, rx: 3 }, style, second),
    label(x + 23.5, y + 17.5, word, { size: 12, anchor: "middle", fill: style.ink }));
}

function drawQueue(view, queue, e, y, spec) {
  const left = (place) => 54 + 50 * place + (place >= view.capacity ? 8 : 0);
  const crowded = queue.length > COLUMNS;
  const shown = queue.slice(0, crowded ? COLUMNS - 1 : COLUMNS);
  const wall = left(view.capacity) - 6;
  return [
    expertTag(2, y + 1, 46, spec.experts[e]),
    shown.map(([t, k], place) => drawPlace(left(place), y, view.words[t], place < view.capacity, k === 1, spec.experts[e])),
    range(view.capacity).slice(queue.length).map((place) =>
      h("rect", { x: left(place), y, width: 47, height: 26, rx: 3, class: "slot", "stroke-dasharray": "2 3" })),
    h("path", { d: `M${wall} ${y - 4}v34`, class: "curve" }),
    crowded && label(left(COLUMNS - 1) + 4, y + 18, `${queue.length - shown.length} more`, { size: 12 }),
  ];
}

function draw(view, state, act, spec) {
  const codes = [...new Set(view.languages)];
  return [
    hatching(),
    codes.map((code, row) => [
      label(2, 28 + 52 * row, code, { size: 13, soft: true }),
      range(view.words.length).filter((t) => view.languages[t] === code).map((t, place) =>
        drawWord(42 + 56 * place, 2 + 52 * row, view.words[t], view.expert_index[t], view.kept[t], spec)),
    ]),
    view.queues.map((queue, e) => drawQueue(view, queue, e, 120 + 34 * e, spec)),
    label(54, 408, "solid edge: first choice; dashed edge: second choice; ✕ or hatched: no room", { size: 12, soft: true }),
  ];
}

export const explorer = { compute, draw };
