import { button, colored, expertTag, fixed, h, label, listed, range } from "./kit.js";

function compute(state, data) {
  const sentence = data.sentences[Number(state.sentence)];
  const [layers, tokens] = [sentence.layers[state.model], sentence.tokens];
  const [token, layer] = [Math.min(state.token, tokens.length) - 1, state.layer - 1];
  const firsts = layers.map((choices) => choices.experts.map((pair) => pair[0]));
  const path = firsts.map((choices) => choices[token]);
  const twins = range(tokens.length).filter((place) => tokens[place] === tokens[token] && place !== token);
  const parts = 1 + firsts.findIndex((choices) => twins.some((twin) => choices[twin] !== choices[token]));
  const groups = range(data.experts).map((e) => range(tokens.length).filter((t) => firsts[layer][t] === e));
  const sizes = groups.map((group) => group.length);
  const busiest = sizes.indexOf(Math.max(...sizes));
  return {
    shown: { token: tokens[token] },
    token, path, twins, parts, groups,
    sentence: `In layers 1 to 4, the first choices of “${tokens[token]}” are experts ${listed(path.map(String))}.` +
      (twins.length === 0 ? "" : parts ? ` The same token also occurs elsewhere, and first chooses differently in layer ${parts}.`
        : " The same token also occurs elsewhere, and chooses the same experts.") +
      ` In layer ${layer + 1}, expert ${busiest} is the first choice of ${sizes[busiest]} of ${tokens.length} tokens.`,
    met: [
      state.model === "trained" && parts === 4,
      state.model === "untrained" && parts === 1,
      state.model === "trained" && 2 * sizes[busiest] >= tokens.length,
    ],
  };
}

// Lines of at most `room` letters; a wide letter, as in Chinese, counts twice.
function wrapped(words, room) {
  const width = (text) => [...text].reduce((sum, letter) => sum + (letter.codePointAt(0) > 0x2e80 ? 2 : 1), 0);
  const lines = [""];
  for (const word of words) {
    const line = lines.pop();
    const longer = line ? `${line}, ${word}` : word;
    lines.push(...(line && width(longer) > room ? [`${line},`, word] : [longer]));
  }
  return lines;
}

function draw(view, state, act, spec) {
  const sentence = spec.data.sentences[Number(state.sentence)];
  const layers = sentence.layers[state.model];
  const [top, pitch, left, width, panel] = [34, 29, 128, 84, 516];
  const column = (l) => left + l * (width + 8);
  const half = (l, t, k) => {
    const [expert, gate] = [layers[l].experts[t][k], layers[l].gates[t][k] / 100];
    const style = spec.experts[expert];
    const x = column(l) + (k ? width * (1 - gate) : 0);
    return gate >= 0.02 && h("g", {},
      colored({ x, y: top + t * pitch + 3, width: width * gate, height: 22 }, style, k),
      gate >= 0.14 && label(x + (width * gate) / 2, top + t * pitch + 19, gate > 0.36 ? style.label : style.label[0],
        { anchor: "middle", size: 12, weight: k ? 400 : 600, fill: style.ink }));
  };
  return [
    h("rect", { x: column(state.layer - 1) - 4, y: 2, width: width + 8, height: top + sentence.tokens.length * pitch, rx: 5, class: "line" }),
    range(4).map((l) => button({ x: column(l), y: 6, width, height: 24, name: `layer ${l + 1}`, pressed: l === state.layer - 1,
      onPress: () => act.set({ layer: l + 1 }) },
    label(column(l) + width / 2, 23, `layer ${l + 1}`, { anchor: "middle", weight: l === state.layer - 1 ? 600 : 400 }))),
    sentence.tokens.map((text, t) => {
      const y = top + t * pitch;
      const way = range(4).map((l) => `${layers[l].experts[t][0]} with gate ${fixed(layers[l].gates[t][0] / 100)}`).join(", ");
      return button({ x: 2, y: y - 1, width: column(3) + width + 6, height: pitch + 1, pressed: t === view.token,
        name: `${text}: first choices ${way}`, onPress: () => act.set({ token: t + 1 }) },
      h("g", { transform: `translate(6,${y + 1}) scale(1,0.87)` },
        h("rect", { width: 112, height: 30, rx: 6, class: "chip", })),
      label(14, y + 19, text, { size: 13, weight: t === view.token ? 600 : 400 }),
      view.twins.includes(t) && label(112, y + 19, "=", { anchor: "end", size: 13, weight: 600 }),
      range(4).map((l) => [half(l, t, 0), half(l, t, 1)]),
      t === view.token && h("rect", { x: 3, y: y, width: column(3) + width + 3, height: pitch - 1, rx: 6, class: "curve" }));
    }),
    label(panel, 23, `first choices in layer ${state.layer}`, { weight: 600, size: 13 }),
    view.groups.map((group, e) => {
      const y = top + 3 + e * 43.5;
      const lines = wrapped(group.map((t) => sentence.tokens[t]), 20);
      return [
        expertTag(panel, y, 46, spec.experts[e]),
        group.length === 0 && label(panel + 56, y + 17, "no tokens", { soft: true, size: 12 }),
        group.length > 0 && lines.slice(0, 2).map((line, i) =>
          label(panel + 56, y + (lines.length > 1 ? 9 : 17) + 15 * i, i === 1 && lines.length > 2 ? `${line} …` : line, { size: 12 })),
      ];
    }),
    label(2, 412, "bar: gates of first and second (dashed) choice; =: same token; ▁: space before", { size: 12, soft: true }),
    label(panel, 412, "each layer has its own experts", { size: 12, soft: true }),
  ];
}

export const explorer = { compute, draw };
