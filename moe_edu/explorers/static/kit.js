// The frame of every explorer, and the parts its picture is made of.
//
// An explorer is { compute(state, data) -> view, draw(view, state, act, spec) -> [node] }. Both are pure: `compute`
// returns numbers, `view.sentence`, `view.met` and perhaps `view.shown` (a text for a slider's value); `draw` returns
// nodes made with `h`. `act.set({field: value})` changes the state. Nothing measures text, so a picture is the same on every machine.

// ---- words and numbers, as moe_edu/explorers/wording.py

export function fixed(value, digits = 2) {
  const rounded = Math.abs(value).toFixed(digits);
  return (value < 0 && Number(rounded) !== 0 ? "−" : "") + rounded;
}

export const percent = (share, digits = 0) => `${fixed(100 * share, digits)} %`;

export function listed(items) {
  if (items.length < 2) return items.join("");
  return `${items.slice(0, -1).join(", ")} and ${items[items.length - 1]}`;
}

export const count = (number, thing) => `${number || "no"} ${thing}${number === 1 ? "" : "s"}`;

// ---- arithmetic

export function softmax(logits) {
  const top = Math.max(...logits);
  const exps = logits.map((logit) => Math.exp(logit - top));
  const sum = exps.reduce((a, b) => a + b, 0);
  return exps.map((value) => value / sum);
}

export function argmax(values) {
  return values.reduce((best, value, i) => (value > values[best] ? i : best), 0);
}

export const sum = (values) => values.reduce((a, b) => a + b, 0);
export const range = (n) => Array.from({ length: n }, (_, i) => i);
export const zeros = (rows, columns) => range(rows).map(() => Array(columns).fill(0));

// ---- nodes: h() describes an element, patch() brings the page to what is described and keeps focus and pointer

const SVG = "http://www.w3.org/2000/svg";

export const h = (tag, attributes = {}, ...children) => ({ tag, attributes, children });

function patch(parent, nodes, isSvg) {
  nodes = nodes.flat(9).filter((node) => node !== null && node !== undefined && node !== false);
  nodes.forEach((node, i) => {
    let element = parent.childNodes[i];
    if (typeof node !== "object") {
      if (!element || element.nodeType !== 3) {
        const text = document.createTextNode(String(node));
        if (element) parent.replaceChild(text, element);
        else parent.appendChild(text);
      } else if (element.data !== String(node)) element.data = String(node);
      return;
    }
    if (!element || element.nodeType !== 1 || element.localName !== node.tag) {
      const made = isSvg ? document.createElementNS(SVG, node.tag) : document.createElement(node.tag);
      if (element) parent.replaceChild(made, element);
      else parent.appendChild(made);
      element = made;
    }
    for (const { name } of [...element.attributes]) if (!(name in node.attributes)) element.removeAttribute(name);
    for (const name of element.moeEvents || []) if (!(name in node.attributes)) element[name] = null;
    element.moeEvents = [];
    for (const [name, value] of Object.entries(node.attributes)) {
      if (name.startsWith("on")) {
        element[name] = value;
        element.moeEvents.push(name);
      } else if (value === null || value === undefined || value === false) element.removeAttribute(name);
      else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
    }
    if (!("data-opaque" in node.attributes)) patch(element, node.children, isSvg);
  });
  while (parent.childNodes.length > nodes.length) parent.removeChild(parent.lastChild);
}

// ---- parts of pictures

// Text. Options: size, anchor (start, middle, end), weight, soft, mono, fill.
export const label = (x, y, text, { size = 14, anchor = "start", weight, soft, mono, fill } = {}) =>
  h("text", {
    x, y, "font-size": size, "text-anchor": anchor, "font-weight": weight, fill,
    class: `${fill ? "" : soft ? "soft" : "ink"}${mono ? " mono" : ""}`.trim() || null,
  }, text);

// A word as a chip of `width`, followed by its language code. Options: language, padding, dropped.
export const chip = (x, y, width, word, { language, padding, dropped } = {}) =>
  h("g", { transform: `translate(${x},${y})` },
    h("rect", { width, height: 30, rx: 6, class: `chip${padding ? " padding" : ""}${dropped ? " dropped" : ""}` }),
    label(10, 20, word, { soft: padding }),
    language && label(width - 8, 20, language, { size: 11, anchor: "end", soft: true }));

