import { cell, fixed, h, label, percent, range, sum } from "./kit.js";

const amount = (number) => (number >= 1e9 ? `${fixed(number / 1e9, 1)} billion` : `${fixed(number / 1e6, 0)} million`);

const isSparse = (layer, step) => step > 0 && (layer + 1) % step === 0;

// The counts of moe_edu/model/budget.py: [embedding, attention, norms, dense feed-forward, router, experts].
function compute(state, data) {
  const { experts: E, layers, width: D, step } = state;
  const [V, S] = [Number(state.vocab), data.length];
  const sparse = 2 * range(layers).filter((layer) => isSparse(layer, step)).length;
  const dense = 2 * layers - sparse;
  const ffn = 8 * D * D + 5 * D;
  const parameters = (experts) => [
    V * D, 3 * layers * 4 * (D * D + D), (5 * layers + 2) * 2 * D, dense * ffn, sparse * E * D, sparse * experts * ffn,
  ];
  const [stored, active] = [parameters(E), parameters(2)];
  const products = 16 * D * D; // of one feed-forward network, per token
  const work = [
    2 * D * V, layers * (24 * D * D + 12 * S * D), 0, dense * products, 2 * D * E * sparse, sparse * (2 * products + 4 * D),
  ];
  const [total, used] = [sum(stored), sum(active)];
  return {
    stored, active, work, gib: (2 * total) / 2 ** 30, sparse_layers: sparse,
    sentence: sparse
      ? `The model stores ${amount(total)} parameters, ${percent(stored[5] / total, 1)} of them in experts. A source and a target token together use ` +
        `${amount(used)}, ${percent(used / total, 1)}: they visit 2 of ${E} experts in each of ${sparse} layers.`
      : `No layer has experts: a source and a target token together use all of the ${amount(total)} parameters.`,
    met: [total >= 54.45e9 && total < 54.55e9, total >= 20e9 && used < 1e9, stored[0] > total / 2],
  };
}

// The parts of each bar, from left to right: indices into the counts, name, strength of the colour.
const PARTS = [[[5], "experts", 1], [[3], "dense feed-forward", 0.7], [[1], "attention", 0.4], [[0], "embedding", 0.15], [[2, 4], "router and norms", 0]];

function bar(y, values, scale, names) {
  const total = sum(values);
  let x = 0;
  return PARTS.map(([places, name, strength]) => {
    const value = sum(places.map((i) => values[i]));
    const width = (value / scale) * 720;
    const short = percent(value / total);
    const text = [`${names[name] || name} ${short}`, short, ""].find((text) => width > 6.4 * text.length + 14);
    const left = x;
    x += width;
    return width > 0.05 && [
      cell(left, y, width, 28, strength),
      text ? label(left + 8, y + 19, text, { size: 12 }) : null,
    ];
  });
}

function draw(view, state, act, spec) {
  const [left, pitch] = [72, Math.min(26, 648 / state.layers)];
  const row = (y, name) => [
    label(0, y + 21, name, { soft: true, size: 13 }),
    range(state.layers).map((layer) => isSparse(layer, state.step)
      ? range(4).map((i) => cell(left + layer * pitch + 1, y + 8 * i, pitch - 2, 7, 1))
      : cell(left + layer * pitch + 1, y + 8, pitch - 2, 15, 0.7)),
  ];
  const total = sum(view.stored);
  const right = (y, text) => label(720, y, text, { soft: true, size: 13, anchor: "end" });
  return [h("g", { transform: "translate(0,10)" }, // a little space below the controls
    row(0, "encoder"),
    row(42, "decoder"),
    label(left, 94, view.sparse_layers ? `four stripes: a layer with ${state.experts} experts; one block: a dense layer` : "one block: a dense layer",
      { soft: true, size: 12 }),
    label(0, 128, `stored: ${amount(total)} parameters`, { weight: 600 }),
    right(128, `${fixed(view.gib, 1)} GiB in half precision`),
    bar(136, view.stored, total, {}),
    label(0, 196, `used by a source and a target token: ${amount(sum(view.active))}`, { weight: 600 }),
    right(196, "on the same scale"),
    bar(204, view.active, total, {}),
    label(0, 264, `work: ${amount(sum(view.work))} operations`, { weight: 600 }),
    right(264, "for a source and a target token, on its own scale"),
    bar(272, view.work, sum(view.work), { embedding: "output scores" }),
    PARTS.map(([, name, strength], i) => {
      const x = [0, 92, 246, 344, 568][i];
      const also = name === "embedding" ? " (work: output scores)" : "";
      return h("g", {}, cell(x, 326, 16, 16, strength), label(x + 22, 339, `${name}${also}`, { size: 12, soft: true }));
    }))];
}

export const explorer = { compute, draw };
