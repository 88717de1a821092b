import { argmax, cell, chip, choiceFrame, expertTag, fixed, h, label, range, sum, zeros } from "./kit.js";

// Rounded after each step, so that Python, whose exp differs in the last digit, follows exactly the same path.
const rounded = (value) => Math.round(value * 1e8) / 1e8;
const dot = (a, b) => sum(a.map((value, i) => value * b[i]));

// One measurement and one step down the gradient, as in moe_edu/explorers/router_training.py. Changes `router` and `vectors`.
function step(x, router, vectors, balanceWeight, zWeight, rate) {
  const [T, E] = [x.length, router.length];
  const words = x.map((row) => {
    const logits = router.map((weights) => dot(row, weights));
    const top = Math.max(...logits);
    const exps = logits.map((logit) => Math.exp(logit - top));
    const total = sum(exps);
    const probs = exps.map((value) => value / total);
    const expert = argmax(probs);
    return { row, probs, expert, logZ: top + Math.log(total), miss: vectors[expert].map((v, d) => probs[expert] * v - row[d]) };
  });
  const load = range(E).map((e) => words.filter((word) => word.expert === e).length / T);
  const measured = {
    expert: words.map((word) => word.expert), load, probs: words.map((word) => word.probs),
    error: sum(words.map(({ miss }) => dot(miss, miss))) / T,
    balance: E * sum(load.map((f, e) => f * (sum(words.map(({ probs }) => probs[e])) / T))),
    z: sum(words.map(({ logZ }) => logZ * logZ)) / T,
  };
  const toRouter = zeros(E, x[0].length);
  const toVectors = zeros(E, x[0].length);
  for (const { row, probs, expert, logZ, miss } of words) {
    // The load is a count: no gradient flows through it.
    const byProbs = load.map((f, e) => (balanceWeight * E * f) / T + (e === expert ? (2 / T) * dot(miss, vectors[expert]) : 0));
    const mean = dot(byProbs, probs);
    probs.forEach((p, e) => {
      const byLogit = p * (byProbs[e] - mean) + ((zWeight * 2) / T) * logZ * p;
      row.forEach((value, d) => { toRouter[e][d] += byLogit * value; });
    });
    miss.forEach((value, d) => { toVectors[expert][d] += (2 / T) * probs[expert] * value; });
  }
  for (const [weights, gradient] of [[router, toRouter], [vectors, toVectors]]) {
    gradient.forEach((row, e) => row.forEach((value, d) => { weights[e][d] = rounded(weights[e][d] - rate * value); }));
  }
  return measured;
}

function compute(state, data) {
  const x = data.features.map((features) => [...features, state.shared]);
  const [router, vectors] = structuredClone(data.weights[state.seed - 1]);
  const history = range(data.steps).map(() => step(x, router, vectors, state.balance, state.z, data.rate));
  const last = history[history.length - 1];
  const [E, T] = [router.length, x.length];
  const alive = last.load.filter((share) => share > 0).length;
  const busiest = Math.round(T * Math.max(...last.load));
  const who = alive === 1
    ? `The router has collapsed: all six words go to expert ${last.expert[0]}.`
    : `${alive} of ${E} experts are in use; the busiest has ${busiest} of the six words.`;
  return {
    expert: last.expert, probs: last.probs, load: history.map((at) => at.load), error: history.map((at) => at.error),
    balance: history.map((at) => at.balance), z: history.map((at) => at.z), alive,
    sentence: `${who} At step ${data.steps}, the error is ${fixed(last.error)}, the balancing loss ` +
      `${fixed(last.balance)} and the z-loss ${fixed(last.z)}.`,
    met: [state.shared >= 1 && alive === E, state.balance === 0 && alive >= 2, last.z < 0.2 && alive === E],
  };
}

const CHART = { x: 372, width: 280 };
const EVERY = 3; // steps between two points of a curve

function draw(view, state, act, spec) {
  const { words, languages, steps } = spec.data;
  return [
    label(2, 16, "After training: each word's probabilities", { size: 13, weight: 600 }),
    view.probs[0].map((_, e) => expertTag(112 + e * 54, 28, 48, spec.experts[e])),
    words.map((word, t) => {
      const y = 62 + t * 44;
      return [
        chip(2, y, 100, word, { language: languages[t] }),
        view.probs[t].map((probability, e) => [
          cell(112 + e * 54, y, 48, 30, probability, fixed(probability)),
          e === view.expert[t] && choiceFrame(113 + e * 54, y + 1, 46, 28, spec.experts[e]),
        ]),
      ];
    }),
    label(2, 342, "framed: the expert that the word goes to", { size: 12, soft: true }),
    label(CHART.x, 16, "Share of the words, by expert", { size: 13, weight: 600 }),
    shares(view.load, 28, 92, steps, spec.experts),
    curve("Error", view.error, 154, 46, steps),
    curve("Balancing loss", view.balance, 230, 46, steps),
    curve("z-loss", view.z, 306, 46, steps),
    label(CHART.x, 368, "step 1", { size: 11, soft: true }),
    label(CHART.x + CHART.width, 368, `step ${steps}`, { size: 11, soft: true, anchor: "end" }),
  ];
}

const points = (values) => values.flatMap((value, i) => (i % EVERY === 0 || i === values.length - 1 ? [[i, value]] : []));
const across = (i, steps) => CHART.x + (CHART.width * i) / (steps - 1);
const joined = (corners) => corners.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");

// Bands whose heights are the experts' shares, with their names where they end.
function shares(load, y, height, steps, styles) {
  const below = (at, e) => y + height * (1 - sum(at.slice(0, e)));
  const last = load[load.length - 1];
  return [
    label(CHART.x - 5, y + 8, "100 %", { size: 11, anchor: "end", soft: true }),
    label(CHART.x - 5, y + height, "0", { size: 11, anchor: "end", soft: true }),
    last.map((_, e) => {
      const upper = points(load).map(([i, at]) => [across(i, steps), below(at, e + 1)]);
      const lower = points(load).map(([i, at]) => [across(i, steps), below(at, e)]);
      return h("polygon", { points: joined([...upper, ...lower.reverse()]), fill: styles[e].color, class: "tag", "stroke-width": 0.5 });
    }),
    last.map((share, e) => share > 0 &&
      label(CHART.x + CHART.width + 6, (below(last, e) + below(last, e + 1)) / 2 + 4, styles[e].label, { size: 12 })),
  ];
}

// One loss over the steps, from 0 to its largest value, which is written at the axis; its last value is written at the end.
function curve(name, values, y, height, steps) {
  const largest = Math.max(...values);
  const corners = points(values).map(([i, value]) => [across(i, steps), y + height * (1 - value / largest)]);
  const [, end] = corners[corners.length - 1];
  return [
    h("path", { d: `M${CHART.x},${y}V${y + height}H${CHART.x + CHART.width}`, class: "line" }),
    h("polyline", { points: joined(corners), class: "curve" }),
    label(CHART.x, y - 9, name, { size: 13, weight: 600 }),
    label(CHART.x - 5, y + 8, fixed(largest), { size: 11, anchor: "end", soft: true }),
    label(CHART.x - 5, y + height, "0", { size: 11, anchor: "end", soft: true }),
    label(CHART.x + CHART.width + 6, end + 4, fixed(values[values.length - 1]), { size: 12 }),
  ];
}

export const explorer = { compute, draw };
