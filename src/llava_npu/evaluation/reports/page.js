"use strict";
// Everything comes from the JSON in the page, and every text is set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const STEP = 40; // cards at once

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "class") element.className = value; else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function verdict(answer, rule) {
  if (!answer) return "missing";
  const credit = answer.credit[rule];
  if (credit === null || credit === undefined) return "secret";
  return credit >= 1 ? "right" : credit > 0 ? "partly" : "wrong";
}

const WORDS = { right: "right", partly: "partly right", wrong: "wrong", secret: "not scored", missing: "no answer" };

function scoreTable(scores) {
  const kind = (place) => (place ? { class: "number" } : {});
  const table = make("table", {},
    make("thead", {}, make("tr", {}, ...scores.columns.map((name, place) => make("th", kind(place), name)))),
    make("tbody", {}, ...scores.rows.map((row) =>
      make("tr", {}, ...row.map((cell, place) => make("td", kind(place), cell))))));
  const framed = make("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": scores.folded || "scores" }, table);
  return scores.folded ? make("details", {}, make("summary", {}, scores.folded), framed) : framed;
}

// The rotations of one question, where there are any: what a circular score asks for is that all of them are right.
const groups = new Map();
for (const one of data.cases) groups.set(one.group, [...(groups.get(one.group) || []), one]);
const rotated = data.cases.some((one) => one.rotation);

function rightRotations(one, place, rule) {
  return groups.get(one.group).filter((each) => verdict(each.answers[place], rule) === "right").length;
}

function isTorn(one, rule) {
  const all = groups.get(one.group).length;
  return data.runs.some((run, place) => ![0, all].includes(rightRotations(one, place, rule)));
}

function choice(name, title, values, every) {
  const options = values.map(([value, text]) => make("option", { value }, text));
  const select = make("select", { name }, ...(every ? [make("option", { value: "" }, every)] : []), ...options);
  return make("label", {}, title, select);
}

function distinct(key) {
  return [...new Set(data.cases.map((one) => one[key]).filter((value) => value))].sort();
}

function buildFilters(form) {
  const own = (values) => values.map((value) => [value, value]);
  form.append(make("label", {}, "text", make("input", { name: "text", type: "search", placeholder: "question, answer, id" })));
  for (const [key, title] of [["split", "split"], ["l2", "l2-category"], ["category", "category"]]) {
    const values = distinct(key);
    if (values.length > 1) form.append(choice(key, title, own(values), "all"));
  }
  if (data.rules.length > 1) form.append(choice("rule", "read by", own(data.rules), null));
  const states = Object.entries(WORDS).filter(([state]) =>
    data.cases.some((one) => one.answers.some((answer) => data.rules.some((rule) => verdict(answer, rule) === state))));
  data.runs.forEach((run, place) => {
    form.append(choice(`run${place}`, data.runs.length > 1 ? run : "answer", states, "all"));
  });
  const only = [
    ["differ", "rules disagree", data.rules.length > 1],
    ["runs", "models differ", data.runs.length > 1],
    ["torn", "some rotations are right, some wrong", rotated],
    ["error", "there is no answer", data.cases.some((one) => one.answers.some((answer) => answer && answer.error))],
  ].filter(([, , possible]) => possible);
  if (only.length) form.append(choice("only", "only where", only.map(([value, text]) => [value, text]), "—"));
  form.append(make("span", { id: "count", class: "faint", "aria-live": "polite" }));
  form.addEventListener("input", () => show(true));
  form.addEventListener("reset", () => setTimeout(() => show(true))); // once the fields are empty
  form.addEventListener("submit", (event) => event.preventDefault());
}

function chosen() {
  const values = Object.fromEntries(new FormData(document.getElementById("filters")));
  const rule = values.rule || data.rules[0];
  const text = (values.text || "").toLowerCase();
  const found = data.cases.filter((one) => {
    for (const key of ["split", "l2", "category"]) if (values[key] && one[key] !== values[key]) return false;
    for (let place = 0; place < data.runs.length; place++) {
      const wanted = values[`run${place}`];
      if (wanted && verdict(one.answers[place], rule) !== wanted) return false;
    }
    const answers = one.answers.filter((answer) => answer);
    if (values.only === "differ" && !answers.some((answer) => new Set(Object.values(answer.read)).size > 1)) return false;
    if (values.only === "runs" && new Set(one.answers.map((answer) => verdict(answer, rule))).size < 2) return false;
    if (values.only === "torn" && !isTorn(one, rule)) return false;
    if (values.only === "error" && !answers.some((answer) => answer.error)) return false;
    return !text || [one.id, one.text, ...Object.values(one.options), ...answers.map((answer) => answer.text)]
      .some((part) => part.toLowerCase().includes(text));
  });
  return [found, rule];
}

