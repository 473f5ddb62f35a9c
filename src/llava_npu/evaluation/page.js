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

function scoreTable() {
  if (!data.scores.rows.length) return null;
  const cells = (row) => row.map((cell, place) => make("td", place ? { class: "number" } : {}, cell));
  return make("table", {},
    make("thead", {}, make("tr", {}, ...data.scores.columns.map((name) => make("th", {}, name)))),
    make("tbody", {}, ...data.scores.rows.map((row) => make("tr", {}, ...cells(row)))));
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
  if (data.rules.length > 1) {
    form.append(choice("only", "only where", [["differ", "rules disagree"], ["error", "there is no answer"]], "—"));
  }
  form.append(make("span", { id: "count", class: "faint", "aria-live": "polite" }));
  form.addEventListener("input", () => show(true));
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
    if (values.only === "error" && !answers.some((answer) => answer.error)) return false;
    return !text || [one.id, one.text, ...Object.values(one.options), ...answers.map((answer) => answer.text)]
      .some((part) => part.toLowerCase().includes(text));
  });
  return [found, rule];
}

function answerBox(answer, run, rule) {
  const state = verdict(answer, rule);
  const name = data.runs.length > 1 ? make("span", { class: "faint small" }, run) : null;
  if (!answer) return make("div", { class: "answer" }, make("span", { class: "badge" }, WORDS.missing), name);
  const credit = answer.credit[rule];
  const badge = state === "partly" ? `${WORDS.partly} (${credit.toFixed(2)})` : WORDS[state];
  const readings = data.rules.filter((each) => each in answer.read)
    .map((each) => `${each}: ${answer.read[each] === null ? "—" : answer.read[each]}`).join(" · ");
  const read = readings ? make("div", { class: "faint small" }, `read as ${readings}`) : null;
  return make("div", { class: `answer ${state}` },
    make("span", { class: "badge" }, badge), name,
    make("div", { class: "text" }, answer.error ? `no answer: ${answer.error}` : answer.text || "(empty)"), read);
}

function card(one, rule) {
  const pictures = one.images.map((place) => place === null
    ? make("p", { class: "faint small" }, "(picture not in this page)")
    : make("img", { src: data.pictures[place], alt: `picture of question ${one.id}`, loading: "lazy" }));
  const labels = [`question ${one.id}`, one.rotation ? `rotation ${one.rotation} of question ${one.group}` : "", one.split, one.l2, one.category];
  const options = Object.entries(one.options).map(([letter, text]) =>
    make("li", letter === one.truth ? { class: "truth" } : {}, `${letter}. ${text}`));
  const known = one.truth !== null && !(one.truth in one.options)
    ? make("p", { class: "small" }, make("span", { class: "faint" }, "expected: "), one.truth) : null;
  const prompt = (one.answers.find((answer) => answer) || {}).prompt;
  return make("article", { id: `q-${one.id}` },
    make("div", {}, ...(pictures.length ? pictures : [make("p", { class: "faint small" }, "(no picture)")])),
    make("div", {},
      make("p", { class: "faint small" }, labels.filter((label) => label).join(" · ")),
      make("p", { class: "question" }, one.text),
      options.length ? make("ul", {}, ...options) : null, known,
      ...one.answers.map((answer, place) => answerBox(answer, data.runs[place], rule)),
      prompt ? make("details", {}, make("summary", {}, "whole prompt"), make("pre", {}, prompt)) : null));
}

let shown = 0;
function show(afresh) {
  const [found, rule] = chosen();
  const cases = document.getElementById("cases");
  if (afresh) { cases.replaceChildren(); shown = 0; }
  cases.append(...found.slice(shown, shown + STEP).map((one) => card(one, rule)));
  shown = Math.min(shown + STEP, found.length);
  const right = data.runs.map((run, place) => {
    const states = found.map((one) => verdict(one.answers[place], rule));
    return states.filter((state) => state === "right").length;
  });
  const scored = found.some((one) => one.answers.some((answer) => verdict(answer, rule) !== "secret"));
  document.getElementById("count").textContent =
    `${found.length} of ${data.cases.length} questions` + (scored ? `, right: ${right.join(" / ")}` : "");
  document.getElementById("more").hidden = shown >= found.length;
}

document.getElementById("title").textContent = data.title;
document.getElementById("scores").append(...[scoreTable()].filter((table) => table));
if (data.notes.length) {
  const lines = data.notes.map((line) => make("li", {}, line));
  document.getElementById("notes").append(
    make("details", {}, make("summary", {}, `notes (${lines.length})`), make("ul", { class: "faint small" }, ...lines)));
}
buildFilters(document.getElementById("filters"));
document.getElementById("more").addEventListener("click", () => show(false));
show(true);
