import { cell, chip, colored, expertTag, fixed, h, handle, label, softmax } from "./kit.js";

// moe_edu.top2_gating for one word and two experts.
function compute(state) {
  const [scores] = state.scores;
  const gates = softmax(scores);
  const first = scores[1] > scores[0] ? 1 : 0;
  const word = state.word || "…";
  const quoted = `“\u2068${word}\u2069”`;
  const same = scores[0] === scores[1];
  return {
    word, chosen: [first, 1 - first], gates,
    sentence: same
      ? `Expert 0 and expert 1 count the same for ${quoted}: ${fixed(gates[0])} each.`
      : `For ${quoted}, expert ${first} is the first choice, with gate ${fixed(gates[first])}; expert ${1 - first} is the second, with gate ${fixed(gates[1 - first])}.`,
    met: [first === 1, same, gates[0] >= 0.985 && scores[0] <= 1], // what is shown as 0.99
  };
}

// A line as wide as its gate, edged so that its colour shows on any page; the second choice is dashed.
const way = (d, gate, style, second) => [
  h("path", { d, fill: "none", stroke: "currentColor", "stroke-opacity": 0.75, "stroke-width": 4 + 14 * gate,
    "stroke-dasharray": second ? "12 8" : null, "stroke-dashoffset": 1 }),
  h("path", { d, fill: "none", stroke: style.color, "stroke-width": 2 + 14 * gate, "stroke-dasharray": second ? "10 10" : null }),
];

function draw(view, state, act, spec) {
  const [scores] = state.scores;
  const moved = (e, value) => [scores.map((old, i) => (i === e ? value : old))];
  const top = (e) => 28 + 92 * e;
  const ways = (e) => [`M 190 91 C 235 91 225 ${top(e) + 20} 270 ${top(e) + 20}`, `M 370 ${top(e) + 20} L 470 ${top(e) + 20}`]
    .map((d) => way(d, view.gates[e], spec.experts[e], view.chosen[1] === e));
  const expert = (e) => {
    const y = top(e);
    return [
      handle({
        x: 270, y, width: 100, height: 40, name: `score of expert ${e}`, value: scores[e], low: -4, high: 4, step: 0.1,
        text: `${fixed(scores[e], 1)}, gate ${fixed(view.gates[e])}`,
        onChange: (value) => act.set({ scores: moved(e, value) }),
      },
      cell(270, y, 100, 40, view.gates[e]),
      label(320, y + 27, fixed(scores[e], 1), { anchor: "middle", mono: true, size: 20 })),
      expertTag(470, y, 90, spec.experts[e], 40),
      label(574, y + 18, `gate ${fixed(view.gates[e])}`, { weight: 600 }),
      label(574, y + 36, view.chosen[1] === e ? "second choice, dashed" : "first choice, solid", { soft: true, size: 12 }),
    ];
  };
  const share = 720 * view.gates[0];
  return [
    label(320, 16, "scores: drag them", { anchor: "middle", soft: true, size: 12 }),
    chip(0, 76, 190, view.word),
    [view.chosen[1], view.chosen[0]].map(ways), // the first choice on top
    [0, 1].map(expert), // always in this order: a handle keeps pointer and focus when the choices change places
    [0, 1].map((e) => colored({ x: e ? share : 0, y: 192, width: 720 * view.gates[e], height: 20 }, spec.experts[e], view.chosen[1] === e)),
    [0, 1].map((e) => {
      const text = `${fixed(view.gates[e])}${view.gates[e] > 0.34 ? ` × the output of expert ${e}` : ""}`;
      const middle = e ? (share + 720) / 2 : share / 2;
      return view.gates[e] > 0.06 && label(middle, 207, text, { anchor: "middle", size: 13, fill: spec.experts[e].ink });
    }),
    label(0, 230, "the two gates always add up to 1", { soft: true, size: 12 }),
  ];
}

export const explorer = { compute, draw };
