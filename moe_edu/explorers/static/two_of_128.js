import { argmax, chip, choiceFrame, count, expertTag, fixed, h, label, listed, range, softmax, sum, zeros } from "./kit.js";

// moe_edu.top2_gating without a limit on capacity.
function routeTopTwo(logits) {
  const first = argmax(logits);
  const second = argmax(logits.map((logit, e) => (e === first ? -Infinity : logit)));
  return { chosen: [first, second], gates: softmax([logits[first], logits[second]]) };
}

function compute(state, data) {
  const E = state.experts;
  const routed = data.logits.map((row) => routeTopTwo(row.slice(0, E).map((logit, e) => logit + (e === 1 ? state.push : 0))));
  const gates = zeros(routed.length, E);
  routed.forEach((word, t) => word.chosen.forEach((e, k) => { gates[t][e] = word.gates[k]; }));
  const published = state.code === "published";
  const weights = published ? zeros(routed.length, E) : gates;
  const rows = Array(E).fill(0);
  routed.forEach((word, t) => range(E).forEach((slot) => {
    if (published) {
      // The mask of first choices, 0 or 1, is read as an expert's number.
      const expert = word.chosen[0] === slot ? 1 : 0;
      weights[t][expert] += gates[t][slot];
      rows[expert] += 1;
    } else if (gates[t][slot] > 0) rows[slot] += 1;
  }));
  const errors = weights.map((row, t) =>
    Math.abs(sum(row.map((weight, e) => (weight - gates[t][e]) * data.answers[t][state.copies ? 0 : e]))));
  const wrong = errors.filter((error) => error > 1e-6).length;
  const chosen = range(E).filter((e) => routed.some((word) => word.chosen.includes(e)));
  const ran = range(E).filter((e) => rows[e]);
  const tests = [true, true, true, true, `${chosen}` === `${ran}`, wrong === 0];
  const work = published ? `Experts 0 and 1 ran, on ${rows[0]} and ${rows[1]} rows` : `They ran on ${sum(rows)} rows`;
  const outcome = wrong ? `${wrong} of ${data.words.length} words ${wrong === 1 ? "is" : "are"} wrong`
    : `every word is right${published ? " anyway" : ""}`;
  return {
    chosen: routed.map((word) => word.chosen), gates: routed.map((word) => word.gates), weights, rows, errors, tests,
    sentence: `The router chose ${count(chosen.length, "expert")}: ${listed(chosen.map(String))}. ${work}: ${outcome}.`,
    met: [
      published && !state.copies && wrong === 0,
      published && tests[4] && wrong > 0,
      published && wrong === 0 && !tests[4],
    ],
  };
}

function draw(view, state, act, spec) {
  const { words, languages, tests } = spec.data;
  const E = state.experts;
  const [left, top, pitch, height] = [120, 34, 34, 28];
  const step = Math.min(56, 432 / E);
  const width = step - 4;
  const bottom = top + words.length * pitch;
  const bar = (error) => Math.min(100, 50 * error);
  return [
    range(E).map((e) => expertTag(left + e * step, 4, width, E > 10 ? { ...spec.experts[e], label: `${e}` } : spec.experts[e])),
    label(580, 22, "wrong by", { soft: true }),
    words.map((word, t) => chip(2, top + t * pitch - 1, 104, word, { language: languages[t] })),
    words.map((_, t) => range(E).map((e) => {
      const x = left + e * step;
      const y = top + t * pitch;
      const rank = view.chosen[t].indexOf(e);
      return h("g", {},
        h("rect", { x, y, width, height, class: "cell zero" }),
        rank >= 0 && choiceFrame(x + 2, y + 2, width - 4, height - 4, spec.experts[e], rank === 1),
        view.weights[t][e] > 0.005 && h("circle", {
          cx: x + width / 2, cy: y + height / 2, r: (2 + 6 * Math.sqrt(view.weights[t][e])).toFixed(2),
          fill: spec.experts[e].color, class: "tag", "stroke-width": 1.5,
        }));
    })),
    words.map((_, t) => h("g", {},
      h("rect", { x: 580, y: top + t * pitch + 4, width: bar(view.errors[t]), height: 20, class: "cell", "fill-opacity": 0.55 }),
      label(586 + bar(view.errors[t]), top + t * pitch + 19, view.errors[t] > 1e-6 ? fixed(view.errors[t]) : "0", { mono: true, size: 12 }))),
    label(112, bottom + 18, "rows run", { size: 12, anchor: "end", soft: true }),
    range(E).map((e) => label(left + e * step + width / 2, bottom + 18, `${view.rows[e]}`, { anchor: "middle", mono: true, size: 13 })),
    label(2, bottom + 58, "Which tests pass?", { weight: 600 }),
    label(left, bottom + 35, "solid: first choice, dashed: second; disc: the expert ran, larger for a larger weight", { size: 12, soft: true }),
    tests.map((name, i) => {
      const [x, y] = [2 + (i % 2) * 360, bottom + 84 + Math.floor(i / 2) * 25];
      return h("g", {},
        label(x, y, view.tests[i] ? "✓" : "✗", { weight: 700, size: 16 }),
        label(x + 22, y, `${name}${view.tests[i] ? "" : ": fails"}`, { weight: view.tests[i] ? undefined : 700 }));
    }),
  ];
}

export const explorer = { compute, draw };
