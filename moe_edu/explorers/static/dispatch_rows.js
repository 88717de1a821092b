import { argmax, button, chip, colored, count, expertTag, fixed, h, hatching, label, listed, range, sum } from "./kit.js";

// The arithmetic of moe_edu.moe.dispatch.plan_dispatch: kept choices sorted by expert, then the others.
function compute(state, data) {
  const E = data.num_experts;
  const kept = data.position.map((pair) => pair.map((position) => position < state.capacity));
  const gates = data.probs.map((pair, t) => {
    const total = sum(pair.filter((_, k) => kept[t][k]));
    return pair.map((p, k) => (kept[t][k] ? p / total : 0));
  });
  const choices = range(2 * data.words.length).map((n) => [Math.floor(n / 2), n % 2]);
  const expertOf = ([t, k]) => (kept[t][k] ? data.expert[t][k] : E);
  const order = range(choices.length).sort((a, b) => expertOf(choices[a]) - expertOf(choices[b]) || a - b);
  const row = data.words.map((_, t) => [order.indexOf(2 * t), order.indexOf(2 * t + 1)]);
  const counts = range(E).map((e) => choices.filter((choice) => expertOf(choice) === e).length);
  const starts = range(E).map((e) => sum(counts.slice(0, e)));
  const slot = row.map((pair, t) => pair.map((r, k) => (kept[t][k] ? r - starts[data.expert[t][k]] : -1)));

  const t = data.words.indexOf(state.word);
  const mine = range(2).filter((k) => kept[t][k]);
  const apart = row.map(([a, b], i) => (kept[i][0] && kept[i][1] ? Math.abs(a - b) : 0));
  const homeless = choices.length - sum(counts);
  return {
    kept, gates, order, row, slot, counts,
    shown: { capacity: count(state.capacity, "slot") },
    sentence: sentence(state, data, { t, mine, row, counts, gates, homeless }),
    met: [
      homeless === 1,
      state.step === 5 && mine.length === 1,
      state.step >= 2 && apart[t] > 0 && apart[t] === apart[argmax(apart)],
    ],
  };
}

function sentence(state, data, { t, mine, row, counts, gates, homeless }) {
  const word = `“${state.word}”`;
  const experts = mine.map((k) => `${data.expert[t][k]}`);
  const plural = mine.length > 1 ? "s" : "";
  if (state.step === 1) {
    return `${word} chooses expert ${data.expert[t][0]} first and expert ${data.expert[t][1]} second: one word makes two rows.`;
  }
  if (state.step === 2) {
    const where = mine.length ? `is in row${plural} ${listed(mine.map((k) => row[t][k]).sort((a, b) => a - b).map(String))}` : "has no row left";
    const ending = homeless ? ` ${count(homeless, "choice")} found no room and come${homeless === 1 ? "s" : ""} last.` : "";
    return `After sorting by expert, ${word} ${where}.${ending}`;
  }
  if (state.step === 3) {
    const slots = data.num_experts * state.capacity;
    return `The experts multiply ${listed(counts.map(String))} rows, one block each; ${slots - sum(counts)} of ${slots} slots stay empty.`;
  }
  if (state.step === 4) {
    if (!mine.length) return `Every row returns to the word it came from. Nothing returns to ${word}.`;
    return `Every row returns to the word it came from: ${word} gets the output${plural} of expert${plural} ${listed(experts)}.`;
  }
  if (!mine.length) return `No expert took ${word}: its output is zero, and the residual connection carries it past the layer.`;
  return `${word} becomes ${mine.map((k, i) => `${fixed(gates[t][k])} × expert ${experts[i]}`).join(" + ")}.`;
}

const TOP = 34;
const WORD = { x: 2, width: 92, pitch: 56 };
const ROW = { x: 138, width: 92, pitch: 28 };
const EXPERT = { x: 270, width: 158, pitch: 84 };
const HOME = { x: 468, width: 96 };
const MIXED = { x: 602, width: 116 };
const FAINT = 0.5; // opacity of words that are not followed

const wordY = (t) => TOP + t * WORD.pitch + 12;
const rowY = (r) => TOP + r * ROW.pitch + 2;
const slotBox = (e, s) => ({ x: EXPERT.x + 2 + (s % 3) * 52, y: TOP + e * EXPERT.pitch + 30 + Math.floor(s / 3) * 22, width: 50, height: 20 });
const homeY = (t, k) => TOP + t * WORD.pitch + 2 + k * 28;

// A line between two columns: solid for a first choice, dashed for a second; strong if the word is followed.
const path = (x1, y1, x2, y2, second, followed) =>
  h("path", {
    d: `M${x1},${y1}C${(x1 + x2) / 2},${y1} ${(x1 + x2) / 2},${y2} ${x2},${y2}`, class: "curve",
    "stroke-dasharray": second ? "5 4" : null, "stroke-opacity": followed ? 1 : FAINT, "stroke-width": followed ? 2.5 : 1.2,
  });

// A small box on an expert's colour, framed if its word is followed.
const block = ({ x, y, width, height }, text, style, second, followed) =>
  h("g", {},
    colored({ x, y, width, height, rx: 3 }, style, second),
    followed && h("rect", { x: x - 1, y: y - 1, width: width + 2, height: height + 2, rx: 4, class: "curve", "stroke-dasharray": second ? "7 4" : null }),
    label(x + width / 2, y + height / 2 + 4.5, text, { size: 12, anchor: "middle", fill: style.ink }));