// Hatching, for what was dropped: put it into the stage once, before it is used.
export const hatching = () =>
  h("defs", {}, h("pattern",
    { id: "moe-hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    h("rect", { width: 2, height: 6, class: "hatch" })));

// An expert's name on its colour. `style` comes from spec.experts.
export const expertTag = (x, y, width, style, height = 24) =>
  h("g", { transform: `translate(${x},${y})` },
    h("rect", { width, height, rx: 4, fill: style.color, class: "tag" }),
    label(width / 2, height / 2 + 5, style.label, { anchor: "middle", weight: 600, fill: style.ink }));

// A cell of a matrix: one hue, stronger for larger `share` (0 to 1); zero is empty and dotted.
export const cell = (x, y, width, height, share, text) =>
  h("g", {},
    h("rect", { x, y, width, height, class: share > 0 ? "cell" : "cell zero", "fill-opacity": (0.55 * share).toFixed(3) }),
    text !== undefined && label(x + width / 2, y + height / 2 + 5, text, { anchor: "middle", mono: true, size: 13 }));

// A box on an expert's colour. The edge of a second choice is dashed, in the ink that shows on that colour.
export const colored = ({ x, y, width, height, rx = 0 }, style, second) =>
  h("g", {},
    h("rect", { x, y, width, height, rx, fill: style.color, class: "tag" }),
    second ? h("rect", { x: x + 1.5, y: y + 1.5, width: Math.max(width - 3, 0), height: height - 3, rx: Math.max(rx - 1, 0),
      fill: "none", stroke: style.ink, "stroke-dasharray": "4 3" }) : null);

// The frame of a choice: the first solid, the second dashed, in the colour of its expert over a line that shows on any page.
export const choiceFrame = (x, y, width, height, style, second) =>
  h("g", {},
    h("rect", { x, y, width, height, rx: 3, class: "under", "stroke-dasharray": second ? "7 4" : null, "stroke-dashoffset": 0.5 }),
    h("rect", { x, y, width, height, rx: 3, fill: "none", stroke: style.color, "stroke-width": 3,
      "stroke-dasharray": second ? "6 5" : null }));

// A number to change: by dragging (up or right increases it), by arrow keys, Page Up and Down, Home and End.
// `children` is what is drawn there; `name` and `text` are read out.
export function handle({ x, y, width, height, name, text, value, low, high, step, onChange }, ...children) {
  const settle = (next) => {
    const value = Math.min(high, Math.max(low, low + Math.round((next - low) / step) * step));
    onChange(Number(value.toFixed(6)));
  };
  const leaps = {
    ArrowUp: step, ArrowRight: step, ArrowDown: -step, ArrowLeft: -step, PageUp: 10 * step, PageDown: -10 * step,
    Home: low - value, End: high - value,
  };
  return h("g", {
    role: "slider", tabindex: 0, class: "handle", "data-lm-suppress-shortcuts": "true", "aria-label": name,
    "aria-valuenow": value, "aria-valuemin": low, "aria-valuemax": high, "aria-valuetext": text,
    onkeydown(event) {
      if (!(event.key in leaps)) return;
      event.preventDefault();
      event.stopPropagation();
      settle(value + leaps[event.key]);
    },
    onpointerdown(event) {
      if (event.button) return;
      event.currentTarget.setPointerCapture(event.pointerId);
      event.currentTarget.focus();
      event.currentTarget.moeDrag = { value, at: event.clientX - event.clientY };
      event.preventDefault();
    },
    onpointermove(event) {
      const drag = event.currentTarget.moeDrag;
      if (drag) settle(drag.value + ((event.clientX - event.clientY - drag.at) / 120) * (high - low));
    },
    onpointerup(event) { event.currentTarget.moeDrag = null; },
    onpointercancel(event) { event.currentTarget.moeDrag = null; },
  }, h("rect", { x, y, width, height, rx: 3, class: "grip" }), children);
}

// Something to press, by mouse, Enter or space. `name` is read out. `tabindex` is -1 if other controls reach the same value.
export const button = ({ x, y, width, height, name, pressed, onPress, tabindex = 0 }, ...children) =>
  h("g", {
    role: "button", tabindex, class: "handle press", "data-lm-suppress-shortcuts": "true", "aria-label": name,
    "aria-pressed": pressed === undefined ? null : String(pressed),
    onclick: onPress,
    onkeydown(event) {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      event.stopPropagation();
      onPress();
    },
  }, h("rect", { x, y, width, height, rx: 3, class: "grip" }), children);

// ---- the frame

const STYLE = `
.moe-x { --moe-ink: var(--jp-content-font-color0, currentColor); --moe-soft: color-mix(in srgb, var(--moe-ink) 78%, transparent);
  --moe-line: color-mix(in srgb, var(--moe-ink) 45%, transparent); --moe-hue: #3b8ed0;
  color: var(--moe-ink); max-width: 720px; font: 14px/1.4 var(--jp-content-font-family, system-ui, sans-serif); margin: 8px 0; }
.moe-x .moe-x-head { display: flex; justify-content: space-between; align-items: baseline; gap: 24px; }
.moe-x .moe-x-title { font-weight: 600; font-size: 16px; margin: 0; }
.moe-x p { margin: 4px 0; }
.moe-x .moe-x-controls { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 6px 24px; align-items: center; margin: 8px 0 12px; }
.moe-x .moe-x-wide { grid-column: 1 / -1; }
.moe-x label { display: flex; align-items: center; gap: 8px; } .moe-x label span:first-child { min-width: 116px; }
.moe-x input[type=text], .moe-x select { min-width: 0; }
.moe-x input[type=range] { width: 130px; accent-color: var(--moe-hue); }
.moe-x input[type=text], .moe-x select, .moe-x button { font: inherit; color: inherit; background: transparent;
  border: 1px solid var(--moe-line); border-radius: 4px; padding: 2px 8px; }
.moe-x option { color: #1a1a1a; background: #fff; }
.moe-x output { font-variant-numeric: tabular-nums; min-width: 44px; }
.moe-x .moe-x-stage { overflow-x: auto; }
.moe-x svg { display: block; width: 100%; min-width: 640px; height: auto; touch-action: pan-x pan-y; user-select: none; }
.moe-x svg .handle:not(.press), .moe-x svg .handle:not(.press) * { touch-action: none; }
.moe-x .moe-x-sentence { min-height: 2.8em; }
.moe-x ul { list-style: none; display: flex; flex-wrap: wrap; gap: 6px 8px; margin: 8px 0 !important; padding: 0 !important; }
.moe-x li { border: 1px dashed var(--moe-line); border-radius: 12px; padding: 2px 10px; font-size: 13px; margin: 0; }
.moe-x li.met { border-style: solid; font-weight: 600; }
.moe-x :focus-visible { outline: 2px solid var(--moe-hue); outline-offset: 2px; }`;

const DRAWING = `
text { font-family: var(--jp-content-font-family, system-ui, sans-serif); font-variant-numeric: tabular-nums; }
.ink { fill: var(--moe-ink); } .soft { fill: var(--moe-soft); } .mono { font-family: var(--jp-code-font-family, ui-monospace, monospace); }
.line { stroke: var(--moe-line); fill: none; } .curve { stroke: var(--moe-ink); fill: none; stroke-width: 2; }
.chip { fill: none; stroke: var(--moe-line); } .padding { stroke: var(--moe-soft); stroke-dasharray: 2 3; }
.dropped { fill: var(--moe-hatch, url(#moe-hatch)); stroke: var(--moe-ink); stroke-width: 1.5; } .hatch { fill: var(--moe-line); }
.tag { stroke: var(--moe-ink); stroke-opacity: .5; } .slot { fill: none; stroke: var(--moe-soft); }
.cell { fill: var(--moe-hue); stroke: var(--moe-soft); stroke-width: .5; } .zero { fill: none; stroke-width: 1; stroke-dasharray: 2 3; }
.under { fill: none; stroke: var(--moe-ink); stroke-width: 5; stroke-opacity: .75; }
.grip { fill: transparent; } .handle { cursor: ns-resize; } .press { cursor: pointer; }
.handle:hover .grip { stroke: var(--moe-ink); } .handle:focus { outline: none; }
.handle:focus-visible .grip { stroke: var(--moe-ink); stroke-width: 2.5; }`;

// `shown` is a text for a slider's value in place of its number.
function control(field, value, shown, onInput) {
  const common = { "data-lm-suppress-shortcuts": "true", "data-field": field.name };
  if (field.kind === "Slider") {
    const digits = [0, 1, 2].find((n) => Number.isInteger(Number((field.step * 10 ** n).toFixed(6))));
    const text = shown ?? `${fixed(value, digits)}${field.unit ? ` ${field.unit}` : ""}`;
    return h("label", {}, h("span", {}, field.label),
      h("input", { ...common, type: "range", min: field.low, max: field.high, step: field.step, "aria-valuetext": text,
        oninput: (event) => onInput(Number(event.target.value)) }),
      h("output", {}, text));
  }
  if (field.kind === "Choice") {
    const wide = field.options.some(([, text]) => text.length > 24);
    return h("label", { class: wide ? "moe-x-wide" : null }, h("span", {}, field.label), h("select", { ...common, onchange: (event) => onInput(event.target.value) },
      field.options.map(([option, text]) => h("option", { value: option }, text))));
  }
  if (field.kind === "Toggle") {
    return h("label", {}, h("input", { ...common, type: "checkbox", onchange: (event) => onInput(event.target.checked) }),
      h("span", {}, field.label));
  }
  return h("label", {}, h("span", {}, field.label), h("input", { ...common, type: "text", maxlength: field.max_length, size: 20,
    oninput: (event) => onInput(event.target.value) }));
}

// Puts an explorer into `root`; returns a function that replaces its state. `onState` is called after every change made here.
export function mount(root, explorer, spec, initial, onState = () => {}) {
  let state = structuredClone(initial);
  let met = spec.challenges.map(() => false);
  const hatch = `moe-hatch-${Math.random().toString(36).slice(2)}`;
  root.replaceChildren();
  root.classList.add("moe-x");
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", spec.title);
  const style = root.appendChild(document.createElement("style"));
  style.textContent = `${STYLE}\n.moe-x svg {${DRAWING}}`;
  const frame = root.appendChild(document.createElement("div"));
  const change = (changes) => {
    state = { ...state, ...changes };
    redraw();
    onState(state);
  };
  function reset() {
    met = met.map(() => false);
    change(structuredClone(initial));
  }
  function redraw() {
    const view = explorer.compute(state, spec.data);
    met = met.map((already, i) => already || view.met[i]);
    const controls = spec.fields.filter((field) => field.kind !== "Grid");
    patch(frame, [
      h("div", { class: "moe-x-head" }, h("p", { class: "moe-x-title" }, spec.title),
        h("button", { type: "button", "data-lm-suppress-shortcuts": "true", onclick: reset }, "Reset")),
      h("p", {}, spec.purpose),
      h("div", { class: "moe-x-controls" },
        controls.map((field) => control(field, state[field.name], view.shown?.[field.name], (value) => change({ [field.name]: value })))),
      h("div", { class: "moe-x-stage", "data-opaque": "" }),
      h("p", { class: "moe-x-sentence", "aria-live": "polite" }, view.sentence),
      h("ul", { "aria-label": "Challenges" },
        spec.challenges.map((text, i) => h("li", { class: met[i] ? "met" : null }, `${met[i] ? "✓ met:" : "○"} ${text}`))),
    ]);
    // Values are properties, not attributes: set them only if they differ, so that typing is not disturbed.
    for (const input of frame.querySelectorAll("[data-field]")) {
      const value = state[input.dataset.field];
      if (input.type === "checkbox") input.checked = value;
      else if (input.value !== String(value)) input.value = String(value);
    }
    const stage = frame.querySelector(".moe-x-stage");
    const svg = stage.firstChild || stage.appendChild(document.createElementNS(SVG, "svg"));
    svg.setAttribute("viewBox", `0 0 720 ${spec.height}`);
    svg.setAttribute("role", "group");
    svg.setAttribute("aria-label", `Picture: ${spec.title}`);
    patch(svg, explorer.draw(view, state, { set: change }, spec), true);
    // A unique id: the first pattern of the document may be another explorer's, in a hidden tab.
    const pattern = svg.querySelector("pattern");
    if (pattern) {
      pattern.id = hatch;
      svg.style.setProperty("--moe-hatch", `url(#${hatch})`);
    }
  }
  redraw();
  root.dataset.mounted = "true";
  return (next) => {
    state = next;
    redraw();
  };
}

// The stage as a separate picture, dark on white, for pages that run no scripts.
export function snapshot(svg) {
  const copy = svg.cloneNode(true);
  for (const element of [copy, ...copy.querySelectorAll("*")]) {
    for (const { name } of [...element.attributes]) if (/^(aria-|role|tabindex|data-)/.test(name)) element.removeAttribute(name);
  }
  copy.setAttribute("xmlns", SVG);
  copy.removeAttribute("style"); // the same picture each time, and no other explorer's hatching on its page
  copy.querySelector("pattern")?.setAttribute("id", "moe-hatch");
  const style = document.createElementNS(SVG, "style");
  style.textContent = `svg { --moe-ink: #1a1a1a; --moe-soft: #4d4d4d; --moe-line: #8c8c8c; --moe-hue: #3b8ed0; background: #fff; }${DRAWING}`;
  copy.prepend(style);
  return new XMLSerializer().serializeToString(copy);
}

export function mountWidget({ model, el }, explorer) {
  const root = el.appendChild(document.createElement("div"));
  const follow = mount(root, explorer, model.get("spec"), model.get("state"), (state) => {
    model.set("state", state);
    model.save_changes();
  });
  model.on("change:state", () => follow(model.get("state")));
}
