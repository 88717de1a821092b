import { button, cell, expertTag, fixed, h, label, listed, percent, sum } from "./kit.js";

const TITLES = {
  letters: ["letters", "the encoder that restores masked letters"],
  translator: ["tokens", "the encoder of the translator into English"],
  decoder: ["tokens", "the decoder that writes ten languages"],
};

function compute(state, data) {
  const { codes, names, scripts, trained, untrained } = data[state.model];
  const found = state.trained ? trained : untrained;
  const shares = found.load.map((counts) => counts.map((number) => number / sum(counts)));
  const row = Math.min(state.row, shares.length) - 1;
  const expert = Math.min(state.expert, shares[0].length - 1);
  const share = shares[row][expert];
  const words = found.words[row][expert];
  const [unit, title] = TITLES[state.model];
  return {
    shown: { row: short(names[row]), expert: String(expert) },
    rows: codes, shares, row, expert, words, scripts: scriptsOf(expert, shares, scripts), bits: found.bits,
    sentence: `In ${title} (${state.trained ? "trained" : "untrained"}), the chosen expert tells you ${fixed(found.bits)} bits ` +
      `about the language, above chance. For ${percent(share)} of the ${unit} in ${names[row]}, the first choice is expert ${expert}` +
      (words.length ? `, most often in ${listed(words.map(quoted))}.` : "."),
    met: [state.trained && share >= 0.6, found.bits < 0.1, state.trained && share < 0.0015],
  };
}

// Quotation marks that stay around a word even if it is written from right to left.
const quoted = (word) => `“\u2068${word}\u2069”`;

function scriptsOf(expert, shares, scripts) {
  const parts = new Map();
  shares.forEach((row, g) => parts.set(scripts[g], (parts.get(scripts[g]) || 0) + row[expert]));
  const whole = sum([...parts.values()]);
  return [...parts].sort((a, b) => b[1] - a[1]).map(([script, part]) => [script, whole ? part / whole : 0]);
}

// A name short enough to fit next to the map.
const short = (name) => name.replace(/ \(.*/, "").replace("Modern Standard ", "").replace("Western ", "");

function draw(view, state, act, spec) {
  const { names } = spec.data[state.model];
  const experts = view.shares[0].length;
  const [left, top, height] = [112, 46, 22];
  const width = 416 / experts;
  const side = 552;
  const largest = Math.max(...view.shares.flat());
  const chosen = { x: left + view.expert * width, y: top + view.row * height };
  const bar = (script, part, i) => h("g", {},
    label(side, 252 + i * 36, script, { size: 12 }),
    h("rect", { x: side, y: 258 + i * 36, width: 164 * part, height: 10, class: "cell" }),
    label(side + 164, 252 + i * 36, percent(part), { size: 12, anchor: "end" }));
  // With more than eight experts, there is no room for mark and number side by side.
  const tag = (e) => {
    const [x, style] = [left + e * width + 1, spec.experts[e]];
    const [mark, number] = style.label.split(" ");
    if (experts <= 8) return expertTag(x, 14, width - 2, style, 26);
    return [expertTag(x, 6, width - 2, { ...style, label: "" }, 36),
      [mark, number].map((text, i) => label(x + width / 2 - 1, 21 + 15 * i, text, { size: 12, anchor: "middle", weight: 600, fill: style.ink }))];
  };
  return [
    label(left - 8, 32, "experts", { anchor: "end", soft: true, size: 12 }),
    view.shares[0].map((_, e) => tag(e)),
    names.map((name, g) => label(left - 8, top + g * height + 16, short(name),
      { anchor: "end", size: 13, weight: g === view.row ? 600 : undefined })),
    view.shares.map((row, g) => row.map((share, e) => button({
      x: left + e * width, y: top + g * height, width, height, name: `${names[g]}, expert ${e}: ${percent(share)}`,
      tabindex: -1, pressed: g === view.row && e === view.expert, onPress: () => act.set({ row: g + 1, expert: e }),
    }, cell(left + e * width + 0.5, top + g * height + 0.5, width - 1, height - 1, share / largest, undefined),
    share >= 0.1 && label(left + (e + 0.5) * width, top + g * height + 15, (100 * share).toFixed(0), { anchor: "middle", size: 11, mono: true })))),
    h("rect", { x: chosen.x, y: chosen.y, width, height, rx: 2, class: "curve", style: "stroke-width: 2.5" }),
    label(left, spec.height - 4, `% of the language's tokens, by first choice; number shown from 10 %; dotted: none; darkest blue: ${percent(largest)}`, { size: 12, soft: true }),
    label(side, 46, short(names[view.row]), { weight: 600 }),
    label(side, 64, `${percent(view.shares[view.row][view.expert], 1)} to expert ${view.expert}`, { size: 13 }),
    label(side, 90, "most often in", { size: 12, soft: true }),
    view.words.length ? view.words.map((word, i) => label(side, 112 + i * 22, word.length > 18 ? `${word.slice(0, 17)}…` : word, { size: 14 }))
      : label(side, 112, "no tokens", { soft: true }),
    label(side, 208, `Scripts at expert ${view.expert}`, { weight: 600, size: 13 }),
    label(side, 226, "largest shares first", { size: 12, soft: true }),
    view.scripts.slice(0, 4).map(([script, part], i) => bar(script, part, i)),
  ];
}

export const explorer = { compute, draw };