// A choice without room: hatched at its end, so that its text stays easy to read.
const hatched = ({ x, y, width, height }, text, followed) =>
  h("g", {},
    h("rect", { x: x + width - 26, y, width: 26, height, class: "dropped", "stroke-opacity": 0 }),
    h("rect", { x, y, width, height, rx: 3, class: followed ? "curve" : "chip" }),
    label(x + 8, y + height / 2 + 4.5, text, { size: 12 }));

function draw(view, state, act, spec) {
  const { words, languages, expert } = spec.data;
  const style = (t, k) => spec.experts[expert[t][k]];
  const followed = (t) => words[t] === state.word;
  const pairs = words.flatMap((_, t) => [[t, 0], [t, 1]]).sort(([a], [b]) => followed(a) - followed(b)); // the followed word on top
  const from = (step, nodes) => state.step >= step && nodes();
  const titles = [["1 · words", WORD.x], ["2 · sorted rows", ROW.x], ["3 · experts", EXPERT.x], ["4 · back", HOME.x], ["5 · mixed", MIXED.x]];
  return [
    hatching(),
    titles.map(([text, x], i) => label(x, 18, text, { size: 13, weight: i + 1 === state.step ? 700 : undefined, soft: i + 1 > state.step })),
    from(2, () => pairs.map(([t, k]) =>
      path(WORD.x + WORD.width, wordY(t) + 15, ROW.x - 20, rowY(view.row[t][k]) + 12, k, followed(t)))),
    from(3, () => pairs.map(([t, k]) => {
      const box = view.kept[t][k] && slotBox(expert[t][k], view.slot[t][k]);
      return box && path(ROW.x + ROW.width, rowY(view.row[t][k]) + 12, EXPERT.x - 1, box.y + 10, k, followed(t));
    })),
    from(4, () => pairs.map(([t, k]) => {
      const box = view.kept[t][k] && slotBox(expert[t][k], view.slot[t][k]);
      return box && path(EXPERT.x + EXPERT.width + 1, box.y + 10, HOME.x - 1, homeY(t, k) + 11, k, followed(t));
    })),
    from(5, () => pairs.map(([t, k]) => view.kept[t][k] &&
      path(HOME.x + HOME.width, homeY(t, k) + 11, MIXED.x - 1, wordY(t) + 15, k, followed(t)))),
    words.map((word, t) => button({
      x: WORD.x, y: wordY(t), width: WORD.width, height: 30, name: `follow ${word}`, pressed: followed(t),
      onPress: () => act.set({ word }),
    }, chip(WORD.x, wordY(t), WORD.width, word, { language: languages[t] }),
    followed(t) && h("rect", { x: WORD.x, y: wordY(t), width: WORD.width, height: 30, rx: 6, class: "curve" }))),
    view.order.map((n, r) => {
      const [t, k] = [Math.floor(n / 2), n % 2];
      const box = { x: ROW.x, y: rowY(r), width: ROW.width, height: 24 };
      if (state.step < 2) return h("rect", { ...box, rx: 3, class: "chip padding" });
      return [
        label(ROW.x - 5, box.y + 16, r, { size: 11, anchor: "end", soft: true }),
        view.kept[t][k] ? block(box, words[t], style(t, k), k, followed(t)) : hatched(box, words[t], followed(t)),
      ];
    }),
    view.counts.map((_, e) => [
      state.step >= 3 && h("rect", { x: EXPERT.x, y: TOP + e * EXPERT.pitch, width: EXPERT.width, height: 76, rx: 4, class: "chip" }),
      expertTag(EXPERT.x + 2, TOP + e * EXPERT.pitch + 2, EXPERT.width - 4, spec.experts[e]),
      range(state.capacity).map((s) => h("rect", { ...slotBox(e, s), rx: 3, class: state.step < 3 ? "chip padding" : "slot" })),
    ]),
    from(3, () => pairs.map(([t, k]) => view.kept[t][k] &&
      block(slotBox(expert[t][k], view.slot[t][k]), words[t], style(t, k), k, followed(t)))),
    words.map((word, t) => range(2).map((k) => {
      const box = { x: HOME.x, y: homeY(t, k), width: HOME.width, height: 22 };
      if (state.step < 4) return h("rect", { ...box, rx: 3, class: "chip padding" });
      if (!view.kept[t][k]) return hatched(box, "no room", followed(t));
      return block(box, `${style(t, k).label} for ${word}`, style(t, k), k, followed(t));
    })),
    words.map((word, t) => mixed(view, t, word, state.step >= 5, followed(t), (k) => style(t, k))),
  ];
}

// A word's output: a bar divided by its two gates.
function mixed(view, t, word, shown, followed, style) {
  const box = { x: MIXED.x, y: wordY(t), width: MIXED.width, height: 30 };
  if (!shown) return h("rect", { ...box, rx: 6, class: "chip padding" });
  if (!view.kept[t][0] && !view.kept[t][1]) return hatched(box, `${word}: dropped`, followed);
  return [
    view.gates[t].map((gate, k) => gate > 0 && [
      colored({ x: box.x + (k ? box.width * view.gates[t][0] : 0), y: box.y, width: box.width * gate, height: 30 }, style(k), k),
      gate > 0.25 && label(box.x + box.width * (k ? view.gates[t][0] + gate / 2 : gate / 2), box.y + 20, fixed(gate),
        { size: 12, anchor: "middle", fill: style(k).ink }),
    ]),
    followed && h("rect", { x: box.x - 1, y: box.y - 1, width: box.width + 2, height: 32, rx: 3, class: "curve" }),
  ];
}

export const explorer = { compute, draw };
