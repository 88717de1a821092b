import { argmax, cell, chip, choiceFrame, colored, count, expertTag, fixed, h, handle, label, listed, softmax, sum } from "./kit.js";

// The arithmetic of moe_edu.top2_gating without a capacity. `data.gumbel[draw]` is `[T, E]`, `data.uniform[draw]` `[T]`.
export function routeWord(logits, choices, policy, gumbel, uniform) {
  const probs = softmax(logits);
  const first = argmax(probs);
  if (choices === 1) return { probs, chosen: [first, -1], gates: [1, 0] };
  const scores = logits.map((logit, e) => (e === first ? -Infinity : logit + (policy === "sampling" ? gumbel[e] : 0)));
  const second = argmax(scores);
  if (policy === "random" && !(2 * probs[second] > uniform)) return { probs, chosen: [first, -1], gates: [1, 0] };
  const both = probs[first] + probs[second];
  return { probs, chosen: [first, second], gates: [probs[first] / both, probs[second] / both] };
}

function compute(state, data) {
  const routed = state.logits.map((logits, t) =>
    routeWord(logits.map((logit) => logit / state.temperature), Number(state.choices), state.policy,
      data.gumbel[state.draw - 1][t], data.uniform[state.draw - 1][t]));
  const chosen = routed.map((word) => word.chosen);
  const load = state.logits[0].map((_, e) => sum(chosen.map((pair) => pair.filter((choice) => choice === e).length)));
  const gates = routed.map((word) => word.gates);
  const surest = argmax(gates.map((pair, t) => Math.max(...routed[t].probs)));
  const idle = load.flatMap((n, e) => (n === 0 ? [`${e}`] : []));
  const [cat, chat] = [data.words.indexOf("cat"), data.words.indexOf("chat")];
  const alone = chosen.filter((pair) => pair[1] < 0).length;
  const top = Math.max(...routed[surest].probs);
  return {
    probs: routed.map((word) => word.probs), chosen, gates, load,
    sentence: `The router is most confident about “${data.words[surest]}”: expert ${chosen[surest][0]} has probability ${fixed(top)}. ` +
      (idle.length ? `No word chooses expert${idle.length > 1 ? "s" : ""} ${listed(idle)}.` : "Every expert is chosen by some word.") +
      (Number(state.choices) === 2 && alone ? ` ${count(alone, "word")} ${alone === 1 ? "has" : "have"} no second expert.` : ""),
    met: [
      chosen[cat][0] !== chosen[chat][0],
      Math.max(...state.logits.flat()) <= 2.5 && top >= 0.95,
      state.policy === "random" && Number(state.choices) === 2 && alone >= 4,
    ],
  };
}

function draw(view, state, act, spec) {
  const { words, languages } = spec.data;
  const [left, top, width, height, pitch] = [120, 36, 84, 36, 44];
  const place = (t, e) => ({ x: left + e * (width + 8), y: top + t * pitch, width, height });
  const moved = (t, e, value) => state.logits.map((row, i) => row.map((old, j) => (i === t && j === e ? value : old)));
  return [
    label(106, 22, "experts", { anchor: "end", soft: true }),
    view.load.map((_, e) => expertTag(place(0, e).x, 4, width, spec.experts[e])),
    label(504, 22, "gates", { soft: true }),
    words.map((word, t) => chip(2, top + t * pitch + 3, 104, word, { language: languages[t] })),
    words.map((word, t) => view.probs[t].map((probability, e) => {
      const box = place(t, e);
      const rank = view.chosen[t].indexOf(e);
      return handle({
        ...box, name: `logit of “${word}” for expert ${e}`, value: state.logits[t][e], low: -3, high: 5, step: 0.1,
        text: `${fixed(state.logits[t][e], 1)}, probability ${fixed(probability)}`,
        onChange: (value) => act.set({ logits: moved(t, e, value) }),
      },
      cell(box.x, box.y, width, height, probability),
      rank >= 0 && choiceFrame(box.x + 2, box.y + 2, width - 4, height - 4, spec.experts[e], rank === 1),
      label(box.x + 12, box.y + 23, fixed(state.logits[t][e], 1), { mono: true }),
      label(box.x + width - 8, box.y + 22, fixed(probability), { mono: true, size: 11, anchor: "end" }));
    })),
    words.map((_, t) => view.chosen[t].map((e, k) => e >= 0 && view.gates[t][k] > 0.005 && h("g", {},
      colored({ x: 504 + (k ? 200 * view.gates[t][0] : 0), y: top + t * pitch + 6, width: 200 * view.gates[t][k], height: 24 },
        spec.experts[e], k),
      view.gates[t][k] > 0.14 && label(504 + 200 * (k ? view.gates[t][0] + view.gates[t][1] / 2 : view.gates[t][0] / 2), top + t * pitch + 23,
        fixed(view.gates[t][k]), { anchor: "middle", size: 12, fill: spec.experts[e].ink })))),
    label(left, top + words.length * pitch + 16, "large: logit (drag it, or use the arrow keys); small: probability", { size: 12, soft: true }),
    label(504, top + words.length * pitch + 16, "solid: first choice, dashed: second", { size: 12, soft: true }),
  ];
}

export const explorer = { compute, draw };
