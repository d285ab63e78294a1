// Shows pairs token by token; attnpo_jax/report/token_data.py says what the data are. Texts of
// others become text nodes and nothing else.
"use strict";
(() => {
  const holder = document.getElementById("tokens-data");
  if (holder === null) return;
  const data = JSON.parse(holder.textContent);
  const PAIRS_AT_A_TIME = 10;
  const SIDES = ["chosen", "rejected"];

  // Numbers: attnpo_jax/report/codes.py.
  const DIGIT = new Map(
    [..."ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"].map((c, i) => [c, i]));
  const NUMBER = Float64Array.from({ length: 4096 }, (_, code) => {
    const level = code & 2047, below = code >= 2048;
    if (level === 0) return below ? NaN : 0;
    const size = 2 ** (-10 + 20 * (level - 1) / 2046);
    return below ? -size : size;
  });

  function places(text, width) {
    return Array.from({ length: text.length / width }, (_, i) => {
      let place = 0;
      for (let k = 0; k < width; k++) place = place * 64 + DIGIT.get(text[i * width + k]);
      return place;
    });
  }

  function numbers(text, count) {
    const found = places(text, 2);
    return Float64Array.from({ length: count }, (_, i) => NUMBER[found[found.length === 1 ? 0 : i]]);
  }

  // Weights by the judge's attention, as attnpo_jax/weighting/shares.py has them.
  function attention(response, layer, order, fixes) {
    const count = response.text, layers = data.layers.length;
    const [first, more] = [0, 1].map((k) => numbers(response.attention[k * layers + layer], count));
    let weights = first.map((x, i) => x + more[i] / 2);
    if (order === "first") weights = first;
    if (order === "second") weights = first.map((x, i) => x + more[i]);
    if (order === "contrast") weights = scaled(more.map(Math.abs), count);
    if (fixes && count >= data.sink) {
      weights = Float64Array.of(1, ...scaled(weights.slice(1), count - 1));
    }
    const whole = new Float64Array(response.n);
    whole.set(weights);
    return whole;
  }

  function scaled(values, total) {
    const sum = values.reduce((a, b) => a + b, 0);
    return values.map((x) => (sum > 0 ? x * total / sum : total / values.length));
  }

  const reference = (r) => numbers(r.reference, r.n);
  const ratio = (r) => numbers(r.ratio, r.n);
  const policy = (r) => {
    if (r.policy !== null) return numbers(r.policy, r.n);
    const ratios = ratio(r);
    return reference(r).map((x, i) => x + ratios[i]);
  };
  const unavailable = "the trained model's log-probs are not here";
  const lacksPolicy = data.policy === "" ? unavailable : null;
  const lacksReference = data.pairs.some((p) => p.responses[0].reference !== null) ? null
    : "the reference's log-probs are not prepared";
  const lacksJudge = data.layers.length === 0 ? "the data have no judge's attention" : null;

  // What the colours can show: `kind` is how numbers become colours; `of` gives a response's.
  const SHOWS = [
    ...data.views.map((view, i) => ({
      ...view, group: i < 1 || view.key === "unshaped" ? "The run's weights" : "Other weightings",
      kind: "weight", of: (r) => (r.views[i] === null ? null : numbers(r.views[i], r.n)),
    })),
    ...[["raw", "raw, both orders' shares", false], ["fixed", "the first token's set to the mean", true]].map(
      ([key, label, fixes]) => ({
        key: `attention-${key}`, label: `attention, ${label}`, group: "Judge's attention",
        about: "The share of the judge's attention that a token has, times the number of tokens; by layer and order.",
        missing: lacksJudge, kind: "weight", attends: true,
        of: (r) => attention(r, Number(at.layer.value), at.order.value, fixes),
      })),
    { key: "ratio", label: "log-ratio, trained to reference", group: "Log-probs", kind: "signed",
      about: "How many nats likelier (warm) or less likely (cold) training has made a token.",
      missing: lacksPolicy || lacksReference, of: ratio },
    { key: "reference", label: "log p, reference", group: "Log-probs", kind: "signed",
      about: "A token's log-prob under the model that training started from, or of config.reference.", missing: lacksReference,
      of: reference },
    { key: "policy", label: `log p, ${data.policy || "trained"}`, group: "Log-probs", kind: "signed",
      about: "A token's log-prob under the trained model.", missing: lacksPolicy,
      of: policy },
  ];
  const has = (name) => data.pairs.some((pair) => pair.figures[name] !== null);
  const SORTS = [
    { key: "data", label: "place in the data", by: null },
    { key: "concentrated", label: "weights, most concentrated first", by: (p) => evenness(p) },
    { key: "even", label: "weights, most even first", by: (p) => -evenness(p) },
    { key: "loss", label: "loss, highest first", by: (p) => -p.figures.loss, of: "loss" },
    { key: "change", label: "changed most by the run first", by: (p) => -p.figures.change, of: "change" },
    { key: "margin", label: "reward margin, lowest first", by: (p) => p.figures.margin, of: "margin" },
    { key: "id", label: "id", by: null },
  ];
  const at = Object.fromEntries(
    ["colour", "beside", "layer", "order", "figures", "query", "sort", "split", "about", "legend",
      "status", "pairs", "pager", "previous", "next", "controls"]
      .map((id) => [id, document.getElementById(id)]));
  let page = 0, listed = data.pairs;
  const pieces = data.pairs.map(() => null);
  const order = new Map(data.pairs.map((pair, i) => [pair, i]));

  function add(parent, tag, text, attributes) {
    const made = document.createElement(tag);
    if (text !== undefined && text !== null) made.textContent = text;
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    parent.append(made);
    return made;
  }

  function choices(select, options) {
    for (const { value, label, group, disabled } of options) {
      let parent = select;
      if (group) {
        parent = [...select.children].find((one) => one.label === group)
          || add(select, "optgroup", null, { label: group });
      }
      const made = add(parent, "option", label, { value });
      made.disabled = Boolean(disabled);
    }
    const first = [...select.options].find((option) => !option.disabled);
    if (first) select.value = first.value;
  }

  const shown = (select) => SHOWS.find((one) => one.key === select.value);

  // Tokens' texts of a pair, by response.
  function textsOf(pair) {
    const i = order.get(pair);
    pieces[i] ||= pair.responses.map((r) => places(r.tokens, 3).map((k) => data.vocabulary[k]));
    return pieces[i];
  }

  // The entropy of a pair's weights, as a share of that of even ones: the mean of both responses.
  function evenness(pair) {
    const found = pair.responses.map((r) => {
      const weights = shown(at.colour).of(r);
      const sum = weights === null ? 0 : weights.reduce((a, b) => a + Math.abs(b), 0);
      if (!(sum > 0) || r.n < 2) return 1;
      const nats = weights.reduce((a, w) => a - (w ? Math.abs(w) / sum * Math.log(Math.abs(w) / sum) : 0), 0);
      return nats / Math.log(r.n);
    });
    return (found[0] + found[1]) / 2;
  }

  // What is chosen stands behind the page's address, so that it can be kept and passed on.
  const KEPT = ["colour", "beside", "layer", "order", "sort", "split", "query", "figures"];
  const DEFAULTS = {};
  const valueOf = (control) => (control.type === "checkbox" ? String(control.checked) : control.value);

  function keep() {
    const chosen = KEPT.filter((id) => valueOf(at[id]) !== DEFAULTS[id]).map((id) => [id, valueOf(at[id])]);
    try {
      history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
    } catch {
      // A page that is shown inside of another one may not.
    }
  }

  function restore() {
    for (const [id, value] of new URLSearchParams(location.hash.slice(1))) {
      const control = KEPT.includes(id) ? at[id] : null;
      if (control === null) continue;
      if (control.type === "checkbox") control.checked = value === "true";
      else if (!control.options || [...control.options].some((one) => one.value === value && !one.disabled)) control.value = value;
    }
  }

  function find() {
    const query = at.query.value.toLowerCase(), split = at.split.value;
    listed = data.pairs.filter((pair) => split === "all" || pair.split === split);
    if (query) {
      listed = listed.filter((pair) => [pair.id, pair.prompt, ...textsOf(pair).map((t) => t.join(""))]
        .some((text) => text.toLowerCase().includes(query)));
    }
    const sort = SORTS.find((one) => one.key === at.sort.value);
    if (sort.key === "id") listed = [...listed].sort((a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : 0));
    if (sort.by) {
      // What has no number comes last; equals stay in the order of the data.
      const known = (x) => (Number.isFinite(x) ? x : Infinity);
      const keyed = listed.map((pair) => [known(sort.by(pair)), pair]);
      listed = keyed.sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0)).map(([, pair]) => pair);
    }
    page = 0;
    draw();
  }

  const short = (x, signed) => {
    if (!Number.isFinite(x)) return "unknown";
    const text = Math.abs(x) >= 100 ? x.toFixed(0) : Math.abs(x) >= 10 ? x.toFixed(1) : x.toFixed(2);
    return signed && x > 0 ? `+${text}` : text.replace(/^-(0\.0+)$/, "$1");
  };

  // How strong a number's colour is: half of the most at a weight of 2, or a nat.
  const strength = (x, kind) => {
    const size = Math.abs(x);
    return Number.isFinite(size) ? 0.85 * size / (size + (kind === "weight" ? 2 : 1)) : 0;
  };

  function colour(element, x, kind) {
    element.style.setProperty("--a", strength(x, kind).toFixed(3));
    element.classList.toggle("below", x < 0);
  }

  // A template's closing tokens stay on one line.
  const visible = (text, closes) => (text === "" ? "·"
    : text.replaceAll("\n", closes ? "↵" : "↵\n").replaceAll("\t", "⇥"));

  function line(parent, response, texts, show, name, second) {
    const values = show.of(response);
    const holder = add(parent, "p", null, {
      class: second ? "tokens second" : "tokens", role: "group", tabindex: "0",
      "aria-label": `${name}, coloured by ${show.label}; arrow keys go from token to token`,
    });
    if (values === null) {
      holder.textContent = "This pair has no such numbers.";
      return;
    }
    texts.forEach((text, i) => {
      const closes = i >= response.text;
      const token = add(holder, "span", visible(text, closes), { class: closes ? "token closing" : "token" });
      token.dataset.place = i;
      colour(token, values[i], show.kind);
      if (at.figures.checked) add(token, "small", short(values[i], show.kind === "signed"));
    });
  }

  // What is known of a response's tokens: by name, a text for each.
  function known(response) {
    const found = new Map();
    for (const show of [shown(at.colour), shown(at.beside)]) {
      const values = show && show.of(response);
      if (values) found.set(show.label, Array.from(values, (x) => short(x, show.kind === "signed")));
    }
    const logps = (values, signed) => Array.from(values, (x) => short(x, signed));
    if (response.reference !== null) found.set("log p, reference", logps(reference(response)));
    if (data.policy !== "") found.set(`log p, ${data.policy}`, logps(policy(response)));
    if (response.ratio !== null) {
      found.set("log-ratio", logps(ratio(response), true));
    }
    return found;
  }

  function watch(box, response, texts, output) {
    let current = -1, columns = null;
    const go = (i) => {
      if (i < 0 || i >= response.n) return;
      box.querySelectorAll(".token.at").forEach((one) => one.classList.remove("at"));
      box.querySelectorAll(`.token[data-place="${i}"]`).forEach((one) => one.classList.add("at"));
      current = i;
      columns ||= known(response);
      const told = [...columns].map(([name, values]) => `${name} ${values[i]}`).join("; ");
      output.textContent = `${i + 1} of ${response.n}, “${texts[i]}”: ${told}`;
    };
    box.addEventListener("pointerover", (event) => {
      const token = event.target.closest(".token");
      if (token) go(Number(token.dataset.place));
    });
    box.addEventListener("keydown", (event) => {
      const to = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: response.n - 1 }[event.key];
      if (to === undefined || !event.target.classList.contains("tokens")) return;
      event.preventDefault();
      go(to);
    });
  }

  function table(parent, response, texts, name) {
    const details = add(parent, "details");
    add(details, "summary", `Numbers of the ${name} response's tokens`);
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector("table")) return;
      const box = add(details, "div", null, { class: "scroll", role: "region", tabindex: "0", "aria-label": `Numbers, ${name}` });
      const made = add(box, "table"), head = add(add(made, "thead"), "tr"), body = add(made, "tbody");
      const columns = known(response);
      ["place", "token", ...columns.keys()].forEach((label) => add(head, "th", label, { scope: "col" }));
      texts.forEach((text, i) => {
        const row = add(body, "tr");
        add(row, "th", String(i + 1), { scope: "row" });
        add(row, "td", visible(text, true), { class: "piece" });
        columns.forEach((values) => add(row, "td", values[i], { class: "number" }));
      });
    });
  }

  function card(pair, number) {
    const made = add(at.pairs, "article", null, { class: "pair", "aria-labelledby": `pair-${number}` });
    add(made, "h3", pair.id, { id: `pair-${number}` });
    const about = [`${pair.split} pair`];
    const told = { loss: "loss", margin: "reward margin", weighted: "weighted margin", change: "mean |log-ratio| a token" };
    for (const [name, label] of Object.entries(told)) {
      if (pair.figures[name] !== null) about.push(`${label} ${short(pair.figures[name])}`);
    }
    about.push(`evenness of the weights ${short(evenness(pair))}`);
    if (pair.verdict && pair.verdict[0] !== null) {
      about.push(`judge's log-odds for the chosen one, first and last: ${pair.verdict.map((x) => short(x, true)).join(", ")}`);
    }
    add(made, "p", about.join("; "), { class: "facts" });
    add(made, "p", pair.prompt, { class: "prompt", tabindex: "0", role: "group", "aria-label": "prompt" });
    const both = add(made, "div", null, { class: "responses" });
    pair.responses.forEach((response, k) => {
      const texts = textsOf(pair)[k], box = add(both, "div");
      add(box, "h4", `${SIDES[k]}, ${response.n} tokens`);
      line(box, response, texts, shown(at.colour), SIDES[k], false);
      if (shown(at.beside)) line(box, response, texts, shown(at.beside), SIDES[k], true);
      const output = add(box, "output");
      watch(box, response, texts, output);
      table(box, response, texts, SIDES[k]);
    });
  }

  function legend() {
    const show = shown(at.colour);
    at.legend.replaceChildren();
    const steps = show.kind === "weight" ? [0, 0.5, 1, 2, 5, 10] : [-5, -1, -0.2, 0, 0.2, 1, 5];
    for (const x of steps) {
      const one = add(at.legend, "span", `\u00a0${x > 0 && show.kind === "signed" ? "+" : ""}${x}\u00a0`, { class: "token" });
      colour(one, x, show.kind);
    }
    add(at.legend, "span", show.kind === "weight" ? "weight; 1 is that of every token in DPO" : "nats");
    at.about.textContent = show.about;
    const attends = show.attends || (shown(at.beside) || {}).attends;
    at.layer.disabled = at.order.disabled = !attends;
  }

  function draw() {
    legend();
    at.pairs.replaceChildren();
    const start = page * PAIRS_AT_A_TIME, some = listed.slice(start, start + PAIRS_AT_A_TIME);
    some.forEach((pair, i) => card(pair, start + i));
    at.status.textContent = some.length
      ? `Pairs ${start + 1} to ${start + some.length} of ${listed.length}${listed.length < data.pairs.length ? ` found, of ${data.pairs.length}` : ""}`
      : "No pair is like that.";
    at.previous.disabled = page === 0;
    at.next.disabled = start + PAIRS_AT_A_TIME >= listed.length;
    at.pager.hidden = listed.length <= PAIRS_AT_A_TIME;
  }

  function turn(by) {
    page += by;
    draw();
    at.status.scrollIntoView();
  }

  const options = SHOWS.map((one) => ({
    value: one.key, group: one.group, disabled: one.missing,
    label: one.missing ? `${one.label} (${one.missing})` : one.label,
  }));
  choices(at.colour, options);
  choices(at.beside, [{ value: "", label: "nothing" }, ...options]);
  choices(at.layer, data.layers.map((layer, i) => ({ value: String(i), label: String(layer) })));
  if (data.layers.length) at.layer.value = String(data.layers.length - 1);
  choices(at.order, [
    ["mean", "mean of both"], ["first", "chosen shown first"], ["second", "chosen shown last"],
    ["contrast", "how far both are apart"],
  ].map(([value, label]) => ({ value, label })));
  choices(at.sort, SORTS.map(({ key, label, of }) => ({ value: key, label, disabled: of && !has(of) })));
  const splits = [...new Set(data.pairs.map((pair) => pair.split))];
  choices(at.split, [{ value: "all", label: "all" }, ...splits.map((one) => ({ value: one, label: one }))]);
  for (const id of KEPT) DEFAULTS[id] = valueOf(at[id]);
  restore();
  for (const id of KEPT) {
    at[id].addEventListener(id === "query" ? "input" : "change", () => {
      const finds = ["sort", "split", "query"].includes(id) || ["concentrated", "even"].includes(at.sort.value);
      keep();
      if (finds) find();
      else draw();
    });
  }
  at.controls.addEventListener("submit", (event) => event.preventDefault());
  at.previous.addEventListener("click", () => turn(-1));
  at.next.addEventListener("click", () => turn(1));
  at.controls.hidden = false;
  find();
})();