function answerBox(one, place, rule) {
  const [answer, run] = [one.answers[place], data.runs[place]];
  const state = verdict(answer, rule);
  const name = data.runs.length > 1 ? make("span", { class: "faint small" }, run) : null;
  if (!answer) return make("div", { class: "answer" }, make("span", { class: "badge" }, WORDS.missing), name);
  const credit = answer.credit[rule];
  const badge = state === "partly" ? `${WORDS.partly} (${credit.toFixed(2)})` : WORDS[state];
  const readings = data.rules.filter((each) => each in answer.read)
    .map((each) => `${each}: ${answer.read[each] === null ? "—" : answer.read[each]}`).join(" · ");
  const all = groups.get(one.group).length;
  const rotations = rotated && state !== "secret"
    ? make("span", { class: "faint small" }, ` ${rightRotations(one, place, rule)} of ${all} rotations right`) : null;
  const read = readings ? make("div", { class: "faint small" }, `read as ${readings}`) : null;
  return make("div", { class: `answer ${state}` },
    make("span", { class: "badge" }, badge), name, rotations,
    make("div", { class: "text" }, answer.error ? `no answer: ${answer.error}` : answer.text || "(empty)"), read);
}

function expected(one) {
  if (one.references.length < 2) return one.truth;
  return one.references.map(([text, count]) => (count > 1 ? `${text} (${count})` : text)).join(", ");
}

function card(one, rule) {
  const images = one.images.map((place) => place === null
    ? make("p", { class: "faint small" }, "(image not in this page)")
    : make("button", { class: "zoom", type: "button", title: "larger or smaller" },
      make("img", { src: data.images[place], alt: `image of question ${one.id}`, loading: "lazy" })));
  const labels = [`question ${one.id}`, one.rotation ? `rotation ${one.rotation} of question ${one.group}` : "", one.split, one.l2, one.category];
  const options = Object.entries(one.options).map(([letter, text]) =>
    make("li", letter === one.truth ? { class: "truth" } : {}, `${letter}. ${text}`));
  const known = one.truth !== null && !(one.truth in one.options)
    ? make("p", { class: "small" }, make("span", { class: "faint" }, "expected: "), expected(one)) : null;
  const prompt = (one.answers.find((answer) => answer) || {}).prompt;
  return make("article", { id: `q-${one.id}` },
    make("div", {}, ...(images.length ? images : [make("p", { class: "faint small" }, "(no image)")])),
    make("div", {},
      make("p", { class: "faint small" }, labels.filter((label) => label).join(" · ")),
      make("p", { class: "question" }, one.text),
      options.length ? make("ul", {}, ...options) : null, known,
      ...one.answers.map((answer, place) => answerBox(one, place, rule)),
      prompt ? make("details", {}, make("summary", {}, "whole prompt"), make("pre", {}, prompt)) : null));
}

function named(counts) {
  return counts.map((count, place) => (data.runs.length > 1 ? `${data.runs[place]} ${count}` : `${count}`)).join(", ");
}

let shown = 0;
function show(fromTop) {
  const [found, rule] = chosen();
  const cases = document.getElementById("cases");
  if (fromTop) { cases.replaceChildren(); shown = 0; }
  cases.append(...found.slice(shown, shown + STEP).map((one) => card(one, rule)));
  shown = Math.min(shown + STEP, found.length);
  const right = data.runs.map((run, place) => {
    const states = found.map((one) => verdict(one.answers[place], rule));
    return states.filter((state) => state === "right").length;
  });
  const scored = found.some((one) => one.answers.some((answer) => verdict(answer, rule) !== "secret"));
  document.getElementById("count").textContent =
    `${found.length} of ${data.cases.length} questions` + (scored ? `, right: ${named(right)}` : "");
  document.getElementById("more").hidden = shown >= found.length;
  document.getElementById("none").hidden = found.length > 0;
}

document.getElementById("title").textContent = data.title;
document.getElementById("scores").append(...data.scores.map(scoreTable));
if (data.notes.length) {
  const lines = data.notes.map((line) => make("li", {}, line));
  document.getElementById("notes").append(
    make("details", {}, make("summary", {}, `notes (${lines.length})`), make("ul", { class: "faint small" }, ...lines)));
}
buildFilters(document.getElementById("filters"));
document.getElementById("more").addEventListener("click", () => show(false));
document.getElementById("cases").addEventListener("click", (event) => {
  if (event.target.closest(".zoom")) event.target.closest("article").classList.toggle("wide");
});
show(true);
