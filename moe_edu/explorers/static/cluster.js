import { count, fixed, h, label, range } from "./kit.js";

// The arithmetic of moe_edu.analysis.traffic.
function compute(state, data) {
  const [experts, devices, bytes] = [Number(state.experts), Number(state.devices), Number(state.precision)];
  const replicas = Math.max(Math.floor(devices / experts), 1);
  const each = Math.max(Math.floor(experts / devices), 1);
  const groupSize = devices / replicas;
  const capacity = Math.ceil(state.factor * data.choices * Math.ceil(state.tokens / experts));
  const message = each * capacity * data.d_model * bytes;
  const others = groupSize - 1;
  const inside = (Math.min(data.devices_per_node, groupSize) - 1) * message;
  const between = others * message - inside;
  const step = 4 * others * message * data.sparse_layers;
  const expertBytes = (2 * data.d_model * data.ffn_dim + data.ffn_dim + data.d_model) * bytes;
  const sender = state.sender % devices;
  const first = Math.floor(sender / groupSize) * groupSize;
  const place = sender % groupSize;
  const copies = range(replicas).map((group) => place + group * groupSize).filter((device) => device !== sender);
  const text = `GPU ${sender} sends ${capacity * each} slots (${size(message)}) to each of ${count(others, "other GPU")}: ` +
    `${size(inside + between)} in one all-to-all, ${size(between)} of it to other nodes. ` +
    `With four per layer and ${data.sparse_layers} sparse layers, that is ${size(step)} per step.`;
  const more = copies.length
    ? ` ${count(copies.length, "more GPU")} ${copies.length === 1 ? "holds" : "hold"} the same expert; their gradients must be averaged.`
    : "";
  return {
    shown: { sender: String(sender) },
    sender, holds: [place * each, place * each + each - 1], copies, group: [first, first + others], capacity,
    message, inside, between, step, weights: each * expertBytes, all_weights: experts * expertBytes,
    sentence: text + more,
    met: [replicas === 4, between === 0 && devices >= 64, experts >= 128 && step < 0.5e9],
  };
}

export function size(number) {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (number >= scale) return `${fixed(number / scale, number < 10 * scale ? 2 : 1)} ${unit}`;
  }
  return `${number} B`;
}

const inset = (x, y, edge, by) => ({ x: x + by, y: y + by, width: edge - 2 * by, height: edge - 2 * by });

function draw(view, state, act, spec) {
  const perNode = spec.data.devices_per_node;
  const devices = Number(state.devices);
  const nodes = devices / perNode;
  const [left, top] = [64, 34];
  const pitch = Math.min(640 / nodes, 19);
  const node = (device) => Math.floor(device / perNode);
  const at = (device) => ({ x: left + node(device) * pitch, y: top + (device % perNode) * pitch });
  const kind = (device) => {
    if (device === view.sender) return "sender";
    if (view.copies.includes(device)) return "copy";
    if (device < view.group[0] || device > view.group[1]) return "none";
    return node(device) === node(view.sender) ? "near" : "far";
  };
  const square = (x, y, edge, what, onclick) => h("g", { class: onclick ? "press" : null, onclick, "pointer-events": "all" },
    h("rect", {
      ...inset(x, y, edge, what === "none" ? 2 : 0), class: what === "none" || what === "copy" ? "cell zero" : "cell",
      "fill-opacity": { sender: 0, near: 0.35, far: 0.9 }[what],
      style: what === "sender" ? "fill: var(--moe-ink); fill-opacity: 1" : null,
    }),
    what === "copy" && h("rect", { ...inset(x, y, edge, 1), class: "curve" }));
  const legend = [["sender", "sends", 0], ["near", "same node", 90], ["far", "other node", 200], ["copy", "same experts", 318], ["none", "no tokens", 446]];
  const below = top + perNode * pitch + 14;
  const most = Math.max(view.inside + view.between, 1);
  const bar = (row, name, value, strength) => h("g", {},
    label(0, below + row * 26 + 15, name),
    h("rect", { x: 200, y: below + row * 26, width: Math.max((360 * value) / most, 0), height: 20, class: "cell", "fill-opacity": strength }),
    label(208 + (360 * value) / most, below + row * 26 + 15, size(value)));
  return [
    legend.map(([what, text, x]) => h("g", {}, square(left + x, 6, 14, what), label(left + x + 20, 18, text, { size: 12, soft: true }))),
    label(0, top + 14, nodes === 1 ? "1 node" : "nodes →", { size: 12, soft: true }),
    range(devices).map((device) => square(at(device).x, at(device).y, pitch - 2, kind(device), () => act.set({ sender: device }))),
    bar(0, "tokens inside the node", view.inside, 0.35),
    bar(1, "tokens to other nodes", view.between, 0.9),
    label(0, below + 67, `bytes that GPU ${view.sender} sends in one all-to-all, with ${view.capacity} slots per expert`, { size: 12, soft: true }),
    label(0, below + 92, `GPU ${view.sender} holds ${view.holds[0] === view.holds[1] ? `expert ${view.holds[0]}` : `experts ${view.holds[0]} to ${view.holds[1]}`}: ${size(view.weights)} of the layer's ${size(view.all_weights)}. Tokens travel; weights stay.`),
  ];
}

export const explorer = { compute, draw };
